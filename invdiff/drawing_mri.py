"""Pictures of MRI operators: where k-space is measured, and what the coils see."""

import numpy as np

from invdiff.canvas import ACCENT, COOL, INK, axes, colour_bar, subtitle
from invdiff.overview import Overview

COILS = 16  # shown at most


def draw_mri(figure, seen: Overview) -> None:
    """Samples of k-space on the left; on the right the sensitivity of each coil, or the point response of one coil."""
    op = seen.operator
    height, width = op.in_shape[1:]
    coils = op.out_shape[0] // 2
    words = f"acceleration {op.acceleration:.3g} as achieved, {coils} {'coil' if coils == 1 else 'coils'}"
    subtitle(figure, f"{words}, {seen.ratio:.3g} measured numbers per unknown one")
    ax = axes(figure, (0.06, 0.12, 0.40, 0.70), "k-space, cycles per pixel")
    box = (-0.5, 0.5, 0.5, -0.5)
    if hasattr(op, "trajectory"):
        points = op.trajectory.cpu().numpy()
        ax.plot(points[..., 1].T, points[..., 0].T, "-", color=COOL, linewidth=0.6)
        ax.plot(points[0, :, 1], points[0, :, 0], "-", color=ACCENT, linewidth=2)
        ax.text(0.02, 0.97, "━ the first one", color=ACCENT, transform=ax.transAxes, fontsize=8.5, va="top")
        ax.set(xlim=(-0.52, 0.52), ylim=(0.52, -0.52), aspect="equal")
    else:
        mask = op.mask.cpu().numpy()
        ax.imshow(mask if mask.ndim == 2 else mask[len(mask) // 2], cmap="gray", interpolation="nearest", extent=box)
    ax.set(xlabel="columns", ylabel="rows")
    if op.maps is None:
        _draw_response(figure, op, height, width)
        return
    maps = np.abs(op.maps.cpu().numpy())
    maps = (maps if maps.ndim == 3 else maps[len(maps) // 2])[:COILS]
    across = int(np.ceil(np.sqrt(len(maps))))
    side = 0.36 / across
    for c, sensitivity in enumerate(maps):
        left, top = 0.54 + (c % across) * side, 0.80 - (c // across + 1) * side * 1.75
        ax = axes(figure, (left, top, 0.94 * side, 0.94 * side * 1.75), "")
        image = ax.imshow(sensitivity, cmap="magma", vmin=0, vmax=float(maps.max()))
        ax.set(xticks=[], yticks=[])
    figure.text(0.54, 0.83, "sensitivity of the coils", color=INK, fontsize=10.5)
    colour_bar(figure, image, (0.915, 0.3, 0.010, 0.4), "magnitude")


def _draw_response(figure, op, height: int, width: int) -> None:
    """|A^T A| of a point in the middle: the aliasing that a prior has to resolve."""
    import torch

    point = torch.zeros(1, *op.in_shape)
    point[0, 0, height // 2, width // 2] = 1
    first = op if getattr(op, "slices", None) is None else op.restrict(slice(0, 1))
    response = first.normal(point)[0].square().sum(0).sqrt().numpy()
    response = 20 * np.log10(np.maximum(response / response.max(), 1e-3))
    ax = axes(figure, (0.54, 0.12, 0.36, 0.70), "response to a point, dB")
    image = ax.imshow(response, cmap="magma", vmin=-60, vmax=0)
    ax.set(xlabel="column", ylabel="row")
    colour_bar(figure, image, (0.915, 0.3, 0.010, 0.4), "dB")
