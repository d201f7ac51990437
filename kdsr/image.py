"""Pixels with what is needed to give them back. Knows numpy: no files, no formats, no torch."""

from dataclasses import dataclass, replace

import numpy as np

# How EXIF orientations 2..8 become upright: (transpose, flip rows, flip columns).
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

PIXEL_TYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))


@dataclass(frozen=True, eq=False)
class Image:
    """One picture: colour or grey, its transparency apart, and what its file said about it."""

    pixels: np.ndarray
    """(H, W, 3) or (H, W, 1), uint8, uint16, or finite float32 in which 0 is black and 1 is white."""
    alpha: np.ndarray | None = None
    """(H, W) of the same type, 0 is transparent."""
    icc_profile: bytes | None = None
    """Colour space of the pixels; sRGB when there is none."""
    exif: bytes | None = None
    """As in the file, but the orientation is already applied to the pixels and reset to 1."""
    xmp: bytes | None = None
    """The XMP packet, with the orientation reset too."""
    dpi: tuple[float, float] | None = None
    """Pixels per inch, horizontal and vertical."""

    def __post_init__(self) -> None:
        """Raises ValueError for arrays of another shape or type."""
        pixels, alpha = self.pixels, self.alpha
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.dtype not in PIXEL_TYPES:
            raise ValueError(
                f"expected (H, W, 1 or 3) uint8, uint16 or float32, found {pixels.shape} {pixels.dtype}"
            )
        if alpha is not None and (alpha.shape != pixels.shape[:2] or alpha.dtype != pixels.dtype):
            raise ValueError(
                f"expected alpha {pixels.shape[:2]} {pixels.dtype}, found {alpha.shape} {alpha.dtype}"
            )

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.pixels.shape[1])

    def turned(self, orientation: int) -> "Image":
        """Upright, when it is stored in this EXIF orientation, 1..8; what it says about itself stays."""
        if orientation == 1:
            return self
        transpose, flip_rows, flip_columns = _TURNS[orientation]

        def upright(array: np.ndarray) -> np.ndarray:
            array = array.swapaxes(0, 1) if transpose else array
            array = array[::-1] if flip_rows else array
            return np.ascontiguousarray(array[:, ::-1] if flip_columns else array)

        alpha = None if self.alpha is None else upright(self.alpha)
        dpi = (self.dpi[1], self.dpi[0]) if self.dpi and transpose else self.dpi
        return replace(self, pixels=upright(self.pixels), alpha=alpha, dpi=dpi)

    def eight_bit(self) -> "Image":
        """The same picture in uint8; deeper values are rounded, white stays white, floats are clipped."""
        if self.pixels.dtype == np.uint8:
            return self
        alpha = None if self.alpha is None else round_to_8_bits(self.alpha)
        return replace(self, pixels=round_to_8_bits(self.pixels), alpha=alpha)

    def sixteen_bit(self) -> "Image":
        """The same picture in uint16, floats clipped to black and white; 8 bits are stretched exactly."""

        def stretched(values: np.ndarray) -> np.ndarray:
            if values.dtype == np.float32:
                return (np.clip(values, 0, 1) * 65535 + 0.5).astype(np.uint16)
            return values.astype(np.uint16) * (257 if values.dtype == np.uint8 else 1)

        alpha = None if self.alpha is None else stretched(self.alpha)
        return replace(self, pixels=stretched(self.pixels), alpha=alpha)

    def opaque(self) -> "Image":
        """The picture in uint8 laid over white."""
        image = self.eight_bit()
        if image.alpha is None:
            return image
        return replace(image, pixels=over_white(image.pixels, image.alpha), alpha=None)

    def rgb8(self) -> "Image":
        """(H, W, 3) uint8: 16 bits rounded, alpha over white, grey repeated. The colour space stays."""
        image = self.opaque()
        if image.pixels.shape[2] == 3:
            return image
        return replace(image, pixels=np.repeat(image.pixels, 3, axis=2))


def round_to_8_bits(values: np.ndarray) -> np.ndarray:
    """uint16 0..65535 or float32 0..1 to uint8 0..255, to the nearest; 65535 = 255 * 257 has no ties."""
    if values.dtype == np.float32:
        return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`pixels` (H, W, C) laid over white by `alpha` (H, W), both uint8 or both uint16; rounded."""
    top = np.iinfo(pixels.dtype).max
    weight = alpha[:, :, None].astype(np.uint32)  # holds 65535 * 65535, and half of 65535 more
    blended = pixels * weight + top * (top - weight)
    return ((blended + top // 2) // top).astype(pixels.dtype)


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of an animation, or one page of a document."""

    image: Image
    seconds: float = 0.0
    """How long it is shown; 0 for a page."""
