"""Shared by the solver benchmarks: small measured stacks of held-out subjects, runs with network calls counted."""

import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from _data import subjects
from torch import Tensor

from invdiff.case import Case
from invdiff.configure import tuned
from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.metrics import evaluate
from invdiff.opening import open_case
from invdiff.operators import OPERATORS
from invdiff.priors.base import Prior
from invdiff.priors.complex import PhaseCorrected, slow_phase
from invdiff.problem import Problem
from invdiff.runner import Request, make_problem
from invdiff.solvers import make_solver
from invdiff.solvers.base import Solver, iterate
from invdiff.solvers.pnp import warm_start
from invdiff.volume import Volume, load_volume, to_slices

PREFIXES = {"ct": ("ct_",), "mri": ("mr_",), "image": ("ct_", "mr_")}  # family of operators -> subjects


class Counted(Prior):
    """A prior that counts its evaluations of slices, those that are differentiated apart with their gradients, and
    times the others."""

    def __init__(self, prior: Prior):
        self.prior, self.info, self.chunk, self.kind = prior, prior.info, prior.chunk, prior.kind
        self.together = prior.together
        self.reset()

    def reset(self) -> None:
        """Count from 0 again."""
        self.plain = self.differentiated = self.gradients = 0
        self.plain_seconds = 0.0

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Evaluations and gradients, an evaluation with its first gradient being one."""
        return self.plain + max(self.differentiated, self.gradients)

    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        count = x[..., 0, 0, 0].numel()
        start = time.perf_counter()
        out = self.prior.denoise(x, sigma, context)
        if x.requires_grad:
            self.differentiated += count
            out.register_hook(lambda _: self._took(count))
        else:
            self.plain += count
            self.plain_seconds += time.perf_counter() - start
        return out

    def _took(self, count: int) -> None:
        self.gradients += count

    def both_seconds(self, size: tuple[int, int]) -> tuple[float, float]:
        """Of one slice forward and of one backward through the network outside any solver: medians of three."""
        there, back = [], []
        for _ in range(3):
            x = torch.zeros(self.chunk, 1, *size).requires_grad_()
            start = time.perf_counter()
            out = self.prior.denoise(x, 0.1).sum()
            called = time.perf_counter()
            torch.autograd.grad(out, x)
            there.append((called - start) / self.chunk)
            back.append((time.perf_counter() - called) / self.chunk)
        return statistics.median(there), statistics.median(back)

    def bare(self, size: tuple[int, int]) -> float:
        """Seconds that all evaluations so far took by themselves: those within the solver's run that are not
        differentiated, and the time of as many that are, outside it."""
        if not self.differentiated:
            return self.plain_seconds
        forward, backward = self.both_seconds(size)
        return self.plain_seconds + self.differentiated * forward + self.gradients * backward


class Job(NamedTuple):
    """A measured stack of one subject, and the prior as its images need it."""

    subject: str
    case: Case
    problem: Problem
    prior: Prior
    counted: Counted


@dataclass
class Run:
    """Sums over the slices of one or more stacks; ``bare`` is what the network calls take alone."""

    slices: int = 0
    psnr: float = 0.0
    ssim: float = 0.0
    seconds: float = 0.0
    calls: int = 0
    differentiated: int = 0
    bare: float = 0.0

    def add(self, picture: np.ndarray, case: Case, seconds: float) -> None:
        """Score ``(S, H, W)`` in the units of the case; what is not finite has no score, here and in the mean."""
        finite = bool(np.isfinite(picture).all())
        figures = evaluate(picture, case.truth, case.modality) if finite else {"psnr_db": np.nan, "ssim": np.nan}
        self.slices, self.seconds = self.slices + len(picture), self.seconds + seconds
        self.psnr += len(picture) * figures["psnr_db"]
        self.ssim += len(picture) * figures["ssim"]

    def figures(self) -> dict[str, float]:
        """Means over slices; ``overhead`` is what the solver takes beside the network, relative to the network."""
        n, calls = self.slices, self.calls
        found = {"psnr": self.psnr / n, "ssim": self.ssim / n, "seconds": self.seconds / n, "nfe": calls / n}
        return found | {"overhead": (self.seconds - self.bare) / self.bare if calls else np.nan}


def small_stack(path: Path, count: int, size: int, neighbours: bool = False, square: bool = True) -> Volume:
    """``count`` slices of a subject, evenly spaced through what is not air or neighbours in the middle of it, each
    resampled whole to ``size`` x ``size`` (linear, antialiased: F.interpolate's area averages are unevenly spaced where
    the ratio is no integer), the shorter side padded with the lowest value, or as it is, to the nearest multiple of 4
    (not ``square``).
    """
    modality = "CT" if path.name.startswith("ct_") else "MR"
    stack = to_slices(load_volume(path, modality=modality), allow_shear=True)
    level = -500.0 if modality == "CT" else 0.2 * float(np.percentile(stack.data, 99.5))
    body = np.flatnonzero((stack.data > level).mean((1, 2)) > 0.05)
    first = (len(body) - count) // 2
    spread = np.linspace(0, len(body) - 1, count + 2)[1:-1].round().astype(int)
    data = stack.data[body[first : first + count] if neighbours else body[spread]]
    data = np.clip(data, -1000, 3071) if modality == "CT" else data
    height, width = data.shape[1:]
    factor = size / max(height, width)
    shape = (round(height * factor), round(width * factor))
    if not square:
        shape = (round(height * factor / 4) * 4, round(width * factor / 4) * 4)
    small = F.interpolate(torch.tensor(data)[:, None], shape, mode="bilinear", antialias=True)[:, 0].numpy()
    if square:
        margins = [((size - n) // 2, size - n - (size - n) // 2) for n in shape]
        small = np.pad(small, ((0, 0), *margins), constant_values=small.min())
    spacing = stack.spacing_mm
    affine = np.diag([stack.pixel_mm[1] * width / shape[1], stack.pixel_mm[0] * height / shape[0], spacing, 1.0])
    units = "HU" if modality == "CT" else "1"
    return Volume(np.ascontiguousarray(small.transpose(2, 1, 0)), affine, units, modality)


def jobs(op: str, options: dict[str, Any], split: str, count: int, size: int, prior: Prior):
    """``count`` slices in all, shared out among the subjects of a split that the operator measures, as
    ``invdiff reconstruct --simulate`` measures them."""
    found = [path for prefix in PREFIXES[OPERATORS[op].family] for path in subjects(split, prefix)]
    paths = found[:: max(1, len(found) // count)] if len(found) > count else found
    shares = [len(range(k, count, len(paths))) for k in range(min(count, len(paths)))]
    return [measured(op, options, p, n, size, prior) for p, n in zip(paths, shares, strict=False)]


def measured(
    op: str, options: dict[str, Any], path: Path, count: int, size: int, prior: Prior, neighbours=False, square=True
) -> Job:
    """One subject, measured."""
    volume = small_stack(path, count, size, neighbours, square)
    case = open_case(Request(volume, op, options, simulate=True, slice_axis="2"))
    problem, counted = make_problem(case, torch.device("cpu")), Counted(prior)
    return Job(path.name.split(".")[0], case, problem, seeing(counted, problem), counted)


def seeing(prior: Prior, problem: Problem) -> Prior:
    """The prior as the images of a problem need it: complex ones with the slow phase removed."""
    return PhaseCorrected(prior, slow_phase(warm_start(problem)[0])) if problem.operator.complex_image else prior


def steps_for(solver: Solver, job: Job, budget: int) -> int:
    """The most steps whose network evaluations, two for a complex slice, do not exceed ``budget``; at least one. Of the
    gradients of an evaluation all but the first count too."""
    channels = job.problem.image_shape[1]
    most, further = budget // channels, max(0, solver.gradients - 1)
    return next((n for n in range(most, 0, -1) if solver.calls(n) + further * solver.differentiated(n) <= most), 1)


def run(name: str, todo: list[Job], budget: int | None, steps: int | None = None, **options) -> Run | None:
    """Run a solver on every stack within ``budget`` network evaluations per slice, or with ``steps``; None where it
    does not fit the operator."""
    total = Run()
    for job in todo:
        described = job.case.measurement.operator
        solver = make_solver(name, **(tuned(described, name)[0] | options))
        try:
            solver.require(job.problem)
        except UsageError:
            return None
        prior = job.prior if solver.needs_prior else None
        count = steps or (steps_for(solver, job, budget) if budget and prior else solver.default_steps)
        sigmas = solver.sigmas(count, job.problem, prior)
        job.counted.reset()
        start = time.perf_counter()
        state = deque(iterate(solver, job.problem, prior, sigmas, Draws(0, job.case.indices)), maxlen=1).pop()
        seconds = time.perf_counter() - start
        note_calls(total, job)
        total.add(job.case.picture(state.x0[0].numpy()), job.case, seconds)
    return total


def note_calls(total: Run, job: Job) -> None:
    """Add the network calls since the last reset, and what they took by themselves."""
    total.calls += job.counted.calls
    total.differentiated += job.counted.differentiated
    total.bare += job.counted.bare(job.problem.image_shape[-2:])


def line(title: str, found: Run | None) -> str:
    """One row of the table; '-' for a solver that does not fit."""
    if found is None:
        return f"  {title:22} -"
    f = found.figures()
    overhead = f"{100 * f['overhead']:6.0f} %" if f["nfe"] else f"{'-':>8}"
    gradient = "  forward and backward" if found.differentiated else ""
    quality = f"{f['psnr']:6.2f} dB {f['ssim']:6.3f}"
    return f"  {title:22} {quality} {f['seconds']:8.2f} s {f['nfe']:6.0f} NFE {overhead}{gradient}"
