"""A chain of convolutions as it is deployed: up to its pixel shuffle, in grey levels, with little glue.

A grey level n goes in as n / 256, which float16 and bfloat16 hold exactly, where they do not hold n / 255.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.degrade import BICUBIC_REACH, upscale_kernel

WHITE = 255.0
EXACT_WHITE = 256.0


class BeforeShuffle(nn.Module):
    """3x3 convolutions with leaky ReLU, plus the bicubic residual; see `forward`.

    `convolutions` are kernels (out, in, 3, 3) and biases (out,) of a network for values in [0, 1] that ends
    in scale*scale*C channels. They run in `dtype`; the residual and the sum stay in float32, since half of
    the picture's 8 bits would be lost otherwise.
    """

    def __init__(
        self,
        convolutions: list[tuple[Tensor, Tensor]],
        *,
        scale: int,
        negative_slope: float,
        dtype: torch.dtype,
        layout: torch.memory_format,
    ) -> None:
        super().__init__()
        self.scale, self.dtype = scale, dtype
        self._slope = negative_slope
        self._num_layers = len(convolutions)
        (head, *_), (tail, tail_bias) = convolutions[0], convolutions[-1]
        order = _block_order(head.shape[1], scale)
        for index, (kernel, bias) in enumerate(convolutions[:-1]):
            self._keep(
                f"kernel{index}", (kernel * EXACT_WHITE / WHITE if index == 0 else kernel).to(dtype), layout
            )
            self.register_buffer(f"bias{index}", bias.detach().to(dtype))
        self._keep("tail", (tail[order] * WHITE).to(dtype), layout)
        self._keep("bicubic", _residual_kernel(head.shape[1], scale)[order], layout)
        self.register_buffer("bias", (tail_bias.detach() * WHITE)[order].float())

    def forward(self, lr: Tensor, offset: float) -> Tensor:
        """Grey levels (B, C, h, w) of any type to float32 (B, h, w, scale, scale*C), plus `offset`.

        Dimension 3 is the row and dimension 4 the column and colour in the block that an LR pixel becomes.
        Neither rounded nor clamped.
        """
        features = lr.to(self.dtype) / EXACT_WHITE
        for index in range(self._num_layers):
            features = self._layer(index, features, pad_rows=1)
        return self._with_residual(features, _replicated(lr), offset)

    def strips(self, lr: Tensor, offset: float, *, rows: int) -> Iterator[tuple[int, Tensor]]:
        """`forward` in parts (B, n, w, scale, scale*C), top to bottom, each with the first row it stands for.

        About `rows` rows go through all layers together, and each layer keeps the last two that it saw. So no
        row is computed twice, and features stay in the cache however large `lr` is. A row waits for the one
        below it in every layer: parts are behind their input, and the first one must outlast that wait.
        """
        height, rows = lr.shape[2], max(rows, self._num_layers + 1)
        if height <= rows:
            yield 0, self(lr, offset)
            return
        surroundings = _replicated(lr)
        kept: list[Tensor] = []
        done = 0
        for top in range(0, height, rows):
            features = lr[:, :, top : top + rows].to(self.dtype) / EXACT_WHITE
            for index in range(self._num_layers):
                if top == 0:
                    kept.append(_zero_row(features))
                below = [_zero_row(features)] if top + rows >= height else []
                joined = torch.cat([kept[index], features, *below], dim=2)
                kept[index] = joined[:, :, -2:]
                features = self._layer(index, joined, pad_rows=0)
            ready = features.shape[2]
            around = surroundings[:, :, done : done + ready + 2 * BICUBIC_REACH]
            yield done, self._with_residual(features, around, offset)
            done += ready

    def _layer(self, index: int, features: Tensor, *, pad_rows: int) -> Tensor:
        """One layer on features (B, F, n, w); `pad_rows` rows of zeros are added above and below."""
        padding = [pad_rows, 1]
        if index == self._num_layers - 1:
            return F.conv2d(features, self.get_buffer("tail"), padding=padding)
        kernel, bias = self.get_buffer(f"kernel{index}"), self.get_buffer(f"bias{index}")
        return _convolved_leaky(features, kernel, bias, padding=padding, slope=self._slope)

    def _with_residual(self, features: Tensor, around: Tensor, offset: float) -> Tensor:
        """Tail's (B, s*s*C, n, w) plus bicubic of LR rows `around` (B, C, n + 4, w + 4), as blocks."""
        bicubic = F.conv2d(around, self.get_buffer("bicubic"), self.get_buffer("bias") + offset)
        return bicubic.add_(features).permute(0, 2, 3, 1).unflatten(3, (self.scale, -1))

    def _keep(self, name: str, kernel: Tensor, layout: torch.memory_format) -> None:
        self.register_buffer(name, kernel.detach().contiguous(memory_format=layout))


def _block_order(channels: int, scale: int) -> Tensor:
    """Where row, column and colour of a block (in this order) stand in the input of a pixel shuffle."""
    return torch.arange(channels * scale**2).view(channels, scale, scale).permute(1, 2, 0).flatten()


def _residual_kernel(channels: int, scale: int) -> Tensor:
    """(C*scale*scale, C, 5, 5): bicubic enlargement, before its pixel shuffle, as one dense convolution.

    Most weights are zero, and yet it takes a third of the time of one convolution for each colour.
    """
    filters = upscale_kernel(scale).float()[:, 0]
    return torch.einsum("cd,khw->ckdhw", torch.eye(channels), filters).flatten(0, 1)


def _zero_row(features: Tensor) -> Tensor:
    """(B, F, 1, w): what a convolution sees beyond the border."""
    batch, width, _, columns = features.shape
    return features.new_zeros(batch, 1, columns, width).permute(0, 3, 1, 2)


def _replicated(lr: Tensor) -> Tensor:
    """float32 (B, C, h + 4, w + 4) with the border repeated."""
    return F.pad(lr.float(), (BICUBIC_REACH,) * 4, mode="replicate")


def _convolved_leaky(
    features: Tensor, kernel: Tensor, bias: Tensor, *, padding: list[int], slope: float
) -> Tensor:
    """3x3 convolution and leaky ReLU; on a CPU in one pass over memory, as oneDNN can."""
    if features.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return F.leaky_relu_(F.conv2d(features, kernel, bias, padding=padding), slope)
    convolved: Tensor = torch.ops.mkldnn._convolution_pointwise(
        features, kernel, bias, padding, [1, 1], [1, 1], 1, "leaky_relu", [slope], ""
    )
    return convolved
