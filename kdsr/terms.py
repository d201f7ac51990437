"""What a network is trained for: one frozen config per term. `kdsr.objectives` builds them."""

from collections.abc import Collection, Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kdsr.spec import DiscriminatorSpec, Frozen, UnetDiscriminatorSpec
from kdsr.uris import ModelReference


class Schedule(Frozen):
    """Weight of a term: constant, or linear from `weight` to `final_weight` over part of the run."""

    weight: float = Field(default=1.0, ge=0)
    final_weight: float | None = Field(default=None, ge=0)
    """Weight at the end of the ramp; `weight` when not set."""
    ramp: tuple[float, float] = (0.0, 1.0)
    """Where the ramp begins and ends, as fractions of the run."""

    def at(self, progress: float) -> float:
        """The weight when `progress` (0 to 1) of the run is done."""
        if self.final_weight is None:
            return self.weight
        begin, end = self.ramp
        done = (progress - begin) / (end - begin) if end > begin else float(progress >= begin)
        return self.weight + (self.final_weight - self.weight) * min(max(done, 0.0), 1.0)

    @model_validator(mode="after")
    def _ramp_runs_forward(self) -> Self:
        begin, end = self.ramp
        if not 0 <= begin <= end <= 1:
            raise ValueError(f"ramp must run forward within 0..1, found {begin}..{end}")
        if self.final_weight is None and self.ramp != (0.0, 1.0):
            raise ValueError("a ramp leads to final_weight, which is not set; set it, or leave ramp out")
        return self


class TermConfig(Schedule):
    """A term with its weight over the run."""


class TapPair(Frozen):
    """Where features of the student and of the teacher are read and compared."""

    student: str
    """Submodule of the student; its spec names those that there are."""
    teacher: str
    """Submodule of the teacher."""


class TappedTerm(TermConfig):
    """A term that compares features."""

    taps: tuple[TapPair, ...] = Field(min_length=1)
    """Pairs of places that are compared; the term is their mean."""


PixelLoss = Literal["l1", "charbonnier", "mse", "ssim", "ms_ssim", "fft_l1"]


class PixelTerm(TermConfig):
    """Distance between the network's output and HR."""

    kind: Literal["pixel"] = "pixel"
    loss: PixelLoss = "l1"


class OutputTerm(TermConfig):
    """Distance between the student's and the teacher's output for the same LR."""

    kind: Literal["output"] = "output"
    loss: PixelLoss = "l1"


class FeatureTerm(TappedTerm):
    """Distance of projected student features to the teacher's (FitNets: Romero et al., ICLR 2015)."""

    kind: Literal["features"] = "features"
    loss: Literal["l1", "mse"] = "l1"


class StatisticsTerm(TappedTerm):
    """Distance of what all channels of a pixel have in common (Gao et al., SRKD, ACCV 2018)."""

    kind: Literal["statistics"] = "statistics"
    statistic: Literal["mean_then_square", "square_then_mean", "max", "min"] = "mean_then_square"


class AttentionTerm(TappedTerm):
    """Distance of normalised activation maps (Zagoruyko and Komodakis, ICLR 2017)."""

    kind: Literal["attention"] = "attention"
    power: float = Field(default=2.0, gt=0)


class AffinityTerm(TappedTerm):
    """Distance of the similarities between pixels, or between channels (He et al., FAKD, ICIP 2020)."""

    kind: Literal["affinity"] = "affinity"
    over: Literal["space", "channels"] = "space"
    pool: int = Field(default=16, ge=2)
    """Features are averaged to at most so many pixels a side; similarities grow with its fourth power."""


class VariationalTerm(TappedTerm):
    """Variational bound on the mutual information, by a density around projected student features.

    Sources: Ahn et al., VID, CVPR 2019 (Gaussian); Lee et al., PISR, ECCV 2020 (Laplace).
    """

    kind: Literal["variational"] = "variational"
    density: Literal["gaussian", "laplace"] = "laplace"
    num_hidden: int = Field(default=32, ge=1)
    """Width of the network from student to teacher features."""


class CriticTerm(TappedTerm):
    """Bound that a critic raises by telling pairs of places from strangers; the student helps it.

    Sources: Hjelm et al., Deep InfoMax, ICLR 2019 (Jensen-Shannon); van den Oord et al., 2018 (InfoNCE).
    """

    kind: Literal["critic"] = "critic"
    bound: Literal["jensen_shannon", "info_nce"] = "info_nce"
    """Of the mutual information, or of twice the Jensen-Shannon divergence less log 4; both in nats."""
    num_embedded: int = Field(default=32, ge=2)
    """Width in which features of both are compared."""
    positions: int = Field(default=8, ge=1)
    """Places that are drawn in each image; the features of all others in the batch are the negatives."""
    temperature: float = Field(default=0.1, gt=0)
    """Of either bound: cosines of embedded features, divided by it, are the scores."""


class ContrastiveTerm(TermConfig):
    """Near the teacher's output and far from what an earlier student made of noisy input, in a feature space.

    The space is that of a few random convolutions, which need no download.
    Sources: Wang et al., CSD, IJCAI 2021; DCKD, AAAI 2025, for the negatives.
    """

    kind: Literal["contrastive"] = "contrastive"
    num_negatives: int = Field(default=3, ge=1)
    noise: tuple[float, float] = (1.0, 30.0)
    """Least and greatest standard deviation of the noise on the input, in grey levels of 255."""
    refresh_steps: int = Field(default=500, ge=1)
    """How often the earlier student is replaced by the present one."""
    num_features: int = Field(default=32, ge=1)
    """Width of each of the space's three layers."""

    @model_validator(mode="after")
    def _noise_runs_up(self) -> Self:
        least, most = self.noise
        if not 0 <= least <= most or most == 0:
            raise ValueError(f"noise must run upwards from 0 or more, found {least:g}..{most:g}")
        return self


class UpcyclingTerm(TermConfig):
    """More pairs from the same images: HR as another input (zoom-in), LR as another target (zoom-out).

    The student must give the teacher's answer to a zoomed-in input also when that is turned or inverted.
    Source: Zhang et al., data upcycling knowledge distillation, arXiv 2309.14162; AugKD, ICLR 2025.
    """

    kind: Literal["upcycling"] = "upcycling"
    zoom_in: bool = True
    zoom_out: bool = True
    probability: float = Field(default=0.5, ge=0, le=1)
    """Of each of: inverted, mirrored, flipped, transposed."""

    @model_validator(mode="after")
    def _zooms_somewhere(self) -> Self:
        if not (self.zoom_in or self.zoom_out):
            raise ValueError("neither zoom_in nor zoom_out is true; there is nothing to minimise")
        return self


class AdversarialTerm(TermConfig):
    """Outputs that a discriminator, which learns beside the student, cannot tell from real ones.

    For looks, not for PSNR: keep its weight at 0.001 to 0.01 beside a pixel term.
    Sources: Ledig et al., SRGAN, CVPR 2017; Wang et al., ESRGAN, ECCVW 2018 (relativistic); Mescheder et
    al., ICML 2018 (R1); Miyato et al., ICLR 2018 (spectral normalisation).
    """

    kind: Literal["adversarial"] = "adversarial"
    real: Literal["hr", "teacher"] = "hr"
    """What the discriminator takes for real."""
    discriminator: DiscriminatorSpec = UnetDiscriminatorSpec()
    loss: Literal["non_saturating", "hinge", "relativistic"] = "non_saturating"
    r1: float = Field(default=0.0, ge=0)
    """Weight of the squared gradient of the discriminator at real images; 10 is usual."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise, of 1 for the whole range, on all that is judged; it fades over the run."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Of the discriminator."""


class AttendedTerm(TappedTerm):
    """Distance of projected features, most where the teacher is active, and of the maps of activity.

    Sources: Zagoruyko and Komodakis, ICLR 2017, for the maps; LSFD, arXiv 2111.10988, for errors as weights.
    """

    kind: Literal["attended"] = "attended"
    by: Literal["teacher", "error"] = "teacher"
    """What weighs the places: the teacher's activity, or the distance of the student's output to its own."""
    power: float = Field(default=1.0, gt=0)
    """Of the features, whose root mean square is 1, before the mean over channels; 2 looks at few places."""
    temperature: float = Field(default=1.0, gt=0)
    """Lower looks at fewer places; features and errors have a root mean square of 1."""


class FusionTerm(TappedTerm):
    """Teacher's and student's features fused by a gate, an image made of them, and the student near to it.

    Sources: Feature Fusion Learning, arXiv 1904.09058; MiPKD, ICLR 2025.
    """

    kind: Literal["fusion"] = "fusion"
    teacher_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of images whose fusion may use the teacher's features; the others show what the student's do."""
    num_hidden: int = Field(default=32, ge=1)
    """Width of the head that makes an image of fused features."""


class PerceptualTerm(TermConfig):
    """Distance of the features that a frozen network has for the output and for the target.

    Sources: Johnson et al., ECCV 2016; Ledig et al., SRGAN, CVPR 2017; Wang et al., ESRGAN, ECCVW 2018.
    """

    kind: Literal["perceptual"] = "perceptual"
    network: ModelReference | None = None
    """File of a VGG16 or VGG19, or any model; the teacher itself when not set."""
    taps: tuple[str, ...] = Field(min_length=1)
    """Where its features are read: `conv5_4` or `relu2_2` of a VGG, the taps of any other."""
    tap_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """One for each tap; the mean over taps when not set."""
    loss: Literal["l1", "mse"] = "l1"
    target: Literal["hr", "teacher"] = "hr"

    @model_validator(mode="after")
    def _a_weight_for_each_tap(self) -> Self:
        if self.tap_weights is not None and len(self.tap_weights) != len(self.taps):
            raise ValueError(f"expected {len(self.taps)} tap_weights, found {len(self.tap_weights)}")
        return self


DistillTerm = Annotated[
    PixelTerm
    | OutputTerm
    | FeatureTerm
    | StatisticsTerm
    | AttentionTerm
    | AffinityTerm
    | VariationalTerm
    | CriticTerm
    | ContrastiveTerm
    | UpcyclingTerm
    | AdversarialTerm
    | AttendedTerm
    | FusionTerm
    | PerceptualTerm,
    Field(discriminator="kind"),
]


class FixedBalance(Frozen):
    """Nothing but the weights that were asked for."""

    kind: Literal["fixed"] = "fixed"


class GradientBalance(Frozen):
    """Each term beside the reference terms pulls with a share of their gradient, and only where it agrees.

    Sources: Chen et al., GradNorm, ICML 2018, for the norms; Du et al., 2018, for the cosine gate.
    """

    kind: Literal["gradient"] = "gradient"
    share: float = Field(default=0.3, gt=0)
    """Norm of a term's gradient with weight 1, at most, as a part of that of the reference terms together;
    both of the parameters that the term reaches."""
    reference: tuple[Literal["pixel", "output"], ...] = Field(default=("pixel",), min_length=1)
    """Kinds of terms that keep the weights they have, and that the others are measured by."""
    gate: bool = True
    """Whether a term whose gradient points against that of the reference counts 0 until the next look."""
    every_steps: int = Field(default=20, ge=1)
    """How often gradients are looked at, term by term; each look costs a backward pass a term."""
    memory: float = Field(default=0.7, ge=0, lt=1)
    """How much of each mean norm is kept at a look; the gate is no part of the mean, and acts at once."""


class UncertaintyBalance(Frozen):
    """Each term's factor is learned: loss / b + log b (Kendall et al., CVPR 2018, in the form for L1).

    Terms that are easy to lower get large factors: look at the weights that are logged. Losses that can be
    less than 0 have no best b and are refused: `variational`, `critic` by InfoNCE, `adversarial` by hinge.
    """

    kind: Literal["uncertainty"] = "uncertainty"


Balance = Annotated[FixedBalance | GradientBalance | UncertaintyBalance, Field(discriminator="kind")]


def falls_below_zero(term: TermConfig) -> bool:
    """Whether a term is no distance: a log density, a bound in nats or a bare verdict may be negative."""
    match term:
        case VariationalTerm():
            return True
        case CriticTerm():
            return term.bound == "info_nce"
        case AdversarialTerm():
            return term.loss == "hinge"
        case _:
            return False


def always_reach_output(terms: Sequence[Schedule]) -> bool:
    """Whether at any time some term pulls at what the network makes, and not at its features alone."""
    at_output = [term for term in terms if isinstance(term, FusionTerm) or not isinstance(term, TappedTerm)]
    return all(any(term.at(moment) > 0 for term in at_output) for moment in _moments(terms))


def moment_without(kinds: Collection[str], terms: Sequence[TermConfig]) -> float | None:
    """When, as a part of the run, terms have a weight and none of them is of `kinds`."""
    for moment in _moments(terms):
        found = {term.kind for term in terms if term.at(moment) > 0}  # type: ignore[attr-defined]
        if found and found.isdisjoint(kinds):
            return moment
    return None


def _moments(terms: Sequence[Schedule]) -> list[float]:
    """Between two of these moments weights run straight, so a sum of zero would show at one of them."""
    return sorted({0.0, *(moment for term in terms for moment in term.ramp if moment < 1)})


def _never_weightless(terms: Sequence[Schedule]) -> Sequence[Schedule]:
    for moment in _moments(terms):
        if not any(term.at(moment) > 0 for term in terms):
            raise ValueError(f"no term has a weight at {moment:g} of the run; there is nothing to minimise")
    return terms


def _without_teacher(terms: Sequence[Schedule]) -> Sequence[Schedule]:
    for term in terms:
        if isinstance(term, AdversarialTerm) and term.real != "hr":
            raise ValueError("real is teacher, and there is none; set it to hr")
        if isinstance(term, PerceptualTerm) and term.target != "hr":
            raise ValueError("target is teacher, and there is none; set it to hr")
        if isinstance(term, PerceptualTerm) and term.network is None:
            raise ValueError("the perceptual term looks with the teacher, and there is none; set its network")
    return terms


TeacherTerms = Annotated[
    tuple[Annotated[PixelTerm | AdversarialTerm | PerceptualTerm, Field(discriminator="kind")], ...],
    AfterValidator(_never_weightless),
    AfterValidator(_without_teacher),
]
DistillTerms = Annotated[tuple[DistillTerm, ...], AfterValidator(_never_weightless)]
