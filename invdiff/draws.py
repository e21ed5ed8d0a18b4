"""Noise draws that depend on (seed, sample, slice, step) alone: grouping, sharding and resume never change them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def _mix(*parts: int) -> int:
    """Hash of integers to a 63-bit seed (splitmix64, applied part by part)."""
    h = 0
    for part in parts:
        h = (h + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
        h ^= h >> 31
    return h >> 1


@dataclass(frozen=True)
class Draws:
    """One generator per (seed, sample, slice, step).

    Args:
        seed: any integer.
        slices: index of each slice of the stack in the whole volume.
        samples: indices of the posterior samples.
        shared: use the draw of slice 0 for every slice (against flicker between slices).
    """

    seed: int
    slices: tuple[int, ...]
    samples: tuple[int, ...] = (0,)
    shared: bool = False

    def normal(self, step: int, like: Tensor) -> Tensor:
        """Standard normal draws shaped like ``like`` ``(samples, slices, C, H, W)``, made on the CPU."""
        rows = []
        for sample in self.samples:
            for index in self.slices:
                g = torch.Generator().manual_seed(_mix(self.seed, sample, 0 if self.shared else index, step))
                rows.append(torch.randn(like.shape[2:], generator=g, dtype=like.dtype))
        return torch.stack(rows).reshape(like.shape).to(like.device)

    def restrict(self, slices: slice) -> "Draws":
        """The draws of those positions of the stack."""
        return replace(self, slices=self.slices[slices])
