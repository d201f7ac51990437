"""What a network is trained for: terms that share one forward pass, each with a weight over the run.

`build_objective` turns the terms of a config into one `Objective`. A new way of distilling is a config in
`kdsr.terms`, a file here with a `Term`, and a row in `TERMS`; nothing else changes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdsr.errors import RequestError
from kdsr.objectives.adversarial import AdversarialDistance
from kdsr.objectives.balance import Balancer, build_balancer
from kdsr.objectives.contrastive import ContrastiveDistance
from kdsr.objectives.features import (
    AffinityDistance,
    AttentionDistance,
    ProjectedDistance,
    StatisticsDistance,
)
from kdsr.objectives.fusion import AttendedDistance, FusionDistance
from kdsr.objectives.mutual_information import CriticBound, VariationalBound
from kdsr.objectives.output import OutputDistance
from kdsr.objectives.perceptual import PerceptualDistance
from kdsr.objectives.pixel import PixelDistance
from kdsr.objectives.step import Parts, Step, Taps, Term, Wrap
from kdsr.objectives.teachers import Ensemble
from kdsr.objectives.upcycling import UpcyclingDistance
from kdsr.pairs import PairBatch
from kdsr.shards import features_column
from kdsr.spec import ShardIndex
from kdsr.terms import (
    AdversarialTerm,
    AffinityTerm,
    AttendedTerm,
    AttentionTerm,
    Balance,
    ContrastiveTerm,
    CriticTerm,
    DistillTerm,
    FeatureTerm,
    FixedBalance,
    FusionTerm,
    OutputTerm,
    PerceptualTerm,
    PixelTerm,
    StatisticsTerm,
    TapPair,
    TappedTerm,
    TermConfig,
    UpcyclingTerm,
    VariationalTerm,
)

__all__ = [
    "TERMS",
    "Ensemble",
    "Losses",
    "Objective",
    "Step",
    "Term",
    "build_objective",
    "label_columns",
    "needs_live_teacher",
    "needs_teacher",
    "stored_ranks",
    "why_live",
]

TERMS: Mapping[type[TermConfig], type[Term]] = {
    PixelTerm: PixelDistance,
    OutputTerm: OutputDistance,
    FeatureTerm: ProjectedDistance,
    StatisticsTerm: StatisticsDistance,
    AttentionTerm: AttentionDistance,
    AffinityTerm: AffinityDistance,
    VariationalTerm: VariationalBound,
    CriticTerm: CriticBound,
    ContrastiveTerm: ContrastiveDistance,
    UpcyclingTerm: UpcyclingDistance,
    AdversarialTerm: AdversarialDistance,
    AttendedTerm: AttendedDistance,
    FusionTerm: FusionDistance,
    PerceptualTerm: PerceptualDistance,
}

FIXED = FixedBalance()
NOTHING: Mapping[str, int] = {}
NO_NETWORKS: Mapping[str, nn.Module] = {}

Losses = dict[str, Tensor]
"""Name of a term to its weighted value, a scalar; their sum is what is minimised."""


@dataclass(frozen=True)
class _Weighted:
    name: str
    config: DistillTerm
    term: Term
    run: Callable[[Step], Tensor]
    """The term, wrapped for data parallelism where it has parameters."""


class Objective(nn.Module):
    """All terms of a run. Its parameters are those of the terms, and its state belongs into a checkpoint."""

    def __init__(
        self,
        terms: Sequence[_Weighted],
        begin: Callable[[PairBatch], Step],
        balancer: Balancer,
        *,
        wrapped: Mapping[nn.Module, Callable[..., Any]],
    ) -> None:
        super().__init__()
        self.balancer = balancer
        self.terms = nn.ModuleDict({weighted.name: weighted.term for weighted in terms})
        self._weighted, self._begin = tuple(terms), begin
        self._wrapped = wrapped
        self._steps: list[Step] = []
        """Since the weights moved."""
        self._weights: dict[str, float] = {}

    def forward(self, pair: PairBatch) -> Losses:
        """One forward pass of the student, then every term whose weight is not zero at that point of the run.

        What is returned has weights and the balancer's factors in it. Called again before `after_step`, it
        has another micro-batch of the same step; the balancer's factors are then those of the first.

        Raises RequestError when a term needs a teacher and there is neither one nor a stored output.
        """
        for earlier in self._steps:
            earlier.settle()
        step = self._begin(pair)
        self._steps.append(step)
        weights = {each.name: each.config.at(pair.progress) for each in self._weighted}
        used = [each for each in self._weighted if weights[each.name] > 0]
        self._weights = {each.name: weights[each.name] for each in used}
        values = {each.name: each.run(step) for each in used}
        balance = self._wrapped.get(self.balancer, self.balancer)
        losses: Losses = balance(values, weights, pair.weight if len(self._steps) == 1 else None)
        return losses

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within it, what is data-parallel adds up gradients of its own and shares none."""
        with ExitStack() as stack:
            for wrapped in self._wrapped.values():
                if isinstance(wrapped, DistributedDataParallel):
                    stack.enter_context(wrapped.no_sync())
            yield

    def after_step(self) -> dict[str, float]:
        """For the moment when the weights have moved; returns what is worth logging beside the losses."""
        assert self._steps, "after_step comes after a forward pass"
        steps, weights = self._steps, self._weights
        self._steps = []
        factors = self.balancer.factors()
        logged = {f"weight/{name}": weight * factors.get(name, 1.0) for name, weight in weights.items()}
        for each in self._weighted:
            if each.name in weights:
                found = each.term.after_step(steps)
                logged.update({f"{each.name}/{name}": value for name, value in found.items()})
        return logged


def build_objective(
    student: nn.Module,
    terms: Sequence[DistillTerm],
    *,
    teacher: nn.Module | None = None,
    balance: Balance = FIXED,
    scale: int = 4,
    channels: int = 3,
    stored: Mapping[str, int] = NOTHING,
    networks: Mapping[str, nn.Module] = NO_NETWORKS,
    wrap: Wrap = lambda module: module,
) -> Objective:
    """The objective of a run. `wrap` makes `student`, and the terms that learn, data-parallel.

    `stored` are the taps of the teacher whose features come with each batch, and how many there are; the
    teacher is then not looked into. `networks` are those that perceptual terms name. Raises RequestError for
    taps that do not exist.
    """
    tapped = _tapped(terms)
    student_taps = teacher_taps = None
    if tapped:
        student_taps = Taps(student, [pair.student for pair in tapped], who="the student")
    if tapped and not stored:
        if teacher is None:
            raise RequestError(
                "features are compared with those of a live teacher; found none, and none are stored"
            )
        looked_at = teacher.first if isinstance(teacher, Ensemble) else teacher
        teacher_taps = Taps(looked_at, [pair.teacher for pair in tapped], who="the teacher")
    parts = Parts(
        student,
        scale=scale,
        channels=channels,
        student_widths=student_taps.widths(channels) if student_taps else {},
        teacher_widths=teacher_taps.widths(channels) if teacher_taps else stored,
        teacher=teacher,
        networks=networks,
    )
    wrapped: dict[nn.Module, Callable[..., Any]] = {student: wrap(student)}
    run = wrapped[student]

    def begin(pair: PairBatch) -> Step:
        return Step(pair, student=run, student_taps=student_taps, teacher=teacher, teacher_taps=teacher_taps)

    weighted = []
    for name, config in zip(_names(terms), terms, strict=True):
        term = TERMS[type(config)](config, parts)
        if _learns(term):
            wrapped[term] = wrap(term)
        weighted.append(_Weighted(name, config, term, wrapped.get(term, term)))
    balancer = build_balancer(balance, student, {each.name: each.config.kind for each in weighted})
    if _learns(balancer):
        wrapped[balancer] = wrap(balancer)
    return Objective(weighted, begin, balancer, wrapped=wrapped)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def needs_teacher(terms: Sequence[DistillTerm]) -> bool:
    """Whether any term looks at the teacher."""
    return any(_looks_at_teacher(term) for term in terms)


def _looks_at_teacher(term: DistillTerm) -> bool:
    match term:
        case PixelTerm():
            return False
        case AdversarialTerm():
            return term.real == "teacher"
        case PerceptualTerm():
            return term.target == "teacher" or term.network is None
        case _:
            return True


def needs_live_teacher(terms: Sequence[DistillTerm], index: ShardIndex) -> bool:
    """Whether any term looks at more of the teacher than the shards of `index` carry."""
    return next(why_live(terms, index), None) is not None


def why_live(terms: Sequence[DistillTerm], index: ShardIndex) -> Iterator[str]:
    """What the terms ask of the teacher and the shards of `index` do not carry."""
    if index.teacher is None:
        if needs_teacher(terms):
            yield "its output"
        return
    labels = index.carried
    known = [stored.tap for stored in labels.taps]
    yield from (f"features of {tap}" for tap in _teacher_taps(terms) if tap not in known)
    upcycling = [term for term in terms if isinstance(term, UpcyclingTerm)]
    if labels.zoom is None and any(term.zoom_in for term in upcycling):
        yield "answers to zoomed-in inputs"
    if any(term.zoom_out for term in upcycling):
        yield "answers to reduced inputs, which are never stored (zoom_out)"
    if any(isinstance(term, PerceptualTerm) and term.network is None for term in terms):
        yield "its view of HR and of the student's output, which is never stored (perceptual)"


def stored_ranks(terms: Sequence[DistillTerm], index: ShardIndex) -> dict[str, int]:
    """How many features are stored of each tap that the terms ask for; none unless all of them are."""
    ranks = {stored.tap: stored.rank for stored in index.carried.taps}
    wanted = _teacher_taps(terms)
    return {tap: ranks[tap] for tap in wanted} if wanted.keys() <= ranks.keys() else {}


def label_columns(terms: Sequence[DistillTerm], index: ShardIndex) -> tuple[str, ...]:
    """Columns of the shards that the terms read beside `image`."""
    if index.teacher is None:
        return ()
    columns = [features_column(tap) for tap in stored_ranks(terms, index)]
    if any(_asks_output(term) for term in terms):
        columns.append("teacher_sr")
    if any(isinstance(term, UpcyclingTerm) and term.zoom_in for term in terms):
        columns.append("zoom")
    return tuple(columns)


def _asks_output(term: DistillTerm) -> bool:
    match term:
        case AttendedTerm():
            return term.by == "error"
        case PerceptualTerm():
            return term.target == "teacher"
        case TappedTerm() | UpcyclingTerm():
            return False
        case _:
            return _looks_at_teacher(term)


def _tapped(terms: Sequence[DistillTerm]) -> list[TapPair]:
    return [pair for term in terms if isinstance(term, TappedTerm) for pair in term.taps]


def _teacher_taps(terms: Sequence[DistillTerm]) -> dict[str, None]:
    """Names without repetition, in the order of the terms."""
    return dict.fromkeys(pair.teacher for pair in _tapped(terms))


def _names(terms: Sequence[DistillTerm]) -> Iterator[str]:
    """`pixel_l1`, `output_l1`, `attention`, ...; a second term of the same name becomes `pixel_l1_2`."""
    seen: Counter[str] = Counter()
    for config in terms:
        name = f"{config.kind}_{config.loss}" if hasattr(config, "loss") else config.kind
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}"
