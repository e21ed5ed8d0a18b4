"""The GPU path against the CPU path; runs where a CUDA device is found."""

import pytest
import torch

from invdiff.operators import build
from invdiff.priors.base import PriorInfo
from invdiff.priors.network import NetworkPrior
from invdiff.priors.unet import EDMDenoiser, UNetConfig
from invdiff.problem import whiten
from invdiff.solvers import make_solver
from invdiff.solvers.base import solve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def problem_on(device: str):
    g = torch.Generator().manual_seed(0)
    truth = 0.02 * torch.rand(3, 1, 48, 40, generator=g)
    operator = build("ct-sparse", (48, 40), (2.0, 2.0), views=12)
    y = operator(truth) + 0.01 * torch.randn(3, *operator.out_shape, generator=g)
    return whiten(y.to(device), operator.to(device), 1e-4, scale=0.0193, shift=0.0193)


def prior_on(device: str) -> NetworkPrior:
    torch.manual_seed(0)
    net = EDMDenoiser(UNetConfig(channels=(8, 8), blocks=(1, 1), embedding=16))
    return NetworkPrior(net.to(device, memory_format=torch.channels_last), PriorInfo("tiny"), chunk=2)


@pytest.mark.parametrize("name", ["fbp", "tv", "pnp", "dds", "dps"])
def test_cuda_agrees_with_cpu(name):
    results = []
    for device in ("cpu", "cuda"):
        problem, solver = problem_on(device), make_solver(name)
        prior = prior_on(device) if solver.needs_prior else None
        sigmas = solver.sigmas(5, problem, prior) if prior else solver.sigmas(3, problem, None)
        results.append(solve(solver, problem, prior, sigmas=sigmas).cpu())
    assert torch.allclose(results[0], results[1], atol=2e-2 * float(results[0].abs().max()))
