"""Cartesian sampling masks of k-space: which samples a scan measures, as pure functions of shape, options and seed.

k-space is centred: its zero frequency is at (H // 2, W // 2). Columns are phase-encoding lines; the readout runs along
the rows of a column and is measured whole, except for the 2D pattern, where both axes are phase encoding.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from invdiff.errors import UsageError, choose

Mask = NDArray[np.bool_]


def make_mask(
    shape: tuple[int, int],
    pattern: str = "equispaced",
    acceleration: float = 4.0,
    center_fraction: float = 0.08,
    partial_fourier: float = 1.0,
    seed: int = 0,
) -> tuple[Mask, float]:
    """A sampling mask with a fully sampled centre.

    Args:
        shape: (H, W).
        pattern: "equispaced", "random" or "gaussian" (denser towards the centre) choose columns; "poisson" chooses
            points, a variable-density Poisson disc.
        acceleration: samples of the kept part of k-space / samples measured, centre included; >= 1.
        center_fraction: fully sampled share of the columns, or of each side of the centre rectangle of "poisson",
            in [0, 1]. The zero frequency is measured in any case.
        partial_fourier: kept share of the columns, in [0.5, 1]; the columns of high index are never measured, except
            where they belong to the centre.
        seed: of the random choices, >= 0; for "equispaced" of the offset.

    Returns:
        The mask, boolean ``(H, W)``, and the acceleration achieved, H * W / samples measured: larger than the one asked
        for by the part that partial Fourier omits, otherwise equal within the rounding to whole columns or points.

    Raises:
        UsageError: an unknown pattern, a value out of range, or a centre larger than the samples allowed.
    """
    draw = choose(pattern, PATTERNS, "sampling pattern")
    _check_options(shape, acceleration, center_fraction, partial_fourier, seed)
    height, width = int(shape[0]), int(shape[1])
    grid = (height, width) if pattern == "poisson" else (1, width)
    centre = _centre(grid, center_fraction)
    kept = np.zeros(grid, bool)
    kept[:, : math.ceil(partial_fourier * width - 1e-9)] = True
    kept |= centre
    budget = max(1, round(int(kept.sum()) / acceleration))
    if centre.sum() > budget:
        raise UsageError(
            f"the fully sampled centre has {centre.sum()} of the {budget} samples that acceleration {acceleration:g} "
            f"allows: lower center_fraction ({center_fraction:g}) or the acceleration"
        )
    mask = draw(centre, kept, budget, np.random.default_rng(seed))
    mask = np.ascontiguousarray(np.broadcast_to(mask, (height, width)))
    return mask, float(mask.size / mask.sum())


def _check_options(shape, acceleration, center_fraction, partial_fourier, seed) -> None:
    if len(shape) != 2 or any(int(n) != n or n < 1 for n in shape):
        raise UsageError(f"shape must be (H, W) with positive whole numbers, got {tuple(shape)}")
    if not (math.isfinite(acceleration) and acceleration >= 1):
        raise UsageError(f"acceleration must be at least 1 (1 measures everything), got {acceleration}")
    if not 0 <= center_fraction <= 1:
        raise UsageError(f"center_fraction is a share from 0 to 1, got {center_fraction}")
    if not 0.5 <= partial_fourier <= 1:
        raise UsageError(f"partial_fourier is the kept share of k-space, from 0.5 to 1, got {partial_fourier}")
    if int(seed) != seed or seed < 0:
        raise UsageError(f"seed must be a whole number from 0, got {seed}")


def _centre(grid: tuple[int, int], fraction: float) -> Mask:
    """The central rectangle, at least one sample wide; an even width has one more sample on the side of index 0."""
    centre = np.zeros(grid, bool)
    sides = [max(1, round(fraction * n)) for n in grid]
    rows, columns = (slice(n // 2 - s // 2, n // 2 - s // 2 + s) for n, s in zip(grid, sides, strict=True))
    centre[rows, columns] = True
    return centre


def _equispaced(centre: Mask, kept: Mask, budget: int, rng: np.random.Generator) -> Mask:
    """Even steps through the columns outside of the centre, as in fastMRI's adjusted equispaced masks."""
    mask, outside = centre.copy(), np.flatnonzero(kept & ~centre)
    lines = budget - int(centre.sum())
    steps = (np.arange(lines) + rng.random()) * (len(outside) / max(lines, 1))
    mask.flat[outside[np.minimum(steps.astype(int), len(outside) - 1)]] = True
    return mask


def _random(centre: Mask, kept: Mask, budget: int, rng: np.random.Generator) -> Mask:
    """Columns outside of the centre, all equally likely."""
    mask, outside = centre.copy(), np.flatnonzero(kept & ~centre)
    mask.flat[rng.choice(outside, budget - int(centre.sum()), replace=False)] = True
    return mask


def _gaussian(centre: Mask, kept: Mask, budget: int, rng: np.random.Generator) -> Mask:
    """Columns drawn without replacement from a Gaussian around k = 0, standard deviation W / 6."""
    mask, outside = centre.copy(), np.flatnonzero(kept & ~centre)
    lines, width = budget - int(centre.sum()), centre.shape[1]
    if lines:
        odds = np.exp(-0.5 * ((outside - width // 2) / (width / 6)) ** 2)
        mask.flat[rng.choice(outside, lines, replace=False, p=odds / odds.sum())] = True
    return mask


def _poisson(centre: Mask, kept: Mask, budget: int, rng: np.random.Generator) -> Mask:
    """Variable-density Poisson disc, ``radius = 1 + slope * distance from the centre``, by dart throwing.

    Distances from the centre are relative to half the side, radii in samples. The slope is bisected, with the same
    darts, until a few more points stand than the budget; random ones of these are taken away. Fractional radii are
    rounded at random: on a grid every radius between 1 and 2 would otherwise act alike, and accelerations below 3
    could not be met.

    Source: R. Bridson, Fast Poisson disk sampling in arbitrary dimensions, SIGGRAPH sketches 2007; M. Lustig and
    J. M. Pauly, SPIRiT, Magn. Reson. Med. 64 (2010) 457-471 for its use in MRI.
    """
    height, width = centre.shape
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot((rows - height // 2) / (height / 2), (columns - width // 2) / (width / 2))
    order, dither = rng.permutation(centre.size), rng.random(centre.shape)

    def throw(slope: float) -> Mask:
        return _throw(centre, kept, np.floor(1 + slope * distance + dither).astype(int), order)

    low, high, best = 0.0, 1.0, kept
    while (mask := throw(high)).sum() >= budget and high < 4 * max(height, width):
        low, high, best = high, 2 * high, mask
    for _ in range(20):
        if best.sum() <= 1.02 * budget:
            break
        slope = (low + high) / 2
        mask = throw(slope)
        if mask.sum() >= budget:
            low, best = slope, mask
        else:
            high = slope
    mask = best.copy()
    spare = np.flatnonzero(mask & ~centre)
    mask.flat[rng.choice(spare, int(mask.sum()) - budget, replace=False)] = False
    return mask


def _throw(centre: Mask, kept: Mask, radius: NDArray[np.int_], order: NDArray[np.int_]) -> Mask:
    """Take points in ``order`` unless one taken before lies nearer than its own radius."""
    (height, width), pad = centre.shape, min(int(radius.max()), max(centre.shape))
    stride = width + 2 * pad
    blocked = bytearray(stride * (height + 2 * pad))
    board = np.frombuffer(blocked, np.uint8).reshape(-1, stride)
    board[pad : pad + height, pad : pad + width] = ~kept | centre
    discs = {}
    mask = centre.copy()
    places = (order // width + pad) * stride + order % width + pad
    for place, r in zip(places.tolist(), np.minimum(radius.flat[order], pad).tolist(), strict=True):
        if blocked[place]:
            continue
        row, column = divmod(place, stride)
        mask[row - pad, column - pad] = True
        if r > 1:
            if r not in discs:
                offset = np.arange(-r + 1, r)
                discs[r] = (offset[:, None] ** 2 + offset**2 < r * r).astype(np.uint8)
            board[row - r + 1 : row + r, column - r + 1 : column + r] |= discs[r]
    return mask


PATTERNS: dict[str, Callable[[Mask, Mask, int, np.random.Generator], Mask]] = {
    "equispaced": _equispaced,
    "random": _random,
    "gaussian": _gaussian,
    "poisson": _poisson,
}
