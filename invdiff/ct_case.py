"""CT as a case: a volume in HU that is measured first, or a measurement file."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.case import Case, example_volume, grid_description, in_file_order, measured_grid, reference_stack
from invdiff.errors import InputError, ResourceError, UsageError
from invdiff.files import label
from invdiff.intensity import HU_MAX, MU_WATER_PER_MM, AffineMap, check_hu_range
from invdiff.measurement import Measurement
from invdiff.volume import SliceStack, Volume, load_volume, to_slices

if TYPE_CHECKING:
    from invdiff.operator import LinearOperator
    from invdiff.operators.ct import CT
    from invdiff.operators.ct_cone import CTCone


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
        raise InputError(f"{label(source)}: {error}") from None
    return volume, f"{label(source)}, measured by simulation", {"input": Path(source)}


def simulated_case(
    source, op: str, options: dict[str, Any], *, seed: int, axis="auto", slices=None, load=None, allow_shear=False
) -> Case:
    """Measure a volume with operator ``op``; see :func:`volume_to_measure` for ``source``."""
    from invdiff.operators import build, resolve
    from invdiff.operators.ct import CT
    from invdiff.operators.ct_cone import CTCone
    from invdiff.simulate import ELECTRONIC_NOISE, simulate_ct

    options = resolve(op, **options)
    volume, description, inputs = volume_to_measure(source, load or {})
    try:
        grid = to_slices(volume, axis=axis, slices=slices, allow_shear=allow_shear)
    except InputError as error:
        raise InputError(f"{label(volume.path)}: {error}" if volume.path else str(error)) from None
    operator = build(op, *_scanned(grid, options["geometry"] == "cone"), **options)
    if not isinstance(operator, CT | CTCone):
        raise UsageError(f"operator '{op}' has no simulation; measure the volume elsewhere and give the file")
    _check_size(len(grid.data), operator)
    truth = np.clip(grid.data, -1000, HU_MAX)
    notes = (*volume.notes, *operator.notes)
    blank = Case(None, operator, grid, truth, description, inputs, notes)  # type: ignore[arg-type]
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


def _scanned(grid: SliceStack, whole: bool) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape and spacing in mm of what a scanner sees: a slice, or the ``whole`` volume."""
    if whole:
        return grid.data.shape, (grid.spacing_mm, *grid.pixel_mm)
    return grid.data.shape[1:], grid.pixel_mm


def _check_size(slices: int, operator: "LinearOperator") -> None:
    """Refuse a simulation that cannot fit: counts, noise and weights take about 64 bytes a ray, of half the memory."""
    import torch

    from invdiff.operators.projector import default_memory_limit

    *rows, _, views, count = operator.out_shape
    what, items = ("detector rows", rows[0]) if rows else ("slices", slices)
    needed, memory = 64 * items * views * count, 2 * default_memory_limit(torch.device("cpu"))
    if needed > memory:
        raise ResourceError(
            f"{items} {what} x {views} views x {count} detector elements need about {needed / 1e9:.3g} GB, "
            f"half the memory here is {memory / 1e9:.3g}: use fewer views, a coarser --detector-pitch, or --slices A:B"
        )


def measured_ct(path, measurement: Measurement, *, slices=None, reference=None, allow_shear=False) -> Case:
    """A measurement file of this family.

    Raises:
        InputError: the file does not fit itself or the reference.
    """
    name = Path(path).name
    try:
        if measurement.arrays:
            raise InputError(f"/{next(iter(measurement.arrays))} has no meaning for CT; remove it")
        v = measurement.volume
        if (v["units"], v["modality"]) != ("HU", "CT"):
            raise InputError(f"/volume has units {v['units']!r} and modality {v['modality']!r}; CT gives 'HU' and 'CT'")
        grid, scan = measured_grid(measurement, slices, allow_shear, thick=measurement.is_cone)
        count = grid.source.data.shape[grid.axes[0]]
        if measurement.is_cone and grid.slices != (0, count):
            raise InputError(
                f"slices {slices[0]}:{slices[1]}: a cone beam measures all {count} slices together; drop --slices"
            )
        operator = _scanner(measurement, grid)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    rows = slice(None) if measurement.is_cone else slice(*grid.slices)
    cut = measurement.of_slices(rows, grid_description(grid))
    truth, inputs = None, {"input": Path(path)}
    if reference is not None:
        stack = reference_stack(reference, grid, scan, allow_shear, check_hu_range)
        truth, inputs["reference"] = np.clip(stack, -1000, HU_MAX), Path(reference)
    mu_water = float(measurement.operator.get("mu_water_per_mm", MU_WATER_PER_MM))
    return Case(
        in_file_order(cut, grid),
        operator,
        grid,
        truth,
        f"measurement {name}",
        inputs,
        operator.notes,
        scan=scan,
        physical=AffineMap(mu_water, mu_water),
    )


def _scanner(measurement: Measurement, grid: SliceStack) -> "CT | CTCone":
    """The operator that /operator describes, for the slices of ``grid``."""
    from invdiff.operators.ct import CT, scanner_from_dict

    try:
        operator = scanner_from_dict(measurement.operator)
    except (TypeError, ValueError) as error:  # UsageError among them
        raise InputError(f"/operator is no scan that can be read ({error}); write it with `invdiff simulate`") from None
    shape, spacing = _scanned(grid, measurement.is_cone)
    own = operator.pixel_mm if isinstance(operator, CT) else operator.voxel_mm
    if operator.shape != shape or not np.allclose(own, spacing, rtol=1e-3):
        what = "a volume" if measurement.is_cone else "slices"
        raise InputError(
            f"/operator images {operator.shape} of {own} mm, "
            f"/volume has {what} {shape} of {spacing} mm; make them agree"
        )
    return operator
