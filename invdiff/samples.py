"""Unconditional samples of a prior: what it believes images look like, as a picture or a stack."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from invdiff.canvas import INK, PAPER, QUIET
from invdiff.draws import Draws
from invdiff.errors import NumericalError, UsageError
from invdiff.files import atomic_write
from invdiff.priors.base import Prior
from invdiff.provenance import DISCLAIMER
from invdiff.solvers.base import iterate
from invdiff.solvers.unconditional import Unconditional, no_data
from invdiff.volume import Volume, save_volume

_TILE_IN, _GAP_IN, _HEAD_IN, _FOOT_IN, _DPI = 2.4, 0.05, 0.62, 0.3, 150


def sample_prior(
    prior: Prior, solver: Unconditional, steps: int, count: int, size: tuple[int, int], seed: int = 0, device="cpu"
) -> Iterator[Tensor]:
    """The estimate of the clean images after every step, ``(count, C, H, W)`` in the prior's range.

    Sample k depends on (seed, k) alone: more samples leave the first ones as they are.

    Args:
        prior: on ``device``.
        solver: sampler and schedule.
        steps: steps from the prior's largest noise level to 0.
        count: number of samples.
        size: rows and columns.
        seed: of the draws.

    Raises:
        UsageError: steps, count or size are not positive.
        NumericalError: a sample is NaN or infinite.
    """
    if count < 1 or min(size) < 1:
        raise UsageError(f"samples need a positive count and size, got {count} of {size[0]} x {size[1]}")
    problem = no_data((prior.info.channels, *size), device=device)
    sigmas = solver.sigmas(steps, problem, prior)
    draws = Draws(seed, (0,), tuple(range(count)))
    state = None
    for state in iterate(solver, problem, prior, sigmas, draws):
        yield state.x0[:, 0]
    if state is None or not bool(state.x.isfinite().all()):
        raise NumericalError("samples are NaN or infinite; use more steps or another sampler")


def save_samples(images: np.ndarray, path: Path, title: str, overwrite: bool = False) -> None:
    """Write samples ``(count, C, H, W)`` as a grid (``.png``) or as slices (``.nii``, ``.nii.gz``), atomically.

    Channels become slices. In the volume, columns run to the left and rows to the back, 1 mm each.

    Raises:
        UsageError: the file exists and ``overwrite`` is false.
    """
    slices = images.reshape(-1, *images.shape[-2:])
    if path.suffix.lower() == ".png":
        return _draw(slices, path, title, overwrite)
    save_volume(Volume(slices.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0])), path, overwrite)


def _draw(slices: np.ndarray, path: Path, title: str, overwrite: bool) -> None:
    """All slices on one grey scale, from the 0.5th to the 99.5th percentile."""
    from matplotlib.figure import Figure

    count, (height, width) = len(slices), slices.shape[1:]
    columns = min(count, max(2, math.ceil((count * height / width) ** 0.5)))
    rows = -(-count // columns)
    tall = _TILE_IN * height / width
    sides = (columns * (_TILE_IN + _GAP_IN) + _GAP_IN, rows * (tall + _GAP_IN) + _GAP_IN + _HEAD_IN + _FOOT_IN)
    figure = Figure(figsize=sides, facecolor=PAPER)
    low, high = np.percentile(slices, (0.5, 99.5))
    for k, tile in enumerate(slices):
        left = _GAP_IN + (k % columns) * (_TILE_IN + _GAP_IN)
        bottom = sides[1] - _HEAD_IN - (k // columns + 1) * (tall + _GAP_IN)
        ax = figure.add_axes((left / sides[0], bottom / sides[1], _TILE_IN / sides[0], tall / sides[1]))
        ax.imshow(tile, cmap="gray", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        ax.set_axis_off()
    small = min(1.0, sides[0] / 5)
    head = {"color": INK, "fontsize": 11 * small, "va": "center"}
    figure.text(_GAP_IN / sides[0], 1 - 0.3 * _HEAD_IN / sides[1], title.partition(": ")[0], **head)
    note = {"color": QUIET, "fontsize": 8 * small, "va": "center"}
    figure.text(_GAP_IN / sides[0], 1 - 0.72 * _HEAD_IN / sides[1], title.partition(": ")[2], **note)
    foot = f"invdiff: {DISCLAIMER}; grey from {low:.2f} to {high:.2f}"
    figure.text(_GAP_IN / sides[0], 0.5 * _FOOT_IN / sides[1], foot, **note)
    with atomic_write(path, overwrite) as part:
        figure.savefig(part, format="png", dpi=_DPI, facecolor=PAPER, metadata={"Software": "invdiff", "Title": title})
