"""Degraded images as measurements: blur, missing pixels, super-resolution, noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

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
from invdiff.errors import InputError, ShapeError, UsageError, choose
from invdiff.files import VOLUME_SUFFIXES, label, show
from invdiff.formats.plain import FILES
from invdiff.intensity import CT_MAP, AffineMap, magnitude_map
from invdiff.measurement import Measurement
from invdiff.noise import NOISES, Noise, Poisson
from invdiff.operators import OPERATORS, acts_on_stack, build, resolve
from invdiff.volume import SliceStack, Volume, in_order_of, load_volume, to_slices

NOISE_LEVEL = 0.01  # of the 0.5 to 99.5 percentile range of the image


def restoration_case(request, source: Path | Volume | None) -> Case:
    """An image that is the measurement, or with ``simulate`` (and for the example) one that is degraded first.

    Args:
        request: a ``runner.Request`` whose ``op`` acts on images.
        source: path, volume in memory, or None for the built-in example.

    Raises:
        InputError: the image cannot be read, or does not fit the operator or the reference.
        UsageError: options that contradict each other.
    """
    options = resolve(request.op, **request.operator)
    volume, description, inputs = _load(request, source)
    grid = to_slices(volume, request.slice_axis, request.slices, request.allow_shear)
    if request.simulate or source is None:
        if request.reference is not None:
            raise UsageError("--reference: a degraded volume is scored against itself; drop the option")
        return _degrade(request, options, grid, f"{description}, degraded by simulation", inputs)
    return _given(request, options, grid, f"{description}, as measured", inputs)


def _load(request, source) -> tuple[Volume, str, dict[str, Path]]:
    if source is None:
        return example_volume(), "built-in example: a phantom made by code, not a patient", {}
    if isinstance(source, Volume):
        return source, "a volume in memory", {}
    volume = load_volume(source, **load_options(request))
    return volume, label(source), {"input": Path(source)}


def load_options(request) -> dict[str, Any]:
    """What ``load_volume`` is told by a ``runner.Request``."""
    return {name: getattr(request, name) for name in ("nan", "volume_index", "series", "accept")}


def contrast(image: np.ndarray) -> float:
    """Width of the 0.5 to 99.5 percentile range, the unit of ``noise_level``."""
    low, high = np.percentile(image, (0.5, 99.5))
    return float(high - low)


def estimate_noise(stack: np.ndarray) -> float:
    """Standard deviation of white noise in ``(S, H, W)``: median absolute diagonal detail / 0.6745 (Donoho 1994).

    The detail is that of the finest Haar wavelet, where images have little of their own; constant borders, which hold
    no noise, do not count.
    """
    h, w = (n // 2 * 2 for n in stack.shape[1:])
    a = stack[:, :h, :w].astype(np.float64)
    detail = (a[:, ::2, ::2] - a[:, 1::2, ::2] - a[:, ::2, 1::2] + a[:, 1::2, 1::2]) / 2
    detail = np.abs(detail[detail != 0])
    return float(np.median(detail) / 0.6745) if detail.size else 0.0


def make_noise(name: str, image: np.ndarray, std: float) -> Noise:
    """The noise model ``name`` of an image, of standard deviation ``std``.

    Rician: of the real and of the imaginary part. Poisson: at the 99.5th percentile p of the image, which makes
    ((p - zero) / std)^2 counts there; zero, where there are none, is 0 or the smallest value of the image, if lower.

    Raises:
        UsageError: an unknown model.
        InputError: magnitudes that are negative.
    """
    kind = choose(name, NOISES, "noise")
    if name == "rician" and image.min() < 0:
        raise InputError(
            f"--noise rician: is that of magnitudes, the image goes down to {image.min():.4g}; use gaussian or poisson"
        )
    if kind is not Poisson:
        return kind(std)
    zero, full = min(0.0, float(image.min())), float(np.percentile(image, 99.5))
    return Poisson(((full - zero) / std) ** 2, full, zero)


def _through(options: dict[str, Any]) -> bool:
    return options.get("axis") == "through-plane"


def _is_file(option: Any) -> bool:
    return isinstance(option, str) and option.lower().endswith(FILES)


def _operator(op: str, options: dict[str, Any], grid: SliceStack):
    shape, spacing = grid.data.shape, (grid.spacing_mm, *grid.pixel_mm)
    first = 0 if acts_on_stack(op, **options) else 1
    mask = options.get("mask", "")
    if isinstance(mask, str) and mask.lower().endswith(VOLUME_SUFFIXES):
        options = {**options, "mask": _mask(Path(mask), grid)}
    operator: Any = build(op, shape[first:], spacing[first:], **options)
    if op == "inpaint" and operator.mask.ndim == 3 and len(operator.mask) != len(grid.data):
        name = mask if isinstance(mask, str) else "/mask"
        have = f"{len(operator.mask)} slices, the image {len(grid.data)}"
        raise InputError(f"mask file {name} has {have}: give one mask for all slices, or one for each")
    return operator


def _mask(path: Path, grid: SliceStack) -> np.ndarray:
    """A mask volume in the slices of ``grid``, ``(S, H, W)``: a NIfTI file lies somewhere, an array does not."""
    volume = in_order_of(load_volume(path, modality=grid.source.modality), grid.source)
    if volume.data.shape != grid.source.data.shape or not np.allclose(volume.affine, grid.source.affine, atol=1e-3):
        raise InputError(f"{show(path.name)}: the mask differs from the image in shape or affine; resample it first")
    data = to_slices(volume, grid.axes[0], grid.slices, allow_shear=True).data
    if wrong := int(np.sum((data != 0) & (data != 1))):
        raise InputError(
            f"{show(path.name)}: the mask must hold 1 (measured) and 0 (missing) only, {wrong} voxels hold other "
            "values: threshold it"
        )
    return data


def _degrade(request, options: dict[str, Any], grid: SliceStack, description: str, inputs) -> Case:
    """Measure ``grid`` and draw noise around it, one generator per (seed, slice)."""
    import torch

    truth = grid.data
    operator = _operator(request.op, options, grid)
    level = NOISE_LEVEL if request.noise_level is None else request.noise_level
    if not contrast(truth) > 0:
        raise InputError(
            f"{description.removesuffix(', degraded by simulation')}: the image is constant; check the file"
        )
    noise = make_noise(request.noise or "gaussian", truth, level * contrast(truth))
    y = operator(torch.from_numpy(truth)[:, None]).numpy().copy()
    indices = Case(None, operator, grid, truth, description).indices  # type: ignore[arg-type]
    for row, index in enumerate(indices[: len(y)]):
        generator = np.random.default_rng([abs(request.seed), index, request.seed < 0])
        y[row] = noise.sample(y[row], generator)
    return _case(request, options, operator, grid, truth, measured_only(y, operator), noise, description, inputs)


def _given(request, options: dict[str, Any], measured: SliceStack, description: str, inputs) -> Case:
    """``measured`` is the measurement; its noise level is given, or estimated."""
    grid = finer(measured, options["factor"], _through(options)) if request.op == "sr" else measured
    operator = _operator(request.op, options, grid)
    y = measured_only(measured.data[:, None], operator)
    seen = y if operator.measured_fraction == 1 else y[measured_only(np.ones_like(y), operator) != 0]
    if request.noise_level is not None:
        std, notes = request.noise_level * contrast(seen), []
    elif request.noise not in (None, "gaussian"):
        raise UsageError(f"--noise {request.noise}: its level cannot be estimated; give --noise-level")
    else:
        std = estimate_noise(y[:, 0])
        notes = [f"noise estimated from the image: standard deviation {std:.4g} {measured.source.units}"]
    if not contrast(seen) > 0:
        raise InputError(f"{description.removesuffix(', as measured')}: the image is constant; check the file")
    if not std > 0:
        raise InputError("no noise could be estimated from the image: give --noise-level, a share of its contrast")
    noise = make_noise(request.noise or "gaussian", seen, std)
    truth = None
    if request.reference is not None:
        truth, inputs = _reference(request, grid), {**inputs, "reference": Path(request.reference)}
    case = _case(request, options, operator, grid, truth, y, noise, description, inputs)
    return replace(case, notes=(*case.notes, *notes))


def measured_image(path, measurement: Measurement, *, slices=None, reference=None, allow_shear=False) -> Case:
    """A measurement file of this family.

    Raises:
        UsageError: slices of a through-plane measurement.
        InputError: the file does not fit itself or the reference.
    """
    name, op = Path(path).name, measurement.operator["name"]
    try:
        options = _described(measurement)
        stack = acts_on_stack(op, **options)
        if stack and slices is not None:
            raise UsageError("was measured as one stack; drop --slices, or cut the volume before it is measured")
        grid, scan = measured_grid(measurement, slices, allow_shear, thick=stack)
        rows = slice(None) if stack else slice(*grid.slices)
        cut = in_file_order(measurement.of_slices(rows, grid_description(grid)), grid)
        operator = _operator(op, {**options, **cut.arrays}, grid)
        got, want = tuple(cut.y.shape[0 if stack else 1 :]), tuple(operator.out_shape)
        if got != want:
            raise InputError(f"/y has {got} numbers, the operator gives {want}; make /y, /operator and /volume agree")
        cut = replace(cut, y=measured_only(cut.y, operator))
        if cut.noise["model"] == "rician" and cut.y.min() < 0:
            raise InputError(f"/noise is rician, of magnitudes, but /y goes down to {cut.y.min():.4g}; correct /noise")
        image_map = _image_map(grid, op, cut.y)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    except (InputError, ShapeError) as error:
        raise InputError(f"{name}: {error}") from None
    truth, inputs = None, {"input": Path(path)}
    if reference is not None:
        truth, inputs["reference"] = reference_stack(reference, grid, scan, allow_shear), Path(reference)
    found = Case(cut, operator, grid, truth, f"measurement {name}", inputs, scan=scan)
    return replace(found, physical=image_map, image=image_map)


def _described(measurement: Measurement) -> dict[str, Any]:
    """Options of the operator that a file describes, arrays in the place of file names.

    Raises:
        InputError: options are missing or of another kind, or an array is missing or has no meaning.
    """
    op = measurement.operator["name"]
    known, arrays = OPERATORS[op].options, measurement.arrays
    options = {k: v for k, v in measurement.operator.items() if k in known}
    if missing := [k for k in known if k not in options and k not in arrays]:
        raise InputError(f"/operator has no {', '.join(missing)}; write it with `invdiff simulate`")
    if foreign := [k for k in arrays if k not in known]:
        raise InputError(f"/{foreign[0]} has no meaning for {op}; remove it")
    if lost := [k for k, v in options.items() if _is_file(v) and k not in arrays]:
        raise InputError(
            f"/operator names the file {options[lost[0]]}, whose content /{lost[0]} is missing; restore it"
        )
    try:
        return resolve(op, **{k: v for k, v in options.items() if k not in arrays}) | arrays
    except UsageError as error:
        raise InputError(f"/operator: {error}") from None


def finer(coarse: SliceStack, factor: int, through: bool) -> SliceStack:
    """The grid with ``factor`` pixels for every one of ``coarse``, in the plane or along the slices; it holds zeros.

    The corner of the volume stays where it is, so that every coarse pixel is the middle of its fine ones.
    """
    source, axis = coarse.source, coarse.axes[0]
    times = np.where(np.arange(3) == axis, factor if through else 1, 1 if through else factor)
    affine = source.affine.copy()
    affine[:3, :3] = source.affine[:3, :3] / times
    affine[:3, 3] += source.affine[:3, :3] @ (0.5 / times - 0.5)
    blank = Volume(np.zeros(source.data.shape * times, np.float32), affine, source.units, source.modality)
    a, b = (times[axis] * n for n in coarse.slices)
    return to_slices(blank, int(axis), (int(a), int(b)), allow_shear=True)


def _case(
    request, options, operator, grid: SliceStack, truth, y: np.ndarray, noise: Noise, description, inputs
) -> Case:
    image_map = _image_map(grid, request.op, y)
    described = {"name": request.op, "shape": list(grid.data.shape), "pixel_mm": list(grid.pixel_mm), **options}
    arrays = {k: getattr(operator, k).numpy() for k in ("kernel", "mask") if _is_file(options.get(k))}
    described |= {k: Path(options[k]).name for k in arrays}
    described_noise = noise.describe()
    measurement = Measurement(y.astype(np.float32), described, grid_description(grid), described_noise, arrays=arrays)
    return Case(
        measurement,
        operator,
        grid,
        truth,
        description,
        inputs,
        (*grid.source.notes, *operator.notes),
        physical=image_map,
        image=image_map,
    )


def _image_map(grid: SliceStack, op: str, y: np.ndarray) -> AffineMap:
    if grid.source.modality == "CT":
        return CT_MAP
    return magnitude_map(y[y != 0] if op == "inpaint" and y.any() else y)


def _reference(request, grid: SliceStack) -> np.ndarray:
    volume = in_order_of(load_volume(request.reference, modality=grid.source.modality), grid.source)
    name = label(request.reference)
    if volume.data.shape != grid.source.data.shape or not np.allclose(volume.affine, grid.source.affine, atol=1e-3):
        raise InputError(f"{name}: differs from the input in shape or affine; resample the reference first")
    return to_slices(volume, grid.axes[0], grid.slices, request.allow_shear).data
