"""Colours, axes and scales that the pictures of operators share."""

INK, QUIET, PAPER, ACCENT, COOL, WARM = "#f2f4f8", "#8b96a8", "#0d1117", "#f5b841", "#38a3f5", "#f5692f"
PANEL, LINE = "#151b24", "#2a3240"


def axes(figure, box, title="", **limits):
    """Axes in figure coordinates (left, bottom, width, height); ``limits`` as for ``Axes.set``."""
    ax = figure.add_axes(box, facecolor=PANEL)
    ax.set(**limits)
    ax.tick_params(colors=QUIET, labelsize=8, length=3)
    ax.set_title(title, color=INK, fontsize=10.5, pad=8)
    for spine in ax.spines.values():
        spine.set(color=LINE)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(color=QUIET, fontsize=8.5)
    return ax


def subtitle(figure, text: str) -> None:
    """One line under the heading."""
    figure.text(0.04, 0.895, text, color=QUIET, fontsize=10, va="center")


def colour_bar(figure, image, box, label: str) -> None:
    """The scale of ``image``, in figure coordinates."""
    bar = figure.colorbar(image, cax=figure.add_axes(box))
    bar.outline.set(color=QUIET, linewidth=0.5)
    bar.ax.tick_params(colors=QUIET, labelsize=8, length=2)
    bar.ax.set_ylabel(label, color=QUIET, fontsize=8.5)
