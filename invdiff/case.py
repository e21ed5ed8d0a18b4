"""What is reconstructed: a measurement with its operator, the grid, and the truth where it is known."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.intensity import CT_MAP, MU_MAP, AffineMap
from invdiff.measurement import Measurement
from invdiff.volume import SliceStack, Volume

if TYPE_CHECKING:
    from invdiff.operator import LinearOperator


@dataclass(frozen=True)
class Case:
    """A measurement, the grid to reconstruct on, and the truth where it is known.

    Attributes:
        measurement: y ``(S, 1, views, detectors)`` or ``(S, 1, H, W)`` in the order of ``grid.data``, with operator,
            noise and weights; of a cone beam, detector rows in the place of S.
        operator: on the CPU, in physical units.
        grid: slices whose geometry the result takes.
        truth: ``(S, H, W)`` in the units of ``grid`` (HU clipped to what was measured), or None.
        description: one line for terminal and manifest.
        inputs: role to path, for the manifest.
        notes: remarks and overrides.
        scan: where ``grid.source`` lies in the scan it was cut from: its first slice, and the slices of the scan.
        physical: from the prior's range to the units of ``operator`` (CT: 1/mm).
        image: from the prior's range to the units of ``grid`` and ``truth`` (CT: HU).
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

    @property
    def modality(self) -> str:
        """``"CT"``, ``"MR"`` or ``"image"``."""
        return self.grid.source.modality

    @property
    def indices(self) -> tuple[int, ...]:
        """Position of each slice in the whole scan, counted in the order of the stack."""
        offset, total = self.scan or (0, self.grid.source.data.shape[self.grid.axes[0]])
        a, b = (offset + n for n in self.grid.slices)
        first = total - b if self.grid.flips[0] else a
        return tuple(range(first, first + b - a))


def example_volume() -> Volume:
    """The built-in chest phantom, 16 slices of 192 x 192, as a volume in HU."""
    from invdiff.phantom import thorax

    phantom = thorax((16, 192, 192))
    z, y, x = phantom.voxel_mm
    n = np.array(phantom.hu.shape[::-1])
    affine = np.diag([-x, -y, z, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (n - 1) / 2
    return Volume(np.ascontiguousarray(phantom.hu.transpose(2, 1, 0)), affine, units="HU", modality="CT")


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
    weights = measurement.weights
    return replace(
        measurement,
        y=np.ascontiguousarray(measurement.y[::-1]),
        weights=None if weights is None else np.ascontiguousarray(weights[::-1]),
    )
