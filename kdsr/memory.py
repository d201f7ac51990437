"""Networks too large for one device: parameters in parts over the workers, and blocks that run twice.

Sources: Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, VLDB 2023; Chen et
al., Training Deep Nets with Sublinear Memory Cost, 2016. Workers are those of torch's process group. What is
said to be done "together" must be called by all of them, in the same order.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint


def blocks(network: nn.Module) -> list[nn.Module]:
    """What `network` is made of again and again: members of its lists that are more than one layer of torch.

    Only the outermost; what lies beside them is none.
    """
    found = []
    for child in network.children():
        if isinstance(network, nn.Sequential | nn.ModuleList) and _is_block(child):
            found.append(child)
        else:
            found += blocks(child)
    return found


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList) or next(module.parameters(), None) is None:
        return False
    is_layer = type(module).__module__.startswith("torch.") and next(module.children(), None) is None
    return not is_layer


def recompute_blocks(network: nn.Module) -> None:
    """Keep only what goes into each block of `network`, and run the block again in the backward pass.

    It draws the same random numbers then, so that gradients are the same to the last bit on a CPU.
    """
    for block in blocks(network):
        # Around `forward` alone: hooks see each pass once, and names in a state stay what they are.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# ---------------------------------------------------------------- parameters in parts


def shard(network: nn.Module, device: torch.device) -> None:
    """Keep this worker's part of each parameter of `network`, on `device`, and no more. Together.

    A block is whole while it runs, and no longer; what lies outside blocks is whole while the network runs.
    All workers must bring the same weights. They come to the device block by block, so that a network that
    lies in the host's memory is never whole on it.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # fully_shard asks for no other
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in (*blocks(network), network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    """Whether `network`, or a part of it, has its parameters in parts."""
    return any(isinstance(module, FSDPModule) for module in network.modules())


def without_gradients(network: nn.Module) -> AbstractContextManager[None]:
    """How a network that never learns is asked, where nothing that it says leads back to a gradient."""
    # What is put together in inference mode could have no part in a pass outside it.
    return torch.no_grad() if is_sharded(network) else torch.inference_mode()


def whole(tensor: Tensor) -> Tensor:
    """`tensor` put together, where it is in parts. Together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any) -> Any:
    """Nested dicts and lists with whole tensors in place of those in parts. Together.

    They are in the memory of the first worker's machine; other workers get None in their place.
    """
    match state:
        case DTensor():
            together = state.full_tensor()
            return together.cpu() if torch.distributed.get_rank() == 0 else None
        case Mapping():
            return {name: gathered(value) for name, value in state.items()}
        case list():
            return [gathered(value) for value in state]
        case _:
            return state


def parted(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """This worker's parts of the tensors in `state`, for those whose namesakes in `like` are in parts."""
    return {name: _part(value, like.get(name)) for name, value in state.items()}


def parted_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state of `optimizer` with parts of what it keeps for parameters in parts."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {
        number: {name: _part(value, parameters[number]) for name, value in entries.items()}
        for number, entries in state["state"].items()
    }
    return {**state, "state": kept}


def _part(value: Any, like: Any) -> Any:
    """Of a tensor with the shape of `like`; another one, such as a count of steps, is whole everywhere."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    part = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()  # or the whole would stay in memory beneath it
