"""Every operator and every solver on another device than the CPU, by a pretended one: equal values, no hidden waits."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from mri_cases import random_maps, random_mask
from operator_registry import LIBRARY, NAMES, Case, case
from pretended import Pretended, back, put

from invdiff.draws import Draws
from invdiff.operators import build
from invdiff.operators.mask import Mask
from invdiff.operators.mri import CartesianMRI
from invdiff.priors.base import PriorInfo
from invdiff.priors.complex import PhaseCorrected, slow_phase
from invdiff.priors.network import NetworkPrior
from invdiff.priors.unet import EDMDenoiser, UNetConfig
from invdiff.problem import whiten
from invdiff.solvers import SOLVERS, make_solver, solver_class
from invdiff.solvers.pnp import pseudo_inverse

EVERY = pytest.mark.parametrize("name", [*NAMES, *LIBRARY])


class Plan:
    """cufinufft's plan, by finufft."""

    def __init__(self, kind, shape, planes, tolerance, sign, dtype, gpu_stream, gpu_device_id):
        from finufft import Plan as OnCPU

        self.own = OnCPU(kind, shape, planes, tolerance, sign, dtype)

    def setpts(self, rows, columns):
        self.own.setpts(back(rows).numpy(), back(columns).numpy())

    def execute(self, x, out):
        assert x.is_cuda and out.is_cuda
        back(out).copy_(torch.from_numpy(self.own.execute(back(x).numpy())).reshape(out.shape))


@pytest.fixture
def gpu(monkeypatch):
    """The pretended device, and of torch.cuda what the package asks for."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**34))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(sys.modules, "cufinufft", SimpleNamespace(Plan=Plan))
    with Pretended() as device:
        yield device


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())

@EVERY
def test_an_operator_is_the_same(gpu, name):
    c = case(name)
    there = Case(c.op.to("cuda"), c.slices)
    for (f, v), (g, _) in zip(c.maps(torch.float32), there.maps(torch.float32, "cuda"), strict=True):
        w = put(v)
        found = g(w)
        gpu.clear()
        found = g(w)
        print(name, getattr(f, "__qualname__", f), dict(gpu.where))
        assert found.is_cuda and found.dtype == v.dtype and relative(back(found), f(v)) < 1e-5
    assert there.op.norm == pytest.approx(c.op.norm, rel=1e-3)
    assert there.op.mean_square == pytest.approx(c.op.mean_square, rel=1e-5)


# Solvers. OWN names an operator where the solver does not fit every one.

KINDS = ("ct-sparse", "mri", "mask", "blur")
OWN = {
    **dict.fromkeys(("fbp", "sirt", "os-sart"), ("ct-sparse",)),
    **dict.fromkeys(("ddnm", "ddrm", "fill", "biharmonic"), ("mask",)),
    **dict.fromkeys(("sense-cg", "zero-filled"), ("mri",)),
    "wiener": ("blur",),
    "bicubic": ("sr",),
    "measured": ("denoise",),
}
FEW = {"cg_iterations": 5, "cg_tolerance": 0.0, "cg_reduction": 0.0, "langevin": 3, "check": 2}


def operator_for(kind, slices):
    """With parameters of its own for every slice where the family has them."""
    if kind == "mri":
        return CartesianMRI(random_mask(slices, 24, 20), random_maps(slices, 3, 24, 20))
    if kind == "mask":
        return Mask(torch.rand(slices, 24, 20, generator=torch.Generator().manual_seed(5)) > 0.4)
    return build(kind, (24, 20), (2.0, 2.0), **({"views": 9} if kind.startswith("ct") else {}))


def problem_for(kind, slices, there=False):
    """Data of weights of their own; the image in units of its own."""
    g, operator = torch.Generator().manual_seed(0), operator_for(kind, slices)
    y = operator(torch.rand(slices, *operator.in_shape, generator=g))
    y = y + 0.05 * torch.randn(y.shape, generator=g)
    variance = 0.0025 * (0.5 + torch.rand(y.shape, generator=g))
    if kind in ("mask", "denoise"):
        variance = torch.tensor(0.0025)
    if there:
        y, variance, operator = put(y), put(variance), operator.to("cuda")
    return whiten(y, operator, variance, scale=0.9, shift=0.0 if operator.complex_image else 0.1)


def prior_for(problem, there=False, chunk=8):
    torch.manual_seed(0)
    net = EDMDenoiser(UNetConfig(channels=(8, 8), blocks=(1, 1), embedding=16))
    prior = NetworkPrior(net.to("cuda") if there else net, PriorInfo("tiny", sigma_max=20.0), chunk)
    if not problem.operator.complex_image:
        return prior
    return PhaseCorrected(prior, slow_phase(pseudo_inverse(problem)[0]))


def pieces(name, kind, slices, there, **options):
    problem, known = problem_for(kind, slices, there), solver_class(name).__dataclass_fields__
    solver = make_solver(name, **{k: v for k, v in FEW.items() if k in known} | options)
    solver.require(problem)
    prior = prior_for(problem, there) if solver.needs_prior else None
    return solver, problem, prior, solver.sigmas(4, problem, prior)


def steps(gpu, solver, problem, prior, sigmas):
    """The states after two steps, and what the second waited for."""
    rng, waits = Draws(0, tuple(range(problem.image_shape[0]))), {}
    state = solver.init(problem, prior, sigmas, rng)
    for k in range(2):
        gpu.clear()
        state = solver.step(problem, prior, state, sigmas[k], sigmas[k + 1], rng)
        solver.finished(state)
    return state, dict(gpu.where)

CASES = [(name, kind) for name in SOLVERS for kind in OWN.get(name, KINDS)]

@pytest.mark.parametrize("name, kind", CASES)
def test_a_solver_is_the_same(gpu, name, kind):
    here, _ = steps(gpu, *pieces(name, kind, 3, False))
    there, waits = steps(gpu, *pieces(name, kind, 3, True))
    print(name, kind, waits)
    assert there.x0.is_cuda and relative(back(there.x0), here.x0) < 1e-3
    _, more = steps(gpu, *pieces(name, kind, 5, True))
    assert waits == more, more
