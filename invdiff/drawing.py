"""Pictures of operators: the scan around a slice, a kernel and its spectrum, a mask, two grids, a slice profile."""

from collections.abc import Callable

import numpy as np

from invdiff.canvas import ACCENT, COOL, INK, LINE, PANEL, PAPER, QUIET, WARM, axes, colour_bar, subtitle
from invdiff.drawing_ct import draw_ct
from invdiff.drawing_mri import draw_mri
from invdiff.files import atomic_write
from invdiff.overview import Overview
from invdiff.provenance import DISCLAIMER

DPI = 150


def draw(seen: Overview, path, overwrite: bool = False) -> None:
    """Write a PNG of the operator, by the function of its family; a family without one gets its facts as text.

    Args:
        seen: the operator on its grid.
        path: PNG, written atomically.
        overwrite: an existing file may be replaced.

    Raises:
        UsageError: the file exists.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), facecolor=PAPER)
    figure.text(0.04, 0.945, _title(seen), color=INK, fontsize=17, weight="bold", va="center")
    figure.text(0.04, 0.035, f"invdiff: {DISCLAIMER}", color=QUIET, fontsize=8, va="center")
    _family(seen)(figure, seen)
    with atomic_write(path, overwrite) as part:
        figure.savefig(part, format="png", dpi=DPI, facecolor=PAPER, metadata={"Software": "invdiff"})


def _title(seen: Overview) -> str:
    name = seen.source if len(seen.source) <= 60 else f"{seen.source[:57]}..."
    return f"{name}: {seen.name}".replace("$", r"\$") if name else seen.name


def _family(seen: Overview) -> Callable:
    from invdiff.operators.blur import Blur
    from invdiff.operators.ct import CT
    from invdiff.operators.ct_cone import CTCone
    from invdiff.operators.mask import Mask
    from invdiff.operators.superres import Downsample, DownsampleZ

    table = {
        CT: draw_ct,
        CTCone: draw_ct,
        Blur: draw_blur,
        Mask: draw_mask,
        Downsample: draw_grids,
        DownsampleZ: draw_profile,
    }
    if seen.operator.complex_image:
        return draw_mri
    return next((function for kind, function in table.items() if isinstance(seen.operator, kind)), draw_text)


def draw_text(figure, seen: Overview) -> None:
    """The facts alone."""
    subtitle(figure, f"{' x '.join(map(str, seen.data_shape))} numbers, {seen.ratio:.3g} per unknown one")
    lines = "\n".join(line[:110] for line in seen.lines())
    figure.text(0.04, 0.82, lines, color=INK, fontsize=10, va="top", family="monospace", linespacing=1.7)
    figure.text(0.5, 0.36, "y = x + noise" if not seen.options else "", color=ACCENT, fontsize=34, ha="center")


def draw_blur(figure, seen: Overview) -> None:
    """The kernel and the modulus of its transfer function; of a 3D kernel the planes through the middle."""
    op = seen.operator
    kernel = op.kernel.numpy()
    planes = [("rows and columns", kernel if kernel.ndim == 2 else kernel[kernel.shape[0] // 2], seen.spacing_mm[1:])]
    if kernel.ndim == 3:
        planes.append(("slices and columns", kernel[:, kernel.shape[1] // 2], seen.spacing_mm[::2]))
    sides = " x ".join(map(str, kernel.shape))
    subtitle(figure, f"kernel {seen.options.get('kernel', '')}, {sides} pixels, boundary {op.boundary}")
    sizes = [2 * max(64, n) + 1 for n in kernel.shape]
    gain = np.abs(np.fft.fftshift(np.fft.fftn(kernel, sizes, axes=range(kernel.ndim))))
    middle = [n // 2 for n in gain.shape]
    cuts = [gain if kernel.ndim == 2 else gain[middle[0]], *([gain[:, middle[1]]] if kernel.ndim == 3 else [])]
    top, limit = max(1.0, float(gain.max())), float(np.abs(kernel).max())
    colours = {"cmap": "magma", "vmin": 0.0} if kernel.min() >= 0 else {"cmap": "RdBu_r", "vmin": -limit}
    for k, ((title, plane, steps), cut) in enumerate(zip(planes, cuts, strict=True)):
        high, wide = (n * d / 2 for n, d in zip(plane.shape, steps, strict=True))
        left = 0.05 + k * 0.215
        ax = axes(figure, (left, 0.495, 0.19, 0.31), f"{title}, mm")
        weights = ax.imshow(plane, vmax=limit, extent=(-wide, wide, high, -high), **colours)
        ax = axes(figure, (left, 0.10, 0.19, 0.30), "its gain, cycles per pixel")
        gains = ax.imshow(cut, cmap="viridis", vmin=0, vmax=top, extent=(-0.5, 0.5, 0.5, -0.5))
    right = 0.05 + len(planes) * 0.215 - 0.02
    colour_bar(figure, weights, (right, 0.53, 0.010, 0.24), "weight")
    colour_bar(figure, gains, (right, 0.13, 0.010, 0.24), "gain")
    box = (right + 0.14, 0.16, 0.96 - right - 0.14, 0.62)
    ax = axes(figure, box, "gain along the axes", xlabel="cycles per mm", ylabel="gain", ylim=(0, 1.05 * top))
    names = [("slices", WARM, "-"), ("rows", ACCENT, "-"), ("columns", COOL, "--")]
    for axis, (name, colour, style) in enumerate(names[-kernel.ndim :]):
        line = gain[tuple(slice(m, None) if k == axis else m for k, m in enumerate(middle))]
        frequency = np.linspace(0, 0.5, len(line)) / seen.spacing_mm[axis - kernel.ndim]
        ax.plot(frequency, line, style, color=colour, linewidth=2, label=f"{name}, to {frequency[-1]:.3g} per mm")
    ax.legend(facecolor=PANEL, edgecolor=LINE, labelcolor=INK, fontsize=8.5)


def draw_mask(figure, seen: Overview) -> None:
    """Pixels that are measured, of the middle slice where slices differ."""
    keep = seen.operator.mask.cpu().numpy()
    plane = keep if keep.ndim == 2 else keep[len(keep) // 2]
    share = f"{100 * seen.operator.measured_fraction:.4g} % of the pixels are measured"
    subtitle(figure, f"mask {seen.options.get('mask', '')}: {share}")
    ax = axes(figure, (0.26, 0.1, 0.48, 0.73), "middle slice" if keep.ndim == 3 else "every slice")
    from matplotlib.colors import ListedColormap

    aspect = seen.spacing_mm[1] / seen.spacing_mm[2]
    ax.imshow(
        plane, cmap=ListedColormap(["#a8431c", "#b9c4d4"]), vmin=0, vmax=1, interpolation="nearest", aspect=aspect
    )
    ax.set(xlabel="column", ylabel="row")
    figure.text(0.76, 0.78, "■ measured", color="#b9c4d4", fontsize=10)
    figure.text(0.76, 0.73, "■ missing", color="#a8431c", fontsize=10)


def draw_grids(figure, seen: Overview) -> None:
    """Fine and coarse pixels in the upper left corner of a slice, and the weights of one coarse pixel."""
    from invdiff.operators.resampling import FILTERS, decimation

    op, (_, dy, dx) = seen.operator, seen.spacing_mm
    f = op.factor
    matrix = decimation(op.shape[1], f, FILTERS[op.filter]).numpy()
    subtitle(figure, f"factor {f}, filter {op.filter}: {dy:g} x {dx:g} mm become {f * dy:g} x {f * dx:g} mm")
    count = min(3, *(n // f for n in op.shape))
    ax = axes(figure, (0.06, 0.12, 0.40, 0.70), "fine and coarse grid, mm", aspect="equal")
    for k in range(count * f + 1):
        style = {"color": QUIET if k % f else INK, "linewidth": 0.6 if k % f else 2.0, "zorder": 1 + (k % f == 0)}
        ax.plot([0, count * f * dx], [k * dy, k * dy], **style)
        ax.plot([k * dx, k * dx], [0, count * f * dy], **style)
    fine, coarse = (np.arange(count * f) + 0.5), (np.arange(count) + 0.5) * f
    ax.plot(*(m.ravel() for m in np.meshgrid(fine * dx, fine * dy)), ".", color=COOL, markersize=3)
    ax.plot(*(m.ravel() for m in np.meshgrid(coarse * dx, coarse * dy)), "o", color=ACCENT, markersize=7)
    ax.set(xlim=(-0.3 * dx, count * f * dx + 0.3 * dx), ylim=(count * f * dy + 0.3 * dy, -0.3 * dy))
    _draw_weights(figure, (0.56, 0.14, 0.40, 0.66), matrix, f, dx, "coarse pixel")


def draw_profile(figure, seen: Overview) -> None:
    """The weights of the thin slices in a thick one."""
    from invdiff.operators.resampling import PROFILES, decimation

    op, dz = seen.operator, seen.spacing_mm[0]
    matrix = decimation(op.shape[0], op.factor, PROFILES[op.profile]).numpy()
    words = f"factor {op.factor}, profile {op.profile}: {op.shape[0]} slices of {dz:g} mm become {op.out_shape[0]} of"
    subtitle(figure, f"{words} {op.factor * dz:g} mm")
    _draw_weights(figure, (0.1, 0.14, 0.82, 0.66), matrix, op.factor, dz, "thick slice")


def _draw_weights(figure, box, matrix: np.ndarray, factor: int, step: float, what: str) -> None:
    """The middle row of a decimation matrix and its neighbours, against mm from the middle of ``what`` is coarse."""
    middle = len(matrix) // 2
    centre = (middle + 0.5) * factor
    x = (np.arange(matrix.shape[1]) + 0.5 - centre) * step
    ax = axes(figure, box, f"weights of a {what}", xlabel=f"mm from the middle of the {what}", ylabel="weight")
    outline = {"facecolor": "none", "edgecolor": COOL, "linewidth": 1, "zorder": 4}
    for other in range(max(0, middle - 1), min(len(matrix), middle + 2)):
        row = matrix[other]
        style = {"color": ACCENT, "zorder": 3} if other == middle else outline
        ax.bar(x[row != 0], row[row != 0], width=0.82 * step, **style)
    reach = 1.08 * max(map(abs, ax.get_xlim()))
    ax.set(xlim=(-reach, reach), ylim=(min(0.0, 1.3 * matrix[middle].min()), 1.3 * matrix[middle].max()))
    for edge in (-0.5, 0.5):
        ax.axvline(edge * factor * step, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    ax.axhline(0, color=QUIET, linewidth=0.6)
    place = {"transform": ax.transAxes, "fontsize": 8.5, "va": "top"}
    ax.text(0.02, 0.97, f"■ one {what}", color=ACCENT, **place)
    ax.text(0.50, 0.97, "╎ its edges", color=INK, ha="center", **place)
    ax.text(0.98, 0.97, "□ its neighbours", color=COOL, ha="right", **place)
