"""Train a network on HR alone: a teacher, or a student to compare with.

python jobs/train_teacher.py --config jobs/configs/teacher_x4.yaml
"""

from kdsr.cli import main
from kdsr.config import TeacherTrainingConfig


def run(config: TeacherTrainingConfig) -> int:
    """Train, and say where the model is."""
    from cluster.train import run as train

    card = train(config)
    print(f"{card.sentence()}: {config.output}/{config.name}/model")
    return 0


if __name__ == "__main__":
    main(TeacherTrainingConfig, run)
