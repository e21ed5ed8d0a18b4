"""Classical denoisers of deepinv in the place of the prior, for plug-and-play without a network.

The solver is ``pnp`` as it is, with its annealing and its data step; the denoiser is told ``strength`` times the noise
level. Strength and ``lam`` were chosen together on a slice of 128 x 128 of the validation subject, 30 views (FBP 27.6
dB, the embedded prior 34.6 with its defaults):

    pnp-tv     strength 1, lam 0.22: 31.4 dB; 0.7, 0.22: 31.7; 0.5, 0.1: 31.7; 0.5, 0.22: 31.9; 0.5, 1: 31.5;
               0.35, 0.5: 32.0; 0.35, 0.8: 31.9; 0.25, 0.22: 31.7; 0.25, 0.5: 32.0
    pnp-bm3d   strength 1, lam 0.22: 34.0 dB; 1, 0.1: 33.5; 1, 0.4: 33.9; 1, 1: 33.4; 0.8, 0.22: 33.9; 1.3, 0.22: 33.8
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from invdiff.priors.base import Prior, PriorInfo


class Classical(Prior):
    """A denoiser as a prior: ``denoise(x, sigma)`` slice by slice, each moved from [-1, 1] to [0, 1] and back.

    Args:
        name: for tables.
        denoiser: of ``(1, 1, H, W)`` in [0, 1] and a noise level in these units.
        strength: times the noise level is what it is told.
    """

    def __init__(self, name: str, denoiser: Callable[[Tensor, float], Tensor], strength: float):
        self.info = PriorInfo(name, sigma_min=1e-4, sigma_max=80.0, format="classical")
        self.denoiser, self.strength = denoiser, strength

    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        flat = x.reshape(-1, 1, 1, *x.shape[-2:])
        self.calls += len(flat)
        with torch.no_grad():
            found = [2 * self.denoiser((one + 1) / 2, self.strength * sigma / 2) - 1 for one in flat]
        return torch.stack(found).reshape(x.shape)


def tv() -> Callable[[Tensor, float], Tensor]:
    """argmin 1/2 |u - x|^2 + sigma TV(u), to a relative change of 1e-5 or 300 iterations."""
    from deepinv.models import TVDenoiser

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return TVDenoiser(n_it_max=300)(x, sigma)  # a new one each time: it starts where it ended before

    return denoise


def bm3d() -> Callable[[Tensor, float], Tensor]:
    """BM3D of the package bm3d."""
    from deepinv.models import BM3D

    model = BM3D()
    return lambda x, sigma: model(x, sigma).to(x.dtype)


@dataclass(frozen=True)
class Entry:
    """One row: how the denoiser is made, its strength, options of ``pnp``, and the package it needs."""

    make: Callable[[], Callable[[Tensor, float], Tensor]]
    strength: float
    options: dict[str, Any]
    package: str = "deepinv"


OPTIONS: dict[str, Entry] = {
    "pnp-tv": Entry(tv, 0.25, {"lam": 0.5}),
    "pnp-bm3d": Entry(bm3d, 1.0, {"lam": 0.22}, "bm3d"),
}


def classical(name: str, strength: float | None = None) -> Classical | None:
    """The prior of a row, or None where its package is not installed."""
    entry = OPTIONS[name]
    if not (find_spec("deepinv") and find_spec(entry.package)):
        return None
    return Classical(name, entry.make(), entry.strength if strength is None else strength)
