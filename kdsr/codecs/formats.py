"""Names of the formats, what they hold, and how their first bytes look."""

from dataclasses import dataclass

from kdsr.errors import ImageCorrupt, ImageUnsupported, RequestError

SUFFIXES: dict[str, str] = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jpe": "jpeg",
    ".jfif": "jpeg",
    ".png": "png",
    ".apng": "png",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".avif": "avif",
    ".avifs": "avif",
    ".heic": "heic",
    ".heif": "heic",
    ".hif": "heic",
    ".gif": "gif",
    ".bmp": "bmp",
    ".dib": "bmp",
    ".ppm": "ppm",
    ".pgm": "ppm",
    ".pbm": "ppm",
    ".pnm": "ppm",
}
"""Usual endings of names, lower case, and the format they promise. Only the content decides."""

HEAD_BYTES = 32
"""As much of a file as `identify` needs."""

READ = ("jpeg", "png", "webp", "tiff", "avif", "heic", "gif", "bmp", "ppm")

_LARGEST_SIDE = {
    "jpeg": 65500,
    "webp": 16383,
    "avif": 65536,
    "gif": 65535,
    "png": 2**31 - 1,
    "tiff": 2**31 - 1,
    "bmp": 2**31 - 1,
    "ppm": 2**31 - 1,
}

_SUFFIX = {"jpeg": ".jpg", "tiff": ".tif"}

_MAGIC: list[tuple[bytes, str]] = [
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
]

_UNSUPPORTED_MAGIC: list[tuple[bytes, str]] = [
    (b"8BPS", "Photoshop"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\1\0", "icon"),
]

# Of ISO base media files. The general ones say nothing, and the compatible brands behind them decide.
_BRANDS = {b"avif": "avif", b"avis": "avif"}
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "heic")
_GENERAL_BRANDS = (b"mif1", b"msf1", b"miaf")


@dataclass(frozen=True)
class ImageHeader:
    """What is known before decoding."""

    format: str
    """One of `READ`."""
    height: int
    """Rows, the orientation applied."""
    width: int
    frames: int = 1
    """Pictures of an animation, or pages of a document."""
    bits: int = 8
    """Of a sample when decoded: 8, 16, or 32 for floating point."""
    loop: int = 0
    """How often an animation is played; 0 is for ever."""
    page_pixels: tuple[int, ...] = ()
    """Of each page of a document with several, which may differ in size; `bits` are those of the deepest."""

    @property
    def largest_pixels(self) -> int:
        """Of the largest frame."""
        return max(self.page_pixels, default=self.height * self.width)

    @property
    def all_pixels(self) -> int:
        """Of all frames together."""
        return sum(self.page_pixels) if self.page_pixels else self.height * self.width * self.frames


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
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "ppm"
    if head[4:8] == b"ftyp":
        brand = _brand(head)
        if brand is not None:
            return brand
    for magic, name in _UNSUPPORTED_MAGIC:
        if head.startswith(magic):
            raise ImageUnsupported(f"{name} is not read; convert it to PNG or TIFF")
    raise ImageCorrupt(f"not an image: it begins with {head[:8]!r}; {', '.join(READ)} are read")


def _brand(head: bytes) -> str | None:
    major = head[8:12]
    if major in _GENERAL_BRANDS:
        length = min(int.from_bytes(head[:4], "big"), HEAD_BYTES)
        compatible = (head[at : at + 4] for at in range(16, length, 4))
        return next((_BRANDS[brand] for brand in compatible if brand in _BRANDS), "heic")
    return _BRANDS.get(major)


def output_format(read: str) -> str:
    """Format of a result whose input has format `read`: the same, but JPEG for HEIC, which is only read."""
    return "jpeg" if read == "heic" else read


def suffix(name: str) -> str:
    """The usual ending of a format's names: ".jpg", ".png", ".tif"..."""
    return _SUFFIX.get(name, f".{name}")


def largest_side(name: str) -> int:
    """Rows or columns that a file of the format can have. Raises RequestError for one that is not written."""
    if name not in _LARGEST_SIDE:
        raise RequestError(f"cannot write {name!r}; known formats are {', '.join(_LARGEST_SIDE)}")
    return _LARGEST_SIDE[name]
