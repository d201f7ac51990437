import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageCms, ImageOps

from kdsr import codecs
from kdsr.codecs.png import decode_own
from kdsr.config import EncodeConfig
from kdsr.errors import DataError, ImageCorrupt, ImageTooLarge, ImageUnsupported, RequestError
from kdsr.image import Image

LIMIT = 10_000
RAMP = (np.add.outer(np.arange(32), np.arange(48)) * 3).astype(np.uint8)
RGB = np.dstack([RAMP, RAMP[::-1], RAMP // 2])
DEEP = np.random.default_rng(0).integers(0, 65536, (5, 7, 4), dtype=np.uint16)


def saved(pixels, kind, mode=None, **options):
    picture = pixels if isinstance(pixels, PIL.Image.Image) else PIL.Image.fromarray(pixels)
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, kind, **options)
    return file.getvalue()


def decode(data):
    return codecs.decode(data, max_pixels=LIMIT)


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(height, width, *, depth, colour_type, rows, extra=b""):
    """A PNG of any kind: Pillow writes only few of them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = (
        png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def png16(values):
    """`values` (H, W, C) uint16."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    return png(*values.shape[:2], depth=16, colour_type=colour_type, rows=rows)


def tiff16(values, *, order="<", photometric=None):
    """An uncompressed TIFF of `values` (H, W, 1 or 3) uint16 in one strip."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    depths = struct.pack(f"{order}{channels}H", *[16] * channels)
    if photometric is None:
        photometric = 1 if channels == 1 else 2
    short, long = 3, 4
    depth_field = depths.ljust(4, b"\0") if channels == 1 else struct.pack(f"{order}I", 8 + len(pixels))
    entries = [(256, width), (257, height), (258, depth_field), (259, 1), (262, photometric), (273, 8)]
    entries += [(277, channels), (278, height), (279, len(pixels))]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, value in entries:
        is_depth = isinstance(value, bytes)
        directory += struct.pack(f"{order}HHI", tag, short if is_depth else long, channels if is_depth else 1)
        directory += value if is_depth else struct.pack(f"{order}I", value)
    begin = struct.pack(f"{order}I", 8 + len(pixels) + len(depths))
    return (b"II*\0" if order == "<" else b"MM\0*") + begin + pixels + depths + directory + bytes(4)


# ---------------------------------------------------------------- formats and colours


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_lossless_files_decode_bit_exactly(kind, options):
    image = decode(saved(RGB, kind, **options))

    assert np.array_equal(image.pixels, RGB)
    assert image.alpha is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_decodes_close_to_what_was_saved(options):
    image = decode(saved(RGB, "JPEG", quality=98, **options))

    assert np.abs(image.pixels.astype(int) - RGB).mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_grey_stays_grey(kind):
    assert decode(saved(RAMP, kind)).pixels.shape == (*RAMP.shape, 1)


def test_a_palette_becomes_its_colours():
    palette = PIL.Image.fromarray(RGB).quantize(16)

    assert np.array_equal(decode(saved(palette, "PNG")).pixels, np.asarray(palette.convert("RGB")))


def test_one_bit_is_black_and_white():
    bits = PIL.Image.fromarray(RAMP).convert("1")

    assert np.array_equal(decode(saved(bits, "PNG")).pixels[:, :, 0], np.where(np.asarray(bits), 255, 0))
    assert np.array_equal(
        decode(saved(bits, "TIFF", compression="group4")).pixels[:, :, 0], np.where(np.asarray(bits), 255, 0)
    )


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile_is_the_complement(kind, ink):
    cyan, magenta, yellow, black = ink
    picture = PIL.Image.fromarray(np.full((16, 16, 4), ink, np.uint8), mode="CMYK")
    expected = [255 - min(255, colour + black) for colour in (cyan, magenta, yellow)]

    assert decode(saved(picture, kind)).pixels[8, 8].tolist() == pytest.approx(expected, abs=3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_comes_apart_from_the_colours(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = decode(saved(np.dstack([RGB, RAMP]), kind, **options))

    assert np.array_equal(image.pixels, RGB)
    assert np.array_equal(image.alpha, RAMP)


def test_a_transparent_colour_of_a_png_is_alpha():
    grey = decode(saved(RAMP, "PNG", transparency=int(RAMP[3, 3])))
    palette = decode(saved(PIL.Image.fromarray(RGB).quantize(16), "PNG", transparency=0))

    assert np.array_equal(grey.alpha == 0, RAMP[3, 3] == RAMP)
    assert set(np.unique(palette.alpha)) == {0, 255}


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_keeps_every_value(channels):
    expected = DEEP[:, :, :channels]
    image = decode(png16(expected))

    colours = expected if channels in (1, 3) else expected[:, :, :-1]
    assert np.array_equal(image.pixels, colours)
    assert (image.alpha is None) if channels in (1, 3) else np.array_equal(image.alpha, expected[:, :, -1])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_tiff_keeps_every_value(channels, order):
    values = DEEP[:, :, :channels]

    assert np.array_equal(decode(tiff16(values, order=order)).pixels, values)


def test_16_bit_tiff_with_white_at_zero_is_turned_round():
    values = DEEP[:, :, :1]

    image = decode(tiff16(values, photometric=0))

    assert np.array_equal(image.pixels, 65535 - values)


def test_a_dark_16_bit_picture_is_not_taken_for_8_bits():
    dark = np.full((4, 4, 1), 200, np.uint16)

    assert np.array_equal(decode(png16(dark)).pixels, dark)


@pytest.mark.parametrize("mode", ["I", "LAB"])
def test_kinds_of_pixels_without_a_meaning_here_are_unsupported(mode):
    picture = PIL.Image.new(mode, (8, 8))

    with pytest.raises(ImageUnsupported, match=mode):
        decode(saved(picture, "TIFF"))


# ---------------------------------------------------------------- orientation and metadata


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_out_upright(kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = saved(RGB, kind, exif=exif, **options)
    outside = np.asarray(ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))))

    image, header = decode(data), codecs.probe(data)

    assert np.array_equal(image.pixels, outside)
    assert (header.height, header.width) == outside.shape[:2]
    if orientation != 1:
        assert not np.array_equal(image.pixels, RGB)


def test_exif_is_kept_with_its_orientation_reset():
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"

    kept = PIL.Image.Exif()
    kept.load(decode(saved(RGB, "JPEG", exif=exif)).exif)

    assert dict(kept) == {0x0112: 1, 0x010F: "a camera"}


@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_does_not_lose_the_picture(exif):
    image = decode(saved(RGB, "PNG", exif=exif))

    assert np.array_equal(image.pixels, RGB)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_profile_and_exif_survive_a_round_trip(kind):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = PIL.Image.Exif()
    exif[0x010F] = "a camera"

    image = decode(codecs.encode(Image(RGB, icc_profile=profile, exif=exif.tobytes()), format=kind))

    kept = PIL.Image.Exif()
    kept.load(image.exif)
    assert image.icc_profile == profile
    assert kept[0x010F] == "a camera"


# ---------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def samples():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return [
        saved(RGB, "JPEG", exif=exif),
        saved(RGB, "JPEG", progressive=True),
        saved(RGB, "JPEG", mode="CMYK"),
        saved(RGB, "PNG", exif=exif),
        saved(PIL.Image.fromarray(RGB).quantize(16), "PNG"),
        png16(DEEP),
        saved(RGB, "WEBP"),
        saved(np.dstack([RGB, RAMP]), "WEBP", lossless=True),
        saved(RGB, "TIFF"),
        saved(RGB, "TIFF", compression="tiff_lzw"),
        tiff16(DEEP[:, :, :3]),
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_file_cut_anywhere_is_corrupt_or_has_all_its_pixels(samples):
    for data in samples:
        whole = decode(data).pixels
        for length in range(len(data)):
            try:
                pixels = decode(data[:length]).pixels
            except ImageCorrupt:
                continue
            assert np.array_equal(pixels, whole)


@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_changed_bytes_give_a_picture_or_our_own_error(samples, data):
    broken = bytearray(data.draw(st.sampled_from(samples)))
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = codecs.to_srgb(decode(bytes(broken))).rgb8().pixels
    except DataError:
        return
    assert pixels.dtype == np.uint8


def test_a_bomb_is_too_large_from_its_header():
    bomb = png(60_000, 60_000, depth=8, colour_type=2, rows=b"")

    with pytest.raises(ImageTooLarge, match=r"60000 x 60000.*max_pixels"):
        codecs.decode(bomb, max_pixels=500_000_000)
    assert codecs.probe(bomb).height == 60_000


def test_the_limit_is_ours_and_not_that_of_pillow():
    size = 14_000  # 196 Mpx, above the 179 Mpx at which Pillow refuses

    image = codecs.decode(saved(PIL.Image.new("1", (size, size)), "PNG"), max_pixels=size**2)

    assert image.height == size


def test_an_image_of_exactly_the_limit_is_decoded():
    data = saved(RGB, "PNG")

    assert codecs.decode(data, max_pixels=RAMP.size).width == RAMP.shape[1]
    with pytest.raises(ImageTooLarge):
        codecs.decode(data, max_pixels=RAMP.size - 1)


# ---------------------------------------------------------------- writing


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]), st.integers(0, 9))
def test_shard_png_round_trips_bit_exactly(height, width, channels, level):
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)

    assert np.array_equal(codecs.decode_png(codecs.encode_png(pixels, level=level)), pixels)


def test_shard_png_takes_a_window_of_a_picture():
    window = RGB[3:20, 5:30]

    assert np.array_equal(codecs.decode_png(codecs.encode_png(window)), window)


def test_a_broken_shard_png_is_corrupt():
    with pytest.raises(ImageCorrupt):
        codecs.decode_png(codecs.encode_png(RGB)[:-30])
    with pytest.raises(ImageCorrupt, match="RGBA"):
        codecs.decode_png(saved(np.dstack([RGB, RAMP]), "PNG"))


@pytest.mark.parametrize("pixels", [RGB, RAMP[:, :, None]], ids=["rgb", "grey"])
def test_the_fast_reader_of_shard_pngs_leaves_others_to_the_one_that_knows_them(pixels):
    own = codecs.encode_png(pixels)
    assert np.array_equal(decode_own(own), pixels)
    # Pillow chooses among five filters.
    other = saved(pixels.squeeze(), "PNG")
    assert decode_own(other) is None
    assert np.array_equal(codecs.decode_png(other), pixels)
    middle = len(own) // 2
    broken = own[:middle] + bytes([own[middle] ^ 255]) + own[middle + 1 :]
    for data in (b"", own[:-30], broken, own.replace(b"IHDR", b"IHDX"), saved(RAMP > 99, "PNG")):
        assert decode_own(data) is None


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("alpha", [None, RAMP], ids=["opaque", "alpha"])
@pytest.mark.parametrize("pixels", [RGB, RAMP[:, :, None]], ids=["rgb", "grey"])
def test_lossless_encoding_keeps_every_value(kind, pixels, alpha):
    image = decode(codecs.encode(Image(pixels, alpha=alpha), format=kind))

    assert np.array_equal(image.pixels, pixels)
    assert (image.alpha is None) if alpha is None else np.array_equal(image.alpha, alpha)


def test_webp_keeps_alpha_and_jpeg_lays_over_white():
    image = Image(RGB, alpha=np.zeros_like(RAMP))

    assert decode(codecs.encode(image, format="webp")).alpha.max() == 0
    assert decode(codecs.encode(image, format="jpeg")).pixels.min() >= 254


def test_jpeg_keeps_grey_and_full_colour_resolution():
    grey = codecs.encode(Image(RAMP[:, :, None]), format="jpeg")
    colour = PIL.Image.open(io.BytesIO(codecs.encode(Image(RGB), format="jpeg")))

    assert decode(grey).pixels.shape[2] == 1
    assert [component[1:3] for component in colour.layer] == [(1, 1)] * 3, "4:4:4"


def test_quality_changes_the_size():
    sizes = [
        len(codecs.encode(Image(RGB), format="jpeg", options=EncodeConfig(quality=quality)))
        for quality in (30, 95)
    ]

    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(("kind", "side"), [("jpeg", 65501), ("webp", 16384)])
def test_a_side_that_the_format_cannot_hold_is_refused_before_encoding(kind, side):
    with pytest.raises(ImageTooLarge, match="png or tiff"):
        codecs.encode(Image(np.zeros((1, side, 1), np.uint8)), format=kind)


def test_an_unknown_output_format_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match="jpeg, webp, avif, gif, png, tiff"):
        codecs.encode(Image(RGB), format="heic")
