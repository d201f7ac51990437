"""Run a teacher over shards once and store what it says of every sub-image; distilling then skips it.

python jobs/label.py --shards out/shards --teacher.uri teacher.pt --output out/labelled

Its output is always stored. `--features` adds features at taps, for terms that have some, and `--zoom` its
answers to zoomed-in inputs, for upcycling:

    --features '[{tap: trunk.7}, {tap: trunk, rank: 32}]' --zoom.num_crops 4 --zoom.side 64
"""

from kdsr.cli import main
from kdsr.config import LabelConfig


def run(config: LabelConfig) -> int:
    """Label, and say what there is now."""
    from cluster.label import label

    index = label(config)
    assert index.teacher is not None
    labels = f"x{index.teacher_scale} outputs of {index.teacher.name}"
    print(f"{index.num_rows} sub-images carry {labels}: {config.output}")
    for stored in index.carried.taps:
        print(f"features of {stored.tap}: {stored.rank} of {stored.width}, {stored.kept:.1%} of their energy")
    return 0


if __name__ == "__main__":
    main(LabelConfig, run)
