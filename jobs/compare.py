"""Compare ways of distilling: methods x students x seeds under one budget, with table and plots.

python jobs/compare.py --config jobs/configs/compare_x4.yaml
"""

import sys

from kdsr.cli import main
from kdsr.config import CompareConfig


def run(config: CompareConfig) -> int:
    """Train what is missing, write down what there is, and say which cells failed."""
    from cluster.compare import compare
    from kdsr.compare_report import Comparison, write_comparison

    lost = {} if config.render_only else compare(config)
    report = write_comparison(config)
    failed = Comparison(config).failed | lost
    for name, cause in failed.items():
        print(f"failed: {name}: {cause}", file=sys.stderr)
    print(report.table)
    print()
    print(report.sentence)
    return 1 if failed else 0


if __name__ == "__main__":
    main(CompareConfig, run)
