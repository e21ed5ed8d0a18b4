"""Slice coupling: its closed forms, and what it does in every solver with a prior."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from coupling_cases import RNG, potential
from solver_cases import EXACT, SIDE, SLICES, Case, Stacked

from invdiff.configure import configure
from invdiff.coupling import (
    SPREAD,
    QuadraticZ,
    TVz,
    difference,
    difference_adjoint,
    nearness,
    plus_difference_normal,
    precision,
    smooth,
)
from invdiff.draws import Draws
from invdiff.operators import build
from invdiff.problem import whiten
from invdiff.runner import Request, reconstruct
from invdiff.samplers import make_sampler
from invdiff.schedule import log_snr
from invdiff.solvers import SOLVERS, make_solver, solver_class
from invdiff.solvers.base import State, iterate, solve
from invdiff.solvers.differences import with_differences

WITH_PRIOR = [n for n in SOLVERS if solver_class(n).needs_prior]
OPTIONS = {  # converged, and quick
    "mm": {"iterations": 8, "tolerance": 1e-10, "cg_iterations": 15, "cg_tolerance": 1e-8},
    "daps": {"langevin": 4, "ode_steps": 2},
    "mbir": {"on": "denoised", "cg_iterations": 60, "rho": 0.0},
    "pnp": EXACT | {"cg_reduction": 0.0, "cg_error": 0.0},
    "dds": {"cg_iterations": 60, "cg_error": 0.0},
    **dict.fromkeys(("diffpir", "pigdm"), EXACT),
}


def solver_of(name, coupling, **options):
    """Converged, from a start that no CG made."""
    cold = {"warm": False} if "warm" in solver_class(name).__dataclass_fields__ else {}
    return make_solver(name, **OPTIONS.get(name, {}) | cold | options, coupling=coupling)


def stack_of(slices, spacing=(1.0, 1.0, 1.0)):
    operator = build("denoise", (3, 4), (1.0, 1.0))
    zero = torch.zeros(slices, *operator.out_shape, dtype=torch.float64)
    x = torch.randn(2, slices, 1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return whiten(zero, operator, 1.0, spacing=spacing), x


def differences(slices):
    matrix = np.eye(slices, k=1) - np.eye(slices)
    matrix[-1] = 0
    return torch.from_numpy(matrix)


@pytest.mark.parametrize("slices", [1, 2, 5])
@pytest.mark.parametrize("weight", [0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_the_square_of_the_difference_is_that_of_its_matrix(slices, weight):
    d = differences(slices)
    image, x = torch.randn(2, 2, slices, 1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = image.clone()
    wanted = torch.einsum("zk,skchw->szchw", d.T @ d, x)
    assert torch.allclose(plus_difference_normal(image, x, weight), image + 0.3 * wanted)
    assert torch.equal(image, before)


def test_slices_are_as_near_as_pixels_at_most():
    for spacing, near in (
        ((2.0, 1.0, 1.0), 0.5),
        ((4.0, 1.0, 4.0), 0.5),
        ((1.0, 1.0, 1.0), 1.0),
        ((0.5, 1.0, 1.0), 1.0),
    ):
        assert nearness(stack_of(2, spacing)[0]) == near


@pytest.mark.parametrize("sigma", [0.05, 3.0])
@pytest.mark.parametrize("slices", [2, 5])
def test_a_quadratic_step_without_data_is_the_minimiser(slices, sigma):
    problem, x = stack_of(slices, (2.0, 1.0, 1.0))
    u, memory = smooth(problem, x, sigma, QuadraticZ(3.0), {})
    w, d = 1 / sigma**2 + 1 / SPREAD**2, differences(slices)
    penalty = 3.0 * w * 0.5**2
    want = torch.linalg.solve(w * torch.eye(slices, dtype=x.dtype) + penalty * d.T @ d, w * x.flatten(2))
    assert torch.allclose(u.flatten(2), want, atol=1e-12) and not memory


@pytest.mark.parametrize("slices, weight", [(2, 2.0), (5, 0.3), (5, 2.0)])
def test_a_tv_step_without_data_converges_to_the_minimiser(slices, weight):
    """Optimality of w/2 |u - x|^2 + t |D u|_1; for two slices both move by t / w, or meet."""
    problem, x = stack_of(slices, (2.0, 1.0, 1.0))
    sigma, memory = 0.4, {"other": x}
    w = precision(sigma)
    t = weight * 0.5 * w**0.5
    for _ in range(60):
        u, memory = smooth(problem, x, sigma, TVz(weight), memory)
    assert set(memory) == {"other", "tvz_force"}
    dual = memory["tvz_force"] * w**0.5
    assert (w * (u - x) + difference_adjoint(dual)).abs().max() < 1e-9
    jumps = difference(u).abs() > 1e-6
    assert dual.abs().max() < t + 1e-9 and jumps.any() and not jumps[:, :-1].all()
    assert torch.allclose(dual[jumps], t * difference(u)[jumps].sign(), atol=1e-9)
    if slices == 2:
        by = (x[:, 1] - x[:, 0]).clamp(-2 * t / w, 2 * t / w) / 2
        assert torch.allclose(u, torch.stack([x[:, 0] + by, x[:, 1] - by], 1), atol=1e-9)
    once = smooth(problem, x, sigma, TVz(weight), {})[0]
    assert (once - u).norm() < 0.2 * (x - u).norm()
    other = smooth(problem, x, 0.1, TVz(weight), smooth(problem, x, sigma, TVz(weight), {})[1])[1]
    assert other["tvz_force"].abs().max() <= weight * 0.5 + 1e-12  # anneals with s


@pytest.mark.parametrize("coupling", [TVz(0.7), QuadraticZ(0.7)])
def test_the_gradient_is_that_of_the_potential_and_the_curvature_bounds_it(coupling):
    problem, x = stack_of(6, (2.0, 1.0, 1.0))
    leaf, weight = x.clone().requires_grad_(), 7.0
    (want,) = torch.autograd.grad(potential(coupling, leaf, weight, 0.5), leaf)
    assert torch.allclose(coupling.gradient(problem, x, weight), want, atol=1e-12)
    small = 1e-3 * torch.eye(6, dtype=x.dtype).reshape(6, 6, 1, 1, 1)  # inside of every knee, where it is linear
    hessian = coupling.gradient(problem, small, weight).reshape(6, 6) / 1e-3
    bound = coupling.curvature(problem, weight)
    assert 0.9 * bound < torch.linalg.eigvalsh(hessian)[-1] <= bound


@pytest.mark.parametrize("coupling", [TVz(), QuadraticZ()])
def test_differences_as_further_data_are_the_coupled_data_step(coupling):
    """Dot test, and the gradient of 1/2 |A' u - y'|^2 is that of the data step's objective."""
    case = Case("average", 0.1)
    v = torch.randn(2, SLICES, 1, SIDE, SIDE, dtype=torch.float64)
    memory = {"tvz_split": v.roll(1, -1), "tvz_dual": 3 * v.roll(1, -2)}
    more = with_differences(case.problem, coupling, 5.0, memory)
    z = torch.randn(2, *more.operator.out_shape, dtype=torch.float64)
    there, back = (more.operator(v) * z).sum(), (v * more.operator.adjoint(z)).sum()
    assert torch.allclose(there, back) and more.image_shape == v.shape[1:]
    assert torch.allclose(more.operator.normal(v), more.operator.adjoint(more.operator(v)))
    got = more.operator.adjoint(more.operator(v) - more.y)
    penalty = float(coupling.penalty(case.problem, 5.0))
    jumps = penalty * difference(v)
    if isinstance(coupling, TVz):
        jumps = jumps - penalty * memory["tvz_split"] + memory["tvz_dual"]
    a = case.problem.operator
    assert torch.allclose(got, a.adjoint(a(v) - case.problem.y) + difference_adjoint(jumps))


def operator_of(name):
    return "blur" if name in ("ddnm", "ddrm") else "average"


@pytest.mark.parametrize("kind", [QuadraticZ, TVz])
@pytest.mark.parametrize("name", WITH_PRIOR)
def test_without_weight_a_coupling_changes_nothing_and_with_it_something(name, kind):
    """To rounding. The split variable of a data step's ADMM lags by one level, also where its threshold is 0."""
    case, sigmas = Case(operator_of(name), 0.1), log_snr(3, 1.0, 0.1)
    plain, none, some = (
        solve(solver_of(name, c), case.problem, case.prior, sigmas=sigmas) for c in (None, kind(0.0), kind(0.3))
    )
    lags = kind is TVz and "tvz_split" in solver_of(name, TVz()).init(case.problem, case.prior, sigmas, RNG).memory
    lags = lags or (kind is TVz and name in ("pnp", "dds", "diffpir", "pigdm"))
    if not lags:
        assert (none - plain).abs().max() < 1e-7
    assert (some - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in WITH_PRIOR if n != "pigdm"])
def test_a_huge_weight_makes_slices_equal(name):
    """A Langevin chain spreads by what is left of h. pigdm moves by the Jacobian of D times a step to equal slices."""
    case, sigmas = Case(operator_of(name), 0.3), log_snr(12 if name == "reddiff" else 4, 1.0, 0.1)
    if name == "reddiff":
        solver = solver_of(name, QuadraticZ(1e6), optimizer="sgd", lr=1.0)
    elif name == "daps":
        solver = make_solver(name, langevin=30, ode_steps=2, rate_end=1.0, coupling=QuadraticZ(1e6))
    else:
        solver = solver_of(name, QuadraticZ(1e8))
    apart = difference(solve(solver, case.problem, case.prior, sigmas=sigmas))
    if name == "mbir":  # which fits the data to the end
        unseen = torch.from_numpy(np.eye(case.n) - np.linalg.pinv(case.a) @ case.a)
        apart = apart.flatten(-3) @ unseen
    apart = apart.abs().max()
    plain = difference(solve(replace(solver, coupling=None), case.problem, case.prior, sigmas=sigmas)).abs().max()
    assert plain > 0.05 and apart < (0.02 if name == "daps" else 1e-3) * plain


@pytest.mark.parametrize("kind", [QuadraticZ, TVz])
@pytest.mark.parametrize("name", WITH_PRIOR)
def test_an_operator_of_the_whole_stack_couples_like_its_slices_and_samples_run_alone(name, kind):
    case, sigmas = Case("mask", 0.1), log_snr(3, 1.0, 0.1)
    whole = whiten(torch.from_numpy(case.y.ravel()), Stacked(torch.from_numpy(np.kron(np.eye(2), case.a))), 0.1**2)
    solver, rng = solver_of(name, kind(0.3)), Draws(0, (4, 7), (0, 1))
    if name == "dps":  # one norm for the stack
        solver = replace(solver, zeta=0.0)
    by_slice = solve(solver, case.problem, case.prior, sigmas=sigmas, rng=rng)
    assert torch.allclose(solve(solver, whole, case.prior, sigmas=sigmas, rng=rng), by_slice, atol=1e-6)
    if solver.stochastic:
        single = solve(solver, case.problem, case.prior, sigmas=sigmas, rng=Draws(0, (4, 7), (1,)))
        assert torch.allclose(by_slice[1:], single, atol=1e-9)


@pytest.mark.parametrize("kind", [QuadraticZ, TVz])
@pytest.mark.parametrize("name", WITH_PRIOR)
def test_resuming_needs_every_tensor_of_the_memory_and_gives_the_same_bits(name, kind):
    case, sigmas = Case("mask", 0.1), log_snr(5, 1.0, 0.1)
    solver = make_solver(name, **({"langevin": 3} if name == "daps" else {}), coupling=kind(0.3))
    states = list(iterate(solver, case.problem, case.prior, sigmas))
    kept = {k: v.clone() for k, v in states[1].memory.items()}
    saved = State(states[1].x.clone(), states[1].x0.clone(), states[1].step, kept)
    *_, resumed = iterate(solver, case.problem, case.prior, sigmas, state=saved)
    assert torch.equal(states[-1].x0, resumed.x0)
    for lost in (k for k in kept if not k.startswith("sampler.")):  # which others of its family need
        left = {k: v for k, v in kept.items() if k != lost}
        try:
            *_, other = iterate(solver, case.problem, case.prior, sigmas, state=replace(saved, memory=left))
        except KeyError:
            continue
        assert not torch.equal(states[-1].x0, other.x0), f"{lost} is kept for nothing"


@pytest.mark.parametrize("name", ["dds", "diffpir", "pigdm", "mm"])
def test_what_a_coupling_remembers_goes_through_the_steps_of_a_sampler(name):
    """The split variable and the dual of every estimate are those that the next one starts from."""
    case, sigmas = Case("mask", 0.1), log_snr(4, 1.0, 0.1)
    solver = make_solver(name, coupling=TVz(0.3), sampler="heun")
    state = solver.init(case.problem, case.prior, sigmas, RNG)
    x, own, kept = state.x, state.memory, {}

    def denoise(x, sigma):
        nonlocal own
        x0, own = solver.estimate(case.problem, case.prior, x, sigma, own)
        return x0

    for sigma, after in pairwise(sigmas):
        x, kept = make_sampler("heun").step(x, denoise, sigma, after, kept, RNG)
    *_, last = iterate(solver, case.problem, case.prior, sigmas, RNG)
    assert torch.equal(last.x, x) and all(torch.equal(last.memory[key], own[key]) for key in ("tvz_split", "tvz_dual"))


@pytest.mark.parametrize("name", WITH_PRIOR)
def test_the_command_line_couples_every_solver_with_a_prior(name):
    for text, kind in (("tv-z", TVz), ("quadratic-z", QuadraticZ)):
        assert isinstance(configure(Request(op="inpaint", solver=name, coupling=text)).coupling, kind)
    assert configure(Request(op="inpaint", solver=name, coupling="none")).coupling is None


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_coupled_along_the_axis_that_is_not_in_plane(world, axis):
    """Of an input of any orientation: with a huge weight only that axis of the result is constant."""
    import nibabel as nib

    data = np.asarray(nib.load(world / "ct.nii.gz").dataobj)[4:12, 4:12, :5]
    cut = nib.Nifti1Image(np.ascontiguousarray(np.moveaxis(data, 2, axis)), np.diag([9.0, 9.0, 9.0, 1.0]))
    path = world / f"axis{axis}.nii.gz"
    nib.save(cut, path)
    common = {"input": path, "op": "inpaint", "simulate": True, "prior": world / "prior", "slice_axis": str(axis)}
    request = Request(**common, solver="ddrm", steps=2, coupling="quadratic-z", compare=(), noise="gaussian")
    plain = reconstruct(replace(request, coupling="none"))
    result = reconstruct(request)
    rough = [np.abs(np.diff(v.volume.data, axis=axis)).mean() for v in (plain, result)]
    inside = [np.abs(np.diff(v.volume.data, axis=(axis + 1) % 3)).mean() for v in (plain, result)]
    assert rough[1] < 0.97 * rough[0] and inside[1] > 0.9 * inside[0]
