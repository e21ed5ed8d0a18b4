"""Every operator, solver and sampler on another device than the CPU, by a pretended one: equal values, and the host
waits for the device no more often than it must, however many slices there are."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from mri_cases import random_maps, random_mask
from operator_registry import LIBRARY, NAMES, Case, case
from pretended import Pretended, back, put

from invdiff.coupling import QuadraticZ, TVz
from invdiff.draws import Draws
from invdiff.linalg import cg, largest_eigenvalue
from invdiff.operators import build
from invdiff.operators.blur import Blur
from invdiff.operators.mask import Mask
from invdiff.operators.mri import CartesianMRI
from invdiff.priors.base import PriorInfo
from invdiff.priors.complex import PhaseCorrected, slow_phase
from invdiff.priors.network import NetworkPrior
from invdiff.priors.unet import EDMDenoiser, UNetConfig
from invdiff.problem import whiten
from invdiff.samplers import SAMPLERS, make_sampler
from invdiff.solvers import SOLVERS, make_solver, solver_class
from invdiff.solvers.base import iterate
from invdiff.solvers.common import mean_squares
from invdiff.solvers.pnp import pseudo_inverse, warm_start
from invdiff.solvers.unconditional import Unconditional, no_data

SLOW = [name for name in NAMES if "cone" in name][1:]  # other scans of one operator
EVERY = pytest.mark.parametrize("name", [name for name in [*NAMES, *LIBRARY] if name not in SLOW])


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
    shorten(monkeypatch)
    return Pretended()


def shorten(monkeypatch):
    """Fewer iterations of the same, on either device, for time, and since later iterations of CG amplify rounding,
    which differs between processors (12 of the 3D blur: float32 is 7e-4 from float64)."""
    monkeypatch.setattr("invdiff.solvers.wavelet.SHIFTS", 2)
    monkeypatch.setattr("invdiff.coupling.ROUNDS", 3)
    monkeypatch.setitem(warm_start.__kwdefaults__, "iterations", 3)
    few = lambda normal, start, most, *rest, **options: largest_eigenvalue(normal, start, 6, *rest, **options)  # noqa: E731
    for module in ("common", "tv"):
        monkeypatch.setattr(f"invdiff.solvers.{module}.largest_eigenvalue", few)
    for module in ("blur", "mri"):
        monkeypatch.setattr(f"invdiff.operators.{module}.cg", lambda *a, **k: cg(*a, **k | {"iterations": 6}))


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_the_pretended_device_refuses_and_counts(gpu):
    with gpu:
        here, there = torch.rand(3, 4), torch.rand(3, 4).to("cuda")
        assert there.device == torch.device("cuda", 0) and there.is_cuda and gpu.uploads == 1
        for mixed in (lambda: here + there, lambda: torch.cat([there, here]), lambda: there[torch.tensor([0, 2])]):
            with pytest.raises(RuntimeError, match="one device"):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert (there * torch.tensor(2.0)).is_cuda and torch.zeros(2, device="cuda").is_cuda and gpu.reads == 0
        waits = (lambda: there.sum().item(), lambda: bool(there.any()), lambda: there[there > 0.5], there.cpu)
        for k, wait in enumerate([*waits, there.nonzero, there[0].tolist], 1):
            wait()
            assert gpu.reads == k
        there[:, :2] += 1
        assert torch.equal(back(there)[:, 2:], back(there.cpu())[:, 2:]) and back(there)[:, :2].min() >= 1
        x = torch.ones(2, device="cuda").requires_grad_()
        assert torch.autograd.grad((x**3).sum(), x)[0].tolist() == [3.0, 3.0]


# Operators


def waits_of(name, op, f):
    """The most reads and uploads of one application: conjugate gradients look every 4 iterations whether to go on, a
    matrix that is not stored is built anew, and filtered backprojection makes its filters and tables."""
    if "on-the-fly" in name:
        return 30, 10
    if f == "pinv" and op.pinv_kind == "fbp":
        return 0, 12
    inside = getattr(op, "operator", op)
    closed = getattr(inside, "closed_form", getattr(inside, "maps", None) is None)
    return (0 if f in ("map", "adjoint", "normal") or closed else 3), 0  # of six iterations


@EVERY
def test_an_operator_is_the_same(gpu, name):
    c = case(name)
    expected = [f(v) for f, v in c.maps(torch.float32, items=2)]
    with gpu:
        there = Case(c.op.to("cuda"), c.slices)
        for (f, v), right in zip(there.maps(torch.float32, "cuda", items=2), expected, strict=True):
            what = "map" if f is there.op else f.__name__
            most = waits_of(name, c.op, what)
            if most[0] == 0 or what == "pinv":
                f(v)  # makes what is kept, also for a prox by conjugate gradients
            gpu.clear()
            found = f(v)
            assert gpu.reads <= most[0] and gpu.uploads <= most[1], (what, gpu.where)
            assert found.is_cuda and found.dtype == right.dtype and relative(back(found), right) < 1e-5
            if c.slices and what in ("map", "adjoint", "normal"):
                part = there.op.restrict(torch.tensor([2, 0], device="cuda"))
                cut = {"map": part, "adjoint": part.adjoint, "normal": part.normal}[what]
                index = torch.tensor([2, 0])
                assert relative(back(cut(put(back(v)[:, index]))), right[:, index]) < 1e-5


NORMS = ["ct-sparse-9-5.0", "mri-coils", "mri-slice-maps", "blur-replicate", "sr", "mask-slices", "radial-slice-maps"]


@pytest.mark.parametrize("name", [*NORMS, "compose-slices", "stack-slices", "whitened", "scale", "identity"])
def test_norm_and_mean_square_are_the_same(gpu, name):
    c = case(name)
    norm, mean_square = c.op.norm, c.op.mean_square
    with gpu:
        there = c.op.to("cuda")
        assert there.norm == pytest.approx(norm, rel=1e-3) and there.mean_square == pytest.approx(mean_square, rel=1e-5)


# Solvers. OWN names an operator where the solver does not fit every one; stacks of different operators have different
# numbers of slices, on which no number of WAITS depends.

SLICES = {"ct-sparse": 2, "mri": 3, "mask": 4, "blur": 4, "sr-z": 4}
OWN = {
    **dict.fromkeys(("fbp", "sirt", "os-sart"), ("ct-sparse",)),
    **dict.fromkeys(("ddnm", "ddrm", "fill", "biharmonic"), ("mask",)),
    **dict.fromkeys(("sense-cg", "zero-filled"), ("mri",)),
    **dict.fromkeys(("pnp", "tv"), ("mri", "mask", "ct-sparse", "blur", "sr-z")),
    **dict.fromkeys(("dps", "mm"), ("mri", "mask", "ct-sparse")),
    "wiener": ("blur",),
    "bicubic": ("sr",),
    "measured": ("denoise",),
}
CASES = [(name, kind) for name in SOLVERS for kind in OWN.get(name, ("mri", "mask"))]
OPTIONS = {"ct-sparse": {"views": 6}, "blur": {"kernel": "gaussian:1"}, "sr-z": {"axis": "through-plane"}}
FEW = {"scaling": "norm", "cg_iterations": 5, "cg_tolerance": 0.0, "cg_reduction": 0.0, "langevin": 3, "check": 2}
CG = 2  # reads of five iterations, which look at the first and the fifth whether to go on
# Reads and uploads of a step and of the question whether it was the last; uploads are draws, which the CPU makes.
WAITS = {
    "pnp": (CG, 0),
    "dds": (CG, 1),
    "diffpir": (CG, 1),
    "pigdm": (CG, 1),
    "mm": (3 * CG, 1),  # a run of CG for each outer iteration
    "mbir": (CG, 2),  # predictor and corrector
    "daps": (0, 4),  # Langevin steps and the way to the next level
    **dict.fromkeys(("dps", "reddiff", "ddnm", "ddrm"), (0, 1)),
    "tv": (2, 0),  # which slices go on, and whether any does
    "wavelet": (2 * CG + 1, 0),  # data steps of two shifts, and whether it is done
    **dict.fromkeys(("cgls", "sense-cg", "sirt", "os-sart"), (1, 0)),  # whether it is done
    "fbp": (0, 4),  # weights, filter and angles
    "biharmonic": (2, 1),  # a sparse factorisation on the CPU
    **dict.fromkeys(("wiener", "bicubic", "fill", "zero-filled", "measured"), (0, 0)),
}


def operator_for(kind, slices):
    """With parameters of its own for every slice where the family has them."""
    if kind == "mri":
        return CartesianMRI(random_mask(slices, 16, 16), random_maps(slices, 2, 16, 16))
    if kind == "mask":
        return Mask(torch.rand(slices, 16, 16, generator=torch.Generator().manual_seed(5)) > 0.4)
    shape = (slices, 16, 16) if kind == "sr-z" else (16, 16)
    return build(kind.removesuffix("-z"), shape, 2.0, **OPTIONS.get(kind, {}))


def problem_for(kind, there):
    """Data of weights of their own where a closed form does not forbid it."""
    g, slices = torch.Generator().manual_seed(0), SLICES.get(kind, 3)
    operator = operator_for(kind, slices)
    y = operator(torch.rand(*([slices] if operator.slicewise else []), *operator.in_shape, generator=g))
    y = y + 0.05 * torch.randn(y.shape, generator=g)
    variance = 0.0025 * (0.5 + torch.rand(y.shape, generator=g)) if kind in ("ct-sparse", "mri", "blur") else 0.0025
    if there:
        y, operator = put(y), operator.to("cuda")
        variance = put(variance) if isinstance(variance, torch.Tensor) else variance
    return whiten(y, operator, variance, scale=0.9, shift=0.0 if operator.complex_image else 0.1)


def prior_for(problem, there, chunk):
    torch.manual_seed(0)
    net = EDMDenoiser(UNetConfig(channels=(8, 8), blocks=(1, 1), embedding=16))
    prior = NetworkPrior(net.to("cuda") if there else net, PriorInfo("tiny", sigma_max=20.0), chunk)
    if not problem.operator.complex_image:
        return prior
    return PhaseCorrected(prior, slow_phase(pseudo_inverse(problem)[0]))


def second_step(name, kind, gpu=None, chunk=8, **options):
    """The estimate after two steps, and what the second one waited for; on the CPU without ``gpu``."""
    problem, known = problem_for(kind, gpu is not None), solver_class(name).__dataclass_fields__
    solver = make_solver(name, **{k: v for k, v in FEW.items() if k in known} | options)
    solver.require(problem)
    prior = prior_for(problem, gpu is not None, chunk) if solver.needs_prior else None
    sigmas, rng = solver.sigmas(4, problem, prior), Draws(0, tuple(range(problem.image_shape[0])))
    state = solver.init(problem, prior, sigmas, rng)
    for k in range(2):
        if gpu:
            gpu.clear()
        state = solver.step(problem, prior, state, sigmas[k], sigmas[k + 1], rng)
        solver.finished(state)
    return state.x0, gpu and (gpu.reads, gpu.uploads)


@pytest.mark.parametrize("name, kind", CASES)
def test_a_solver_is_the_same_and_waits_as_often_as_it_must(gpu, name, kind):
    here, _ = second_step(name, kind)
    with gpu:
        there, waits = second_step(name, kind, gpu)
        assert there.is_cuda and waits == WAITS[name], gpu.where
    assert relative(back(there), here) < 1e-4


COUPLED = [(name, TVz()) for name in SOLVERS if "coupling" in solver_class(name).__dataclass_fields__]


@pytest.mark.parametrize("name, coupling", [*COUPLED, *((name, QuadraticZ()) for name in ("pnp", "ddrm", "mm"))])
def test_a_coupled_solver_is_the_same(gpu, name, coupling):
    """In network calls of two slices, which are made again for a gradient across all of them, and in three iterations
    of CG: preconditioned for uncoupled slices, the fifth of ``diffpir`` amplifies rounding a thousand times."""
    few = {"cg_iterations": 3} if "cg_iterations" in solver_class(name).__dataclass_fields__ else {}
    here, _ = second_step(name, "mask", chunk=2, coupling=coupling, **few)
    with gpu:
        there, waits = second_step(name, "mask", gpu, chunk=2, coupling=coupling, **few)
        more = {"mm": 1, "dps": 0}.get(name, 0)  # the strength of the differences
        assert waits[0] <= WAITS[name][0] + more and waits[1] <= WAITS[name][1] + 1  # a small matrix
    assert relative(back(there), here) < 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_the_same(gpu, name):
    found, solver = [], Unconditional(make_sampler(name))
    for there in (False, True):
        with gpu if there else nullcontext():
            problem = no_data((1, 8, 8), 2, device="cuda" if there else "cpu")
            prior = prior_for(problem, there, 2)
            sigmas, rng = solver.sigmas(6, problem, prior), Draws(0, (0, 1))
            gpu.clear()
            states = [*iterate(solver, problem, prior, sigmas, rng)]
            assert gpu.reads == 0 and gpu.uploads <= there * (1 + 5)  # draws: the start, and one a step
            found.append(back(states[-1].x0))
    assert relative(found[1], found[0]) < 1e-4


def test_mean_squares_are_the_same(gpu):
    operator = Blur((5, 4), torch.rand(3, 3, generator=torch.Generator().manual_seed(0)))
    expected = mean_squares(whiten(torch.ones(2, 1, 5, 4), operator, 0.5))
    with gpu:
        problem = whiten(put(torch.ones(2, 1, 5, 4)), operator.to("cuda"), 0.5)
        gpu.clear()
        found = mean_squares(problem)
        assert gpu.reads == 0
    assert relative(back(found), expected) < 1e-5
