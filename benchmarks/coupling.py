"""What slice coupling changes: 2D and 3D solvers on neighbouring slices of CT subjects, one command, one run.

    python benchmarks/coupling.py [--split test] [--slices 12] [--views 30]

Prints the PSNR of the stack, and the agreement across slices: the RMS error of the difference between neighbouring
slices inside the body, which is what flicker in coronal and sagittal views is.
"""

import argparse
from collections import deque

import numpy as np
import torch
from _data import subjects

from invdiff.coupling import TVz
from invdiff.draws import Draws
from invdiff.intensity import MU_WATER_PER_MM
from invdiff.metrics import body_mask, psnr, ssim
from invdiff.operators import build
from invdiff.priors import load_prior
from invdiff.problem import whiten
from invdiff.simulate import as_tensors, simulate_ct
from invdiff.solvers import make_solver
from invdiff.solvers.base import iterate
from invdiff.volume import load_volume, to_slices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test")
    parser.add_argument("--slices", type=int, default=12)
    parser.add_argument("--views", type=int, default=30)
    parser.add_argument("--weights", type=float, nargs="+", default=[TVz().weight])
    parser.add_argument("--no-tv", action="store_true")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    prior = load_prior("embedded")
    for path in subjects(args.split):
        stack = to_slices(load_volume(path, modality="CT"), allow_shear=True)
        first = max(0, len(stack.data) // 2 - args.slices // 2)
        truth = np.clip(stack.data[first : first + args.slices], -1000, 3071)
        operator = build("ct-sparse", truth.shape[1:], stack.pixel_mm, views=args.views)
        y, variance = as_tensors(simulate_ct(truth, operator))
        spacing = (stack.spacing_mm, *stack.pixel_mm)
        mu = MU_WATER_PER_MM
        problem = whiten(y, operator, variance, scale=mu, shift=mu, model_error=0.0015, spacing=spacing)
        print(f"{path.name.split('.')[0]}: {truth.shape}, spacing {spacing[0]:.2f} mm, {args.views} views")
        jobs = [("pnp 2D", "pnp", {})] + [(f"pnp tv-z {w:g}", "pnp", {"coupling": TVz(weight=w)}) for w in args.weights]
        if not args.no_tv:
            jobs += [("tv 2D", "tv", {}), ("tv 3D", "tv", {"volumetric": True})]
        for title, name, options in jobs:
            solver = make_solver(name, **options)
            steps = args.steps if args.steps and solver.needs_prior else solver.default_steps
            sigmas = solver.sigmas(steps, problem, prior if solver.needs_prior else None)
            states = iterate(solver, problem, prior, sigmas, Draws(0, tuple(range(len(truth)))))
            state = deque(states, maxlen=1).pop()
            report(title, 1000 * state.x0[0, :, 0].numpy(), truth)


def report(title: str, estimate: np.ndarray, truth: np.ndarray) -> None:
    inside = body_mask(truth)
    inside = inside[1:] & inside[:-1]
    a, b = (np.diff(np.clip(v, -1000, 1000), axis=0) for v in (estimate, truth))
    error = np.sqrt(np.mean((a - b)[inside] ** 2))
    coronal = ssim(*(v.transpose(1, 0, 2)[40:-40:8] for v in (estimate, truth)))
    print(
        f"  {title:16} PSNR {psnr(estimate, truth):6.2f} dB   z-difference error {error:6.1f} HU   "
        f"coronal SSIM {coronal:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
