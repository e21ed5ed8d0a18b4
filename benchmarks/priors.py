"""Denoising of held-out subjects by the prior and by classical denoisers, and what a call of the prior costs.

    python benchmarks/priors.py                  2 slices of every subject of the test split at 128^2 and 256^2
    python benchmarks/priors.py --prior DIR --split validation --sizes 256
    python benchmarks/priors.py --seconds        only the time of a call, at 128^2, 256^2 and 512^2

Slices are resampled whole to the side that is asked for. Every method is told the noise level; TV and non-local means
are those of scikit-image, BM3D that of the bm3d package; TV, TGV and wavelets (with ptwt) marked dw. are deepinv's, at
the threshold whose residual comes closest to the noise. PSNR in dB for values in [-1, 1]. Times are medians, one slice
a call, in float32 and by autocast to bfloat16, which only processors with that arithmetic gain from.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from _data import subjects
from _solving import small_stack
from torch import Tensor

from invdiff.intensity import CT_MAP, magnitude_map
from invdiff.priors import load_prior
from invdiff.priors.base import Prior
from invdiff.priors.validate import SIGMAS, classical_denoisers, psnr

Method = Callable[[np.ndarray, float], np.ndarray]  # of a noisy slice in [-1, 1] and its noise level


def theirs() -> dict[str, Method]:
    """deepinv's variational and wavelet denoisers, each at the threshold whose residual is most like the noise."""
    from deepinv.models import TGVDenoiser, TVDenoiser, WaveletDenoiser

    def best(model, factors: tuple[float, ...]) -> Method:
        def denoise(noisy: np.ndarray, sigma: float) -> np.ndarray:
            x = torch.from_numpy(noisy).float()[None, None]
            found = [model(x, f * sigma)[0, 0].double().numpy() for f in factors]
            return min(found, key=lambda d: abs(float(np.std(noisy - d)) - sigma))

        return denoise

    models = {"dw. TV": (TVDenoiser(n_it_max=300), (0.6, 0.9, 1.3)), "dw. TGV": (TGVDenoiser(n_it_max=200), (0.6, 1.0))}
    found = {name: best(model, factors) for name, (model, factors) in models.items()}
    if find_spec("ptwt"):  # a package of its own
        found["dw. wavelet"] = best(WaveletDenoiser(level=3, wv="db8", non_linearity="soft"), (0.7, 1.0, 1.5))
    return found


def slices_of(path, count: int, size: int) -> np.ndarray:
    """``(count, size, size)`` in the prior's range: -1000 .. 1000 HU, or 0 .. the 99.5th percentile, as -1 .. 1."""
    stack = small_stack(path, count, size)
    data = stack.data.transpose(2, 1, 0).astype(np.float32)
    scale = CT_MAP if stack.modality == "CT" else magnitude_map(data)
    return np.clip(scale.invert(data), -1, 1).astype(np.float32)


def table(args: argparse.Namespace, prior: Prior) -> None:
    methods = classical_denoisers() | theirs()
    print(f"{args.split} split, {args.slices} slices each; {prior.info.name}, sha256 {(prior.info.sha256 or '')[:12]}")
    print(f"  {'':22} {'side':>4} {'sigma':>5} " + " ".join(f"{m:>11}" for m in ("noisy", "prior", *methods)))
    sums: dict[tuple[int, float], list[list[float]]] = {}
    for size in args.sizes:
        for path in subjects(args.split, "ct_") + subjects(args.split, "mr_"):
            truth = slices_of(path, args.slices, size)
            for sigma in args.sigmas:
                row = figures(truth, sigma, prior, methods)
                sums.setdefault((size, sigma), []).append(row)
                print(
                    f"  {path.name.split('.')[0]:22} {size:4} {sigma:5.2f} " + " ".join(f"{v:11.2f}" for v in row),
                    flush=True,
                )
    print("mean over subjects, and on how many of them the prior is ahead of every other")
    for (size, sigma), rows in sums.items():
        ahead = sum(row[1] > max(row[2:]) for row in rows)
        mean = " ".join(f"{v:11.2f}" for v in np.mean(rows, 0))
        print(f"  {'':22} {size:4} {sigma:5.2f} {mean}   {ahead} of {len(rows)}")


def figures(truth: np.ndarray, sigma: float, prior: Prior, methods: dict[str, Method]) -> list[float]:
    """PSNR of the noisy slices, of the prior and of every method."""
    noise = np.random.default_rng(0).standard_normal(truth.shape).astype(np.float32)
    noisy = truth + sigma * noise
    with torch.no_grad():
        ours = prior.denoise(torch.from_numpy(noisy)[:, None], sigma)[:, 0].numpy()
    others = [np.stack([method(n.astype(np.float64), sigma) for n in noisy]) for method in methods.values()]
    return [psnr(estimate, truth) for estimate in (noisy, ours, *others)]


def seconds(args: argparse.Namespace, prior: Prior) -> None:
    print(f"seconds of a slice, {torch.get_num_threads()} threads (float32, bfloat16 by autocast)")
    for size in (128, 256, 512):
        x, spent = torch.zeros(1, 1, size, size), ([], [])
        for _ in range(args.runs):
            for half, times in enumerate(spent):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bool(half)):
                    times.append(timed(lambda x=x: prior.denoise(x, 0.1)))
        print(f"  {size:4}  " + "  ".join(f"{statistics.median(times):7.3f}" for times in spent), flush=True)


def timed(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="embedded")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--sigmas", nargs="+", type=float, default=list(SIGMAS))
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", action="store_true", help="only the time of a call")
    args = parser.parse_args()
    prior = load_prior(args.prior)
    if not args.seconds:
        table(args, prior)
    seconds(args, prior)


if __name__ == "__main__":
    main()
