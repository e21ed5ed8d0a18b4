"""What is reconstructed: the built-in phantom, a volume that is measured first, or a measurement file."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.errors import InputError, UsageError
from invdiff.intensity import HU_MAX, MU_WATER_PER_MM, check_hu_range
from invdiff.measurement import Measurement, load_measurement
from invdiff.volume import SliceStack, Volume, load_volume, to_slices

if TYPE_CHECKING:
    from invdiff.operator import LinearOperator

MEASUREMENT_SUFFIXES = (".h5", ".hdf5")


@dataclass(frozen=True)
class Case:
    """A measurement, the grid to reconstruct on, and the truth where it is known.

    Attributes:
        measurement: y ``(S, 1, views, detectors)`` in the order of ``grid.data``, with operator, noise and weights.
        operator: on the CPU, in physical units.
        grid: slices whose geometry the result takes.
        truth: ``(S, H, W)`` in HU clipped to what was measured, or None.
        description: one line for terminal and manifest.
        inputs: role to path, for the manifest.
        notes: remarks and overrides.
    """

    measurement: Measurement
    operator: "LinearOperator"
    grid: SliceStack
    truth: np.ndarray | None
    description: str
    inputs: dict[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def indices(self) -> tuple[int, ...]:
        """Position of each slice in the whole volume, counted in the order of the stack."""
        a, b = self.grid.slices
        total = self.grid.source.data.shape[self.grid.axes[0]]
        first = total - b if self.grid.flips[0] else a
        return tuple(range(first, first + b - a))


def example_volume() -> Volume:
    """The built-in chest phantom, 24 slices of 192 x 192, as a volume in HU."""
    from invdiff.phantom import thorax

    phantom = thorax()
    z, y, x = phantom.voxel_mm
    n = np.array(phantom.hu.shape[::-1])
    affine = np.diag([-x, -y, z, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (n - 1) / 2
    return Volume(np.ascontiguousarray(phantom.hu.transpose(2, 1, 0)), affine, units="HU", modality="CT")


def volume_to_measure(source, load: dict[str, Any]) -> tuple[Volume, str, dict[str, Path]]:
    """The ground truth to simulate from: None (example), a path, or a Volume; checked to be in HU."""
    if source is None:
        return example_volume(), "built-in example: a phantom made by code, not a patient", {}
    if isinstance(source, Volume):
        check_hu_range(source.data)
        return source, "a volume in memory, measured by simulation", {}
    volume = load_volume(source, modality="CT", **load)
    try:
        check_hu_range(volume.data)
    except InputError as error:
        raise InputError(f"{Path(source).name}: {error}") from None
    return volume, f"{Path(source).name}, measured by simulation", {"input": Path(source)}


def simulated_case(
    source, op: str, options: dict[str, Any], *, seed: int, axis="auto", slices=None, load=None, allow_shear=False
) -> Case:
    """Measure a volume with operator ``op``; see :func:`volume_to_measure` for ``source``."""
    from invdiff.operators import build, resolve
    from invdiff.simulate import ELECTRONIC_NOISE, simulate_ct

    options = resolve(op, **options)
    volume, description, inputs = volume_to_measure(source, load or {})
    grid = to_slices(volume, axis=axis, slices=slices, allow_shear=allow_shear)
    operator = build(op, grid.data.shape[1:], grid.pixel_mm, **options)
    truth = np.clip(grid.data, -1000, HU_MAX)
    blank = Case(None, operator, grid, truth, description, inputs, volume.notes)  # type: ignore[arg-type]
    data = simulate_ct(truth, operator, float(options["photons"]), seed, blank.indices)
    physics = {"mu_water_per_mm": MU_WATER_PER_MM, "hu_clip": [-1000.0, HU_MAX]}
    physics |= {"outside_field_of_view": "air, -1000 HU", "model_error": options["model_error"]}
    measurement = Measurement(
        data.y,
        {"name": op, **operator.as_dict(), **physics},
        grid_description(grid),
        {"model": "poisson", "photons": options["photons"], "electronic_counts": ELECTRONIC_NOISE, "seed": seed},
        1 / data.variance,
    )
    return replace(blank, measurement=measurement)


def grid_description(grid: SliceStack) -> dict[str, Any]:
    """/volume of a measurement file: the grid of exactly these slices."""
    source, axis = grid.source, grid.axes[0]
    affine = source.affine.copy()
    affine[:3, 3] += grid.slices[0] * affine[:3, axis]
    shape = list(source.data.shape)
    shape[axis] = grid.slices[1] - grid.slices[0]
    described = {"shape": [int(n) for n in shape], "affine": affine.tolist(), "slice_axis": int(axis)}
    return described | {"units": source.units, "modality": source.modality}


def in_file_order(measurement: Measurement, grid: SliceStack) -> Measurement:
    """The measurement with slices in the order of the volume's array axis, as files store it (its own inverse)."""
    if not grid.flips[0]:
        return measurement
    weights = measurement.weights
    return replace(
        measurement,
        y=np.ascontiguousarray(measurement.y[::-1]),
        weights=None if weights is None else np.ascontiguousarray(weights[::-1]),
    )


def measured_case(path, op: str | None, *, slices=None, reference=None, allow_shear=False) -> Case:
    """A measurement file as written by ``invdiff simulate``.

    Raises:
        InputError: the file does not fit itself, the operator asked for, or the reference.
    """
    from invdiff.operators.ct import CTParallel

    name = Path(path).name
    measurement = load_measurement(path)
    described = measurement.operator
    if not measurement.is_ct:
        raise InputError(f"{name}: holds operator '{described['name']}'; only ct-* measurements can be read so far")
    if op is not None and op != described["name"]:
        raise UsageError(f"{name}: was measured with --op {described['name']}, not {op}; drop --op or correct it")
    v = measurement.volume
    volume = Volume(np.zeros(v["shape"], np.float32), np.asarray(v["affine"]), v["units"], v["modality"])
    axis = v.get("slice_axis", "auto")
    whole = to_slices(volume, axis=axis, allow_shear=allow_shear)
    grid = to_slices(volume, axis=axis, slices=slices, allow_shear=allow_shear)
    geometry_keys = {"rows", "columns", "pixel_mm", "geometry", "views_deg", "detector_count", "detector_pitch_mm"}
    operator = CTParallel.from_dict(
        {k: x for k, x in described.items() if k in geometry_keys | {"detector_offset_mm"}}
    )
    if operator.in_shape[1:] != grid.data.shape[1:] or not np.allclose(operator.pixel_mm, grid.pixel_mm, rtol=1e-3):
        raise InputError(
            f"{name}: /operator images {operator.in_shape[1:]} of {operator.pixel_mm} mm, "
            f"/volume has slices {grid.data.shape[1:]} of {grid.pixel_mm} mm; make them agree"
        )
    if len(measurement.y) != len(whole.data):
        raise InputError(f"{name}: {len(measurement.y)} measured slices for a volume of {len(whole.data)}; make them agree")
    a, b = grid.slices
    weights = None if measurement.weights is None else measurement.weights[a:b]
    cut = in_file_order(replace(measurement, y=measurement.y[a:b], weights=weights, volume=grid_description(grid)), grid)
    truth, inputs = None, {"input": Path(path)}
    if reference is not None:
        truth, inputs["reference"] = _reference(reference, whole, grid, allow_shear), Path(reference)
    return Case(cut, operator, grid, truth, f"measurement {name}", inputs)


def _reference(path, whole: SliceStack, grid: SliceStack, allow_shear: bool) -> np.ndarray:
    volume = load_volume(path, modality="CT")
    source = whole.source
    if volume.data.shape != source.data.shape or not np.allclose(volume.affine, source.affine, atol=1e-3):
        raise InputError(
            f"{Path(path).name}: grid {volume.data.shape} differs from the measurement's {source.data.shape} in shape "
            "or affine; resample the reference first"
        )
    stack = to_slices(volume, axis=grid.axes[0], slices=grid.slices, allow_shear=allow_shear)
    return np.clip(stack.data, -1000, HU_MAX)
