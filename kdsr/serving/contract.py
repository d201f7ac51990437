"""What crosses the border between the entrance and a replica, and what a request may ask for."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from kdsr import __version__
from kdsr.codecs import ImageHeader, output_format
from kdsr.config import EncodeConfig, LimitsConfig, OutputFormat, Precision, of_extension
from kdsr.serving.problems import Problem
from kdsr.spec import Card, Frozen

MEDIA_TYPES: dict[str, str] = {
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "tiff": "image/tiff",
    "avif": "image/avif",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "ppm": "image/x-portable-pixmap",
}
"""Of each format that is written."""

_ALIASES = {
    "image/jpg": "jpeg",
    "image/apng": "png",
    "image/x-ms-bmp": "bmp",
    "image/x-portable-anymap": "ppm",
}
FORMAT_OF = {media_type: name for name, media_type in MEDIA_TYPES.items()} | _ALIASES


def json_object(data: bytes) -> dict[str, Any]:
    """What a JSON body holds. Raises Problem 400."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise Problem("bad-request", "the body is not valid JSON") from None
    if not isinstance(content, dict):
        raise Problem("bad-request", "expected a JSON object")
    return content


def _not_empty(value: object) -> object:
    """An empty form field is one that was left alone."""
    return None if value == "" else value


class Options(Frozen):
    """What a request may ask for, as query, form fields or members of a JSON object."""

    model: Annotated[Annotated[str, Field(max_length=64)] | None, BeforeValidator(_not_empty)] = None
    """Name of a served model; the first one when not set."""
    scale: Annotated[Annotated[float, Field(gt=0, le=16)] | None, BeforeValidator(_not_empty)] = None
    """Of the result; the model's largest when not set."""
    format: Annotated[OutputFormat | None, BeforeValidator(of_extension), BeforeValidator(_not_empty)] = None
    """Of the result; by the Accept header, or that of the image, when not set."""
    quality: Annotated[Annotated[int, Field(ge=1, le=100)] | None, BeforeValidator(_not_empty)] = None
    """Of JPEG, WebP and AVIF; 95 when not set."""


def read_options(*sources: Mapping[str, Any]) -> Options:
    """The options that all `sources` together give; one that two of them give differently is refused."""
    given: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            if name in given and str(given[name]) != str(value):
                raise Problem("invalid-option", f"{_shown(name)} is given twice with different values")
            given[name] = value
    for name in given:
        if name not in Options.model_fields:
            raise Problem("invalid-option", _unknown(name))
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        raise Problem("invalid-option", "; ".join(map(_explained, error.errors()))) from None


def _unknown(name: str) -> str:
    close = get_close_matches(name, Options.model_fields, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(Options.model_fields)}"
    return f"no option {_shown(name)}; {hint}"


def _shown(text: str) -> str:
    return repr(text[:40])


def _explained(detail: Any) -> str:
    return f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"


@dataclass(frozen=True)
class Wanted:
    """What is asked of one result, in the words of a bulk run: see `kdsr.config.UpscaleConfig`."""

    scale: float | None
    format: OutputFormat | None
    encode: EncodeConfig
    max_pixels: int
    max_frames: int
    width: int | None = None
    megapixels: float | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Call:
    """One image on its way to a replica."""

    data: bytes
    header: ImageHeader
    model: str
    network_sha256: str
    """The network that the entrance chose; a replica that has another one by now says so."""
    wanted: Wanted
    seconds: float
    """Until nobody waits for the result any more."""
    request_id: str


@dataclass(frozen=True)
class Result:
    """The file of an upscaled image and how it came to be."""

    data: bytes
    format: str
    height: int
    width: int
    queue_seconds: float
    """Until the first tile was begun, decoding not counted."""
    decode_seconds: float
    compute_seconds: float
    """Of the network over all tiles; its share where tiles of several images went together."""
    encode_seconds: float
    batch_size: int
    """Most tiles, its own and those of others, that went together with one of its own."""


@dataclass(frozen=True)
class Refusal:
    """What a replica says instead; a value, since Ray would wrap an exception."""

    kind: str
    detail: str
    retry_after: float | None = None

    def problem(self) -> Problem:
        """The same for HTTP."""
        return Problem(self.kind, self.detail, self.retry_after)


@dataclass(frozen=True)
class ServedNetwork:
    """One network that a replica holds."""

    card: Card
    precision: Precision
    uri: str

    @property
    def scale(self) -> int:
        """Its own."""
        return int(self.card.spec.scale)


@dataclass(frozen=True)
class ServedModel:
    """A model under its name, with its networks by scale, smallest first."""

    name: str
    networks: tuple[ServedNetwork, ...]

    def network_for(self, scale: float | None) -> ServedNetwork:
        """The smallest that reaches `scale`, else the largest."""
        enough = [network for network in self.networks if scale is not None and network.scale >= scale]
        return enough[0] if enough else self.networks[-1]


@dataclass(frozen=True)
class Description:
    """What a replica serves, and what it could not load."""

    models: tuple[ServedModel, ...]
    failures: Mapping[str, str]
    """By model: why what was asked for last is not what is served."""
    waiting_tiles: int
    held_bytes: int

    def model(self, name: str | None) -> ServedModel:
        """The model called `name`, or the first. Raises Problem."""
        if not self.models:
            raise Problem("loading", "no model is loaded yet; try again soon", retry_after=2)
        if name is None:
            return self.models[0]
        for model in self.models:
            if model.name == name:
                return model
        known = ", ".join(model.name for model in self.models)
        raise Problem("invalid-option", f"no model {_shown(name)}; there are {known}")


def wanted_of(options: Options, *, accept: str, header: ImageHeader, limits: LimitsConfig) -> Wanted:
    """What the result will be; format by option, Accept, or that of the input. Raises Problem."""
    own = output_format(header.format)
    quality = EncodeConfig().quality if options.quality is None else options.quality
    return Wanted(
        options.scale,
        options.format or accepted_format(accept, own),
        EncodeConfig(quality=quality),
        limits.max_pixels,
        limits.max_frames,
    )


def accepted_format(accept: str, own: str) -> Any:
    """The format that an Accept header likes best; `own`, the input's, among equals. Raises Problem."""
    ranges = _ranges(accept)
    liking = {name: _liking(media_type, ranges) for name, media_type in MEDIA_TYPES.items()}
    best = max(liking.values())
    if best <= 0:
        raise Problem(
            "not-acceptable", f"nothing that Accept allows is written; {', '.join(MEDIA_TYPES.values())} are"
        )
    return own if liking[own] == best else max(liking, key=lambda name: liking[name])


def _ranges(accept: str) -> dict[str, float]:
    """Each range of the header and its weight; what cannot be read counts as not there."""
    ranges: dict[str, float] = {}
    for part in accept.lower().split(",")[:50]:
        name, *parameters = (piece.strip() for piece in part.split(";"))
        weight = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        if re.fullmatch(r"[a-z*]+/[a-z0-9.+*-]+", name) and re.fullmatch(r"[01](\.\d{0,3})?", weight):
            ranges[MEDIA_TYPES[FORMAT_OF[name]] if name in FORMAT_OF else name] = float(weight)
    return ranges or {"*/*": 1.0}


def _liking(media_type: str, ranges: Mapping[str, float]) -> float:
    """The weight of the most exact range that has it."""
    for name in (media_type, "image/*", "*/*"):
        if name in ranges:
            return ranges[name]
    return 0.0


def etag_of(data_sha256: str, network: ServedNetwork, wanted: Wanted, *, tile_size: int | None = None) -> str:
    """A strong validator: the same for the same bytes, network, options, tiles and version."""
    parts = {
        "input": data_sha256,
        "network": network.card.sha256,
        "precision": network.precision,
        "scale": wanted.scale,
        "format": wanted.format,
        "encode": wanted.encode.model_dump(mode="json"),
        "tile_size": tile_size,
        "version": __version__,
    }
    return f'"{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}"'


def matches(if_none_match: str, etag: str) -> bool:
    """Whether the header names `etag`."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or tags == ["*"]


def output_pixels(header: ImageHeader, network: ServedNetwork, scale: float | None) -> int:
    """Those of the network or the result, whichever are more, over all frames."""
    factor = max(network.scale, scale or 0)
    return int(header.all_pixels * factor**2)


def check_limits(header: ImageHeader, network: ServedNetwork, wanted: Wanted, limits: LimitsConfig) -> int:
    """Output pixels. Raises Problem 413."""
    if header.frames > limits.max_frames:
        raise Problem(
            "image-too-large", f"{header.frames} frames; at most {limits.max_frames} are taken in one request"
        )
    if header.all_pixels > limits.max_pixels:
        frames = f" in {header.frames} frames" if header.frames > 1 else ""
        raise Problem(
            "image-too-large",
            f"{header.width} x {header.height} pixels{frames}; at most {limits.max_pixels} in all are taken "
            f"in one request: make it smaller, or send it to /v1/jobs",
        )
    output = output_pixels(header, network, wanted.scale)
    if output > limits.max_output_pixels:
        raise Problem(
            "image-too-large",
            f"the result would have {output} pixels; at most {limits.max_output_pixels} are made in one "
            f"request: ask for a smaller scale, or send it to /v1/jobs",
        )
    return output


def cards(models: Iterable[ServedModel]) -> Sequence[dict[str, Any]]:
    """What GET /v1/models says of each."""
    return [
        {
            "name": model.name,
            "scales": [network.scale for network in model.networks],
            "networks": [
                {"precision": network.precision, "card": network.card.model_dump(mode="json")}
                for network in model.networks
            ],
        }
        for model in models
    ]
