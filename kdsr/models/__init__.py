"""The table of networks: one row a spec, one file a network."""

from collections.abc import Mapping

from torch import Tensor, nn

from kdsr.models.before_shuffle import BeforeShuffle
from kdsr.models.bicubic import Bicubic
from kdsr.models.contract import SrModel
from kdsr.models.dam import Dam
from kdsr.models.dropout import drop_channels
from kdsr.models.edsr import Edsr
from kdsr.models.espcn import Espcn
from kdsr.models.fsrcnn import Fsrcnn
from kdsr.models.inherit import (
    dead_leaves,
    refit,
    require_shareable,
    require_slice,
    shared_extractor,
    slice_weights,
)
from kdsr.models.mobile import Mobile
from kdsr.models.multi_scale import MultiScale
from kdsr.models.rep_chain import RepChain, RepConv
from kdsr.models.rrdbnet import Rrdbnet
from kdsr.models.shuffle import Shuffle
from kdsr.models.srresnet import Srresnet
from kdsr.models.swin_light import SwinLight
from kdsr.models.unet import Unet
from kdsr.spec import (
    BicubicSpec,
    DamSpec,
    EdsrSpec,
    EspcnSpec,
    Frozen,
    FsrcnnSpec,
    MobileSpec,
    ModelSpec,
    MultiScaleSpec,
    RepChainSpec,
    RrdbnetSpec,
    ShuffleSpec,
    SrresnetSpec,
    SwinLightSpec,
    UnetSpec,
)

__all__ = [
    "MODELS",
    "BeforeShuffle",
    "SrModel",
    "build_model",
    "drop_channels",
    "fold",
    "inherit_slice",
    "inherit_weights",
    "num_parameters",
    "require_shareable",
    "require_slice",
    "share_extractor",
]

MODELS: Mapping[type[Frozen], type[SrModel]] = {
    EdsrSpec: Edsr,
    RepChainSpec: RepChain,
    MobileSpec: Mobile,
    ShuffleSpec: Shuffle,
    MultiScaleSpec: MultiScale,
    DamSpec: Dam,
    FsrcnnSpec: Fsrcnn,
    EspcnSpec: Espcn,
    SrresnetSpec: Srresnet,
    RrdbnetSpec: Rrdbnet,
    UnetSpec: Unet,
    SwinLightSpec: SwinLight,
    BicubicSpec: Bicubic,
}


def build_model(spec: ModelSpec) -> SrModel:
    """A freshly initialised network for `spec`. Imported networks come from `kdsr.checkpoint` only."""
    return MODELS[type(spec)](spec)


def fold(model: SrModel) -> SrModel:
    """`model` in the form that is saved and deployed: training-time branches folded, same output."""
    return model.fold() if isinstance(model, RepChain) else model


def inherit_weights(model: SrModel, source: SrModel) -> int:
    """Start `model` from `source` where layers agree, whatever the scale; returns how many tensors or layers.

    An x4 network takes the trunk of an x2 one and keeps its own tail (Lim et al., EDSR, CVPRW 2017).
    """
    if isinstance(model, RepChain) and isinstance(source, RepChain):
        return model.inherit(source)
    own, given = model.state_dict(), source.state_dict()
    agreeing = {name: given[name] for name in own if name in given and own[name].shape == given[name].shape}
    model.load_state_dict(agreeing, strict=False)
    return len(agreeing)


def inherit_slice(model: SrModel, source: SrModel, pictures: Tensor | None = None) -> int:
    """Start `model` from the most telling channels and evenly spaced blocks of a larger `source` of its kind.

    Returns how many tensors were taken; a tail for another scale is left as it was. Where something was left
    out, the layers are fitted to the source's features. Channels are chosen and layers fitted on `pictures`,
    LR (B, C, h, w) in [0, 1], drawn ones where there are none: those that the network is for do better.
    Raises RequestError where `require_slice` does.
    """
    folded, larger = fold(model), fold(source)
    pictures = dead_leaves(source.spec.channels) if pictures is None else pictures
    plan, taken = slice_weights(folded, larger, pictures)
    if num_parameters(folded) < num_parameters(larger):
        refit(folded, larger, plan, pictures)
    if isinstance(model, RepChain) and isinstance(folded, RepChain) and folded is not model:
        model.inherit(folded)
    return taken


def share_extractor(model: SrModel, source: SrModel, pictures: Tensor | None = None) -> None:
    """Give `model` the extractor of `source`, or the most telling channels of it, and let it learn no more.

    On the same `pictures` the channels are those that `inherit_slice` takes, which may stand behind it.
    Raises RequestError where `require_shareable` does.
    """
    pictures = dead_leaves(source.spec.channels) if pictures is None else pictures
    taken = shared_extractor(fold(model), fold(source), pictures)
    extractor = model.get_submodule(model.spec.extractor)
    if isinstance(extractor, RepConv):
        extractor.set_single(taken["weight"], taken["bias"])
    else:
        extractor.load_state_dict(taken)
    extractor.requires_grad_(False)


def num_parameters(model: nn.Module) -> int:
    """Weights and biases in all."""
    return sum(parameter.numel() for parameter in model.parameters())
