"""The sums of :mod:`invdiff.operators.lines` on the CPU, compiled by numba: the same weights, many times faster."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from torch import Tensor

if TYPE_CHECKING:
    from invdiff.operators.lines import Lines


@njit(nogil=True, cache=True, error_model="numpy")
def _span(a: float, b: float, source: int, count: int) -> tuple[int, int]:
    """The r in [0, count) for which a r + b lies within one sample of a line of ``source`` samples; a > 0."""
    first, last = math.ceil((-1.0 - b) / a), math.floor((source - b) / a) + 1
    return int(min(max(first, 0), count)), int(min(max(last, 0), count))


@njit(nogil=True, cache=True, error_model="numpy")
def _sample(lines, place, t, affine, power, out, start, stop):
    """Rows start:stop of ``out`` ``(D, count)``; ``lines`` is ``(G, L, n)``, ``place`` and ``t`` are ``(D, G)``."""
    groups, across, n = lines.shape
    count = out.shape[1]
    line = np.zeros(n + 4, lines.dtype)
    for d in range(start, stop):
        total = out[d]
        for g in range(groups):
            p = place[d, g]
            if not -1.0 < p < across:
                continue
            a, b = affine[0] * t[d, g], affine[1] + affine[2] * t[d, g]
            low = int(p + 1.0) - 1
            weight = t[d, g] ** power
            far = lines.dtype.type(weight * (p - low)) if low + 1 < across else lines.dtype.type(0)
            near = lines.dtype.type(weight * (1.0 - (p - low))) if low >= 0 else lines.dtype.type(0)
            first, second = lines[g, max(low, 0)], lines[g, min(low + 1, across - 1)]
            for k in range(n):
                line[k + 1] = near * first[k] + far * second[k]
            begin, end = _span(a, b, n, count)
            for r in range(begin, end):
                z = a * r + (b + 1.0)
                i = np.int32(z)
                part = lines.dtype.type(z - i)
                total[r] += line[i] + part * (line[i + 1] - line[i])


@njit(nogil=True, cache=True, error_model="numpy")
def _spread(values, place, t, affine, power, out, start, stop):
    """Add to groups start:stop of ``out`` ``(G, L, n)``: the transpose of :func:`_sample`."""
    _, across, n = out.shape
    count = values.shape[1]
    here, next_ = np.zeros(n + 4, out.dtype), np.zeros(n + 4, out.dtype)
    for g in range(start, stop):
        for d in range(values.shape[0]):
            p = place[d, g]
            if not -1.0 < p < across:
                continue
            a, b = affine[0] * t[d, g], affine[1] + affine[2] * t[d, g]
            begin, end = _span(a, b, n, count)
            if begin >= end:
                continue
            lowest, highest = int(a * begin + (b + 1.0)), int(a * (end - 1) + (b + 1.0)) + 2
            here[lowest : highest + 1] = 0
            next_[lowest : highest + 1] = 0
            value = values[d]
            for r in range(begin, end):
                z = a * r + (b + 1.0)
                i = np.int32(z)
                part = out.dtype.type(z - i) * value[r]
                here[i] += value[r] - part
                next_[i + 1] += part
            low = int(p + 1.0) - 1
            weight = t[d, g] ** power
            far = out.dtype.type(weight * (p - low))
            near = out.dtype.type(weight * (1.0 - (p - low)))
            lowest, highest = max(lowest - 1, 0), min(highest, n)
            if low >= 0:
                target = out[g, low]
                for k in range(lowest, highest):
                    target[k] += near * (here[k + 1] + next_[k + 1])
            if low + 1 < across:
                target = out[g, low + 1]
                for k in range(lowest, highest):
                    target[k] += far * (here[k + 1] + next_[k + 1])


def _in_threads(kernel, items: int, arguments: tuple) -> None:
    """``kernel(*arguments, start, stop)`` over all items, split between the threads that torch may use.

    Each item is written by one call and in one order, so that the result does not depend on the split.
    """
    workers = max(1, min(torch.get_num_threads(), items))
    ends = [items * k // (4 * workers) for k in range(4 * workers + 1)]
    if workers == 1:
        kernel(*arguments, 0, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda k: kernel(*arguments, ends[k], ends[k + 1]), range(4 * workers)))


def sample(lines: "Lines", x: Tensor, place: Tensor, t: Tensor, out: Tensor) -> None:
    """As :meth:`invdiff.operators.lines.Torch.sample`."""
    arrays = (x.numpy(), place.numpy(), t.numpy(), lines.affine, lines.power, out.numpy())
    _in_threads(_sample, len(out), arrays)


def spread(lines: "Lines", y: Tensor, place: Tensor, t: Tensor, out: Tensor) -> None:
    """As :meth:`invdiff.operators.lines.Torch.spread`."""
    arrays = (y.numpy(), place.numpy(), t.numpy(), lines.affine, lines.power, out.numpy())
    _in_threads(_spread, len(out), arrays)
