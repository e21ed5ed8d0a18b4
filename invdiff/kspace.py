"""Raw k-space of a scanner as a measurement: noise whitened, cropped, coils compressed, sensitivities estimated."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from invdiff.errors import InputError, ShapeError
from invdiff.measurement import Measurement
from invdiff.operators.coils import compress_coils, estimate_maps, noise_covariance, prewhiten, remove_oversampling
from invdiff.operators.trajectories import check_trajectory, nyquist_spokes, spoke_spacing


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
    std = math.sqrt(0.5) if noise is not None else _noise_level(k, mask)
    name = "mri" if k.shape[1] == 1 and s is None else "mri-multicoil"
    shape = len(k), *k.shape[2:]
    described = {"name": name, "shape": list(shape), "acceleration_achieved": float(1 / mask.mean())}
    model = {"model": "complex-gaussian", "std": std, "estimated": noise is None}
    volume = _grid(shape, pixel_mm, slice_mm, affine)
    return Measurement(np.concatenate([k.real, k.imag], 1), described, volume, model, arrays=arrays)


def measurement_from_shots(
    kspace: ArrayLike,
    trajectory: ArrayLike,
    shape: tuple[int, int],
    *,
    pixel_mm: tuple[float, float] = (1.0, 1.0),
    slice_mm: float = 1.0,
    affine: ArrayLike | None = None,
    noise: ArrayLike | None = None,
    maps: ArrayLike | None = None,
    calibration: int = 24,
) -> Measurement:
    """The same for spokes, spirals and others (`mri-radial`): noise whitened, sensitivities estimated.

    Args:
        kspace: complex ``(slices, coils, shots, samples)``.
        trajectory: ``(shots, samples, 2)``, (row, column) in cycles per pixel, of all slices.
        shape: rows and columns of the image.
        maps: complex ``(coils, H, W)`` or ``(slices, coils, H, W)``; None estimates them by ESPIRiT from the centre of
            k-space, taken from the image of each coil (needs sigpy and finufft), and takes a single coil as uniform.
        pixel_mm, slice_mm, affine, noise: of :func:`measurement_from_kspace`.
        calibration: most samples along a side of the centre; less where spokes are too few for it.

    Raises:
        ShapeError, InputError, UsageError: as :func:`measurement_from_kspace`; a trajectory of another unit or shape.
    """
    k = np.asarray(kspace, np.complex64)
    points = check_trajectory(trajectory, shape)
    if k.ndim != 4 or k.shape[2:] != points.shape[:2]:
        raise ShapeError(f"k-space {k.shape} is not (slices, coils, shots, samples) of a trajectory {points.shape}")
    s = None if maps is None else np.asarray(maps)
    if noise is not None:
        covariance = _covariance(np.asarray(noise), k.shape[1])
        k = prewhiten(k, covariance)
        s = None if s is None else prewhiten(s, covariance)
    spokes = spoke_spacing(points) is not None
    if s is None and k.shape[1] > 1:
        side = min(calibration, *(n // 2 * 2 for n in shape), int(2 * len(points) / math.pi) if spokes else calibration)
        s = estimate_maps(_centre(k, points, shape), side)
    if s is not None and s.shape not in ((len(k), k.shape[1], *shape), (k.shape[1], *shape)):
        raise ShapeError(f"coil maps {s.shape} do not fit {k.shape[1]} coils and slices of {shape}")
    far = (np.linalg.norm(points, axis=-1) > 0.9 * np.abs(points).max()) & (k != 0).any((0, 1))
    std = math.sqrt(0.5) if noise is not None else _robust_std(k[..., far])
    full = nyquist_spokes(shape) / len(points) if spokes else math.pi / 4 * math.prod(shape) / points[..., 0].size
    described = {"name": "mri-radial", "shape": [len(k), *shape], "acceleration_achieved": float(full)}
    arrays = {"trajectory": points} | ({} if s is None else {"maps": s.astype(np.complex64)})
    model = {"model": "complex-gaussian", "std": std, "estimated": noise is None}
    volume = _grid((len(k), *shape), pixel_mm, slice_mm, affine)
    return Measurement(np.concatenate([k.real, k.imag], 1), described, volume, model, arrays=arrays)


def _grid(
    shape: tuple[int, ...], pixel_mm: tuple[float, float], slice_mm: float, affine: ArrayLike | None
) -> dict[str, Any]:
    """``/volume`` of slices ``(slices, H, W)``."""
    slices, height, width = shape
    if affine is None:
        affine = np.diag([-pixel_mm[1], -pixel_mm[0], slice_mm, 1.0])
        affine[:3, 3] = -affine[:3, :3] @ (np.array([width, height, slices]) - 1) / 2
    volume: dict[str, Any] = {"shape": [width, height, slices], "affine": np.asarray(affine, float).tolist()}
    return volume | {"units": "1", "modality": "MR", "slice_axis": 2}


def _centre(k: np.ndarray, points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Cartesian k-space ``(slices, coils, H, W)`` of the least-squares image of each coil, after 20 CG iterations.

    They settle the centre, which trajectories sample most densely; only that is used.
    """
    import torch

    from invdiff.linalg import cg
    from invdiff.operators.noncartesian import NonCartesianMRI

    operator = NonCartesianMRI(points, shape)
    out = np.empty((*k.shape[:2], *shape), np.complex64)
    for index in np.ndindex(k.shape[:2]):
        y = torch.from_numpy(np.stack([k[index].real, k[index].imag]))[None]
        x = cg(operator.normal, operator.adjoint(y), torch.zeros(1, *operator.in_shape), iterations=20)[0].numpy()
        image = np.fft.ifftshift(x[0] + 1j * x[1])
        out[index] = np.fft.fftshift(np.fft.fft2(image, norm="ortho"))
    return out


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
    return _robust_std(k[outer])


def _robust_std(values: np.ndarray) -> float:
    """Median absolute value / 0.6745 of real and imaginary parts.

    Raises:
        InputError: fewer than 100 values, or half of them 0.
    """
    level = float(np.median(np.abs(np.concatenate([values.real, values.imag]))) / 0.6745) if values.size else 0.0
    if values.size < 100 or level == 0:
        raise InputError("too few outer samples of k-space to estimate the noise: give a noise scan or its covariance")
    return level
