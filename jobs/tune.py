"""Search for learning rate, weights, width or terms of a run: seeded draws, weak trials stopped early.

python jobs/tune.py --config jobs/configs/tune_demo.yaml
"""

import sys

from kdsr.cli import main
from kdsr.config import TuneConfig


def run(config: TuneConfig) -> int:
    """Run what is missing, write down what there is, and say which trials failed."""
    from cluster.tune import tune
    from kdsr.tune_report import Search, write_search

    if not config.render_only:
        tune(config)
    report = write_search(config)
    failed = Search(config).failed
    for name, cause in failed.items():
        print(f"failed: {name}: {cause}", file=sys.stderr)
    print(report.table)
    print()
    print(report.sentence)
    return 1 if failed else 0


if __name__ == "__main__":
    main(TuneConfig, run)
