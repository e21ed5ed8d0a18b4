"""The GPU path against the CPU path; runs where a CUDA device is found. Without one see test_device.py."""

import pytest
import torch
from operator_registry import LIBRARY, NAMES, Case, case
from test_device import CASES, COUPLED, OPTIONS, SLICES, operator_for, relative

from invdiff.coupling import TVz
from invdiff.draws import Draws
from invdiff.errors import UsageError
from invdiff.operators import build
from invdiff.priors.base import PriorInfo
from invdiff.priors.complex import PhaseCorrected, slow_phase
from invdiff.priors.network import NetworkPrior
from invdiff.priors.unet import EDMDenoiser, UNetConfig
from invdiff.problem import whiten
from invdiff.samplers import SAMPLERS, make_sampler
from invdiff.solvers import make_solver
from invdiff.solvers.base import solve
from invdiff.solvers.pnp import pseudo_inverse
from invdiff.solvers.unconditional import Unconditional, no_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(autouse=True)
def full_precision():
    """Products in float32, not in TF32, as on the CPU."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def to_gpu(operator):
    try:
        return operator.to("cuda")
    except UsageError as error:  # cufinufft
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [*NAMES, *LIBRARY])
def test_an_operator_passes_the_dot_test_and_agrees_with_the_cpu(name):
    c = case(name)
    there = Case(to_gpu(c.op), c.slices)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        x, y = c.x(2, dtype=dtype), c.y(2, dtype=dtype)
        ax, aty = there.op(x.cuda()), there.op.adjoint(y.cuda())
        left, right = (ax.double() * y.cuda().double()).sum(), (x.cuda().double() * aty.double()).sum()
        assert abs(left - right) < tolerance * ax.double().norm() * y.double().norm()
    for (f, v), (g, w) in zip(c.maps(torch.float32), there.maps(torch.float32, "cuda"), strict=True):
        found = g(w)
        assert found.is_cuda and found.dtype == v.dtype and relative(found.cpu(), f(v)) < 1e-5
    assert there.op.norm == pytest.approx(c.op.norm, rel=1e-3)
    assert there.op.mean_square == pytest.approx(c.op.mean_square, rel=1e-5)


def test_ct_of_many_slices_is_that_of_parts_and_returns_to_the_cpu():
    op = build("ct-sparse", (64, 51), 1.0, views=20)
    gpu, g = op.to("cuda"), torch.Generator().manual_seed(0)
    x, y = (torch.randn(35, *shape, generator=g) for shape in (op.in_shape, op.out_shape))
    assert relative(gpu(x.cuda()).cpu(), op(x)) < 1e-6 and relative(gpu.adjoint(y.cuda()).cpu(), op.adjoint(y)) < 1e-6
    assert relative(gpu.fbp(y.cuda()).cpu(), op.fbp(y)) < 1e-5
    assert torch.equal(torch.cat([gpu(part) for part in x.cuda().split(3)]), gpu(x.cuda()))
    assert torch.equal(gpu.to("cpu")(x), op(x))


def problem_on(device, kind, dtype=torch.float64):
    g, slices = torch.Generator().manual_seed(0), SLICES.get(kind, 3)
    operator = operator_for(kind, slices)
    y = operator(torch.rand(*([slices] if operator.slicewise else []), *operator.in_shape, generator=g, dtype=dtype))
    y = y + 0.05 * torch.randn(y.shape, generator=g, dtype=dtype)
    shift = 0.0 if operator.complex_image else 0.1
    return whiten(y.to(device), operator.to(device), 0.0025, scale=0.9, shift=shift)


def network_on(device, chunk=2, width=8):
    torch.manual_seed(0)
    net = EDMDenoiser(UNetConfig(channels=(width, width), blocks=(1, 1), embedding=16))
    for parameter in net.parameters():  # those of a new network are zero where they meet the image
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    net = net.to(device, memory_format=torch.channels_last)
    return NetworkPrior(net, PriorInfo("tiny", sigma_max=20.0), chunk)


def result_on(device, name, kind, **options):
    problem, solver = problem_on(device, kind), make_solver(name, **options)
    solver.require(problem)
    prior = network_on(device) if solver.needs_prior else None
    if prior is not None and problem.operator.complex_image:
        prior = PhaseCorrected(prior, slow_phase(pseudo_inverse(problem)[0]))
    x0 = solve(solver, problem, prior, sigmas=solver.sigmas(3, problem, prior))
    assert x0.device.type == device and x0.dtype == torch.float64 and bool(torch.isfinite(x0).all())
    return x0.cpu()


@pytest.mark.parametrize("name, kind", CASES)
def test_a_solver_agrees_with_the_cpu(name, kind):
    """Up to the order of sums, which three steps and the ends of conjugate gradients magnify."""
    assert kind in OPTIONS or kind in SLICES or kind in ("sr", "denoise")
    assert relative(result_on("cuda", name, kind), result_on("cpu", name, kind)) < 1e-3


@pytest.mark.parametrize("name, coupling", COUPLED)
def test_a_coupled_solver_agrees_with_the_cpu(name, coupling):
    here, there = (result_on(device, name, "mask", coupling=coupling) for device in ("cpu", "cuda"))
    assert relative(there, here) < 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_agrees_with_the_cpu(name):
    found, solver = [], Unconditional(make_sampler(name))
    for device in ("cpu", "cuda"):
        problem, prior = no_data((1, 8, 8), 2, torch.float64, device), network_on(device)
        sigmas = solver.sigmas(6, problem, prior)
        found.append(solve(solver, problem, prior, sigmas=sigmas, rng=Draws(0, (0, 1))).cpu())
    assert relative(found[1], found[0]) < 1e-3


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_prior_in_half_precision_is_near_the_one_in_single_precision(kind):
    """Rounding of 2^-8 and 2^-11 relative to the values inside the network, a few times over."""
    prior, x = network_on("cuda", chunk=2), torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1)).cuda()
    for sigma in (0.05, 0.5, 5.0):
        whole = prior.denoise(x, sigma)
        with torch.autocast("cuda", kind):
            half = prior.denoise(x, sigma)
        assert half.dtype == torch.float32 and not torch.equal(half, whole)
        assert relative(half, whole) < (0.05 if kind == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("name, options", [("pnp", {}), ("dps", {}), ("pigdm", {"coupling": TVz()})])
def test_memory_of_the_network_is_bounded_by_its_chunk(name, options):
    """Four times the slices take the room of their images, not of their activations."""

    def peak(slices):
        operator = build("inpaint", (64, 64), 1.0).to("cuda")
        y = operator(torch.rand(slices, 1, 64, 64, device="cuda"))
        problem, prior, solver = whiten(y, operator, 0.01), network_on("cuda", 2, 64), make_solver(name, **options)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        solve(solver, problem, prior, sigmas=solver.sigmas(2, problem, prior))
        return torch.cuda.max_memory_allocated() - before

    peak(4)  # plans of transforms and work space of the libraries
    images = 4 * 64 * 64 * (32 - 8)
    assert peak(32) - peak(8) < 40 * images
