"""Cut photographs into lossless sub-images and store them as Parquet shards, or tell what is in shards.

    python jobs/shard.py --input photos --output out/shards
    python jobs/shard.py --check out/shards

JPEG, PNG, WebP and TIFF under a folder or prefix, any number; a rerun does what is missing. Files that are
no usable photographs are listed in rejected.jsonl with the reason, and the job goes on. Leaves with 0 when
the index is written, also if files were rejected (the last line says how many), with 1 when no file was
usable or a store failed, with 2 when the request cannot be met.

With --check: duplicates, leaks between training and held-out photographs, blurred, flat and compressed
sub-images, patch sizes that fit, a picture of samples. Leaves with 0 when the shards can be trained on,
with 1 when one is broken or no patch fits.
"""

import sys

from kdsr.cli import main
from kdsr.config import CheckConfig, ShardConfig


def run(config: ShardConfig) -> int:
    """Make the shards, and say what there is now."""
    from cluster.shard import shard

    print(shard(config).sentence())
    return 0


def check(config: CheckConfig) -> int:
    """Look at every sub-image, write the report, print it as a table and what to do."""
    from cluster.check import check as check_shards
    from kdsr.check_report import text

    report = check_shards(config)
    print(text(report, config.target))
    return 0 if report.usable else 1


if __name__ == "__main__":
    if any(argument.partition("=")[0] == "--check" for argument in sys.argv[1:]):
        main(CheckConfig, check)
    main(ShardConfig, run)
