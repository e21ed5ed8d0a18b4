"""Interpolation between parallel lines of samples, the inner loop of cone-beam projection and backprojection.

``out[d, r] = sum_g t^power * L_g(place[d, g], a r + b)``, where L_g is the bilinear interpolant, zero outside, of group
g of a stack of lines, and ``a = affine[0] t``, ``b = affine[1] + affine[2] t`` with ``t = t[d, g] > 0``.

In Joseph's projection a group is a plane of the volume that rays step through, its lines run along z, d is a column of
the detector in one view and r its rows: a ray column stands at one place in a plane, and its rows meet the line there
at equal distances. In the backprojection of Feldkamp et al. the parts are swapped: a group is a filtered view, its
lines are detector columns, d is a column of voxels along z.

Each weight is a product of numbers that come from ``place`` and ``t`` in double precision, so that the transpose
has exactly the weights of the sum. Both run on any device in torch, on the CPU compiled by numba where it is installed.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from invdiff.operators.projector import multiply
from invdiff.operators.rays import SparseRows

_log = logging.getLogger("invdiff")
TABLE = 2**20
"""Entries of a table of places at a time; on a GPU 16 times as many."""
BLOCK = 2**15
"""Samples handled at a time by torch on the CPU, which stay in the cache; 2**18 takes twice as long."""
LARGE = 10**8
"""Interpolated samples in a sum that is worth a hint to install numba."""


@dataclass(frozen=True, eq=False)
class Lines:
    """One sum over lines and its transpose.

    Attributes:
        groups: number of groups G.
        across: lines of a group.
        length: samples of a line.
        items: number of outputs D, each a line itself.
        count: samples of an output line.
        table: ``table(items)`` gives ``place`` and ``t`` of a range of outputs, ``(range, G)`` float64 on the device.
        affine: of positions along the line, in samples.
        least: lower bound of ``affine[0] * t`` wherever ``place`` lies within a line of the group.
        power: of t, 0 or 2.
    """

    groups: int
    across: int
    length: int
    items: int
    count: int
    table: Callable[[slice], tuple[Tensor, Tensor]]
    affine: tuple[float, float, float]
    least: float
    power: int = 0

    def sample(self, lines: Tensor) -> Tensor:
        """The sum, ``(G, across, length) -> (D, count)``."""
        out = lines.new_zeros(self.items, self.count)
        backend = _backend(self, lines)
        for at, place, t in self._parts(lines.device):
            backend.sample(self, lines, place, t, out[at])
        return out

    def spread(self, values: Tensor) -> Tensor:
        """The transpose, ``(D, count) -> (G, across, length)``."""
        out = values.new_zeros(self.groups, self.across, self.length)
        backend = _backend(self, values)
        for at, place, t in self._parts(values.device):
            backend.spread(self, values[at], place, t, out)
        return out

    def square_sum(self, squares: Tensor) -> float:
        """Sum of all squared weights, those of output sample (d, r) multiplied by ``squares[d, r]``, ``(D, count)``."""
        total = torch.zeros((), dtype=torch.float64, device=squares.device)
        for at, place, t in self._parts(squares.device):
            for block in _blocks(place, self.count):
                for p, s in zip(place[block].T, t[block].T, strict=True):
                    rows = (_squares(self.positions(s), self.length) * squares[at][block]).sum(1)
                    total += (_squares(p, self.across) * s ** (2 * self.power) * rows).sum()
        return float(total)

    def positions(self, t: Tensor) -> Tensor:
        """Where the samples of output lines lie on the line that they meet, ``(range,) -> (range, count)``."""
        r = torch.arange(self.count, dtype=t.dtype, device=t.device)
        return (self.affine[0] * t)[:, None] * r + (self.affine[1] + self.affine[2] * t)[:, None]

    def _parts(self, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
        step = max(1, TABLE * (1 if device.type == "cpu" else 16) // self.groups)
        for first in range(0, self.items, step):
            at = slice(first, min(first + step, self.items))
            place, t = self.table(at)
            yield at, place.contiguous(), t.contiguous()


@cache
def _compiled():
    """The compiled sums, or None without numba."""
    try:
        from invdiff.operators import lines_numba
    except ImportError:
        return None
    return lines_numba


HINT = "cone beam on the CPU is 6 to 11 times as fast with numba: pip install 'invdiff[fast]'"


def advice(device: torch.device) -> tuple[str, ...]:
    """The hint to install numba, where the sums run on the CPU without it."""
    return (HINT,) if device.type == "cpu" and _compiled() is None else ()


@cache
def _hint() -> None:
    _log.warning(HINT)


def _backend(lines: Lines, x: Tensor):
    """The compiled sums for tensors on the CPU where numba is installed, else those of this module."""
    compiled = _compiled() if x.device.type == "cpu" else None
    if compiled is None and x.device.type == "cpu" and lines.items * lines.groups * lines.count > LARGE:
        _hint()
    return compiled or Torch


def _squares(position: Tensor, size: int) -> Tensor:
    """Sum of the squared weights of both neighbours of a position, those outside left out."""
    low = position.clamp(-1, size).floor()
    part = position.clamp(-1, size) - low
    return (1 - part).square() * ((low >= 0) & (low < size)) + part.square() * (low < size - 1)


class Torch:
    """The sums in torch, one group after another."""

    @staticmethod
    def sample(lines: Lines, x: Tensor, place: Tensor, t: Tensor, out: Tensor) -> None:
        """Add the sum over ``x`` ``(G, across, length)`` to ``out``, the outputs of ``place`` and ``t``."""
        padded = functional.pad(x, (1, 2, 1, 2))  # zeros outside
        for block in _blocks(place, lines.count):
            for group, p, s in zip(padded, place[block].T, t[block].T, strict=True):
                low, part = _split(p, lines.across)
                line = multiply(_two_lines(low, _shares(part, s, lines, x.dtype)), group)
                k, part = _split(lines.positions(s), lines.length)
                near = line.gather(1, k)
                out[block] += near.lerp_(line.gather(1, k.add_(1)), part.to(x.dtype))

    @staticmethod
    def spread(lines: Lines, y: Tensor, place: Tensor, t: Tensor, out: Tensor) -> None:
        """Add the transpose to ``out``: sample k of a line collects the r with ``|a r + b - k| < 1``, in order."""
        most = min(lines.count, math.floor(2 / lines.least) + 2)
        padded = functional.pad(y, (0, most))
        line = y.new_empty(len(y), lines.length)
        for group, p, s in zip(out, place.T, t.T, strict=True):
            for block in _blocks(place, lines.length):
                _collect(lines, padded[block], s[block], most, line[block])
            low, part = _split(p, lines.across)
            group.add_(multiply(_by_line(low, _shares(part, s, lines, y.dtype), lines.across), line))


def _collect(lines: Lines, padded: Tensor, t: Tensor, most: int, out: Tensor) -> None:
    """Transposed interpolation along lines: ``(D, count + most) -> out (D, length)``, each from ``most`` neighbours."""
    k = torch.arange(lines.length, dtype=t.dtype, device=t.device)
    a = (lines.affine[0] * t).clamp_(min=lines.least)[:, None]
    from_k = (lines.affine[1] + lines.affine[2] * t)[:, None] - k
    r = ((-1 - from_k) / a).clamp_(0, lines.count).ceil_()
    distance = from_k.addcmul_(a, r).to(out.dtype)
    r, a = r.long(), a.to(out.dtype)
    out.zero_()
    for j in range(most):
        if j:
            distance += a
            r += 1
        out.addcmul_(padded.gather(1, r), (1 - distance.abs()).clamp_(min=0))


def _blocks(place: Tensor, width: int) -> Iterator[slice]:
    """Ranges of outputs of ``width`` samples that are handled at a time; all of them on a GPU."""
    step = max(1, BLOCK // width) if place.device.type == "cpu" else len(place)
    for first in range(0, len(place), step):
        yield slice(first, min(first + step, len(place)))


def _split(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Lower neighbour, counted from the sample before the first one, and the share of the upper one."""
    position = position.clamp(-1, size).add_(1)
    low = position.long()
    return low, position.sub_(low)


def _shares(part: Tensor, t: Tensor, lines: Lines, dtype: torch.dtype) -> Tensor:
    """Weights of the lower and the upper line, ``(2, D)``."""
    both = torch.stack([1 - part, part])
    return (both * t**lines.power if lines.power else both).to(dtype)


def _two_lines(low: Tensor, shares: Tensor) -> SparseRows:
    """Items as sums over the lines ``low`` and ``low + 1``."""
    ends = torch.arange(0, 2 * len(low) + 1, 2, device=low.device)
    return SparseRows(ends, torch.stack([low, low + 1], 1).view(-1), shares.T.reshape(-1))


def _by_line(low: Tensor, shares: Tensor, across: int) -> SparseRows:
    """Lines as sums over the items between the lines ``low - 1`` and ``low``; what is outside is left out."""
    line, order = torch.cat([low - 1, low]).sort(stable=True)
    ends = torch.searchsorted(line, torch.arange(across + 1, device=low.device))
    values = torch.where((line >= 0) & (line < across), shares.view(-1)[order], 0.0)
    ends[0], ends[-1] = 0, len(line)  # what lies outside joins the first and the last line with the weight 0
    return SparseRows(ends, order % len(low), values)
