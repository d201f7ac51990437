"""What a stored thing is: the spec of a network, the card of a model, the index of shards.

Plain frozen data with a JSON form. Knows no torch and no ray.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Scale = Literal[1, 2, 3, 4]
Channels = Literal[1, 3]
Goal = Literal["fidelity", "perception"]
"""What a network was trained for: to be near the truth (PSNR), or to look like it (GAN)."""


class Frozen(BaseModel):
    """Base of everything that crosses a border: immutable, and unknown fields are refused."""

    # pydantic would show the refused input, which may hold a secret; kdsr.cli shows what is safe.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )


class NetworkSpec(Frozen):
    """What networks have in common."""

    extractor: ClassVar[str] = ""
    """Submodule that makes the first features out of LR, which a teacher can share; empty for none."""

    @property
    def taps(self) -> tuple[str, ...]:
        """Submodules whose outputs (B, F, h', w') can be read, first to last, each under its own name."""
        return ()


class EdsrSpec(NetworkSpec):
    """EDSR: residual blocks without normalisation, pixel-shuffle tail (Lim et al., CVPRW 2017)."""

    extractor: ClassVar[str] = "head"
    kind: Literal["edsr"] = "edsr"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=64, ge=4)
    num_blocks: int = Field(default=16, ge=1)
    residual_scale: float = Field(default=1.0, gt=0)

    @property
    def taps(self) -> tuple[str, ...]:
        """The head, each block, and the trunk before the long residual."""
        return ("head", *(f"trunk.{block}" for block in range(self.num_blocks)), "trunk")


class RepChainSpec(NetworkSpec):
    """A chain of 3x3 convolutions whose training-time branches fold into one convolution per layer."""

    extractor: ClassVar[str] = "layers.0"
    kind: Literal["rep_chain"] = "rep_chain"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=48, ge=4)
    num_layers: int = Field(default=8, ge=2)
    """3x3 convolutions in all, head and tail included."""
    expansion: int = Field(default=2, ge=1)
    """Width of the training-time 1x1-3x3 branch, as a multiple of the layer's input width."""
    folded: bool = False
    """True when only the single 3x3 convolutions are left; the form that is saved and deployed."""

    @property
    def taps(self) -> tuple[str, ...]:
        """Every layer but the tail, behind its activation."""
        return tuple(f"layers.{layer}" for layer in range(self.num_layers - 1))


class MobileSpec(NetworkSpec):
    """Inverted residuals with depthwise 3x3, no normalisation (Sandler et al., MobileNetV2, CVPR 2018)."""

    extractor: ClassVar[str] = "head"
    kind: Literal["mobile"] = "mobile"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=32, ge=4)
    num_blocks: int = Field(default=9, ge=1)
    expansion: int = Field(default=2, ge=1)
    """Width within a block, as a multiple of `num_features`."""

    @property
    def taps(self) -> tuple[str, ...]:
        """The head and each block."""
        return ("head", *(f"blocks.{block}" for block in range(self.num_blocks)))


class ShuffleSpec(NetworkSpec):
    """Channel split, depthwise 3x3, channel shuffle (Ma et al., ShuffleNet V2, ECCV 2018)."""

    extractor: ClassVar[str] = "head"
    kind: Literal["shuffle"] = "shuffle"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=52, ge=4, multiple_of=2)
    """Width; even, since half of the channels pass each block as they are."""
    num_blocks: int = Field(default=20, ge=1)

    @property
    def taps(self) -> tuple[str, ...]:
        """The head and each block."""
        return ("head", *(f"blocks.{block}" for block in range(self.num_blocks)))


class MultiScaleSpec(NetworkSpec):
    """Depthwise 3x3, 5x5 and 7x7 as local attention, after SAFMN (ICCV 2023) and SMFANet (ECCV 2024)."""

    extractor: ClassVar[str] = "head"
    kind: Literal["multi_scale"] = "multi_scale"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=24, ge=4)
    num_blocks: int = Field(default=7, ge=1)

    @property
    def taps(self) -> tuple[str, ...]:
        """The head and each block; the long residual is added behind the last."""
        return ("head", *(f"blocks.{block}" for block in range(self.num_blocks)))


class DamSpec(NetworkSpec):
    """Domain-aware attention: residual convolutions whose gains depend on statistics of the neighbourhood.

    All of it is local, and its extractor can be shared by teacher and student. See `kdsr/models/dam.py`.
    """

    extractor: ClassVar[str] = "extractor"
    kind: Literal["dam"] = "dam"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=24, ge=4)
    num_blocks: int = Field(default=4, ge=1)
    num_domains: int = Field(default=4, ge=2)
    """Kinds of places (flat, edge, texture, ...) that are told apart."""

    @property
    def taps(self) -> tuple[str, ...]:
        """The extractor, each block, and how likely each place of a block belongs to each domain."""
        blocks = range(self.num_blocks)
        return (
            "extractor",
            *(f"blocks.{block}" for block in blocks),
            *(f"blocks.{block}.attention.domains" for block in blocks),
        )


class FsrcnnSpec(NetworkSpec):
    """FSRCNN: shrink, map, expand, transposed convolution (Dong et al., ECCV 2016)."""

    kind: Literal["fsrcnn"] = "fsrcnn"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=56, ge=4)
    num_shrunk_features: int = Field(default=12, ge=2)
    num_mapping_layers: int = Field(default=4, ge=1)

    @property
    def taps(self) -> tuple[str, ...]:
        """Every activation of the body: extracted, shrunk, mapped and expanded."""
        return tuple(f"body.{layer}" for layer in range(1, 2 * (self.num_mapping_layers + 3), 2))


class EspcnSpec(NetworkSpec):
    """ESPCN: three convolutions and a pixel shuffle (Shi et al., CVPR 2016)."""

    kind: Literal["espcn"] = "espcn"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=64, ge=4)

    @property
    def taps(self) -> tuple[str, ...]:
        """Both activations."""
        return ("body.1", "body.3")


class SrresnetSpec(NetworkSpec):
    """SRResNet, the generator of SRGAN, without batch normalisation (Ledig et al., CVPR 2017).

    Its statistics would differ between training and use, and between one patch and another.
    """

    kind: Literal["srresnet"] = "srresnet"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=64, ge=4)
    num_blocks: int = Field(default=16, ge=1)

    @property
    def taps(self) -> tuple[str, ...]:
        """The head, each block, and the trunk before the long residual."""
        return ("head", *(f"trunk.{block}" for block in range(self.num_blocks)), "trunk")


class RrdbnetSpec(NetworkSpec):
    """RRDBNet, the generator of ESRGAN: residuals in residuals of dense blocks (Wang et al., ECCVW 2018)."""

    kind: Literal["rrdbnet"] = "rrdbnet"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=64, ge=4)
    num_growth: int = Field(default=32, ge=2)
    """Width of each dense layer."""
    num_blocks: int = Field(default=23, ge=1)
    unshuffle: bool = False
    """x2 only: the trunk runs on half the grid, as in Real-ESRGAN's x2 network."""

    @property
    def multiple_of(self) -> int:
        """Height and width of the grid on which the trunk runs, in LR pixels."""
        return 2 if self.unshuffle else 1

    @property
    def taps(self) -> tuple[str, ...]:
        """The first convolution, each block, and the trunk before the long residual."""
        return ("conv_first", *(f"body.{block}" for block in range(self.num_blocks)), "conv_body")

    @model_validator(mode="after")
    def _unshuffles_x2_only(self) -> Self:
        if self.unshuffle and self.scale != 2:
            raise ValueError(f"unshuffle is for scale 2 only, found scale {self.scale}")
        return self


class UnetSpec(NetworkSpec):
    """A U-Net on the LR grid with a pixel-shuffle tail (Ronneberger et al., MICCAI 2015)."""

    kind: Literal["unet"] = "unet"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=32, ge=4)
    """Width at the top; twice as many with each level."""
    num_levels: int = Field(default=3, ge=1, le=5)
    """How often height and width are halved."""

    @property
    def multiple_of(self) -> int:
        """Height and width that the network works on are multiples of this."""
        return 2**self.num_levels

    @property
    def taps(self) -> tuple[str, ...]:
        """Each level on the way down, the bottom, and each level on the way up."""
        levels = range(self.num_levels)
        return (
            *(f"encoder.{level}" for level in levels),
            "bottom",
            *(f"decoder.{level}" for level in reversed(levels)),
        )


class SwinLightSpec(NetworkSpec):
    """Window attention with shifted windows, a reduced SwinIR (Liang et al., ICCVW 2021)."""

    kind: Literal["swin_light"] = "swin_light"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    num_features: int = Field(default=60, ge=4)
    num_heads: int = Field(default=6, ge=1)
    """Of attention; a divisor of `num_features`."""
    num_groups: int = Field(default=3, ge=1)
    num_blocks: int = Field(default=4, ge=1)
    """Attention blocks of a group; every second one has shifted windows."""
    window_size: int = Field(default=8, ge=2)
    """Side of a window in LR pixels."""
    expansion: int = Field(default=2, ge=1)
    """Width of the MLP's hidden layer, as a multiple of `num_features`."""

    @property
    def multiple_of(self) -> int:
        """Height and width that the network works on are multiples of this."""
        return self.window_size

    @property
    def taps(self) -> tuple[str, ...]:
        """The head, each group, and the trunk before the long residual."""
        return ("head", *(f"groups.{group}" for group in range(self.num_groups)), "trunk_tail")

    @model_validator(mode="after")
    def _heads_share_the_features(self) -> Self:
        if self.num_features % self.num_heads:
            raise ValueError(
                f"num_heads must divide num_features, found {self.num_heads} and {self.num_features}"
            )
        return self


class BicubicSpec(NetworkSpec):
    """Bicubic interpolation, a = -0.5, as MATLAB's imresize enlarges (Keys, 1981). No parameters."""

    kind: Literal["bicubic"] = "bicubic"
    scale: Literal[2, 3, 4]
    channels: Channels = 3


class ImportedSpec(NetworkSpec):
    """A public network read from its own checkpoint file; a teacher, never exported again."""

    kind: Literal["imported"] = "imported"
    scale: Literal[2, 3, 4]
    channels: Channels = 3
    architecture: str
    """Name of the architecture as `spandrel` recognised it."""
    multiple_of: int = 1
    """Height and width that the network accepts are multiples of this."""
    min_size: int = 1
    """Height and width that the network accepts are at least this; a multiple of `multiple_of`."""


ModelSpec = Annotated[
    EdsrSpec
    | RepChainSpec
    | MobileSpec
    | ShuffleSpec
    | MultiScaleSpec
    | DamSpec
    | FsrcnnSpec
    | EspcnSpec
    | SrresnetSpec
    | RrdbnetSpec
    | UnetSpec
    | SwinLightSpec
    | BicubicSpec
    | ImportedSpec,
    Field(discriminator="kind"),
]

TrainableSpec = Annotated[
    EdsrSpec
    | RepChainSpec
    | MobileSpec
    | ShuffleSpec
    | MultiScaleSpec
    | DamSpec
    | FsrcnnSpec
    | EspcnSpec
    | SrresnetSpec
    | RrdbnetSpec
    | UnetSpec
    | SwinLightSpec,
    Field(discriminator="kind"),
]


class DiscriminatorBase(Frozen):
    """What discriminators have in common. They are trained beside a network and never exported."""

    channels: int = Field(default=3, ge=1)
    """Of the pictures, or of the features, that are judged."""
    num_features: int = Field(default=64, ge=4)
    """Width of the first layer."""
    spectral_norm: bool = True
    """Keep the largest singular value of each layer at 1 (Miyato et al., ICLR 2018)."""


class SrganDiscriminatorSpec(DiscriminatorBase):
    """One logit for a whole patch, VGG-style (Ledig et al., SRGAN, CVPR 2017); no batch normalisation."""

    kind: Literal["srgan"] = "srgan"

    @property
    def min_size(self) -> int:
        """Least height and width: one pixel must be left of them."""
        return 16


class PatchDiscriminatorSpec(DiscriminatorBase):
    """A logit for each overlapping patch (Isola et al., pix2pix, CVPR 2017); no batch normalisation."""

    kind: Literal["patch"] = "patch"
    num_levels: int = Field(default=3, ge=1, le=6)
    """How often height and width are halved; 3 judges patches of 70 pixels."""

    @property
    def min_size(self) -> int:
        """Least height and width: two 4x4 convolutions follow on the reduced grid."""
        return 3 * 2**self.num_levels


class UnetDiscriminatorSpec(DiscriminatorBase):
    """A logit for each pixel, from a U-Net (Wang et al., Real-ESRGAN, ICCVW 2021)."""

    kind: Literal["unet"] = "unet"

    @property
    def min_size(self) -> int:
        """Least height and width: they are halved three times."""
        return 8


DiscriminatorSpec = Annotated[
    SrganDiscriminatorSpec | PatchDiscriminatorSpec | UnetDiscriminatorSpec, Field(discriminator="kind")
]


class TeacherRef(Frozen):
    """Which network taught this one."""

    name: str
    sha256: str
    licence: str = "unknown"
    psnr_y: dict[str, float] = {}


class Card(Frozen):
    """What a stored model is and where it comes from: `card.json` beside `model.safetensors`."""

    version: Literal[1] = 1
    name: str
    spec: ModelSpec
    num_parameters: int
    value_range: tuple[float, float] = (0.0, 1.0)
    colour: Literal["sRGB", "grey"] = "sRGB"
    sha256: str
    """Of `model.safetensors`, or of the imported checkpoint file."""
    imported: bool = False
    """Read from a public checkpoint file, so that its value range and colours are only assumed."""
    trained_for: Goal = "fidelity"
    teacher: TeacherRef | None = None
    """Of several, the first."""
    co_teachers: list[TeacherRef] = []
    data: list[str] = []
    """Names of the training sets with their terms."""
    licence: str = "unknown"
    command: str = ""
    commit: str = ""
    created: str = ""
    num_steps: int = 0
    metrics: dict[str, float] = {}

    def sentence(self) -> str:
        """Name, size and held-out quality, for the person who waited."""
        psnr = self.metrics.get("heldout_psnr_y")
        quality = "nothing held out to measure on" if psnr is None else f"{psnr:.2f} dB on held-out images"
        return f"{self.name}: {self.num_parameters:,} parameters, {quality}"


class StoredTap(Frozen):
    """Features of the teacher as labelled shards hold them."""

    tap: str
    """Submodule of the teacher."""
    width: int
    """Channels that the teacher has there."""
    rank: int
    """Channels that are stored: as many principal directions, or all of them as they are."""
    stride: int = 1
    """LR pixels a side that one place stands for."""
    kept: float = 1.0
    """Share of the features' energy (mean square) that the stored directions hold."""


class ZoomConfig(Frozen):
    """Zoomed-in inputs: parts of HR that the teacher is given as if they were LR."""

    num_crops: int = Field(default=4, ge=1)
    """Of each sub-image; their places follow from its key and position."""
    side: int = Field(default=64, ge=8)
    """Height and width of the input in pixels; patches are cut from it."""


class StoredBasis(Frozen):
    """The object that holds the directions on which features were projected."""

    key: str
    sha256: str


class Labels(Frozen):
    """What labelled shards hold of their teacher beside its output."""

    degradation: str = "bicubic"
    """How the LR was made that the teacher saw."""
    taps: tuple[StoredTap, ...] = ()
    basis: StoredBasis | None = None
    """Not set where every tap has all its channels."""
    zoom: ZoomConfig | None = None


OUTPUT_ALONE = Labels()


class ShardEntry(Frozen):
    """One Parquet shard as the index lists it."""

    key: str
    sha256: str
    num_bytes: int
    row_groups: list[int]
    """Rows of each row group, in file order."""
    num_images: int
    num_heldout_rows: int
    trained_sides: list[list[int]] | None = None
    """The shorter side of each row of each row group, 0 for those held out; without it they are looked up."""

    @property
    def num_rows(self) -> int:
        """Rows of the whole shard."""
        return sum(self.row_groups)


class ShardIndex(Frozen):
    """`index.json` of a set of shards; written last, and without it the set does not exist."""

    version: Literal[1] = 1
    shards: list[ShardEntry]
    num_images: int
    num_rows: int
    num_heldout_rows: int
    num_pixels: int
    num_rejected: int
    options: dict[str, str | int | float]
    """What the rows depend on: sub-image size, least size, held-out fraction, domain, licence."""
    teacher: TeacherRef | None = None
    """Set when the rows carry this teacher's output."""
    teacher_scale: int | None = None
    labels: Labels | None = None
    """What else of the teacher; nothing but its output for bicubic LR when not set."""

    @property
    def carried(self) -> Labels:
        """`labels`, of sets too that were made before there was more than the output."""
        return self.labels or OUTPUT_ALONE
