"""The U-Nets of EDM (SongUNet, DhariwalUNet) with the names of its published checkpoints.

Karras et al. 2022, appendix F: DDPM++ and NCSN++ after Song et al. 2021, ADM after Dhariwal and Nichol 2021. Modules
are named after the side of the image in the training: ``dec.32x32_block0.conv0.weight``. deepinv's ``NCSNpp`` and
``ADMUNet`` and the networks of PFGM++ and InverseBench have the same names.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invdiff.errors import PriorError
from invdiff.priors.adm import check_class
from invdiff.priors.edm_layers import Block, Conv, Fourier, normed
from invdiff.priors.layers import frequencies_down

KINDS = ("SongUNet", "DhariwalUNet")
ENCODERS = ("standard", "skip", "residual")


@dataclass(frozen=True)
class EDMConfig:
    """Shape of the network; JSON-safe.

    Args:
        kind: one of ``KINDS``.
        size: pixels of an image side in the training, a part of the names; images of other sizes go through as well.
        in_channels, out_channels: twice as many come out where the variance is learned.
        width: features of multiplier 1 (``model_channels``).
        blocks: residual blocks of a level (``num_blocks``).
        multipliers: of ``width``, level by level, finest first (``channel_mult``).
        attention: levels with self-attention, counted from 0.
        noise, embedding: widths of what is made of the noise level, as multiples of ``width`` (``channel_mult_noise``,
            ``channel_mult_emb``).
        fourier: the label in random frequencies, else sines (``embedding_type``).
        taps: length of the filter for sides that double or halve, 2 or 4; its numbers are in the file.
        encoder: one of ``ENCODERS`` (``encoder_type``).
        skip_decoder: an image beside the decoder (``decoder_type``).
        classes: number of class labels, 0 without.
        label: the class that is asked for.
        augmented: width of the augmentation labels of the training, which are not used here.
        fixed_groups: norms in 32 groups as in deepinv's port, else of at least four channels each; the same from 128
            channels on.

    Raises:
        PriorError: numbers that make no network, or an absurd one.
    """

    kind: str
    size: int
    in_channels: int
    out_channels: int
    width: int
    blocks: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]
    noise: int = 1
    embedding: int = 4
    fourier: bool = False
    taps: int = 2
    encoder: str = "standard"
    skip_decoder: bool = False
    classes: int = 0
    label: int | None = None
    augmented: int = 0
    fixed_groups: bool = False

    def __post_init__(self):
        widths = [m * self.width for m in self.multipliers]
        sound = 1 <= self.blocks <= 16 and 1 <= len(widths) <= 10 and self.in_channels >= 1 and self.out_channels >= 1
        if not sound or any(not 4 <= w <= 16384 for w in widths) or not set(self.attention) <= set(range(len(widths))):
            raise PriorError(
                f"EDM network with {self.blocks} blocks on levels of {widths} channels, attention on {self.attention}: "
                "correct the configuration (1 to 16 blocks, 1 to 10 levels, 4 to 16384 channels)"
            )
        known = self.kind in KINDS and self.encoder in ENCODERS and self.taps in (2, 4)
        if not known or not (self.size >= 1 and 1 <= self.noise <= 16 and 1 <= self.embedding <= 64):
            raise PriorError(
                f"EDM network '{self.kind}' of size {self.size}, encoder '{self.encoder}', filter of {self.taps}: "
                f"kinds are {', '.join(KINDS)}, encoders {', '.join(ENCODERS)}, filters have 2 or 4 numbers"
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

    @property
    def song(self) -> bool:
        """Whether it is DDPM++ or NCSN++, not ADM."""
        return self.kind == "SongUNet"


class EDMUNet(nn.Module):
    """``(batch, C, H, W)`` and labels ``(batch,)`` to ``(batch, C', H, W)``; sides are multiples of the stride."""

    def __init__(self, config: EDMConfig):
        super().__init__()
        self.config = c = config
        noise, embedding = c.noise * c.width, c.embedding * c.width
        if c.fourier:
            self.map_noise = Fourier(noise // 2)
        if c.classes:
            self.map_label = nn.Linear(c.classes, noise if c.song else embedding, bias=c.song)
        if c.augmented:
            self.map_augment = nn.Linear(c.augmented, noise, bias=False)
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self._decoder(self._encoder())
        if not c.song:
            self.out_norm = normed(c, c.multipliers[0] * c.width, 1e-5)
            self.out_conv = Conv(c.multipliers[0] * c.width, c.out_channels, 3)

    def _encoder(self) -> list[int]:
        """Channels of everything that is held for the decoder."""
        c, beside, held = self.config, self.config.in_channels, []
        now = c.width if c.song else c.multipliers[0] * c.width
        for level, multiplier in enumerate(c.multipliers):
            side = f"{c.size >> level}x{c.size >> level}"
            if level == 0:
                self.enc[f"{side}_conv"] = Conv(c.in_channels, now, 3)
            else:
                self.enc[f"{side}_down"] = Block(c, now, now, resample="down")
                if c.encoder == "skip":
                    self.enc[f"{side}_aux_down"] = Conv(beside, beside, 0, "down", c.taps)
                    self.enc[f"{side}_aux_skip"] = Conv(beside, now, 1)
                elif c.encoder == "residual":
                    self.enc[f"{side}_aux_residual"] = Conv(beside, now, 3, "down", c.taps, fused=True)
                    beside = now
            held.append(now)
            for k in range(c.blocks):
                self.enc[f"{side}_block{k}"] = Block(c, now, now := multiplier * c.width, level in c.attention)
                held.append(now)
        return held

    def _decoder(self, held: list[int]) -> None:
        c, now, last = self.config, held[-1], len(self.config.multipliers) - 1
        for level in reversed(range(last + 1)):
            side = f"{c.size >> level}x{c.size >> level}"
            if level == last:
                self.dec[f"{side}_in0"] = Block(c, now, now, True)
                self.dec[f"{side}_in1"] = Block(c, now, now)
            else:
                self.dec[f"{side}_up"] = Block(c, now, now, resample="up")
            for k in range(c.blocks + 1):
                attends = level in c.attention and (k == c.blocks or not c.song)
                width = c.multipliers[level] * c.width
                self.dec[f"{side}_block{k}"] = Block(c, now + held.pop(), width, attends)
                now = width
            if c.song and (c.skip_decoder or level == 0):
                if c.skip_decoder and level < last:
                    self.dec[f"{side}_aux_up"] = Conv(c.out_channels, c.out_channels, 0, "up", c.taps)
                self.dec[f"{side}_aux_norm"] = normed(c, now, 1e-6)
                self.dec[f"{side}_aux_conv"] = Conv(now, c.out_channels, 3)

    def _embedding(self, label: Tensor) -> Tensor:
        c, half = self.config, self.config.noise * self.config.width // 2
        if c.fourier:
            phase = self.map_noise(label)
        else:
            phase = label.float()[:, None] * frequencies_down(half, half - 1 if c.song else half, label.device)
        parts = (phase.sin(), phase.cos()) if c.song else (phase.cos(), phase.sin())
        e = torch.cat(parts, 1).to(self.map_layer0.weight.dtype)
        if not c.song:
            e = self.map_layer1(F.silu(self.map_layer0(e)))
            return F.silu(e + self.map_label.weight[:, c.label] if c.classes else e)
        if c.classes:
            e = e + math.sqrt(c.classes) * self.map_label.weight[:, c.label] + self.map_label.bias
        return F.silu(self.map_layer1(F.silu(self.map_layer0(e))))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        e, beside = self._embedding(label), x
        held: list[Tensor] = []
        for name, part in self.enc.items():
            if name.endswith("aux_down"):
                beside = part(beside)
            elif name.endswith("aux_skip"):
                x = held[-1] = x + part(beside)
            elif name.endswith("aux_residual"):
                x = held[-1] = beside = (x + part(beside)) * math.sqrt(0.5)
            else:
                x = part(x, e)
                held.append(x)
        image, normal = None, x
        for name, part in self.dec.items():
            if name.endswith("aux_up"):
                image = part(image)
            elif name.endswith("aux_norm"):
                normal = part(x)
            elif name.endswith("aux_conv"):
                image = part(F.silu(normal)) + (0 if image is None else image)
            else:
                x = part(torch.cat([x, held.pop()], 1) if "block" in name else x, e)
        return self.out_conv(F.silu(self.out_norm(x))) if image is None else image


def build(config: EDMConfig) -> EDMUNet:
    """The network of a configuration.

    Raises:
        PriorError: channels that cannot be normalised in groups or divided among heads.
    """
    try:
        return EDMUNet(config)
    except ValueError as error:
        raise PriorError(f"EDM network of width {config.width} cannot be built ({error}); correct it") from None
