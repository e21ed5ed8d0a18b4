"""A stack of slices by position: missing, duplicate, tilted and mixed ones are found, and named in mm."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from invdiff.errors import InputError
from invdiff.formats.base import pick_volume

TOLERANCE = 0.02  # of the usual spacing of slices


@dataclass(frozen=True)
class Slice:
    """What places one slice; lengths in mm, LPS+.

    Attributes:
        name: of its file, for messages.
        number: instance number, orders slices at one position.
        shape: ``(rows, columns)``.
        orientation: direction of increasing column, then of increasing row, unit vectors, ``(6,)``.
        position: centre of the first pixel, ``(3,)``.
        spacing: distance of rows and of columns.
        thickness: of a slice that is alone.
        source: whatever the reader needs to find its pixels again.
    """

    name: str
    number: int
    shape: tuple[int, int]
    orientation: np.ndarray
    position: np.ndarray
    spacing: tuple[float, float]
    thickness: float = 1.0
    source: Any = None

    @property
    def normal(self) -> np.ndarray:
        """Unit vector across the slice; slices are sorted along it."""
        normal = np.cross(self.orientation[:3], self.orientation[3:])
        return normal / np.linalg.norm(normal)

    @property
    def along(self) -> float:
        """Position along the normal, mm."""
        return float(self.normal @ self.position)


def one_kind(slices: Sequence[Slice], accept: tuple[str, ...]) -> tuple[list[Slice], list[str]]:
    """The slices of one size and orientation; others (scouts) are refused, or left out with ``"mixed"``."""

    def kind(s: Slice) -> tuple:
        return (s.shape, tuple(np.round(s.orientation, 3) + 0.0), tuple(np.round(s.spacing, 4)))

    counts = Counter(kind(s) for s in slices)
    largest, count = counts.most_common(1)[0]
    if len(counts) == 1:
        return list(slices), []
    odd = [s for s in slices if kind(s) != largest]
    what = f"{odd[0].shape[1]} x {odd[0].shape[0]} beside {largest[0][1]} x {largest[0][0]}"
    if odd[0].shape == largest[0]:
        what = f"another {'pixel spacing' if kind(odd[0])[1] == largest[1] else 'orientation'}"
    said = f"{len(odd)} of {len(slices)} slices are of another kind"
    if "mixed" not in accept:
        raise InputError(f"{said} ({odd[0].name}: {what}); remove them, or pass --accept mixed to leave them out")
    return [s for s in slices if kind(s) == largest], [f"{said} ({what}): left out, {count} kept"]


def one_each(
    slices: Sequence[Slice], same, index: int | None, accept: tuple[str, ...]
) -> tuple[list[Slice], list[str]]:
    """One slice for each position, in the order of positions.

    Copies (``same(a, b)``) are dropped. Where every position has equally many slices (time points, echoes), ``index``
    says which is meant, by instance number. Anything else is refused, or the first is kept with ``"duplicates"``.
    """
    ordered = sorted(slices, key=lambda s: (s.along, s.number))
    steps = np.diff([s.along for s in ordered])
    wide = steps[steps > 1e-3]
    limit = max(1e-3, TOLERANCE * float(np.median(wide))) if len(wide) else 1e-3
    groups: list[list[Slice]] = [[ordered[0]]]
    for s in ordered[1:]:
        if s.along - groups[-1][0].along > limit:
            groups.append([])
        groups[-1].append(s)
    copies = 0
    for n, group in enumerate(groups):
        kept: list[Slice] = []
        for s in group:
            kept += [] if any(same(s, other) for other in kept) else [s]
        copies += len(group) - len(kept)
        groups[n] = sorted(kept, key=lambda s: s.number)
    notes = [f"{copies} identical copies of slices were left out"] if copies else []
    sizes = {len(group) for group in groups}
    if len(sizes) == 1 and len(groups) > 1:
        volumes = sizes.pop()
        chosen = pick_volume("the series", volumes, (len(groups), volumes), index)
        return [group[chosen] for group in groups], notes
    if sizes == {1}:
        return [group[0] for group in groups], notes
    twice = next(group for group in groups if len(group) > 1)
    said = f"{len(twice)} different slices lie at {twice[0].along:.3f} mm"
    if "duplicates" not in accept:
        names = f"{twice[0].name}, {twice[1].name}"
        raise InputError(f"{said} ({names}); remove all but one, or pass --accept duplicates to keep the first")
    return [group[0] for group in groups], [*notes, f"{said}: the first is kept, here and elsewhere"]


def grid(slices: Sequence[Slice], accept: tuple[str, ...]) -> tuple[np.ndarray, Any, list[str]]:
    """Where an ordered stack lies, and how to make it even.

    Args:
        slices: from ``one_each``.
        accept: ``"gaps"`` evens out what is refused otherwise.

    Returns:
        Affine from (column, row, slice) to LPS+ mm; None, or for every even slice its place among ``slices`` (a
        fraction lies between two); remarks.

    Raises:
        InputError: slices that are missing, uneven, or shifted sideways.
    """
    first, notes, places = slices[0], [], None
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[:3] * first.spacing[1]
    affine[:3, 1] = first.orientation[3:] * first.spacing[0]
    affine[:3, 3] = first.position
    if len(slices) == 1:
        affine[:3, 2] = first.normal * first.thickness
        return affine, None, [f"a single slice; its thickness is taken as {first.thickness:g} mm"]
    along = np.array([s.along for s in slices])
    positions = np.array([s.position for s in slices])
    steps = np.diff(along)
    usual = float(np.median(steps))
    count = len(slices)
    if abs(steps - usual).max() > TOLERANCE * usual:
        wrong = _uneven(slices, steps, usual)
        count = max(2, round((along[-1] - along[0]) / usual) + 1)
        if "gaps" not in accept:
            raise InputError(f"{wrong}; find the slices, or pass --accept gaps to interpolate")
        places = np.interp(np.linspace(along[0], along[-1], count), along, np.arange(len(slices)))
        notes.append(f"{wrong}: resampled to {count} even slices by linear interpolation")
    affine[:3, 2] = (positions[-1] - positions[0]) / (count - 1)
    share = ((along - along[0]) / (along[-1] - along[0]))[:, None]
    sideways = np.linalg.norm(positions - positions[0] - share * (positions[-1] - positions[0]), axis=1)
    if sideways.max() > TOLERANCE * max(usual, *first.spacing):
        worst = slices[int(sideways.argmax())]
        raise InputError(f"{worst.name} is shifted sideways by {sideways.max():.3f} mm; resample the series first")
    tilt = np.degrees(np.arccos(np.clip(first.normal @ affine[:3, 2] / np.linalg.norm(affine[:3, 2]), -1, 1)))
    if tilt > 0.05:
        notes.append(f"slices are tilted by {tilt:.2f} degrees against their stacking direction; kept as they lie")
    return affine, places, notes


def _uneven(slices: Sequence[Slice], steps: np.ndarray, usual: float) -> str:
    """The worst step between slices, in words."""
    n = int(abs(steps - usual).argmax())
    said = f"{steps[n]:.3f} mm between slices at {slices[n].along:.3f} and {slices[n + 1].along:.3f} mm"
    missing = steps[n] / usual - 1
    if missing > 0.5 and abs(missing - round(missing)) < 0.1:
        many = "1 slice is" if missing < 1.5 else f"{round(missing)} slices are"
        return f"{many} missing: {said}, {usual:.3f} mm elsewhere"
    return f"uneven slices: {said}, {usual:.3f} mm elsewhere"
