"""NCSN++, DDPM++ and DDPM of score_sde with the names of their published checkpoints.

Song et al. 2021, appendix H. Modules are numbered as in the files: ``all_modules.4.Conv_0.weight`` is the first
convolution of the residual block that is the fifth module of the network.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invdiff.errors import PriorError
from invdiff.priors.layers import frequencies_down
from invdiff.priors.ncsnpp_layers import ACTIVATIONS, Attention, Block, Combine, Fourier, Scaled, normed

JOINTS = ("none", "skip", "residual")
_HALF = math.sqrt(0.5)


@dataclass(frozen=True)
class NCSNppConfig:
    """Shape of the network; JSON-safe.

    Args:
        channels: image channels.
        width: features of multiplier 1 (``nf``).
        blocks: residual blocks of a level (``num_res_blocks``).
        multipliers: of ``width``, level by level, finest first (``ch_mult``).
        attention: levels with self-attention, counted from 0.
        fourier: the logarithm of the noise level in random frequencies, else sines of the time (``embedding_type``).
        biggan: residual blocks change the sides themselves, else layers between them do (``resblock_type``).
        fir: sides change through the filter ``taps``, else by repetition and means (``fir``, ``fir_kernel``).
        rescale: sums are divided by sqrt(2) (``skip_rescale``).
        inward, outward: smaller images beside the encoder and the decoder, one of ``JOINTS``
            (``progressive_input``, ``progressive``).
        cat: images are joined to features, else added (``progressive_combine``).
        centered: images from -1 to 1, else from 0 to 1.
        activation: name in ``ACTIVATIONS``.
        fixed_groups: norms in 32 groups as in DDPM, else of at least four channels each.

    Raises:
        PriorError: numbers that make no network, or an absurd one.
    """

    channels: int
    width: int
    blocks: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]
    fourier: bool = True
    biggan: bool = True
    fir: bool = True
    taps: tuple[float, ...] = (1, 3, 3, 1)
    rescale: bool = True
    inward: str = "none"
    outward: str = "none"
    cat: bool = False
    centered: bool = False
    activation: str = "swish"
    fixed_groups: bool = False

    def __post_init__(self):
        widths = [m * self.width for m in self.multipliers]
        sound = 1 <= self.blocks <= 16 and 1 <= len(widths) <= 10 and self.channels >= 1
        if not sound or any(not 4 <= w <= 16384 for w in widths) or not set(self.attention) <= set(range(len(widths))):
            raise PriorError(
                f"NCSN++ with {self.blocks} blocks on levels of {widths} channels, attention on {self.attention}: "
                "correct the configuration (1 to 16 blocks, 1 to 10 levels, 4 to 16384 channels)"
            )
        for value in (self.inward, self.outward):
            if value not in JOINTS:
                raise PriorError(f"NCSN++ with progressive '{value}': one of {', '.join(JOINTS)} can be built")
        if self.activation not in ACTIVATIONS:
            raise PriorError(
                f"NCSN++ with nonlinearity '{self.activation}': one of {', '.join(ACTIVATIONS)} can be built"
            )
        if len(self.taps) not in (2, 4, 6, 8) or sum(self.taps) == 0:
            raise PriorError(f"NCSN++ with fir_kernel {self.taps}: give 2, 4, 6 or 8 numbers, as 1,3,3,1")

    @property
    def stride(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass
class Pass:
    """What goes through the network: features, embedding of the noise level, images beside encoder and decoder, and
    features held for the decoder."""

    h: Tensor
    e: Tensor
    inward: Tensor
    outward: Tensor
    held: list[Tensor] = field(default_factory=list)


class NCSNpp(nn.Module):
    """``(batch, C, H, W)`` and labels ``(batch,)`` to ``(batch, C, H, W)``; sides are multiples of the stride.

    The label is the noise level where ``fourier``, else the time. What the original divides by the noise level
    (``scale_by_sigma``) is not divided here: the convention says so.
    """

    def __init__(self, config: NCSNppConfig):
        super().__init__()
        self.config, self.act = config, ACTIVATIONS[config.activation]
        self.plan: list[tuple[str, int]] = []
        self.all_modules = nn.ModuleList()
        self._entrance()
        widths = self._encoder()
        self._middle(widths[-1])
        self._decoder(widths)

    def _add(self, step: str, module: nn.Module | None = None) -> None:
        self.plan.append((step, len(self.all_modules)))
        if module is not None:
            self.all_modules.append(module)

    def _entrance(self) -> None:
        c = self.config
        if c.fourier:
            self.all_modules.append(Fourier(c.width))
        self.all_modules.append(nn.Linear(c.width * (2 if c.fourier else 1), 4 * c.width))
        self.all_modules.append(nn.Linear(4 * c.width, 4 * c.width))
        self._add("layer", nn.Conv2d(c.channels, c.width, 3, padding=1))
        self._add("hold")

    def _block(self, channels_in: int, channels: int, resample: str | None = None) -> None:
        self._add("block", Block(self.config, channels_in, channels, resample))

    def _attention(self, channels: int) -> None:
        self._add("layer", Attention(self.config, channels))

    def _encoder(self) -> list[int]:
        """Channels of everything that is held for the decoder."""
        c, now, beside = self.config, self.config.width, self.config.channels
        held = [now]
        for level, multiplier in enumerate(c.multipliers):
            for _ in range(c.blocks):
                self._block(now, now := multiplier * c.width)
                if level in c.attention:
                    self._attention(now)
                self._add("hold")
                held.append(now)
            if level == len(c.multipliers) - 1:
                return held
            if c.biggan:
                self._block(now, now, "down")
            else:
                self._add("layer", Scaled(c, now, now, "down"))
            if c.inward == "skip":
                self._add("inward skip", Combine(beside, now, c.cat))
                now *= 2 if c.cat else 1
            elif c.inward == "residual":
                self._add("inward residual", Scaled(c, beside, now, "down"))
                beside = now
            self._add("hold")
            held.append(now)
        return held

    def _middle(self, channels: int) -> None:
        self._block(channels, channels)
        self._attention(channels)
        self._block(channels, channels)

    def _decoder(self, held: list[int]) -> None:
        c, now, beside = self.config, held[-1], 0
        for level in reversed(range(len(c.multipliers))):
            for _ in range(c.blocks + 1):
                self._add("join")
                self._block(now + held.pop(), now := c.multipliers[level] * c.width)
            if level in c.attention:
                self._attention(now)
            beside = self._outward(now, beside)
            if level and c.biggan:
                self._block(now, now, "up")
            elif level:
                self._add("layer", Scaled(c, now, now, "up"))
        if c.outward != "skip":
            self.all_modules.append(normed(c, now))
            self.all_modules.append(nn.Conv2d(now, c.channels, 3, padding=1))

    def _outward(self, channels: int, beside: int) -> int:
        """The image beside the decoder at one level; ``beside`` is its channels at the coarser one, 0 at the first."""
        c = self.config
        if c.outward == "none":
            return 0
        if c.outward == "residual" and beside:
            self._add("outward residual", Scaled(c, beside, channels, "up"))
            return channels
        after = c.channels if c.outward == "skip" else channels
        self._add("outward skip" if beside else "outward first", normed(c, channels))
        self.all_modules.append(nn.Conv2d(channels, after, 3, padding=1))
        return after

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        c, modules = self.config, iter(self.all_modules)
        e = next(modules)(label) if c.fourier else sines(label, c.width)
        first, second = next(modules), next(modules)
        precision = next(first.parameters()).dtype
        e = second(self.act(first(e.to(precision))))
        x = x.to(precision) if c.centered else 2 * x.to(precision) - 1
        state = Pass(x, e, x, x)
        for step, index in self.plan:
            STEPS[step](self, state, index)
        if c.outward == "skip":
            return state.outward
        norm, conv = self.all_modules[-2:]
        return conv(self.act(norm(state.h)))

    def halved(self, x: Tensor) -> Tensor:
        """A sum of two, rescaled where the network does so."""
        return x * _HALF if self.config.rescale else x


def _layer(net: NCSNpp, state: Pass, k: int) -> None:
    state.h = net.all_modules[k](state.h)


def _block(net: NCSNpp, state: Pass, k: int) -> None:
    state.h = net.all_modules[k](state.h, state.e)


def _hold(net: NCSNpp, state: Pass, k: int) -> None:
    state.held.append(state.h)


def _join(net: NCSNpp, state: Pass, k: int) -> None:
    state.h = torch.cat([state.h, state.held.pop()], 1)


def _inward_skip(net: NCSNpp, state: Pass, k: int) -> None:
    state.inward = Scaled.plain(net.config, state.inward, "down")
    state.h = net.all_modules[k](state.inward, state.h)


def _inward_residual(net: NCSNpp, state: Pass, k: int) -> None:
    state.h = state.inward = net.halved(net.all_modules[k](state.inward) + state.h)


def _outward_first(net: NCSNpp, state: Pass, k: int) -> None:
    state.outward = net.all_modules[k + 1](net.act(net.all_modules[k](state.h)))


def _outward_skip(net: NCSNpp, state: Pass, k: int) -> None:
    before = Scaled.plain(net.config, state.outward, "up")
    _outward_first(net, state, k)
    state.outward = before + state.outward


def _outward_residual(net: NCSNpp, state: Pass, k: int) -> None:
    state.h = state.outward = net.halved(net.all_modules[k](state.outward) + state.h)


STEPS: dict[str, Callable[[NCSNpp, Pass, int], None]] = {
    "layer": _layer,
    "block": _block,
    "hold": _hold,
    "join": _join,
    "inward skip": _inward_skip,
    "inward residual": _inward_residual,
    "outward first": _outward_first,
    "outward skip": _outward_skip,
    "outward residual": _outward_residual,
}


def build(config: NCSNppConfig) -> NCSNpp:
    """The network of a configuration.

    Raises:
        PriorError: channels that cannot be normalised in groups.
    """
    try:
        return NCSNpp(config)
    except ValueError as error:
        raise PriorError(
            f"NCSN++ of width {config.width} cannot be built ({error}); correct the configuration"
        ) from None


def sines(label: Tensor, width: int) -> Tensor:
    """sin and cos of ``label * 10000^(-k / (width / 2 - 1))``, k from 0: ``(batch,)`` to ``(batch, width)``."""
    half = width // 2
    phase = label.float()[:, None] * frequencies_down(half, half - 1, label.device)
    return F.pad(torch.cat([phase.sin(), phase.cos()], 1), (0, width % 2))
