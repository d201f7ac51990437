"""What a client says to a server and when it says it again, without doing any of it.

Each call is a generator of steps: something to ask, a pause, work that may block. `Client` and `AsyncClient`
carry the same steps out, each in its own way.
"""

import json
import math
import random
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypedDict, TypeVar, Unpack

from pydantic import BaseModel, ConfigDict, ValidationError

from kdsr.client.pictures import Outgoing, outgoing, result_path, temporary
from kdsr.errors import (
    ImageRefused,
    JobFailed,
    RequestError,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerUnreachable,
)

Value = TypeVar("Value")
Answer = TypeVar("Answer")

# ---------------------------------------------------------------- steps


@dataclass(frozen=True)
class Ask:
    """Send a request; the outcome is a Reply. Raises Unanswered."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    about: str = ""
    """What it is about, for messages."""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Path | None = None
    into: Path | None = None
    """Where the body of a success goes; into memory when not set."""


@dataclass(frozen=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Work(Generic[Value]):
    """Do what may take a while, away from an event loop."""

    do: Callable[[], Value]


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes = b""


class Unanswered(Exception):
    """No whole reply came; sending the same again is harmless."""


Step = Ask | Pause | Work[Any]
Steps = Generator[Step, Any, Answer]


class Talk(Generic[Answer]):
    """Steps on their way, for whoever carries them out; they end with the `with` statement."""

    step: Step | None
    """To be done now; None when `answer` is there."""
    answer: Answer
    outcome: Any = None
    """Of the step, set within a turn."""

    def __init__(self, steps: Steps[Answer]) -> None:
        self._steps = steps
        self._advance(steps.send, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around the doing of one step; the next one is there afterwards."""
        try:
            yield
        except Unanswered as error:
            self._advance(self._steps.throw, error)
        else:
            self._advance(self._steps.send, self.outcome)

    def _advance(self, tell: Callable[[Any], Step], outcome: Any) -> None:
        try:
            self.step = tell(outcome)
        except StopIteration as stop:
            self.step, self.answer = None, stop.value


# ---------------------------------------------------------------- what callers see


class Wanted(TypedDict, total=False):
    """Options of a request; see the table in docs/serving.md."""

    model: str
    scale: float
    format: str
    """jpeg, png, webp, tiff, avif, gif, bmp or ppm; only for files and bytes."""
    quality: int
    idempotency_key: str
    """Of the caller's own, to find the same answer from another process; else each call makes one."""


class _Told(BaseModel):
    """What a server says. It may know more than this client."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class OfferedNetwork(_Told):
    """One network of a model."""

    precision: str
    card: dict[str, Any]


class OfferedModel(_Told):
    """A model and the scales of its networks."""

    name: str
    scales: tuple[int, ...]
    networks: tuple[OfferedNetwork, ...] = ()


class Offer(_Told):
    """What a server serves."""

    models: tuple[OfferedModel, ...]
    limits: dict[str, int] = {}
    failures: dict[str, str] = {}
    """By model: why what was asked for last is not what is served."""


class Job(_Told):
    """Work in the background and how far it is; counts are images."""

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    created: str = ""
    listed: int = 0
    done: int = 0
    failed: int = 0
    message: str = ""
    failures: dict[str, str] = {}
    """The first ones, by key."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Upscaled(Generic[Value]):
    """A result and what the server says of it."""

    image: Value
    """Of the kind that was given; for a path the path of the result."""
    model: str
    scale: float
    input_size: tuple[int, int]
    """Width and height."""
    output_size: tuple[int, int]
    queue_seconds: float
    compute_seconds: float
    request_id: str
    was_replayed: bool
    """Whether the server had it from an earlier try."""


# ---------------------------------------------------------------- sending again


@dataclass(frozen=True)
class Retries:
    """When to send again what found a server busy, not ready or gone."""

    patience_seconds: float = 120.0
    """For all tries of a call together; a pause that would end later is not begun."""
    first_seconds: float = 0.5
    """Longest pause after the first try when the server names none; doubles with each try."""
    longest_seconds: float = 20.0
    now: Callable[[], float] = time.monotonic
    uniform: Callable[[float, float], float] = random.uniform

    def pause(self, attempt: int) -> float:
        """Seconds before another try, somewhere in the upper half so that clients do not come together."""
        longest = min(self.longest_seconds, self.first_seconds * 2.0 ** min(attempt, 30))
        return self.uniform(longest / 2, longest)


def answered(ask: Ask, retries: Retries) -> Steps[Reply]:
    """The success that `ask` leads to in the end. Raises ServerError.

    Everything that is asked may be asked again: a POST carries an Idempotency-Key.
    """
    end = retries.now() + retries.patience_seconds
    for attempt in count():
        outcome = yield from _tried(ask)
        if isinstance(outcome, Reply):
            return outcome
        # A server that says "at once" is not asked without a pause for as long as patience lasts.
        pause = outcome.pause or retries.pause(attempt)
        if retries.now() + pause > end:
            raise outcome.failure
        yield Pause(pause)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class _Later:
    """What is raised unless another try is worth it."""

    failure: ServerError
    pause: float | None = None


def _tried(ask: Ask) -> Steps[Reply | _Later]:
    """One try. Raises ServerError when another one would not help."""
    try:
        reply: Reply = yield ask
    except Unanswered as error:
        text = f"expected an answer, found {error}; check the address and whether the server runs"
        return _Later(ServerUnreachable(f"{_said(ask)}: {text}"))
    if reply.status < 300:
        return reply
    failure, pause = refusal(ask, reply), retry_after(reply.headers)
    if not _may_try_again(reply, pause):
        raise failure
    return _Later(failure, pause)


def _may_try_again(reply: Reply, named: float | None) -> bool:
    """Busy or not ready; or our own request, sent before, is still under way."""
    return reply.status in (429, 503) or (reply.status == 409 and named is not None)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by the header, a number or a date; None when it says nothing that can be read."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def refusal(ask: Ask, reply: Reply) -> ServerError:
    """What the reply, not a success, is to the caller."""
    problem = _problem(reply)
    kind = str(problem.get("type", "")).removeprefix("urn:kdsr:problem:")
    error = _error_class(reply.status, kind)(f"{_said(ask)}: {_explained(reply, problem)}")
    error.status, error.kind = reply.status, kind
    error.request_id = reply.headers.get("x-request-id", "")
    return error


def _explained(reply: Reply, problem: Mapping[str, Any]) -> str:
    if problem:
        return f"{reply.status} {problem.get('title', '')}: {problem.get('detail', '')}"
    place = f" to {reply.headers['location'][:200]!r}" if "location" in reply.headers else ""
    return (
        f"expected a success or a problem document, found status {reply.status}{place}; is it the address "
        f"of a kdsr server, without a proxy that answers in its place?"
    )


def _problem(reply: Reply) -> dict[str, Any]:
    if not reply.headers.get("content-type", "").startswith("application/problem+json"):
        return {}
    try:
        content = json.loads(reply.body)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _error_class(status: int, kind: str) -> type[ServerError]:
    if status in (413, 415) or kind == "invalid-image":
        return ImageRefused
    if status in (429, 503):
        return ServerBusy
    return RequestRefused if 300 <= status < 500 else ServerError


def _said(ask: Ask) -> str:
    return f"{ask.method} {ask.path}{' of ' + ask.about if ask.about else ''}"


# ---------------------------------------------------------------- calls


def models(retries: Retries) -> Steps[Offer]:
    """What is served, and the limits of a request."""
    ask = Ask("GET", "v1/models")
    return _read(Offer, ask, (yield from answered(ask, retries)))


def upscale_told(
    retries: Retries, picture: Any, *, output: str | Path | None = None, **wanted: Unpack[Wanted]
) -> Steps[Upscaled[Any]]:
    """The same as `upscale` with what the server says of it: model, sizes, times."""
    sent: Outgoing = yield Work(lambda: outgoing(picture))
    if isinstance(sent.body, Path):
        target = None if output is None else Path(output)
        return (yield from _upscale_file(retries, sent, sent.body, target, wanted))
    if output is not None:
        raise RequestError("output: expected for a path only; bytes, pictures and arrays are returned")
    reply = yield from answered(_posted("v1/upscale", sent, wanted), retries)
    return _upscaled((yield Work(lambda: sent.back(reply.body))), reply)


def submit(retries: Retries, picture: Any, **wanted: Unpack[Wanted]) -> Steps[Job]:
    """Start upscaling one picture that is too large for a request; `result` fetches it."""
    sent: Outgoing = yield Work(lambda: outgoing(picture))
    ask = _posted("v1/jobs", sent, wanted)
    return _read(Job, ask, (yield from answered(ask, retries)))


def submit_places(
    retries: Retries, source: str, target: str, *, include: Sequence[str] = (), **wanted: Unpack[Wanted]
) -> Steps[Job]:
    """Start upscaling all pictures below the uri `source` that match `include`, to the uri `target`."""
    content = {"input": source, "output": target, "include": list(include), **_options(wanted)}
    headers = {"Content-Type": "application/json", **_key(wanted)}
    ask = Ask("POST", "v1/jobs", source, headers=headers, body=json.dumps(content).encode())
    return _read(Job, ask, (yield from answered(ask, retries)))


def job(retries: Retries, id_: str) -> Steps[Job]:
    """How far a job is."""
    ask = Ask("GET", f"v1/jobs/{_safe(id_)}")
    return _read(Job, ask, (yield from answered(ask, retries)))


def cancel(retries: Retries, id_: str) -> Steps[Job]:
    """Begin no further picture of a job; what is done stays."""
    ask = Ask("DELETE", f"v1/jobs/{_safe(id_)}")
    return _read(Job, ask, (yield from answered(ask, retries)))


def wait(
    retries: Retries,
    id_: str,
    *,
    timeout_seconds: float | None = None,
    every_seconds: float = 2.0,
    on_progress: Callable[[Job], None] | None = None,
) -> Steps[Job]:
    """The job when it is done. Raises JobFailed; TimeoutError when it is not finished in time."""
    end = math.inf if timeout_seconds is None else retries.now() + timeout_seconds
    while True:
        found = yield from job(retries, id_)
        if on_progress is not None:
            on_progress(found)
        if found.is_finished:
            return _done(found)
        if retries.now() + every_seconds > end:
            raise TimeoutError(
                f"job {id_} is {found.state} after {timeout_seconds} seconds; wait longer, or cancel it"
            )
        yield Pause(every_seconds)


def result(retries: Retries, id_: str, output: str | Path) -> Steps[Path]:
    """The file that a submitted picture became, written to `output`."""
    target = Path(output)
    ask = Ask("GET", f"v1/jobs/{_safe(id_)}/result")
    return (yield from _into_file(retries, ask, target.parent, lambda _: (target, target)))


# ---------------------------------------------------------------- parts of calls


def _upscale_file(
    retries: Retries, sent: Outgoing, source: Path, target: Path | None, wanted: Wanted
) -> Steps[Upscaled[Path]]:
    ask = _posted("v1/upscale", sent, _with_format_of(target, wanted))
    folder = source.parent if target is None else target if target.is_dir() else target.parent
    return (yield from _into_file(retries, ask, folder, lambda reply: _place_of(source, target, reply)))


def _into_file(
    retries: Retries, ask: Ask, folder: Path, finished: Callable[[Reply], tuple[Path, Answer]]
) -> Steps[Answer]:
    """The body of the answer at the path that `finished` names, whole or not at all."""
    draft: Path = yield Work(lambda: temporary(folder))
    try:
        reply = yield from answered(replace(ask, into=draft), retries)
        path, answer = finished(reply)
        yield Work(lambda: draft.replace(path))
    finally:
        draft.unlink(missing_ok=True)
    return answer


def _place_of(source: Path, target: Path | None, reply: Reply) -> tuple[Path, Upscaled[Path]]:
    headers = reply.headers
    path = result_path(
        source, target, media_type=headers.get("content-type", ""), scale=headers.get("kdsr-scale", "")
    )
    return path, _upscaled(path, reply)


def _posted(path: str, sent: Outgoing, wanted: Wanted) -> Ask:
    if sent.format is not None and {"format", "quality"} & wanted.keys():
        raise RequestError("format and quality: expected for paths and bytes only; a picture has neither")
    options = _options(wanted) | ({} if sent.format is None else {"format": sent.format})
    # The server looks at the content anyway.
    headers = {"Content-Type": "application/octet-stream", **_key(wanted)}
    return Ask(
        "POST", path, sent.name, {name: str(value) for name, value in options.items()}, headers, sent.body
    )


def _with_format_of(target: Path | None, wanted: Wanted) -> Wanted:
    """The ending of a named file says the format, when nothing else does."""
    if target is None or target.is_dir() or not target.suffix or "format" in wanted:
        return wanted
    return {**wanted, "format": target.suffix.removeprefix(".")}


def _options(wanted: Wanted) -> dict[str, Any]:
    unknown = wanted.keys() - Wanted.__annotations__.keys()
    if unknown:
        raise RequestError(
            f"no option {', '.join(sorted(unknown))}; there are {', '.join(Wanted.__annotations__)}"
        )
    return {name: value for name, value in wanted.items() if name != "idempotency_key" and value is not None}


def _key(wanted: Wanted) -> dict[str, str]:
    return {"Idempotency-Key": wanted.get("idempotency_key") or uuid.uuid4().hex}


def _safe(id_: str) -> str:
    if not id_.isascii() or not id_.isalnum():
        raise RequestError(f"expected the id of a job, letters and digits, found {id_[:40]!r}")
    return id_


def _done(found: Job) -> Job:
    if found.state != "done":
        some = "; ".join(f"{key}: {cause}" for key, cause in list(found.failures.items())[:3])
        raise JobFailed(
            f"job {found.id}: expected it done, found it {found.state} with {found.done} of "
            f"{found.listed} images done and {found.failed} failed. {found.message} {some}".rstrip()
        )
    return found


Told = TypeVar("Told", bound=_Told)


def _read(kind: type[Told], ask: Ask, reply: Reply) -> Told:
    try:
        return kind.model_validate_json(reply.body)
    except ValidationError as error:
        raise ServerError(
            f"{_said(ask)}: expected {kind.__name__} as JSON, found {error.error_count()} faults in "
            f"{len(reply.body)} bytes; is it the address of a kdsr server?"
        ) from None


def _upscaled(image: Value, reply: Reply) -> Upscaled[Value]:
    headers = reply.headers
    try:
        return Upscaled(
            image,
            headers["kdsr-model"],
            float(headers["kdsr-scale"]),
            _size(headers["kdsr-input-size"]),
            _size(headers["kdsr-output-size"]),
            float(headers["kdsr-queue-ms"]) / 1e3,
            float(headers["kdsr-compute-ms"]) / 1e3,
            headers.get("x-request-id", ""),
            headers.get("idempotency-replayed") == "true",
        )
    except (KeyError, ValueError):
        raise ServerError(
            "POST v1/upscale: expected an image with the headers Kdsr-..., found it without; is it the "
            "address of a kdsr server, without a proxy that drops headers?"
        ) from None


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)
