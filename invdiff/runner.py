"""The runner: the one place that touches disk, devices, seeds, units and progress."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.case import Case
from invdiff.configure import chosen_solvers, configure, pick_device, steps_of
from invdiff.draws import Draws
from invdiff.errors import InputError, NumericalError, UsageError
from invdiff.intensity import HU_MAX
from invdiff.metrics import evaluate
from invdiff.noise import noise_model
from invdiff.opening import open_case
from invdiff.priors import load_prior
from invdiff.priors.complex import PhaseCorrected, slow_phase
from invdiff.problem import Problem, whiten
from invdiff.provenance import Timings, describe_file
from invdiff.solvers.base import Solver, State, iterate
from invdiff.solvers.pnp import warm_start
from invdiff.volume import Volume, from_slices

Progress = Callable[[str, int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """One reconstruction, every option resolved; the same names as on the command line."""

    input: Any = None
    op: str | None = "ct-sparse"
    operator: dict[str, Any] = field(default_factory=dict)
    solver: str = "pnp"
    solver_options: dict[str, Any] = field(default_factory=dict)
    prior: str | Path = "embedded"
    simulate: bool = False
    reference: Path | None = None
    steps: int | None = None
    samples: int = 1
    seed: int = 0
    slices: tuple[int, int] | None = None
    slice_axis: str = "auto"
    device: str = "auto"
    slice_batch: int | None = None
    coupling: str = "auto"
    compare: tuple[str, ...] | None = None
    noise: str | None = None
    noise_level: float | None = None
    nan: str = "refuse"
    volume_index: int | None = None
    series: str | None = None
    accept: tuple[str, ...] = ()
    allow_shear: bool = False


@dataclass(frozen=True)
class Result:
    """What a reconstruction gives.

    Attributes:
        volume: the result in HU on the input's grid.
        spread: standard deviation of the samples, or None for one.
        stacks: title to ``(S, H, W)`` in HU: baselines in order, the reconstruction last.
        metrics: title to figures against the truth; empty without one.
        record: sections of the manifest.
        case: what was reconstructed.
    """

    volume: Volume
    spread: Volume | None
    stacks: dict[str, np.ndarray]
    metrics: dict[str, dict[str, Any]]
    record: dict[str, Any]
    case: Case


def make_problem(case: Case, device: torch.device) -> Problem:
    """Whitened problem in the prior's range."""
    m = case.measurement
    y = torch.from_numpy(m.y)
    if m.weights is not None:
        variance = 1 / torch.from_numpy(m.weights).clamp_min(1e-12)
    else:
        noise = noise_model(m.noise)
        y, variance = noise.debias(y), noise.variance(y)
    try:
        return whiten(
            y.to(device),
            case.operator.to(device),
            variance.to(device),
            scale=case.physical.scale,
            shift=case.physical.shift,
            model_error=float(m.operator.get("model_error", 0.0)),
            spacing=(case.grid.spacing_mm, *case.grid.pixel_mm),
        )
    except InputError as error:
        raise InputError(f"{case.description}: {error}") from None


def run_solver(
    name: str, solver: Solver, problem: Problem, prior, request: Request, case: Case, progress: Progress | None
) -> tuple[Tensor, np.ndarray | None, dict[str, Any]]:
    """Mean over samples ``(slices, C, H, W)`` in the prior's range, the standard deviation of what is shown of them
    ``(slices, H, W)`` in its units, and what was used.

    Raises:
        NumericalError: the estimate is not finite; names step and sigma and holds the last good state.
    """
    steps = steps_of(request, name, solver, case)
    sigmas = solver.sigmas(steps, problem, prior)
    calls = prior.calls if prior is not None else 0
    mean = torch.zeros(())
    shown, scatter = np.zeros(()), np.zeros(())  # running mean and sum of squares over samples (Welford)
    state: State
    count = request.samples if solver.stochastic else 1
    start = time.perf_counter()
    for sample in range(count):
        rng = Draws(request.seed, case.indices, (sample,))
        good: State | None = None
        for state in iterate(solver, problem, prior if solver.needs_prior else None, sigmas, rng):
            if not bool(torch.isfinite(state.x0).all()):
                error = NumericalError(
                    f"solver '{name}' produced values that are not finite at step {state.step} "
                    f"(sigma {sigmas[state.step - 1]:.4g}): check the data, or take more steps"
                )
                error.state = good
                raise error
            good = state
            if progress:
                progress(name, sample * steps + state.step, steps * count, {"finished": solver.finished(state)})
        mean = mean + (state.x0[0] - mean) / (sample + 1)
        if count > 1:
            picture = case.picture(state.x0[0].cpu().numpy())
            delta = picture - shown
            shown = shown + delta / (sample + 1)
            scatter = scatter + delta * (picture - shown)
    used: dict[str, Any] = {"solver": name, "steps": state.step, "seconds": time.perf_counter() - start}
    used |= {"chi2_per_datum": problem.chi_squared(mean[None])}
    if not math.isfinite(used["chi2_per_datum"]):
        raise NumericalError(f"solver '{name}' diverged: its result does not fit the data at all; check its options")
    if "gap" in state.memory:
        used |= {"duality_gap": float(state.memory["gap"])}
    if "weight" in state.memory:
        used |= {"weight": float(state.memory["weight"].mean())}
    if solver.stops_itself:
        used |= {"converged": solver.finished(state)}
    if prior is not None and solver.needs_prior:
        used |= {"nfe_per_slice": (prior.calls - calls) / problem.image_shape[0]}
    return mean, np.sqrt(scatter / (count - 1)).astype(np.float32) if count > 1 else None, used


def prepare(request: Request) -> tuple[torch.device, dict[str, Solver], Any, Case, Problem]:
    """Device, solvers, prior (None where no solver needs one), case and problem: all that can fail before a run."""
    device = pick_device(request.device)
    solver = configure(request)
    prior = load_prior(request.prior, str(device), request.slice_batch) if solver.needs_prior else None
    case = open_case(request)
    solvers = chosen_solvers(request, configure(request, case.measurement.operator), case)
    if prior is None and any(s.needs_prior for s in solvers.values()):
        prior = load_prior(request.prior, str(device), request.slice_batch)
    problem = make_problem(case, device)
    if prior is not None and problem.operator.complex_image and prior.info.channels == 1:
        prior = PhaseCorrected(prior, slow_phase(warm_start(problem)[0]))
    if prior is not None:
        check_levels(request, prior)
    for name, solver in solvers.items():
        solver.require(problem)
        solver.sigmas(steps_of(request, name, solver, case), problem, prior)
    return device, solvers, prior, case, problem


def check_levels(request: Request, prior) -> None:
    """Raise :class:`UsageError` where a noise level that the user asked for lies outside the prior's range."""
    low, high = prior.info.sigma_min, prior.info.sigma_max
    for key in ("sigma_min", "sigma_max"):
        value = float(request.solver_options.get(key, low))
        if not low <= value <= high:
            raise UsageError(
                f"solver option {key} is {value:g}: the prior '{prior.info.name}' knows noise levels from {low:g} to "
                f"{high:g}; choose one between"
            )


def reconstruct(request: Request | None = None, progress: Progress | None = None, **options) -> Result:
    """Reconstruct one case; ``reconstruct(op="ct-sparse", input="scan.nii.gz", simulate=True)``.

    Args:
        request: all options, or give them by keyword.
        progress: called as ``progress(solver, step, steps, info)``.

    Raises:
        InvdiffError: bad usage, input, prior, resources or numbers; one line each.
    """
    request = request or Request(**options)
    timings = Timings()
    with timings.phase("measure or read"):
        device, solvers, prior, case, problem = prepare(request)
        inputs = {role: describe_file(path) for role, path in case.inputs.items()}
    stacks: dict[str, np.ndarray] = {}
    runs: dict[str, dict[str, Any]] = {}
    spread = None
    for name, solver in solvers.items():
        try:
            with timings.phase(name):
                mean, spread, runs[name] = run_solver(name, solver, problem, prior, request, case, progress)
        except NumericalError as error:
            if error.state is not None:
                last = case.picture(error.state.x0[0].cpu().numpy())
                error.volume = from_slices(last.astype(np.float32), case.grid)
            raise
        stacks[name] = case.picture(mean.cpu().numpy())
    metrics = {} if case.truth is None else {n: evaluate(s, case.truth, case.modality) for n, s in stacks.items()}
    volume = from_slices(stacks[request.solver].astype(np.float32), case.grid)
    record = {
        "case": case.description,
        "runs": runs,
        "metrics": metrics,
        "warnings": [
            *case.notes,
            *problem.base.advice,
            *self_check(case, problem, prior, runs[request.solver]),
            *unconverged(runs),
        ],
        "timings": timings.seconds,
        "device": str(device),
        "inputs": inputs,
        "solver_options": {name: vars(solver) for name, solver in solvers.items()},
        "prior": None if prior is None else vars(prior.info) | {"slices_per_network_call": prior.chunk},
    }
    return Result(volume, None if spread is None else from_slices(spread, case.grid), stacks, metrics, record, case)


def unconverged(runs: dict[str, dict[str, Any]]) -> list[str]:
    """A warning for every run that ended at its safety limit instead of by its own rule."""
    found = [(name, run["steps"]) for name, run in runs.items() if not run.get("converged", True)]
    return [f"solver '{name}' did not converge in {steps} steps; its figures understate it" for name, steps in found]


def self_check(case: Case, problem: Problem, prior, used: dict[str, Any]) -> list[str]:
    """Warnings where the data lie outside what the prior saw, or the result does not explain the data."""
    found = []
    chi2 = used["chi2_per_datum"]
    ratio = problem.y.numel() * problem.base.measured_fraction / math.prod(problem.image_shape)
    # Below 1 is usual: an estimate fits as much of the noise as it has degrees of freedom, all where data are few.
    if not (0.2 if ratio > 1 else 0) <= chi2 <= 2:
        verdict = "fits the noise" if chi2 < 1 else "does not explain the data"
        found.append(f"chi-squared per datum is {chi2:.2f}, far from 1: the result {verdict}; check noise and geometry")
    if prior is not None and prior.info.modality not in ("any", case.modality):
        found.append(f"the prior was made for {prior.info.modality}, the data are {case.modality}")
    if prior is not None and prior.info.voxel_mm:
        low, high = prior.info.voxel_mm
        pixel = min(problem.spacing[1:]), max(problem.spacing[1:])
        if pixel[0] < low or pixel[1] > high:
            found.append(f"pixel size {pixel[0]:.2f} to {pixel[1]:.2f} mm: the prior saw {low:g} to {high:g} mm")
    if case.modality == "CT" and case.truth is not None and float(np.mean(case.truth >= HU_MAX)) > 0.001:
        found.append("more than 0.1 % of the voxels are at the upper HU limit (metal?): expect streaks")
    return found
