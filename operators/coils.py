"""Raw k-space of several coils, before reconstruction: noise whitening, coil compression, cropping, coil maps.

k-space is complex, ``(..., coils, H, W)``, centred, with zeros where nothing was sampled.
"""

import numpy as np
from numpy.typing import NDArray

from invdiff.errors import InputError, ShapeError, UsageError

Complex = NDArray[np.complexfloating]


def _kspace(kspace: Complex) -> Complex:
    kspace = np.asarray(kspace)
    if kspace.ndim < 3:
        raise ShapeError(f"k-space of several coils is (..., coils, H, W), got {kspace.shape}")
    if not np.iscomplexobj(kspace) or not np.isfinite(kspace).all():
        raise InputError(f"k-space must be complex and finite, got {kspace.dtype}: check the measurement")
    return kspace


def _mix(matrix: Complex, kspace: Complex) -> Complex:
    """``matrix`` (rows, coils) applied to the coil axis, in the dtype of ``kspace``."""
    return np.einsum("vc,...chw->...vhw", matrix.astype(kspace.dtype), kspace, optimize=True)


def noise_covariance(noise: Complex) -> NDArray[np.complex128]:
    """Covariance ``E[n n^H]`` of the coils from a scan without signal, the mean removed.

    Args:
        noise: complex ``(coils, ...)``, at least twice as many samples as coils.

    Returns:
        Hermitian ``(coils, coils)``; its diagonal is the variance of the complex noise (real plus imaginary part).

    Raises:
        InputError: too few samples, or values that are not complex and finite.
    """
    noise = np.asarray(noise)
    if not np.iscomplexobj(noise) or not np.isfinite(noise).all():
        raise InputError(f"a noise scan must be complex and finite, got {noise.dtype}")
    flat = noise.reshape(len(noise), -1).astype(np.complex128)
    if flat.shape[1] < 2 * len(flat):
        raise InputError(
            f"{flat.shape[1]} noise samples are too few for {len(flat)} coils: give at least twice as many"
        )
    flat = flat - flat.mean(1, keepdims=True)
    return flat @ flat.conj().T / (flat.shape[1] - 1)


def prewhiten(kspace: Complex, covariance: Complex) -> Complex:
    """``L^-1 k`` with ``covariance = L L^H``: the noise of the result is independent and of variance 1 in every coil.

    That is the variance of a complex number: real and imaginary part have 1/2 each. Coil maps must be estimated from
    the result, or whitened alike: ``prewhiten(maps, covariance)``.

    Args:
        kspace: complex ``(..., coils, H, W)``.
        covariance: Hermitian positive definite ``(coils, coils)``, from :func:`noise_covariance`.

    Raises:
        ShapeError: a covariance of another size.
        InputError: a covariance that is not Hermitian positive definite.

    Source: K. P. Pruessmann et al., Magn. Reson. Med. 46 (2001) 638-651, section on noise decorrelation.
    """
    kspace, covariance = _kspace(kspace), np.asarray(covariance, np.complex128)
    coils = kspace.shape[-3]
    if covariance.shape != (coils, coils):
        raise ShapeError(f"noise covariance of {coils} coils must be ({coils}, {coils}), got {covariance.shape}")
    if not np.allclose(covariance, covariance.conj().T, rtol=0, atol=1e-6 * np.abs(covariance).max()):
        raise InputError("the noise covariance is not Hermitian: estimate it from a noise scan with noise_covariance")
    try:
        root = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        raise InputError("the noise covariance is singular: a coil is dead or doubled, remove it first") from None
    return _mix(np.linalg.inv(root), kspace)


def compress_coils(kspace: Complex, virtual: int) -> tuple[Complex, Complex]:
    """The ``virtual`` combinations of coils with the most energy, by singular value decomposition.

    The rows of the matrix are orthonormal, so that white noise stays white.

    Args:
        kspace: complex ``(..., coils, H, W)``, prewhitened; one matrix for all leading axes.
        virtual: coils to keep, 1 to coils.

    Returns:
        Compressed k-space ``(..., virtual, H, W)`` and the matrix ``(virtual, coils)``. Coil maps compress alike:
        ``np.einsum("vc,...chw->...vhw", matrix, maps)``.

    Raises:
        UsageError: ``virtual`` out of range.

    Source: F. Huang et al., Magn. Reson. Imaging 26 (2008) 133-141.
    """
    kspace = _kspace(kspace)
    coils = kspace.shape[-3]
    if int(virtual) != virtual or not 1 <= virtual <= coils:
        raise UsageError(f"virtual coils must be a whole number from 1 to the {coils} coils measured, got {virtual}")
    flat = np.moveaxis(kspace, -3, 0).reshape(coils, -1)
    _, vectors = np.linalg.eigh((flat @ flat.conj().T).astype(np.complex128))  # ascending
    matrix = vectors[:, ::-1][:, : int(virtual)].conj().T.astype(kspace.dtype)
    return _mix(matrix, kspace), matrix


def remove_oversampling(kspace: Complex, factor: float = 2, axis: int = -2) -> Complex:
    """Crop the field of view to its centre, 1 / factor of it, along the readout.

    Pixel values and the noise per sample stay as they are (orthonormal transforms).

    Args:
        kspace: complex ``(..., H, W)``, fully sampled along ``axis``.
        factor: >= 1; the new size is the old one / factor, rounded.
        axis: of the readout.

    Raises:
        UsageError: a factor below 1 or larger than the axis is long.
    """
    kspace = np.asarray(kspace)
    size = kspace.shape[axis]
    if not 1 <= factor <= size:
        raise UsageError(f"the readout oversampling factor must be from 1 to {size}, got {factor}")
    new = round(size / factor)
    start = size // 2 - new // 2

    def centred(transform, x):
        return np.fft.fftshift(transform(np.fft.ifftshift(x, axis), axis=axis, norm="ortho"), axis)

    image = centred(np.fft.ifft, kspace)
    return centred(np.fft.fft, np.take(image, range(start, start + new), axis)).astype(kspace.dtype)


def estimate_maps(kspace: Complex, calibration: int = 24, *, kernel: int = 6, crop: float = 0.95) -> Complex:
    """Coil sensitivities from the fully sampled centre of k-space by ESPIRiT (one set of maps).

    Args:
        kspace: complex ``(..., coils, H, W)``; leading axes (slices) are calibrated one by one.
        calibration: side of the central square that is fully sampled, in samples, at least ``2 * kernel``.
        kernel: side of the calibration kernel, in samples.
        crop: maps are 0 where the largest eigenvalue is below; 0 keeps all.

    Returns:
        Maps of the shape of ``kspace`` with ``sum_c |S_c|^2 = 1`` inside the object and the phase of coil 0 removed.

    Raises:
        UsageError: sigpy is not installed, or a calibration square that is too small or does not fit.
        InputError: the square is not fully sampled.

    Source: M. Uecker et al., Magn. Reson. Med. 71 (2014) 990-1001, as implemented by sigpy.
    """
    kspace = _kspace(kspace)
    _check_calibration(kspace, calibration, kernel)
    try:
        from sigpy.mri.app import EspiritCalib
    except ImportError:
        raise UsageError("coil maps are estimated by sigpy, which is not installed: pip install invdiff[mri]") from None
    options = {"calib_width": int(calibration), "kernel_width": int(kernel), "crop": crop, "show_pbar": False}
    maps = np.empty_like(kspace)
    for index in np.ndindex(kspace.shape[:-3]):
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 where coil 0 sees nothing
            maps[index] = np.nan_to_num(EspiritCalib(kspace[index], **options).run(), posinf=0.0, neginf=0.0)
    return maps


def _check_calibration(kspace: Complex, calibration: int, kernel: int) -> None:
    height, width = kspace.shape[-2:]
    least = 2 * int(kernel)
    if int(calibration) != calibration or not least <= calibration <= min(height, width):
        raise UsageError(
            f"ESPIRiT with kernels of {kernel} samples needs a calibration square of {least} to {min(height, width)} "
            f"samples, got {calibration}: measure a larger centre (center_fraction) or give the maps"
        )
    sampled = (kspace != 0).any(-3)
    rows, columns = (slice(n // 2 - calibration // 2, n // 2 - calibration // 2 + calibration) for n in (height, width))
    if not sampled[..., rows, columns].all():
        raise InputError(
            f"the central {calibration} x {calibration} samples of k-space are not all measured: give a smaller "
            f"calibration square (at least {least}) or the maps"
        )
