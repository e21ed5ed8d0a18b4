"""Every solver that needs a prior on every kind of operator, at equal numbers of network evaluations, in one run.

    python benchmarks/solvers.py                4 slices of the test split, 20, 50 and 100 evaluations per slice
    python benchmarks/solvers.py --operators blur sr --solvers pnp dds --budgets 20 --split validation
    python benchmarks/solvers.py --mbir         DiffusionMBIR at its published length against `dds` and `pnp`
    python benchmarks/solvers.py --overhead     time beside the network in stacks of 32 slices of 256 x 256

Slices are resampled whole to 128 x 128 (not cropped) and measured with the noise of `invdiff reconstruct --simulate`,
CT operators on CT subjects, MRI on MR subjects, the others on both. Solvers run with their default options. NFE counts
evaluations of the network per slice, whatever a step takes of them: two a level for `mbir` (one in the last),
`ode_steps` a level for `daps`, two for every denoising of a complex slice; where the network is differentiated (PiGDM,
DPS), forward and backward pass are one, and each further backward pass of it is one (`mm`: four a step). The overhead
is the time beside the network, in percent of the time in it; calls that are differentiated, whose backward pass lies
elsewhere, count as long as the same take outside the solver.
"""

import argparse
import time
from collections import defaultdict
from dataclasses import replace
from itertools import product

import numpy as np
from _data import subjects
from _solving import Job, Run, jobs, line, measured, run

from invdiff.configure import tuned
from invdiff.coupling import TVz
from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.operators import OPERATORS
from invdiff.priors import load_prior
from invdiff.solvers import SOLVERS, make_solver, solver_class

MEASURED = {"ct-sparse": {"views": 30}, "inpaint": {}, "blur": {}, "sr": {}, "mri": {}}
USUAL = ["ct-sparse", "inpaint", "mri"]  # one of each family: half an hour on two cores
WITH_PRIOR = [name for name in SOLVERS if solver_class(name).needs_prior]
MBIR_LEVELS = 2000  # published; two network calls each
MORE_CG = 20  # iterations a level, beside the published one
SHORT = 20  # steps of dds: 0.6 dB below 50 on the validation subject (30 views, 128 x 128), in 0.42 of their time


def matrix(args: argparse.Namespace, prior) -> None:
    best: dict[str, dict[int, tuple[float, str]]] = defaultdict(dict)
    for op in args.operators:
        todo = jobs(op, MEASURED[op], args.split, args.slices, args.size, prior)
        names = ", ".join(f"{len(j.problem.y)} of {j.subject}" for j in todo)
        print(f"\n{op} {MEASURED[op] or ''}: {names}")
        print(f"  {'':22} {'PSNR':>9} {'SSIM':>6} {'per slice':>10} {'':10} overhead")
        for name in (OPERATORS[op].baseline, "tv"):
            print(line(f"{name} (no prior)", run(name, todo, None)), flush=True)
        for name in args.solvers:
            for budget in args.budgets:
                found = run(name, todo, budget)
                print(line(f"{name}, {budget}", found), flush=True)
                if found is None:
                    break
                value = np.nan_to_num(found.figures()["psnr"], nan=-np.inf)
                best[op][budget] = max(best[op].get(budget, (-np.inf, "")), (float(value), name))
    print("\nbest solver of each operator, by evaluations per slice")
    for op, row in best.items():
        print(f"  {op:12} " + "   ".join(f"{b}: {name} {value:.2f} dB" for b, (value, name) in row.items()))


def mbir(args: argparse.Namespace, prior) -> None:
    """DiffusionMBIR in full, with one CG iteration a level as published and with many, and what the 3D solvers of
    today give in a small part of its time, on neighbours."""
    options = {"views": args.views}
    todo = [measured("ct-sparse", options, subjects(args.split)[0], args.slices, args.size, prior, neighbours=True)]
    shape = todo[0].problem.image_shape
    print(f"ct-sparse {options}, {shape[0]} neighbouring slices of {shape[2]} x {shape[3]}, {todo[0].subject}")
    plans = {
        "dds, tv-z": ("dds", None, {"coupling": TVz()}),
        f"dds, tv-z, {SHORT} steps": ("dds", SHORT, {"coupling": TVz()}),
        "pnp, tv-z": ("pnp", None, {"coupling": TVz()}),
        f"mbir, {args.levels} levels": ("mbir", args.levels, {"cg_iterations": 1}),
        f"mbir, {args.levels} x {MORE_CG} CG": ("mbir", args.levels, {"cg_iterations": MORE_CG}),
    }
    found: dict[str, Run] = {}
    for title, (name, steps, given) in plans.items():
        found[title] = run(name, todo, None, steps, **given)
        print(line(title, found[title]), flush=True)
    for slow, title in product(list(plans)[-2:], list(plans)[:-2]):
        a, b = found[title].figures(), found[slow].figures()
        print(
            f"{title} over {slow}: {a['psnr'] - b['psnr']:+.2f} dB in 1/{b['seconds'] / a['seconds']:.0f} of its time"
        )


def overhead(args: argparse.Namespace, prior) -> None:
    """What a run of the default length spends beside the network, from its start and some of its steps."""
    for op in args.operators:
        job = measured(op, MEASURED[op], subjects(args.split)[0], args.slices, args.size, prior)
        print(f"\n{op} {MEASURED[op] or ''}: {args.slices} slices of {args.size} x {args.size}, {job.subject}")
        for name in args.solvers:
            if (found := shares(name, job, args.timed)) is not None:
                print(
                    "  {:8} {:6.1f} % beside the network, of this {:.1f} % its start".format(name, *found), flush=True
                )


def shares(name: str, job: Job, timed: int) -> tuple[float, float] | None:
    """Percent of the time in the network that a run and its start take besides, from the start and ``timed`` steps in
    the middle of the schedule; None where the solver does not fit."""
    solver = make_solver(name, **tuned(job.case.measurement.operator, name)[0])
    try:
        solver.require(job.problem)
    except UsageError:
        return None
    sigmas, rng = solver.sigmas(solver.default_steps, job.problem, job.prior), Draws(0, job.case.indices)
    job.counted.reset()
    begun = time.perf_counter()
    state = solver.init(job.problem, job.prior, sigmas, rng)
    start = time.perf_counter() - begun - job.counted.plain_seconds
    middle = len(sigmas) // 2
    level = sigmas[middle - 2] / sigmas[0]
    state = replace(state, x=state.x0 + level * (state.x - state.x0))  # the start with the noise of this level
    for k in range(middle - 2, middle + timed):  # the first two are not timed: no run comes to this state
        if k == middle:
            job.counted.reset()
            begun = time.perf_counter()
        state = solver.step(job.problem, job.prior, replace(state, step=k), sigmas[k], sigmas[k + 1], rng)
    spent = time.perf_counter() - begun
    bare = job.counted.bare(job.problem.image_shape[-2:])
    beside, network = (spent - bare) / timed * (len(sigmas) - 1), bare / timed * (len(sigmas) - 1)
    return 100 * (start + beside) / network, 100 * start / network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test")
    parser.add_argument("--operators", nargs="+", choices=list(MEASURED), default=USUAL)
    parser.add_argument("--solvers", nargs="+", choices=WITH_PRIOR, default=WITH_PRIOR)
    parser.add_argument("--budgets", nargs="+", type=int, default=[20, 50, 100], help="network evaluations per slice")
    parser.add_argument(
        "--slices", type=int, help="in all, default 4; of one subject with --mbir (8) and --overhead (32)"
    )
    parser.add_argument("--size", type=int, help="pixels of a side, default 128; with --mbir 64, with --overhead 256")
    parser.add_argument("--mbir", action="store_true", help="the second comparison instead of the first")
    parser.add_argument("--overhead", action="store_true", help="the time beside the network instead")
    parser.add_argument("--timed", type=int, default=4, help="steps timed with --overhead")
    parser.add_argument("--levels", type=int, default=MBIR_LEVELS, help="of mbir")
    parser.add_argument("--views", type=int, default=20, help="of the scan with --mbir")
    args = parser.parse_args()
    task, slices, size = (mbir, 8, 64) if args.mbir else (overhead, 32, 256) if args.overhead else (matrix, 4, 128)
    args.slices, args.size = args.slices or slices, args.size or size
    task(args, load_prior("embedded"))


if __name__ == "__main__":
    main()
