"""What the tests of magnetic resonance imaging share."""

import numpy as np
import torch


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_mask(*shape, seed=0, share=0.4):
    mask = np.random.default_rng(seed).random(shape) < share
    mask[..., shape[-2] // 2, shape[-1] // 2] = True
    return mask


def random_maps(*shape, seed=0):
    z = np.random.default_rng(seed).normal(size=(2, *shape))
    return z[0] + 1j * z[1]


lines = np.broadcast_to(random_mask(1, 7, seed=3), (6, 7))


def centred_dft(n):
    k = np.arange(n) - n // 2
    return np.exp(-2j * np.pi * np.outer(k, k) / n) / np.sqrt(n)


def dense(mask, maps):
    """Real matrix of one slice from the definition of the DFT alone: rows (re, im) per coil, columns (re, im)."""
    height, width = mask.shape
    fourier = np.kron(centred_dft(height), centred_dft(width)) * mask.reshape(-1, 1)
    maps = np.ones((1, height, width)) if maps is None else maps
    a = np.concatenate([fourier * s.reshape(1, -1) for s in maps])
    return torch.from_numpy(np.block([[a.real, -a.imag], [a.imag, a.real]]))
