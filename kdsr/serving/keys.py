"""Who may ask, and for how much: API keys that are known by their hash only, and quotas of pixels."""

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from kdsr.config import KeyConfig, Name, ServeConfig
from kdsr.errors import RequestError
from kdsr.serving.problems import Problem

MINUTE = 60.0
ANYBODY = "anybody"
"""Name of the caller where no key is asked for."""

KEY_TABLE: TypeAdapter[dict[Name, KeyConfig]] = TypeAdapter(dict[Name, KeyConfig])


def new_key(name: str) -> tuple[str, str]:
    """A key that nobody has yet, and the lines of YAML that let it in."""
    key = f"kdsr_{secrets.token_urlsafe(32)}"
    return key, f"keys:\n  {name}: {{sha256: {_digest(key)}}}"


def read_keys(config: ServeConfig) -> dict[str, KeyConfig]:
    """All keys of the configuration and its file. Raises RequestError when there are none but should be."""
    if config.auth == "none":
        return {}
    keys = dict(config.keys)
    if config.keys_file is not None:
        keys |= _read_file(config.keys_file)
    if not keys:
        raise RequestError(
            "there are no API keys, so nobody could come in; make one with --new_key NAME and put it into "
            "keys or keys_file, or let everybody in with --auth none"
        )
    return keys


def _read_file(path: Path) -> dict[str, KeyConfig]:
    try:
        return KEY_TABLE.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise RequestError(f"keys_file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError):
        raise RequestError(
            f"keys_file {path}: expected lines like NAME: {{sha256: 64 HEX DIGITS}}, as --new_key prints them"
        ) from None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class Caller:
    """Whoever holds a key."""

    name: str
    pixels_per_minute: int | None = None


class Keys:
    """The keys that are let in; everybody when there are none."""

    def __init__(self, keys: Mapping[str, KeyConfig]) -> None:
        self._keys = dict(keys)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Whose key `Authorization: Bearer KEY` or `X-API-Key: KEY` has. Raises Problem 401.

        Every key is compared, each in constant time, so that the time tells nothing.
        """
        if not self._keys:
            return Caller(ANYBODY)
        given = _digest(_given(headers))
        found = None
        for name, key in self._keys.items():
            if hmac.compare_digest(given, key.sha256):
                found = Caller(name, key.pixels_per_minute)
        if found is None:
            raise Problem(
                "unauthorized",
                "expected Authorization: Bearer KEY or X-API-Key: KEY with a key that is known",
            )
        return found


def _given(headers: Mapping[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


class Quotas:
    """Pixels that each caller may still ask for: a bucket that fills up within a minute.

    `share` is the part of each quota that is counted here, when it is counted in several places.
    """

    def __init__(self, *, share: float = 1.0, now: Callable[[], float] = time.monotonic) -> None:
        self._share, self._now = share, now
        self._left: dict[str, tuple[float, float]] = {}

    def spend(self, caller: Caller, pixels: int) -> None:
        """Count `pixels`. Raises Problem 429 when they are not left; a full bucket always lets one in."""
        if caller.pixels_per_minute is None:
            return
        limit = caller.pixels_per_minute * self._share
        now = self._now()
        left, since = self._left.get(caller.name, (limit, now))
        left = min(limit, left + (now - since) / MINUTE * limit)
        if left < min(pixels, limit) - 1e-6:
            wait = (min(pixels, limit) - left) / limit * MINUTE
            raise Problem(
                "quota",
                f"{caller.pixels_per_minute} output pixels a minute are allowed and {math.floor(left)} are "
                f"left now; {pixels} were asked for",
                retry_after=wait,
            )
        self._left[caller.name] = (left - pixels, now)

    @contextmanager
    def spent(self, caller: Caller, pixels: int) -> Iterator[None]:
        """Count `pixels`, unless the block fails. Raises Problem 429 when they are not left."""
        self.spend(caller, pixels)
        try:
            yield
        except BaseException:
            self.give_back(caller, pixels)
            raise

    def give_back(self, caller: Caller, pixels: int) -> None:
        """Uncount `pixels` of a request that was refused after all."""
        if caller.name in self._left:
            left, since = self._left[caller.name]
            self._left[caller.name] = (left + pixels, since)
