"""A prior of slices on all three planes of a volume."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from invdiff.priors.base import Prior
from invdiff.priors.wrapper import Wrapper

AXES = (-4, -2, -1)  # of (slices, channels, rows, columns): the one along which the images of a plane lie


def swapped(x: Tensor, plane: int) -> Tensor:
    """``(..., slices, C, H, W)`` as images of another plane; its own inverse.

    Args:
        x: a stack.
        plane: 0 for the slices as they are, 1 for planes of slices and columns, ``(..., H, C, slices, W)``, 2 for
            planes of rows and slices, ``(..., W, C, H, slices)``.
    """
    return x.transpose(AXES[0], AXES[plane]).contiguous() if plane else x


class Planes(Wrapper):
    """D(x; sigma) = the mean over the three planes of D on the images of that plane; of a single slice its own alone.
    With ``turned`` D(x; sigma) is that of the slices, and only ``denoise_turned`` goes through the planes.

    What data of thick slices lack lies in the planes across them: every slice by itself can look right and the stack
    still be made of steps. Pixels are taken as they are, longer than wide where slices are further apart than pixels.
    Taking every n-th column, which makes them square, cost 0.1 to 0.3 dB on two validation subjects and a training
    subject (slices 1.8 to 8 pixels apart), and gained 0.2 dB on another training subject.

    ``denoise_turned`` takes one plane, which ``turn // 3`` numbers: a solver that counts its turns in threes sees every
    plane in every turn within 24 steps, at the cost of slices alone but for padding. With a gradient
    the images of a plane go through the network ``chunk`` at a time, and are computed again on the way back. ``calls``
    counts a pass over the stack as one per slice, in any plane.

    Source: S. Lee et al., ICCV 2023 (TPDM), with one prior for all planes, and no auxiliary ones.

    Args:
        prior: of images, each by itself.
        turned: planes in ``denoise_turned`` alone.
    """

    def __init__(self, prior: Prior, turned: bool = False):
        super().__init__(prior, "slices and the two planes across them, as images" + turned * ", plane by plane")
        self.turned, self._counted = turned, 0
        if not turned:
            self.slicewise, self.passes = False, len(AXES)

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Of the network within, in slices."""
        return self._counted

    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        """See :class:`Prior`; ``x`` is ``(..., slices, channels, H, W)``, of the whole stack."""
        if self.turned:
            return self._in(0, x, lambda v: self.prior.denoise(v, sigma, context))
        first, *others = planes = self._planes(x)
        total = self._in(first, x, lambda v: self._in_groups(v, sigma, context))
        for plane in others:
            total = total + self._in(plane, x, lambda v: self._in_groups(v, sigma, context))
        return total / len(planes)

    def denoise_turned(self, x: Tensor, sigma: float, turn: int) -> Tensor:
        """T^-1 D(T x; sigma) on the images of one plane."""
        planes = self._planes(x)
        plane = planes[turn // 3 % len(planes)]
        return self._in(plane, x, lambda v: self.prior.denoise_turned(v, sigma, turn))

    @staticmethod
    def _planes(x: Tensor) -> range:
        return range(len(AXES) if x.shape[AXES[0]] > 1 else 1)

    def _in(self, plane: int, x: Tensor, denoise: Callable[[Tensor], Tensor]) -> Tensor:
        before, images, chunk = self.prior.calls, x.shape[AXES[plane]], self.prior.chunk
        there = swapped(x, plane)
        if not x.requires_grad:  # images across few slices are small: as many pixels a call as of slices
            size, own = (self._padded(v) for v in (x, there))
            self.prior.chunk = chunk * max(1, size // own)
        try:
            out = swapped(denoise(there), plane)
        finally:
            self.prior.chunk = chunk
        self._counted += (self.prior.calls - before) * x.shape[AXES[0]] // images
        return out

    def _padded(self, x: Tensor) -> int:
        """Pixels of an image in the network, which may see tiles of it."""
        sides = (min(n, self.info.size or n) for n in x.shape[-2:])
        return math.prod(-(-n // self.stride) * self.stride for n in sides)

    def _in_groups(self, x: Tensor, sigma: float, context) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.prior.denoise(x, sigma, context)
        groups = x.split(self.chunk, AXES[0])
        if len(groups) == 1:
            return self.prior.denoise(x, sigma, context)
        run = lambda v: checkpoint(self.prior.denoise, v, sigma, context, use_reentrant=False)  # noqa: E731
        return torch.cat([run(v) for v in groups], AXES[0])
