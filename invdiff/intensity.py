"""Hounsfield units, attenuation, and the affine map between an image and the range of a prior."""

from dataclasses import dataclass

import numpy as np

from invdiff.errors import InputError, UsageError

MU_WATER_PER_MM = 0.0193  # at about 70 keV
HU_AIR = -1000.0
HU_MAX = 3071.0  # top of 12-bit scanners; above lies metal
CT_SCALE_HU = 1000.0  # CT priors see u = HU / 1000


@dataclass(frozen=True)
class AffineMap:
    """``image = scale * u + shift``, where u is in the range of a prior; scale is finite and positive."""

    scale: float
    shift: float

    def __post_init__(self):
        if not (np.isfinite(self.scale) and self.scale > 0 and np.isfinite(self.shift)):
            raise UsageError(f"intensity map needs a positive scale and a finite shift, got {self.scale}, {self.shift}")

    def apply(self, u):
        """Prior range to image units."""
        return self.scale * u + self.shift

    def invert(self, image):
        """Image units to prior range."""
        return (image - self.shift) / self.scale


CT_MAP = AffineMap(CT_SCALE_HU, 0.0)  # u in [-1, 1] is -1000 ... 1000 HU
MU_MAP = AffineMap(MU_WATER_PER_MM, MU_WATER_PER_MM)  # mu = mu_water (1 + u)


def magnitude_map(data: np.ndarray) -> AffineMap:
    """Image of no absolute scale to [-1, 1]: u = 2 (image - low) / (p99.5 - low) - 1, low = 0, or p0.5 where negative.

    Raises:
        InputError: the image is constant.
    """
    low, high = (float(v) for v in np.percentile(data, (0.5, 99.5)))
    low = min(low, 0.0)
    if not high > low:
        raise InputError(f"values from {data.min():.6g} to {data.max():.6g} leave no contrast; check the file")
    return AffineMap((high - low) / 2, (high + low) / 2)


def hu_to_mu(hu: np.ndarray, mu_water_per_mm: float = MU_WATER_PER_MM, hu_max: float = HU_MAX) -> np.ndarray:
    """Attenuation ``mu = mu_water (1 + HU / 1000) >= 0`` in 1/mm, of HU clipped to [-1000, ``hu_max``]."""
    return mu_water_per_mm * (1 + np.clip(hu, HU_AIR, hu_max) / 1000)


def mu_to_hu(mu: np.ndarray, mu_water_per_mm: float = MU_WATER_PER_MM) -> np.ndarray:
    """``HU = 1000 (mu / mu_water - 1)`` of mu in 1/mm; no clipping."""
    return 1000 * (np.asarray(mu) / mu_water_per_mm - 1)


def check_hu_range(data: np.ndarray) -> None:
    """Refuse an array that cannot be a CT volume in HU.

    Raises:
        InputError: constant, out of the range of any scanner, normalised, attenuation instead of HU, or raw
            stored values (MR, or CT without its rescale intercept); the message says which.
    """
    data = np.asarray(data)
    lo, hi = float(data.min()), float(data.max())
    say = f"values from {lo:.6g} to {hi:.6g} are not HU: "
    if not (np.isfinite(lo) and np.isfinite(hi)):
        raise InputError(say + "some are NaN or infinite; load the volume with --nan fill")
    if lo == hi:
        raise InputError(say + "the volume is constant; check the file")
    if lo < -32768 or hi > 70000:
        raise InputError(say + "beyond the range of any scanner; check the rescale slope and intercept")
    if hi - lo < 20:
        raise InputError(say + "they look normalised or like attenuation; convert to HU first")
    if lo > -200:
        background = np.mean(data == lo)
        soft_tissue = np.mean((data > -150) & (data < 150))
        # A crop inside the body has no air either, but consists of soft tissue, with fat or noise below 0 and without a
        # flat background; an MR volume of small values has nothing below 0.
        if lo >= 0 or soft_tissue < 0.5 or background > 0.1:
            raise InputError(
                say + "no air, and little soft tissue near 0; subtract 1024 if the rescale intercept is missing, "
                "or use an mri or restoration operator if this is no CT"
            )


def guess_modality(data: np.ndarray) -> str:
    """``"CT"`` if the values look like HU with air (below -500) and tissue in it, else ``"image"``."""
    data = np.asarray(data)
    lo, hi = float(data.min()), float(data.max())
    if not (-32768 <= lo <= -500 and 0 <= hi <= 70000):
        return "image"
    typical = (data <= -800) | ((data >= -250) & (data <= 350))  # air, padding, lung; fat to soft tissue
    return "CT" if np.mean(typical) > 0.5 else "image"


def rescale(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """``slope * stored + intercept`` in double precision, returned as float32; a slope of 0 or NaN means as stored.

    Raises:
        InputError: the slope is usable, the intercept is not finite.
    """
    if not np.isfinite(slope) or slope == 0:
        with np.errstate(over="ignore", invalid="ignore"):
            return stored.astype(np.float32, order="C")
    if not np.isfinite(intercept):
        raise InputError(f"rescale intercept is {intercept}; repair the header")
    image = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite results are for the caller to refuse
        for k in range(stored.shape[-1]):  # slice by slice: the double-precision copy stays small
            image[..., k] = slope * stored[..., k].astype(np.float64) + intercept
    return image


def fill_nonfinite(image: np.ndarray) -> tuple[np.ndarray, str]:
    """Replace NaN and infinite values by the smallest finite one; also returns a sentence for the record.

    Raises:
        InputError: nothing is finite.
    """
    finite = np.isfinite(image)
    if not finite.any():
        raise InputError("no value is finite; check the file")
    value = image[finite].min()
    return np.where(finite, image, value), f"{np.sum(~finite)} NaN or infinite voxels were filled with {value:.6g}"
