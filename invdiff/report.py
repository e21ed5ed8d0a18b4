"""The picture beside a result: every method in three planes, with the error on the same scale."""

from dataclasses import dataclass

import numpy as np

from invdiff.errors import ShapeError, UsageError
from invdiff.files import atomic_write
from invdiff.provenance import DISCLAIMER

_INK, _QUIET, _PAPER, _ACCENT = "#f2f4f8", "#8b96a8", "#0d1117", "#f5b841"
_ERROR_COLOURS = ("#9be7ff", "#38a3f5", "#174a85", "#05070a", "#8a2a12", "#f5692f", "#ffc27a")  # dark where right
_COLUMN_IN, _GAP_IN, _DPI = 2.7, 0.06, 150
_LEFT_IN, _RIGHT_IN, _TOP_IN, _CAPTION_IN, _FOOT_IN = 0.72, 0.95, 0.92, 0.44, 0.34
_TO_AXIAL = {"axial": ((0, 1, 2), ()), "coronal": ((1, 0, 2), (0, 1)), "sagittal": ((1, 2, 0), (0, 2))}
_EDGES = {"axial": "RLA", "coronal": "RLS", "sagittal": "APS"}  # left, right and top of a view


@dataclass(frozen=True)
class _View:
    """One row: a plane, the index along its normal, and what one view measures in mm."""

    plane: str
    index: int
    height_mm: float
    width_mm: float

    def of(self, axial: np.ndarray) -> np.ndarray:
        """The 2D view of a stack with axes (superior, posterior, left)."""
        if self.plane == "axial":
            return axial[self.index]
        return axial[::-1, self.index] if self.plane == "coronal" else axial[::-1, :, self.index]


@dataclass(frozen=True)
class _Panel:
    """One column: heading, stack in axial axes, caption, and whether it is an error on the signed scale."""

    title: str
    stack: np.ndarray
    caption: str
    signed: bool = False
    main: bool = False


def mosaic(
    path,
    columns: list[tuple[str, np.ndarray, str]],
    reference: np.ndarray | None,
    pixel_mm: tuple[float, float],
    spacing_mm: float,
    units: str,
    window: tuple[float, float],
    difference_limit: float | None = None,
    title: str = "",
    plane: str = "axial",
    overwrite: bool = False,
) -> None:
    """Write a PNG: one column per method, the reference, and the error of the last method.

    Rows: two slices of the stack's own plane, then the other two planes through the object, in true proportions
    and cropped to the object. Grey values outside ``window`` saturate.

    Args:
        path: PNG, written atomically.
        columns: ``(title, stack (S, H, W), caption)`` from baseline to reconstruction; captions hold the figures.
        reference: stack of the same shape; None leaves out reference and difference.
        pixel_mm: distance of rows and of columns, mm.
        spacing_mm: distance of slices, mm.
        units: of the stacks, for the colour bars.
        window: grey values shown, low and high.
        difference_limit: end of the symmetric error scale; None: a tenth of the window.
        title: heading.
        plane: ``"axial"``, ``"coronal"`` or ``"sagittal"``, in the display orientation of ``SliceStack``.
        overwrite: an existing file may be replaced.

    Raises:
        ShapeError: a stack is not 3D or differs in shape.
        UsageError: no columns, an unknown plane, an empty window, or the file exists.
    """
    _check(columns, reference, window, plane)
    limit = difference_limit or (window[1] - window[0]) / 10
    order, flips = _TO_AXIAL[plane]
    guide = np.flip(np.transpose(columns[-1][1] if reference is None else reference, order), flips)
    box = _object_box(guide, window)
    step_mm = [(spacing_mm, *pixel_mm)[axis] for axis in order]

    def axial(stack):
        return np.flip(np.transpose(np.asarray(stack), order), flips)[box]

    panels = [_Panel(name, axial(stack), caption) for name, stack, caption in columns]
    last = panels[-1]
    panels[-1] = _Panel(last.title, last.stack, last.caption, main=True)
    if reference is not None:
        truth = axial(reference)
        panels.append(_Panel("Reference", truth, ""))
        panels.append(_Panel("Difference", last.stack - truth, f"{last.title} \u2212 reference", signed=True))
    figure = _draw(panels, _views(guide[box], step_mm, plane, window), window, limit, units, title)
    with atomic_write(path, overwrite) as part:
        figure.savefig(part, format="png", dpi=_DPI, facecolor=_PAPER, metadata={"Software": "invdiff"})


def _check(columns, reference, window, plane) -> None:
    if not columns:
        raise UsageError("a mosaic needs at least one column; pass (title, stack, caption)")
    if plane not in _TO_AXIAL:
        raise UsageError(f"unknown plane '{plane}': choose one of {', '.join(_TO_AXIAL)}")
    if not window[0] < window[1]:
        raise UsageError(f"grey window {window} is empty; give low < high")
    shapes = [np.shape(column[1]) for column in columns] + ([] if reference is None else [np.shape(reference)])
    if len(shapes[0]) != 3 or len(set(shapes)) > 1 or 0 in shapes[0]:
        raise ShapeError(f"mosaic expects stacks of one shape (S, H, W), got {shapes}")


def _bright(stack: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    return stack > window[0] + 0.25 * (window[1] - window[0])


def _object_box(stack: np.ndarray, window: tuple[float, float]) -> tuple[slice, ...]:
    """Where the object lies, per axis, with a margin of 5 %; stray bright voxels do not count."""
    bright, box = _bright(stack, window), []
    for axis, length in enumerate(stack.shape):
        profile = bright.mean(axis=tuple({0, 1, 2} - {axis}))
        inside = np.flatnonzero(profile > 0.005 * profile.max()) if profile.any() else np.array([0, length - 1])
        margin = max(1, round(0.05 * length))
        box.append(slice(max(0, inside[0] - margin), min(length, inside[-1] + 1 + margin)))
    return tuple(box)


def _views(stack: np.ndarray, step_mm: list[float], plane: str, window: tuple[float, float]) -> list[_View]:
    """Two slices of the own plane, one of each other, through where most of the object is."""
    deep, high, wide = (n * step for n, step in zip(stack.shape, step_mm, strict=True))
    sizes = {"axial": (high, wide), "coronal": (deep, wide), "sagittal": (deep, high)}
    bright, views = _bright(stack, window), []
    for axis, name in enumerate(sizes):
        weight = bright.sum(axis=tuple({0, 1, 2} - {axis})).cumsum() + 1e-9 * np.arange(1, stack.shape[axis] + 1)
        shares = (1 / 3, 2 / 3) if name == plane and stack.shape[axis] > 2 else (0.5,)
        indices = np.searchsorted(weight, np.array(shares) * weight[-1])
        views.append([_View(name, int(index), *sizes[name]) for index in indices])
    views.sort(key=lambda group: group[0].plane != plane)
    flat = [view for group in views for view in group]  # a few slices seen from the side are a line, not a view
    return [view for view in flat if view.plane == plane or view.height_mm > 0.08 * view.width_mm]


def _draw(panels: list[_Panel], views: list[_View], window, limit: float, units: str, title: str):
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    scale = _COLUMN_IN / max(view.width_mm for view in views)  # inch per mm, one for the whole picture
    heights = [view.height_mm * scale for view in views]
    width = _LEFT_IN + len(panels) * (_COLUMN_IN + _GAP_IN) + _RIGHT_IN
    body = sum(heights) + _GAP_IN * (len(views) - 1)
    height = _TOP_IN + body + _CAPTION_IN + _FOOT_IN
    figure = Figure(figsize=(width, height), facecolor=_PAPER)
    signed = LinearSegmentedColormap.from_list("error", _ERROR_COLOURS)

    def axes(left, top, wide, high):  # inches from the top left corner
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    images, top = {}, _TOP_IN
    for row, (view, high) in enumerate(zip(views, heights, strict=True)):
        for column, panel in enumerate(panels):
            left = _LEFT_IN + column * (_COLUMN_IN + _GAP_IN)
            ax = axes(left, top, _COLUMN_IN, high)
            low_high = (-limit, limit) if panel.signed else window
            colours = signed if panel.signed else "gray"
            images[panel.signed] = _show(ax, view, panel, low_high, colours, _COLUMN_IN / scale)
            if column == 0:
                _mark(ax, view, scale_bar=row == 0)
                x, y = (left - 0.08) / width, 1 - (top + high / 2) / height
                figure.text(x, y, view.plane, color=_QUIET, fontsize=8.5, ha="right", va="center")
        top += high + _GAP_IN
    _words(figure, panels, width, height, body, title)
    bars = _bars(body, units, signed=True in images)
    for key, start, high, label in bars:
        bar = axes(width - _RIGHT_IN + 0.10, _TOP_IN + start, 0.11, high)
        _colour_bar(figure, bar, images[key], label)
    return figure


def _show(ax, view: _View, panel: _Panel, low_high, colours, panel_mm: float):
    """One image, centred in a panel that is ``panel_mm`` wide."""
    image = ax.imshow(
        view.of(panel.stack),
        cmap=colours,
        vmin=low_high[0],
        vmax=low_high[1],
        extent=(-view.width_mm / 2, view.width_mm / 2, view.height_mm, 0),
        interpolation="bicubic",
        aspect="auto",
    )
    ax.set(xlim=(-panel_mm / 2, panel_mm / 2), ylim=(view.height_mm, 0), xticks=[], yticks=[], facecolor="black")
    for spine in ax.spines.values():
        spine.set(color=_ACCENT if panel.main else "#2a3240", linewidth=1.1 if panel.main else 0.6)
    return image


def _mark(ax, view: _View, scale_bar: bool) -> None:
    """Patient sides at the edges, and a length on the first view."""
    from matplotlib.patheffects import withStroke

    edge = [withStroke(linewidth=2, foreground="black")]  # readable on bone and on air
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"))
    thin = view.height_mm < 0.3 * view.width_mm  # no room for the letter at the top
    for letter, (x, y, ha, va) in list(zip(_EDGES[view.plane], places, strict=True))[: 2 if thin else 3]:
        ax.text(x, y, letter, transform=ax.transAxes, color=_INK, fontsize=8, ha=ha, va=va, path_effects=edge)
    if scale_bar:
        length = max((mm for mm in (10, 20, 50, 100) if mm < 0.35 * view.width_mm), default=1)
        left, low = ax.get_xlim()[0] + 0.04 * view.width_mm, 0.95 * view.height_mm
        ax.plot([left, left + length], [low, low], color=_INK, linewidth=2, solid_capstyle="butt", path_effects=edge)
        words = {"color": _INK, "fontsize": 7.5, "va": "bottom", "path_effects": edge}
        ax.text(left, low - 0.025 * view.height_mm, f"{length} mm", **words)


def _words(figure, panels: list[_Panel], width: float, height: float, body: float, title: str) -> None:
    figure.text(_LEFT_IN / width, 1 - 0.32 / height, title, color=_INK, fontsize=15, weight="bold", va="center")
    for column, panel in enumerate(panels):
        x = (_LEFT_IN + column * (_COLUMN_IN + _GAP_IN) + _COLUMN_IN / 2) / width
        colour, weight = (_ACCENT if panel.main else _INK), ("bold" if panel.main else "normal")
        figure.text(
            x, 1 - 0.77 / height, panel.title, color=colour, fontsize=12, weight=weight, ha="center", va="center"
        )
        y = 1 - (_TOP_IN + body + 0.24) / height
        figure.text(x, y, panel.caption, color=colour if panel.main else _QUIET, fontsize=10, ha="center", va="center")
    figure.text(_LEFT_IN / width, 0.17 / height, f"invdiff: {DISCLAIMER}", color=_QUIET, fontsize=8, va="center")


def _bars(body: float, units: str, signed: bool) -> list[tuple[bool, float, float, str]]:
    """(signed, start, height) in inches and the label of each colour bar."""
    grey, error = ("intensity", "difference") if units == "1" else (units, f"difference ({units})")
    if not signed:
        return [(False, 0.0, min(body, 3.0), grey)]
    high = min(3.0, max(0.3, (body - 0.4) / 2))
    return [(False, 0.0, high, grey), (True, body - high, high, error)]


def _colour_bar(figure, ax, image, label: str) -> None:
    bar = figure.colorbar(image, cax=ax)
    bar.outline.set(color=_QUIET, linewidth=0.5)
    ax.tick_params(colors=_QUIET, labelsize=8, length=2)
    ax.set_ylabel(label, color=_INK, fontsize=9)
