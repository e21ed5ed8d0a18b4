"""Layers of EDM's U-Nets, with parameters and buffers named as in its checkpoints."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invdiff.priors.layers import Float32, attended, fir_down, fir_up

if TYPE_CHECKING:
    from invdiff.priors.edm import EDMConfig

HEAD = 64  # channels of an attention head of DhariwalUNet; SongUNet has one head


def normed(config: "EDMConfig", channels: int, eps: float) -> nn.GroupNorm:
    """Group norm as the original sizes it."""
    return nn.GroupNorm(32 if config.fixed_groups else min(32, channels // 4), channels, eps=eps)


class Fourier(Float32):
    """2 pi f label, f drawn before the training: ``(batch,)`` to ``(batch, n)``."""

    freqs: Tensor

    def __init__(self, count: int):
        super().__init__()
        self.register_buffer("freqs", torch.zeros(count))

    def forward(self, label: Tensor) -> Tensor:
        return label.float()[:, None] * (2 * math.pi * self.freqs)


class Conv(nn.Module):
    """A convolution, with sides doubled (``"up"``) or halved (``"down"``) before it where asked; ``kernel`` 0 for none.

    ``fused`` filters after the convolution instead, with zeros around the image once for both.
    """

    resample_filter: Tensor

    def __init__(
        self, channels_in: int, channels: int, kernel: int, how: str | None = None, taps: int = 2, fused: bool = False
    ):
        super().__init__()
        self.how, self.fused, self.kernel = how, fused, kernel
        if kernel:
            self.weight = nn.Parameter(torch.zeros(channels, channels_in, kernel, kernel))
            self.bias = nn.Parameter(torch.zeros(channels))
        if how:
            self.register_buffer("resample_filter", torch.full((1, 1, taps, taps), taps**-2.0))

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        pad = self.kernel // 2
        if self.fused:
            wide = self.resample_filter.shape[-1] // 2
            x = F.conv2d(x, self.weight, padding=pad + wide - 1)
            kernel = self.resample_filter.expand(x.shape[1], 1, -1, -1)
            return F.conv2d(x, kernel, self.bias, stride=2, groups=x.shape[1])
        if self.how:
            kernel = self.resample_filter.expand(x.shape[1], 1, -1, -1)
            x = fir_up(x, kernel) if self.how == "up" else fir_down(x, kernel)
        return F.conv2d(x, self.weight, self.bias, padding=pad) if self.kernel else x


class Block(nn.Module):
    """norm - SiLU - (resample) - conv, joined with the noise level, norm - SiLU - conv, added to the input; attention.

    SongUNet adds the noise level and divides sums by sqrt(2); DhariwalUNet scales and shifts with it.
    """

    def __init__(
        self, config: "EDMConfig", channels_in: int, channels: int, attends: bool = False, resample: str | None = None
    ):
        super().__init__()
        self.song = song = config.song
        eps, self.factor = (1e-6, math.sqrt(0.5)) if song else (1e-5, 1.0)
        self.norm0 = normed(config, channels_in, eps)
        self.conv0 = Conv(channels_in, channels, 3, resample, config.taps)
        self.affine = nn.Linear(config.embedding * config.width, channels * (1 if song else 2))
        self.norm1 = normed(config, channels, eps)
        self.conv1 = Conv(channels, channels, 3)
        self.skip = nn.Identity()
        if channels != channels_in or resample:
            kernel = 1 if song or channels != channels_in else 0
            self.skip = Conv(channels_in, channels, kernel, resample, config.taps)  # type: ignore[assignment]
        self.heads = (1 if song else channels // HEAD) if attends else 0
        if attends:
            if not self.heads or channels % self.heads:
                raise ValueError(f"attention over {channels} channels needs heads of {HEAD}")
            self.norm2 = normed(config, channels, eps)
            self.qkv = Conv(channels, 3 * channels, 1)
            self.proj = Conv(channels, channels, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(e)[:, :, None, None]
        if self.song:
            h = self.norm1(h + e)
        else:
            scale, shift = e.chunk(2, 1)
            h = self.norm1(h) * (1 + scale) + shift
        x = self.factor * (self.conv1(F.silu(h)) + self.skip(x))
        if not self.heads:
            return x
        qkv = self.qkv(self.norm2(x))
        batch, channels, height, width = x.shape
        parts = qkv.reshape(batch, self.heads, channels // self.heads, 3, height, width).unbind(3)
        q, k, v = (part.reshape(x.shape) for part in parts)
        return self.factor * (self.proj(attended(q, k, v, self.heads)) + x)
