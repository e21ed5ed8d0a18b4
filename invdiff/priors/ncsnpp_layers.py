"""Layers of NCSN++ and DDPM of score_sde, with parameters named and ordered as in its checkpoints."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invdiff.priors.layers import Float32, attended, fir, fir_down, fir_up

if TYPE_CHECKING:
    from invdiff.priors.ncsnpp import NCSNppConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": F.silu,
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": lambda x: F.leaky_relu(x, 0.2),
}


def normed(config: "NCSNppConfig", channels: int) -> nn.GroupNorm:
    """Group norm as the original sizes it."""
    return nn.GroupNorm(32 if config.fixed_groups else min(channels // 4, 32), channels, eps=1e-6)


class Fourier(Float32):
    """sin and cos of 2 pi W ln(sigma), W drawn before the training and kept: ``(batch,)`` to ``(batch, 2 n)``."""

    def __init__(self, count: int):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(count), requires_grad=False)

    def forward(self, sigma: Tensor) -> Tensor:
        phase = sigma.float().log()[:, None] * self.W * (2 * math.pi)
        return torch.cat([phase.sin(), phase.cos()], 1)


class NIN(nn.Module):
    """A convolution of 1 x 1 whose weights lie as (in, out)."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(channels_in, channels))
        self.b = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W.T[:, :, None, None], self.b)


class Attention(nn.Module):
    """Self-attention over all pixels with one head, added to its input."""

    def __init__(self, config: "NCSNppConfig", channels: int):
        super().__init__()
        self.factor = math.sqrt(0.5) if config.rescale else 1.0
        self.GroupNorm_0 = normed(config, channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        return self.factor * (x + self.NIN_3(attended(self.NIN_0(h), self.NIN_1(h), self.NIN_2(h))))


class Block(nn.Module):
    """norm - activation - (resample) - conv, plus the noise level, norm - activation - conv, added to the input.

    ``resample`` doubles or halves the sides of both branches: ``"up"``, ``"down"`` or None.
    """

    def __init__(self, config: "NCSNppConfig", channels_in: int, channels: int, resample: str | None):
        super().__init__()
        self.config, self.resample, self.act = config, resample, ACTIVATIONS[config.activation]
        self.factor = math.sqrt(0.5) if config.rescale else 1.0
        self.GroupNorm_0 = normed(config, channels_in)
        self.Conv_0 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.Dense_0 = nn.Linear(4 * config.width, channels)
        self.GroupNorm_1 = normed(config, channels)
        self.Conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        if config.biggan and (channels_in != channels or resample):
            self.Conv_2 = nn.Conv2d(channels_in, channels, 1)
        elif channels_in != channels:
            self.NIN_0 = NIN(channels_in, channels)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.act(self.GroupNorm_0(x))
        if self.resample:
            h, x = (Scaled.plain(self.config, part, self.resample) for part in (h, x))
        h = self.Conv_0(h) + self.Dense_0(self.act(e))[:, :, None, None]
        h = self.Conv_1(self.act(self.GroupNorm_1(h)))
        shortcut = self._modules.get("Conv_2") or self._modules.get("NIN_0")
        return self.factor * ((shortcut(x) if shortcut else x) + h)


class Combine(nn.Module):
    """The smaller image joined to the features."""

    def __init__(self, channels_in: int, channels: int, cat: bool):
        super().__init__()
        self.cat, self.Conv = cat, nn.Conv2d(channels_in, channels, 1)

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        image = self.Conv(image)
        return torch.cat([image, h], 1) if self.cat else image + h


class FirConv(nn.Module):
    """Weights of a convolution that is joined with a filter."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, channels_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))


class Scaled(nn.Module):
    """Sides doubled (``"up"``) or halved (``"down"``) with a convolution.

    With a filter: both are done with zeros around the image once, before the first of them (StyleGAN2). Without:
    repetition and a convolution, or a strided convolution with zeros at the lower and right ends.
    """

    def __init__(self, config: "NCSNppConfig", channels_in: int, channels: int, how: str):
        super().__init__()
        self.config, self.how = config, how
        if config.fir:
            self.Conv2d_0 = FirConv(channels_in, channels)
        elif how == "up":
            self.Conv_0 = nn.Conv2d(channels_in, channels, 3, padding=1)
        else:
            self.Conv_0 = nn.Conv2d(channels_in, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.config.fir:
            return self.Conv_0(F.pad(x, (0, 1, 0, 1)) if self.how == "down" else self.plain(self.config, x, "up"))
        w, bias, taps = self.Conv2d_0.weight, self.Conv2d_0.bias[:, None, None], self.config.taps
        wide = len(taps) // 2
        if self.how == "down":
            x = F.conv2d(x, fir(taps, x).flip(-1, -2), padding=wide, groups=x.shape[1])
            return F.conv2d(x, w, stride=2) + bias
        x = F.conv_transpose2d(x, w.flip(-1, -2).transpose(0, 1), stride=2)
        return F.conv2d(x, 4 * fir(taps, x).flip(-1, -2), padding=wide - 1, groups=x.shape[1]) + bias

    @staticmethod
    def plain(config: "NCSNppConfig", x: Tensor, how: str) -> Tensor:
        """Sides doubled or halved without a convolution."""
        if config.fir:
            return (fir_up if how == "up" else fir_down)(x, fir(config.taps, x))
        return F.interpolate(x, scale_factor=2, mode="nearest") if how == "up" else F.avg_pool2d(x, 2)
