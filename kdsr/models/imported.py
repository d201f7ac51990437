"""Public networks read from their own checkpoint files, through `spandrel` (an optional dependency).

A checkpoint is read as tensors only: no code in it is ever run.
"""

import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.errors import CheckpointCorrupt, RequestError
from kdsr.models.contract import SrModel
from kdsr.spec import ImportedSpec

# Networks with attention have no exact radius. Features this far away have not been seen to matter.
ATTENTION_RADIUS = 32


class Imported(SrModel):
    """A foreign network behind kdsr's contract. See `ImportedSpec`."""

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
        multiple = self.spec.multiple_of
        bottom, right = -height % multiple, -width % multiple
        if bottom or right:
            lr = F.pad(lr, (0, right, 0, bottom), mode="reflect")
        sr = self.network(lr)
        return sr[..., : height * self.spec.scale, : width * self.spec.scale]


def read_checkpoint(data: bytes, *, suffix: str, origin: str) -> Imported:
    """The network in a public checkpoint file.

    Raises RequestError when spandrel is missing or does not know the architecture, CheckpointCorrupt when
    the bytes are no checkpoint, and RequestError for networks that do something else than upscale images.
    """
    spandrel = _import_spandrel()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint").with_suffix(suffix)
        path.write_bytes(data)
        try:
            descriptor = spandrel.ModelLoader(device="cpu").load_from_file(path)
        except spandrel.UnsupportedModelError:
            raise RequestError(
                f"{origin}: no known architecture has these weights; spandrel's list of supported "
                f"architectures names what can be imported"
            ) from None
        except Exception as error:  # spandrel passes on whatever torch and pickle raise
            raise CheckpointCorrupt(f"{origin}: not a readable checkpoint: {error}") from None
    return Imported(_spec(descriptor, origin), descriptor.model.eval())


def _spec(descriptor: Any, origin: str) -> ImportedSpec:
    channels = (descriptor.input_channels, descriptor.output_channels)
    if descriptor.scale not in (2, 3, 4) or channels not in ((3, 3), (1, 1)):
        raise RequestError(
            f"{origin}: expected an upscaler x2, x3 or x4 with 3 or 1 channels, found {descriptor.architecture.name} "
            f"x{descriptor.scale} from {channels[0]} to {channels[1]} channels"
        )
    return ImportedSpec(
        scale=descriptor.scale,
        channels=descriptor.input_channels,
        architecture=descriptor.architecture.name,
        multiple_of=max(1, descriptor.size_requirements.multiple_of),
    )


def _import_spandrel() -> ModuleType:
    """spandrel, with a stand-in for torchvision where that is not installed.

    spandrel names three functions of torchvision at import and calls none of them for the networks that
    are of use here; torchvision itself has no build beside every torch.
    """
    stand_in = "torchvision.transforms.functional"
    try:
        if "spandrel" not in sys.modules:
            sys.modules.update(_torchvision_stand_in(stand_in))
        import spandrel
    except ImportError as error:
        raise RequestError(
            f"public checkpoints need spandrel ({error}); run: pip install einops && pip install --no-deps spandrel"
        ) from None
    return spandrel


def _torchvision_stand_in(name: str) -> dict[str, ModuleType]:
    functional = ModuleType(name)
    for attribute in ("normalize", "rotate", "InterpolationMode"):
        setattr(functional, attribute, None)
    modules = {name: functional}
    while "." in name:
        name, _, child = name.rpartition(".")
        parent = ModuleType(name)
        setattr(parent, child, modules[f"{name}.{child}"])
        modules[name] = parent
    return {key: module for key, module in modules.items() if key not in sys.modules}
