"""Simulated measurements without inverse crime: a finer grid and another projector than the solver uses."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from invdiff.intensity import HU_MAX, MU_WATER_PER_MM, hu_to_mu
from invdiff.noise import BeerLambert
from invdiff.operators.ct import CT
from invdiff.operators.ct_cone import CTCone

ELECTRONIC_NOISE = 5.0  # counts, standard deviation
SUBRAYS = 3  # rays averaged per detector element
CONE_SUBRAYS = (2, 2)  # per row and column of a panel
CONE_BYTES = 2**29  # fine projections of a cone beam at a time


def refine(stack: np.ndarray, axes: tuple[int, ...] = (1, 2)) -> np.ndarray:
    """Twice finer grid along ``axes``, ``(S, H, W) -> (S, 2H, 2W)``, piecewise linear with limited slopes.

    The mean of every 2 x 2 group is exactly the pixel it came from, so that the coarse image stays the truth.
    """

    def double(a: np.ndarray, axis: int) -> np.ndarray:
        pad = [(1, 1) if i == axis else (0, 0) for i in range(a.ndim)]
        d = np.diff(np.pad(a, pad, mode="edge"), axis=axis)
        n = a.shape[axis]
        before, after = np.take(d, range(n), axis), np.take(d, range(1, n + 1), axis)
        slope = np.where(before * after > 0, np.sign(after) * np.minimum(abs(before), abs(after)), 0) / 4
        shape = list(a.shape)
        shape[axis] *= 2
        return np.stack([a - slope, a + slope], axis + 1).reshape(shape)

    stack = stack.astype(np.float32)
    for axis in axes:
        stack = double(stack, axis)
    return stack


def strip_projections(mu: np.ndarray, operator: CT, block: int = 8) -> np.ndarray:
    """Line integrals averaged over the width of each detector element, on the twice finer grid.

    Args:
        mu: attenuation ``(S, H, W)`` in 1/mm on the operator's grid.
        operator: the solver's operator; its geometry is measured, its matrix is not used.
        block: slices at a time.

    Returns:
        ``(S, 1, views, detectors)`` float32, dimensionless.
    """
    g = operator.geometry
    # Type-checkers do not know that every geometry is a dataclass.
    fine = replace(g, detector_count=g.detector_count * SUBRAYS, detector_pitch_mm=g.detector_pitch_mm / SUBRAYS)  # type: ignore[type-var]
    shape = (2 * operator.in_shape[1], 2 * operator.in_shape[2])
    pixel = (operator.pixel_mm[0] / 2, operator.pixel_mm[1] / 2)
    projector = type(operator)(shape, pixel, fine, device=operator.device)
    parts = []
    for i in range(0, len(mu), block):
        x = torch.from_numpy(refine(mu[i : i + block]))[:, None].to(operator.device)
        y = projector(x)
        parts.append(y.reshape(*y.shape[:-1], g.detector_count, SUBRAYS).mean(-1).cpu().numpy())
    return np.concatenate(parts)


def panel_projections(mu: np.ndarray, operator: CTCone) -> np.ndarray:
    """As :func:`strip_projections` for a cone beam: averages over detector elements, on a grid twice finer along z too.

    Args:
        mu: attenuation ``(S, H, W)`` in 1/mm on the operator's grid.
        operator: the solver's operator; its geometry is measured.

    Returns:
        ``(detector_rows, 1, views, detectors)`` float32, dimensionless.
    """
    g, (down, across) = operator.geometry, CONE_SUBRAYS
    fine = replace(
        g,
        detector_count=g.detector_count * across,
        detector_rows=g.detector_rows * down,
        detector_pitch_mm=g.detector_pitch_mm / across,
        detector_row_pitch_mm=g.detector_row_pitch_mm / down,
    )
    x = torch.from_numpy(refine(mu, (0, 1, 2)))[:, None].to(operator.device)
    slices, height, width = operator.shape
    dz, dy, dx = operator.voxel_mm
    shape, voxel_mm = (2 * slices, 2 * height, 2 * width), (dz / 2, dy / 2, dx / 2)
    step = max(1, CONE_BYTES // (4 * fine.detector_count * fine.detector_rows))
    parts = []
    for i in range(0, len(g.views_deg), step):
        projector = CTCone(shape, voxel_mm, replace(fine, views_deg=g.views_deg[i : i + step]), operator.device)
        y = projector(x)[:, 0].unflatten(-1, (g.detector_count, across)).unflatten(0, (g.detector_rows, down))
        parts.append(y.mean((1, -1)).cpu().numpy())
    return np.concatenate(parts, 1)[:, None]


@dataclass(frozen=True)
class CTData:
    """Simulated scan: line integrals ``y`` and their noise variance, both ``(S, 1, views, detectors)`` float32.

    Of a cone beam, S are detector rows.
    """

    y: np.ndarray
    variance: np.ndarray


def counts_to_data(counts: np.ndarray, photons: float, electronic: float = ELECTRONIC_NOISE) -> CTData:
    """Line integrals and variance of detector counts: :meth:`BeerLambert.logarithm`."""
    return CTData(*BeerLambert(photons, electronic).logarithm(counts))


def add_photon_noise(
    integrals: np.ndarray, photons: float, seed: int, slices: tuple[int, ...], electronic: float = ELECTRONIC_NOISE
) -> CTData:
    """Counts drawn by :class:`invdiff.noise.BeerLambert`, one generator per (seed, slice).

    Args:
        integrals: noise-free line integrals ``(S, 1, views, detectors)``.
        photons: I0 per ray.
        seed: any integer.
        slices: index of each slice in the whole volume.
        electronic: standard deviation of the electronic noise, counts.
    """
    noise, counts = BeerLambert(photons, electronic), np.empty_like(integrals, dtype=np.float64)
    for row, index in enumerate(slices):
        g = np.random.default_rng([seed, index] if seed >= 0 else [-seed, index, 1])
        counts[row] = noise.counts(integrals[row], g)
    return counts_to_data(counts, photons, electronic)


def simulate_ct(
    hu: np.ndarray,
    operator: CT | CTCone,
    photons: float = 1e5,
    seed: int = 0,
    slices: tuple[int, ...] | None = None,
    mu_water_per_mm: float = MU_WATER_PER_MM,
    hu_max: float = HU_MAX,
) -> CTData:
    """Measure a CT stack ``(S, H, W)`` in HU with the geometry of ``operator``; HU are clipped to [-1000, hu_max].

    ``slices`` are the places of the slices in the whole volume, by which noise is drawn; of a cone beam it is drawn by
    detector row.
    """
    mu = hu_to_mu(hu, mu_water_per_mm, hu_max).astype(np.float32)
    if isinstance(operator, CTCone):
        return add_photon_noise(panel_projections(mu, operator), photons, seed, tuple(range(operator.out_shape[0])))
    return add_photon_noise(strip_projections(mu, operator), photons, seed, slices or tuple(range(len(hu))))


def as_tensors(data: CTData, device="cpu") -> tuple[Tensor, Tensor]:
    """y and variance as tensors."""
    return torch.from_numpy(data.y).to(device), torch.from_numpy(data.variance).to(device)
