"""Measurement operators, by name: one explicit table, resolved on first use.

Importing this package loads neither torch nor deepinv, so that tables and ``--help`` are instant.
"""

if __name__ != "invdiff.operators":
    raise ImportError("import invdiff.operators, not operators")

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from numbers import Real
from typing import TYPE_CHECKING, Any

from invdiff.errors import UsageError, choose
from invdiff.operators import tuned
from invdiff.operators.tuned import Options

if TYPE_CHECKING:
    from invdiff.operator import LinearOperator

__all__ = ["NOISE_OPTIONS", "OPERATORS", "OperatorEntry", "acts_on_stack", "build", "resolve"]

#: Options that describe the noise of a simulated measurement; ``build`` checks them and leaves them out.
NOISE_OPTIONS = ("photons", "model_error")
MOST = 10**6  # views, detector elements
#: Options that only some geometries have, and which.
GEOMETRY_OPTIONS = {
    "sod": ("fan", "cone"),
    "sdd": ("fan", "cone"),
    "rotation": ("fan", "cone"),
    "detector_shape": ("fan",),
    "detector_rows": ("cone",),
    "detector_row_pitch": ("cone",),
    "detector_row_offset": ("cone",),
}


@dataclass(frozen=True)
class OperatorEntry:
    """One row of the table.

    Attributes:
        summary: one line for ``invdiff operators``.
        target: ``"module:factory"``, imported when the operator is built; the factory is called as
            ``factory(shape, pixel_mm, **options)``.
        options: name -> (default, help with the unit); a default of None is worked out from the image.
        baseline: the solver of its pseudo-inverse.
        family: "ct" (attenuation, line integrals), "mri" (complex images, k-space), or "image" (acts on images in their
            own units; a degraded image is its measurement).
        tuned: solver, or "solver axis", -> its options where those of its class do not suit the operator, or a
            function that works them out; "steps" too.
    """

    summary: str
    target: str
    options: Mapping[str, tuple[Any, str]]
    baseline: str = "fbp"
    family: str = "ct"
    tuned: Options = field(default_factory=dict)


def _ct_options(photons: float, **own: tuple[Any, str]) -> dict[str, tuple[Any, str]]:
    return {
        **own,
        "start": (0.0, "angle of the first view, in degrees"),
        "geometry": ("parallel", "beam geometry: parallel, fan or cone"),
        "sod": (None, "fan, cone: source to axis of rotation, in mm (default: 2 diagonals of the slice)"),
        "sdd": (None, "fan, cone: source to detector, in mm (default: 1.8 times sod)"),
        "detector_shape": ("flat", "fan: flat, or curved around the source"),
        "rotation": ("counterclockwise", "fan, cone: sense in which the source turns, or clockwise"),
        "detector_pitch": (None, "distance between detector elements, in mm (default: the pixel size, at the axis)"),
        "detector_count": (None, "detector elements per view (default: enough to cover the diagonal of the slice)"),
        "detector_offset": (0.0, "shift of the detector along itself, in mm"),
        "axis_offset": (0.0, "distance of the axis of rotation from the midline of source and detector, in mm"),
        "detector_rows": (None, "cone: detector rows (default: enough to cover the volume)"),
        "detector_row_pitch": (None, "cone: distance between detector rows, in mm (default: a slice, at the axis)"),
        "detector_row_offset": (0.0, "cone: shift of the detector along the axis, in mm"),
        "photons": (photons, "photons per ray of a simulated scan, without object"),
        "model_error": (0.0015, "relative mismatch of the projector, added to the noise of every ray"),
    }


_SAMPLING: dict[str, tuple[Any, str]] = {
    "acceleration": (4.0, "numbers of k-space per measured one"),
    "center_fraction": (
        0.08,
        "share of the columns in the middle that are all measured; pattern poisson: of each side",
    ),
    "pattern": ("equispaced", "columns: equispaced, random or gaussian; points: poisson (variable-density disc)"),
    "partial_fourier": (1.0, "share of k-space that is measured along the columns, from 0.5"),
    "seed": (0, "seed of the pattern"),
}

OPERATORS: dict[str, OperatorEntry] = {
    "ct-sparse": OperatorEntry(
        "computed tomography from few views over 180 degrees, fan and cone beam 360",
        "invdiff.operators.scans:ct_sparse",
        _ct_options(1e5, views=(60, "number of views, evenly spaced over the full scan")),
        tuned=tuned.CT,
    ),
    "ct-limited": OperatorEntry(
        "computed tomography from a limited arc",
        "invdiff.operators.scans:ct_limited",
        _ct_options(
            1e5,
            arc=(90.0, "angle covered by the views, in degrees"),
            views=(90, "number of views, evenly spaced over the arc"),
        ),
        tuned=tuned.CT_LIMITED,
    ),
    "ct-lowdose": OperatorEntry(
        "computed tomography with few photons",
        "invdiff.operators.scans:ct_lowdose",
        _ct_options(2e4, views=(180, "number of views, evenly spaced over the full scan")),
        tuned=tuned.CT_LOW_DOSE,
    ),
    "blur": OperatorEntry(
        "blur of every slice, or of the stack",
        "invdiff.operators.blur:blur",
        {
            "kernel": ("gaussian:2", "gaussian[3d]:SIGMA, motion:LENGTH:ANGLE (degrees), or a file (.npy, .png, .nii)"),
            "unit": ("px", "unit of SIGMA and LENGTH: px or mm"),
            "boundary": ("reflect", "circular, reflect or replicate"),
        },
        "wiener",
        "image",
        tuned.IMAGE | {"mbir": tuned.FEW_CG, "pnp": {"lam": 0.15}},  # pnp: CT +0.1 dB, MR +0.3 dB
    ),
    "inpaint": OperatorEntry(
        "missing pixels",
        "invdiff.operators.mask:inpaint",
        {
            "mask": ("random:0.5", "random:FRACTION removed, box:SIZE, stripes:WIDTH (pixels), or a file"),
            "seed": (0, "seed of a random mask"),
        },
        "fill",
        "image",
        tuned.IMAGE,
    ),
    "sr": OperatorEntry(
        "fewer, larger pixels: super-resolution",
        "invdiff.operators.superres:sr",
        {
            "factor": (2, "whole number of fine pixels per coarse one, per axis"),
            "filter": ("auto", "average, bicubic (anti-aliased) or gaussian; auto: bicubic, through the plane average"),
            "axis": ("inplane", "inplane, or through-plane (thick slices)"),
        },
        "bicubic",
        "image",
        # through the plane lam 0.22: -0.1 dB
        tuned.IMAGE | {"pnp": tuned.large_pixels, "pnp through-plane": {"lam": 0.5, "start_blur": 0.0}},
    ),
    "mri": OperatorEntry(
        "magnetic resonance imaging with one coil, Cartesian",
        "invdiff.operators.mri:mri",
        _SAMPLING,
        "zero-filled",
        "mri",
        tuned.MRI_ONE_COIL,
    ),
    "mri-multicoil": OperatorEntry(
        "magnetic resonance imaging with several coils, Cartesian (SENSE)",
        "invdiff.operators.mri:mri_multicoil",
        {**_SAMPLING, "coils": (8, "number of simulated coils around the slice")},
        "zero-filled",
        "mri",
        tuned.MRI,
    ),
    "mri-radial": OperatorEntry(
        "magnetic resonance imaging along spokes, spirals or any trajectory (needs finufft)",
        "invdiff.operators.noncartesian:mri_radial",
        {
            "trajectory": ("radial", "radial, golden (golden-angle spokes), spiral, or a .npy file (cycles per pixel)"),
            "spokes": (None, "number of spokes (default 64), or of interleaves of a spiral (default 16)"),
            "samples": (None, "samples of each (default: 2 per pixel of a spoke, steps of the grid along a spiral)"),
            "turns": (None, "spiral: turns of each interleave (default: those that measure everything)"),
            "start": (None, "angle of the first one, in degrees (default: 0)"),
            "coils": (1, "number of simulated coils around the slice"),
            "density": ("auto", "density compensation of the zero-filled image: auto, ramp or pipe"),
        },
        "zero-filled",
        "mri",
        tuned.MRI,
    ),
    "denoise": OperatorEntry(
        "noise alone", "invdiff.operators.identity:denoise", {}, "measured", "image", {"pnp": {"polish": 0.7}}
    ),
}


def resolve(name: str, /, **options: Any) -> dict[str, Any]:
    """All options of an operator, defaults filled in.

    Args:
        name: a key of ``OPERATORS``.
        **options: values to set; None means the default.

    Raises:
        UsageError: an unknown operator, options that do not belong to it (lists the valid ones), or a value that is
            no number where one is needed, not finite, or out of range.
    """
    entry = choose(name, OPERATORS, "operator")
    foreign = sorted(set(options) - set(entry.options))
    if foreign:
        raise UsageError(
            f"operator '{name}' has no option {', '.join(map(repr, foreign))}: "
            f"its options are {', '.join(entry.options)}"
        )
    given = {key: value for key, value in options.items() if value is not None}
    left_out = _of_other_geometries(given)
    for key, value in given.items():
        default = entry.options[key][0]
        if isinstance(default, str):
            if not isinstance(value, str) and not hasattr(value, "shape"):
                raise UsageError(f"{key} must be a text, got {str(value)[:40]}")
        else:
            whole = isinstance(default, int) or key.endswith(("_count", "_rows"))
            _check_number(key, value, whole)
            given[key] = int(value) if whole else value
    return {key: given.get(key, default) for key, (default, _) in entry.options.items() if key not in left_out}


def _of_other_geometries(given: Mapping[str, Any]) -> set[str]:
    """Options that the chosen geometry does not have; refused where they are given."""
    geometry = given.get("geometry", "parallel")
    others = {key for key, owner in GEOMETRY_OPTIONS.items() if geometry not in owner}
    if foreign := sorted(others & set(given)):
        owners = " or ".join(GEOMETRY_OPTIONS[foreign[0]])
        raise UsageError(
            f"{', '.join(foreign)}: geometry '{geometry}' has no such option; add --geometry {owners}, or drop it"
        )
    return others


def _check_number(key: str, value: Any, whole: bool) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{key} must be a finite number, got {str(value)[:40]}")
    number = float(value)
    least = 0 if key == "seed" else 1
    if whole and not (number.is_integer() and least <= number <= MOST):
        raise UsageError(f"{key} must be a {'positive ' if least else ''}whole number up to {MOST}, got {value}")
    if key in NOISE_OPTIONS and not (0 < number <= 1e15 or (number == 0 and key == "model_error")):
        raise UsageError(
            f"{key} must be {'0 or larger' if key == 'model_error' else 'positive'}, at most 1e15, got {value}"
        )


def acts_on_stack(name: str, /, **options: Any) -> bool:
    """Whether an operator with these (resolved) options couples slices, so that :func:`build` needs the whole stack.

    Raises:
        InputError: a kernel file that cannot be read.
    """
    if name == "blur":
        from invdiff.operators.kernels import is_volumetric

        return is_volumetric(options["kernel"])
    return options.get("axis") == "through-plane" or options.get("geometry") == "cone"


def build(
    name: str, shape: tuple[int, ...], pixel_mm: float | tuple[float, ...], /, **options: Any
) -> "LinearOperator":
    """Build an operator of the table for slices of one size.

    Args:
        name: a key of ``OPERATORS``.
        shape: (H, W) of a slice; (slices, H, W) for an operator that acts on the stack.
        pixel_mm: in-plane pixel size in mm, or (row spacing, column spacing); (slice, row, column) for the stack.
        **options: as listed in the table; None means the default.

    Returns:
        The operator, on the CPU.

    Raises:
        UsageError: an unknown name, a foreign option, or a value out of range.
    """
    resolved = resolve(name, **options)
    module, factory = OPERATORS[name].target.split(":")
    parameters = {key: value for key, value in resolved.items() if key not in NOISE_OPTIONS}
    return getattr(import_module(module), factory)(shape, pixel_mm, **parameters)
