"""The solvers of a run, one after the other: steps saved at intervals, and retried in smaller parts without memory."""

import gc
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.case import Case
from invdiff.checkpoint import load, save
from invdiff.configure import steps_of
from invdiff.draws import Draws
from invdiff.errors import Interrupted, NumericalError, ResourceError, is_out_of_memory
from invdiff.files import show
from invdiff.latent import problem_for
from invdiff.position import Done, Position
from invdiff.priors.base import Prior
from invdiff.priors.latent import LatentPrior
from invdiff.problem import Problem
from invdiff.solvers import SOLVERS, solver_class
from invdiff.solvers.base import Solver, State, iterate
from invdiff.stopping import Stop

Progress = Callable[[str, int, int, dict[str, Any]], None]
log = logging.getLogger("invdiff")


class Keeper:
    """Saves how far a run has come: every ``minutes``, and when it is asked to stop.

    Args:
        path: the checkpoint, or None for no saving at all.
        minutes: between two; 0 for none, also not when asked to stop.
        fingerprint: of the run.
        stop: says whether to stop.
    """

    def __init__(self, path: Path | None, minutes: float, fingerprint: dict[str, Any], stop: Stop):
        self.path, self.minutes, self.fingerprint, self.stop = path, minutes, fingerprint, stop
        self.on = path is not None and minutes > 0
        self.due, self.failure = time.monotonic() + 60 * minutes, ""

    def wanted(self) -> bool:
        """Whether to save now; costs no more than a look at the clock."""
        return self.on and (bool(self.stop.asked) or time.monotonic() >= self.due)

    def save(self, position: Position) -> None:
        """Save ``position``; where there is no room, the run goes on with the older checkpoint and a warning.

        Raises:
            Interrupted: the run was asked to stop, and ``position`` is saved.
            ResourceError: it was asked to stop, and nothing could be saved.
        """
        if self.path is None:
            return
        try:
            save(self.path, position, self.fingerprint)
        except ResourceError as error:
            if self.stop.asked:
                raise
            if not self.failure:
                self.failure = f"no checkpoint could be saved ({error})"
                log.warning("%s", self.failure)
        if self.stop.asked:
            raise Interrupted(f"interrupted after {position.where}, saved in {show(self.path)}: pass --resume to go on")
        self.due = time.monotonic() + 60 * self.minutes

    def discard(self) -> None:
        """Remove the checkpoint of a run that cannot go on."""
        if self.on and self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass
class Run:
    """What the solvers of a run share.

    Attributes:
        request: a ``runner.Request``.
        case, problem, prior: what is reconstructed, with what; the prior is None where no solver needs one.
        keeper: of the checkpoints.
        progress: called after every step.
        finished: results of the solvers so far.
        notes: remarks for the manifest.
        inner: what solvers with a prior see of the problem, where that is not the problem itself (latents).
    """

    request: Any
    case: Case
    problem: Problem
    prior: Prior | None
    keeper: Keeper
    progress: Progress | None = None
    finished: dict[str, Done] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    inner: Problem | None = None

    def problem_of(self, solver: Solver) -> Problem:
        """What ``solver`` sees of the problem, made once."""
        seen = problem_for(solver, self.problem, self.prior) if self.inner is None else self.inner
        if seen is self.problem or not solver.needs_prior:
            return self.problem
        self.inner = replace(seen, block=self.problem.block)
        return self.inner

    def image(self, solver: Solver, state: State) -> Tensor:
        """The estimate ``(samples, S, C, H, W)`` of a state, decoded where it is one of latents."""
        if not (isinstance(self.prior, LatentPrior) and solver.needs_prior):
            return state.x0
        with torch.no_grad():
            return self.prior.decode(state.x0)

    def resume(self, device: torch.device) -> Position:
        """Take over what the checkpoint holds, if there is one, and say where the run stands."""
        path = self.keeper.path
        if not self.request.resume or path is None:
            return Position()
        if not path.exists():
            self.note("--resume: no checkpoint is there, the run starts from the beginning")
            return Position()
        shape, other = self.problem.image_shape, {}
        if isinstance(self.prior, LatentPrior):
            inner = self.prior.latent_shape(shape)
            other = {name: inner for name in SOLVERS if solver_class(name).needs_prior}
        start = load(path, self.keeper.fingerprint, shape, device, other)
        self.finished, self.notes = dict(start.finished), list(start.notes)
        self.problem = replace(self.problem, block=start.block)
        if self.prior is not None and start.chunk:
            self.prior.chunk = start.chunk
        self.note(f"resumed after {start.where}")
        return start

    def note(self, text: str) -> None:
        """A remark for the terminal, now, and the manifest."""
        self.notes.append(text)
        log.warning("%s", text)

    @property
    def remarks(self) -> list[str]:
        """The notes, and that the last checkpoint failed."""
        return [*self.notes, *([self.keeper.failure] if self.keeper.failure else [])]

    def steps(self, name: str, solver: Solver) -> int:
        """Most steps of a sample."""
        return steps_of(self.request, name, solver, self.case)

    def ended(self, name: str, solver: Solver, state: State) -> bool:
        """Whether ``state`` is the last of its sample."""
        return state.step >= self.steps(name, solver) or solver.finished(state)

    def position(self, **rest) -> Position:
        """Where the run stands."""
        chunk = None if self.prior is None else self.prior.chunk
        return Position(dict(self.finished), chunk=chunk, block=self.problem.block, notes=tuple(self.notes), **rest)

    def states(self, name: str, solver: Solver, sigmas: list[float], rng: Draws, last: State | None) -> Iterator[State]:
        """:func:`iterate` after the state ``last``; a step without enough memory is done again in smaller parts.

        Raises:
            ResourceError: a slice at a time is still too much.
        """
        prior = self.prior if solver.needs_prior else None
        while True:
            try:
                for state in iterate(solver, self.problem_of(solver), prior, sigmas, rng, last, check=True):
                    last = state
                    yield state
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
                network = any(isinstance(frame.f_locals.get("self"), Prior) for frame in frames)
                del frames  # and with them, as with the error, what the step had allocated
            self.shrink(f"step {last.step + 1 if last else 1} of {name}", network or solver.differentiates)

    def shrink(self, where: str, network: bool) -> None:
        """Halve the slices per network call or per data step, whichever the memory was for, or else the other.

        Raises:
            ResourceError: both are 1 already.
        """
        chunk = self.prior.chunk if self.prior is not None else 1
        block = min(self.problem.block, self.problem.image_shape[0]) if self.problem.operator.slicewise else 1
        if chunk == 1 and block == 1:
            raise ResourceError(
                f"out of memory in {where}, with one slice at a time: use fewer slices (--slices A:B) or another device"
            )
        if self.prior is not None and chunk > 1 and (network or block == 1):
            self.prior.chunk = chunk // 2
            what = f"the network sees {chunk // 2} instead of {chunk} slices a call"
        else:
            self.problem = replace(self.problem, block=block // 2)
            self.inner = self.inner and replace(self.inner, block=block // 2)
            what = f"the data step takes {block // 2} instead of {block} slices at a time"
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.note(f"out of memory in {where}: done again, from here on {what}")


def run_solver(run: Run, name: str, solver: Solver, start: Position) -> Done:
    """All samples of one solver, from ``start`` where that is in the middle of them.

    Raises:
        NumericalError: the estimate is not finite; names step and sigma and holds the last good state.
        Interrupted: the run was asked to stop.
    """
    start = start if start.solver == name else Position()
    calls = run.prior.calls if run.prior is not None else 0
    clock, samples = time.perf_counter(), start.samples
    last: Any = start.state  # a sample has at least one step, and then a state
    count = run.request.samples if solver.stochastic else 1

    def here(state: State | None) -> Position:
        seconds = start.seconds + time.perf_counter() - clock
        done = start.calls + (run.prior.calls - calls if run.prior is not None else 0)
        return run.position(solver=name, samples=samples, state=state, seconds=seconds, calls=done)

    while True:
        for state in run_sample(run, name, solver, samples.count, last):
            last = state
            # After the last step of a sample there is nothing to go on with but the sample itself, below.
            if run.keeper.wanted() and not run.ended(name, solver, state):
                run.keeper.save(here(state))
        image = run.image(solver, last)[0]
        picture = run.case.picture(image.cpu().numpy()) if count > 1 else None
        samples, used, last = samples.add(image, picture), facts(name, solver, last), None
        if samples.count == count:
            return conclude(run, solver, here(None), used)
        if run.keeper.wanted():
            run.keeper.save(here(None))


def run_sample(run: Run, name: str, solver: Solver, sample: int, last: State | None) -> Iterator[State]:
    """The states of one sample after ``last``, reported."""
    steps, count = run.steps(name, solver), run.request.samples if solver.stochastic else 1
    sigmas = solver.sigmas(steps, run.problem, run.prior)
    rng = Draws(run.request.seed, run.case.indices, (sample,))
    for state in run.states(name, solver, sigmas, rng, last):
        if run.progress:
            run.progress(name, sample * steps + state.step, steps * count, {"finished": solver.finished(state)})
        yield state


def conclude(run: Run, solver: Solver, end: Position, used: dict[str, Any]) -> Done:
    """The result of all samples; raises :class:`NumericalError` where it does not fit the data at all."""
    samples = end.samples
    used |= {"seconds": end.seconds, "chi2_per_datum": run.problem.chi_squared(samples.mean[None])}
    if not math.isfinite(used["chi2_per_datum"]):
        name = end.solver
        raise NumericalError(f"solver '{name}' diverged: its result does not fit the data at all; check its options")
    if run.prior is not None and solver.needs_prior:
        used |= {"nfe_per_slice": end.calls / run.problem.image_shape[0]}
    spread = np.sqrt(samples.scatter / (samples.count - 1)).astype(np.float32) if samples.count > 1 else None
    return Done(run.case.picture(samples.mean.cpu().numpy()), spread, used)


def facts(name: str, solver: Solver, state: State) -> dict[str, Any]:
    """What the last state says of the run, for the manifest."""
    used: dict[str, Any] = {"solver": name, "steps": state.step}
    if "gap" in state.memory:
        used |= {"duality_gap": float(state.memory["gap"])}
    if "weight" in state.memory:
        used |= {"weight": float(state.memory["weight"].mean())}
    if solver.stops_itself:
        used |= {"converged": solver.finished(state)}
    return used
