"""What a network is trained for: terms that share one forward pass, each with a weight over the run.

`build_objective` turns the terms of a config into one `Objective`. A new way of distilling is a new file
with a term function and a row in `_build_term`; nothing else changes.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from kdsr.config import DistillTerm, OutputTerm, PixelTerm
from kdsr.errors import RequestError
from kdsr.objectives.output import output_distance
from kdsr.objectives.pixel import pixel_distance
from kdsr.pairs import PairBatch

Losses = dict[str, Tensor]
"""Name of a term to its weighted value, a scalar; their sum is what is minimised."""

Objective = Callable[[PairBatch], Losses]
Term = Callable[[Tensor, PairBatch], Tensor]


def build_objective(
    student: Callable[[Tensor], Tensor], terms: Sequence[DistillTerm], *, teacher: nn.Module | None = None
) -> Objective:
    """One forward pass of `student`, then every term whose weight is not zero at that point of the run.

    `student` may be wrapped for data parallelism. The objective raises RequestError when a term needs a
    teacher and there is neither one nor a stored output.
    """
    built = [
        (name, config, _build_term(config, teacher))
        for name, config in zip(_names(terms), terms, strict=True)
    ]

    def objective(pair: PairBatch) -> Losses:
        sr = student(pair.lr)
        weights = [(name, config.at(pair.progress), term) for name, config, term in built]
        return {name: weight * term(sr, pair) for name, weight, term in weights if weight > 0}

    return objective


def needs_teacher(terms: Sequence[DistillTerm]) -> bool:
    """Whether any term looks at the teacher."""
    return any(isinstance(term, OutputTerm) for term in terms)


def _names(terms: Sequence[DistillTerm]) -> list[str]:
    """`pixel_l1`, `output_l1`, ...; a second term of the same kind and loss becomes `pixel_l1_2`."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for config in terms:
        name = f"{config.kind}_{config.loss}"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


def _build_term(config: DistillTerm, teacher: nn.Module | None) -> Term:
    match config:
        case PixelTerm():
            return pixel_distance(config.loss)
        case OutputTerm():
            return output_distance(config.loss, teacher)
    raise RequestError(f"no objective for {config!r}")
