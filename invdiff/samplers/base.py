"""The sampler interface: one step of x from noise level sigma to sigma', state in and state out."""

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.draws import Draws

Denoiser = Callable[[Tensor, float], Tensor]  # (x, sigma) -> estimate of x0, shaped like x
Memory = dict[str, Tensor]


class Sampler(abc.ABC):
    """Frozen options and two methods, in the convention x = x0 + sigma n. Subclasses are frozen dataclasses.

    Variance-preserving formulas are carried over by x = x_VP / alpha, sigma = sigma_VP / alpha,
    alpha^2 = 1 / (1 + sigma^2), so that lambda = ln(alpha / sigma_VP) = -ln sigma, DDIM's transfer is
    x' = D + sigma' eps with eps = (x - D) / sigma, and probability flow is dx / dsigma = eps.

    ``step`` takes any estimate of x0 for D: a denoiser's, or one that has met the data. What must survive a step goes
    into the memory: ``x0`` is D at (x, sigma), ``done`` counts steps, ``levels`` are the last sigmas, newest first
    (both on the CPU, so that reading them waits for no device). Entries of others are handed on.
    """

    evaluations = 1  # calls of the denoiser per step

    @property
    def stochastic(self) -> bool:
        """True where steps draw noise."""
        return False

    @property
    def stirs(self) -> bool:
        """True where a step may add noise to x before it calls the denoiser."""
        return False

    def calls(self, steps: int) -> int:
        """Calls of the denoiser in ``steps`` steps, the last of them to 0."""
        return (steps - 1) * self.evaluations + 1

    def init(self, start: Tensor, sigma: float, rng: Draws) -> tuple[Tensor, Memory]:
        """``start + sigma n``: zeros for a sample of the prior, else an estimate; draw 0.

        Args:
            start: ``(samples, slices, C, H, W)``.
            sigma: first noise level.
            rng: noise draws.
        """
        return start + sigma * rng.normal(0, start), {}

    @abc.abstractmethod
    def step(
        self, x: Tensor, denoise: Denoiser, sigma: float, sigma_next: float, memory: Memory, rng: Draws
    ) -> tuple[Tensor, Memory]:
        """``x`` at ``sigma_next`` and the new memory.

        Args:
            x: ``(samples, slices, C, H, W)`` at noise level ``sigma``.
            denoise: ``(x, sigma) -> D``.
            sigma: > 0.
            sigma_next: in [0, sigma).
            memory: of the last step; empty at the first.
            rng: noise draws; step k, counted from 0, takes draw k + 1.
        """


def steps_done(memory: Memory) -> int:
    """Steps that led to this memory."""
    return int(memory["done"]) if "done" in memory else 0


def history(memory: Memory, name: str) -> list[Tensor]:
    """Remembered tensors of that name, newest first."""
    kept: list[Tensor] = []
    while (key := f"{name}_{len(kept)}" if kept else name) in memory:
        kept.append(memory[key])
    return kept


def levels(memory: Memory) -> list[float]:
    """Noise levels of the last steps, newest first."""
    return memory["levels"].tolist() if "levels" in memory else []


def remember(memory: Memory, sigma: float, keep: int = 1, **newest: Tensor) -> Memory:
    """The memory after a step at ``sigma``; of every name in ``newest`` the last ``keep`` tensors stay."""
    out = dict(memory)
    for name, value in newest.items():
        for j, old in enumerate([value, *history(memory, name)][:keep]):
            out[f"{name}_{j}" if j else name] = old
    out["levels"] = torch.tensor([sigma, *levels(memory)][:keep], dtype=torch.float64)
    out["done"] = torch.tensor(steps_done(memory) + 1)
    return out
