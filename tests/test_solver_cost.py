"""What a solver costs, counted and not timed: network calls and operator applications of a step, arrays held."""

import gc
import re
from collections import Counter
from functools import cache
from inspect import getdoc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from invdiff.coupling import TVz
from invdiff.draws import Draws
from invdiff.operator import LinearOperator
from invdiff.operators import build
from invdiff.plan import HELD, _network_seconds, _seconds, stacks_held
from invdiff.priors.base import Prior, PriorInfo
from invdiff.problem import SLICE_BLOCK, whiten
from invdiff.samplers import SAMPLERS
from invdiff.solvers import SOLVERS, make_solver, solver_class
from invdiff.solvers.base import iterate
from invdiff.solvers.chain import Guided
from invdiff.solvers.daps import law, reach

SIDE = 64
FEW = {"cg_iterations": 3, "langevin": 40, "check": 2}  # repetitions, which hold no more arrays than many
# Operators for the solvers that do not fit every one; the others get one with few data and no arrays of its own.
OWN = {
    **dict.fromkeys(("fbp", "sirt", "os-sart"), ("ct-sparse", {"views": 5})),
    **dict.fromkeys(("ddnm", "ddrm", "fill", "biharmonic"), ("inpaint", {})),
    **dict.fromkeys(("sense-cg", "zero-filled"), ("mri", {})),
    "wiener": ("blur", {}),
    "bicubic": ("sr", {}),
    "measured": ("denoise", {}),
}

THREE_D: tuple[dict, dict] = {"coupling": TVz()}, {"volumetric": True}


class Average(LinearOperator):
    """Means of blocks of 8 x 8 pixels."""

    in_shape, out_shape = (1, SIDE, SIDE), (1, SIDE // 8, SIDE // 8)

    def forward(self, x):
        return x.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).mean((-1, -3))

    def _adjoint(self, y):
        wide = y[..., :, None, :, None].expand(*y.shape[:-1], 8, y.shape[-1], 8)
        return (wide / 64).reshape(*y.shape[:-2], SIDE, SIDE)


class Shrink(Prior):
    """A network without activations."""

    info = PriorInfo("shrink", sigma_min=0.01, sigma_max=20.0)
    chunk = 4

    def denoise(self, x, sigma, context=None):
        self.calls += x[..., 0, 0, 0].numel()
        return 0.9 * x


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside this context held at the end of any operation."""

    def __enter__(self):
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        self.before = {t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided}
        self.live, self.peak = {}, 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        new = {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in made if s._cdata not in self.before}
        if not new.keys() <= self.live.keys():
            self.live = {k: v for k, v in (self.live | new).items() if not v[0].expired()}
            self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out


def make_problem(name, slices):
    op, options = OWN.get(name, (None, {}))
    operator = build(op, (SIDE, SIDE), 10.0, **options) if op else Average()
    x = torch.rand(slices, *operator.in_shape, generator=torch.Generator().manual_seed(0))
    y = operator(x)
    return whiten(y + 0.01 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)), operator, 1e-4)


@pytest.fixture(autouse=True)
def few_shifts(monkeypatch):
    """Two shifts of the wavelet transform in the place of 16, for the same reason."""
    monkeypatch.setattr("invdiff.solvers.wavelet.SHIFTS", 2)


@cache
def held(name, slices, coupled=False):
    """Volumes at the peak of a run of three steps, the start included."""
    known = solver_class(name).__dataclass_fields__
    options = {k: v for k, v in FEW.items() if k in known} | (THREE_D[name == "tv"] if coupled else {})
    solver = make_solver(name, **options)
    problem, prior = make_problem(name, slices), Shrink() if solver.needs_prior else None
    sigmas = solver.sigmas(3, problem, prior)
    with Live() as live:
        for _ in iterate(solver, problem, prior, sigmas, Draws(0, tuple(range(slices)))):
            pass
    return live.peak / (4 * torch.Size(problem.image_shape).numel())


def stated(name):
    """Of the docstring: volumes of the stack, of a block, with a coupling."""
    text = " ".join(getdoc(solver_class(name)).split()).replace(" (``volumetric``)", "")
    pattern = r"Volumes held: (\d+)(?:, and (\d+) of 32 slices)?(?:; (\d+) more with a coupling)?[:.]"
    found = re.search(pattern, text)
    assert found, f"{name}: no line 'Volumes held: N, and M of 32 slices; K more with a coupling: ...' in its docstring"
    return tuple(int(n or 0) for n in found.groups())


ROOM = 0.15  # of a volume: scalars, data, spectra that are a little over half


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_holds_the_volumes_that_it_says(name):
    stacks, blocks, _ = stated(name)
    assert HELD[name] == stated(name), "plan.HELD and the docstring differ"
    assert stacks + blocks - 1 < held(name, SLICE_BLOCK) <= stacks + blocks + ROOM
    if blocks:
        assert stacks + blocks / 2 - 2 < held(name, 2 * SLICE_BLOCK) <= stacks + blocks / 2 + ROOM


@pytest.mark.parametrize("name", [n for n in SOLVERS if HELD[n].coupled])
def test_a_coupling_holds_the_volumes_that_it_says(name):
    assert sum(stated(name)) - 1 < held(name, 16, coupled=True) <= sum(stated(name)) + ROOM


class Tallied(LinearOperator):
    """A dense matrix on each slice that counts how often it and its transpose are applied."""

    in_shape, out_shape = (1, 16, 16), (1, 5, 16)

    def __init__(self):
        self.matrix = torch.randn(256, 80, generator=torch.Generator().manual_seed(0))
        self.tally = Counter()

    def forward(self, x):
        self.tally["A"] += 1
        return (x.flatten(-3) @ self.matrix).unflatten(-1, self.out_shape)

    def _adjoint(self, y):
        self.tally["A^T"] += 1
        return (y.flatten(-3) @ self.matrix.T).unflatten(-1, self.in_shape)


class Watched(Shrink):
    """Notes besides whether it is differentiated."""

    chunk = SLICE_BLOCK
    differentiated = False

    def denoise(self, x, sigma, context=None):
        self.differentiated |= x.requires_grad
        return super().denoise(x, sigma, context)


def second_of_three(name, problem, prior, tally, **options):
    """A and A^T of the second of three steps, and its denoisings of a slice."""
    solver = make_solver(name, **options)
    states = iterate(solver, problem, prior, solver.sigmas(3, problem, prior))
    next(states)
    tally.clear()
    before = prior.calls
    next(states)
    return (tally["A"], tally["A^T"]), (prior.calls - before) / len(problem.y)


FULL = {"cg_iterations": 5, "cg_tolerance": 0.0}
CG = (6, 7)  # A^T y, the residual of the start, five iterations
STEPS = {
    "pnp": (FULL | {"cg_reduction": 0.0, "cg_error": 0.0}, CG),
    "dds": ({"cg_iterations": 5, "cg_error": 0.0}, CG),
    "diffpir": (FULL, CG),
    "pigdm": (FULL, CG),
    "mm": (FULL | {"iterations": 2, "tolerance": 0.0}, (21, 21)),  # 3 runs of CG, 2 products, the residual
    "dps": ({}, (1, 1)),
    "reddiff": ({}, (1, 1)),
    "mbir": ({}, (2, 2)),  # one iteration of CG from a start; A^T y is kept
    "daps": ({"langevin": 4}, (4, 5)),
    "tv": ({"check": 3}, (4, 4)),  # and the gap
    "cgls": ({}, (1, 1)),
    "wavelet": ({"cg_iterations": 2, "cg_reduction": 0.0}, (2 * 3, 2 * 4)),  # at each of the two shifts
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_applies_the_operator_as_often_as_its_formula(name):
    operator, (options, expected) = Tallied(), STEPS[name]
    y = operator(torch.rand(3, 1, 16, 16)) + torch.randn(3, 1, 5, 16)
    found, _ = second_of_three(name, whiten(y, operator, 1.0), Shrink(), operator.tally, **options)
    assert found == expected


@pytest.mark.parametrize("name", [n for n in SOLVERS if solver_class(n).needs_prior])
def test_a_step_calls_the_network_as_often_as_it_says(name):
    prior, solver = Watched(), make_solver(name)
    assert second_of_three(name, make_problem(name, 2), prior, Counter())[1] == solver.network_calls
    assert prior.differentiated == solver.differentiates


class Bent(Shrink):
    """Has activations, which a gradient needs, and counts the slices that it is differentiated for."""

    chunk, gradients = 2, 0

    def denoise(self, x, sigma, context=None):
        out = super().denoise(x, sigma).tanh()
        if out.requires_grad:
            out.register_hook(self.count)
        return out

    def count(self, grad):
        self.gradients += grad[..., 0, 0, 0].numel()


@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize("options", [{}, {"coupling": TVz()}])
@pytest.mark.parametrize("name", [n for n in SOLVERS if solver_class(n).differentiates])
def test_the_plan_knows_gradients_and_what_is_evaluated_again_for_them(monkeypatch, name, options, slices):
    prior, problem, solver = Bent(), make_problem(name, slices), make_solver(name, **options)
    list(iterate(solver, problem, prior, solver.sigmas(2, problem, prior)))
    calls, gradients = prior.calls, prior.gradients
    assert (calls, gradients) == tuple(slices * n for n in solver.network_passes(problem, prior.chunk, 2))
    monkeypatch.setattr("invdiff.plan._network_times", lambda *_: (2.0, 200.0))  # of one chunk
    assert _network_seconds(problem, prior, solver, 2) == calls + 100 * gradients
    if name == "mm":  # as its docstring says
        assert calls == 2 * slices * (5 if options and slices > prior.chunk else 1)


@pytest.mark.parametrize("name", [n for n in SOLVERS if solver_class(n).differentiates])
def test_the_plan_knows_how_many_slices_are_differentiated_together(monkeypatch, name):
    prior, problem, solver = Bent(), make_problem(name, 4), make_solver(name, coupling=TVz())
    prior.together = 4
    list(iterate(solver, problem, prior, solver.sigmas(2, problem, prior)))
    monkeypatch.setattr("invdiff.plan._network_times", lambda *_: (2.0, 200.0))  # of one chunk
    assert _network_seconds(problem, prior, solver, 2) == prior.calls + 100 * prior.gradients


@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize("sampler", [*SAMPLERS, "euler:churn=0.3", "heun:churn=0.3"])
@pytest.mark.parametrize("name", [n for n in SOLVERS if issubclass(solver_class(n), Guided)])
def test_the_plan_knows_the_network_calls_of_every_sampler(name, sampler, slices):
    """DPS differentiates the network once a step, at the step's own x, however often a sampler calls it."""
    prior, problem = Bent(), make_problem(name, slices)
    few = {k: 1 for k in ("cg_iterations", "iterations") if k in solver_class(name).__dataclass_fields__}
    solver = make_solver(name, sampler=sampler, **few, **({"coupling": TVz()} if name == "pigdm" else {}))
    list(iterate(solver, problem, prior, solver.sigmas(5, problem, prior)))
    counted = prior.calls, prior.gradients
    assert counted == tuple(slices * n for n in solver.network_passes(problem, prior.chunk, 5))


def test_the_plan_spreads_the_network_calls_of_a_run_over_its_steps(monkeypatch):
    problem, solver = make_problem("dps", 2), make_solver("dps", sampler="heun")
    monkeypatch.setattr("invdiff.plan._network_times", lambda *_: (1e6, 1e8))  # beside which the rest is nothing
    _, step, _ = _seconds(problem, Bent(), solver, 5)
    assert abs(5 * step / (9 * 1e6 + 5 * 1e8) - 1) < 1e-3


def test_daps_calls_the_network_once_for_every_step_of_its_flow():
    assert second_of_three("daps", make_problem("daps", 2), Watched(), Counter(), ode_steps=3)[1] == 3


def test_daps_draws_a_hundred_langevin_steps_with_the_products_of_their_law():
    operator = Tallied()
    y = operator(torch.rand(3, 1, 16, 16)) + torch.randn(3, 1, 5, 16)
    terms = len(law(100, reach(1 - 0.99 / 2), 0.1 * torch.finfo(torch.float32).eps ** 0.5))
    found, _ = second_of_three("daps", whiten(y, operator, 1.0), Shrink(), operator.tally)
    assert found == (terms, terms) and terms < 30


def test_the_last_step_of_mbir_has_no_corrector():
    prior, problem = Watched(), make_problem("mbir", 2)
    solver = make_solver("mbir")
    for _ in iterate(solver, problem, prior, solver.sigmas(3, problem, prior)):
        pass
    assert prior.calls == 2 * (2 + 2 + 1)


def test_the_plan_counts_blocks_by_their_share_of_the_slices():
    few, many = (make_problem("pnp", n) for n in (8, 4 * SLICE_BLOCK))
    stacks, blocks, coupled = HELD["pnp"]
    plain, three_d = make_solver("pnp"), make_solver("pnp", coupling=TVz())
    assert stacks_held("pnp", plain, few) == stacks + blocks
    assert stacks_held("pnp", plain, many) == stacks + blocks / 4
    assert stacks_held("pnp", three_d, many) == stacks + blocks + coupled
