"""What an operator measures on a grid, as facts to print: resolved options, sizes, and for scans what they miss."""

import math
from dataclasses import dataclass
from typing import Any

from invdiff.errors import UsageError
from invdiff.operator import LinearOperator
from invdiff.operators import OPERATORS, acts_on_stack, build, resolve


@dataclass(frozen=True)
class Overview:
    """An operator on a grid.

    Attributes:
        name: of the table.
        operator: on the CPU.
        grid: (slices, H, W) of the image.
        spacing_mm: (slice, row, column).
        options: resolved, as in the table; None where the operator works the value out. Of a measurement file, what
            it says of them.
        source: name of the measurement file.
    """

    name: str
    operator: Any  # a LinearOperator; drawings look at what its family has besides
    grid: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    options: dict[str, Any]
    source: str = ""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(slices, C, H, W)."""
        return (self.grid[0], *self.operator.in_shape) if self.operator.slicewise else self.operator.in_shape

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Of the measurement: (slices, C, views, detectors) or (slices, C, H, W)."""
        return (self.grid[0], *self.operator.out_shape) if self.operator.slicewise else self.operator.out_shape

    @property
    def ratio(self) -> float:
        """Measured numbers per unknown one."""
        measured = math.prod(self.data_shape) * self.operator.measured_fraction
        return measured / math.prod(self.image_shape)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "operator": self.name,
            **({"file": self.source} if self.source else {}),
            "options": self.options,
            "image": list(self.image_shape),
            "spacing_mm": list(self.spacing_mm),
            "measurement": list(self.data_shape),
            "ratio": self.ratio,
            **facts(self.operator),
            "notes": list(self.operator.notes),
        }

    def lines(self) -> list[str]:
        """For people."""
        entry, found = OPERATORS[self.name], facts(self.operator)
        rows = [f"{self.source + ': ' if self.source else ''}{self.name}: {entry.summary}"]
        for option, value in self.options.items():
            shown = "auto" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
            rows.append(f"    {option:16} {shown:18} {entry.options[option][1]}")
        slices, height, width = self.grid
        dz, dy, dx = self.spacing_mm
        rows.append(
            f"image            {slices} slices of {height} x {width} pixels of {dy:g} x {dx:g} mm, every {dz:g} mm"
        )
        rows.append(
            f"measurement      {' x '.join(map(str, self.data_shape))} numbers, {self.ratio:.3g} per unknown one"
        )
        words = {"missing_deg": missing_in_words, "field_of_view_mm": lambda mm: f"{mm:.4g} mm across, in every view"}
        words["rays_missed"] = lambda share: f"{100 * share:.2g} % of the rays through the slice miss the detector"
        for key, value in found.items():
            text = words[key](value) if key in words else f"{value:.4g}" if isinstance(value, float) else str(value)
            rows.append(f"{LABELS.get(key, key):16} {text}")
        return rows + [f"warning: {note}" for note in self.operator.notes]


LABELS = {
    "description": "scan",
    "field_of_view_mm": "field of view",
    "rays_missed": "truncation",
    "missing_deg": "missing angles",
    "kernel": "kernel",
    "closed_form": "exact inverse",
    "measured": "measured",
}


def missing_in_words(missing) -> str:
    """``none``, or the missing arcs at the axis."""
    if not missing:
        return "none"
    total = sum(end - start for start, end in missing)
    arcs = ", ".join(f"{start:g} to {end:g}" for start, end in missing)
    return f"{total:.4g} of 180 degrees at the axis ({arcs})"


def facts(operator: LinearOperator) -> dict[str, Any]:
    """What is special to a family of operators: name -> plain JSON value, units in the names."""
    from invdiff.operators.blur import Blur
    from invdiff.operators.ct import CT
    from invdiff.operators.ct_cone import CTCone
    from invdiff.operators.mask import Mask

    if isinstance(operator, CT):
        missed = operator.geometry.missed(operator.shape, operator.pixel_mm)
        return _of_scan(operator.describe(), operator.geometry, missed)
    if isinstance(operator, CTCone):
        missed = operator.geometry.missed(operator.shape, operator.voxel_mm)
        return _of_scan(operator.describe(), operator.geometry.fan, missed)
    if isinstance(operator, Blur):
        sides = " x ".join(map(str, operator.kernel.shape))
        return {"kernel": f"{sides} pixels, sum {float(operator.kernel.sum()):.3g}, boundary {operator.boundary}"}
    if isinstance(operator, Mask):
        return {"measured": f"{100 * operator.measured_fraction:.4g} % of the pixels"}
    if operator.complex_image:
        return {"acceleration": f"{operator.acceleration:.4g} as achieved"}  # type: ignore[attr-defined]
    return {}


def _of_scan(description: str, plane, missed: float) -> dict[str, Any]:
    """``plane``: the geometry of a slice, of a cone beam that of the middle plane."""
    return {
        "description": description,
        "field_of_view_mm": plane.field_of_view_mm,
        "rays_missed": max(0.0, missed),
        "missing_deg": [list(arc) for arc in plane.missing_deg()],
    }


def overview(
    name: str, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], /, **options: Any
) -> Overview:
    """Build an operator of the table for a stack and look at it.

    Args:
        name: a key of ``OPERATORS``.
        shape: (slices, H, W).
        spacing_mm: (slice, row, column).
        **options: as in the table.

    Raises:
        UsageError, InputError: what :func:`invdiff.operators.build` refuses, or a grid without slices.
    """
    if len(shape) != 3 or min(shape) < 1 or len(spacing_mm) != 3:
        raise UsageError(f"an overview needs (slices, H, W) and three distances, got {shape} and {spacing_mm}")
    resolved = resolve(name, **options)
    first = 0 if acts_on_stack(name, **resolved) else 1
    operator = build(name, shape[first:], spacing_mm[first:], **resolved)
    return Overview(name, operator, shape, spacing_mm, resolved)
