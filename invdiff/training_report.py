"""What a training leaves to look at: held-out figures, samples, a check for copies, and the curve."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.canvas import ACCENT, COOL, INK, LINE, PANEL, PAPER, QUIET, WARM, axes
from invdiff.errors import InputError, PriorError
from invdiff.files import atomic_write, make_folder, show
from invdiff.priors import load_prior
from invdiff.priors.memorisation import check_memorisation
from invdiff.priors.network import NetworkPrior
from invdiff.priors.training_data import Source
from invdiff.priors.training_state import (
    STATE,
    UNREADABLE,
    VALIDATION,
    check_apart,
    check_held_out,
    digests,
    learnt_by,
    write_json,
)
from invdiff.priors.validate import SIGMAS, denoising_table
from invdiff.provenance import DISCLAIMER
from invdiff.samplers import make_sampler
from invdiff.samples import sample_prior, save_samples
from invdiff.solvers.unconditional import Unconditional

SAMPLES, CURVE = "samples.png", "curve.png"
_SAMPLER, _SCHEDULE, _STEPS = "dpmpp-2m", "log-snr", 30
_COLOURS = (COOL, ACCENT, WARM, INK)


def _state(folder: Path) -> dict[str, Any]:
    """What ``state.json`` says of a training, or nothing where the folder has none.

    Raises:
        InputError: it is damaged.
    """
    if not (folder / STATE).exists():
        return {}
    try:
        state = json.loads((folder / STATE).read_text())
        _check(state)
    except UNREADABLE as error:
        why = " ".join(str(error).split())[:80]
        raise InputError(f"{show(folder / STATE)}: is damaged ({why}); restore it, or remove it") from None
    return state


def _check(state: dict[str, Any]) -> None:
    """Raise where something is not there that a report needs, or of another kind."""
    curve, history, side = state.get("curve", []), state.get("validation", []), state["config"]["stages"][-1][1]
    numbers: list[Any] = [h["crops"] for h in history]
    numbers += [state[name] for name in ("steps", "crops", "cpu_s") if curve]
    numbers += [point[name] for point in curve for name in ("side", "crops", "loss")]
    numbers += [v[str(sigma)] for h in history for v in h["psnr_db"].values() for sigma in SIGMAS]
    digests(state)
    right = isinstance(side, int) and side > 0 and isinstance(curve, list) and isinstance(history, list)
    if not (right and all(isinstance(n, int | float) for n in numbers)):
        raise ValueError("not as a training writes it")


def write_report(
    folder: Path,
    train: Sequence[Source],
    held_out: Sequence[Source],
    out: Path | None = None,
    device: str = "cpu",
    count: int = 8,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write ``validation.json``, ``samples.png`` and, of a training, ``curve.png``; returns what is in the first.

    Args:
        folder: the prior; with ``state.json`` where it was trained by us.
        train: what it was trained on, for the check for copies; none to leave it out.
        held_out: slices of other subjects; none to leave the figures out.
        out: where to write; None for ``folder``.
        device: where the network runs.
        count: samples, at the crop side of the last stage of the training.
        log: gets lines of text.

    Raises:
        PriorError: the folder holds no prior, or one that is no network on images of one channel.
        InputError: its training has learnt from what is held out, or its state is damaged.
    """
    out = out or folder
    prior = load_prior(folder, device)
    if not isinstance(prior, NetworkPrior) or prior.info.channels != 1:
        raise PriorError(f"{folder}: is no network on images of one channel; validate one that is")
    state = _state(folder)
    check_apart(train, held_out)
    check_held_out(learnt_by(folder), held_out, folder)
    found: dict[str, Any] = {"history": state.get("validation", [])}
    make_folder(out)
    if held_out:
        found["denoising"] = _figures(prior, held_out, device, log)
    side = int(state["config"]["stages"][-1][1]) if state else 128
    samples, title = _samples(prior, count, side, device)
    save_samples(samples[:, None], out / SAMPLES, title, overwrite=True)
    if train:
        memorisation = check_memorisation(samples, train, held_out)
        found["memorisation"] = memorisation.as_dict()
        log(memorisation.sentence())
    write_json(out / VALIDATION, found)
    if state.get("curve"):
        draw_curve(state, out / CURVE, found.get("denoising", []))
    return found


def _figures(prior: NetworkPrior, held_out: Sequence[Source], device: str, log) -> list[dict]:
    """The rows of the table of denoising, logged as text."""

    def told(x, sigma, label=None):
        return prior.denoise(x.to(device), float(sigma[0]), label).cpu()

    names = prior.info.classes
    labelled = (lambda x, s, modality: told(x, s, modality if modality in names else None)) if names else None
    table = denoising_table(told, held_out, labelled=labelled)
    subjects = ", ".join(dict.fromkeys(source.subject for source in held_out))
    log("\n".join([f"denoising PSNR (dB, data range 2) on subjects not trained on: {subjects}", *table.lines()]))
    return table.rows


def _samples(prior: NetworkPrior, count: int, side: int, device: str) -> tuple[np.ndarray, str]:
    """Unconditional samples ``(count, side, side)``, shared out among the classes where there are any, and a title."""
    solver = Unconditional(make_sampler(_SAMPLER), _SCHEDULE)
    labels: Sequence[str | None] = prior.info.classes or (None,)
    found = []
    for k, label in enumerate(labels):
        share = (k + 1) * count // len(labels) - k * count // len(labels)
        if share:
            one = NetworkPrior(prior.net, replace(prior.info, label=label), prior.chunk)
            run = sample_prior(one, solver, _STEPS, share, (side, side), seed=k, device=device)
            found.append(deque(run, maxlen=1).pop()[:, 0].cpu().numpy())
    told = f", in the order of the classes {', '.join(map(str, labels))}" if labels[0] else ""
    return np.concatenate(found), f"{prior.info.name}: {_SAMPLER}, {_STEPS} steps, {_SCHEDULE}{told}"


def draw_curve(state: dict[str, Any], path: Path, denoising: Sequence[dict] = ()) -> None:
    """Write a PNG of the running loss and of the denoising of held-out subjects, over the crops seen.

    Args:
        state: of a training, with ``curve`` and ``validation``.
        path: PNG, replaced where it exists.
        denoising: rows of a table of the finished network, whose classical opponents become dotted lines.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), facecolor=PAPER)
    hours = f"{state['cpu_s'] / 3600:.2f} core-hours" if state["cpu_s"] >= 36 else f"{state['cpu_s']:.0f} core-seconds"
    figure.text(0.04, 0.94, "Training", color=INK, fontsize=15, weight="bold", va="center")
    figure.text(
        0.14, 0.937, f"{state['steps']} steps, {state['crops']} crops, {hours}", color=QUIET, fontsize=10, va="center"
    )
    figure.text(0.04, 0.03, f"invdiff: {DISCLAIMER}", color=QUIET, fontsize=8, va="center")
    _draw_loss(figure, state["curve"])
    _draw_validation(figure, state.get("validation", []), denoising)
    with atomic_write(path, overwrite=True) as part:
        figure.savefig(part, format="png", dpi=150, facecolor=PAPER, metadata={"Software": "invdiff"})


def _draw_loss(figure, curve: list[dict]) -> None:
    """One colour for each crop side."""
    ax = axes(figure, (0.07, 0.16, 0.4, 0.64), "loss, running mean", xlabel="crops", yscale="log")
    for colour, side in zip(_COLOURS * 8, dict.fromkeys(point["side"] for point in curve), strict=False):
        part = [point for point in curve if point["side"] == side]
        style = "o" if len(part) == 1 else "-"
        ax.plot([p["crops"] for p in part], [p["loss"] for p in part], style, color=colour, label=f"{side} pixels")
    ax.yaxis.set_minor_formatter("{x:.2g}")
    ax.yaxis.set_major_formatter("{x:.2g}")
    ax.tick_params(which="minor", colors=QUIET, labelsize=8)
    ax.legend(facecolor=PANEL, edgecolor=LINE, labelcolor=INK, fontsize=8.5)


def _draw_validation(figure, history: list[dict], denoising: Sequence[dict]) -> None:
    """Mean over subjects, a line for each noise level; BM3D dotted."""
    ax = axes(figure, (0.55, 0.16, 0.41, 0.64), "denoising PSNR of held-out subjects, dB", xlabel="crops")
    for colour, sigma in zip(_COLOURS, SIGMAS, strict=True):
        points = [(h["crops"], np.mean([v[str(sigma)] for v in h["psnr_db"].values()])) for h in history]
        style = "o-" if len(points) < 30 else "-"
        if points:
            ax.plot(*zip(*points, strict=True), style, color=colour, markersize=3, label=f"sigma {sigma}")
        best = [row["BM3D"] for row in denoising if row["sigma"] == sigma and "BM3D" in row]
        if best:
            ax.axhline(np.mean(best), color=colour, linestyle=":", linewidth=1)
    if not history:
        ax.text(0.5, 0.5, "no subject was held out", color=QUIET, ha="center", transform=ax.transAxes)
        return
    if any("BM3D" in row for row in denoising):
        ax.plot([], [], ":", color=QUIET, label="BM3D, told sigma")
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.22 * (high - low), high)  # room for the legend
    ax.legend(loc="lower right", ncols=3, facecolor=PANEL, edgecolor=LINE, labelcolor=INK, fontsize=8.5)
