"""Cut photographs into lossless sub-images and store them as Parquet shards.

    python jobs/shard.py --input photos --output out/shards

JPEG, PNG, WebP and TIFF under a folder or prefix, any number; a rerun does what is missing. Files that are
no usable photographs are listed in rejected.jsonl with the reason, and the job goes on. Leaves with 0 when
the index is written, also if files were rejected (the last line says how many), with 1 when no file was
usable or a store failed, with 2 when the request cannot be met.
"""

from kdsr.cli import main
from kdsr.config import ShardConfig


def run(config: ShardConfig) -> int:
    """Make the shards, and say what there is now."""
    from cluster.shard import shard

    print(shard(config).sentence())
    return 0


if __name__ == "__main__":
    main(ShardConfig, run)
