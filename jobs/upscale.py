"""Upscale every image under a folder or prefix.

    python jobs/upscale.py --input photos --output out/photos-x4 --model photo-x4

JPEG, PNG, WebP, TIFF, AVIF, HEIC, GIF, BMP and PPM, animations and pages included, in any number. Results
keep their relative keys and formats. The same command again does what is missing. Leaves with 0 when every
listed image has a good result, with 1 when one failed (report.html names it with its cause), with 2 when the
request cannot be met. --verify checks the results of earlier starts, --dry-run tells what there is to do,
--retry-failed does just the failed ones again. -i, -o, -n, -s, -t and --ext are what they are elsewhere.
"""

import shlex
import sys

from kdsr.cli import main
from kdsr.config import UpscaleConfig


def run(config: UpscaleConfig) -> int:
    """Upscale what is missing, and say what there is now."""
    from cluster import bulk

    config = bulk.with_folder(config)
    if config.verify:
        return verify(config)
    if config.dry_run:
        print(bulk.dry_run(config).sentence())
        return 0
    report = bulk.upscale(config, command=shlex.join(["python", *sys.argv]))
    if config.profile:
        print(report.profile())
    if report.replay:
        print(f"to do the failed ones again: {report.replay}")
    print(report.sentence())
    return 0 if report.ok else 1


def verify(config: UpscaleConfig) -> int:
    from cluster import bulk

    num_done, wrong = bulk.verify(config)
    for key, trouble in wrong.items():
        print(f"{trouble}: {key}")
    again = "; the same command without --verify does them again" if wrong else ""
    print(f"verified {num_done} results, {len(wrong)} not as they were written{again}")
    return 1 if wrong else 0


if __name__ == "__main__":
    main(UpscaleConfig, run)
