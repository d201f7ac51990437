"""What a run was asked: one frozen pydantic model per job. Loads neither torch nor ray.

A config answers by itself whatever can be refused without reading data. Uris are made absolute here,
because workers run in other folders.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kdsr.space import Domain, draw, overlapping, with_value
from kdsr.spec import Frozen, Goal, TrainableSpec, ZoomConfig
from kdsr.terms import (
    Balance,
    CriticTerm,
    DistillTerms,
    FixedBalance,
    GradientBalance,
    OutputTerm,
    PerceptualTerm,
    PixelTerm,
    TeacherTerms,
)
from kdsr.uris import EndpointUrl, ModelReference, Uri


@dataclass(frozen=True)
class Flags:
    """Other names of a field on a command line, for people who know them from other programs."""

    names: tuple[str, ...]


class StoreConfig(Frozen):
    """How stores are reached. Credentials come from AWS's standard chain and are never kept here."""

    endpoint_url: EndpointUrl | None = None
    """Server of an S3-compatible store; AWS_ENDPOINT_URL when not set, AWS itself when neither is."""
    region: str | None = None
    """Region of the bucket; from AWS's standard chain when not set."""
    max_attempts: int = Field(default=5, ge=1)
    """Tries of one request before it fails."""
    connect_timeout_seconds: float = Field(default=5.0, gt=0)
    read_timeout_seconds: float = Field(default=60.0, gt=0)


def _runs_up(bounds: Any) -> Any:
    if isinstance(bounds, tuple) and bounds[0] > bounds[1]:
        raise ValueError(f"a range must run upwards, found {bounds[0]}..{bounds[1]}; swap the two")
    return bounds


Count = Annotated[int, Field(ge=1)]
NumWorkers = Annotated[Count | tuple[Count, Count], AfterValidator(_runs_up)]


class ClusterConfig(Frozen):
    """Which machines do the work."""

    address: str | None = None
    """Ray cluster to join; RAY_ADDRESS when not set, a private local cluster when neither is."""
    num_workers: NumWorkers = 1
    """Training workers, or upscaling actors. `[1, 4]` lets training take what there is; others take 4."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPU share of one worker; when not set, an equal part of the nodes, so that reading keeps some."""
    use_gpu: bool = False
    """One GPU for each worker."""
    max_failures: int = Field(default=2, ge=0)
    """Restarts after lost workers; a training counts those without a new checkpoint in between. Errors of the
    run itself are never tried again."""

    @property
    def least_workers(self) -> int:
        """With fewer training does not begin."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """As many as there ever are."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


# ---------------------------------------------------------------- shards


class ShardConfig(Frozen):
    """Cut photographs into lossless sub-images and store them as Parquet shards.

    `--check SHARDS` instead tells what is in them, and what is wrong with it; see `--check SHARDS --help`.
    """

    input: Uri
    """Folder or prefix with the photographs."""
    output: Uri
    """Folder or prefix of the shards; a rerun does what is missing."""
    domain: str = "photo"
    """Tag on every row: photo, anime, text, ..."""
    licence: str = "unknown"
    """Terms of the photographs, kept with every row."""
    sub_image_size: int = Field(default=480, ge=64)
    """Aimed height and width of a sub-image in pixels; real ones lie between 2/3 and 3/2 of it."""
    min_size: int = Field(default=96, ge=16)
    """Photographs with a shorter side than this many pixels are rejected."""
    max_pixels: int = Field(default=500_000_000, ge=1)
    """Photographs with more pixels are rejected before they are decoded."""
    heldout_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of photographs never trained on, chosen by a hash of the key."""
    shard_bytes: int = Field(default=128 * 2**20, ge=2**20)
    """Aimed size of one shard."""
    row_group_bytes: int = Field(default=16 * 2**20, ge=2**16)
    """Aimed size of one row group, the unit that training reads."""
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()


class CheckConfig(Frozen):
    """Tell what is in a set of shards, and what is wrong with it, before anybody trains on it."""

    check: Uri
    """Folder or prefix of the shards."""
    output: Uri | None = None
    """Folder or prefix of report.json, findings.jsonl and sheet.png; `check/` in the shards when not set."""
    patch_size: int = Field(default=48, ge=8)
    """Height and width of the LR patch that a training would cut, its data.patch_size."""
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def target(self) -> str:
        """Where the report goes."""
        return self.output or f"{self.check.rstrip('/')}/check"


# ---------------------------------------------------------------- degradation


BlurSigma = Annotated[float, Field(gt=0, le=32)]
ResizeFactor = Annotated[float, Field(ge=0.1, le=4)]
NoiseSigma = Annotated[float, Field(ge=0, le=255)]
JpegQuality = Annotated[int, Field(ge=1, le=100)]


class BicubicDegradation(Frozen):
    """Antialiased bicubic, equal to MATLAB's imresize. The field's standard."""

    kind: Literal["bicubic"] = "bicubic"


class BlurStep(Frozen):
    """Gaussian blur, isotropic or not, of a random width and direction."""

    kind: Literal["blur"] = "blur"
    sigma: Annotated[tuple[BlurSigma, BlurSigma], AfterValidator(_runs_up)] = (0.2, 2.0)
    """Standard deviation along the longer axis, in pixels of the image at this point of the chain."""
    anisotropy: float = Field(default=2.0, ge=1)
    """Largest ratio of the two axes."""


class ResizeStep(Frozen):
    """Resize by a random factor with a random kernel (box, linear, cubic); the last step brings LR's size."""

    kind: Literal["resize"] = "resize"
    factor: Annotated[tuple[ResizeFactor, ResizeFactor], AfterValidator(_runs_up)] = (0.5, 1.2)


class NoiseStep(Frozen):
    """Gaussian noise of a random strength, colour or grey."""

    kind: Literal["noise"] = "noise"
    sigma: Annotated[tuple[NoiseSigma, NoiseSigma], AfterValidator(_runs_up)] = (0.0, 10.0)
    """Standard deviation in grey levels of 255."""
    grey_probability: float = Field(default=0.4, ge=0, le=1)
    """Share of samples whose channels get the same noise."""


class JpegStep(Frozen):
    """JPEG compression with a random quality."""

    kind: Literal["jpeg"] = "jpeg"
    quality: Annotated[tuple[JpegQuality, JpegQuality], AfterValidator(_runs_up)] = (40, 95)
    """As libjpeg counts it, both ends included."""
    subsampling_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of samples whose colour is stored at half the size (4:2:0)."""


SameSizeStep = Annotated[BlurStep | NoiseStep | JpegStep, Field(discriminator="kind")]
DegradationStep = Annotated[BlurStep | ResizeStep | NoiseStep | JpegStep, Field(discriminator="kind")]


class RealWorldDegradation(Frozen):
    """Seeded steps, antialiased bicubic to the LR size, more steps. For photographs from the wild."""

    kind: Literal["real_world"] = "real_world"
    steps: tuple[DegradationStep, ...] = (BlurStep(), ResizeStep(), NoiseStep(), JpegStep())
    """On the HR image, in this order."""
    lr_steps: tuple[SameSizeStep, ...] = (NoiseStep(sigma=(0.0, 5.0)), JpegStep())
    """On the LR image, in this order; without them reduction averages noise and JPEG blocks away."""


Degradation = Annotated[BicubicDegradation | RealWorldDegradation, Field(discriminator="kind")]


# ---------------------------------------------------------------- training


class DataConfig(Frozen):
    """Where training patches come from."""

    shards: Uri
    """Shards made by jobs/shard.py, or labelled by jobs/label.py."""
    patch_size: int = Field(default=48, ge=8)
    """Height and width of an LR patch."""
    patches_per_row: int = Field(default=8, ge=1)
    """Patches cut from one decoded sub-image in an epoch."""
    window_rows: int = Field(default=256, ge=1)
    """Sub-images, over all workers, that patches come from at a time; bounds the memory of reading."""
    reader: Literal["lanes", "ray_data"] = "lanes"
    """Who decodes: each training worker in its own threads, or Ray Data in tasks all over the cluster.

    With `ray_data` a run that goes on begins the epoch again that it was in, which batch a patch comes in
    differs from start to start, and a batch is mixed from few row groups.
    """
    num_threads: int = Field(default=1, ge=1)
    """Threads that decode, with `lanes`."""
    augment: bool = True
    """Flips and quarter turns."""
    degradation: Degradation = BicubicDegradation()


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Frozen):
    """Adam, AdamW or Muon, linear warm-up, cosine decay, EMA of the weights."""

    kind: Literal["adam", "adamw", "muon"] = "adam"
    """`muon` moves every direction of a kernel equally far, and all that is no kernel as adamw does."""
    learning_rate: float = Field(default=1e-3, gt=0)
    final_learning_rate: float = Field(default=1e-6, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """How much of the means of the gradient, and of its square, is kept each step."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Pull of kernels and matrices to zero: as part of the gradient with adam, apart from it with the others.

    Biases and gains do not decay, nor what is trained beside the network.
    """
    momentum: Beta = 0.95
    """How much of the mean of a kernel's gradient muon keeps each step."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; not clipped when not set."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """The EMA is what is validated and saved; 0 turns it off."""


class TrackingConfig(Frozen):
    """Where metrics go beside `metrics.jsonl` and TensorBoard."""

    mlflow_uri: EndpointUrl | None = None
    """MLflow server, https://HOST; none when not set. Credentials come from MLFLOW_TRACKING_*."""
    experiment: str = Field(default="kdsr", min_length=1)
    """Experiment that the run belongs to; made where there is none."""


class BudgetConfig(Frozen):
    """What a training may use and how it is looked after: the same for all runs that are compared."""

    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of channels dropped before the last convolution in training; against over-fitting."""
    num_steps: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=16, ge=1)
    """Patches in one step, over all workers of a run together."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Patches, at most, that a worker passes through the network at once; all of its own when not set."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the forward pass; auto takes bfloat16 where the device computes it natively."""
    log_every_steps: int = Field(default=50, ge=1)
    save_every_steps: int = Field(default=500, ge=1)
    validate_every_steps: int = Field(default=1000, ge=1)
    num_validation_images: int = Field(default=16, ge=0)
    """Held-out sub-images that pick the best checkpoint, and trained ones beside them; 0 turns both off."""
    licence: str = "unknown"
    """Terms of the trained weights, for the model card."""
    datasets: tuple[str, ...] = ()
    """Names and terms of the training sets, for the model card."""
    tracking: TrackingConfig = TrackingConfig()
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()


class MemoryConfig(Frozen):
    """What is given for room on a device. Steps stay what they are, but for rounding where workers share."""

    shard_teacher: bool = False
    """Each worker keeps a part of the teacher, and where it is trained of its mean and its gradients too.

    Blocks are put together over the network while they run. One worker alone keeps all of it.
    """
    recompute_blocks: bool = False
    """Keep only what goes into each block of the trained network, and run it again in the backward pass."""


class TrainingConfig(BudgetConfig):
    """What every training run has in common."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; the same name in the same output goes on where it stopped."""
    output: Uri
    """Folder or prefix that holds runs."""
    init_from: ModelReference | None = None
    """Model of the same kind, of any scale, whose weights the network starts from."""
    inherit: Literal["exact", "slice"] = "exact"
    """What it takes: layers that agree in name and shape, or the most telling channels of a larger model."""
    balance: Balance = FixedBalance()
    """What keeps several terms in balance."""
    memory: MemoryConfig = MemoryConfig()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _every_worker_has_patches(self) -> Self:
        if self.batch_size < self.cluster.most_workers:
            raise ValueError(
                f"batch_size {self.batch_size} is less than cluster.num_workers "
                f"{self.cluster.most_workers}, and each needs a patch; raise it, or ask for fewer workers"
            )
        return self

    @model_validator(mode="after")
    def _workers_keep_in_step(self) -> Self:
        """Those that keep parts of one network need each other in every pass."""
        if not self.memory.shard_teacher or self.micro_batch is None:
            return self
        for workers in range(self.cluster.least_workers, self.cluster.most_workers + 1):
            passes = {-(-own // self.micro_batch) for own in self._patches_of_workers(workers)}
            if len(passes) > 1:
                raise ValueError(
                    f"with memory.shard_teacher all workers pass equally many micro-batches, and of "
                    f"batch_size {self.batch_size} on {workers} workers in parts of {self.micro_batch} they "
                    f"have {min(passes)} or {max(passes)}; choose a batch_size that is a multiple of the "
                    f"number of workers, or another micro_batch"
                )
        return self

    def _patches_of_workers(self, workers: int) -> tuple[int, int]:
        """Fewest and most of one worker in a step."""
        return self.batch_size // workers, -(-self.batch_size // workers)

    @property
    def fewest_patches(self) -> int:
        """Patches of the smallest batch that passes through the network at once."""
        own = self.batch_size // self.cluster.most_workers
        parts = -(-own // (self.micro_batch or own))
        return own // parts


class TeacherTrainingConfig(TrainingConfig):
    """Train a network on HR alone: a teacher, or a student for comparison."""

    model: TrainableSpec
    terms: TeacherTerms = (PixelTerm(),)

    @model_validator(mode="after")
    def _whole_gradients_where_they_are_needed(self) -> Self:
        if self.memory.shard_teacher and isinstance(self.balance, GradientBalance):
            raise ValueError(
                "balance gradient looks at the gradient of all parameters at once, and with "
                "memory.shard_teacher no worker has it; set balance.kind to fixed or uncertainty"
            )
        if self.memory.shard_teacher and self.optimizer.kind == "muon":
            raise ValueError(
                "optimizer muon takes the gradient of a kernel as one matrix, and with "
                "memory.shard_teacher no worker has all of it; set optimizer.kind to adam or adamw"
            )
        return self


class TeacherConfig(Frozen):
    """The network to distil from."""

    uri: Annotated[ModelReference, Flags(("--teacher",))]
    """Bundled name, model directory, or a public checkpoint file (.pt, .pth, .safetensors)."""
    licence: str | None = None
    """Terms of the teacher's weights, where it has no card that names them; kept in the student's card."""
    trained_for: Goal | None = None
    """What it was trained for, where it has no card that says so; needed beside other teachers."""
    force: bool = False
    """Learn from it although it is no better than bicubic on the test photograph."""


class MixConfig(Frozen):
    """How the answers of several teachers become one, pixel by pixel.

    Where HR is there, a teacher counts by how near it is to HR; elsewhere by how near it is to the others.
    """

    temperature: float = Field(default=0.01, gt=0)
    """Error, of 1 for the whole range, that lowers a teacher's weight by the factor e."""
    force: bool = False
    """Mix teachers of different goals all the same."""


class DistillConfig(TrainingConfig):
    """Distil a teacher, or several, into a student."""

    student: TrainableSpec
    teacher: TeacherConfig
    co_teachers: tuple[TeacherConfig, ...] = ()
    """More teachers of the same scale; features are those of `teacher`."""
    mix: MixConfig = MixConfig()
    share_extractor: bool = False
    """Give the student the extractor of `teacher`, or a slice of it, for good; both are of one kind."""
    terms: DistillTerms = (PixelTerm(), OutputTerm())

    @property
    def teachers(self) -> tuple[TeacherConfig, ...]:
        """All of them, the first one first."""
        return (self.teacher, *self.co_teachers)

    @property
    def model(self) -> TrainableSpec:
        """The network that is trained."""
        return self.student

    @model_validator(mode="after")
    def _no_gradient_passes_parts(self) -> Self:
        for term in self.terms if self.memory.shard_teacher else ():
            if isinstance(term, PerceptualTerm) and term.network is None:
                raise ValueError(
                    "the perceptual term sends gradients back through the teacher, which "
                    "memory.shard_teacher puts together for its forward pass only; name a network for it, or "
                    "set memory.shard_teacher to false"
                )
        return self

    @model_validator(mode="after")
    def _critics_see_strangers(self) -> Self:
        for term in self.terms:
            if isinstance(term, CriticTerm) and self.fewest_patches * term.positions < 2:
                raise ValueError(
                    f"a critic tells features of one place from those of others, and 1 position in 1 patch "
                    f"at a time leaves no other; raise its positions, batch_size {self.batch_size} or "
                    f"micro_batch"
                )
        return self


class StoredFeatures(Frozen):
    """Features that are stored beside the teacher's output."""

    tap: str
    """Submodule of the teacher whose output (B, F, h, w) lies on LR's grid or an integer fraction of it."""
    rank: int = Field(default=16, ge=1)
    """Principal directions that are kept; all channels, as they are, when there are no more."""


class LabelConfig(Frozen):
    """Run a teacher over shards once and store what it says of every sub-image."""

    shards: Uri
    teacher: TeacherConfig
    output: Uri
    """Folder or prefix of the labelled shards; a rerun does what is missing."""
    features: tuple[StoredFeatures, ...] = ()
    """Features that are stored too, for terms with taps. Sub-images then go through the teacher whole."""
    zoom: ZoomConfig | None = None
    """Store answers to zoomed-in inputs too, for upcycling."""
    precision: Literal["float32", "bfloat16"] = "float32"
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _shards_are_kept(self) -> Self:
        if self.shards.rstrip("/") == self.output.rstrip("/"):
            raise ValueError(f"output {self.output} holds the shards themselves; choose another place")
        return self

    @model_validator(mode="after")
    def _taps_differ(self) -> Self:
        taps = [stored.tap for stored in self.features]
        if len(set(taps)) < len(taps):
            raise ValueError(f"features must name each tap once, found {', '.join(taps)}")
        return self


# ---------------------------------------------------------------- evaluation


class EvaluateConfig(Frozen):
    """Measure models on benchmark folders with the field's protocol."""

    model: tuple[ModelReference, ...] = Field(min_length=1)
    """Bundled name, model directory or checkpoint file; may be given several times."""
    benchmark: tuple[Uri, ...] = Field(min_length=1)
    """Folder with HR/ and, optionally, LR/ of the same names; may be given several times."""
    output: Uri
    """Folder or prefix for results.json, per-image CSV, table and comparison picture."""
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    """Of the bootstrap."""
    store: StoreConfig = StoreConfig()


# ---------------------------------------------------------------- comparison of methods


Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]
"""Of a student or a method: no hyphen, so that the name of a cell can be taken apart."""


class MethodConfig(Frozen):
    """One way of training: what it has that the others have not. All else is that of the comparison."""

    terms: DistillTerms = (PixelTerm(),)
    balance: Balance = FixedBalance()
    init_from: ModelReference | dict[Label, ModelReference] | None = None
    """Weights to start from: one model for all students, or one for each by the student's name."""
    inherit: Literal["exact", "slice"] = "exact"
    share_extractor: bool = False
    teacher: TeacherConfig | None = None
    """Another one than that of the comparison."""
    co_teachers: tuple[TeacherConfig, ...] | None = None
    mix: MixConfig | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    data: dict[str, Any] = Field(default={})
    """Fields of `data` that differ."""
    optimizer: dict[str, Any] = Field(default={})
    """Fields of `optimizer` that differ."""

    def first_weights(self, student: str) -> str | None:
        """What `student` starts from. Raises ValueError when others are named and it is not."""
        if not isinstance(self.init_from, dict):
            return self.init_from
        if student not in self.init_from:
            raise ValueError(f"init_from names {', '.join(self.init_from)}, and not {student}; add it")
        return self.init_from[student]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    student: str
    method: str
    seed: int
    config: DistillConfig

    @property
    def name(self) -> str:
        """That of the run."""
        return self.config.name


class CompareConfig(BudgetConfig):
    """Train students by several methods with several seeds under one budget, and compare what they reach."""

    output: Uri
    """Folder or prefix of the runs, the table and the pictures; a rerun does what is missing."""
    benchmark: tuple[Uri, ...] = Field(min_length=1)
    """Folder with HR/ and, optionally, LR/ of the same names; may be given several times."""
    students: dict[Label, TrainableSpec] = Field(min_length=1)
    """Networks by name."""
    methods: dict[Label, MethodConfig] = Field(min_length=1)
    """Ways of training by name; each says only what differs."""
    reference: str = "alone"
    """The method that gains are counted from."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    """Of first weights and of the order of the data; all of the first come before any of the second."""
    teacher: TeacherConfig
    co_teachers: tuple[TeacherConfig, ...] = ()
    mix: MixConfig = MixConfig()
    only_student: tuple[str, ...] = ()
    """Train only these now; what others have reached is shown all the same."""
    only_method: tuple[str, ...] = ()
    only_seed: tuple[int, ...] = ()
    measure_cost: bool = True
    """Measure time and memory of each method after the training, with nothing beside it."""
    cost_steps: int = Field(default=50, ge=2)
    """Steps that are measured; they run through all that weights do over a whole run."""
    retry_failed: bool = False
    """Also the cells that failed in earlier starts."""
    render_only: bool = False
    """Train nothing: table and pictures of what there is."""

    def cell(self, student: str, method: str, seed: int) -> Cell:
        """One run with everything it is asked. Raises ValueError, naming it, for one that cannot be."""
        name = f"{student}-{method}-{seed}"
        try:
            return Cell(
                student, method, seed, DistillConfig(**self._fields(student, method), name=name, seed=seed)
            )
        except ValidationError as error:
            raise ValueError(f"{name}: {_sentences(error)}") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def cells(self) -> tuple[Cell, ...]:
        """All runs, one seed after the other, so that what is there first is comparable already."""
        return tuple(
            self.cell(student, method, seed)
            for seed in self.seeds
            for student in self.students
            for method in self.methods
        )

    def is_selected(self, cell: Cell) -> bool:
        """Whether this start is to train it."""
        chosen = (
            (cell.student, self.only_student),
            (cell.method, self.only_method),
            (cell.seed, self.only_seed),
        )
        return all(not only or value in only for value, only in chosen)

    def _fields(self, student: str, method: str) -> dict[str, Any]:
        """Fields of a run, whatever its seed."""
        own = self.methods[method]
        fields = {name: getattr(self, name) for name in BudgetConfig.model_fields}
        fields |= {name: getattr(own, name) for name in ("terms", "balance", "inherit", "share_extractor")}
        for name in ("teacher", "co_teachers", "mix", "dropout"):
            given = getattr(own, name)
            fields[name] = getattr(self, name) if given is None else given
        return fields | {
            "output": f"{self.output}/runs",
            "student": self.students[student],
            "init_from": own.first_weights(student),
            "data": self.data.model_dump() | own.data,
            "optimizer": self.optimizer.model_dump() | own.optimizer,
            # A run has one worker; `num_workers` of them go side by side.
            "cluster": self.cluster.model_copy(update={"num_workers": 1}),
        }

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        named: list[tuple[str, Iterable[Any], Iterable[Any]]] = [
            ("reference", [self.reference], self.methods),
            ("only_method", self.only_method, self.methods),
            ("only_student", self.only_student, self.students),
            ("only_seed", self.only_seed, self.seeds),
        ]
        for method, own in self.methods.items():
            if isinstance(own.init_from, dict):
                named.append((f"methods.{method}.init_from", own.init_from, self.students))
        for field, names, known in named:
            for name in names:
                if name not in known:
                    raise ValueError(f"{field} {name} is not one of {', '.join(map(str, known))}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {', '.join(map(str, self.seeds))}: one is given twice; leave it out")
        return self

    @model_validator(mode="after")
    def _every_cell_is_a_run(self) -> Self:
        self.cells()
        return self


def _sentences(error: ValidationError) -> str:
    """What is wrong with a run that a person has not written down as a whole."""
    return "; ".join(
        ": ".join(filter(None, [".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")]))
        for each in error.errors(include_url=False)
    )


# ---------------------------------------------------------------- search for fields


FIXED_FIELDS = (
    *("name", "output", "store", "cluster", "tracking", "num_steps", "num_validation_images"),
    *("data.shards", "data.degradation", "student.scale", "model.scale"),
)
"""What a search does not vary: trials have one budget, and PSNR is compared on the same images."""
MAX_DRAWS = 100
"""Draws for one trial until one is a run that can be."""


@dataclass(frozen=True)
class Trial:
    """One run of a search."""

    number: int
    values: dict[str, Any]
    """What was drawn, by field."""
    config: TeacherTrainingConfig | DistillConfig

    @property
    def name(self) -> str:
        """That of the run."""
        return self.config.name


def _yaml_fields(value: object) -> object:
    """The content of a YAML file that a person names instead of fields."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{value}: {error.strerror}; expected a YAML file, or fields") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{value} is not valid YAML: {' '.join(str(error).split())}") from None


class TuneConfig(Frozen):
    """Search for the fields of a run that reach the best held-out PSNR; weak trials are stopped early."""

    base: Annotated[dict[str, Any], BeforeValidator(_yaml_fields)]
    """Fields of a run for jobs/distill.py or jobs/train_teacher.py, or its YAML file; no name is needed."""
    changes: dict[str, Any] = Field(default={})
    """Dotted fields of `base` that differ in all trials."""
    space: dict[str, Domain] = Field(min_length=1)
    """Dotted fields of `base`, such as terms.0.weight, and where their values come from."""
    output: Uri
    """Folder or prefix of the trials, the table and the plots; a rerun does what is missing."""
    num_trials: int = Field(default=16, ge=1)
    """May be raised later: the first trials stay what they are."""
    grace_steps: int = Field(default=500, ge=1)
    """Steps before a trial may be stopped."""
    reduction: float = Field(default=3.0, gt=1)
    """At grace_steps, and at each of its multiples by this factor, the best of so many goes on."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""
    retry_failed: bool = False
    """Also the trials that failed in earlier starts."""
    render_only: bool = False
    """Train nothing: table and plots of what there is."""
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def run_class(self) -> type[TeacherTrainingConfig] | type[DistillConfig]:
        """What kind of run `base` is."""
        return DistillConfig if "student" in self.base else TeacherTrainingConfig

    def base_run(self) -> TeacherTrainingConfig | DistillConfig:
        """The run that trials differ from. Raises ValueError when it is none."""
        # One worker trains a trial; `num_workers` of them go side by side.
        alone = self.cluster.model_copy(update={"num_workers": 1})
        place = {"name": "base", "output": f"{self.output}/trials", "cluster": alone, "store": self.store}
        try:
            run = self.run_class.model_validate({**self.base, **place})
        except ValidationError as error:
            raise ValueError(f"base: {_sentences(error)}") from None
        return self._run(run, self.changes, "changes")

    def trials(self) -> tuple[Trial, ...]:
        """All of them, resolved and validated. Raises ValueError that names what can never be."""
        base = self.base_run()
        return tuple(self._trial(base, number) for number in range(self.num_trials))

    def _trial(self, base: TeacherTrainingConfig | DistillConfig, number: int) -> Trial:
        named = base.model_copy(update={"name": f"trial-{number:03}"})
        for attempt in range(MAX_DRAWS):
            values = draw(self.space, seed=self.seed, number=number, attempt=attempt)
            try:
                return Trial(number, values, self._run(named, values, "space"))
            except ValueError as error:
                cause = error
        raise ValueError(self._never_valid(base, cause))

    def _run(
        self, base: TeacherTrainingConfig | DistillConfig, values: dict[str, Any], section: str
    ) -> TeacherTrainingConfig | DistillConfig:
        fields = base.model_dump(mode="json")
        for path, value in values.items():
            try:
                fields = with_value(fields, path, value)
            except ValueError as error:
                raise ValueError(f"{section}.{path}: {error}") from None
        try:
            return type(base).model_validate(fields)
        except ValidationError as error:
            raise ValueError(f"{section}: {_sentences(error)}") from None

    def _never_valid(self, base: TeacherTrainingConfig | DistillConfig, cause: ValueError) -> str:
        """Which field is at fault when no draw can be a run."""
        for path, domain in self.space.items():
            causes = [self._refusal(base, path, value) for value in domain.probes()]
            if all(causes):
                return f"space.{path}: none of its values is valid in base ({causes[0]}); choose others"
        return f"none of {MAX_DRAWS} draws is valid, the last one for {cause}; narrow the space"

    def _refusal(self, base: TeacherTrainingConfig | DistillConfig, path: str, value: Any) -> str:
        try:
            self._run(base, {path: value}, "space")
        except ValueError as error:
            return str(error)
        return ""

    @model_validator(mode="after")
    def _fields_can_be_varied(self) -> Self:
        for path in self.space:
            for fixed in FIXED_FIELDS:
                if f"{path}.".startswith(f"{fixed}."):
                    raise ValueError(
                        f"space.{path}: trials are compared for one budget and on the same images; give it "
                        f"in base or changes"
                    )
        if pair := overlapping(list(self.space)):
            raise ValueError(f"space.{pair[1]} is a part of space.{pair[0]}; put it into each of its choices")
        return self

    @model_validator(mode="after")
    def _every_trial_is_a_run(self) -> Self:
        base = self.base_run()
        if self.grace_steps > base.num_steps:
            raise ValueError(
                f"grace_steps {self.grace_steps} are more than num_steps {base.num_steps} of base; lower them"
            )
        if base.num_validation_images == 0:
            raise ValueError(
                "base.num_validation_images is 0, and trials are judged by held-out PSNR; raise it"
            )
        self.trials()
        return self


# ---------------------------------------------------------------- upscaling


OutputFormat = Literal["jpeg", "png", "webp", "tiff", "avif", "gif", "bmp", "ppm"]
"""Formats that are written. HEIC is only read."""

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class EncodeConfig(Frozen):
    """How results are written. Each format takes what it knows and leaves the rest."""

    quality: int = Field(default=95, ge=1, le=100)
    """Of JPEG, WebP and AVIF."""
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:4:4"
    """Of the colours of JPEG and AVIF."""
    lossless: bool = False
    """WebP without loss."""
    png_level: int = Field(default=1, ge=0, le=9)
    """0 and 1 keep up with a network; higher ones make smaller files, slowly."""
    tiff_compression: Literal["deflate", "lzw", "none"] = "deflate"
    metadata: Literal["keep", "strip"] = "keep"
    """Strip leaves EXIF, XMP and resolution out; the ICC profile stays, since colours need it."""
    oversize: Literal["error", "tiff", "png"] = "error"
    """What becomes of a result with more pixels a side than its format holds: JPEG 65,500, WebP 16,383."""


def _part_of_name(text: str) -> str:
    if "/" in text or not text.isprintable():
        raise ValueError("expected a part of a name, without slashes or control characters")
    return text


def of_extension(value: object) -> object:
    """`jpg` means JPEG to people, and `auto` that nothing is chosen."""
    known = {"jpg": "jpeg", "tif": "tiff", "auto": None}
    name = value.lower().removeprefix(".") if isinstance(value, str) else value
    return known.get(name, name) if isinstance(name, str) else value


def _chosen(value: object) -> object:
    """0 is what other programs call a size that they choose themselves."""
    return None if value in (0, "0") else value


class ResultConfig(Protocol):
    """What is asked of a result: the fields that jobs and requests share, as `UpscaleConfig` has them."""

    @property
    def scale(self) -> float | None: ...  # noqa: D102 said once, in UpscaleConfig; and so below
    @property
    def width(self) -> int | None: ...  # noqa: D102
    @property
    def megapixels(self) -> float | None: ...  # noqa: D102
    @property
    def max_bytes(self) -> int | None: ...  # noqa: D102
    @property
    def format(self) -> OutputFormat | None: ...  # noqa: D102
    @property
    def encode(self) -> EncodeConfig: ...  # noqa: D102
    @property
    def max_pixels(self) -> int: ...  # noqa: D102
    @property
    def max_frames(self) -> int: ...  # noqa: D102


class UpscaleConfig(Frozen):
    """Upscale every image under a folder or prefix."""

    input: Annotated[Uri, Flags(("-i",))]
    """Folder or prefix of the images."""
    output: Annotated[Uri, Flags(("-o",))]
    """Folder or prefix of the results; relative keys are kept, and a rerun skips what is done."""
    model: Annotated[ModelReference, Flags(("-n",))]
    """Bundled name, model directory or checkpoint file."""
    scale: Annotated[float | None, Flags(("-s", "--outscale"))] = Field(default=None, gt=0, le=64)
    """Of the result; the model's own when not set. Another one adds one antialiased resize."""
    width: int | None = Field(default=None, ge=1)
    """Width of each result in pixels, instead of a scale."""
    megapixels: float | None = Field(default=None, gt=0)
    """Size of each result, instead of a scale."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Largest file: quality, then size, is lowered until the result fits."""
    format: Annotated[OutputFormat | None, BeforeValidator(of_extension), Flags(("-f", "--ext"))] = None
    """Of all results; the input's when not set, and JPEG for HEIC. jpg, tif and auto are understood."""
    suffix: Annotated[str, AfterValidator(_part_of_name)] = ""
    """Put between name and extension of each result."""
    encode: EncodeConfig = EncodeConfig()
    include: tuple[str, ...] = ()
    """Glob patterns of relative keys; all keys when there is none."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of relative keys to leave out."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many inputs."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Input images or frames with more pixels fail before they are decoded."""
    max_frames: int = Field(default=10_000, ge=1)
    """Animations and documents with more frames fail before they are decoded."""
    precision: Precision = "auto"
    """Number type of the network; auto measures which is fastest and still gives the same picture."""
    tile_size: Annotated[
        Annotated[int, Field(ge=16)] | None, BeforeValidator(_chosen), Flags(("-t", "--tile"))
    ] = None
    """Height and width of a tile in input pixels; chosen by the network when not set, or 0."""
    dry_run: bool = False
    """Tell counts, pixels, estimated time and bytes; write nothing."""
    verify: bool = False
    """Check the outputs against the status rows instead of upscaling."""
    retry_failed: bool = False
    """Only the inputs that failed in earlier starts of this run."""
    progress: Literal["bar", "json"] = "bar"
    """A bar, or one JSON line per interval on stderr."""
    profile: bool = False
    """Print where the time went."""
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        sizes = [name for name in ("scale", "width", "megapixels") if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise ValueError(f"expected one size, found {' and '.join(sizes)}; leave all but one out")
        return self


# ---------------------------------------------------------------- serving


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[A-Za-z0-9.:\[\]-]+)$")]


class NetworkConfig(Frozen):
    """One network of a served model."""

    uri: ModelReference
    """Bundled name, model directory or checkpoint file."""
    sha256: Digest | None = None
    """Of the weights; a network with another one is refused."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value


ModelTable = dict[Name, Annotated[tuple[NetworkConfig, ...], Field(min_length=1)]]
"""Networks of each served model, one for each scale that it has."""


class KeyConfig(Frozen):
    """One API key, which is never kept itself."""

    sha256: Digest
    """Of the key. --new_key NAME makes a key and prints what belongs here."""
    pixels_per_minute: int | None = Field(default=None, ge=1)
    """Output pixels that it may ask for; no limit when not set."""


class LimitsConfig(Frozen):
    """What one request may be, and what all together may hold."""

    max_body_bytes: int = Field(default=32 * 2**20, ge=1)
    """Of an image as it is sent."""
    max_pixels: int = Field(default=4_194_304, ge=1)
    """Of an input, in all its frames or pages; more is refused before anything is decoded."""
    max_output_pixels: int = Field(default=67_108_864, ge=1)
    """Of a result, and of what the network makes on the way to it."""
    max_frames: int = Field(default=200, ge=1)
    """Pictures of an animation or pages of a document."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """From the first byte of a request to its answer; what is still waiting then costs no more work."""
    body_seconds: float = Field(default=30.0, gt=0)
    """For a request's body to arrive."""
    idle_seconds: float = Field(default=10.0, gt=0)
    """Longest pause within a body."""
    queue_bytes: int = Field(default=2**30, ge=2**20)
    """Pictures, decoded and upscaled, that a replica holds or has promised to hold; beyond it says 429."""
    max_waiting_bytes: int = Field(default=256 * 2**20, ge=2**20)
    """Bodies that the entrance holds at once; beyond it says 429."""
    replay_bytes: int = Field(default=64 * 2**20, ge=0)
    """Answers that are kept for repeated Idempotency-Keys."""
    replay_seconds: float = Field(default=600.0, gt=0)
    """How long they are."""


class ServedJobsConfig(Frozen):
    """Work that is too big or too many for one request, done by the bulk path."""

    records: Uri
    """Folder or prefix of what is known of each job; a restart goes on from it."""
    inputs: tuple[Uri, ...] = ()
    """Places below which a job may read; uploads need none."""
    outputs: tuple[Uri, ...] = ()
    """Places below which a job may write."""
    max_upload_bytes: int = Field(default=2**30, ge=1)
    """Of one image that is sent to become a job."""
    max_pixels: int = Field(default=500_000_000, ge=1)
    """Of one input of a job."""
    max_waiting: int = Field(default=100, ge=1)
    """Jobs of one key that are not finished; beyond it says 429."""
    max_running: int = Field(default=1, ge=1)
    """Jobs that run at once."""
    keep_days: float = Field(default=7, gt=0)
    """After that finished jobs are forgotten, and what was uploaded for them and came of it is deleted."""
    cluster: ClusterConfig = ClusterConfig(cpus_per_worker=0.5)
    """Workers of each job, beside the replicas."""


class ServeConfig(Frozen):
    """Serve models over HTTP."""

    models: Annotated[ModelTable, Field(min_length=1)] = Field(
        default={"photo": tuple(NetworkConfig(uri=f"photo-x{scale}") for scale in (2, 3, 4))}
    )
    """Networks of each model by its name. A request that names none gets the first."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = Field(default=8000, ge=1, le=65535)
    tls_certificate: Path | None = None
    """PEM file of the certificate chain; plain HTTP when not set."""
    tls_key: Path | None = None
    """PEM file of its key."""
    auth: Literal["keys", "none"] = "keys"
    """none lets everybody in, and has to be asked for."""
    keys: dict[Name, KeyConfig] = Field(default={})
    """API keys by the name of their owner."""
    keys_file: Path | None = None
    """YAML file with more of them, in the form of `keys`."""
    new_key: Name | None = None
    """Print a new API key for this owner, and what belongs into `keys`; serve nothing."""
    cors_origins: tuple[Origin, ...] = ()
    """Pages of these origins may call from a browser; none when empty."""
    fetch_urls: bool = False
    """Whether a request may name an image by its URL; private addresses are refused always."""
    limits: LimitsConfig = LimitsConfig()
    jobs: ServedJobsConfig | None = None
    """Where POST /v1/jobs may read and write; there are no jobs when not set."""
    precision: Precision = "auto"
    """Number type of the networks, as for upscaling."""
    tile_size: Annotated[int, Field(ge=16)] | None = None
    """Height and width of a tile in input pixels; chosen by the network when not set."""
    batch_size: int = Field(default=1, ge=1)
    """Tiles of one shape that go through a network together; more than one pays on GPUs."""
    target_waiting_tiles: float = Field(default=16.0, gt=0)
    """Tiles that wait at each replica before another one is started, up to `cluster.num_workers`."""
    entrances: Annotated[int, Field(ge=0)] | None = None
    """Processes that read requests in front of the replicas; a key's quota is divided among them. When not
    set, one in front of several replicas, and none of one replica, which then reads them itself."""
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()
    """`num_workers` are replicas; `[1, 4]` starts more as tiles wait."""

    @model_validator(mode="after")
    def _whole_certificate(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; give both or none")
        return self

    @model_validator(mode="after")
    def _somebody_reads(self) -> Self:
        if self.entrances == 0 and self.cluster.most_workers > 1:
            raise ValueError(
                "entrances: 0 is for one replica, which reads its requests itself, and cluster.num_workers "
                f"is up to {self.cluster.most_workers}; set entrances to 1 or more"
            )
        return self

    @property
    def num_entrances(self) -> int:
        """Of them in front of the replicas."""
        if self.entrances is None:
            return 0 if self.cluster.most_workers == 1 else 1
        return self.entrances

    @property
    def longest_body_seconds(self) -> float:
        """For any body to arrive; an image that becomes a job may come as slowly as that of a request."""
        largest = 0 if self.jobs is None else self.jobs.max_upload_bytes
        return max(1.0, largest / self.limits.max_body_bytes) * self.limits.body_seconds

    @property
    def longest_seconds(self) -> float:
        """Of any request, from its first byte to its answer."""
        return self.longest_body_seconds + self.limits.timeout_seconds


# ---------------------------------------------------------------- demo


class DemoConfig(Frozen):
    """The main job in a few minutes: shard, distil, train alone, evaluate, upscale."""

    model_config = ConfigDict(validate_default=True)

    photos: Uri = "jobs/demo/photos"
    """Photographs to train on."""
    test: Uri = "jobs/demo/test"
    """Benchmark of photographs that are not trained on."""
    teacher: ModelReference = "edsr-small-x4"
    output: Uri = "out/demo"
    num_steps: int = Field(default=1500, ge=1)
    """Of the distilled student, and of the same student without the teacher."""
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()
