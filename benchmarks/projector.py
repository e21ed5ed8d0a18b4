"""The CT pair against deepinv's Tomography and against ASTRA called slice by slice, in one run.

    python benchmarks/projector.py [--slices 64] [--size 256] [--views 60]

Prints ratios (peer / invdiff), the dot-test error of every pair, and the growth of peak memory.
"""

import argparse
import resource
import time

import astra
import numpy as np
import torch

from invdiff.operators.scans import ct_sparse


def best_of(call, runs: int) -> float:
    """Smallest wall time of ``runs`` calls after one that is not counted."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def dot_error(forward, adjoint, x: torch.Tensor, y: torch.Tensor) -> float:
    """|<Ax, y> - <x, A'y>| / (|Ax| |y|), Gaussian vectors, sums in float64."""
    ax, aty = forward(x).double(), adjoint(y).double()
    return float(((ax * y.double()).sum() - (x.double() * aty).sum()).abs() / (ax.norm() * y.double().norm()))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(name: str, forward, adjoint, x, y, runs: int, ours: tuple[float, float] | None) -> tuple[float, float]:
    before = peak_mb()
    f, a = best_of(lambda: forward(x), runs), best_of(lambda: adjoint(y), runs)
    ratio = "" if ours is None else f"  ratio {f / ours[0]:6.1f} / {a / ours[1]:6.1f}, pair {(f + a) / sum(ours):6.1f}x"
    print(
        f"{name:24} forward {1e3 * f:8.1f} ms  adjoint {1e3 * a:8.1f} ms  dot {dot_error(forward, adjoint, x, y):.1e}  "
        f"+{peak_mb() - before:6.0f} MB{ratio}",
        flush=True,
    )
    return f, a


def astra_pair(size: int, angles: np.ndarray, count: int, kind: str):
    """ASTRA's CPU projector of one slice, looped over the stack."""
    volume = astra.create_vol_geom(size, size)
    projection = astra.create_proj_geom("parallel", 1.0, count, angles)
    projector = astra.create_projector(kind, projection, volume)

    def loop(call, stack, shape):
        out = np.empty((len(stack), *shape), np.float32)
        for image, target in zip(stack.numpy()[:, 0], out, strict=True):
            call(projector, image, out=target)
        return torch.from_numpy(out)[:, None]

    views = (len(angles), count)
    forward = lambda x: loop(astra.projector.direct_FP, x, views)  # noqa: E731
    adjoint = lambda y: loop(astra.projector.direct_BP, y, (size, size))  # noqa: E731
    return forward, adjoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--views", type=int, default=60)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    print(f"{args.slices} slices of {args.size}^2, {args.views} views, {torch.get_num_threads()} threads")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(args.slices, 1, args.size, args.size, generator=g)
    start, before = time.perf_counter(), peak_mb()
    operator = ct_sparse((args.size, args.size), 1.0, views=args.views)
    operator.adjoint(operator(x[:1]))
    print(f"invdiff: matrix and transpose built in {time.perf_counter() - start:.1f} s, +{peak_mb() - before:.0f} MB")
    y = torch.randn(args.slices, *operator.out_shape, generator=g)
    ours = report("invdiff", operator, operator.adjoint, x, y, args.runs, None)
    count = operator.geometry.detector_count
    for kind in ("line", "linear"):
        pair = astra_pair(args.size, np.deg2rad(operator.geometry.views_deg), count, kind)
        report(f"ASTRA {kind}, per slice", *pair, x, y, 1, ours)
    import deepinv

    physics = deepinv.physics.Tomography(
        angles=args.views, img_width=args.size, circle=False, normalize=False, device="cpu"
    )
    yd = torch.randn(physics.A(x[:1]).shape[1:], generator=g).expand(args.slices, -1, -1, -1).contiguous()
    with torch.no_grad():
        report("deepinv Tomography", physics.A, physics.A_adjoint, x, yd, 1, ours)


if __name__ == "__main__":
    main()
