"""The U-Net of guided diffusion (ADM) with the names of its published checkpoints.

Dhariwal and Nichol 2021, section 3 and appendix; Nichol and Dhariwal 2021 for the variant without adaptive norms. The
modules are numbered as in the files: ``input_blocks.3.0.in_layers.2.weight`` is the first convolution of the residual
block that is the first part of the fourth stage of the encoder.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invdiff.errors import PriorError

GROUPS = 32


@dataclass(frozen=True)
class ADMConfig:
    """Shape of the network; JSON-safe.

    Args:
        in_channels, out_channels: twice as many come out where the variance is learned.
        width: features of multiplier 1 (``num_channels``).
        blocks: residual blocks of a level (``num_res_blocks``).
        multipliers: of ``width``, level by level, finest first (``channel_mult``).
        attention: levels with self-attention, counted from 0, as ``ds`` = 2^level in the original.
        head_channels: channels of an attention head, or 0 where ``heads`` and ``heads_up`` count.
        heads, heads_up: attention heads of encoder and decoder.
        new_order: q, k and v are split before the heads (``use_new_attention_order``).
        scale_shift: the noise level scales and shifts (``use_scale_shift_norm``), else it is added.
        resblock_updown: levels are joined by residual blocks.
        classes: number of class labels, 0 without.
        label: the class that is asked for.

    Raises:
        PriorError: numbers that make no network, or an absurd one.
    """

    in_channels: int
    out_channels: int
    width: int
    blocks: int
    multipliers: tuple[float, ...]
    attention: tuple[int, ...]
    head_channels: int = 0
    heads: int = 4
    heads_up: int = 4
    new_order: bool = False
    scale_shift: bool = True
    resblock_updown: bool = False
    classes: int = 0
    label: int | None = None

    def __post_init__(self):
        widths = [int(m * self.width) for m in self.multipliers]
        if not (1 <= self.blocks <= 16 and 1 <= len(widths) <= 10 and self.in_channels >= 1 and self.out_channels >= 1):
            raise PriorError(
                f"ADM with {self.blocks} blocks on {len(widths)} levels, {self.in_channels} channels in and "
                f"{self.out_channels} out: correct the configuration (1 to 16 blocks, 1 to 10 levels)"
            )
        if any(w < 1 or w % GROUPS or w > 16384 for w in widths):
            raise PriorError(f"ADM levels of {widths} channels: each needs a multiple of {GROUPS} up to 16384")
        parts = {self.head_channels} if self.head_channels else {self.heads, self.heads_up}
        for level in {*self.attention, len(widths) - 1}:
            if not 0 <= level < len(widths) or any(p < 1 or widths[level] % p for p in parts):
                raise PriorError(
                    f"ADM attention on level {level} of {len(widths)}, in parts of {sorted(parts)}: correct attention "
                    "and heads"
                )
        check_class(self.classes, self.label)

    @property
    def stride(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def channels(self) -> int:
        """Image channels."""
        return self.in_channels


def check_class(classes: int | None, label: int | None) -> None:
    """Raise PriorError where a network of ``classes``, 0 for none, is told none of them."""
    if classes and not 0 <= (-1 if label is None else label) < classes:
        raise PriorError(
            f"the network is conditioned on one of {classes} classes: choose one with --class 0 to {classes - 1}"
        )


class ResidualBlock(nn.Module):
    """norm - SiLU - (resample) - conv, joined with the noise level, norm - SiLU - conv, added to the input.

    ``resample`` doubles or halves the sides of both branches: ``"up"``, ``"down"`` or None.
    """

    def __init__(self, channels_in: int, channels: int, embedding: int, scale_shift: bool, resample: str | None = None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        norm, conv = nn.GroupNorm(GROUPS, channels_in), nn.Conv2d(channels_in, channels, 3, padding=1)
        self.in_layers = nn.Sequential(norm, nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, channels * (2 if scale_shift else 1)))
        norm, conv = nn.GroupNorm(GROUPS, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), nn.Identity(), conv)  # the third one is dropout in training
        self.skip_connection = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.in_layers[2](resampled(self.in_layers[:2](x), self.resample))
        e = self.emb_layers(e)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(resampled(x, self.resample)) + h


def resampled(x: Tensor, how: str | None) -> Tensor:
    """Sides doubled by repetition (``"up"``), halved by the mean of 2 x 2 pixels (``"down"``), or as they are."""
    if how is None:
        return x
    return F.interpolate(x, scale_factor=2, mode="nearest") if how == "up" else F.avg_pool2d(x, 2)


class Attention(nn.Module):
    """Self-attention over all pixels, added to its input."""

    def __init__(self, channels: int, heads: int, new_order: bool):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        flat = x.flatten(2)
        batch, channels, pixels = flat.shape
        split = (3, self.heads) if self.new_order else (self.heads, 3)
        qkv = self.qkv(self.norm(flat)).reshape(batch, *split, channels // self.heads, pixels)
        # Features last in memory: 3 to 5 times as fast on the CPU as a transposed view.
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1 if self.new_order else 2)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(flat.shape)
        return (flat + self.proj_out(h)).reshape(x.shape)


class Resample(nn.Module):
    """Sides doubled by repetition and a convolution (``conv``), or halved by a strided one (``op``)."""

    def __init__(self, channels: int, how: str):
        super().__init__()
        if how == "up":
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        else:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.conv(resampled(x, "up")) if hasattr(self, "conv") else self.op(x)


class First(nn.Conv2d):
    """The first convolution, which does not look at the noise level."""

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class ADMUNet(nn.Module):
    """``(batch, C, H, W)`` and time labels ``(batch,)`` to ``(batch, C', H, W)``; sides are multiples of the stride."""

    def __init__(self, config: ADMConfig):
        super().__init__()
        self.config = c = config
        embedding, widths = 4 * c.width, [int(m * c.width) for m in c.multipliers]
        self.time_embed = nn.Sequential(nn.Linear(c.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if c.classes:
            self.label_emb = nn.Embedding(c.classes, embedding)
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(c.in_channels, widths[0], 3, padding=1)])])
        held = [now := widths[0]]
        for level, width in enumerate(widths):
            for _ in range(c.blocks):
                self.input_blocks.append(self._stage(now, width, level, c.heads))
                held.append(now := width)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([self._joint(now, "down")]))
                held.append(now)
        middle = [ResidualBlock(now, now, embedding, c.scale_shift) for _ in range(2)]
        self.middle_block = nn.ModuleList([middle[0], self._attention(now, c.heads), middle[1]])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for k in range(c.blocks + 1):
                stage = self._stage(now + held.pop(), now := widths[level], level, c.heads_up)
                if level and k == c.blocks:
                    stage.append(self._joint(now, "up"))
                self.output_blocks.append(stage)
        last = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, now), nn.SiLU(), last)

    def _stage(self, channels_in: int, channels: int, level: int, heads: int) -> nn.ModuleList:
        stage = nn.ModuleList([ResidualBlock(channels_in, channels, 4 * self.config.width, self.config.scale_shift)])
        if level in self.config.attention:
            stage.append(self._attention(channels, heads))
        return stage

    def _attention(self, channels: int, heads: int) -> Attention:
        c = self.config
        return Attention(channels, channels // c.head_channels if c.head_channels else heads, c.new_order)

    def _joint(self, channels: int, how: str) -> nn.Module:
        if not self.config.resblock_updown:
            return Resample(channels, how)
        return ResidualBlock(channels, channels, 4 * self.config.width, self.config.scale_shift, how)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        e = self.time_embed(sinusoids(label, self.config.width).to(x.dtype))
        if self.config.classes:
            e = e + self.label_emb.weight[self.config.label]
        h, held = x, []
        for stage in self.input_blocks:
            h = run(stage, h, e)
            held.append(h)
        h = run(self.middle_block, h, e)
        for stage in self.output_blocks:
            h = run(stage, torch.cat([h, held.pop()], 1), e)
        return self.out(h)


def run(stage, x: Tensor, e: Tensor) -> Tensor:
    """Every part of a stage in turn."""
    for part in stage:
        x = part(x, e)
    return x


def sinusoids(label: Tensor, width: int) -> Tensor:
    """cos and sin of ``label * 10000^(-k / (width / 2))``, k from 0: ``(batch,)`` to ``(batch, width)``."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=label.device, dtype=torch.float32) * (-math.log(10000) / half))
    phase = label.float()[:, None] * rates
    return F.pad(torch.cat([phase.cos(), phase.sin()], 1), (0, width % 2))
