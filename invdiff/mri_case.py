"""Magnetic resonance imaging as a case: a magnitude volume that is measured first, or a measurement file."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.case import (
    Case,
    example_volume,
    grid_description,
    in_file_order,
    measured_grid,
    measured_only,
    reference_stack,
)
from invdiff.errors import InputError
from invdiff.files import label
from invdiff.intensity import AffineMap
from invdiff.measurement import Measurement
from invdiff.operators import build, resolve
from invdiff.volume import Volume, load_volume, to_slices

if TYPE_CHECKING:
    from invdiff.operator import LinearOperator

NOISE_LEVEL = 0.01  # of the 99.5th percentile of the magnitude: standard deviation of real and imaginary part
ARRAYS = ("mask", "maps", "trajectory")  # what an operator of this family is made of


def simulated_mri(
    source,
    op: str,
    options: dict[str, Any],
    *,
    seed=0,
    noise_level=None,
    axis="auto",
    slices=None,
    load=None,
    allow_shear=False,
) -> Case:
    """Measure a magnitude volume: a smooth random phase, the operator, complex Gaussian noise.

    Args:
        source: None (example), a path, or a Volume of magnitudes.
        op: of the MRI family, with its ``options``.
        seed: of phase and noise, one generator per slice.
        noise_level: share of the 99.5th percentile of the magnitude that real and imaginary part of the noise have as
            standard deviation; None for 0.01.
        axis, slices, load, allow_shear: as for :func:`invdiff.ct_case.simulated_case`.

    Raises:
        InputError: values below 0.
    """
    import torch

    from invdiff.linalg import to_real

    resolved = resolve(op, **options)
    volume, description, inputs = _magnitude(source, load or {})
    grid = to_slices(volume, axis, slices, allow_shear)
    operator: Any = build(op, grid.data.shape[1:], grid.pixel_mm, **resolved)
    blank = Case(None, operator, grid, grid.data, description, inputs, volume.notes)  # type: ignore[arg-type]
    std = (NOISE_LEVEL if noise_level is None else noise_level) * float(np.percentile(grid.data, 99.5))
    if not std > 0:
        raise InputError(f"{description}: the 99.5th percentile of the magnitude is 0; check the file")
    rows, sampled = [], getattr(operator, "mask", 1.0)
    for magnitude, index in zip(grid.data, blank.indices, strict=True):
        g = np.random.default_rng([abs(seed), index, seed < 0])
        image = torch.from_numpy(magnitude * np.exp(1j * smooth_phase(magnitude.shape, g)).astype(np.complex64))
        y = operator(to_real(image[None]))
        noise = torch.from_numpy(g.standard_normal(y.shape).astype(np.float32))
        rows.append((y + std * noise * sampled).numpy())
    described = {"name": op, "shape": list(grid.data.shape), "pixel_mm": list(grid.pixel_mm), **resolved}
    described |= {"acceleration_achieved": operator.acceleration}
    noise_model = {"model": "complex-gaussian", "std": std, "seed": seed}
    measurement = Measurement(
        np.stack(rows), described, grid_description(grid), noise_model, arrays=arrays_of(operator)
    )
    return _scaled(replace(blank, measurement=measurement))


def _magnitude(source, load: dict[str, Any]) -> tuple[Volume, str, dict[str, Path]]:
    if source is None:
        return example_volume("MR"), "built-in example: a phantom made by code, not a patient", {}
    volume, name, inputs = source, "a volume in memory", {}
    if not isinstance(source, Volume):
        volume = load_volume(source, modality="MR", **load)
        name, inputs = label(source), {"input": Path(source)}
    try:
        _check_magnitude(volume.data)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return volume, f"{name}, measured by simulation", inputs


def smooth_phase(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """A random phase in radians, ``(H, W)``, standard deviation 1, that varies over about a quarter of the slice."""
    from scipy.ndimage import gaussian_filter

    phase = gaussian_filter(generator.standard_normal(shape), [n / 8 for n in shape], mode="reflect")
    return (phase - phase.mean()) / max(float(phase.std()), 1e-12)


def arrays_of(operator) -> dict[str, np.ndarray]:
    """What the operator is made of, for a measurement file; see :func:`mri_operator`."""
    parts = {name: getattr(operator, name, None) for name in ARRAYS}
    return {name: part.cpu().numpy() for name, part in parts.items() if part is not None}


def mri_operator(arrays: dict[str, np.ndarray], shape: tuple[int, int], density: str = "auto") -> "LinearOperator":
    """Inverse of :func:`arrays_of` for slices of ``shape``; ``density`` as for :class:`NonCartesianMRI`.

    Raises:
        InputError: neither a mask nor a trajectory, or arrays that fit neither each other nor the slices.
    """
    maps = arrays.get("maps")
    try:
        if "trajectory" in arrays:
            from invdiff.operators.noncartesian import NonCartesianMRI

            return NonCartesianMRI(arrays["trajectory"], shape, maps, density)
        if "mask" not in arrays:
            raise InputError("has neither /mask nor /trajectory; store where k-space was sampled")
        from invdiff.operators.mri import CartesianMRI

        return CartesianMRI(arrays["mask"], maps)
    except ValueError as error:  # ShapeError and UsageError among them
        raise InputError(str(error)) from None


def measured_mri(path, measurement: Measurement, *, slices=None, reference=None, allow_shear=False) -> Case:
    """A measurement file of this family.

    Raises:
        InputError: the file does not fit itself or the reference.
    """
    name = Path(path).name
    try:
        _check_kspace(measurement)
        grid, scan = measured_grid(measurement, slices, allow_shear)
        cut = in_file_order(measurement.of_slices(slice(*grid.slices), grid_description(grid)), grid)
        cut = _whitened(cut)
        density = str(measurement.operator.get("density", "auto"))
        operator: Any = mri_operator(cut.arrays, grid.data.shape[1:], density)
        if getattr(operator, "slices", None) not in (None, len(cut.y)):
            raise InputError(f"/mask or /maps have {operator.slices} slices, /y has {len(cut.y)}; make them agree")
        got, want = tuple(cut.y.shape[1:]), tuple(operator.out_shape)
        if operator.in_shape[1:] != grid.data.shape[1:] or got != want:
            raise InputError(
                f"/y has {got} numbers a slice, the volume slices of {grid.data.shape[1:]}; the sampling is made for "
                f"{want} and {operator.in_shape[1:]}; make /y, /mask, /maps and /volume agree"
            )
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    truth, inputs = None, {"input": Path(path)}
    if reference is not None:
        truth = reference_stack(reference, grid, scan, allow_shear, _check_magnitude)
        inputs["reference"] = Path(reference)
    notes = _of_echo_planar(measurement.operator)
    kept = measured_only(cut.y, operator)
    inside, whole = (float(np.sum(np.square(y, dtype=float))) for y in (kept, cut.y))
    if (lost := 1 - inside / max(whole, 1e-300)) > 1e-6:
        notes += (f"/y has {100 * lost:.2g} % of its energy where /mask is 0, left out: is the mask transposed?",)
    cut = replace(cut, y=kept)
    return _scaled(Case(cut, operator, grid, truth, f"measurement {name}", inputs, notes, scan=scan))


def _of_echo_planar(operator: dict[str, Any]) -> tuple[str, ...]:
    """What must be said of lines that were read backwards."""
    turned, left = (operator.get(name) for name in ("reversed_lines", "correction_lines"))
    if not isinstance(turned, int) or turned < 1:
        return ()
    unused = f", and the {left} lines for it in the file were left out" if isinstance(left, int) and left > 0 else ""
    return (
        f"{turned} lines were read backwards (EPI) and turned round, but their phase was not corrected{unused}: unless "
        "it was corrected before, ghosts lie half a field of view away",
    )


def _check_kspace(measurement: Measurement) -> None:
    """Refuse what a file of this family cannot say."""
    v, model = measurement.volume, measurement.noise["model"]
    if v["modality"] not in ("MR", "image") or v["units"] == "HU":
        raise InputError(f"/volume has units {v['units']!r} and modality {v['modality']!r}; MRI gives '1' and 'MR'")
    if model not in ("gaussian", "complex-gaussian"):
        raise InputError(f"/noise is '{model}', that of k-space is complex-gaussian; give its std or covariance")
    if foreign := [k for k in measurement.arrays if k not in ARRAYS]:
        raise InputError(f"/{foreign[0]} has no meaning for MRI; remove it")
    if {"mask", "trajectory"} <= set(measurement.arrays):
        raise InputError("/mask and /trajectory contradict each other; remove one")


def _check_magnitude(data: np.ndarray) -> None:
    if (low := float(data.min())) < 0:
        raise InputError(f"has values down to {low:.6g}, a magnitude has none below 0; is this CT in HU?")


def _whitened(measurement: Measurement) -> Measurement:
    """Coils whitened by the covariance that /noise gives, if it does (``covariance_real``, ``covariance_imag``)."""
    from invdiff.operators.coils import prewhiten

    noise, maps = measurement.noise, measurement.arrays.get("maps")
    if "covariance_real" not in noise:
        return measurement
    if maps is None:
        raise InputError("/noise has a covariance of coils, but there are no /maps; give the maps of these coils")
    try:
        covariance = np.asarray(noise["covariance_real"]) + 1j * np.asarray(noise.get("covariance_imag", 0.0))
        real, imaginary = np.split(measurement.y, 2, 1)
        k, maps = prewhiten(real + 1j * imaginary, covariance), prewhiten(maps, covariance)
    except (TypeError, ValueError) as error:
        raise InputError(f"/noise covariance: {error}") from None
    whitened = {"model": "complex-gaussian", "std": 0.5**0.5, "whitened": True}
    arrays = {**measurement.arrays, "maps": maps.astype(np.complex64)}
    return replace(measurement, y=np.concatenate([k.real, k.imag], 1), noise=whitened, arrays=arrays)


def _scaled(case: Case) -> Case:
    """The case with the map of its intensities: the 99.5th percentile of the zero-filled magnitude is 2, 0 stays 0."""
    import torch

    pinv = case.operator.pinv  # type: ignore[attr-defined]
    zero_filled = np.hypot(*np.moveaxis(pinv(torch.from_numpy(case.measurement.y)).numpy(), -3, 0))
    high = float(np.percentile(zero_filled, 99.5))
    if not high > 0:
        raise InputError(f"{case.description}: k-space holds no signal; check the file")
    intensity, maps = AffineMap(high / 2, 0.0), case.measurement.arrays.get("maps")
    support = None if maps is None else (maps != 0).any(-3)
    return replace(case, physical=intensity, image=intensity, support=support)
