"""A measurement as a value, checked: data, operator, grid, noise, and the arrays that the operator is made of."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from invdiff.errors import InputError

FORMAT_VERSION = 1
#: Arrays that an operator is made of, and their kind: sampling masks, coil maps, trajectories in cycles per pixel.
ARRAYS = {"mask": "b", "maps": "c", "trajectory": "f", "kernel": "f"}


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a scanner, or a simulation of one, delivered.

    Attributes:
        y: float32 ``(slices, channels, views, detectors)``; CT has one channel of line integrals (dimensionless), MRI
            the real parts of all coils and then the imaginary ones, images one channel of their own units. A cone beam
            has detector rows in the place of slices, growing as slices are shown (axial: to superior).
        operator: ``name`` and every parameter, units in the key names (``views_deg``, ``detector_pitch_mm``).
        volume: the grid to reconstruct on: ``shape`` (i, j, k), ``affine`` 4x4 to RAS+ mm, ``units``, ``modality``;
            optionally ``slice_axis``, the array axis along which y has its slices.
        noise: ``model`` and its level (``photons``, ``std``, ...).
        weights: inverse variance of every element of y, same shape, or None.
        format_version: of the file.
        arrays: what the operator is made of besides, by the names of ``ARRAYS``: ``mask`` (0 and 1) ``(H, W)`` or
            ``(slices, H, W)``, ``maps`` complex ``(coils, H, W)`` or ``(slices, coils, H, W)``, ``trajectory``
            ``(shots, samples, 2)``, ``kernel``.

    Raises:
        InputError: parts missing, y not float or not finite, numbers of angles and projections that differ,
            angles in radians, counts instead of line integrals.
    """

    y: np.ndarray = field(repr=False)
    operator: dict[str, Any]
    volume: dict[str, Any]
    noise: dict[str, Any]
    weights: np.ndarray | None = field(default=None, repr=False)
    format_version: int = FORMAT_VERSION
    arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if not isinstance(self.operator.get("name"), str):
            raise InputError("/operator has no 'name'; name the operator, e.g. ct-sparse")
        if self.is_ct:
            _check_line_integrals(np.asarray(self.y))
        object.__setattr__(self, "y", _float32(self.y, "y"))
        _check_grid(self.volume, self.y.shape, self.is_cone or self.operator.get("axis") == "through-plane")
        if self.is_ct:
            _check_views(self.operator, self.y.shape)
        if not isinstance(self.noise.get("model"), str):
            raise InputError("/noise has no 'model'; name it, e.g. gaussian, poisson or none")
        _check_numbers("operator", self.operator)
        _check_numbers("noise", self.noise)
        if self.weights is not None:
            weights = _float32(self.weights, "weights")
            if weights.shape != self.y.shape or weights.min() < 0 or weights.max() == 0:
                raise InputError(f"/weights must be >= 0, not all 0, and shaped like y {self.y.shape}; recompute them")
            object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "arrays", {name: _checked(name, a) for name, a in self.arrays.items()})

    def of_slices(self, slices: slice, volume: dict[str, Any] | None = None) -> "Measurement":
        """Those slices alone, of everything that has slices, for the grid ``volume`` (default the same)."""
        count = len(self.y)
        per_slice = {"mask": 3, "maps": 4}  # axes that an array has if slices differ
        arrays = {
            name: a[slices].copy() if a.ndim == per_slice.get(name) and len(a) == count else a
            for name, a in self.arrays.items()
        }
        weights = None if self.weights is None else self.weights[slices].copy()
        y = self.y[slices].copy()  # a reversed axis of length 1 would keep its negative stride otherwise
        return replace(self, y=y, weights=weights, arrays=arrays, volume=self.volume if volume is None else volume)

    @property
    def is_ct(self) -> bool:
        """Whether the operator is one of the ``ct-*`` family."""
        return self.operator["name"].split("-")[0] == "ct"

    @property
    def is_cone(self) -> bool:
        """Whether y has detector rows in the place of slices."""
        return self.is_ct and self.operator.get("geometry") == "cone"


def _float32(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind != "f":
        raise InputError(f"/{name} has dtype {values.dtype}, not float32; convert it (complex: stack real, imaginary)")
    if values.ndim != 4 or not values.size:
        raise InputError(f"/{name} must be (slices, channels, views, detectors), got {values.shape}; reshape it")
    values = values.astype(np.float32, copy=False)
    if bad := int(np.sum(~np.isfinite(values))):
        raise InputError(f"/{name} holds {bad} NaN or infinite values; repair them, or give them weight 0 and value 0")
    return values


def _check_line_integrals(y: np.ndarray) -> None:
    if y.size and (y.dtype.kind in "iu" or (y.dtype.kind == "f" and np.nanmin(y) > 50)):
        raise InputError("/y looks like photon counts, not line integrals; store -log(counts / counts without object)")


def _check_grid(volume: dict[str, Any], y_shape: tuple[int, ...], thick: bool = False) -> None:
    if missing := [key for key in ("shape", "affine", "units", "modality") if key not in volume]:
        raise InputError(f"/volume has no {', '.join(missing)}; describe the grid to reconstruct on")
    for key in ("units", "modality"):
        if not isinstance(volume[key], str):
            raise InputError(
                f"/volume {key} is {str(volume[key])[:40]}; give a text, e.g. 'HU' and 'CT' or '1' and 'MR'"
            )
    shape = volume["shape"]
    if not isinstance(shape, list | tuple) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise InputError(f"/volume shape is {str(shape)[:40]}; give three positive integers")
    try:
        affine = np.asarray(volume["affine"], dtype=np.float64)
    except (TypeError, ValueError):
        affine = np.empty(0)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise InputError("/volume affine is not an invertible 4x4 matrix; give voxel index to RAS+ mm")
    axis = volume.get("slice_axis")
    if axis is not None and (type(axis) is not int or not 0 <= axis <= 2):
        raise InputError(f"/volume slice_axis is {str(axis)[:40]}; give 0, 1 or 2")
    if not thick and y_shape[0] not in (shape if axis is None else [shape[axis]]):
        raise InputError(f"y has {y_shape[0]} slices, the volume is {tuple(shape)}; give the grid of just those slices")


def _check_views(operator: dict[str, Any], y_shape: tuple[int, ...]) -> None:
    if y_shape[1] != 1:
        raise InputError(f"CT has one channel, /y is {y_shape}; reshape it to (slices, 1, views, detectors)")
    if "angles_rad" in operator:
        raise InputError("/operator gives angles_rad; convert to degrees and store views_deg")
    if "views_deg" in operator:
        try:
            angles = np.asarray(operator["views_deg"], dtype=np.float64).ravel()
        except (TypeError, ValueError):
            raise InputError("/operator views_deg is not a list of numbers; repair it") from None
        if len(angles) != y_shape[2]:
            raise InputError(f"{len(angles)} angles but {y_shape[2]} projections; make /operator and /y agree")
        if len(angles) >= 16 and _like_radians(angles):
            raise InputError(f"views_deg end at {angles.max():.4g}, like radians; convert them to degrees")
    count = operator.get("detector_count", y_shape[3])
    rows = operator.get("detector_rows", y_shape[0])
    if rows != y_shape[0]:
        raise InputError(f"{str(rows)[:40]} detector rows but {y_shape[0]} in /y; make /operator and /y agree")
    if count != y_shape[3]:
        raise InputError(f"{str(count)[:40]} detector bins but {y_shape[3]} columns; make /operator and /y agree")


def _like_radians(angles: np.ndarray) -> bool:
    """Whether the views cover pi or 2 pi, with or without a last view at the end."""
    span = float(np.ptp(angles))
    covered = (span, span * len(angles) / (len(angles) - 1))
    return any(abs(c - turn) < 0.02 * turn for c in covered for turn in (math.pi, 2 * math.pi))


_POSITIVE = ("mu_water_per_mm", "photons", "std")
_NOT_NEGATIVE = ("model_error", "electronic_counts")
_MOST = 1e15  # squares of it still are single-precision numbers


def _check_numbers(part: str, parameters: dict[str, Any]) -> None:
    """The numbers that turn y into a whitened problem."""
    for key in set(parameters) & {*_POSITIVE, *_NOT_NEGATIVE}:
        value = parameters[key]
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not 0 <= value <= _MOST or (value == 0 and key in _POSITIVE):
            what = "positive" if key in _POSITIVE else "0 or larger"
            raise InputError(f"/{part} {key} is {str(value)[:40]}; give a finite number, {what}, at most {_MOST:g}")


def _checked(name: str, array: np.ndarray) -> np.ndarray:
    """An array of ``ARRAYS``: known, of its kind and finite."""
    if name not in ARRAYS:
        raise InputError(f"/{name[:40]} is no array that an operator is made of; choose {', '.join(ARRAYS)}")
    array = np.asarray(array)
    if ARRAYS[name] == "b":
        if array.dtype.kind not in "buif" or not np.isin(array, (0, 1)).all():
            raise InputError(f"/{name} holds values other than 0 and 1; threshold it")
        return array.astype(bool)
    if array.dtype.kind != ARRAYS[name] or not np.isfinite(array).all() or not array.size:
        kind = {"c": "complex", "f": "real"}[ARRAYS[name]]
        raise InputError(f"/{name} must be {kind}, finite and not empty, got {array.dtype} {array.shape}; repair it")
    return array
