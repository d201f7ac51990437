"""What goes wrong over HTTP, as RFC 9457 has it: a status, a kind for programs, a sentence for people."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kdsr.errors import Abandoned, DataError, ImageTooLarge, KdsrError, RequestError, StoreError

MEDIA_TYPE = "application/problem+json"

KINDS: dict[str, tuple[int, str]] = {
    "bad-request": (400, "The request cannot be read"),
    "unauthorized": (401, "No valid API key"),
    "forbidden": (403, "Not allowed"),
    "not-found": (404, "There is no such thing here"),
    "method-not-allowed": (405, "This method is not known here"),
    "not-acceptable": (406, "No acceptable type of result"),
    "slow-body": (408, "The body did not arrive in time"),
    "conflict": (409, "The request contradicts what is there"),
    "same-result": (412, "The result is the one that you have"),
    "body-too-large": (413, "Too many bytes"),
    "image-too-large": (413, "Too many pixels"),
    "unsupported-media-type": (415, "Not an image that is read"),
    "invalid-option": (422, "An option is wrong"),
    "invalid-image": (422, "The image cannot be read"),
    "reused-key": (422, "The Idempotency-Key belongs to another request"),
    "busy": (429, "Too much is waiting already"),
    "quota": (429, "The quota of this key is used up"),
    "internal": (500, "Something went wrong here"),
    "loading": (503, "The models are not ready yet"),
    "worker-lost": (503, "The worker was lost"),
    "store-unavailable": (503, "The store does not answer"),
    "deadline": (504, "The result was not there in time"),
}
"""Status and title of each kind of problem."""


@dataclass
class Problem(Exception):
    """An answer that is not the one that was asked for."""

    kind: str
    detail: str
    retry_after: float | None = None
    """Seconds after which the same request may succeed."""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return KINDS[self.kind][0]

    def body(self, *, request_id: str) -> dict[str, Any]:
        """The members of the JSON object."""
        status, title = KINDS[self.kind]
        return {
            "type": f"urn:kdsr:problem:{self.kind}",
            "title": title,
            "status": status,
            "detail": self.detail,
            "instance": f"urn:kdsr:request:{request_id}",
        }

    def all_headers(self) -> dict[str, str]:
        """Its own, and Retry-After in whole seconds."""
        headers = dict(self.headers)
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="kdsr"'
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return headers


def problem_of(error: Exception) -> Problem:
    """What `error`, from the library, is to a caller. What we did wrong says nothing of how we are made."""
    if isinstance(error, Problem):
        return error
    for kind, name in _KIND_OF.items():
        if isinstance(error, kind):
            return Problem(name, str(error))
    for kind, problem in _NOT_THEIR_FAULT.items():
        if isinstance(error, kind):
            return replace(problem)
    return Problem("internal", "an error on our side; it is in the log under this request's id")


_KIND_OF: dict[type[Exception], str] = {
    ImageTooLarge: "image-too-large",
    RequestError: "invalid-option",
    DataError: "invalid-image",
    Abandoned: "deadline",
}
_NOT_THEIR_FAULT: dict[type[Exception], Problem] = {
    StoreError: Problem("store-unavailable", "a store that is needed does not answer", retry_after=5),
    MemoryError: Problem("busy", "there is no memory for it now; try again later", retry_after=5),
}


def is_expected(error: Exception) -> bool:
    """Whether it is not a fault of ours."""
    return isinstance(error, Problem | KdsrError | MemoryError)


_PLACE = re.compile(
    r"(?:file|s3|https?)://[^\s'\",;]*[^\s'\",;:.)]|(?<![\w./:-])/(?!v1/)(?:[^\s/'\",;:]+/)+[^\s'\",;:]*"
)


def without_places(text: str, *known: str, keep: Iterable[str] = ()) -> str:
    """`text` for somebody who is not to know where things lie here; the log is to have it whole.

    Uris and paths become `...`: those that are `known`, and whatever looks like one, but for `keep` and what
    is below it.
    """
    for place in known:
        text = text.replace(place, "...") if "/" in place else text
    kept = [place.rstrip("/") for place in keep]
    return _PLACE.sub(
        lambda found: found[0] if any(f"{found[0]}/".startswith(f"{place}/") for place in kept) else "...",
        text,
    )
