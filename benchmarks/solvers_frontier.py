"""Quality against time beside deepinv's DPS and DiffPIR: same network, operator, data and budget, in one run.

    python benchmarks/solvers_frontier.py                       CT of 30 views and missing pixels, 2 slices
    python benchmarks/solvers_frontier.py --operators inpaint --budgets 20 50

The network is the embedded prior, a denoiser of images in [0, 1] to deepinv. Above its largest noise level (20, deepinv
begins at 157) its input is shrunk to that level. deepinv gets the whitened problem, scaled so that |A| = 1, as its
weights are made for; white noise of the level that follows; its own closed form for missing pixels, else ours as
`invdiff.operators.adapters.to_deepinv`. Every method runs with its defaults and, marked *, with the weight that is best
for a slice of the validation split at the middle one of the budgets. Budgets are evaluations of the network per slice.
"""

import argparse
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from _solving import Job, Run, jobs, line, note_calls, run
from deepinv.models import Denoiser
from deepinv.optim.data_fidelity import L2
from deepinv.physics import GaussianNoise, Inpainting
from deepinv.sampling import DPS, DiffPIR
from torch import Tensor

from invdiff.operators.adapters import to_deepinv
from invdiff.priors import load_prior
from invdiff.priors.base import Prior
from invdiff.solvers.common import squared_norms

MEASURED = {"ct-sparse": {"views": 30}, "inpaint": {}, "blur": {}, "sr": {}}
WEIGHTS = {  # method -> option, its values
    "deepinv DPS": ("weight", (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)),
    "deepinv DiffPIR": ("lambda_", (0.03, 0.1, 0.3, 1.0, 3.0, 7.0, 15.0)),
    "dps": ("zeta", (0.3, 3.0, 10.0, 30.0, 100.0)),
    "diffpir": ("lam", (0.1, 0.3, 0.8, 1.75, 4.0)),
}
OURS = ("pnp", "dds", "diffpir", "dps")


class UnitRange(Denoiser):
    """The prior D, made for u, as a denoiser of v = (u + 1) / 2: (D(2 v - 1; 2 s) + 1) / 2."""

    def __init__(self, prior: Prior):
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor, sigma: Any, **_: Any) -> Tensor:
        level = 2 * float(torch.as_tensor(sigma).flatten()[0])
        shrink = min(1.0, self.prior.info.sigma_max / level)
        return (self.prior.denoise(shrink * (2 * x - 1), shrink * level) + 1) / 2


class Theirs(NamedTuple):
    """A stack as deepinv sees it: y = A v + noise of standard deviation ``std``, |A| = 1, v in [0, 1]."""

    physics: Any
    y: Tensor
    std: float


def theirs(op: str, job: Job) -> Theirs:
    """Of the whitened problem y = A u + n with u = 2 v - 1: y + A 1 = 2 A v + n, divided by |2 A|."""
    problem = job.problem
    norm = 2 * float(squared_norms(problem).amax().sqrt())
    y = (problem.y + problem.operator(torch.ones(problem.image_shape))) / norm
    noise = GaussianNoise(1 / norm)
    if op == "inpaint":
        size = problem.image_shape[1:]
        return Theirs(Inpainting(size, problem.base.mask.float()[None], noise_model=noise), y, 1 / norm)
    return Theirs(to_deepinv((2 / norm) * problem.operator, noise_model=noise), y, 1 / norm)


def run_theirs(name: str, op: str, todo: list[Job], budget: int, **options) -> Run:
    """DPS or DiffPIR of deepinv within ``budget`` evaluations; building the model is not timed."""
    total = Run()
    for job in todo:
        physics, y, std = theirs(op, job)
        network = UnitRange(job.counted)
        if name == "deepinv DPS":
            model: Any = DPS(network, num_steps=budget + 1, rng=torch.Generator(), **options)
        else:
            model = DiffPIR(network, L2(), sigma=std, max_iter=budget, **options)
        job.counted.reset()
        start = time.perf_counter()
        torch.manual_seed(0)
        v = model(y, physics, seed=1).detach().float()
        seconds = time.perf_counter() - start
        note_calls(total, job)
        total.add(job.case.picture((2 * v - 1).numpy()), job.case, seconds)
    return total


def method(name: str, op: str, todo: list[Job], budget: int, **options) -> Run:
    """One of ours or of deepinv's."""
    found = (
        run_theirs(name, op, todo, budget, **options)
        if name.startswith("deepinv")
        else run(name, todo, budget, **options)
    )
    assert found is not None
    return found


def chosen(name: str, op: str, todo: list[Job], budget: int) -> dict[str, float]:
    """The weight that is best for the validation slices."""
    option, values = WEIGHTS[name]
    quality = {value: float(method(name, op, todo, budget, **{option: value}).figures()["psnr"]) for value in values}
    best = max(quality, key=lambda v: np.nan_to_num(quality[v], nan=-np.inf))
    tried = ", ".join(f"{value:g}: {q:.2f}" for value, q in quality.items())
    print(f"  {name}, validation slice, {budget} evaluations, dB by {option}: {tried}; chosen {best:g}", flush=True)
    return {option: best}


def frontier(op: str, args: argparse.Namespace, prior: Prior) -> None:
    validation = jobs(op, MEASURED[op], "validation", 1, args.size, prior)
    todo = jobs(op, MEASURED[op], args.split, args.slices, args.size, prior)
    subjects = ", ".join(f"{len(j.problem.y)} of {j.subject}" for j in todo)
    print(f"\n{op} {MEASURED[op] or ''}: {subjects}")
    middle = sorted(args.budgets)[len(args.budgets) // 2]
    plans: dict[str, tuple[str, dict]] = {name: (name, {}) for name in (*OURS, "deepinv DPS", "deepinv DiffPIR")}
    plans |= {f"{name} *": (name, chosen(name, op, validation, middle)) for name in WEIGHTS}
    for budget in args.budgets:
        found = {title: method(name, op, todo, budget, **options) for title, (name, options) in plans.items()}
        for title, one in found.items():
            print(line(f"{title}, {budget}", one), flush=True)
        rivals = {t: r.figures() for t, r in found.items() if t.startswith("deepinv")}
        best = max(rivals, key=lambda t: np.nan_to_num(rivals[t]["psnr"], nan=-np.inf))
        for title in OURS:
            own, other = found[title].figures(), rivals[best]
            ratio = other["seconds"] / own["seconds"]
            print(
                f"  {title} against {best}: {own['psnr'] - other['psnr']:+.2f} dB, {best} takes {ratio:.2f} of its time"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test")
    parser.add_argument("--operators", nargs="+", choices=list(MEASURED), default=["ct-sparse", "inpaint"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[20, 50, 100], help="network evaluations per slice")
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()
    prior = load_prior("embedded")
    for op in args.operators:
        frontier(op, args, prior)


if __name__ == "__main__":
    main()
