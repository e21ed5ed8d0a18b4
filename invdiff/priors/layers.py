"""Layers that foreign networks share, in plain torch: filters that double or halve sides, attention, frequencies."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fir(taps: tuple[float, ...], x: Tensor) -> Tensor:
    """The 2D filter of these taps with sum 1, one per channel of ``x`` ``(batch, C, H, W)``: ``(C, 1, n, n)``."""
    line = torch.tensor(taps, dtype=torch.float32)
    return (line.outer(line) / line.sum() ** 2).to(x).expand(x.shape[1], 1, -1, -1)


def fir_down(x: Tensor, kernel: Tensor) -> Tensor:
    """Sides halved after a filter with an even number of taps; zeros outside the image."""
    return F.conv2d(x, kernel.flip(-1, -2), stride=2, padding=kernel.shape[-1] // 2 - 1, groups=x.shape[1])


def fir_up(x: Tensor, kernel: Tensor) -> Tensor:
    """Sides doubled by zeros between pixels, then a filter with an even number of taps and gain 4."""
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=kernel.shape[-1] // 2 - 1, groups=x.shape[1])


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int = 1) -> Tensor:
    """softmax(q' k / sqrt(channels of a head)) v over all pixels of ``(batch, C, H, W)``, head by head."""
    batch, channels, height, width = q.shape
    split = (batch, heads, channels // heads, height * width)
    # Features last in memory: several times as fast on the CPU as a transposed view.
    q, k, v = (part.reshape(split).transpose(-1, -2).contiguous() for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, channels, height, width)


def frequencies_down(half: int, last: int, device: torch.device) -> Tensor:
    """``10000^(-k / last)`` for k from 0 to ``half - 1``, float32."""
    return torch.exp(torch.arange(half, device=device, dtype=torch.float32) * (-math.log(10000) / last))


class Float32(nn.Module):
    """A module whose own tensors stay in float32 where the network goes to half precision.

    Frequencies of noise levels are multiplied by numbers up to a hundred, so that bfloat16 would leave no digit of the
    phase.
    """

    def _apply(self, fn, recurse=True):
        kept = {name: tensor.detach() for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        super()._apply(fn, recurse)
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            tensor.data = kept[name].to(tensor.device)
        return self
