"""What is reconstructed: the built-in phantom, a volume that is measured first, or a measurement file."""

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.errors import InputError, ResourceError, UsageError
from invdiff.files import show
from invdiff.intensity import HU_MAX, MU_WATER_PER_MM, check_hu_range
from invdiff.measurement import Measurement, load_measurement
from invdiff.operators import OPERATORS
from invdiff.volume import MAX_VOXELS, SliceStack, Volume, load_volume, to_slices

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
        scan: where ``grid.source`` lies in the scan it was cut from: its first slice, and the slices of the scan.
    """

    measurement: Measurement
    operator: "LinearOperator"
    grid: SliceStack
    truth: np.ndarray | None
    description: str
    inputs: dict[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    scan: tuple[int, int] | None = None

    @property
    def indices(self) -> tuple[int, ...]:
        """Position of each slice in the whole scan, counted in the order of the stack."""
        offset, total = self.scan or (0, self.grid.source.data.shape[self.grid.axes[0]])
        a, b = (offset + n for n in self.grid.slices)
        first = total - b if self.grid.flips[0] else a
        return tuple(range(first, first + b - a))


def open_case(request) -> Case:
    """The example, a volume to measure, or a measurement file; ``request`` is a ``runner.Request``.

    Raises:
        UsageError: an image volume with a CT operator and without ``simulate``.
    """
    source = request.input
    if source is not None and not isinstance(source, Volume):
        source = Path(source)
        if not os.path.exists(source):  # Path.exists raises for names that are too long
            raise InputError(f"{show(source)}: no such file; check the path")
        if source.suffix.lower() in MEASUREMENT_SUFFIXES:
            return _open_measurement(request, source)
    if request.op is None:
        raise UsageError("say how the volume is measured: --op ct-sparse, ct-limited or ct-lowdose")
    if source is not None and not request.simulate and not isinstance(source, Volume):
        raise UsageError(
            f"{source.name}: an image volume is no {request.op} measurement; add --simulate to measure it first, "
            "or give a measurement file (.h5, see 'invdiff simulate')"
        )
    if request.reference is not None:
        raise UsageError("--reference: a simulated measurement is scored against its own volume; drop the option")
    return simulated_case(
        source,
        request.op,
        request.operator,
        seed=request.seed,
        axis=request.slice_axis,
        slices=request.slices,
        load={"nan": request.nan, "volume_index": request.volume_index},
        allow_shear=request.allow_shear,
    )


def _open_measurement(request, source: Path) -> Case:
    """A measurement file, with the options that it leaves open."""
    if request.operator:
        raise UsageError(f"{source.name}: the file fixes the operator; drop {', '.join(sorted(request.operator))}")
    if request.simulate:
        raise UsageError(f"{source.name}: is a measurement already; drop --simulate")
    if request.slice_axis != "auto" or request.nan != "refuse" or request.volume_index is not None:
        raise UsageError(f"{source.name}: --slice-axis, --nan and --volume-index are for volumes; drop them")
    return measured_case(
        source, request.op, slices=request.slices, reference=request.reference, allow_shear=request.allow_shear
    )


def example_volume() -> Volume:
    """The built-in chest phantom, 16 slices of 192 x 192, as a volume in HU."""
    from invdiff.phantom import thorax

    phantom = thorax((16, 192, 192))
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
    from invdiff.operators.ct import CTParallel
    from invdiff.simulate import ELECTRONIC_NOISE, simulate_ct

    options = resolve(op, **options)
    volume, description, inputs = volume_to_measure(source, load or {})
    try:
        grid = to_slices(volume, axis=axis, slices=slices, allow_shear=allow_shear)
    except InputError as error:
        raise InputError(f"{show(volume.path.name)}: {error}" if volume.path else str(error)) from None
    operator = build(op, grid.data.shape[1:], grid.pixel_mm, **options)
    if not isinstance(operator, CTParallel):
        raise UsageError(f"operator '{op}' has no simulation; measure the volume elsewhere and give the file")
    _check_size(len(grid.data), operator)
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


def _check_size(slices: int, operator: "LinearOperator") -> None:
    """Refuse a simulation that cannot fit: counts, noise and weights take about 64 bytes a ray, of half the memory."""
    import torch

    from invdiff.operators.projector import default_memory_limit

    needed, memory = 64 * slices * math.prod(operator.out_shape), 2 * default_memory_limit(torch.device("cpu"))
    if needed > memory:
        _, views, count = operator.out_shape
        raise ResourceError(
            f"{slices} slices x {views} views x {count} detector elements need about {needed / 1e9:.3g} GB, "
            f"half the memory here is {memory / 1e9:.3g}: use fewer views, a coarser --detector-pitch, or --slices A:B"
        )


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
    name = Path(path).name
    measurement = load_measurement(path)
    measured_with = measurement.operator["name"]
    if not measurement.is_ct or measured_with not in OPERATORS:
        known = ", ".join(n for n in OPERATORS if n.startswith("ct-"))
        raise InputError(f"{name}: holds operator '{show(measured_with)[:40]}'; only {known} can be read so far")
    if op is not None and op != measured_with:
        raise UsageError(f"{name}: was measured with --op {measured_with}, not {op}; drop --op or correct it")
    try:
        grid, scan = _measured_grid(measurement, slices, allow_shear)
        operator = _scanner(measurement, grid)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    a, b = grid.slices
    weights = None if measurement.weights is None else measurement.weights[a:b]
    cut = replace(measurement, y=measurement.y[a:b], weights=weights, volume=grid_description(grid))
    truth, inputs = None, {"input": Path(path)}
    if reference is not None:
        truth, inputs["reference"] = _reference(reference, grid, scan, allow_shear), Path(reference)
    return Case(in_file_order(cut, grid), operator, grid, truth, f"measurement {name}", inputs, scan=scan)


def _measured_grid(measurement: Measurement, slices, allow_shear: bool) -> tuple[SliceStack, tuple[int, int]]:
    """The slices to reconstruct, and where the measured ones lie in the scan: first slice, slices of the scan."""
    v = measurement.volume
    if (v["units"], v["modality"]) != ("HU", "CT"):
        raise InputError(f"/volume has units {v['units']!r} and modality {v['modality']!r}; CT gives 'HU' and 'CT'")
    if math.prod(v["shape"]) > MAX_VOXELS:
        raise InputError(
            f"/volume has {math.prod(v['shape']):.3g} voxels, the limit is {MAX_VOXELS:.3g}; split the file"
        )
    volume = Volume(np.zeros(v["shape"], np.float32), np.asarray(v["affine"]), "HU", "CT")
    axis = "auto" if v.get("slice_axis") is None else v["slice_axis"]
    grid = to_slices(volume, axis=axis, slices=slices, allow_shear=allow_shear)
    count = volume.data.shape[grid.axes[0]]
    if len(measurement.y) != count:
        raise InputError(f"{len(measurement.y)} measured slices for a volume of {count}; make them agree")
    first, total = v.get("first_slice", 0), v.get("slices_of_scan", count)
    if type(first) is not int or type(total) is not int or not 0 <= first <= total - count:
        raise InputError(f"/volume: first_slice {first} of slices_of_scan {total} leaves no room for {count}; repair")
    return grid, (first, total)


def _scanner(measurement: Measurement, grid: SliceStack) -> "LinearOperator":
    """The operator that /operator describes, for the slices of ``grid``."""
    from invdiff.operators.ct import CTParallel

    keys = ("rows", "columns", "pixel_mm", "geometry", "views_deg", "detector_count", "detector_pitch_mm")
    described = {k: x for k, x in measurement.operator.items() if k in (*keys, "detector_offset_mm")}
    try:
        operator = CTParallel.from_dict(described)
    except (TypeError, ValueError) as error:  # UsageError among them
        raise InputError(f"/operator is no scan that can be read ({error}); write it with `invdiff simulate`") from None
    if operator.in_shape[1:] != grid.data.shape[1:] or not np.allclose(operator.pixel_mm, grid.pixel_mm, rtol=1e-3):
        raise InputError(
            f"/operator images {operator.in_shape[1:]} of {operator.pixel_mm} mm, "
            f"/volume has slices {grid.data.shape[1:]} of {grid.pixel_mm} mm; make them agree"
        )
    return operator


def _reference(path, grid: SliceStack, scan: tuple[int, int], allow_shear: bool) -> np.ndarray:
    """The truth on ``grid``, from a volume of just the measured slices or of the whole scan."""
    volume, axis, name = load_volume(path, modality="CT"), grid.axes[0], Path(path).name
    cut, count = grid.slices, volume.data.shape[axis]
    if count == scan[1]:
        cut = (cut[0] + scan[0], cut[1] + scan[0])
    try:
        check_hu_range(volume.data)
        stack = to_slices(volume, axis=axis, slices=cut, allow_shear=allow_shear) if cut[1] <= count else None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if stack is None or stack.data.shape != grid.data.shape or not np.allclose(stack.affine, grid.affine, atol=1e-3):
        raise InputError(
            f"{name}: grid {volume.data.shape} differs from the measurement's {grid.source.data.shape} in shape "
            "or affine; resample the reference first"
        )
    return np.clip(stack.data, -1000, HU_MAX)
