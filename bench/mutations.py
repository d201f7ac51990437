"""Hostile files: thousands of broken images through the codecs, each one a right picture or a typed failure.

    python bench/mutations.py --count 2400 --json mutations.json

Seeds of all formats are made here, then broken: flipped bits, cuts, wrong sizes, shuffled chunks, bombs,
endless animations, and more. Each file goes through probe, decode, a bicubic x2 and encode in a process with
a limit on time and memory. Prints progress and JSON `{"files", "pictures", "failures_by_class", "untyped",
"crashes", "hangs", "over_memory", "wrong_pictures", "by_format", "by_mutation", "findings"}`; exits 1 if any
file did anything but fail by class or become a picture. The same `--seed` makes the same files.
"""

import argparse
import io
import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
MAX_PIXELS = 2_000_000
MAX_FRAMES = 64
UPSCALED_PIXELS = 4096
MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """One file to feed."""

    name: str
    """Seed, mutation and number: the same for the same --seed."""
    format: str
    mutation: str
    data: bytes


# ---------------------------------------------------------------- seeds


def pattern(height: int, width: int, channels: int, dtype: str) -> Any:
    """(height, width, channels): a ramp with noise, so that every codec has something to do."""
    import numpy as np

    rng = np.random.default_rng(height * width + channels)
    ramp = np.add.outer(np.linspace(0, 0.5, height), np.linspace(0, 0.4, width))[:, :, None]
    values = ramp + rng.random((height, width, channels)) * 0.1
    return values.astype(dtype) if dtype == "float32" else (values * np.iinfo(dtype).max).astype(dtype)


def saved(array: Any, kind: str, mode: str | None = None, **options: Any) -> bytes:
    """By Pillow, in `mode`."""
    import PIL.Image

    pixels = array[:, :, 0] if array.shape[2] == 1 else array
    picture = PIL.Image.fromarray(pixels)
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, kind, **options)
    return file.getvalue()


def animated(kind: str, *, alpha: bool) -> bytes:
    """Four frames, by Pillow."""
    import PIL.Image

    frames = []
    for number in range(4):
        array = pattern(24, 32, 4 if alpha else 3, "uint8")
        array[number : number + 8, 4 : 12 + number] = 40 * number
        frames.append(PIL.Image.fromarray(array))
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=[40, 80, 120, 60], loop=0)
    return file.getvalue()


def tiff(*arrays: Any, big: bool = False, **options: Any) -> bytes:
    """Pages by tifffile."""
    import tifffile

    file = io.BytesIO()
    with tifffile.TiffWriter(file, bigtiff=big) as writer:
        for array in arrays:
            photometric = "rgb" if array.shape[2] == 3 else "minisblack"
            pixels = array if array.shape[2] == 3 else array[:, :, 0]
            writer.write(pixels, photometric=photometric, metadata=None, **options)
    return file.getvalue()


def deep_png() -> bytes:
    """16 bits, RGB and alpha."""
    import numpy as np

    values = pattern(20, 30, 4, "uint16")
    rows = b"".join(b"\0" + row.astype(np.dtype(">u2")).tobytes() for row in values)
    return png_of(30, 20, 16, 6, zlib.compress(rows))


def png_of(width: int, height: int, depth: int, colour: int, codes: bytes, extra: bytes = b"") -> bytes:
    """A PNG of these parts, its checksums right."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", codes) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def heic() -> bytes | None:
    """None where the encoder is missing."""
    import PIL.Image
    import pillow_heif

    heif = pillow_heif.from_pillow(PIL.Image.fromarray(pattern(48, 64, 3, "uint8")))
    file = io.BytesIO()
    try:
        heif.save(file, quality=60)
    except (RuntimeError, OSError, ValueError):
        return None
    return file.getvalue()


def seeds() -> list[tuple[str, str, bytes]]:
    """(name, format, bytes): small files of all formats and of many kinds in each."""
    import PIL.Image
    from PIL import ImageCms

    rgb, grey, rgba = (pattern(32, 40, channels, "uint8") for channels in (3, 1, 4))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = PIL.Image.Exif()
    exif[274], exif[271] = 6, "camera"
    made: list[tuple[str, str, bytes | None]] = [
        ("jpeg-rgb", "jpeg", saved(rgb, "JPEG", exif=exif, icc_profile=profile)),
        ("jpeg-grey", "jpeg", saved(grey, "JPEG")),
        ("jpeg-progressive", "jpeg", saved(rgb, "JPEG", progressive=True)),
        ("jpeg-cmyk", "jpeg", saved(rgb, "JPEG", "CMYK")),
        ("png-rgb", "png", saved(rgb, "PNG", exif=exif, icc_profile=profile, dpi=(72, 72))),
        ("png-palette", "png", saved(rgb, "PNG", "P")),
        ("png-one-bit", "png", saved(grey, "PNG", "1")),
        ("png-rgba", "png", saved(rgba, "PNG")),
        ("png-deep", "png", deep_png()),
        ("png-animated", "png", animated("PNG", alpha=False)),
        ("png-animated-alpha", "png", animated("PNG", alpha=True)),
        ("webp-lossy", "webp", saved(rgb, "WEBP", exif=exif, icc_profile=profile)),
        ("webp-lossless", "webp", saved(rgba, "WEBP", lossless=True)),
        ("webp-animated", "webp", animated("WEBP", alpha=True)),
        ("tiff-rgb", "tiff", tiff(rgb, compression="zlib")),
        ("tiff-lzw", "tiff", saved(rgb, "TIFF", compression="tiff_lzw", icc_profile=profile)),
        ("tiff-deep", "tiff", tiff(pattern(20, 30, 3, "uint16"), compression="zlib")),
        ("tiff-float", "tiff", tiff(pattern(20, 30, 3, "float32"))),
        ("tiff-tiled", "tiff", tiff(rgb, tile=(16, 16), compression="zlib")),
        ("tiff-pages", "tiff", tiff(rgb, pattern(9, 12, 1, "uint16"), pattern(20, 8, 3, "uint8"))),
        ("tiff-big", "tiff", tiff(rgb, grey, big=True)),
        ("avif", "avif", saved(rgb, "AVIF", quality=60, icc_profile=profile)),
        ("avif-alpha", "avif", saved(rgba, "AVIF", quality=60)),
        ("avif-animated", "avif", animated("AVIF", alpha=False)),
        ("heic", "heic", heic()),
        ("gif", "gif", saved(rgb, "GIF")),
        ("gif-animated", "gif", animated("GIF", alpha=False)),
        ("gif-animated-alpha", "gif", animated("GIF", alpha=True)),
        ("bmp", "bmp", saved(rgb, "BMP")),
        ("bmp-palette", "bmp", saved(rgb, "BMP", "P")),
        ("ppm", "ppm", saved(rgb, "PPM")),
        ("pgm", "ppm", saved(grey, "PPM")),
    ]
    return [(name, kind, data) for name, kind, data in made if data is not None]


# ---------------------------------------------------------------- mutations

Draw = random.Random
Mutation = Callable[[Draw, bytes], bytes]
_SIZES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def flip_bits(draw: Draw, data: bytes) -> bytes:
    """One to 64 of them, anywhere."""
    broken = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
    return bytes(broken)


def flip_header_bits(draw: Draw, data: bytes) -> bytes:
    """In the first bytes, where sizes and kinds stand."""
    broken = bytearray(data)
    for _ in range(draw.choice((1, 1, 3))):
        broken[draw.randrange(min(len(broken), 128))] ^= 1 << draw.randrange(8)
    return bytes(broken)


def cut(draw: Draw, data: bytes) -> bytes:
    """The end is missing."""
    return data[: draw.randrange(len(data))]


def cut_little(draw: Draw, data: bytes) -> bytes:
    """A few last bytes are missing."""
    return data[: len(data) - draw.randrange(1, 17)]


def cut_out(draw: Draw, data: bytes) -> bytes:
    """A piece in the middle is missing."""
    begin = draw.randrange(len(data))
    return data[:begin] + data[begin + draw.randrange(1, 65) :]


def wrong_size(draw: Draw, data: bytes) -> bytes:
    """A 16- or 32-bit number of the first half becomes an extreme one."""
    broken = bytearray(data)
    at = draw.randrange(max(1, min(len(data), max(64, len(data) // 2)) - 4))
    letters = draw.choice(("<I", ">I", "<H", ">H"))
    largest = 0xFFFFFFFF if letters[1] == "I" else 0xFFFF
    struct.pack_into(letters, broken, at, draw.choice(_SIZES) & largest)
    return bytes(broken)


def zero_run(draw: Draw, data: bytes) -> bytes:
    """As a disk leaves it."""
    begin, length = draw.randrange(len(data)), draw.randrange(1, 257)
    return data[:begin] + bytes(len(data[begin : begin + length])) + data[begin + length :]


def insert_noise(draw: Draw, data: bytes) -> bytes:
    """Random bytes where there were none."""
    at = draw.randrange(len(data))
    return data[:at] + draw.randbytes(draw.randrange(1, 33)) + data[at:]


def repeat_piece(draw: Draw, data: bytes) -> bytes:
    """A piece many times: nested and endless structures."""
    begin = draw.randrange(len(data))
    piece = data[begin : begin + draw.randrange(1, 257)]
    return data[:begin] + piece * draw.choice((2, 16, 200)) + data[begin:]


def swap_pieces(draw: Draw, data: bytes) -> bytes:
    """Two pieces in the other order."""
    first, second, third = sorted(draw.randrange(len(data) + 1) for _ in range(3))
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def noise_behind_header(draw: Draw, data: bytes) -> bytes:
    """The right beginning, then anything."""
    kept = draw.choice((8, 12, 16, 32, 64))
    return data[:kept] + draw.randbytes(max(0, len(data) - kept))


def shuffle_chunks(draw: Draw, data: bytes) -> bytes:
    """PNG and WebP: chunks in another order, doubled, or left out; other formats: two pieces swapped."""
    pieces = list(_chunks(data))
    if len(pieces) < 3:
        return swap_pieces(draw, data)
    head, rest = pieces[0], pieces[1:]
    kind = draw.randrange(4)
    if kind == 0:
        draw.shuffle(rest)
    elif kind == 1:
        rest.insert(draw.randrange(len(rest)), draw.choice(rest))
    elif kind == 2:
        del rest[draw.randrange(len(rest))]
    else:
        first = draw.randrange(len(rest) - 1)
        rest[first], rest[first + 1] = rest[first + 1], rest[first]
    return head + b"".join(rest)


def lie_in_chunk(draw: Draw, data: bytes) -> bytes:
    """PNG: a wrong byte in a chunk whose checksum is right again; other formats: flipped bits."""
    pieces = list(_chunks(data))
    if len(pieces) < 3 or data[:4] != b"\x89PNG":
        return flip_header_bits(draw, data)
    at = draw.randrange(1, len(pieces))
    name, content = pieces[at][4:8], bytearray(pieces[at][8:-4])
    if content:
        content[draw.randrange(len(content))] = draw.randrange(256)
    pieces[at] = chunk(name, bytes(content))
    return b"".join(pieces)


def _chunks(data: bytes) -> Iterator[bytes]:
    """The head of the file, then each chunk whole; just all of it for a format without chunks."""
    if data[:4] == b"\x89PNG":
        letters, at, tail = ">I4s", 8, 4
    elif data[:4] == b"RIFF":
        letters, at, tail = "<4sI", 12, 0
    else:
        yield data
        return
    yield data[:at]
    while at + 8 <= len(data):
        length = next(field for field in struct.unpack(letters, data[at : at + 8]) if isinstance(field, int))
        end = at + 8 + length + tail + (length % 2 if not tail else 0)
        yield data[at:end]
        at = end


def keep(draw: Draw, data: bytes) -> bytes:
    """Nothing is broken: what comes out has to be a picture."""
    del draw
    return data


MUTATIONS: dict[str, tuple[Mutation, int]] = {
    "flip_bits": (flip_bits, 5),
    "flip_header_bits": (flip_header_bits, 4),
    "cut": (cut, 3),
    "cut_little": (cut_little, 1),
    "cut_out": (cut_out, 2),
    "wrong_size": (wrong_size, 5),
    "zero_run": (zero_run, 2),
    "insert_noise": (insert_noise, 2),
    "repeat_piece": (repeat_piece, 2),
    "swap_pieces": (swap_pieces, 1),
    "noise_behind_header": (noise_behind_header, 1),
    "shuffle_chunks": (shuffle_chunks, 2),
    "lie_in_chunk": (lie_in_chunk, 2),
}
"""What breaks a seed, and how often it is drawn."""

_HEADS = {
    "jpeg": b"\xff\xd8\xff\xe0",
    "png": b"\x89PNG\r\n\x1a\n",
    "gif": b"GIF89a",
    "webp": b"RIFF\xff\0\0\0WEBP",
    "tiff": b"II*\0\x08\0\0\0",
    "avif": b"\0\0\0\x18ftypavif",
    "heic": b"\0\0\0\x18ftypheic",
    "bmp": b"BM",
    "ppm": b"P6\n",
}


def bombs() -> Iterator[tuple[str, str, bytes]]:
    """(name, format, bytes): files that are small and claim, or become, very much."""
    zeros = zlib.compress(bytes(60_000_000), 9)
    yield "png-large", "png", png_of(20_000, 1000, 8, 2, zeros)
    yield "png-longer-than-said", "png", png_of(8, 8, 8, 2, zeros)
    yield "png-claims", "png", png_of(2**31 - 1, 2**31 - 1, 8, 6, zlib.compress(b"\0" * 99))
    yield (
        "png-profile",
        "png",
        png_of(8, 8, 8, 2, zlib.compress(bytes(200)), chunk(b"iCCP", b"x\0\0" + zeros)),
    )
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros)
    yield "png-text", "png", png_of(8, 8, 8, 2, zlib.compress(bytes(200)), text)
    many_texts = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000), 9)) * 300
    yield "png-many-texts", "png", png_of(8, 8, 8, 2, zlib.compress(bytes(200)), many_texts)
    control = struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 10, 0, 0)
    claim = chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + chunk(b"fcTL", control) * 40
    yield "png-frames", "png", png_of(8, 8, 8, 2, zlib.compress(bytes(200)), claim)
    yield from _gif_bombs()
    yield from _tiff_bombs(zeros)
    large = struct.pack("<4sI4s4sII", b"RIFF", 1000, b"WEBP", b"VP8X", 10, 0x12) + b"\xff\xff\xff\xff\xff\xff"
    frame = struct.pack("<4sI", b"ANMF", 16) + bytes(16)
    yield "webp-canvas", "webp", large + frame * 30
    small = struct.pack("<4sI4s4sII", b"RIFF", 3_600_022, b"WEBP", b"VP8X", 10, 0x12) + b"\x07\0\0\x07\0\0"
    yield "webp-frames", "webp", small + frame * 150_000
    nested = frame
    for _ in range(200):
        nested = struct.pack("<4sI", b"ANMF", 16 + len(nested)) + bytes(16) + nested
    yield "webp-nested", "webp", small + nested
    yield (
        "bmp-claims",
        "bmp",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60000, 60000, 1, 24, *[0] * 6),
    )
    runs = struct.pack("<IIIIiiHHIIiiII", 2000, 0, 1078, 40, 1000, 1000, 1, 8, 1, *[0] * 5)
    yield "bmp-runs", "bmp", b"BM" + runs + bytes(1024) + b"\0\2\xff\xff" * 200
    yield "ppm-claims", "ppm", b"P6\n99999999 99999999\n255\n" + bytes(30)
    yield "ppm-digits", "ppm", b"P6\n" + b"9" * 5000 + b" 1\n255\n" + bytes(30)
    yield "ppm-comment", "ppm", b"P6\n#" + b"x" * 1_000_000
    yield (
        "jpeg-claims",
        "jpeg",
        b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03\x01\x22\0\x02\x11\x01\x03\x11\x01",
    )
    yield "jpeg-markers", "jpeg", b"\xff\xd8" + b"\xff\xe0\0\x02" * 100_000
    yield "jpeg-fill", "jpeg", b"\xff\xd8" + b"\xff" * 1_000_000
    box = struct.pack(">I4s", 8, b"free") * 50_000
    yield "avif-boxes", "avif", _HEADS["avif"] + b"\0\0\0\0avifmif1" + box
    deep = b""
    for _ in range(2000):
        deep = struct.pack(">I4s", len(deep) + 8, b"moov") + deep
    yield "avif-nested", "avif", _HEADS["avif"] + b"\0\0\0\0avifmif1" + deep


def _gif_bombs() -> Iterator[tuple[str, str, bytes]]:
    head = struct.pack("<6sHHBBB", b"GIF89a", 8, 8, 0x80, 0, 0) + bytes(6)
    codes = b"\x02\x02\x44\x01\0"
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, 1, 1, 0) + codes
    yield "gif-frames", "gif", head + frame * 150_000 + b";"
    yield "gif-sixty-frames", "gif", head + frame * 60 + b";"
    yield "gif-large-frame", "gif", head + (frame[:5] + b"\xff\xff\xff\xff\0" + codes) * 2 + b";"
    yield (
        "gif-large",
        "gif",
        struct.pack("<6sHHBBB", b"GIF89a", 65535, 65535, 0x80, 0, 0) + bytes(6) + frame + b";",
    )
    yield "gif-blocks", "gif", head + b"\x21\xfe" + b"\x01\0\x21\xfe" * 500_000 + b"\0" + frame + b";"
    yield "gif-no-end", "gif", head + b"\x21\xfe" + b"\x01\0" * 500_000


def _tiff_bombs(zeros: bytes) -> Iterator[tuple[str, str, bytes]]:
    def directory(fields: dict[int, tuple[int, int]], following: int) -> bytes:
        entries = b"".join(
            struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(fields.items())
        )
        return struct.pack("<H", len(fields)) + entries + struct.pack("<I", following)

    def fields(width: int, height: int, compression: int, length: int) -> dict[int, tuple[int, int]]:
        shorts = {258: 8, 259: compression, 262: 1, 277: 1}
        longs = {256: width, 257: height, 273: 200, 278: height, 279: length}
        return {tag: (3, value) for tag, value in shorts.items()} | {tag: (4, v) for tag, v in longs.items()}

    head = b"II*\0\x08\0\0\0"
    yield "tiff-circle", "tiff", head + directory(fields(8, 8, 1, 64), 8).ljust(192, b"\0") + bytes(64)
    many = b"".join(struct.pack("<HI", 0, 8 + 6 * n) for n in range(1, 120_000)) + struct.pack("<HI", 0, 0)
    yield "tiff-pages", "tiff", head + many
    large = directory(fields(60_000, 60_000, 8, len(zeros)), 0).ljust(192, b"\0")
    yield "tiff-large", "tiff", head + large + zeros
    small = directory(fields(8, 8, 8, len(zeros)), 0).ljust(192, b"\0")
    yield "tiff-longer-than-said", "tiff", head + small + zeros
    yield "tiff-entries", "tiff", head + struct.pack("<H", 65535) + bytes(4000)


def wrong_names(made: list[tuple[str, str, bytes]]) -> Iterator[tuple[str, str, bytes]]:
    """The beginning of one format and the rest of another; nothing; and plain text."""
    for kind, head in _HEADS.items():
        for name, _, data in made:
            yield f"{name}-as-{kind}", kind, head + data[len(head) :]
        yield f"only-head-{kind}", kind, head
        yield f"text-as-{kind}", kind, head + b"This is no image. " * 40
    for length in (0, 1, 2, 3, 7, 12, 64):
        yield f"zeros-{length}", "none", bytes(length)
    yield "text", "none", b"<html><body>404 Not Found</body></html>"
    yield "svg", "none", b"<svg xmlns='http://www.w3.org/2000/svg'/>"


def cases(count: int, seed: int) -> Iterator[Case]:
    """`count` files: all seeds as they are, all bombs, some under a wrong name, and the rest mutations."""
    made = seeds()
    fixed = [Case(f"{name}/keep", kind, "keep", data) for name, kind, data in made]
    fixed += [Case(f"{name}/bomb", kind, "bomb", data) for name, kind, data in bombs()]
    named = [Case(f"{name}/wrong_name", kind, "wrong_name", data) for name, kind, data in wrong_names(made)]
    random.Random(seed).shuffle(named)
    fixed += named[: count // 12]
    yield from fixed[:count]
    mutations, weights = list(MUTATIONS), [weight for _, weight in MUTATIONS.values()]
    for number in range(count - len(fixed)):
        draw = random.Random(f"{seed}/{number}")
        name, kind, data = made[number % len(made)]
        mutation = draw.choices(mutations, weights)[0]
        yield Case(f"{name}/{mutation}/{number}", kind, mutation, MUTATIONS[mutation][0](draw, data))


# ---------------------------------------------------------------- one file


class WrongPictureError(Exception):
    """A picture came out that the file does not hold."""


def feed(data: bytes, upscale: Callable[[Any], Any]) -> str:
    """What became of one file: "picture", or the name of the DataError. Everything else is raised."""
    from kdsr import codecs
    from kdsr.config import EncodeConfig
    from kdsr.errors import DataError

    try:
        header = codecs.probe(data)
        image = codecs.decode(data, max_pixels=MAX_PIXELS)
        result_format = codecs.output_format(header.format)
        if header.frames > 1:
            frames = codecs.decode_frames(data, max_pixels=MAX_PIXELS, max_frames=MAX_FRAMES)
            result = codecs.encode_frames(
                frames, format=result_format, loop=header.loop, options=EncodeConfig()
            )
        else:
            result = codecs.encode(upscale(image), format=result_format, options=EncodeConfig())
    except DataError as error:
        return type(error).__name__
    again = codecs.probe(result)
    if again.frames != header.frames:
        raise WrongPictureError(f"{header.frames} frames were read and {again.frames} written")
    if header.format == "png":  # an orientation may stand behind the pixels, where the header does not end
        is_right = sorted((image.height, image.width)) == sorted((header.height, header.width))
    else:
        is_right = (image.height, image.width) == (header.height, header.width)
    if not is_right:
        raise WrongPictureError(f"{header} and a picture of {image.width} x {image.height}")
    return "picture"


def bicubic_upscale() -> Callable[[Any], Any]:
    """x2 for pictures of at most `UPSCALED_PIXELS`; larger ones stay."""
    from kdsr.engine import Engine
    from kdsr.models.bicubic import Bicubic
    from kdsr.spec import BicubicSpec
    from kdsr.upscale import Upscaler

    upscaler = Upscaler(Engine(Bicubic(BicubicSpec(scale=2)), precision="float32"))
    return lambda image: upscaler.upscale(image) if image.height * image.width <= UPSCALED_PIXELS else image


def serve(*, with_upscale: bool) -> None:
    """The worker: files from stdin, a line of JSON for each to stdout, which libraries do not get."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    upscale = bicubic_upscale() if with_upscale else lambda image: image
    feed(seeds()[0][2], upscale)  # everything is loaded before memory is limited
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer(answers, ["ready", ""])
    while length := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(length, "big"))
        try:
            answer(answers, [feed(data, upscale), ""])
        except MemoryError as error:
            answer(answers, ["over_memory", f"MemoryError: {error}"])
        except WrongPictureError as error:
            answer(answers, ["wrong_picture", str(error)])
        except Exception as error:  # noqa: BLE001 what is looked for
            answer(answers, ["untyped", f"{type(error).__name__}: {error} at {_place(error)}"])


def answer(answers: TextIO, words: list[str]) -> None:
    answers.write(json.dumps(words) + "\n")
    answers.flush()


def _place(error: BaseException) -> str:
    place, trace = "", error.__traceback__
    while trace is not None:
        place, trace = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", trace.tb_next
    return place


# ---------------------------------------------------------------- all files


class Worker:
    """A process that is fed; a new one after a crash or a hang."""

    def __init__(self, *, seconds: float, with_upscale: bool) -> None:
        self._seconds = seconds
        self._options = [] if with_upscale else ["--no-upscale"]
        self._process: subprocess.Popen[bytes] | None = None

    def try_file(self, case: Case) -> tuple[str, str]:
        """(what became of it, details)."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(len(case.data).to_bytes(8, "big") + case.data)
            process.stdin.flush()
            return self._answer(process, self._seconds)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            self.stop()
            if isinstance(error, TimeoutError):
                return "hang", f"no answer in {self._seconds} s"
            return "crash", f"exit status {process.returncode}"

    def _started(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-W", "ignore", __file__, "--worker", *self._options]
        errors = tempfile.TemporaryFile()  # noqa: SIM115 as long as the process
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            self._answer(process, 120)
        except (TimeoutError, EOFError):
            errors.seek(0)
            sys.exit(f"the worker did not start: {errors.read()[-2000:].decode(errors='replace')}")
        return process

    def _answer(self, process: "subprocess.Popen[bytes]", seconds: float) -> tuple[str, str]:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        line = process.stdout.readline()
        if not line:
            raise EOFError
        outcome, details = json.loads(line)
        return outcome, details

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


BAD = ("untyped", "crash", "hang", "over_memory", "wrong_picture")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All files through the workers, and what became of them."""
    everything = list(cases(arguments.count, arguments.seed))
    shares = [everything[n :: arguments.workers] for n in range(arguments.workers)]
    done, began = Counter[str](), time.monotonic()

    def try_share(share: list[Case]) -> list[tuple[Case, str, str]]:
        worker, rows = Worker(seconds=arguments.seconds, with_upscale=arguments.upscale), []
        for case in share:
            outcome, details = worker.try_file(case)
            rows.append((case, outcome, details))
            done[outcome] += 1
            if done.total() % 200 == 0:
                bad = sum(done[name] for name in BAD)
                print(f"{done.total()} of {len(everything)} files, {bad} bad", file=sys.stderr, flush=True)
        worker.stop()
        return rows

    with ThreadPoolExecutor(arguments.workers) as pool:
        rows = [row for share in pool.map(try_share, shares) for row in share]
    if arguments.keep:
        keep_bad(Path(arguments.keep), rows)
    return report(rows) | {"seconds": round(time.monotonic() - began, 1), "seed": arguments.seed}


def keep_bad(folder: Path, rows: list[tuple[Case, str, str]]) -> None:
    """The files that did something bad, for a closer look."""
    folder.mkdir(parents=True, exist_ok=True)
    for case, outcome, _ in rows:
        if is_bad(case, outcome):
            (folder / case.name.replace("/", "_")).write_bytes(case.data)


def is_bad(case: Case, outcome: str) -> bool:
    """Whether it is neither a picture nor a typed failure; a whole file has to be a picture."""
    return outcome in BAD or (case.mutation == "keep" and outcome != "picture")


def report(rows: list[tuple[Case, str, str]]) -> dict[str, Any]:
    """The counts."""
    outcomes = Counter(outcome for _, outcome, _ in rows)
    by_format: dict[str, Counter[str]] = {}
    by_mutation: dict[str, Counter[str]] = {}
    for case, outcome, _ in rows:
        by_format.setdefault(case.format, Counter())[outcome] += 1
        by_mutation.setdefault(case.mutation, Counter())[outcome] += 1
    findings = [
        {"file": case.name, "outcome": outcome, "details": details}
        for case, outcome, details in rows
        if is_bad(case, outcome)
    ]
    return {
        "files": len(rows),
        "pictures": outcomes["picture"],
        "failures_by_class": {
            name: number for name, number in outcomes.items() if name not in (*BAD, "picture")
        },
        "untyped": outcomes["untyped"],
        "crashes": outcomes["crash"],
        "hangs": outcomes["hang"],
        "over_memory": outcomes["over_memory"],
        "wrong_pictures": outcomes["wrong_picture"],
        "by_format": {name: dict(counts) for name, counts in sorted(by_format.items())},
        "by_mutation": {name: dict(counts) for name, counts in sorted(by_mutation.items())},
        "findings": findings,
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2400, help="files to make (default 2400)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other files (default 0)")
    parser.add_argument("--seconds", type=float, default=20, help="limit for one file (default 20)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.add_argument("--keep", metavar="FOLDER", help="write bad files there")
    parser.add_argument("--no-upscale", dest="upscale", action="store_false", help="leave the network out")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    if arguments.worker:
        serve(with_upscale=arguments.upscale)
        return 0
    from kdsr import provenance

    result = run(arguments) | provenance.stamp()
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
