"""What a blur is made of: lengths for FFTs, and small convolutions on the CPU without FFTs."""

from collections.abc import Callable, Sequence

import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn import functional

LANES = 16
"""Slices in one image, as its channels, filled up with zeros: the bits of a slice depend neither on how many there are
nor on its place.

They fill the lanes of the processor. 32 slices of 256 x 256 with 63 weights, one core: 6 ms, by FFT 24 ms; with 4 lanes
18 ms, with 8 8 ms, and 32 are no faster.
"""

AT_ONCE = {1: 2 * LANES, 2: LANES}
"""Slices in one call, by the number of passes: 32 save a tenth of the time of one pass, two leave the cache."""

MOST_TAPS = 150
"""Weights per pixel, in one pass or two, up to which this is faster than an FFT."""


def fast_length(size: int) -> int:
    """A length for the FFT, ``size`` or longer: multiples of 8 take half the time per pixel of 270 = 2 * 3^3 * 5."""
    return 8 * next_fast_len(-(-size // 8)) if size > 64 else next_fast_len(size, real=True)


def factors(kernel: Tensor) -> tuple[Tensor, ...] | None:
    """Kernels, applied one after the other, that make up a 2D kernel; None where an FFT is faster.

    Args:
        kernel: ``(k, l)``, float64.

    Returns:
        The kernel alone, or a column and a row where their product is the kernel; float32.
    """
    u, s, v = torch.linalg.svd(kernel)
    split = len(s) > 1 and bool(s[1] <= 1e-12 * s[0])
    parts = (u[:, :1] * s[0], v[:1]) if split else (kernel,)
    return tuple(p.float() for p in parts) if sum(p.numel() for p in parts) <= MOST_TAPS else None


def available(x: Tensor) -> bool:
    """Whether torch has a fast direct convolution for such tensors."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()


def correlate(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """``y[i] = sum_d h[d] x[i + d]`` where h fits: ``(n, LANES, H, W)`` to ``(n, LANES, H - k + 1, W - l + 1)``."""
    for h in parts:
        x = functional.conv2d(x, h.expand(LANES, 1, *h.shape).contiguous(), groups=LANES)
    return x


def by_lanes(f: Callable[[Tensor], Tensor], x: Tensor, at_once: int) -> Tensor:
    """``f``, a map of ``(n, LANES, H, W)``, on the planes of x ``(..., H, W)``, ``at_once`` at a time."""
    planes = x.reshape(-1, *x.shape[-2:])
    if not len(planes):
        return x.clone()
    out = []
    for block in planes.split(at_once):
        missing = -len(block) % LANES
        full = functional.pad(block, (0, 0, 0, 0, 0, missing)) if missing else block
        out.append(f(full.unflatten(0, (-1, LANES))).flatten(0, 1)[: len(block)])
    whole = out[0] if len(out) == 1 else torch.cat(out)
    return whole.reshape(*x.shape[:-2], *whole.shape[-2:])
