"""``--dry-run``: check everything, then predict memory from array sizes and time from a few measured calls."""

import json
import time
from dataclasses import dataclass

import torch

from invdiff.case import Case
from invdiff.priors import load_prior
from invdiff.problem import Problem
from invdiff.provenance import peak_memory_mb
from invdiff.runner import Request, configure, make_problem, open_case, pick_device

VOLUMES_HELD = {"pnp": 8, "dds": 9, "dps": 6, "tv": 12, "fbp": 3, "sirt": 5}  # stack-sized arrays, as in docstrings


@dataclass(frozen=True)
class Plan:
    """Prediction of one run: shapes, seconds and megabytes."""

    case: str
    slices: tuple[int, int, int]
    data: tuple[int, ...]
    steps: int
    seconds: float
    memory_mb: float
    device: str

    def text(self, as_json: bool) -> str:
        if as_json:
            return json.dumps(vars(self), indent=2)
        s, h, w = self.slices
        return (
            f"{self.case}\n{s} slices of {h} x {w}, data {' x '.join(map(str, self.data))}, {self.steps} steps on "
            f"{self.device}\nabout {self.seconds:.0f} s and {self.memory_mb:.0f} MB; nothing was run or written"
        )


def predict(request: Request) -> Plan:
    """Open the case, time one network call and one data step, and extrapolate. Baselines are not counted.

    Raises:
        InvdiffError: whatever the run itself would raise before its first step.
    """
    device = pick_device(request.device)
    solver = configure(request)
    case = open_case(request)
    problem = make_problem(case, device)
    steps = request.steps if request.steps and solver.needs_prior else solver.default_steps
    prior = load_prior(request.prior, str(device), request.slice_batch) if solver.needs_prior else None
    seconds = steps * request.samples * _step_seconds(problem, prior, solver)
    arrays = VOLUMES_HELD.get(request.solver, 8) * 4 * problem.measured.new_empty(0).element_size() // 4
    stack = problem.y.numel() * 4 * 6 + arrays * torch.Size(problem.image_shape).numel()
    memory = peak_memory_mb() + stack / 1e6
    slices, _, rows, columns = problem.image_shape
    return Plan(case.description, (slices, rows, columns), tuple(problem.y.shape), steps, seconds, memory, str(device))


def _step_seconds(problem: Problem, prior, solver) -> float:
    """Seconds of one step: a network call per slice and the iterations of the data step, each timed on one block."""
    block = problem.blocks()[0]
    part = problem.restrict(block)
    x = torch.zeros(1, *part.image_shape, dtype=problem.y.dtype, device=problem.y.device)
    share = len(problem.y) / len(part.y)
    part.operator.normal(x)  # builds the matrix
    data = _time(lambda: part.operator.normal(x)) * share * getattr(solver, "cg_iterations", 2)
    if prior is None:
        return data
    chunk = x[:, : prior.chunk]
    prior.denoise(chunk, 0.1)
    network = _time(lambda: prior.denoise(chunk, 0.1)) * len(problem.y) / chunk.shape[1]
    return data + network * (3 if type(solver).__name__ == "DPS" else 1)


def _time(call) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


__all__ = ["Case", "Plan", "predict"]
