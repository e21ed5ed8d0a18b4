"""What the tests of samplers share: short lists of samplers, exact flows, and a walk along a schedule."""

import math
from itertools import pairwise

import torch

from invdiff.draws import Draws

F64 = torch.float64


WEIGHTS, CENTRES, SPREADS = (0.3, 0.7), (-0.6, 0.5), (0.15, 0.25)


NONE = Draws(0, (0,))


def tensor(*values):
    """Values as images (1, 1, 1, rows, 2)."""
    return torch.tensor(values, dtype=F64).reshape(1, 1, 1, -1, 2)


def mixture(x, sigma):
    """E[x0 | x] where each pixel is one of two Gaussians."""
    v = [s * s + sigma * sigma for s in SPREADS]
    parts = list(zip(WEIGHTS, CENTRES, SPREADS, v, strict=True))
    share = torch.softmax(
        torch.stack([math.log(w) - 0.5 * math.log(u) - 0.5 * (x - c) ** 2 / u for w, c, _, u in parts]), 0
    )
    return sum(p * (c + s * s / u * (x - c)) for p, (_, c, s, u) in zip(share, parts, strict=True))


def walk(sampler, x, denoise, sigmas, rng=NONE, memory=None):
    memory = memory or {}
    for sigma, sigma_next in pairwise(sigmas):
        x, memory = sampler.step(x, denoise, sigma, sigma_next, memory, rng)
    return x, memory


# Published formulas in the variables of their papers, x_VP = alpha x; a_t, a_s: products of 1 - beta at both ends.
S, T, U = 1.3, 0.9, 1.8  # sigma, the next one, the one before


X = tensor(1.0, -0.7, 0.4, 2.0)
