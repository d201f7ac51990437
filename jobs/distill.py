"""Distil a teacher into a small student.

python jobs/distill.py --config jobs/configs/distill_x4.yaml
"""

from kdsr.cli import main
from kdsr.config import DistillConfig


def run(config: DistillConfig) -> int:
    """Distil, and say where the student is."""
    from cluster.train import run as train

    card = train(config)
    print(f"{card.sentence()}: {config.output}/{config.name}/model")
    return 0


if __name__ == "__main__":
    main(DistillConfig, run)
