"""Names of the formats, and how their first bytes look."""

from dataclasses import dataclass

from kdsr.errors import ImageCorrupt, ImageUnsupported

SUFFIXES: dict[str, str] = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jpe": "jpeg",
    ".jfif": "jpeg",
    ".png": "png",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
}
"""Usual endings of names, lower case, and the format they promise. Only the content decides."""

HEAD_BYTES = 32
"""As much of a file as `identify` needs."""

_MAGIC: list[tuple[bytes, str]] = [
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
]

_UNSUPPORTED_MAGIC: list[tuple[bytes, str]] = [
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\1\0", "icon"),
]

_UNSUPPORTED_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC"}


@dataclass(frozen=True)
class ImageHeader:
    """What is known before decoding."""

    format: str
    """One of the values of `SUFFIXES`."""
    height: int
    """Rows, the orientation applied."""
    width: int


def identify(head: bytes) -> str:
    """The format that `head`, the first `HEAD_BYTES` or more of a file, announces.

    Raises ImageUnsupported for known images of other formats, ImageCorrupt for anything else.
    """
    if not head:
        raise ImageCorrupt("the file is empty")
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    _refuse_other_images(head)
    raise ImageCorrupt(f"not an image: it begins with {head[:8]!r}; JPEG, PNG, WebP and TIFF are read")


def _refuse_other_images(head: bytes) -> None:
    brand = _UNSUPPORTED_BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None
    names = [name for magic, name in _UNSUPPORTED_MAGIC if head.startswith(magic)]
    for name in [*names, brand]:
        if name is not None:
            raise ImageUnsupported(f"{name} is not read; convert it to JPEG, PNG, WebP or TIFF")
