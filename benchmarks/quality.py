"""Quality of every solver on subjects that no prior was trained on, one command, one run.

    python benchmarks/quality.py                 the test split, every setting
    python benchmarks/quality.py --split validation --slices 6 --solvers fbp tv pnp
    python benchmarks/quality.py --settings "30 views" --solvers pnp pnp-tv pnp-bm3d unet --unet DIR

CT subjects are scanned, MR subjects sampled in k-space, both are made four times coarser, each with the noise of
``invdiff reconstruct --simulate``. Slices, evenly spaced, are resampled so that their longer side has 256 pixels. TV is
printed twice: with its own default weight, and with the weight that is best for that slice set in hindsight (oracle),
which no user can know. ``pnp-tv`` and ``pnp-bm3d`` are ``pnp`` with deepinv's classical denoisers in the place of the
prior (``_classical.py``). ``unet`` is a network trained to clean the FBP of one setting (``opponents.py``); it has no
row in the others, as ``fbp`` has none outside CT.
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _classical import OPTIONS, classical
from _data import subjects
from _solving import PREFIXES, Job, measured, seeing
from opponents import Trained, load_trained

from invdiff.configure import tuned
from invdiff.draws import Draws
from invdiff.errors import InvdiffError, UsageError
from invdiff.metrics import evaluate
from invdiff.operators import OPERATORS
from invdiff.priors import load_prior
from invdiff.priors.base import Prior
from invdiff.solvers import make_solver
from invdiff.solvers.base import iterate
from invdiff.solvers.residual import strength
from invdiff.solvers.tv import WEIGHT

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "30 views": ("ct-sparse", {"views": 30}),
    "60 views": ("ct-sparse", {"views": 60}),
    "90 degrees": ("ct-limited", {"arc": 90.0, "views": 90}),
    "MRI 4x": ("mri", {}),
    "SR 4x": ("sr", {"factor": 4}),
    "SR 4x, averages": ("sr", {"factor": 4, "filter": "average"}),
}
SIZE = 256
ORACLE_FACTORS = (0.4, 2.0)
OPPONENTS = ("tv", "tv*", *OPTIONS, "unet")


class Found(NamedTuple):
    """Estimate ``(n, H, W)`` in the units of the truth, seconds, network calls per slice, duality gap, chi-squared, a
    remark."""

    estimate: np.ndarray
    seconds: float
    calls: float
    gap: float | None
    chi2: float
    note: str = ""


def run(name: str, job: Job, prior: Prior, steps: int | None, **options) -> Found:
    """A solver with the options of the command.

    Raises:
        UsageError: it does not fit the operator.
    """
    problem = job.problem
    suited, suited_steps = tuned(job.case.measurement.operator, name)
    solver, steps = make_solver(name, **(suited | options)), steps or suited_steps
    solver.require(problem)
    own = seeing(prior, problem) if solver.needs_prior else prior
    before, start = prior.calls, time.perf_counter()
    sigmas = solver.sigmas(steps or solver.default_steps, problem, own if solver.needs_prior else None)
    state = deque(iterate(solver, problem, own, sigmas, Draws(0, job.case.indices)), maxlen=1).pop()
    seconds = time.perf_counter() - start
    gap = float(state.memory["gap"].max()) if "gap" in state.memory else None
    calls = (prior.calls - before) / len(problem.y)
    return Found(job.case.picture(state.x0[0].numpy()), seconds, calls, gap, problem.chi_squared(state.x0))


def run_trained(trained: Trained, job: Job) -> Found:
    """The supervised network."""
    start = time.perf_counter()
    image = trained.image(job.problem)
    seconds = time.perf_counter() - start
    note = f"trained for {trained.core_minutes:.0f} core-minutes, {trained.steps} steps"
    return Found(job.case.picture(image[0].numpy()), seconds, 1.0, None, job.problem.chi_squared(image), note)


def estimates(job: Job, setting: str, args, prior: Prior) -> Iterator[tuple[str, dict[str, Any], Found]]:
    """Every solver that was asked for and can run, with the options that differ from its own."""
    for name in args.solvers:
        try:
            if name == "unet":
                if args.trained.fits(*SETTINGS[setting]):
                    yield name, {}, run_trained(args.trained, job)
            elif name in OPTIONS:
                denoiser = classical(name)
                if denoiser is None:
                    print(f"  {name}: {OPTIONS[name].package} is not installed", flush=True)
                    continue
                yield name, {}, run("pnp", job, denoiser, None, **OPTIONS[name].options)
            else:
                yield name, {}, run(name, job, prior, args.dps_steps if name == "dps" else None)
        except UsageError:  # FBP where there are no views
            continue
    if "tv" in args.solvers and not args.no_oracle:
        weight = WEIGHT * float(strength(job.problem, coupled=False).sqrt().mean())
        for factor in ORACLE_FACTORS:
            yield "tv", {"weight": weight * factor}, run("tv", job, prior, None, weight=weight * factor)


def measure(path: Path, setting: str, args, prior: Prior) -> list[dict]:
    """Rows of one subject."""
    job = measured(*SETTINGS[setting], path, args.slices, SIZE, prior, square=False)
    truth, rows = job.case.truth, []
    bare = bare_network_seconds(prior, job.problem)
    for name, extra, found in estimates(job, setting, args, prior):
        figures, own = evaluate(found.estimate, truth, job.case.modality), found.calls and name not in OPPONENTS
        row = {"subject": job.subject, "setting": setting, "solver": name, "options": extra}
        row |= {k: figures.get(k, float("nan")) for k in ("psnr_db", "ssim", "rmse_body_hu")}
        row |= {"chi2": found.chi2, "seconds": found.seconds / len(truth), "nfe": found.calls, "gap": found.gap}
        row |= {"overhead": found.seconds / (found.calls * len(truth) * bare) if own else None, "note": found.note}
        rows.append(row)
        print(f"  {row['subject']:26} {setting:15} {name:8} {extra or ''} {row['psnr_db']:.2f} dB", flush=True)
    tv = [r for r in rows if r["solver"] == "tv"]
    if len(tv) > 1:
        rows.append({**max(tv, key=lambda r: r["psnr_db"]), "solver": "tv*"})
    return [r for r in rows if not r["options"] or r["solver"] == "tv*"]


def bare_network_seconds(prior, problem) -> float:
    """Seconds of one network call per slice, outside any solver."""
    x = torch.zeros(len(problem.y), 1, *problem.image_shape[-2:])
    prior.denoise(x[:1], 0.1)
    calls, start = prior.calls, time.perf_counter()
    prior.denoise(x, 0.1)
    return (time.perf_counter() - start) / (prior.calls - calls)


def table(rows: list[dict]) -> None:
    columns = ("psnr_db", "ssim", "rmse_body_hu", "chi2", "seconds", "nfe")
    print("\nmean over subjects (worst subject in brackets); s and NFE per slice; PSNR of CT in -1000..1000 HU")
    figures = f"{'PSNR dB':>15} {'SSIM':>15} {'RMSE body HU':>16} {'chi2':>6} {'s':>7} {'NFE':>5} overhead"
    print(f"{'setting':15} {'solver':8} {figures}")
    for setting in dict.fromkeys(r["setting"] for r in rows):
        for name in dict.fromkeys(r["solver"] for r in rows):
            some = [r for r in rows if (r["setting"], r["solver"]) == (setting, name)]
            if not some:
                continue
            known = {c: [r[c] for r in some if np.isfinite(r[c])] or [np.nan] for c in columns}  # HU of CT alone
            mean = {c: np.mean(values) for c, values in known.items()}
            worst = {c: (max if c == "rmse_body_hu" else min)(known[c]) for c in columns[:3]}
            over = [r["overhead"] for r in some if r["overhead"]]
            print(
                f"{setting:15} {name:8} {mean['psnr_db']:7.2f} ({worst['psnr_db']:5.2f}) {mean['ssim']:7.3f} "
                f"({worst['ssim']:.3f}) {mean['rmse_body_hu']:8.1f} ({worst['rmse_body_hu']:5.1f}) {mean['chi2']:6.2f} "
                f"{mean['seconds']:7.1f} {mean['nfe']:5.0f} {np.mean(over) if over else float('nan'):.2f}"
                f"{'  ' + some[0]['note'] if some[0]['note'] else ''}"
            )
    print("tv: default weight; tv*: best weight in hindsight; overhead: solver time / (network calls x bare time)")
    for setting in dict.fromkeys(r["setting"] for r in rows):
        for opponent in OPPONENTS:
            pair = {(r["subject"], r["solver"]): r["psnr_db"] for r in rows if r["setting"] == setting}
            gains = [pair[s, "pnp"] - pair[s, opponent] for s, n in pair if n == "pnp" and (s, opponent) in pair]
            if gains:
                worst = f"worst subject {min(gains):+.2f} dB"
                print(f"{setting}: pnp over {opponent}: mean {np.mean(gains):+.2f} dB, {worst}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test")
    parser.add_argument("--slices", type=int, default=4, help="slices per subject")
    parser.add_argument("--solvers", nargs="+", default=["fbp", "tv", "pnp", "dds", "dps"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--prior", default="embedded")
    parser.add_argument("--dps-steps", type=int, default=100)
    parser.add_argument("--no-oracle", action="store_true")
    parser.add_argument("--unet", type=Path, help="folder of 'opponents.py train', for the solver unet")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    if "unet" in args.solvers and args.unet is None:
        parser.error("solver unet needs --unet DIR, a folder of 'opponents.py train'")
    try:
        args.trained = load_trained(args.unet) if args.unet else None
        prior = load_prior(args.prior)
    except InvdiffError as error:
        raise SystemExit(f"quality.py: {error}") from None
    rows = []
    for setting in args.settings:
        for prefix in PREFIXES[OPERATORS[SETTINGS[setting][0]].family]:
            for path in subjects(args.split, prefix):
                rows += measure(path, setting, args, prior)
    table(rows)
    if args.json:
        with open(args.json, "w") as out:
            json.dump(rows, out, indent=1)


if __name__ == "__main__":
    main()
