"""Density compensation: the area of k-space that each sample of a trajectory stands for, in cycles^2 per pixel^2.

The areas of a covered disc of radius 0.5 add up to pi / 4, those of the full grid to 1.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.errors import UsageError
from invdiff.operators.nufft import Nufft
from invdiff.operators.trajectories import Trajectory, spoke_spacing

Area = NDArray[np.float64]


def ramp(trajectory: Trajectory) -> Area:
    """Areas ``(shots, samples)`` of evenly sampled diameters at any angles: ramp filter times sector.

    ``dtheta dk B h(k / B)`` with n samples over the bandwidth ``B = n dk``; dtheta is half the angle between the two
    neighbours of a spoke, and h the ramp ``|k / B|`` of a projection n pixels wide,
    ``h(f) = 1/4 - 2 / pi^2 sum_(odd l <= n / 2) cos(2 pi f l) / l^2``. Cutting rings instead, ``|k| dk`` and
    ``dk^2 / 4`` in the middle, makes a disc on a field of view of twice its size 2 % too bright.

    Raises:
        UsageError: a trajectory of another kind.

    Source: G. N. Ramachandran and A. V. Lakshminarayanan, Proc. Natl. Acad. Sci. 68 (1971) 2236-2240.
    """
    spacing = spoke_spacing(trajectory)
    if spacing is None:
        raise UsageError("density 'ramp' fits evenly sampled spokes through the centre only: use 'pipe'")
    angle, radius, step = spacing
    order = np.argsort(angle, kind="stable")
    ordered = np.concatenate([angle[order[-1:]] - np.pi, angle[order], angle[order[:1]] + np.pi])
    sector = np.empty_like(angle)
    sector[order] = (ordered[2:] - ordered[:-2]) / 2
    bandwidth, lag = len(radius) * step, np.arange(1, len(radius) // 2 + 1, 2)
    share = np.where(2 * lag == len(radius), 0.5, 1) / lag**2  # the lag n / 2 is its own opposite
    filtered = 0.25 - 2 / np.pi**2 * np.cos(2 * np.pi / bandwidth * np.outer(radius, lag)) @ share
    return sector[:, None] * (step * bandwidth * filtered)


def pipe_menon(trajectory: Trajectory, shape: tuple[int, int], iterations: int = 20, tolerance: float = 0.02) -> Area:
    """Areas ``(shots, samples)`` of any trajectory: ``w <- w / (C * w)``, until ``C * w`` is 1 at all samples.

    C is the squared Fourier transform of the ellipse that fits into the image, never negative, so that the point
    spread function is right over that ellipse. It is applied as its inverse transform on a grid of twice the size, the
    overlap of two such ellipses, 1 at distance 0.

    Args:
        trajectory: ``(shots, samples, 2)``, cycles per pixel.
        shape: (H, W) of the image.
        iterations, tolerance: at most so many, until ``|C * w - 1|`` is smaller everywhere.

    Source: J. G. Pipe and P. Menon, Magn. Reson. Med. 41 (1999) 179-186, equation 10; the kernel after
    K. O. Johnson and J. G. Pipe, Magn. Reson. Med. 61 (2009) 439-447.
    """
    transform = Nufft(torch.from_numpy(trajectory.reshape(-1, 2)), (2 * shape[0], 2 * shape[1]))
    overlap = _overlap(shape).to(torch.complex64)
    w = torch.ones(trajectory[..., 0].size)
    for _ in range(iterations):
        near = transform.direct(overlap * transform.adjoint(w.to(torch.complex64))).real
        w = w / near.clamp_min(torch.finfo(near.dtype).tiny)
        if float((near - 1).abs().max()) < tolerance:
            break
    return w.double().reshape(trajectory.shape[:2]).numpy()


def _overlap(shape: tuple[int, int]) -> Tensor:
    """Share that an ellipse with the axes H and W has in common with itself, by shift: ``(2 H, 2 W)``, centred."""
    rows, columns = (torch.arange(-n, n, dtype=torch.float64) / n for n in shape)
    rho = torch.hypot(rows[:, None], columns).clamp_max(1)
    return 2 / math.pi * (torch.acos(rho) - rho * torch.sqrt(1 - rho**2))
