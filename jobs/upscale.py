"""Upscale every image under a folder or prefix.

    python jobs/upscale.py --input photos --output out/photos-x4 --model photo-x4

JPEG, PNG, WebP and TIFF in any number and size that fits memory; results keep their relative keys and
formats. The same command again does what is missing. Leaves with 0 when every listed image has a good
result, with 1 when one failed (the report names it with its cause), with 2 when the request cannot be met.
"""

from kdsr.cli import main
from kdsr.config import UpscaleConfig


def run(config: UpscaleConfig) -> int:
    """Upscale what is missing, and say what there is now."""
    from cluster.bulk import upscale

    report = upscale(config)
    print(report.sentence())
    return 0 if report.ok else 1


if __name__ == "__main__":
    main(UpscaleConfig, run)
