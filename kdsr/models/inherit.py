"""Start a narrower or shallower network from a larger trained one of the same kind.

Those channels are kept from which the others can best be told (Farahat et al., Greedy Column Subset
Selection, 2013; Chee et al., Model Preserving Compression for Neural Networks, NeurIPS 2022), and what one
layer gives is what the next one takes: channels that are added, gated or filtered together are one group with
one choice. Of the blocks, evenly spaced ones are kept. Then each layer is fitted to what the larger network
gives at its place. Knows tensors and names, no data and no training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.errors import RequestError
from kdsr.models.contract import SrModel
from kdsr.models.dam import squeezed_width
from kdsr.models.multi_scale import KERNEL_SIZES, dense_width, kernel_widths
from kdsr.spec import DamSpec, EdsrSpec, Frozen, MobileSpec, ModelSpec, MultiScaleSpec, RepChainSpec

NUM_LEAVES = 300
MOST_POSITIONS = 64
"""Rows and columns of a drawn picture's features that a layer is fitted on."""
RIDGE = 1e-4
"""Of the mean square of a layer's input: how much a weight must bring to move."""


@dataclass(frozen=True)
class Part:
    """`size` channels of a group in a row, each of them `repeat` times (as a pixel shuffle needs them)."""

    group: str
    size: int
    repeat: int = 1


Axis = tuple[Part, ...]
"""The parts that lie behind one another along a dimension; none where all of it is taken."""

Axes = tuple[Axis, ...]
"""For the first dimensions of a tensor."""

WHOLE: Axis = ()


@dataclass(frozen=True)
class Layout:
    """How a network's channels hang together: the axes of every tensor, and how many blocks there are."""

    tensors: Mapping[str, Axes]
    blocks: str
    """Name before the number of a block."""
    num_blocks: int


@dataclass(frozen=True)
class Plan:
    """Which tensor of the larger network each own one is cut out of, and the channels that are kept."""

    origins: Mapping[str, str]
    axes: Mapping[str, Axes]
    """Of the larger network's tensors."""
    chosen: Mapping[str, Tensor]

    def cut(self, name: str, given: Tensor) -> Tensor:
        """What `name` takes of `given`, its tensor in the larger network."""
        for dim, axis in enumerate(self.axes[self.origins[name]]):
            if axis:
                given = given.index_select(dim, _positions(axis, self.chosen))
        return given.clone()


def slice_weights(model: SrModel, source: SrModel, pictures: Tensor) -> tuple[Plan, int]:
    """Give `model` what it takes of `source`, both folded; returns how, and how many tensors it took.

    Channels are chosen by what they do on `pictures`, LR (B, C, h, w). What differs because the scales do is
    left as it was. Raises RequestError where `require_slice` does.
    """
    require_slice(model.spec, source.spec)
    own, given = model.state_dict(), source.state_dict()
    plan = _plan(model, source, pictures)
    cut = {name: plan.cut(name, given[origin]) for name, origin in plan.origins.items()}
    fitting = {name: tensor for name, tensor in cut.items() if tensor.shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    return replace(plan, origins={name: plan.origins[name] for name in fitting}), len(fitting)


def _plan(model: SrModel, source: SrModel, pictures: Tensor) -> Plan:
    """The channels of `source` that tell most, as many of each group as `model` has."""
    own, given = model.state_dict(), source.state_dict()
    layout, larger = _layout(model.spec), _layout(source.spec)
    origins = {name: _origin(name, layout, larger) for name in layout.tensors}
    origins = {name: origin for name, origin in origins.items() if origin in given and name in own}
    sizes = {
        part.group: wanted.size
        for name, origin in origins.items()
        for axis, wanted_axis in zip(larger.tensors[origin], layout.tensors[name], strict=True)
        for part, wanted in zip(axis, wanted_axis, strict=True)
    }
    moments = _second_moments(source, larger, pictures)
    chosen = {group: _telling(moments[group], size) for group, size in sizes.items()}
    return Plan(origins, larger.tensors, chosen)


def shared_extractor(model: SrModel, source: SrModel, pictures: Tensor) -> dict[str, Tensor]:
    """What `model` takes as its extractor of that of `source`, both folded, by the name within it.

    All of it where the widths are equal, or else the channels that `slice_weights` takes with `pictures`.
    Raises RequestError where `require_shareable` does.
    """
    require_shareable(model.spec, source.spec)
    prefix = f"{model.spec.extractor}."
    own, given = model.state_dict(), source.state_dict()
    names = [name for name in own if name.startswith(prefix)]
    if any(own[name].shape != given[name].shape for name in names):
        plan = _plan(model, source, pictures)
        given = {name: plan.cut(name, given[name]) for name in names}
    return {name.removeprefix(prefix): given[name] for name in names}


@torch.no_grad()
def refit(model: SrModel, source: SrModel, plan: Plan, pictures: Tensor) -> None:
    """Move each convolution of a sliced `model`, first to last, so that it gives what `source` gives there.

    By least squares on `pictures` (He et al., Channel Pruning, ICCV 2017): what dropped channels and blocks
    had added is made up for as far as the kept ones can. Depthwise convolutions stay as they are.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or f"{name}.weight" not in plan.origins:
            continue
        origin = plan.origins[f"{name}.weight"].removesuffix(".weight")
        _, wanted = _seen(source, origin, pictures)
        if rows := plan.axes[f"{origin}.weight"][0]:
            wanted = wanted.index_select(1, _positions(rows, plan.chosen))
        features, _ = _seen(model, name, pictures)
        _fit_layer(layer, features, wanted)


def _seen(model: SrModel, name: str, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of one convolution."""
    found: list[Tensor] = []
    layer = model.get_submodule(name)
    # Copied, since an activation behind it may work in place.
    hook = layer.register_forward_hook(
        lambda _, given, output: found.extend((given[0].clone(), output.clone()))
    )
    try:
        model(pictures)
    finally:
        hook.remove()
    return found[0], found[1]


def _fit_layer(layer: nn.Conv2d, features: Tensor, wanted: Tensor) -> None:
    """Ridge regression around the layer's weights, on positions whose whole neighbourhood is there."""
    assert layer.bias is not None
    size = layer.kernel_size[0]
    side = min(features.shape[-1] - size + 1, MOST_POSITIONS)
    inputs = F.unfold(features[..., : side + size - 1, : side + size - 1], size).transpose(0, 1).flatten(1)
    inputs = torch.cat([inputs, torch.ones_like(inputs[:1])]).double()
    begin = size // 2
    target = wanted[..., begin : begin + side, begin : begin + side].transpose(0, 1).flatten(1).double()
    weights = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], dim=1).double()
    squares = inputs @ inputs.T
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    change = torch.linalg.solve(squares, inputs @ (target - weights @ inputs).T).T
    weights = (weights + change).to(layer.weight.dtype)
    layer.weight.copy_(weights[:, :-1].view_as(layer.weight))
    layer.bias.copy_(weights[:, -1])


def dead_leaves(channels: int) -> Tensor:
    """The same small pictures (B, C, 48, 48) every time: discs that hide one another, as things do.

    Their statistics are those of photographs (Lee, Mumford and Huang, IJCV 2001).
    """
    draw = torch.Generator().manual_seed(0)
    number, side = 8, 96
    grid = torch.arange(side).float()
    pictures = torch.rand(number, channels, 1, 1, generator=draw).repeat(1, 1, side, side)
    for _ in range(NUM_LEAVES):
        radius = 2 / (0.03 + torch.rand(number, 1, 1, generator=draw))
        middle = torch.rand(2, number, 1, 1, generator=draw) * side
        colour = torch.rand(number, 1, 1, 1, generator=draw)
        colour = (colour + 0.3 * torch.randn(number, channels, 1, 1, generator=draw)).clamp(0, 1)
        is_inside = (grid - middle[0]) ** 2 + (grid[:, None] - middle[1]) ** 2 < radius**2
        pictures = torch.where(is_inside[:, None], colour, pictures)
    noise = 0.03 * torch.randn(pictures.shape, generator=draw)
    return F.avg_pool2d((pictures + noise).clamp(0, 1), 2)


def require_slice(spec: ModelSpec, source: ModelSpec) -> None:
    """Raise RequestError, naming what does not fit, unless `spec` can be cut out of `source`."""
    require_kind(spec, source)
    if type(spec) not in LAYOUTS:
        known = ", ".join(kind.model_fields["kind"].default for kind in LAYOUTS)
        raise RequestError(
            f"a {spec.kind} cannot be cut out of a larger one; take one of {known}, or inherit exact"
        )
    for what in ("num_features", "num_blocks", "num_layers", "expansion", "num_domains"):
        wanted, found = getattr(spec, what, 0), getattr(source, what, 0)
        if wanted > found and not (what == "expansion" and spec.kind == "rep_chain"):
            raise RequestError(
                f"expected a {spec.kind} of {what} {wanted} or more, found {found}; take a larger model, or "
                f"make {what} at most {found}"
            )


def require_shareable(spec: ModelSpec, source: ModelSpec) -> None:
    """Raise RequestError, naming what does not fit, unless `spec` can have the extractor of `source`."""
    if not spec.extractor:
        raise RequestError(
            f"a {spec.kind} has no extractor that a teacher could share; take a student of another kind, or "
            f"set share_extractor to false"
        )
    require_kind(spec, source)
    wide, wanted = (getattr(which, "num_features", 0) for which in (source, spec))
    if wanted > wide or (wanted < wide and type(spec) not in LAYOUTS):
        expected = f"{wanted} or more" if type(spec) in LAYOUTS else str(wanted)
        raise RequestError(
            f"expected a {spec.kind} of num_features {expected} to share its extractor, found {wide}; make "
            f"the student's num_features {'at most ' if wanted > wide else ''}{wide}"
        )


def require_kind(spec: ModelSpec, source: ModelSpec) -> None:
    """Raise RequestError unless both are of one kind and for the same images."""
    if spec.kind != source.kind:
        raise RequestError(
            f"expected a network of kind {spec.kind}, found {source.kind}; take a model of the same kind"
        )
    if spec.channels != source.channels:
        raise RequestError(
            f"expected a {spec.kind} of channels {spec.channels}, found {source.channels}; take a model for "
            f"the same images"
        )


def _origin(name: str, layout: Layout, larger: Layout) -> str:
    """The tensor of the larger network that `name` is cut out of."""
    if not name.startswith(layout.blocks):
        return name
    number, _, rest = name.removeprefix(layout.blocks).partition(".")
    return f"{layout.blocks}{_spaced(int(number), layout.num_blocks, larger.num_blocks)}.{rest}"


def _spaced(number: int, num_blocks: int, num_larger: int) -> int:
    """First to first, last to last, evenly between; a layer behind the blocks stays behind them."""
    if number >= num_blocks:
        return number - num_blocks + num_larger
    return round(number * (num_larger - 1) / max(1, num_blocks - 1))


@torch.no_grad()
def _second_moments(source: SrModel, layout: Layout, pictures: Tensor) -> dict[str, Tensor]:
    """Of each group (F, F): the mean products of its channels, as convolutions take them on `pictures`.

    Where several convolutions take a group they have equal votes.
    """
    moments: dict[str, Tensor] = {}

    def watch(taken: Axis) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].transpose(0, 1).flatten(1).double()
            for part, own in zip(taken, flat.split([part.size for part in taken]), strict=True):
                products = own @ own.T
                vote = products / products.diagonal().sum().clamp_min(1e-30)
                moments[part.group] = moments.get(part.group, torch.zeros_like(vote)) + vote

        return add

    hooks = [
        layer.register_forward_pre_hook(watch(layout.tensors[f"{name}.weight"][1]))
        for name, layer in source.named_modules()
        if isinstance(layer, nn.Conv2d) and layout.tensors.get(f"{name}.weight", (WHOLE, WHOLE))[1]
    ]
    try:
        source(pictures)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _telling(moments: Tensor, number: int) -> Tensor:
    """Positions, in order, of `number` channels from which the others follow best by linear combination.

    One after the other, each time the one that leaves least of all channels unexplained.
    """
    left = moments.clone()
    chosen: list[int] = []
    for _ in range(number):
        explained = left.square().sum(dim=0) / left.diagonal().clamp_min(1e-12)
        explained[chosen] = -1.0
        best = int(explained.argmax())
        chosen.append(best)
        left = left - torch.outer(left[:, best], left[best]) / left[best, best].clamp_min(1e-12)
    return torch.tensor(sorted(chosen))


def _positions(axis: Axis, chosen: Mapping[str, Tensor]) -> Tensor:
    """Along a dimension, where the chosen channels stand."""
    found, begin = [], 0
    for part in axis:
        places = chosen[part.group][:, None] * part.repeat + torch.arange(part.repeat)
        found.append(begin + places.flatten())
        begin += part.size * part.repeat
    return torch.cat(found)


# ---------------------------------------------------------------- layouts


def _convolution(name: str, given: Axis, taken: Axis) -> dict[str, Axes]:
    """Axes of weight (given, taken, k, k) and bias (given,)."""
    return {f"{name}.weight": (given, taken), f"{name}.bias": (given,)}


def _edsr(spec: EdsrSpec) -> Layout:
    stream: Axis = (Part("stream", spec.num_features),)
    tensors = _convolution("head", stream, WHOLE)
    for block in range(spec.num_blocks):
        hidden: Axis = (Part(f"hidden.{block}", spec.num_features),)
        tensors |= _convolution(f"trunk.{block}.body.0", hidden, stream)
        tensors |= _convolution(f"trunk.{block}.body.2", stream, hidden)
    tensors |= _convolution(f"trunk.{spec.num_blocks}", stream, stream)
    before = stream
    for index, factor in enumerate((2, 2) if spec.scale == 4 else (spec.scale,)):
        shuffled = Part(f"upsampled.{index}", spec.num_features, repeat=factor**2)
        tensors |= _convolution(f"upsampler.{2 * index}", (shuffled,), before)
        before = (Part(shuffled.group, shuffled.size),)
    return Layout(tensors | _convolution("tail", WHOLE, before), "trunk.", spec.num_blocks)


def _rep_chain(spec: RepChainSpec) -> Layout:
    tensors: dict[str, Axes] = {}
    before = WHOLE
    for layer in range(spec.num_layers):
        is_tail = layer == spec.num_layers - 1
        given: Axis = WHOLE if is_tail else (Part(f"layer.{layer}", spec.num_features),)
        tensors |= _convolution(f"layers.{layer}", given, before)
        before = given
    return Layout(tensors, "layers.", spec.num_layers)


def _mobile(spec: MobileSpec) -> Layout:
    stream: Axis = (Part("stream", spec.num_features),)
    tensors = _convolution("head", stream, WHOLE) | _convolution("tail", WHOLE, stream)
    for block in range(spec.num_blocks):
        hidden: Axis = (Part(f"hidden.{block}", spec.num_features * spec.expansion),)
        tensors |= _convolution(f"blocks.{block}.expand", hidden, stream)
        tensors |= _convolution(f"blocks.{block}.depthwise", hidden, WHOLE)
        tensors |= _convolution(f"blocks.{block}.project", stream, hidden)
    return Layout(tensors, "blocks.", spec.num_blocks)


def _multi_scale(spec: MultiScaleSpec) -> Layout:
    stream: Axis = (Part("stream", spec.num_features),)
    tensors = _convolution("head", stream, WHOLE) | _convolution("tail", WHOLE, stream)
    for block in range(spec.num_blocks):
        tensors |= _attention(spec, block, stream) | _mixing(spec, block, stream)
    return Layout(tensors, "blocks.", spec.num_blocks)


def _attention(spec: MultiScaleSpec, block: int, stream: Axis) -> dict[str, Axes]:
    """Channels keep to their kernel size; value and context are multiplied, so they share the choice."""
    widths = zip(kernel_widths(spec.num_features), KERNEL_SIZES, strict=True)
    around = tuple(Part(f"around{size}.{block}", width) for width, size in widths)
    name = f"blocks.{block}.attention"
    tensors: dict[str, Axes] = {f"blocks.{block}.norm1.gain": (stream,), f"{name}.around.bias": (around,)}
    tensors |= {f"{name}.around.kernels.{index}": ((part,),) for index, part in enumerate(around)}
    tensors |= _convolution(f"{name}.value", around, stream) | _convolution(f"{name}.context", around, stream)
    return tensors | _convolution(f"{name}.project", stream, around)


def _mixing(spec: MultiScaleSpec, block: int, stream: Axis) -> dict[str, Axes]:
    """The part of the hidden layer that the 3x3 takes, the same part as it gives it, and the rest."""
    dense = dense_width(spec.num_features)
    taken, given = Part(f"taken.{block}", dense), Part(f"given.{block}", dense)
    rest = Part(f"rest.{block}", 2 * spec.num_features - dense)
    name = f"blocks.{block}.mixing"
    tensors: dict[str, Axes] = {f"blocks.{block}.norm2.gain": (stream,)}
    tensors |= _convolution(f"{name}.expand", (taken, rest), stream)
    tensors |= _convolution(f"{name}.dense", (given,), (taken,))
    return tensors | _convolution(f"{name}.project", stream, (given, rest))


def _dam(spec: DamSpec) -> Layout:
    stream: Axis = (Part("stream", spec.num_features),)
    tensors = _convolution("extractor.first", stream, WHOLE) | _convolution("tail", WHOLE, stream)
    tensors |= _convolution("extractor.refine", stream, stream)
    for block in range(spec.num_blocks):
        hidden: Axis = (Part(f"hidden.{block}", spec.num_features),)
        tensors |= _convolution(f"blocks.{block}.first", hidden, stream)
        tensors |= _convolution(f"blocks.{block}.second", stream, hidden)
        tensors |= _domains(spec, block, stream)
    return Layout(tensors, "blocks.", spec.num_blocks)


def _domains(spec: DamSpec, block: int, stream: Axis) -> dict[str, Axes]:
    """Means and deviations of the same channels lie behind one another."""
    squeezed = Part(f"squeezed.{block}", squeezed_width(spec.num_features))
    statistics: Axis = (squeezed, squeezed)
    domains: Axis = (Part(f"domains.{block}", spec.num_domains),)
    name = f"blocks.{block}.attention"
    tensors = _convolution(f"{name}.squeeze", (squeezed,), stream)
    tensors |= _convolution(f"{name}.around", statistics, WHOLE)
    tensors |= _convolution(f"{name}.assign", domains, statistics)
    return tensors | _convolution(f"{name}.gains", stream, domains)


LAYOUTS: Mapping[type[Frozen], Callable[..., Layout]] = {
    EdsrSpec: _edsr,
    RepChainSpec: _rep_chain,
    MobileSpec: _mobile,
    MultiScaleSpec: _multi_scale,
    DamSpec: _dam,
}


def _layout(spec: ModelSpec) -> Layout:
    return LAYOUTS[type(spec)](spec)
