"""Channel dropout before the last convolution, where it costs super-resolution least.

Source: Kong et al., Reflash Dropout in Image Super-Resolution, CVPR 2022.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.models.contract import SrModel


def drop_channels(model: SrModel, probability: float) -> None:
    """Let `model`, in training mode only, lose each channel before its last convolution with `probability`.

    What is left is divided by 1 - `probability`, so that the mean stays. Draws from torch's generator. The
    weights know nothing of it: neither a state nor an exported model differs.
    """
    layer = model.last_convolution
    if layer is None or probability == 0:
        return

    def drop(layer: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        (features,) = inputs
        return F.dropout2d(features, probability, training=layer.training)

    layer.register_forward_pre_hook(drop)
