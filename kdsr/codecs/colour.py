"""ICC profiles: any colour space to sRGB. Pixels of 8 bits."""

import io
from dataclasses import replace
from functools import lru_cache

import numpy as np
import PIL.Image
from PIL import ImageCms

from kdsr.image import Image

# Offset of the four letters that name a profile's colour space, ICC.1:2022 section 7.2.
_SPACE = slice(16, 20)


def to_srgb(image: Image) -> Image:
    """`image` in sRGB and 8 bits, its ICC profile used and gone; alpha stays.

    Without a profile, or with one that is broken or made for other pixels, it is taken for sRGB already.
    Grey stays grey (H, W, 1) unless a profile has something to say about it.
    """
    image = image.eight_bit()
    if image.icc_profile is None:
        return image
    pixels = image.pixels
    if profile_space(image.icc_profile) == "RGB" and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    picture = PIL.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    converted = convert_to_srgb(picture, image.icc_profile)
    if converted is not None:
        pixels = np.asarray(converted)
    return replace(image, pixels=pixels, icc_profile=None)


def profile_space(icc_profile: bytes) -> str:
    """Name of the pixels that the profile describes: "RGB", "GRAY", "CMYK" or another."""
    return icc_profile[_SPACE].decode("latin-1").strip()


def convert_to_srgb(picture: PIL.Image.Image, icc_profile: bytes) -> PIL.Image.Image | None:
    """`picture` (mode L, RGB or CMYK) as sRGB; None when the profile cannot be used or changes nothing."""
    transform = _transform(icc_profile, picture.mode)
    return None if transform is None else transform.apply(picture)


@lru_cache(maxsize=16)
def _transform(icc_profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Cached: a camera puts the same profile into every photograph, and to build this is slow."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        transform = ImageCms.ImageCmsTransform(source, _srgb(), mode, "RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
    return None if mode == "RGB" and _changes_nothing(transform) else transform


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether it moves no colour by more than one level: sRGB under another name, kept bit-exact."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17, -1, 3)
    moved = np.asarray(transform.apply(PIL.Image.fromarray(cube)))
    return int(np.abs(moved.astype(int) - cube).max()) <= 1
