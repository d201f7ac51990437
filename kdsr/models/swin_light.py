"""A light window-attention network: Liang et al., SwinIR, ICCV Workshops 2021, in a reduced form."""

import torch
from torch import Tensor, nn

from kdsr.degrade import bicubic_upscale
from kdsr.models.contract import SrModel, mirrored_up, receptive_radius
from kdsr.spec import SwinLightSpec

CLOSED = -100.0
"""Added to the attention between pixels that are neighbours only since the picture was rolled."""


class WindowAttention(nn.Module):
    """Attention within windows and an MLP, each behind a layer normalisation and added to its input.

    The windows are `window` pixels wide and moved up and left by `shift`.
    """

    bias_index: Tensor

    def __init__(self, spec: SwinLightSpec, *, shift: int) -> None:
        super().__init__()
        width, self.window, self.shift = spec.num_features, spec.window_size, shift
        self.num_heads = spec.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        hidden = width * spec.expansion
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.position_bias = nn.Parameter(torch.empty((2 * self.window - 1) ** 2, self.num_heads))
        nn.init.trunc_normal_(self.position_bias, std=0.02)
        self.register_buffer("bias_index", _bias_index(self.window), persistent=False)

    def span(self, low: int, high: int) -> tuple[int, int]:
        """Whole windows; see `Spans`."""
        first = (low + self.shift) // self.window * self.window - self.shift
        last = (high + self.shift) // self.window * self.window - self.shift
        return first, last + self.window - 1

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same; h and w are multiples of the window."""
        tokens = features.permute(0, 2, 3, 1)
        tokens = tokens + self._attend(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.permute(0, 3, 1, 2)

    def _attend(self, tokens: Tensor) -> Tensor:
        """(B, h, w, F) to the same."""
        batch, height, width, depth = tokens.shape
        if self.shift:
            tokens = tokens.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = _to_windows(tokens, self.window)
        heads = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        query, key, value = heads.unbind(0)
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + self._position_bias()
        if self.shift:
            weights = weights + self._closed(height, width, weights)
        mixed = (weights.softmax(dim=-1) @ value).transpose(2, 3).flatten(3)
        tokens = _from_windows(self.project(mixed), self.window, (batch, height, width, depth))
        return tokens.roll((self.shift, self.shift), dims=(1, 2)) if self.shift else tokens

    def _position_bias(self) -> Tensor:
        """(heads, window**2, window**2)."""
        return self.position_bias[self.bias_index].permute(2, 0, 1)

    def _closed(self, height: int, width: int, like: Tensor) -> Tensor:
        """(number of windows, 1, window**2, window**2): `CLOSED` between opposite borders of the picture."""
        rows, columns = (
            (torch.arange(side, device=like.device) >= side - self.shift).to(like.dtype)
            for side in (height, width)
        )
        region = _to_windows((rows[:, None] + 2 * columns)[None, :, :, None], self.window)[0, :, :, 0]
        return CLOSED * (region[:, None, :] != region[:, :, None]).to(like.dtype).unsqueeze(1)


class Group(nn.Module):
    """Window attention, shifted every other time, and a 3x3 convolution; added to the input."""

    def __init__(self, spec: SwinLightSpec) -> None:
        super().__init__()
        shifts = [block % 2 * (spec.window_size // 2) for block in range(spec.num_blocks)]
        self.blocks = nn.Sequential(*(WindowAttention(spec, shift=shift) for shift in shifts))
        self.conv = nn.Conv2d(spec.num_features, spec.num_features, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        return features + self.conv(self.blocks(features))


class SwinLight(SrModel):
    """Groups of window attention on the LR grid, residual over bicubic. See `SwinLightSpec`.

    The tail starts at zero, so that an untrained network is bicubic interpolation.
    """

    spec: SwinLightSpec

    def __init__(self, spec: SwinLightSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.num_features
        self.head = nn.Conv2d(spec.channels, width, 3, padding=1)
        self.groups = nn.Sequential(*(Group(spec) for _ in range(spec.num_groups)))
        self.trunk_tail = nn.Conv2d(width, width, 3, padding=1)
        tail = nn.Conv2d(width, spec.channels * spec.scale**2, 3, padding=1)
        nn.init.zeros_(tail.weight)
        nn.init.zeros_(tail.bias)  # type: ignore[arg-type]
        self.tail = nn.Sequential(tail, nn.PixelShuffle(spec.scale))

    @property
    def receptive_radius(self) -> int:
        """Finite, since windows are: each one is taken whole, at the widest place in the grid of windows."""
        layers = [self.head, self.groups, self.trunk_tail, self.tail]
        return receptive_radius(layers, self.spec.scale, multiple_of=self.spec.multiple_of)

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`. Other sizes than multiples of the window are mirrored up and cut back."""
        self.check_channels(lr)
        height, width = (side * self.spec.scale for side in lr.shape[-2:])
        lr = mirrored_up(lr, multiple_of=self.spec.multiple_of)
        shallow = self.head(lr)
        features = shallow + self.trunk_tail(self.groups(shallow))
        sr: Tensor = bicubic_upscale(lr, self.spec.scale) + self.tail(features)
        return sr[..., :height, :width]


def _to_windows(tokens: Tensor, window: int) -> Tensor:
    """(B, h, w, F) to (B, number of windows, window**2, F)."""
    split = tokens.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _from_windows(windows: Tensor, window: int, shape: tuple[int, int, int, int]) -> Tensor:
    """What `_to_windows` made, back to `shape` (B, h, w, F)."""
    _, height, width, _ = shape
    split = windows.unflatten(2, (window, window)).unflatten(1, (height // window, width // window))
    return split.transpose(2, 3).reshape(shape)


def _bias_index(window: int) -> Tensor:
    """(window**2, window**2): which entry of the table stands for the offset between two pixels."""
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    apart = place[:, None] - place[None] + window - 1
    return apart[..., 0] * (2 * window - 1) + apart[..., 1]
