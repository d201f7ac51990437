"""Serve models over HTTP until it is stopped.

    python jobs/serve.py --config jobs/configs/serve.yaml

Whoever calls needs an API key: --new_key NAME makes one. SIGHUP reads the configuration again and replaces
the models without a restart. What a request may be is on the page /docs of the server itself.
"""

import signal
import sys
from queue import SimpleQueue

from kdsr.cli import main, parse
from kdsr.config import ServeConfig
from kdsr.errors import KdsrError


def run(config: ServeConfig) -> int:
    """Serve, and replace models when asked, until a signal says stop."""
    from kdsr.serving.keys import new_key

    if config.new_key is not None:
        key, lines = new_key(config.new_key)
        print(f"the key, shown this once: {key}\n\n{lines}")
        return 0
    from cluster import serve

    address = serve.start(config)
    came = signals()
    print(f"serving {', '.join(config.models)} at {address}", flush=True)
    while came.get() == signal.SIGHUP:
        replace_models(config)
    serve.stop()
    return 0


def signals() -> "SimpleQueue[int]":
    """Each HUP, INT and TERM from now on, those too that come while another one is being answered."""
    came: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda found, _: came.put(found))
    return came


def replace_models(config: ServeConfig) -> None:
    """Serve what the configuration says now; everything but its models stays as it was."""
    from cluster import serve

    try:
        models = parse(ServeConfig, sys.argv[1:]).models
        serve.start(config.model_copy(update={"models": models}))
        print(f"serving {', '.join(models)}", flush=True)
    except KdsrError as error:
        print(f"the models stay as they are: {error}", file=sys.stderr, flush=True)
    except Exception as error:  # noqa: BLE001 whatever Ray raises, the server goes on
        found = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        print(
            f"the models were not all replaced; GET /v1/models says what is served: {found}",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main(ServeConfig, run)
