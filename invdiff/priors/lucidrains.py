"""The ``Unet`` of denoising-diffusion-pytorch, version 2, with the names of its files.

The U-Net of Ho et al. 2020 with linear attention (Shen et al. 2021, efficient attention) on all levels but the
coarsest, root-mean-square norms over channels, and a few learned keys and values in every attention.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invdiff.errors import PriorError


@dataclass(frozen=True)
class LucidrainsConfig:
    """Shape of the network; JSON-safe.

    Args:
        channels: image channels.
        out_channels: twice as many where the variance is learned.
        dim: width of the noise-level embedding; its inner width is 4 times that.
        widths: features of the first convolution, then of the end of each level, finest first.
        full: for each level, whether every pixel attends to every other, else linear attention.
        heads, head_channels: of the attention of each level.
        memories: learned keys and values.
        self_condition: the network also takes an estimate of the image, here zeros, as at the start of its sampler.

    Raises:
        PriorError: numbers that make no network, or an absurd one.
    """

    channels: int
    out_channels: int
    dim: int
    widths: tuple[int, ...]
    full: tuple[bool, ...]
    heads: tuple[int, ...]
    head_channels: tuple[int, ...]
    memories: int = 4
    self_condition: bool = False

    def __post_init__(self):
        levels = len(self.widths) - 1
        sizes = (self.dim, *self.widths, *self.heads, *self.head_channels)
        alike = len(self.full) == len(self.heads) == len(self.head_channels) == levels
        sound = all(isinstance(n, int) and 1 <= n <= 16384 for n in sizes) and self.dim >= 4
        if not (1 <= levels <= 10 and alike and sound and 0 <= self.memories <= 1024 and self.channels >= 1):
            raise PriorError(f"Unet of denoising-diffusion-pytorch with widths {self.widths}: correct the settings")

    @property
    def stride(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return 2 ** (len(self.full) - 1)


class RMSNorm(nn.Module):
    """x / |x| times sqrt(channels) and a learned factor, the norm over channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class Block(nn.Module):
    """conv - norm - (scale and shift) - SiLU."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(channels_in, channels, 3, padding=1), RMSNorm(channels)

    def forward(self, x: Tensor, scale: Tensor | float = 0.0, shift: Tensor | float = 0.0) -> Tensor:
        return F.silu(self.norm(self.proj(x)) * (1 + scale) + shift)


class ResidualBlock(nn.Module):
    """Two blocks, the first one told the noise level, added to the input."""

    def __init__(self, channels_in: int, channels: int, embedding: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * channels))
        self.block1, self.block2 = Block(channels_in, channels), Block(channels, channels)
        self.res_conv = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.mlp(e)[:, :, None, None].chunk(2, 1)
        return self.block2(self.block1(x, scale, shift)) + self.res_conv(x)


class Attention(nn.Module):
    """Attention over pixels and learned keys and values, added to the input.

    ``full``: softmax(q k' / sqrt(head)) v. Linear: q softmaxed over features and over sqrt(head), k over pixels, and
    q (k' v), whose cost grows with the number of pixels only.
    """

    def __init__(self, channels: int, heads: int, head: int, memories: int, full: bool):
        super().__init__()
        self.full, self.heads, self.head = full, heads, head
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.zeros(2, heads, *((memories, head) if full else (head, memories))))
        self.to_qkv = nn.Conv2d(channels, 3 * heads * head, 1, bias=False)
        out = nn.Conv2d(heads * head, channels, 1)
        self.to_out: nn.Module = out if full else nn.Sequential(out, RMSNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(batch, 3, self.heads, self.head, -1).mT
        q, k, v = qkv.contiguous().unbind(1)  # (batch, heads, pixels, features of a head)
        k, v = (torch.cat([o, t], 2) for o, t in zip(self._own(batch), (k, v), strict=True))
        if self.full:
            h = F.scaled_dot_product_attention(q, k, v)
        else:
            h = (q.softmax(-1) * self.head**-0.5) @ (k.softmax(-2).mT @ v)
        return x + self.to_out(h.mT.reshape(batch, -1, height, width))

    def _own(self, batch: int) -> tuple[Tensor, Tensor]:
        """Learned keys and values, ``(batch, heads, memories, features of a head)`` each."""
        memory = self.mem_kv if self.full else self.mem_kv.mT
        return memory[0].expand(batch, -1, -1, -1), memory[1].expand(batch, -1, -1, -1)


class Fold(nn.Module):
    """Squares of 2 x 2 pixels as channels, which halves the sides."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2)


class LucidrainsUNet(nn.Module):
    """``(batch, C, H, W)`` and time labels ``(batch,)`` to ``(batch, C', H, W)``; sides are multiples of the stride."""

    def __init__(self, config: LucidrainsConfig):
        super().__init__()
        self.config = c = config
        embedding, first, levels = 4 * c.dim, c.widths[0], range(len(c.full))
        self.init_conv = nn.Conv2d(c.channels * (1 + c.self_condition), first, 7, padding=3)
        # Named as in the files, whose first entry makes sinusoids and has no weights.
        self.time_mlp = nn.Sequential(
            nn.Identity(), nn.Linear(c.dim, embedding), nn.GELU(), nn.Linear(embedding, embedding)
        )
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for k in levels:
            here, deeper = c.widths[k : k + 2]
            blocks = [ResidualBlock(here, here, embedding) for _ in range(2)]
            fold = nn.Sequential(Fold(), nn.Conv2d(4 * here, deeper, 1))
            end = fold if k < levels[-1] else nn.Conv2d(here, deeper, 3, padding=1)
            self.downs.append(nn.ModuleList([*blocks, self._attention(here, k), end]))
        middle, last = c.widths[-1], levels[-1]
        self.mid_block1, self.mid_block2 = (ResidualBlock(middle, middle, embedding) for _ in range(2))
        self.mid_attn = Attention(middle, c.heads[last], c.head_channels[last], c.memories, True)
        for k in reversed(levels):
            finer, here = c.widths[k : k + 2]
            blocks = [ResidualBlock(here + finer, here, embedding) for _ in range(2)]
            conv = nn.Conv2d(here, finer, 3, padding=1)
            end = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv) if k else conv
            self.ups.append(nn.ModuleList([*blocks, self._attention(here, k), end]))
        self.final_res_block = ResidualBlock(2 * first, first, embedding)
        self.final_conv = nn.Conv2d(first, c.out_channels, 1)

    def _attention(self, channels: int, level: int) -> Attention:
        c = self.config
        return Attention(channels, c.heads[level], c.head_channels[level], c.memories, c.full[level])

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        e = self.time_mlp(sinusoids(label, self.config.dim).to(x.dtype))
        x = first = self.init_conv(torch.cat([torch.zeros_like(x), x], 1) if self.config.self_condition else x)
        held = []
        stage: Any
        for stage in self.downs:
            one, two, attention, end = stage
            held.append(x := one(x, e))
            held.append(x := attention(two(x, e)))
            x = end(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, e)), e)
        for stage in self.ups:
            one, two, attention, end = stage
            x = one(torch.cat([x, held.pop()], 1), e)
            x = end(attention(two(torch.cat([x, held.pop()], 1), e)))
        return self.final_conv(self.final_res_block(torch.cat([x, first], 1), e))


def sinusoids(label: Tensor, width: int) -> Tensor:
    """sin and cos of ``label * 10000^(-k / (width / 2 - 1))``, k from 0: ``(batch,)`` to ``(batch, width)``."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=label.device, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
    phase = label.float()[:, None] * rates
    return torch.cat([phase.sin(), phase.cos()], 1)
