"""Read the images of a benchmark: a folder or prefix with `HR/` and, optionally, `LR/` of the same names.

The suffixes of a pair may differ. Without `LR/`, HR is cropped to a multiple of the scale and reduced as
MATLAB's `imresize` does, then rounded to uint8. Both sides are read as 8-bit RGB without colour management:
grey becomes three equal channels, as in BasicSR and EDSR-PyTorch. LR images without HR are not used.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch

from kdsr import codecs
from kdsr.config import StoreConfig
from kdsr.degrade import bicubic_lr
from kdsr.errors import DataError, ImageTooSmall, RequestError
from kdsr.image import Image
from kdsr.metrics import WINDOW_SIZE
from kdsr.store import Store, open_store

SCALES = (2, 3, 4)
MAX_PIXELS = 500_000_000


@dataclass(frozen=True)
class Pair:
    """One test image. `lr` (h, w, 3) and `hr` (h*scale, w*scale, 3), uint8."""

    name: str
    lr: Image
    hr: Image


@dataclass(frozen=True)
class Benchmark:
    """Names and places of the images of one test set. `scale` is None when there is no `LR/`."""

    name: str
    store: Store
    hr_keys: dict[str, str]
    lr_keys: dict[str, str]
    """By the same names as `hr_keys`; empty when LR is to be made."""
    scale: int | None

    def pairs(self, scale: int) -> Iterator[Pair]:
        """Every image with its LR, read when it is asked for.

        Raises DataError, naming the file, for one that is corrupt or too small to be measured.
        """
        for name, key in self.hr_keys.items():
            hr = _read(self.store, key)
            if self.lr_keys:
                lr = _read(self.store, self.lr_keys[name])
                hr = _cropped(hr, lr.height * scale, lr.width * scale)
            else:
                hr = _cropped(hr, hr.height // scale * scale, hr.width // scale * scale)
                lr = None
            _require_measurable(hr, scale, file=f"{self.store.uri}/{key}")
            yield Pair(name, lr or reduce(hr, scale), hr)


def open_benchmark(uri: str, name: str, config: StoreConfig) -> Benchmark:
    """List the benchmark at `uri` and, where it has `LR/`, check every size and find the scale.

    Raises RequestError when there is no image under `HR/` and DataError when files do not match.
    """
    store = open_store(uri, config)
    hr_keys, lr_keys = _image_keys(store, "HR/"), _image_keys(store, "LR/")
    if not hr_keys:
        raise RequestError(
            f"no images in {store.uri}/HR; a benchmark is the folder or prefix that holds HR/ and, "
            f"optionally, LR/ with images of the same names"
        )
    missing = sorted(set(hr_keys) - set(lr_keys))
    if lr_keys and missing:
        raise DataError(
            f"{store.uri}/{hr_keys[missing[0]]}: no image LR/{missing[0]} to go with it ({len(missing)} of "
            f"{len(hr_keys)} are missing); add what is missing, or remove LR/ to have all of it made"
        )
    scale = _scale_of(store, hr_keys, lr_keys) if lr_keys else None
    return Benchmark(name, store, hr_keys, lr_keys, scale)


def benchmark_names(uris: Sequence[str]) -> list[str]:
    """A short name for each of `uris`: its last part that is not just a scale (`Set5/x4` is Set5).

    Names that would be the same for different places get the part before as well (`mine/Set5`).
    Raises RequestError when one place is given twice.
    """
    places = [_path_parts(uri) for uri in uris]
    for uri, place in zip(uris, places, strict=True):
        if places.count(place) > 1:
            raise RequestError(f"benchmark {uri} is given twice; leave one out")
    named = [_without_scale(place) for place in places]
    namesakes = {place[-1]: len({other for other in named if other[-1] == place[-1]}) for place in named}
    return ["/".join(place[-2:]) if namesakes[place[-1]] > 1 else place[-1] for place in named]


def reduce(hr: Image, scale: int) -> Image:
    """The uint8 LR that MATLAB's bicubic makes of `hr`, whose sides are multiples of `scale`."""
    levels = torch.from_numpy(hr.pixels.copy()).permute(2, 0, 1)[None].float()
    lr = bicubic_lr(levels / 255, scale)[0].permute(1, 2, 0)
    return Image((lr * 255).round().to(torch.uint8).numpy())


def _path_parts(uri: str) -> tuple[str, ...]:
    return tuple(part for part in uri.partition("://")[2].split("/") if part) or (uri,)


def _without_scale(place: tuple[str, ...]) -> tuple[str, ...]:
    """`place` up to its last part that is more than a scale such as x4, X4 or 4x."""
    while len(place) > 1 and re.fullmatch(r"[xX]\d|\d[xX]", place[-1]):
        place = place[:-1]
    return place


def _image_keys(store: Store, prefix: str) -> dict[str, str]:
    """Keys of the images under `prefix` by name, which is the rest of the key without its suffix.

    Raises DataError for two images of one name, and when there are files but none is an image.
    """
    keys: dict[str, str] = {}
    other = None
    for info in store.list(prefix):
        path = PurePosixPath(info.key)
        if path.suffix.lower() not in codecs.SUFFIXES or path.name.startswith("."):
            other = info.key
            continue
        name = str(path.relative_to(prefix).with_suffix(""))
        if name in keys:
            raise DataError(f"{store.uri}: {keys[name]} and {info.key} have one name; keep one of them")
        keys[name] = info.key
    if other and not keys:
        known = ", ".join(codecs.SUFFIXES)
        raise DataError(f"{store.uri}/{prefix}: expected images ({known}), found only files like {other}")
    return dict(sorted(keys.items()))


def _scale_of(store: Store, hr_keys: dict[str, str], lr_keys: dict[str, str]) -> int:
    """The one scale at which every LR is its HR, cropped to a multiple of the scale, made smaller."""
    scales: tuple[int, ...] = SCALES
    for name, hr_key in hr_keys.items():
        hr, lr = _size(store, hr_key), _size(store, lr_keys[name])
        fitting = tuple(scale for scale in scales if (hr[0] // scale, hr[1] // scale) == lr)
        if not fitting:
            raise DataError(_mismatch(f"{store.uri}/{hr_key}", hr, lr, scales))
        scales = fitting
    return scales[0]


def _mismatch(file: str, hr: tuple[int, int], lr: tuple[int, int], scales: tuple[int, ...]) -> str:
    sizes = " or ".join(f"{lr[0] * scale}x{lr[1] * scale} (x{scale})" for scale in scales)
    return (
        f"{file}: expected {sizes} for its LR of {lr[0]}x{lr[1]}, found {hr[0]}x{hr[1]} (height x width); "
        f"all pairs of a benchmark need one scale, and every LR must be made from its HR"
    )


def _require_measurable(hr: Image, scale: int, *, file: str) -> None:
    least = WINDOW_SIZE + 2 * scale
    if min(hr.height, hr.width) < least:
        raise ImageTooSmall(
            f"{file}: expected at least {least} pixels a side to be measured at x{scale}, "
            f"found {hr.height}x{hr.width} (height x width); remove it from the benchmark"
        )


def _size(store: Store, key: str) -> tuple[int, int]:
    with _named(f"{store.uri}/{key}"):
        header = codecs.probe(store.get(key))
    return header.height, header.width


def _read(store: Store, key: str) -> Image:
    with _named(f"{store.uri}/{key}"):
        return codecs.decode(store.get(key), max_pixels=MAX_PIXELS).rgb8()


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Put `file` in front of the text of a DataError, which knows only bytes."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{file}: {error}") from None


def _cropped(hr: Image, height: int, width: int) -> Image:
    return Image(hr.pixels[:height, :width])
