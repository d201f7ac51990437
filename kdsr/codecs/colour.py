"""ICC profiles: any colour space to sRGB, in 8 or in 16 bits."""

import io
from dataclasses import replace
from functools import lru_cache

import imagecodecs
import numpy as np
import PIL.Image
from PIL import ImageCms

from kdsr.image import Image

# Offset of the four letters that name a profile's colour space, ICC.1:2022 section 7.2.
_SPACE = slice(16, 20)


def to_srgb(image: Image) -> Image:
    """`image` in sRGB and 8 bits, its ICC profile used and gone; alpha stays.

    Without a profile, or with one that is broken or made for other pixels, it is taken for sRGB already.
    Grey stays grey (H, W, 1), but with an RGB profile it is converted as RGB.
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
        pixels = _as_grey_as(pixels, np.asarray(converted))
    return replace(image, pixels=pixels, icc_profile=None)


def to_srgb_16(image: Image) -> Image:
    """As `to_srgb`, in uint16 all the way."""
    image = image.sixteen_bit()
    if image.icc_profile is None:
        return image
    pixels = image.pixels
    space = profile_space(image.icc_profile)
    if space == "RGB" and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if _fits(image.icc_profile, "L" if pixels.shape[2] == 1 else "RGB"):
        pixels = _as_grey_as(pixels, _deep_transform(pixels, image.icc_profile))
    return replace(image, pixels=pixels, icc_profile=None)


def _as_grey_as(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`after` (H, W, 3) with as many channels as `before`: a grey profile makes greys."""
    return np.ascontiguousarray(after[:, :, 1:2]) if before.shape[2] == 1 else after


def cmyk_to_srgb_16(inks: np.ndarray, icc_profile: bytes | None) -> np.ndarray:
    """(H, W, 4) uint16, 0 is no ink, to (H, W, 3); the plain complement without a profile that fits."""
    if icc_profile is not None and _fits(icc_profile, "CMYK"):
        return _deep_transform(inks, icc_profile)
    inked = np.minimum(inks[:, :, :3].astype(np.uint32) + inks[:, :, 3:], 65535)
    return (65535 - inked).astype(np.uint16)


def _fits(icc_profile: bytes, mode: str) -> bool:
    """Whether it can be used for pixels of the mode, and says something about them."""
    return _transform(icc_profile, mode) is not None


def _deep_transform(pixels: np.ndarray, icc_profile: bytes) -> np.ndarray:
    """(H, W, 1, 3 or 4) uint16 of the profile's space to (H, W, 3) sRGB."""
    space = {1: "gray", 3: "rgb", 4: "cmyk"}[pixels.shape[2]]
    planes = pixels[:, :, 0] if space == "gray" else pixels
    converted: np.ndarray = imagecodecs.cms_transform(
        np.ascontiguousarray(planes),
        icc_profile,
        _srgb().tobytes(),
        colorspace=space,
        outcolorspace="rgb",
        intent=int(ImageCms.Intent.PERCEPTUAL),
    )
    return converted


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
