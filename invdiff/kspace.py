"""Raw k-space of a scanner as a measurement: noise whitened, cropped, coils compressed, sensitivities estimated."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from invdiff.errors import InputError, ShapeError
from invdiff.measurement import Measurement
from invdiff.operators.coils import compress_coils, estimate_maps, noise_covariance, prewhiten, remove_oversampling


def measurement_from_kspace(
    kspace: ArrayLike,
    *,
    pixel_mm: tuple[float, float] = (1.0, 1.0),
    slice_mm: float = 1.0,
    affine: ArrayLike | None = None,
    noise: ArrayLike | None = None,
    maps: ArrayLike | None = None,
    oversampling: float = 1.0,
    virtual_coils: int | None = None,
    calibration: int = 24,
) -> Measurement:
    """Everything between a Cartesian scanner and ``invdiff reconstruct``; save it by ``save_measurement``.

    Args:
        kspace: complex ``(slices, coils, H, W)`` or ``(coils, H, W)``, centred, zeros where nothing was sampled; the
            readout along H.
        pixel_mm: (row, column) spacing after the oversampling is gone; not used with ``affine``.
        slice_mm: distance of slices.
        affine: 4x4 from voxel (column, row, slice) to RAS+ mm; None for an axial stack around the origin, columns to
            the left of the patient, rows to the back, slices upwards.
        noise: a scan without signal, complex ``(coils, samples)``, or its covariance ``(coils, coils)``: the coils are
            whitened. None: the level is estimated, one for all coils, from the outer samples of k-space.
        maps: complex ``(coils, H, W)`` or ``(slices, coils, H, W)`` for the cropped slice; None estimates them from the
            centre by ESPIRiT (needs sigpy), and takes a single coil as uniform.
        oversampling: of the readout, which is cropped to 1 / oversampling.
        virtual_coils: compress the coils to so many.
        calibration: side of the fully sampled centre, in samples.

    Raises:
        ShapeError: k-space of another rank, or a noise scan or maps of other coils.
        InputError, UsageError: what the steps refuse; see :mod:`invdiff.operators.coils`.
    """
    k = np.asarray(kspace)
    k = (k[None] if k.ndim == 3 else k).astype(np.complex64)
    if k.ndim != 4:
        raise ShapeError(f"k-space is (slices, coils, H, W) or (coils, H, W), got {np.shape(kspace)}")
    s = None if maps is None else np.asarray(maps)
    if noise is not None:
        covariance = _covariance(np.asarray(noise), k.shape[1])
        k = prewhiten(k, covariance)
        s = None if s is None else prewhiten(s, covariance)
    if oversampling != 1:
        k = remove_oversampling(k, oversampling)
    mask = (k != 0).any(1)
    if virtual_coils is not None:
        k, matrix = compress_coils(k, virtual_coils)
        s = None if s is None else np.einsum("vc,...chw->...vhw", matrix, s)
    if s is None and k.shape[1] > 1:
        s = estimate_maps(k, calibration)
    if s is not None and s.shape not in (k.shape, k.shape[1:]):
        raise ShapeError(f"coil maps {s.shape} do not fit k-space {k.shape}: give (coils, H, W), one for each coil")
    arrays = {"mask": mask[0] if (mask == mask[0]).all() else mask}
    arrays |= {} if s is None else {"maps": s.astype(np.complex64)}
    slices, coils, height, width = k.shape
    if affine is None:
        affine = np.diag([-pixel_mm[1], -pixel_mm[0], slice_mm, 1.0])
        affine[:3, 3] = -affine[:3, :3] @ (np.array([width, height, slices]) - 1) / 2
    volume: dict[str, Any] = {"shape": [width, height, slices], "affine": np.asarray(affine, float).tolist()}
    volume |= {"units": "1", "modality": "MR", "slice_axis": 2}
    std = math.sqrt(0.5) if noise is not None else _noise_level(k, mask)
    name = "mri" if coils == 1 and s is None else "mri-multicoil"
    described = {"name": name, "shape": [slices, height, width], "acceleration_achieved": float(1 / mask.mean())}
    model = {"model": "complex-gaussian", "std": std, "estimated": noise is None}
    return Measurement(np.concatenate([k.real, k.imag], 1), described, volume, model, arrays=arrays)


def _covariance(noise: np.ndarray, coils: int) -> np.ndarray:
    if noise.shape[:1] != (coils,):
        raise ShapeError(f"k-space has {coils} coils, the noise {noise.shape}: give (coils, samples) or a covariance")
    return noise if noise.shape == (coils, coils) else noise_covariance(noise)


def _noise_level(k: np.ndarray, mask: np.ndarray) -> float:
    """Median absolute value / 0.6745 of real and imaginary parts of samples beyond 0.9 of the highest frequency.

    Raises:
        InputError: fewer than 100 samples there.
    """
    rows, columns = (np.abs(np.arange(n) - n // 2) / (n / 2) for n in mask.shape[1:])
    outer = (mask & (np.maximum(rows[:, None], columns) > 0.9))[:, None] & (k != 0)
    if outer.sum() < 100:
        raise InputError("too few outer samples of k-space to estimate the noise: give a noise scan or its covariance")
    values = k[outer]
    return float(np.median(np.abs(np.concatenate([values.real, values.imag]))) / 0.6745)
