"""Serve models over HTTP until it is stopped.

    python jobs/serve.py --config jobs/configs/serve.yaml

Whoever calls needs an API key: --new_key NAME makes one. SIGHUP reads the configuration again and replaces
the models without a restart. What a request may be is on the page /docs of the server itself.
"""

import signal
import sys
import threading

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

    print(f"serving {', '.join(config.models)} at {serve.start(config)}", flush=True)
    while wait() == signal.SIGHUP:
        replace_models(config)
    serve.stop()
    return 0


def wait() -> int:
    """The signal that came: HUP, INT or TERM."""
    woken, came = threading.Event(), []
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda found, _: (came.append(found), woken.set()))
    woken.wait()
    return came[0]


def replace_models(config: ServeConfig) -> None:
    """Serve what the configuration says now; everything but its models stays as it was."""
    from cluster import serve

    try:
        models = parse(ServeConfig, sys.argv[1:]).models
        serve.start(config.model_copy(update={"models": models}))
        print(f"serving {', '.join(models)}", flush=True)
    except KdsrError as error:
        print(f"the models stay as they are: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(ServeConfig, run)
