"""What the tests of non-Cartesian MRI share."""

import numpy as np
import pytest
import torch

from invdiff.operators.trajectories import radial, spiral

pytest.importorskip("finufft", reason="finufft is not installed (extra noncartesian)")


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_maps(*shape, seed=0):
    z = np.random.default_rng(seed).normal(size=(2, *shape))
    return z[0] + 1j * z[1]


def scattered(shots, samples, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (shots, samples, 2))


CASES = {  # (trajectory, shape, maps): odd and rectangular sizes, both ends of k-space, one coil or several
    "radial": (radial((5, 5), 4, 7, start_deg=10), (5, 5), None),
    "scattered": (scattered(3, 5), (6, 3), None),
    "one row": (scattered(2, 4, 1), (1, 4), None),
    "multi": (spiral((5, 4), 2, 9, 1.5), (5, 4), random_maps(3, 5, 4)),
    "slice-maps": (scattered(2, 6, 2), (4, 3), random_maps(3, 2, 4, 3)),
}


def dense(trajectory, shape, maps):
    """Real matrix of one slice from the definition alone: rows (re, im) per coil, columns (re, im)."""
    rows, columns = np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij")
    k = trajectory.reshape(-1, 2)
    fourier = np.exp(-2j * np.pi * (np.outer(k[:, 0], rows) + np.outer(k[:, 1], columns))) / np.sqrt(rows.size)
    maps = np.ones((1, *shape)) if maps is None else maps
    a = np.concatenate([fourier * s.reshape(1, -1) for s in maps])
    return torch.from_numpy(np.block([[a.real, -a.imag], [a.imag, a.real]]))


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())
