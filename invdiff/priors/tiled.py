"""A prior of small images on large slices, in overlapping tiles."""

from typing import NamedTuple

import torch
from torch import Tensor

from invdiff.errors import UsageError
from invdiff.priors.base import Prior
from invdiff.priors.wrapper import Wrapper


class Cut(NamedTuple):
    """Where a tile lies along one axis, and its weights there, from 0 to 1."""

    place: slice
    weight: Tensor


def cuts(length: int, tile: int, overlap: int, stride: int = 1) -> list[Cut]:
    """Tiles along an axis of ``length`` pixels; their weights add up to 1 at every pixel.

    Tiles start at multiples of ``stride``, so that a network that halves its sides halves them at the same pixels; the
    last one ends where the axis ends. Neighbours share at least ``overlap`` pixels. Of these the outer quarter next to
    the edge of a tile has the weight 0, since a network sees no further than that edge, and the half between rises as
    sin^2. At the ends of the axis weights are 1 to the last pixel.
    """
    if length <= tile:
        return [Cut(slice(0, length), torch.ones(length, dtype=torch.float64))]
    step = (tile - overlap) // stride * stride
    starts = [*range(0, length - tile, step), length - tile]
    margin = overlap // 4
    inside = (torch.arange(tile, dtype=torch.float64) + 0.5 - margin) / (overlap - 2 * margin)
    rise = (torch.pi / 2 * inside.clamp(0, 1)).sin() ** 2
    windows = torch.zeros(len(starts), length, dtype=torch.float64)
    for row, start in zip(windows, starts, strict=True):
        row[start : start + tile] = (rise if start else 1.0) * (rise.flip(0) if start + tile < length else 1.0)
    windows /= windows.sum(0)
    return [Cut(slice(s, s + tile), row[s : s + tile]) for row, s in zip(windows, starts, strict=True)]


class Tiled(Wrapper):
    """D(x; sigma) = sum over tiles of w_t D(x on tile t; sigma), with weights w_t that add up to 1, see :func:`cuts`.

    Where the denoiser sees no further than a quarter of the overlap this is the same as the whole slice at once; where
    it sees further (attention), every tile is an image of the size that the network was trained on. Tiles of all slices
    go through the network together, ``chunk`` at a time, so that no more of them are held than slices before; ``calls``
    counts tiles.

    Args:
        prior: of tiles.
        tile: side of a tile, a multiple of the prior's ``stride``.
        overlap: of neighbours, in pixels, at most half a tile; None for a quarter of one.

    Raises:
        UsageError: sides that make no tiles.
    """

    def __init__(self, prior: Prior, tile: int, overlap: int | None = None):
        overlap = tile // 4 if overlap is None else overlap
        stride = prior.stride
        if tile < 2 * stride or tile % stride or not 4 <= overlap <= tile // 2:
            raise UsageError(
                f"tiles of {tile} pixels that overlap by {overlap}: prior {prior.info.name} needs tiles of a multiple "
                f"of {stride}, at least {max(2 * stride, 8)}, and an overlap from 4 to half a tile"
            )
        super().__init__(prior, f"tiles of {tile} pixels, overlapping by {overlap}")
        self.tile, self.overlap = tile, overlap

    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        """See :class:`Prior`."""
        rows, columns = (cuts(n, self.tile, self.overlap, self.stride) for n in x.shape[-2:])
        if len(rows) == len(columns) == 1:
            return self.prior.denoise(x, sigma, context)
        flat = x.reshape(-1, *x.shape[-3:])
        out = torch.zeros_like(flat)
        tiles = [(n, row, column) for n in range(len(flat)) for row in rows for column in columns]
        for k in range(0, len(tiles), self.chunk):
            group = tiles[k : k + self.chunk]
            parts = torch.stack([flat[n, :, row.place, column.place] for n, row, column in group])
            for (n, row, column), part in zip(group, self.prior.denoise(parts[None], sigma, context)[0], strict=True):
                weight = row.weight[:, None] * column.weight
                out[n, :, row.place, column.place] += weight.to(part) * part
        return out.reshape(x.shape)

    def restrict(self, slices: slice) -> "Tiled":
        """The prior of those slices."""
        return Tiled(self.prior.restrict(slices), self.tile, self.overlap)
