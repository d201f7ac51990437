import io
import struct
from fractions import Fraction

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import tifffile
from PIL import ImageOps, ImageSequence
from PIL.ExifTags import Base

from kdsr.codecs import apng, png, probe, raster, tiff_pages
from kdsr.codecs.sequences import count_frames, decode_frames, encode_frames
from kdsr.config import EncodeConfig
from kdsr.errors import DataError, ImageCorrupt, ImageTooLarge, ImageUnsupported
from kdsr.image import Frame, Image

HEIGHT, WIDTH = 18, 26
TIMES = [0.1, 0.25, 0.25, 0.04, 1.0]
LOSSLESS = EncodeConfig(lossless=True)


def moving_square(number, *, alpha=False, dtype=np.uint8, channels=3):
    """A square of full colour that moves over a plain ground; transparent around it with `alpha`."""
    full = np.iinfo(dtype).max
    pixels = np.full((HEIGHT, WIDTH, channels), full // 3, dtype)
    box = slice(2 + number, 8 + number), slice(3 + 2 * number, 10 + 2 * number)
    pixels[box] = [full, full // 7, 0][:channels]
    mask = None
    if alpha:
        mask = np.zeros((HEIGHT, WIDTH), dtype)
        mask[box] = full
    return Image(pixels, alpha=mask)


def animation(times=TIMES, **kind):
    """The third frame repeats the second: its time must not get lost."""
    return [Frame(moving_square(max(0, n - (n > 1)), **kind), seconds) for n, seconds in enumerate(times)]


def decoded(data, *, max_pixels=10_000, max_frames=100):
    return list(decode_frames(data, max_pixels=max_pixels, max_frames=max_frames))


def visible(image):
    """RGBA with black where nothing is seen."""
    planes = np.repeat(image.pixels, 3 // image.pixels.shape[2], axis=2)
    alpha = np.full(planes.shape[:2], np.iinfo(planes.dtype).max) if image.alpha is None else image.alpha
    return np.dstack([planes * (alpha > 0)[:, :, None], alpha])


def by_pillow(data):
    """(RGBA arrays, seconds, loop) as another reader sees them."""
    with PIL.Image.open(io.BytesIO(data)) as picture:
        frames, times = [], []
        for frame in ImageSequence.Iterator(picture):
            frames.append(np.asarray(frame.convert("RGBA")))
            times.append(frame.info.get("duration", 0) / 1000)
        return frames, times, picture.info.get("loop")


def same_picture(first, second):
    shown = (first[:, :, 3] > 0)[:, :, None]
    return np.array_equal(first * shown, second * (second[:, :, 3] > 0)[:, :, None])


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_frames_times_and_transparency_survive_without_loss(kind, alpha):
    frames = animation(alpha=alpha)
    data = encode_frames(iter(frames), format=kind, loop=3, options=LOSSLESS)
    back = decoded(data)
    assert count_frames(data, kind) == (len(frames), 3)
    assert [frame.seconds for frame in back] == pytest.approx(TIMES, abs=1e-12)
    for before, after in zip(frames, back, strict=True):
        assert same_picture(visible(before.image), visible(after.image))


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_another_reader_sees_the_same_animation(kind, alpha):
    frames = animation(alpha=alpha)
    data = encode_frames(frames, format=kind, loop=0, options=LOSSLESS)
    pictures, times, loop = by_pillow(data)
    assert loop == 0
    assert sum(times) == pytest.approx(sum(TIMES))
    assert len(pictures) == len(frames)
    for before, after in zip(frames, pictures, strict=True):
        assert same_picture(visible(before.image), after)


@pytest.mark.parametrize("alpha", [False, True])
def test_avif_keeps_times_and_nearly_the_colours(alpha):
    frames = animation(alpha=alpha)
    data = encode_frames(frames, format="avif", loop=0, options=EncodeConfig(quality=100))
    back = decoded(data)
    assert count_frames(data, "avif")[0] == len(frames)
    assert [frame.seconds for frame in back] == pytest.approx(TIMES)
    for before, after in zip(frames, back, strict=True):
        shown = visible(before.image)[:, :, 3] > 0
        difference = before.image.pixels[shown].astype(int) - after.image.pixels[shown]
        assert np.abs(difference).mean() < 4
        assert (after.image.alpha is not None) == alpha


@pytest.mark.parametrize("channels", [1, 3])
def test_apng_keeps_sixteen_bits_and_grey(channels):
    frames = animation(dtype=np.uint16, channels=channels, alpha=True)
    back = decoded(encode_frames(frames, format="png", loop=0, options=LOSSLESS))
    for before, after in zip(frames, back, strict=True):
        assert after.image.pixels.dtype == np.uint16
        assert after.image.pixels.shape == before.image.pixels.shape
        assert np.array_equal(visible(before.image), visible(after.image))


@pytest.mark.parametrize("seconds", [1 / 24, 1 / 30, 1001 / 30000, 0.0, 40.123, 1e-4])
def test_apng_times_are_exact_fractions(seconds):
    data = encode_frames(animation([seconds, seconds]), format="png", loop=0, options=LOSSLESS)
    assert [frame.seconds for frame in decoded(data)] == [pytest.approx(seconds, abs=1e-12)] * 2
    assert apng.time_of(1 / 30) == Fraction(1, 30)


@pytest.mark.parametrize(("kind", "unit"), [("gif", 0.01), ("webp", 0.001)])
def test_rounded_times_do_not_add_up(kind, unit):
    times = [1 / 30] * 24
    frames = [Frame(moving_square(n % 5), seconds) for n, seconds in enumerate(times)]
    back = decoded(encode_frames(frames, format=kind, loop=0, options=LOSSLESS))
    assert sum(frame.seconds for frame in back) == pytest.approx(sum(times), abs=unit)


def test_a_frame_longer_than_gif_can_say_is_repeated():
    back = decoded(encode_frames(animation([1400.0, 1.0]), format="gif", loop=0, options=LOSSLESS))
    assert sum(frame.seconds for frame in back) == pytest.approx(1401)


def test_gif_of_many_colours_is_close_and_smooth():
    ramp = np.add.outer(np.arange(64), np.arange(64))
    pixels = np.dstack([ramp * 2, ramp[::-1] * 2, np.abs(ramp - 64) * 3]).astype(np.uint8)
    data = encode_frames([Frame(Image(pixels), 0.1)] * 2, format="gif", loop=0, options=LOSSLESS)
    difference = decoded(data)[1].image.pixels.astype(float) - pixels
    assert np.sqrt((difference**2).mean()) < 8
    assert abs(difference.mean()) < 1


def test_grey_gif_comes_back_as_grey():
    data = encode_frames(animation(channels=1), format="gif", loop=0, options=LOSSLESS)
    assert decoded(data)[1].image.pixels.shape == (HEIGHT, WIDTH, 1)


def test_frames_are_decoded_one_at_a_time_and_encoded_as_they_come():
    asked = []

    def slow():
        for number, frame in enumerate(animation()):
            asked.append(number)
            yield frame

    data = encode_frames(slow(), format="gif", loop=0, options=LOSSLESS)
    assert asked == [0, 1, 2, 3, 4]
    broken = data[: len(data) - 3]
    with pytest.raises(ImageCorrupt, match="cut off"):
        decoded(broken)
    assert next(decode_frames(data, max_pixels=10_000, max_frames=5)).seconds == 0.1


# ---------------------------------------------------------------- files of others


def pillow_animation(kind, pictures, **options):
    file = io.BytesIO()
    pictures[0].save(file, kind, save_all=True, append_images=pictures[1:], **options)
    return file.getvalue()


def pictures(mode):
    found = []
    for number in range(4):
        picture = PIL.Image.fromarray(visible(moving_square(number, alpha=mode == "RGBA")).astype(np.uint8))
        found.append(picture.convert(mode))
    return found


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("disposal", [1, 2])
@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_disposal_is_read_as_another_writer_means_it(kind, disposal, mode):
    if kind == "PNG":
        disposal -= 1
    data = pillow_animation(kind, pictures(mode), disposal=disposal, duration=[100, 200, 300, 50], loop=0)
    frames = decoded(data)
    assert count_frames(data, kind.lower()) == (4, 0)
    assert [frame.seconds for frame in frames] == pytest.approx([0.1, 0.2, 0.3, 0.05])
    for frame, other in zip(frames, by_pillow(data)[0], strict=True):
        assert same_picture(visible(frame.image), other)


def test_apng_blends_half_transparent_pixels_over_each_other():
    """Against Pillow's compositing; its APNG reader pastes, which is something else."""
    rng = np.random.default_rng(0)
    sources = [PIL.Image.fromarray(rng.integers(0, 256, (8, 9, 4), dtype=np.uint8)) for _ in range(3)]
    data = pillow_animation("PNG", sources, blend=1, duration=100)
    expected = PIL.Image.new("RGBA", sources[0].size)
    for frame, source in zip(decoded(data), sources, strict=True):
        expected = PIL.Image.alpha_composite(expected, source)
        mine, other = visible(frame.image).astype(float), np.asarray(expected)
        assert np.abs(mine[:, :, 3] - other[:, :, 3]).max() <= 2
        assert (np.abs(mine - other)[:, :, :3] * (other[:, :, 3:] / 255)).max() <= 2


def gif_of(frames, *, height=4, width=4, loop=None):
    """A GIF of red, green and blue boxes; each frame is (box, index, disposal, transparent or None)."""
    table = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    data = struct.pack("<6sHHBBB", b"GIF89a", width, height, 0x81, 0, 0) + table
    if loop is not None:
        data += b"\x21\xff\x0bNETSCAPE2.0\x03\x01" + struct.pack("<H", loop) + b"\0"
    for (top, left, bottom, right), index, disposal, transparent in frames:
        flags = disposal << 2 | (transparent is not None)
        data += struct.pack("<BBBBHBB", 0x21, 0xF9, 4, flags, 7, transparent or 0, 0)
        data += struct.pack("<BHHHHB", 0x2C, left, top, right - left, bottom - top, 0)
        data += one_colour((bottom - top) * (right - left), index)
    return data + b";"


def one_colour(count, index):
    """LZW of `count` equal indices with a clear code before each: always three bits wide."""
    codes = [code for _ in range(count) for code in (4, index)] + [5]
    bits = sum(code << 3 * place for place, code in enumerate(codes))
    content = bits.to_bytes((3 * len(codes) + 7) // 8, "little")
    blocks = b"".join(
        bytes([len(content[n : n + 255])]) + content[n : n + 255] for n in range(0, len(content), 255)
    )
    return b"\x02" + blocks + b"\0"


def test_gif_disposal_clears_keeps_and_restores():
    data = gif_of(
        [
            ((0, 0, 4, 4), 0, 1, None),  # red everywhere, stays
            ((0, 0, 2, 2), 1, 3, None),  # green corner, goes back to red
            ((2, 2, 4, 4), 2, 2, None),  # blue corner, leaves a hole
            ((0, 3, 1, 4), 1, 1, None),  # one green pixel
        ],
        loop=4,
    )
    assert count_frames(data, "gif") == (4, 5)
    red, green, blue, hole = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255), (0, 0, 0, 0)
    seen = [visible(frame.image) for frame in decoded(data)]
    assert [tuple(seen[n][0, 0]) for n in range(4)] == [red, green, red, red]
    assert [tuple(seen[n][3, 3]) for n in range(4)] == [red, red, blue, hole]
    assert tuple(seen[3][0, 3]) == green
    assert [frame.seconds for frame in decoded(data)] == [0.07] * 4


def test_gif_without_loop_block_is_shown_once():
    data = gif_of([((0, 0, 4, 4), 0, 1, None), ((0, 0, 4, 4), 1, 1, None)])
    assert count_frames(data, "gif") == (2, 1)
    assert decoded(data)[0].image.alpha is None


def test_gif_frame_that_reaches_outside_is_clipped():
    data = gif_of([((0, 0, 4, 4), 0, 1, None), ((2, 2, 9, 9), 1, 1, None)])
    frames = decoded(data)
    assert frames[1].image.pixels.shape == (4, 4, 3)
    assert tuple(frames[1].image.pixels[3, 3]) == (0, 255, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_with_an_orientation_comes_upright(kind, orientation):
    exif = PIL.Image.Exif()
    exif[Base.Orientation] = orientation
    sources = pictures("RGB")
    data = pillow_animation(kind, sources, duration=50, exif=exif, lossless=True)
    for frame, source in zip(decoded(data), sources, strict=True):
        source.getexif()[Base.Orientation] = orientation
        assert np.array_equal(frame.image.pixels, np.asarray(ImageOps.exif_transpose(source)))
        kept = PIL.Image.Exif()
        kept.load(frame.image.exif)
        assert kept[Base.Orientation] == 1


def test_a_side_that_gif_and_webp_cannot_hold_is_refused():
    for kind, side in (("gif", 65536), ("webp", 16384)):
        frames = [Frame(Image(np.zeros((1, side, 1), np.uint8)), 0.1)] * 2
        with pytest.raises(ImageTooLarge, match="pixels a side"):
            encode_frames(frames, format=kind, loop=0, options=LOSSLESS)


# ---------------------------------------------------------------- pages


def pages_file(**options):
    rng = np.random.default_rng(1)
    arrays = [
        rng.integers(0, 256, (9, 7, 3), dtype=np.uint8),
        rng.integers(0, 65536, (5, 12), dtype=np.uint16),
        rng.random((6, 4, 3), dtype=np.float32),
    ]
    file = io.BytesIO()
    with tifffile.TiffWriter(file, **options) as writer:
        for array in arrays:
            writer.write(array, photometric="rgb" if array.ndim == 3 else "minisblack", metadata=None)
    return file.getvalue(), [array if array.ndim == 3 else array[:, :, None] for array in arrays]


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}], ids=["classic", "big", "MM"])
def test_pages_keep_their_sizes_and_depths(options):
    data, arrays = pages_file(**options)
    assert count_frames(data, "tiff") == (3, 0)
    header = probe(data)
    assert header.page_pixels == tuple(array.shape[0] * array.shape[1] for array in arrays)
    assert (header.largest_pixels, header.all_pixels, header.bits) == (63, 63 + 60 + 24, 32)
    frames = decoded(data)
    for frame, array in zip(frames, arrays, strict=True):
        assert frame.seconds == 0
        assert frame.image.pixels.dtype == array.dtype
        assert np.array_equal(frame.image.pixels, array)


def test_pages_come_back_as_pages():
    _, arrays = pages_file()
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    frames = [Frame(Image(array, icc_profile=profile if array.shape[2] == 3 else None)) for array in arrays]
    data = encode_frames(frames, format="tiff", loop=0, options=LOSSLESS)
    back = decoded(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        outside = [page.asarray() for page in file.pages]
    for frame, other, array in zip(back, outside, arrays, strict=True):
        assert np.array_equal(frame.image.pixels, array)
        assert np.array_equal(other.reshape(array.shape), array)
    assert back[0].image.icc_profile == profile


def test_joined_pages_can_be_a_bigtiff():
    files = [pages_file()[0], pages_file(byteorder="<")[0]]
    data = tiff_pages.Joiner(tiff_pages.Layout("<", is_big=True)).join(files)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        assert file.is_bigtiff
        outside = [page.asarray() for page in file.pages]
    for other, array in zip(outside, pages_file()[1] * 2, strict=True):
        assert np.array_equal(other.reshape(array.shape), array)


def test_smaller_copies_of_a_page_are_no_pages():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(np.zeros((16, 16, 3), np.uint8), photometric="rgb", metadata=None)
        writer.write(np.zeros((8, 8, 3), np.uint8), photometric="rgb", metadata=None, subfiletype=1)
    assert count_frames(file.getvalue(), "tiff") == (1, 0)


# ---------------------------------------------------------------- refusals


def test_a_page_that_hides_its_size_is_refused():
    data, _ = pages_file()
    broken = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages[1].tags["ImageWidth"]
        struct.pack_into("<H", broken, tag.offset + 2, 9)  # A signed number: Pillow and tifffile take it.
    assert probe(bytes(broken)).page_pixels[1] == 0
    with pytest.raises(ImageCorrupt, match="tells its size"):
        decoded(bytes(broken))


def test_pages_that_follow_each_other_for_ever_are_refused():
    data, _ = pages_file()
    offsets = [page.offset for page in tifffile.TiffFile(io.BytesIO(data)).pages]
    broken = bytearray(data)
    (count,) = struct.unpack_from("<H", data, offsets[2])
    struct.pack_into("<I", broken, offsets[2] + 2 + 12 * count, offsets[0])
    with pytest.raises(ImageCorrupt, match="endless"):
        count_frames(bytes(broken), "tiff")
    with pytest.raises(ImageCorrupt, match="endless"):
        decode_frames(bytes(broken), max_pixels=10_000, max_frames=10)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", "avif"])
def test_too_many_frames_and_too_large_ones_are_refused_before_decoding(kind):
    data = encode_frames(animation(), format=kind, loop=0, options=EncodeConfig())
    with pytest.raises(ImageTooLarge, match="max_frames 4"):
        decode_frames(data, max_pixels=10_000, max_frames=4)
    with pytest.raises(ImageTooLarge, match="max_pixels 100"):
        decode_frames(data, max_pixels=100, max_frames=5)


def test_a_gif_of_a_hundred_thousand_frames_is_refused():
    frame = gif_of([((0, 0, 1, 1), 0, 1, None)])
    head, body = frame[:25], frame[25:-1]
    with pytest.raises(ImageTooLarge, match="100000"):
        count_frames(head + body * 100_001 + b";", "gif")


def test_gif_frame_larger_than_its_canvas_counts_with_its_own_size():
    data = gif_of([((0, 0, 4, 4), 0, 1, None), ((0, 0, 4, 4), 1, 1, None)])
    place = data.rindex(b"\x2c") + 5
    broken = data[:place] + struct.pack("<HH", 60_000, 60_000) + data[place + 4 :]
    with pytest.raises(ImageTooLarge, match="60000 x 60000"):
        decode_frames(broken, max_pixels=10_000, max_frames=5)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", "avif"])
def test_a_file_that_is_cut_off_is_no_shorter_animation(kind):
    data = encode_frames(animation(), format=kind, loop=0, options=LOSSLESS)
    for length in range(40, len(data) - 1, max(1, len(data) // 40)):
        with pytest.raises(DataError):
            decoded(data[:length])


def test_shuffled_and_lying_chunks_are_corrupt():
    data = encode_frames(animation(), format="png", loop=0, options=LOSSLESS)
    chunks = list(apng.scan_chunks(data, check=False))
    cut = [data[chunk.content.start - 8 : chunk.content.stop + 4] for chunk in chunks]
    controls = [n for n, chunk in enumerate(chunks) if chunk.name == b"fcTL"]
    cut[controls[2]], cut[controls[3]] = cut[controls[3]], cut[controls[2]]
    with pytest.raises(ImageCorrupt, match="of the animation"):
        decoded(data[:8] + b"".join(cut))
    with pytest.raises(ImageCorrupt, match="announced"):
        decoded(lying_count(data))


def lying_count(data):
    """The animation with one frame more in its acTL."""
    file = io.BytesIO()
    file.write(data[:8])
    for chunk in apng.scan_chunks(data, check=False):
        content = data[chunk.content]
        file.write(png.chunk(chunk.name, struct.pack(">II", 6, 0) if chunk.name == b"acTL" else content))
    return file.getvalue()


def test_frames_that_do_not_fit_together_are_refused_except_as_pages():
    frames = [Frame(moving_square(0), 0.1), Frame(Image(np.zeros((3, 4, 3), np.uint8)), 0.1)]
    with pytest.raises(ImageUnsupported, match="choose tiff"):
        encode_frames(frames, format="gif", loop=0, options=LOSSLESS)
    assert len(decoded(encode_frames(frames, format="tiff", loop=0, options=LOSSLESS))) == 2


@pytest.mark.parametrize("kind", ["jpeg", "bmp", "ppm"])
def test_formats_without_frames_are_refused(kind):
    with pytest.raises(ImageUnsupported, match="holds no frames"):
        encode_frames(animation(), format=kind, loop=0, options=LOSSLESS)


def test_a_still_image_is_one_frame():
    data = raster.encode(moving_square(0), format="png")
    assert count_frames(data, "png") == (1, 0)
    (frame,) = decoded(data)
    assert np.array_equal(frame.image.pixels, moving_square(0).pixels)
    with pytest.raises(ImageTooLarge, match="max_pixels"):
        decode_frames(data, max_pixels=9, max_frames=1)
