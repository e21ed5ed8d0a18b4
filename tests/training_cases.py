"""Small networks, sources and options that the tests of training share."""

import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from invdiff.priors.training_data import Source
from invdiff.priors.unet import EDMDenoiser, UNetConfig

SMALL = UNetConfig(channels=(16,), blocks=(1,), patch=1, embedding=16)
TINY = UNetConfig(channels=(8, 8), blocks=(1, 1), patch=2, embedding=16)
FAST = {"stages": ((0.0, 16, 4),), "phantoms": 0, "network": TINY, "rate": 3e-3, "validate_every_s": 0.0}
QUIET = lambda text: None  # noqa: E731
ARGS = ("--set", "network.channels=[8,8]", "--set", "network.blocks=[1,1]", "--set", "phantoms=0", "--quiet")
ARGS = (*ARGS, "--set", "stages=[[0,16,2]]", "--set", "steps=2")


def volume(path, seed=0):
    """Two slices of CT, of noise."""
    np.savez(path, hu=np.random.default_rng(seed).normal(0, 300, (2, 32, 32)).astype(np.float32))


def flat(value, name, modality="CT"):
    """A source of two constant slices."""
    return Source(name, modality, (np.full((20, 24), value, np.float32),) * 2, name)


def noise_source(seed=0, name="a", modality="CT"):
    rng = np.random.default_rng(seed)
    return Source(name, modality, tuple(rng.normal(0, 0.5, (24, 24)).astype(np.float32) for _ in range(3)), name)


def random_net(config=TINY, seed=0):
    return shake(EDMDenoiser(config), seed)


def shake(net, seed=0):
    """The same random numbers added to the weights, of which many start at zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return net


def gloo_threads(seconds=10.0):
    """Threads of this process in which gloo works, when there are none or ``seconds`` are over."""
    end = time.monotonic() + seconds
    while True:
        names = []
        for name in Path("/proc/self/task").glob("*/comm"):
            with suppress(OSError):  # ended meanwhile
                names.append(name.read_text())
        if not (count := sum("gloo_runloop" in name for name in names)) or time.monotonic() > end:
            return count
        time.sleep(0.05)
