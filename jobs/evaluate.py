"""Measure models on benchmarks: PSNR, SSIM, size, arithmetic and speed, beside bicubic.

python jobs/evaluate.py --model photo-x4 --benchmark benchmarks/Set5/x4 --output out/set5
"""

from kdsr.cli import main
from kdsr.config import EvaluateConfig


def run(config: EvaluateConfig) -> int:
    from kdsr.evaluate import evaluate
    from kdsr.report import write_report
    from kdsr.store import open_store

    store = open_store(config.output, config.store)
    store.put("config.json", config.model_dump_json(indent=2).encode())
    report = write_report(evaluate(config), store, precision=config.precision)
    print(report.table)
    print()
    print(report.sentence)
    return 0


if __name__ == "__main__":
    main(EvaluateConfig, run)
