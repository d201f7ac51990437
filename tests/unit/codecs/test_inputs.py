"""Files as other programs write them: what each kind of them decodes to."""

import io
import struct

import imagecodecs
import numpy as np
import PIL.Image
import pillow_heif
import pytest
import tifffile
from PIL import ImageOps
from PIL.ExifTags import Base

from kdsr import codecs
from kdsr.errors import ImageCorrupt, ImageUnsupported
from tests.unit.codecs.test_colour import only_black_ink
from tests.unit.codecs.test_raster import png_chunk

ROWS, COLUMNS = np.mgrid[:48, :64]
UNIT = np.dstack(
    [
        np.sin(ROWS / 7) * np.cos(COLUMNS / 9) * 0.4 + 0.5,
        np.cos(ROWS / 8 + COLUMNS / 11) * 0.4 + 0.5,
        np.sin(COLUMNS / 13) * 0.45 + 0.5,
    ]
)
RGB = np.rint(UNIT * 255).astype(np.uint8)
DEEP = np.rint(UNIT * 65535).astype(np.uint16)
RAMP = np.rint(COLUMNS / 63 * 255).astype(np.uint8)
PICTURE = PIL.Image.fromarray(RGB)
INKS = np.asarray(PICTURE.convert("CMYK"))


def saved(picture, kind, **options):
    if isinstance(picture, np.ndarray):
        picture = PIL.Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def tiff(pixels, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **{"metadata": None, "photometric": "rgb", **options})
    return file.getvalue()


def heic(pixels, mode, *, twelve_bits=False):
    file = io.BytesIO()
    picture = pillow_heif.HeifFile()
    picture.add_frombytes(mode, (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
    before = pillow_heif.options.SAVE_HDR_TO_12_BIT
    pillow_heif.options.SAVE_HDR_TO_12_BIT = twelve_bits
    try:
        picture.save(file, quality=95, chroma=444)
    finally:
        pillow_heif.options.SAVE_HDR_TO_12_BIT = before
    return file.getvalue()


def decode(data):
    """The picture, of which `probe` must have said the same."""
    header, found = codecs.probe(data), codecs.decode(data, max_pixels=10**5)
    assert (header.height, header.width) == (found.height, found.width)
    assert header.bits == 8 * found.pixels.itemsize
    return found


def psnr(found, expected):
    top = np.iinfo(found.dtype).max
    return -10 * np.log10(np.mean((found.astype(float) - expected) ** 2) / top**2 + 1e-15)


# ---------------------------------------------------------------- HEIC and AVIF


@pytest.mark.parametrize("twelve_bits", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "RGB;16", "RGBA;16", "I;16"])
def test_heic_of_8_10_and_12_bits(mode, twelve_bits):
    source = DEEP if mode.endswith("16") else RGB
    alpha = source[:, :, 2:]
    planes = {"R": source, "L": source[:, :, :1], "I": source[:, :, :1]}[mode[0]]
    given = np.dstack([planes, alpha]) if "A" in mode else planes

    found = decode(heic(np.ascontiguousarray(given), mode, twelve_bits=twelve_bits))

    assert found.pixels.dtype == source.dtype
    assert found.pixels.shape == planes.shape
    assert psnr(found.pixels, planes) > 45
    assert (found.alpha is not None) == ("A" in mode)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_avif_of_8_10_and_12_bits(bits, channels):
    stored = np.rint(UNIT * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    planes = np.dstack([stored, stored[:, :, 0]])[:, :, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]][channels - 1]]
    data = imagecodecs.avif_encode(np.squeeze(planes), level=100, bitspersample=bits)

    found = decode(bytes(data))

    assert found.pixels.shape[2] == (1 if channels < 3 else 3), "grey stays grey"
    assert (found.alpha is not None) == (channels in (2, 4))
    expected = planes[:, :, : found.pixels.shape[2]].astype(float) / (2**bits - 1)
    assert psnr(found.pixels, expected * np.iinfo(found.pixels.dtype).max) > 45
    assert found.pixels.dtype == (np.uint8 if bits == 8 else np.uint16)


# ---------------------------------------------------------------- BMP and PNM


def bmp(pixels, *, bits, head_bytes, compression, masks=b"", after=b""):
    """Upside down, as it is usual."""
    height, width = pixels.shape[:2]
    rows = pixels[::-1].tobytes()
    sizes = struct.pack("<IiiHHII", head_bytes, width, height, 1, bits, compression, len(rows))
    head = sizes + bytes(16) + masks + after
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(rows), 0, 0, 14 + len(head)) + head + rows


def test_bmp_with_alpha_in_its_header():
    bgra = np.dstack([RGB[:, :, ::-1], RAMP])
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)

    found = decode(bmp(bgra, bits=32, head_bytes=124, compression=3, masks=masks, after=b"BGRs" + bytes(64)))

    assert np.array_equal(found.pixels, RGB)
    assert np.array_equal(found.alpha, RAMP)


def test_the_unused_byte_of_a_plain_bmp_is_no_alpha():
    found = decode(bmp(np.dstack([RGB[:, :, ::-1], RAMP]), bits=32, head_bytes=40, compression=0))

    assert np.array_equal(found.pixels, RGB)
    assert found.alpha is None


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("1", 1), ("P", 3)])
def test_bmp_keeps_its_colours(mode, channels):
    picture = PICTURE.quantize(60) if mode == "P" else PICTURE.convert(mode)

    found = decode(saved(picture, "BMP"))

    assert found.pixels.shape[2] == channels
    expected = np.asarray(picture.convert("RGB" if channels == 3 else "L"))
    assert np.array_equal(np.squeeze(found.pixels), expected)


def test_ppm_and_pgm_of_8_and_16_bits_binary_and_plain():
    for magic, pixels in ((b"P5", DEEP[:, :, 0]), (b"P6", DEEP)):
        data = magic + b"\n# made by hand\n64 48\n65535\n" + pixels.astype(">u2").tobytes()
        assert np.array_equal(np.squeeze(decode(data).pixels), pixels)
    plain = "P3\n64 48 255\n" + " ".join(map(str, RGB.ravel()))
    assert np.array_equal(decode(plain.encode()).pixels, RGB)
    ten_bits = b"P5 64 48 1023\n" + (DEEP[:, :, 0] >> 6).astype(">u2").tobytes()
    assert np.abs(decode(ten_bits).pixels[:, :, 0].astype(int) - DEEP[:, :, 0]).max() <= 64


def test_pbm_plain_and_binary_is_black_and_white():
    bits = PICTURE.convert("1")

    assert np.array_equal(decode(saved(bits, "PPM")).pixels[:, :, 0], np.asarray(bits) * np.uint8(255))
    assert decode(b"P1\n4 2\n0 1 0 1\n1 0 1 0\n").pixels[:, :, 0].tolist() == [[255, 0] * 2, [0, 255] * 2]


# ---------------------------------------------------------------- inks


def test_ycck_jpeg_with_an_adobe_marker():
    data = imagecodecs.jpeg8_encode(255 - INKS, level=98, colorspace="CMYK", outcolorspace="YCCK")

    found = decode(bytes(data))

    assert b"Adobe" in data
    assert found.pixels.shape == RGB.shape
    assert psnr(found.pixels, RGB) > 38


@pytest.mark.parametrize("kind", ["jpeg", "ycck", "tiff", "tiff16"])
def test_inks_go_through_their_profile(kind):
    """The press of this profile has only black ink: what is seen is L* = 100 - K."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 8:, 3] = 255
    inks[:, :, 0] = 200
    profile = only_black_ink()
    if kind == "jpeg":
        data = saved(PIL.Image.fromarray(inks, mode="CMYK"), "JPEG", quality=100, icc_profile=profile)
    elif kind == "ycck":
        plain = imagecodecs.jpeg8_encode(255 - inks, level=100, colorspace="CMYK", outcolorspace="YCCK")
        segment = b"ICC_PROFILE\0\1\1" + profile
        data = plain[:2] + b"\xff\xe2" + struct.pack(">H", 2 + len(segment)) + segment + plain[2:]
    else:
        deep = inks if kind == "tiff" else inks.astype(np.uint16) * 257
        data = tiff(deep, photometric="separated", iccprofile=profile)

    found = decode(bytes(data))

    white, black = found.eight_bit().pixels[8, 2], found.eight_bit().pixels[8, 13]
    assert white.min() >= 252, "cyan ink shows nothing on this press"
    assert black.max() <= 4
    assert found.icc_profile is None


# ---------------------------------------------------------------- palettes, transparency, one bit


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_colour(kind):
    palette = PICTURE.quantize(60)
    hidden = int(np.asarray(palette)[5, 5])

    found = decode(saved(palette, kind, transparency=hidden))

    is_hidden = np.asarray(palette) == hidden
    assert np.array_equal(found.alpha, np.where(is_hidden, 0, 255))
    assert np.array_equal(found.pixels[~is_hidden], np.asarray(palette.convert("RGB"))[~is_hidden])


def test_a_palette_with_half_transparent_colours():
    palette = PICTURE.quantize(60)

    found = decode(saved(palette, "PNG", transparency=bytes(range(60))))

    assert np.array_equal(found.alpha, np.asarray(palette))


def test_a_palette_of_greys_is_grey():
    found = decode(saved(PIL.Image.fromarray(RAMP).quantize(40), "GIF"))

    assert found.pixels.shape == (48, 64, 1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "group4"}), ("GIF", {}), ("BMP", {})],
)
def test_one_bit_is_black_and_white_and_grey(kind, options):
    bits = PICTURE.convert("1")

    found = decode(saved(bits, kind, **options))

    assert np.array_equal(found.pixels[:, :, 0], np.asarray(bits) * np.uint8(255))


# ---------------------------------------------------------------- TIFF


@pytest.mark.parametrize("compression", ["zstd", "lzma", "webp", "jpeg2000", "jpegxl", "lerc", "packbits"])
def test_tiff_of_rare_compressions(compression):
    assert psnr(decode(tiff(RGB, compression=compression)).pixels, RGB) > 60


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("extra", ["assocalpha", "unassalpha", "unspecified"])
def test_extra_samples_of_a_tiff_are_what_it_says(extra, deep):
    pixels, half = (DEEP, 32768) if deep else (RGB, 128)
    top = np.iinfo(pixels.dtype).max
    alpha = np.full((48, 64, 1), half, pixels.dtype)
    colours = np.rint(pixels * (half / top)).astype(pixels.dtype) if extra == "assocalpha" else pixels

    found = decode(tiff(np.dstack([colours, alpha]), extrasamples=[extra]))

    assert np.abs(found.pixels.astype(int) - pixels).max() <= 1
    assert (found.alpha is None) if extra == "unspecified" else (found.alpha == half).all()


@pytest.mark.parametrize("kind", [np.int16, np.uint32, np.int8, np.uint64])
def test_tiff_of_numbers_without_a_meaning_is_unsupported(kind):
    with pytest.raises(ImageUnsupported):
        decode(tiff((UNIT * 100).astype(kind)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}], ids=["classic", "big", "MM"])
def test_resolution_and_xmp_of_every_tiff_are_read(dtype, options):
    extra = [(Base.XMLPacket, 1, 8, b"<packet>", True), (Base.Make, 2, 0, "Acme", True)]

    found = decode(
        tiff(UNIT.astype(dtype), resolution=(118, 59), resolutionunit=3, extratags=extra, **options)
    )

    assert found.dpi == pytest.approx((118 * 2.54, 59 * 2.54))
    assert found.xmp == b"<packet>"
    assert b"Acme" in found.exif


# ---------------------------------------------------------------- orientation


def turned(orientation):
    picture = PICTURE.copy()
    picture.getexif()[Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "DEEP TIFF", "LATE PNG", "XMP PNG"])
def test_every_orientation_of_every_format_comes_upright_and_is_reset(kind, orientation):
    exif = PIL.Image.Exif()
    exif[Base.Orientation], exif[Base.Make] = orientation, "Acme"
    if kind == "DEEP TIFF":
        tag = [(Base.Orientation, 3, 1, orientation, True)]
        data = tiff(DEEP, extratags=tag, resolution=(300, 150), resolutionunit=2)
    elif kind == "XMP PNG":
        text = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="%d"/>' % orientation
        plain = saved(RGB, "PNG")
        data = plain[:33] + png_chunk(b"iTXt", text) + plain[33:]
    elif kind == "LATE PNG":
        plain = saved(RGB, "PNG")
        data = plain[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + plain[-12:]
    else:
        options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}, "AVIF": {"quality": 95}}.get(kind, {})
        data = saved(RGB, kind, exif=exif.tobytes(), dpi=(300, 150), **options)

    found = decode(data)

    assert psnr(found.eight_bit().pixels, turned(orientation)) > 36
    back = PIL.Image.Exif()
    back.load(found.exif or b"")
    assert back.get(Base.Orientation, 1) == 1
    assert found.xmp is None or b'Orientation="1"' in found.xmp
    if found.dpi is not None:
        expected = (150, 300) if orientation >= 5 else (300, 150)
        assert found.dpi == pytest.approx(expected, abs=0.02)


# ---------------------------------------------------------------- what is almost whole


def test_a_gif_without_its_trailer_is_whole():
    whole = saved(PICTURE.quantize(60), "GIF")

    assert np.array_equal(decode(whole[:-1]).pixels, decode(whole).pixels)
    assert codecs.probe(whole[:-1]).frames == 1
    with pytest.raises(ImageCorrupt, match="cut off"):
        decode(whole[:-20])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0nonsense",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x09\0\0\0\xf0\xff\xff\xff",
    ],
    ids=["empty", "nonsense", "too long", "pointing outside", "orientation 9"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_broken_exif_fails_nothing(kind, exif):
    if kind == "TIFF":
        data = tiff(RGB, extratags=[(Base.Make, 2, 0, "Acme", True), (34665, 4, 1, 2**31, True)])
    else:
        try:
            data = saved(RGB, kind, exif=exif)
        except (ValueError, SyntaxError) as error:
            pytest.skip(f"Pillow does not write it: {error}")

    image = decode(data)

    for written in ("jpeg", "png", "webp", "avif", "tiff"):
        assert decode(codecs.encode(image, format=written)).width == 64
