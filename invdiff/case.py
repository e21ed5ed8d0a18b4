"""What is reconstructed: a measurement with its operator, the grid, and the truth where it is known."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.errors import InputError
from invdiff.files import label
from invdiff.intensity import CT_MAP, MU_MAP, AffineMap
from invdiff.measurement import Measurement
from invdiff.volume import MAX_VOXELS, SliceStack, Volume, in_order_of, load_volume, to_slices

if TYPE_CHECKING:
    from invdiff.operator import LinearOperator


@dataclass(frozen=True)
class Case:
    """A measurement, the grid to reconstruct on, and the truth where it is known.

    Attributes:
        measurement: y ``(S, 1, views, detectors)``, ``(S, 1, H, W)`` or ``(S, 2 coils, ...)`` in the order of
            ``grid.data``, with operator, noise and weights; of a cone beam, detector rows in the place of S.
        operator: on the CPU, in physical units.
        grid: slices whose geometry the result takes.
        truth: ``(S, H, W)`` in the units of ``grid`` (HU clipped to what was measured), or None.
        description: one line for terminal and manifest.
        inputs: role to path, for the manifest.
        notes: remarks and overrides.
        scan: where ``grid.source`` lies in the scan it was cut from: its first slice, and the slices of the scan.
        physical: from the prior's range to the units of ``operator`` (CT: 1/mm).
        image: from the prior's range to the units of ``grid`` and ``truth`` (CT: HU).
        support: where anything is measured, bool ``(H, W)`` or ``(S, H, W)``, or None for everywhere; the result is 0
            elsewhere.
    """

    measurement: Measurement
    operator: "LinearOperator"
    grid: SliceStack
    truth: np.ndarray | None
    description: str
    inputs: dict[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    scan: tuple[int, int] | None = None
    physical: AffineMap = MU_MAP
    image: AffineMap = CT_MAP
    support: np.ndarray | None = None

    @property
    def modality(self) -> str:
        """``"CT"``, ``"MR"`` or ``"image"``."""
        return self.grid.source.modality

    def picture(self, u: np.ndarray) -> np.ndarray:
        """What is shown of ``(S, C, H, W)`` in the prior's range: ``(S, H, W)``, the magnitude of complex images."""
        if self.operator.complex_image:
            magnitude = self.image.scale * np.hypot(u[:, 0], u[:, 1])
            return magnitude if self.support is None else np.where(self.support, magnitude, 0.0)
        return self.image.apply(u[:, 0])

    @property
    def indices(self) -> tuple[int, ...]:
        """Position of each slice in the whole scan, counted in the order of the stack."""
        offset, total = self.scan or (0, self.grid.source.data.shape[self.grid.axes[0]])
        a, b = (offset + n for n in self.grid.slices)
        first = total - b if self.grid.flips[0] else a
        return tuple(range(first, first + b - a))


#: HU and T1-like brightness of what the phantom is made of: air, lung, fat, water, soft tissue, bone.
MR_CONTRAST = ((-1000, -500, -110, -80, 0, 30, 60, 300, 1000), (0, 0.1, 1, 1, 0.3, 0.45, 0.55, 0.35, 0.1))


def example_volume(modality: str = "CT") -> Volume:
    """The built-in chest phantom, 16 slices of 192 x 192, in HU; for ``"MR"`` a magnitude with contrast like T1."""
    from invdiff.phantom import thorax

    phantom = thorax((16, 192, 192))
    data = np.ascontiguousarray(phantom.hu.transpose(2, 1, 0))
    z, y, x = phantom.voxel_mm
    n = np.array(phantom.hu.shape[::-1])
    affine = np.diag([-x, -y, z, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (n - 1) / 2
    if modality == "MR":
        return Volume(np.interp(data, *MR_CONTRAST).astype(np.float32), affine, units="1", modality="MR")
    return Volume(data, affine, units="HU", modality="CT")


def grid_description(grid: SliceStack) -> dict[str, Any]:
    """/volume of a measurement file: the grid of exactly these slices."""
    source, axis = grid.source, grid.axes[0]
    affine = source.affine.copy()
    affine[:3, 3] += grid.slices[0] * affine[:3, axis]
    shape = list(source.data.shape)
    shape[axis] = grid.slices[1] - grid.slices[0]
    described = {"shape": [int(n) for n in shape], "affine": affine.tolist(), "slice_axis": int(axis)}
    described |= {"first_slice": int(grid.slices[0]), "slices_of_scan": int(source.data.shape[axis])}
    return described | {"units": source.units, "modality": source.modality}


def in_file_order(measurement: Measurement, grid: SliceStack) -> Measurement:
    """The measurement with slices in the order of the volume's array axis, as files store it (its own inverse).

    Detector rows of a cone beam stay in the order of ``grid.data``, whatever the file.
    """
    if not grid.flips[0] or measurement.is_cone:
        return measurement
    return measurement.of_slices(slice(None, None, -1))


def measured_only(y: np.ndarray, operator) -> np.ndarray:
    """``y`` with zeros where a mask says that nothing was measured, whatever stands there."""
    mask = getattr(operator, "mask", None)
    if mask is None:
        return y
    keep = mask.cpu().numpy()
    return np.where(keep if keep.ndim == 2 else keep[:, None], y, np.zeros((), y.dtype))


def measured_grid(
    measurement: Measurement, slices, allow_shear: bool, thick: bool = False
) -> tuple[SliceStack, tuple[int, int]]:
    """The slices to reconstruct, and where the measured ones lie in the scan: first slice, slices of the scan.

    ``thick``: the measurement has fewer slices than the grid, or none of its own (detector rows of a cone beam).
    """
    v = measurement.volume
    if math.prod(v["shape"]) > MAX_VOXELS:
        raise InputError(
            f"/volume has {math.prod(v['shape']):.3g} voxels, the limit is {MAX_VOXELS:.3g}; split the file"
        )
    volume = Volume(np.zeros(v["shape"], np.float32), np.asarray(v["affine"]), v["units"], v["modality"])
    axis = "auto" if v.get("slice_axis") is None else v["slice_axis"]
    grid = to_slices(volume, axis=axis, slices=slices, allow_shear=allow_shear)
    count = volume.data.shape[grid.axes[0]]
    if not thick and len(measurement.y) != count:
        raise InputError(f"{len(measurement.y)} measured slices for a volume of {count}; make them agree")
    first, total = v.get("first_slice", 0), v.get("slices_of_scan", count)
    if type(first) is not int or type(total) is not int or not 0 <= first <= total - count:
        raise InputError(f"/volume: first_slice {first} of slices_of_scan {total} leaves no room for {count}; repair")
    return grid, (first, total)


def reference_stack(
    path, grid: SliceStack, scan: tuple[int, int], allow_shear: bool, check: Callable[[np.ndarray], None] | None = None
) -> np.ndarray:
    """The truth on ``grid``, from a volume of just the measured slices or of the whole scan, after ``check``."""
    volume = in_order_of(load_volume(path, modality=grid.source.modality), grid.source)
    axis, name = grid.axes[0], label(path)
    cut, count = grid.slices, volume.data.shape[axis]
    if count == scan[1]:
        cut = (cut[0] + scan[0], cut[1] + scan[0])
    try:
        if check is not None:
            check(volume.data)
        stack = to_slices(volume, axis=axis, slices=cut, allow_shear=allow_shear) if cut[1] <= count else None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if stack is None or stack.data.shape != grid.data.shape or not np.allclose(stack.affine, grid.affine, atol=1e-3):
        raise InputError(
            f"{name}: grid {volume.data.shape} differs from the measurement's {grid.source.data.shape} in shape "
            "or affine; resample the reference first"
        )
    return stack.data
