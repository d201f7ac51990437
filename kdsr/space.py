"""What a search varies: ranges and choices for fields of a run, and seeded draws from them.

Knows dotted names and plain values, not what they mean to a run.
"""

import difflib
import math
from random import Random
from typing import Any, Self

from pydantic import Field, model_validator

from kdsr.spec import Frozen

KINDS = ("uniform", "log_uniform", "integer", "choice")


class Domain(Frozen):
    """Where the values of one field come from: exactly one of uniform, log_uniform, integer and choice."""

    uniform: tuple[float, float] | None = None
    """From the first number to the second, all equally likely."""
    log_uniform: tuple[float, float] | None = None
    """The same for the logarithm: for what counts in factors, such as a learning rate."""
    integer: tuple[int, int] | None = None
    """Whole numbers, both ends included."""
    step: int = Field(default=1, ge=1)
    """Distance of the numbers of `integer`, counted from the first."""
    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    """One of these values, which may be whole sections or lists."""

    @property
    def kind(self) -> str:
        """Which of the four it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    def draw(self, random: Random) -> Any:
        """A value."""
        if self.choice is not None:
            return self.choice[random.randrange(len(self.choice))]
        if self.integer is not None:
            return random.choice(self._steps(self.integer))
        if self.log_uniform is not None:
            low, high = self.log_uniform
            # The exponential of a logarithm may lie just outside.
            return min(max(math.exp(random.uniform(math.log(low), math.log(high))), low), high)
        assert self.uniform is not None
        return random.uniform(*self.uniform)

    def probes(self) -> list[Any]:
        """All choices, or numbers from one end to the other: where none is valid, hardly any value is."""
        if self.choice is not None:
            return list(self.choice)
        if self.integer is not None:
            return list(self._steps(self.integer))[:1000]
        low, high = self.log_uniform or self.uniform or (0.0, 0.0)
        return [low + (high - low) * part / 20 for part in range(21)]

    def _steps(self, bounds: tuple[int, int]) -> range:
        return range(bounds[0], bounds[1] + 1, self.step)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(KINDS)}, found {' and '.join(given) or 'none'}")
        return self

    @model_validator(mode="after")
    def _bounds_run_up(self) -> Self:
        for low, high in filter(None, (self.uniform, self.log_uniform, self.integer)):
            if not (math.isfinite(low) and math.isfinite(high)) or low > high:
                raise ValueError(f"a range must run upwards between finite numbers, found {low}..{high}")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform must begin above 0, found {self.log_uniform[0]}")
        if self.step != 1 and self.integer is None:
            raise ValueError("step belongs to integer; leave it out")
        return self


def draw(space: dict[str, Domain], *, seed: int, number: int, attempt: int = 0) -> dict[str, Any]:
    """Values of trial `number` by field: the same whatever other trials and fields there are."""
    return {
        field: domain.draw(Random(f"{seed}/{number}/{attempt}/{field}"))  # noqa: S311 - no secret
        for field, domain in space.items()
    }


def with_value(fields: Any, path: str, value: Any) -> Any:
    """A copy of `fields`, dicts and lists within each other, with the part at the dotted `path` replaced.

    Raises ValueError with the nearest right name where there is no such part.
    """
    name, _, rest = path.partition(".")
    key = _key(fields, name)
    copy: Any = list(fields) if isinstance(fields, list) else dict(fields)
    copy[key] = with_value(fields[key], rest, value) if rest else value
    return copy


def _key(part: Any, name: str) -> Any:
    if isinstance(part, dict) and name in part:
        return name
    if isinstance(part, list) and name.isdecimal() and int(name) < len(part):
        return int(name)
    if isinstance(part, list):
        raise ValueError(f"{name!r} is no position in a list of {len(part)}; they count from 0")
    known = list(part) if isinstance(part, dict) else []
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or known
    hint = f"did you mean {close[0]}?" if close else "it has none, or is not set"
    raise ValueError(f"no field {name!r} here; {hint}")


def overlapping(fields: list[str]) -> tuple[str, str] | None:
    """Two of the dotted `fields` of which the second is a part of the first."""
    pairs = ((outer, inner) for outer in fields for inner in fields)
    return next((pair for pair in pairs if pair[1].startswith(f"{pair[0]}.")), None)
