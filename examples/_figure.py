"""Shared by the examples: reconstruct, print figures, draw measurement, baseline, result and reference side by side."""

import os
import sys

import numpy as np
from matplotlib.figure import Figure

import invdiff
from invdiff.opening import open_case
from invdiff.runner import Request


def run(op: str, picture: str, shown, *, baseline: str | None = None, slices=(7, 9), **operator) -> None:
    """Measure two slices by simulation, reconstruct them, and write ``picture`` (PNG).

    Args:
        op: operator of the table, with its options.
        picture: file name.
        shown: function from a case to (title, 2D array) of its measurement.
        baseline: solver to compare with; None for the operator's own.
        slices: of the built-in phantom; set INVDIFF_VOLUME to a volume to use your own, in its middle.
    """
    volume = os.environ.get("INVDIFF_VOLUME")
    compare = None if baseline is None else (baseline,)
    request = Request(volume, op, operator, simulate=True, slices=None if volume else slices, compare=compare)
    if volume:
        count = len(open_case(request).grid.data)
        request = Request(**{**vars(request), "slices": (count // 2, count // 2 + 2)})
    result = invdiff.reconstruct(request)
    for name, figures in result.metrics.items():
        print(f"{op}: {name:12} {figures['psnr_db']:.2f} dB")
    title, measured = shown(result.case)
    panels = {title: measured} | {f"{n}, {result.metrics[n]['psnr_db']:.1f} dB": s[0] for n, s in result.stacks.items()}
    panels["reference"] = result.case.truth[0]
    limits = np.percentile(result.case.truth, (0.5, 99.5))
    figure = Figure(figsize=(4 * len(panels), 4.3), layout="constrained")
    for k, (name, image) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), k + 1, title=name, xticks=[], yticks=[])
        style = {"aspect": "auto"} if image.shape != result.case.truth[0].shape else {}
        scale = limits if k else np.percentile(image, (0.5, 99.5))
        axes.imshow(image, cmap="gray", vmin=scale[0], vmax=scale[1], **style)
    figure.savefig(picture, dpi=100)
    print(f"wrote {picture}", file=sys.stderr)
