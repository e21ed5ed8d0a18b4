"""Figures of merit; every number comes with the convention behind it."""

from typing import Any

import numpy as np

from invdiff.errors import InputError, ShapeError, choose

CT_WINDOW_HU = (-1000.0, 1000.0)
BODY_THRESHOLD_HU = -500.0
_SIGMA, _WINDOW = 1.5, 11
_UNITS = {"CT": "HU", "MR": "1", "image": "1"}


def _pair(recon: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    recon, reference = np.asarray(recon), np.asarray(reference)
    if recon.shape != reference.shape or recon.size == 0:
        raise ShapeError(f"metrics expect two stacks of one shape, got {recon.shape} and {reference.shape}")
    for name, stack in (("reconstruction", recon), ("reference", reference)):
        if not np.isfinite(stack).all():
            raise InputError(f"the {name} holds NaN or infinite values; no metric is defined")
    return recon.astype(np.float64), reference.astype(np.float64)


def psnr(
    recon: np.ndarray,
    reference: np.ndarray,
    data_range: float = 2000.0,
    window: tuple[float, float] | None = CT_WINDOW_HU,
) -> float:
    """``10 log10(data_range^2 / MSE)`` in dB, MSE over all voxels of both stacks clipped to ``window``.

    Infinite for equal stacks. The defaults are those of CT in HU; pass ``window=None`` for other images.

    Raises:
        ShapeError: shapes differ.
        InputError: values are not finite.
    """
    recon, reference = _pair(recon, reference)
    if window is not None:
        recon, reference = np.clip(recon, *window), np.clip(reference, *window)
    mse = np.mean((recon - reference) ** 2)
    return float(10 * np.log10(data_range**2 / mse)) if mse > 0 else float("inf")


def ssim(
    recon: np.ndarray,
    reference: np.ndarray,
    data_range: float = 2000.0,
    window: tuple[float, float] | None = CT_WINDOW_HU,
) -> float:
    """Structural similarity (Wang et al. 2004) of each slice of ``(S, H, W)``, mean over slices.

    Gaussian weights of sigma 1.5 in an 11 x 11 window, K1 = 0.01, K2 = 0.03, population covariance, 5 border
    pixels left out: scikit-image with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``.

    Raises:
        ShapeError: shapes differ, or slices smaller than 11 x 11.
        InputError: values are not finite.
    """
    recon, reference = _pair(recon, reference)
    if recon.ndim != 3 or min(recon.shape[1:]) < _WINDOW:
        raise ShapeError(f"ssim expects (S, H, W) with H, W >= {_WINDOW}, got {recon.shape}")
    if window is not None:
        recon, reference = np.clip(recon, *window), np.clip(reference, *window)
    return float(np.mean([_ssim_slice(a, b, data_range) for a, b in zip(recon, reference, strict=True)]))


def _ssim_slice(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    from scipy.ndimage import gaussian_filter

    def mean(image):
        return gaussian_filter(image, _SIGMA, radius=_WINDOW // 2, mode="reflect")

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    border = _WINDOW // 2
    return float(index[border:-border, border:-border].mean())


def body_mask(reference: np.ndarray, threshold_hu: float = BODY_THRESHOLD_HU) -> np.ndarray:
    """The body in a CT stack ``(S, H, W)`` in HU: per slice the largest part above the threshold, holes filled."""
    from scipy.ndimage import binary_fill_holes, label

    mask = np.zeros(reference.shape, bool)
    for s, image in enumerate(np.asarray(reference)):
        parts, count = label(image > threshold_hu)
        if count:
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0
            mask[s] = binary_fill_holes(parts == sizes.argmax())
    return mask


def rmse_body(recon: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square error in HU inside :func:`body_mask` of the reference; NaN if there is no body."""
    recon, reference = _pair(recon, reference)
    mask = body_mask(reference)
    return float(np.sqrt(np.mean((recon - reference)[mask] ** 2))) if mask.any() else float("nan")


def nrmse(recon: np.ndarray, reference: np.ndarray, offset: float = 0.0) -> float:
    """``||recon - reference|| / ||reference + offset||``; offset 1000 makes HU proportional to attenuation.

    NaN if the denominator is 0.
    """
    recon, reference = _pair(recon, reference)
    norm = np.linalg.norm(reference + offset)
    return float(np.linalg.norm(recon - reference) / norm) if norm > 0 else float("nan")


def chi2(residual: np.ndarray, sigma: np.ndarray | float = 1.0) -> float:
    """``mean((residual / sigma)^2)``: 1 when the residual is noise, below when noise is fitted, above when data are
    ignored. Residual and sigma in the same units; 1 for whitened data."""
    return float(np.mean(np.square(np.asarray(residual, dtype=np.float64) / sigma)))


def evaluate(recon: np.ndarray, reference: np.ndarray, modality: str) -> dict[str, Any]:
    """All figures of a reconstruction ``(S, H, W)`` against its reference, in HU for CT, native units otherwise.

    Returns:
        ``psnr_db``, ``ssim`` (None for slices below 11 x 11), ``nrmse``, ``rmse`` over all voxels, for CT
        ``rmse_body_hu``, and ``convention``: for each of these names a sentence that says how it was computed.

    Raises:
        UsageError: unknown modality.
        ShapeError: shapes differ.
        InputError: values are not finite.
    """
    unit = choose(modality, _UNITS, "modality")
    recon, reference = _pair(recon, reference)
    ct = modality == "CT"
    if ct:
        window, span, range_text = CT_WINDOW_HU, 2000.0, "data range 2000 HU, both clipped to [-1000, 1000] HU"
    else:
        window, span = None, float(np.ptp(reference)) or 1.0
        range_text = f"data range {span:.6g} = max - min of the reference volume, no clipping"
    large = recon.ndim == 3 and min(recon.shape[1:]) >= _WINDOW
    result: dict[str, Any] = {
        "psnr_db": psnr(recon, reference, span, window),
        "ssim": ssim(recon, reference, span, window) if large else None,
        "nrmse": nrmse(recon, reference, 1000.0 if ct else 0.0),
        "rmse": float(np.sqrt(np.mean((recon - reference) ** 2))),
    }
    convention = {
        "psnr_db": f"dB, over all voxels of the volume, {range_text}",
        "ssim": f"slice-wise, mean over slices, Gaussian window sigma 1.5 (11 x 11), {range_text}",
        "nrmse": "L2 norm of the error / L2 norm of the reference" + (" + 1000 HU, no clipping" if ct else ""),
        "rmse": f"root mean square error over all voxels, no clipping, in {'HU' if ct else 'image units'}",
    }
    if ct:
        result["rmse_body_hu"] = rmse_body(recon, reference)
        convention["rmse_body_hu"] = (
            f"HU, inside the body: per slice the largest part of the reference above {BODY_THRESHOLD_HU:.0f} HU, filled"
        )
    return {**result, "units": unit, "convention": convention}
