"""Every operator against deepinv's counterpart, in one run: exactness, time, memory, share of the memory's bandwidth.

    python benchmarks/operators.py [--slices 32] [--size 256] [--device cuda] [--only blur ct]

Ours and deepinv's take turns on the same images; times are medians of forward + adjoint, ratios deepinv / invdiff. The
bandwidth is that of a copy of the same number of bytes in the same run; an operator has to read its argument and write
its result, no less.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invdiff.operator import LinearOperator
from invdiff.operators import build
from invdiff.operators.mri import CartesianMRI, birdcage_maps, mri


class Row(NamedTuple):
    """An operator for slices of ``n`` x ``n``, and deepinv's physics; None without any."""

    name: str
    make: Callable[[int, int], LinearOperator]  # (slices, n)
    peer: Callable[[Any, Any, int], Any] | None = None  # (deepinv.physics, our operator, n)


def table(name: str, **options) -> Callable[[int, int], LinearOperator]:
    return lambda slices, n: build(name, (n, n), 1.0, **options)


def convolution(boundary: str) -> Callable:
    return lambda physics, op, n: physics.Blur(op.kernel.float()[None, None], padding=boundary)


def tomography(**options) -> Callable:
    return lambda physics, op, n: physics.Tomography(
        len(op.geometry.views_deg), n, circle=False, normalize=False, **options
    )


def fourier(physics, op: CartesianMRI, n: int):
    mask = op.mask.float().expand(1, 2, n, n)
    return physics.MRI(mask) if op.maps is None else physics.MultiCoilMRI(mask, op.maps[None])


def coils(slices: int, n: int) -> CartesianMRI:
    return CartesianMRI(mri((n, n), 1.0).mask, birdcage_maps((n, n), 8))


def downsampling(filter: str) -> Callable:
    """By 2: deepinv's own kernel, or the mean of a block, in the middle of an odd kernel that it can transpose."""
    mean = torch.zeros(1, 1, 3, 3)
    mean[..., :2, :2] = 0.25
    kernel = mean if filter == "average" else filter
    return lambda physics, op, n: physics.Downsampling((1, n, n), kernel, 2, padding="circular")


ROWS = [
    *(
        Row(f"blur {kernel}, {boundary}", table("blur", kernel=kernel, boundary=boundary), convolution(boundary))
        for kernel in ("gaussian:2", "motion:9:30")
        for boundary in ("circular", "reflect", "replicate")
    ),
    Row("inpaint", table("inpaint"), lambda physics, op, n: physics.Inpainting((1, n, n), op.mask.float()[None, None])),
    Row("sr average", table("sr", filter="average"), downsampling("average")),
    Row("sr bicubic", table("sr", filter="bicubic"), downsampling("bicubic")),
    Row("sr through-plane", lambda slices, n: build("sr", (slices, n, n), 1.0, axis="through-plane")),
    Row("denoise", table("denoise"), lambda physics, op, n: physics.Denoising()),
    Row("ct parallel", table("ct-sparse", views=60), tomography()),
    Row("ct fan", table("ct-sparse", views=60, geometry="fan"), tomography(fan_beam=True)),
    Row("ct cone", lambda slices, n: build("ct-sparse", (slices, n, n), 1.0, views=60, geometry="cone")),
    Row("mri", lambda slices, n: mri((n, n), 1.0), fourier),
    Row("mri, 8 coils", coils, fourier),
    Row("mri radial", table("mri-radial", spokes=64)),
]


class Figures(NamedTuple):
    """Of one pair: dot-test error, median seconds of A and of A^T, growth of peak memory in MB."""

    dot: float
    forward: float
    adjoint: float
    memory: float


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def status_mb(key: str) -> float:
    with open("/proc/self/status") as f:
        return next(float(line.split()[1]) for line in f if line.startswith(key)) / 1024


def peak_mb(call: Callable, device: torch.device) -> float:
    """Memory that ``call`` holds at its peak besides what was there, its result included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts anew
    before = status_mb("VmRSS")
    call()
    return status_mb("VmHWM") - before


def dot_error(x: Tensor, ax: Tensor, y: Tensor, aty: Tensor) -> float:
    """|<Ax, y> - <x, A'y>| / (|Ax| |y|), Gaussian vectors, sums in float64."""
    ax, y = ax.double(), y.double()
    return float(((ax * y).sum() - (x.double() * aty.double()).sum()).abs() / (ax.norm() * y.norm()))


def measure(pairs: list[tuple], x: Tensor, runs: int) -> list[Figures]:
    """Figures of pairs (A, A^T, y) that take turns on the same images, and turns at being first: what runs second finds
    the images in the cache."""
    device, found = x.device, []
    for forward, adjoint, y in pairs:
        dot = dot_error(x, forward(x), y, adjoint(y))  # and warm
        found.append((dot, max(peak_mb(lambda f=forward: f(x), device), peak_mb(lambda f=adjoint, y=y: f(y), device))))
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in pairs]
    for k in range(runs):
        for (forward, adjoint, y), (there, back) in list(zip(pairs, times, strict=True))[:: 1 - 2 * (k % 2)]:
            there.append(seconds(lambda f=forward: f(x), device))
            back.append(seconds(lambda f=adjoint, y=y: f(y), device))
    return [
        Figures(dot, statistics.median(there), statistics.median(back), memory)
        for (dot, memory), (there, back) in zip(found, times, strict=True)
    ]


def copy_seconds(count: int, device: torch.device, runs: int) -> float:
    """Of a copy that moves ``count`` bytes, read and written together."""
    source = torch.ones(max(1, count // 8), device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(runs))


def report(row: Row, args: argparse.Namespace) -> None:
    device, physics = torch.device(args.device), None
    op = row.make(args.slices, args.size).to(device)
    g = torch.Generator().manual_seed(0)
    slices = (args.slices,) if op.slicewise else ()
    x = torch.randn(*slices, *op.in_shape, generator=g).to(device)
    y = torch.randn(*slices, *op.out_shape, generator=g).to(device)
    pairs: list[tuple] = [(op, op.adjoint, y)]
    if row.peer is not None:
        from deepinv import physics

        theirs = row.peer(physics, op.to("cpu"), args.size).to(device)
        pairs.append((theirs.A, theirs.A_adjoint, torch.randn(theirs.A(x).shape, generator=g).to(device)))
    ours, *peers = measure(pairs, x, args.runs)
    floor = copy_seconds(4 * (x.numel() + y.numel()), device, 2 * args.runs)
    line = (
        f"{row.name:24} dot {ours.dot:7.1e}  A {1e3 * ours.forward:7.1f}  A' {1e3 * ours.adjoint:7.1f} ms  "
        f"+{ours.memory:4.0f} MB  bandwidth {100 * floor / ours.forward:3.0f} / {100 * floor / ours.adjoint:3.0f} %"
    )
    for p in peers:
        ratios = f"{p.forward / ours.forward:6.1f} / {p.adjoint / ours.adjoint:6.1f}"
        line += f"  deepinv: {ratios} x as long, dot {p.dot:7.1e}, +{p.memory:5.0f} MB"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=[""], metavar="NAME", help="rows whose name begins so")
    args = parser.parse_args()
    print(f"{args.slices} slices of {args.size}^2, float32, {args.device}, {torch.get_num_threads()} threads")
    with torch.no_grad():
        for row in ROWS:
            if row.name.startswith(tuple(args.only)):
                report(row, args)


if __name__ == "__main__":
    main()
