"""A scan around its slice: the first view, where the source goes, and every measured line."""

import math
import textwrap
from typing import Any

import numpy as np

from invdiff.canvas import ACCENT, COOL, INK, QUIET, WARM, axes, subtitle
from invdiff.operators.geometry import ScanGeometry
from invdiff.overview import Overview, missing_in_words


def frame(g: Any, view: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Directions along the rays' midline and along the detector, and the source in mm (None: infinitely far away).

    Both directions are unit vectors (x to the right, y up); the source of a fan is where its rays meet.
    """
    if g.kind == "parallel":
        a = math.radians(g.views_deg[view])
        return np.array([math.sin(a), -math.cos(a)]), np.array([math.cos(a), math.sin(a)]), None
    b = math.radians(g.views_deg[view]) * (-1 if g.rotation == "clockwise" else 1)
    along, across = np.array([-math.sin(b), math.cos(b)]), np.array([math.cos(b), math.sin(b)])
    return along, across, -g.source_axis_mm * along - g.axis_offset_mm * across


def detector(g: Any, view: int, distance_mm: float, count: int = 65) -> np.ndarray:
    """Points along the detector, ``(count, 2)`` in mm; ``distance_mm`` from the axis where the beam is parallel."""
    along, across, source = frame(g, view)
    half = g.detector_count * g.detector_pitch_mm / 2
    u = np.linspace(-half, half, count)[:, None] + g.detector_offset_mm
    if source is None:
        return distance_mm * along + (u - g.axis_offset_mm) * across
    sdd = g.source_detector_mm
    if g.detector_shape == "curved":
        return source + sdd * (np.cos(u / sdd) * along + np.sin(u / sdd) * across)
    return source + sdd * along + u * across


def draw_ct(figure, seen: Overview) -> None:
    """The scan around the slice, and which lines it measures.

    A geometry with rows of elements belongs here as well: its mid-plane is a fan, beside which a side view goes where
    the text now stands.
    """
    g, views = seen.operator.geometry, len(seen.operator.geometry.views_deg)
    subtitle(figure, f"{views} views x {g.detector_count} elements, {seen.ratio:.3g} measured numbers per unknown one")
    _draw_scan(axes(figure, (0.06, 0.1, 0.46, 0.72), "the first view, mm"), seen)
    ax = axes(figure, (0.60, 0.46, 0.37, 0.36), "every measured line")
    _draw_lines(ax, seen)
    _write_scan(figure, seen)


def _draw_scan(ax, seen: Overview) -> None:
    from matplotlib.patches import Circle, Rectangle

    op, g = seen.operator, seen.operator.geometry
    high, wide = (n * d for n, d in zip(op.shape, op.pixel_mm, strict=True))
    corner = math.hypot(high, wide) / 2
    far = 1.35 * corner
    row, pale = detector(g, 0, far), {"color": ACCENT, "alpha": 0.12, "linewidth": 0}
    along, _, source = frame(g, 0)
    starts = row[[0, -1]] - 2 * far * along if source is None else np.array([source, source])
    ax.fill(*np.concatenate([starts[:1], row, starts[1:]]).T, **pale)
    ax.add_patch(Rectangle((-wide / 2, -high / 2), wide, high, facecolor="#243041", edgecolor=QUIET, linewidth=1))
    if g.field_of_view_mm:
        ax.add_patch(
            Circle((0, 0), g.field_of_view_mm / 2, fill=False, edgecolor=COOL, linewidth=1.3, linestyle=(0, (5, 3)))
        )
    middle = row[len(row) // 2]
    for start, end in ((starts[0], row[0]), (starts[1], row[-1]), (starts.mean(0), middle)):
        ax.plot(*np.array([start, end]).T, color=ACCENT, linewidth=0.9)
    ax.annotate(
        "", middle - 0.06 * (middle - starts.mean(0)), starts.mean(0) * 0.25 + middle * 0.75, arrowprops=_arrow(ACCENT)
    )
    ax.plot(*row.T, color=ACCENT, linewidth=3.5, solid_capstyle="butt")
    ax.plot(0, 0, "+", color=INK, markersize=7, markeredgewidth=1)
    reach = _draw_turn(ax, g, far)
    reach = max(reach, float(np.abs(row).max()), float(np.abs(starts).max())) * 1.12
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    low, top = {"transform": ax.transAxes, "fontsize": 8}, 0.965
    ax.text(0.02, 0.025, f"╌ field of view, {g.field_of_view_mm:.4g} mm", color=COOL, **low)
    ax.text(0.98, 0.025, "━ rays and detector", color=ACCENT, ha="right", **low)
    ax.text(
        0.02, top, "● " + ("rays come from here" if source is None else "source") + ", view by view", color=INK, **low
    )
    ax.text(0.98, top, f"□ slice, {high:.4g} x {wide:.4g} mm", color=QUIET, ha="right", **low)


def _arrow(colour: str) -> dict:
    return {"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}


def _draw_turn(ax, g: ScanGeometry, far: float) -> float:
    """Every view's source (or where its rays come from), the arc from the first to the last, and its sense."""
    from matplotlib.colors import LinearSegmentedColormap

    places = []
    for view in range(len(g.views_deg)):
        along, _, source = frame(g, view)
        places.append(-far * along if source is None else source)
    dots, n = np.array(places), len(places)
    fade = LinearSegmentedColormap.from_list("views", [INK, COOL, "#174a85"])
    ax.scatter(*dots.T, c=np.arange(n), cmap=fade, s=max(3, 22 - n / 12), zorder=5, linewidths=0)
    ax.scatter(*dots[:1].T, c=ACCENT, s=70, zorder=6, marker="*" if g.kind != "parallel" else "o", linewidths=0)
    radius, sense = 1.07 * float(np.hypot(*dots[0])), -1 if getattr(g, "rotation", "") == "clockwise" else 1
    first = math.degrees(math.atan2(dots[0, 1], dots[0, 0]))
    span = max(g.views_deg) - min(g.views_deg) if n > 1 else 0.0
    turn = np.radians(first + sense * np.linspace(4, max(12.0, min(span, 40.0)), 40))
    arc = radius * np.stack([np.cos(turn), np.sin(turn)], -1)
    ax.plot(*arc.T, color=INK, linewidth=1.1)
    ax.annotate("", arc[-1], arc[-4], arrowprops=_arrow(INK))
    label = 1.1 * arc[len(arc) // 2]
    ax.text(*label, f"{g.views_deg[0]:g}° → {g.views_deg[-1]:.4g}°", color=INK, fontsize=8, ha="center", va="center")
    return 1.08 * radius


def _draw_lines(ax, seen: Overview) -> None:
    """Angle and distance from the axis of every ray, so that what is missing shows as empty space."""
    op, g = seen.operator, seen.operator.geometry
    rays = g.rays().numpy()
    angle = np.degrees(np.arctan2(rays[:, 2], -rays[:, 3]))
    a = np.radians(angle)
    distance = rays[:, 0] * np.cos(a) + rays[:, 1] * np.sin(a)
    folded = angle % 180.0
    distance = np.where((angle - folded) % 360.0 > 90.0, -distance, distance)
    corner = math.hypot(*(n * d for n, d in zip(op.shape, op.pixel_mm, strict=True))) / 2
    step = max(1, len(folded) // 24_000)
    ax.scatter(folded[::step], distance[::step], s=1.2, color=COOL, alpha=0.55, linewidths=0)
    for start, end in g.missing_deg():
        for turn in (0.0, 180.0):
            ax.axvspan(start - turn, end - turn, color=WARM, alpha=0.16, linewidth=0)
        middle = (start + end) / 2 % 180.0
        ax.text(middle, 0, "missing\nat the axis", color=WARM, fontsize=7.5, ha="center", va="center", clip_on=True)
    for side in (-corner, corner):
        ax.axhline(side, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set(xlim=(0, 180), ylim=(-1.15 * corner, 1.15 * corner), xticks=range(0, 181, 45))
    ax.set(xlabel="angle of the line, degrees", ylabel="distance from the axis, mm")
    ax.text(178, corner * 1.02, "corner of the slice", color=QUIET, fontsize=7.5, ha="right", va="bottom")


def _write_scan(figure, seen: Overview) -> None:
    op, g = seen.operator, seen.operator.geometry
    lost = max(0.0, g.missed(op.shape, op.pixel_mm))
    rows = [
        *textwrap.wrap(g.describe(), 64),
        f"{100 * lost:.2g} % of the rays through the slice miss the detector.",
        f"Missing angles: {missing_in_words(g.missing_deg())}.",
    ]
    figure.text(0.575, 0.345, "\n".join(rows), color=INK, fontsize=8.6, va="top", linespacing=1.55)
