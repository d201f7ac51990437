"""Run a teacher over shards once and store its output beside every sub-image; distilling then skips it.

python jobs/label.py --shards out/shards --teacher.uri teacher.pt --output out/labelled
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
    return 0


if __name__ == "__main__":
    main(LabelConfig, run)
