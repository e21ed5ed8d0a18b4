"""The runner: the one place that touches disk, devices, seeds, units and progress."""

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invdiff.case import Case
from invdiff.configure import chosen_solvers, configure, pick_device, steps_of
from invdiff.destination import check_room
from invdiff.errors import InputError, NumericalError, UsageError
from invdiff.fingerprint import fingerprint
from invdiff.fitting import check_solver, fit_prior, mismatches, out_of_range
from invdiff.intensity import HU_MAX
from invdiff.metrics import evaluate
from invdiff.noise import noise_model
from invdiff.opening import open_case
from invdiff.operators import OPERATORS
from invdiff.position import Position
from invdiff.priors import load_prior
from invdiff.priors.options import PriorOptions
from invdiff.problem import Problem, whiten
from invdiff.provenance import Timings, describe_file
from invdiff.solvers.base import Solver
from invdiff.solving import Keeper, Progress, Run, run_solver
from invdiff.stopping import Stop
from invdiff.volume import Volume, from_slices

log = logging.getLogger("invdiff")


@dataclass(frozen=True)
class Request:
    """One reconstruction, every option resolved; the same names as on the command line.

    ``checkpoint`` is the file that says every ``checkpoint_minutes`` how far the run has come (None or 0 for none, over
    an older one), and with ``resume`` the file to go on from; remove it when the result is safe.
    """

    input: Any = None
    op: str | None = "ct-sparse"
    operator: dict[str, Any] = field(default_factory=dict)
    solver: str = "pnp"
    solver_options: dict[str, Any] = field(default_factory=dict)
    prior: str | Path = "embedded"
    prior_options: dict[str, Any] = field(default_factory=dict)
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
    checkpoint: Path | None = None
    checkpoint_minutes: float = 5.0
    resume: bool = False


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
    try:
        if m.weights is not None:
            variance = 1 / torch.from_numpy(m.weights).clamp_min(1e-12)
        else:
            noise = noise_model(m.noise)
            y, variance = noise.debias(y), noise.variance(y)
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


def prepare(request: Request) -> tuple[torch.device, dict[str, Solver], Any, Case, Problem]:
    """Device, solvers, prior (None where no solver needs one), case and problem: all that can fail before a run."""
    device = pick_device(request.device)
    solver, options = configure(request), PriorOptions.of(request.prior_options)
    prior = load_prior(request.prior, str(device), request.slice_batch) if solver.needs_prior else None
    case = open_case(request)
    solvers = chosen_solvers(request, configure(request, case.measurement.operator), case)
    if prior is None and any(s.needs_prior for s in solvers.values()):
        prior = load_prior(request.prior, str(device), request.slice_batch)
    problem = make_problem(case, device)
    for solver in solvers.values():
        solver.require(problem)
    if prior is not None:
        for name, one in solvers.items():
            check_solver(prior, name, one)
        scanner = OPERATORS[case.measurement.operator["name"]].family != "image"
        prior = fit_prior(prior, problem, options, scanner and any(one.turning for one in solvers.values()))
        check_levels(request, prior)
        notes = mismatches(prior, problem, case)
        case = replace(case, notes=(*case.notes, *notes))
        for text in notes:
            log.warning("%s", text)
    for name, solver in solvers.items():
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


def reconstruct(
    request: Request | None = None, progress: Progress | None = None, stop: Stop | None = None, **options
) -> Result:
    """Reconstruct one case; ``reconstruct(op="ct-sparse", input="scan.nii.gz", simulate=True)``.

    Args:
        request: all options, or give them by keyword.
        progress: called as ``progress(solver, step, steps, info)``.
        stop: asks to end after a step and to save, where the request has a checkpoint.

    Raises:
        InvdiffError: bad usage, input, prior, resources or numbers, or interrupted; one line each.
    """
    request, stop = request or Request(**options), stop or Stop()
    timings = Timings()
    with timings.phase("measure or read"):
        device, solvers, prior, case, problem = prepare(request)
        inputs = {role: describe_file(path) for role, path in case.inputs.items()}
        steps = {name: steps_of(request, name, solver, case) for name, solver in solvers.items()}
        own = fingerprint(request, device, solvers, steps, prior, problem, inputs) if request.checkpoint else {}
    if request.checkpoint:
        check_room(request.checkpoint.parent, 4 * case.grid.data.size * (2 if request.samples > 1 else 1))
    keeper = Keeper(request.checkpoint, request.checkpoint_minutes, own, stop)
    run = Run(request, case, problem, prior, keeper, progress)
    start = run.resume(device)
    with stop.between_steps() if keeper.on else nullcontext():
        run_all(run, solvers, start, timings)
    stacks = {name: run.finished[name].stack for name in solvers}
    runs = {name: run.finished[name].used for name in solvers}
    metrics = {} if case.truth is None else {n: evaluate(s, case.truth, case.modality) for n, s in stacks.items()}
    record = {
        "case": case.description,
        "runs": runs,
        "metrics": metrics,
        "warnings": [
            *case.notes,
            *problem.base.advice,
            *self_check(case, problem, runs[request.solver]),
            *([] if prior is None else out_of_range(prior, case, stacks[request.solver])),
            *unconverged(runs),
            *run.remarks,
        ],
        "timings": timings.seconds,
        "device": str(device),
        "inputs": inputs,
        "solver_options": {name: vars(solver) for name, solver in solvers.items()},
        "prior": None if prior is None else vars(prior.info) | {"slices_per_network_call": prior.chunk},
    }
    volume, spread = (
        from_slices(stacks[request.solver].astype(np.float32), case.grid),
        run.finished[request.solver].spread,
    )
    return Result(volume, None if spread is None else from_slices(spread, case.grid), stacks, metrics, record, case)


def run_all(run: Run, solvers: dict[str, Solver], start: Position, timings: Timings) -> None:
    """The solvers in their order, less those that are finished, the first of them from ``start``.

    Raises:
        NumericalError: with the last good estimate as ``volume``.
        Interrupted: the run was asked to stop.
    """
    for name, solver in solvers.items():
        if name in run.finished:
            continue
        try:
            with timings.phase(name):
                run.finished[name] = run_solver(run, name, solver, start)
        except NumericalError as error:
            run.keeper.discard()
            if error.state is not None:
                last = run.case.picture(run.image(solver, error.state)[0].cpu().numpy())
                error.volume = from_slices(last.astype(np.float32), run.case.grid)
            raise
        if run.keeper.wanted():
            run.keeper.save(run.position())


def unconverged(runs: dict[str, dict[str, Any]]) -> list[str]:
    """A warning for every run that ended at its safety limit instead of by its own rule."""
    found = [(name, run["steps"]) for name, run in runs.items() if not run.get("converged", True)]
    return [f"solver '{name}' did not converge in {steps} steps; its figures understate it" for name, steps in found]


def self_check(case: Case, problem: Problem, used: dict[str, Any]) -> list[str]:
    """Warnings where the result does not explain the data, or these hold metal."""
    found = []
    chi2 = used["chi2_per_datum"]
    ratio = problem.y.numel() * problem.base.measured_fraction / math.prod(problem.image_shape)
    # Below 1 is usual: an estimate fits as much of the noise as it has degrees of freedom, all where data are few.
    if not (0.2 if ratio > 1 else 0) <= chi2 <= 2:
        verdict = "fits the noise" if chi2 < 1 else "does not explain the data"
        found.append(f"chi-squared per datum is {chi2:.2f}, far from 1: the result {verdict}; check noise and geometry")
    if case.modality == "CT" and case.truth is not None and float(np.mean(case.truth >= HU_MAX)) > 0.001:
        found.append("more than 0.1 % of the voxels are at the upper HU limit (metal?): expect streaks")
    return found
