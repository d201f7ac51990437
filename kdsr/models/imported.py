"""Public networks read from their own checkpoint files, most through `spandrel` (an optional dependency).

A checkpoint is read as tensors only: no code in it is ever run.
"""

import importlib.util
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from kdsr.errors import CheckpointCorrupt, RequestError
from kdsr.models.contract import SrModel, mirrored_up
from kdsr.models.rrdbnet import Rrdbnet, from_public
from kdsr.models.vgg import Vgg, from_torchvision
from kdsr.spec import ImportedSpec

# Networks with attention have no exact radius. Features this far away have not been seen to matter.
ATTENTION_RADIUS = 32


class Imported(SrModel):
    """A foreign network behind kdsr's contract. See `ImportedSpec`."""

    spec: ImportedSpec

    def __init__(self, spec: ImportedSpec, network: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.network = network

    @property
    def receptive_radius(self) -> int:
        """A bound from experience, not from the layers."""
        return ATTENTION_RADIUS

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`. Sizes the network does not accept are mirrored up to the next one and cut back."""
        self.check_channels(lr)
        height, width = lr.shape[-2:]
        sr = self.network(_mirrored_up(lr, self.spec))
        return sr[..., : height * self.spec.scale, : width * self.spec.scale]


def _mirrored_up(lr: Tensor, spec: ImportedSpec) -> Tensor:
    """`lr` (B, C, h, w) mirrored at the bottom and right, back and forth where that is not enough."""
    return mirrored_up(lr, multiple_of=spec.multiple_of, min_size=spec.min_size)


def read_checkpoint(data: bytes, *, suffix: str, origin: str) -> Imported | Rrdbnet:
    """The network in a public checkpoint file: kdsr's own where it has that architecture, or spandrel's.

    Raises RequestError when spandrel is needed and missing or does not know the architecture,
    CheckpointCorrupt when the bytes hold anything but tensors, and RequestError for networks that do
    something else than upscale.
    """
    try:
        tensors = _read_tensors(data, suffix)
        own = from_public(_state_dict(tensors))
    except Exception as error:  # readers of arbitrary bytes and of unexpected weights raise anything
        raise _corrupt(origin, error) from error
    return own.eval() if own is not None else _read_foreign(tensors, origin)


def read_vgg(data: bytes, *, suffix: str, origin: str) -> Vgg | None:
    """The VGG in a checkpoint file, to look at images with; None for another network.

    Raises CheckpointCorrupt when the bytes hold anything but tensors, and RequestError for another VGG.
    """
    try:
        return from_torchvision(_state_dict(_read_tensors(data, suffix)), origin=origin)
    except RequestError:
        raise
    except Exception as error:  # as above
        raise _corrupt(origin, error) from error


def _read_foreign(tensors: Any, origin: str) -> Imported:
    spandrel = _import_spandrel()
    try:
        descriptor = spandrel.ModelLoader(device="cpu").load_from_state_dict(
            spandrel.canonicalize_state_dict(tensors)
        )
    except spandrel.UnsupportedModelError:
        raise RequestError(
            f"{origin}: no known architecture has these weights; spandrel's list of supported "
            f"architectures names what can be imported"
        ) from None
    except Exception as error:  # as above
        raise _corrupt(origin, error) from error
    return Imported(_spec(descriptor, origin), descriptor.model.eval())


def _corrupt(origin: str, error: Exception) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        f"{origin}: not a checkpoint of plain tensors ({type(error).__name__}); expected a state dict "
        f"saved by torch.save or as safetensors, whole and without code"
    )


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The weights in what a training program wrote, without its wrapping; empty when there are none."""
    for wrapping in ("params_ema", "params", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
    named = content.items() if isinstance(content, dict) else ()
    return {name: tensor for name, tensor in named if isinstance(name, str) and isinstance(tensor, Tensor)}


def _read_tensors(data: bytes, suffix: str) -> Any:
    """What torch.save or safetensors wrote. Objects that need code to come back are refused."""
    if suffix == ".safetensors":
        return load_safetensors(data)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _spec(descriptor: Any, origin: str) -> ImportedSpec:
    channels = (descriptor.input_channels, descriptor.output_channels)
    if descriptor.scale not in (2, 3, 4) or channels not in ((3, 3), (1, 1)):
        raise RequestError(
            f"{origin}: expected an upscaler x2, x3 or x4 with 3 or 1 channels, found "
            f"{descriptor.architecture.name} x{descriptor.scale} from {channels[0]} to {channels[1]} channels"
        )
    return ImportedSpec(
        scale=descriptor.scale,
        channels=descriptor.input_channels,
        architecture=descriptor.architecture.name,
        multiple_of=descriptor.size_requirements.multiple_of,
        min_size=max(1, descriptor.size_requirements.minimum),
    )


def _import_spandrel() -> ModuleType:
    try:
        with _stand_in("torchvision.transforms.functional"):
            import spandrel
    except ImportError as error:
        raise RequestError(
            f"public checkpoints need spandrel ({error}); run: pip install einops && "
            f"pip install --no-deps spandrel"
        ) from None
    return spandrel


@contextmanager
def _stand_in(name: str) -> Iterator[None]:
    """An empty module `name` where its package is not installed, for as long as the block runs.

    spandrel names three functions of torchvision at import and calls none of them for the networks that
    are of use here; torchvision itself has no build beside every torch.
    """
    package = name.partition(".")[0]
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        yield
        return
    modules = _empty_modules(name, attributes=("normalize", "rotate", "InterpolationMode"))
    sys.modules.update(modules)
    try:
        yield
    finally:
        # Others must see that it is not there.
        for made in modules:
            sys.modules.pop(made, None)


def _empty_modules(name: str, attributes: tuple[str, ...]) -> dict[str, ModuleType]:
    """`name` with `attributes`, and the packages above it."""
    module = ModuleType(name)
    for attribute in attributes:
        setattr(module, attribute, None)
    modules = {name: module}
    while "." in name:
        name, _, child = name.rpartition(".")
        parent = ModuleType(name)
        setattr(parent, child, modules[f"{name}.{child}"])
        modules[name] = parent
    return modules
