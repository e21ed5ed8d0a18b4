"""One problem for our solvers and deepinv's: prior, operator, data, noise levels and draws."""

import itertools
from itertools import pairwise

import pytest
import torch

from invdiff.draws import Draws
from invdiff.operators.adapters import from_deepinv
from invdiff.priors.gaussian import GaussianPrior
from invdiff.problem import whiten
from invdiff.schedule import vp_sigma
from invdiff.solvers import make_solver
from invdiff.solvers.base import State

dinv = pytest.importorskip("deepinv")

SIDE, COUNT = 8, 3  # pixels, samples
SHAPE = (1, SIDE, SIDE)
NOISE = 0.0625  # a power of 2: deepinv keeps it in float32
LIKE = torch.zeros(COUNT, 1, *SHAPE, dtype=torch.float64)
DRAWS = Draws(4, (0,), tuple(range(COUNT)))
EXACT = {"cg_iterations": 60, "cg_tolerance": 1e-15}


class Clipped(GaussianPrior):
    """A prior whose estimates are cut off."""

    low, high = -1.0, 1.0

    def denoise(self, x, sigma, context=None):
        return super().denoise(x, sigma).clamp(self.low, self.high)


class Exact(dinv.models.Denoiser):
    """A prior of ours as a denoiser of deepinv: of images in [0, 1], or in the prior's own range."""

    def __init__(self, prior, scale=2.0):
        super().__init__()
        self.prior, self.scale = prior, scale

    def forward(self, x, sigma, **unused):
        shift, sigma = self.scale - 1, float(torch.as_tensor(sigma, dtype=torch.float64).flatten()[0])
        return (self.prior.denoise(self.scale * x - shift, self.scale * sigma) + shift) / self.scale


class Torch:
    """torch as a module of deepinv sees it: float32 is float64, and draws are ours."""

    float32 = torch.float64

    def __init__(self, draw):
        self.draws = map(draw, itertools.count())

    def __getattr__(self, name):
        return getattr(torch, name)

    def randn_like(self, x):
        return next(self.draws).reshape(x.shape)


class Given(dinv.sampling.DDIMSolver):
    """deepinv's chain with our draws."""

    def __init__(self, times, eta):
        super().__init__(timesteps=times, eta=eta)
        self.count = itertools.count(1)

    def randn_like(self, input, seed=None):
        return DRAWS.normal(next(self.count), LIKE)[:, 0]


def draw(step):
    """Draws of one step, in deepinv's layout."""
    return DRAWS.normal(step, LIKE)[:, 0]


def physics_of(name):
    g = torch.Generator().manual_seed(1)
    noise = dinv.physics.GaussianNoise(NOISE)
    if name == "inpaint":
        mask = (torch.rand(SHAPE, generator=g) > 0.5).double()
        return dinv.physics.Inpainting(SHAPE, mask, noise_model=noise)
    if name.startswith("blur"):
        middle = 0.6 if name == "blur" else 0.3  # the other one loses frequencies
        kernel = torch.tensor([[0.0, 0.2, 0.0], [0.1, 0.0, 0.1], [0.05, 0.1, 0.05]], dtype=torch.float64)
        kernel = kernel * (1 - middle) / kernel.sum()
        kernel[1, 1] = middle
        kernel = kernel[None, None]
        return dinv.physics.BlurFFT(SHAPE, kernel, noise_model=noise)
    matrix = torch.randn(20, SIDE**2, generator=g, dtype=torch.float64) / SIDE  # no singular values handed out
    return dinv.physics.LinearPhysics(
        A=lambda x, **unused: x.flatten(1) @ matrix.T,
        A_adjoint=lambda y, **unused: (y @ matrix).reshape(-1, *SHAPE),
        img_size=SHAPE,
        noise_model=noise,
    )


class Case:
    """One problem on both sides."""

    def __init__(self, name, mean=0.1, prior=GaussianPrior, scale=0.5):
        self.physics = physics_of(name)
        p = torch.cartesian_prod(*2 * [torch.arange(float(SIDE), dtype=torch.float64)])
        covariance = 0.04 * torch.exp(-0.5 * (torch.cdist(p, p) / 1.5) ** 2) + 1e-3 * torch.eye(SIDE**2).double()
        self.prior = prior(torch.full(SHAPE, mean, dtype=torch.float64), covariance)
        root, z = torch.linalg.cholesky(covariance), DRAWS.normal(99, LIKE)[:2, 0].reshape(2, -1, 1)
        truth = scale * (mean + (root @ z[:1]).reshape(1, *SHAPE)) + 1 - scale
        y = self.physics.A(truth)
        self.y = y + NOISE * self.physics.A(z[1:].reshape(1, *SHAPE))
        self.problem = whiten(self.y, from_deepinv(self.physics, SHAPE), NOISE**2, scale=scale, shift=1 - scale)

    def steps(self, solver, sigmas, changes=None):
        """The states of a run from noise alone, options of step k changed by ``changes(k)``."""
        state = make_solver(solver[0], **solver[1]).init(self.problem, self.prior, sigmas, DRAWS)
        state = State(sigmas[0] * DRAWS.normal(0, LIKE), LIKE, 0, state.memory)
        for k, (sigma, after) in enumerate(pairwise(sigmas)):
            options = solver[1] | (changes(k, state, sigma, after) if changes else {})
            state = make_solver(solver[0], **options).step(self.problem, self.prior, state, sigma, after, DRAWS)
        return state.x0[:, 0]


def chain(case, fidelity, times, eta=1.0, weights=None, monkeypatch=None):
    """Images of deepinv's chain, in [-1, 1]; ``weights`` are those of the guidance per step."""
    monkeypatch.setattr("deepinv.sampling.noisy_datafidelity.torch", Torch(draw))
    inside = case.problem.scale == 0.5
    sde, solver = dinv.sampling.VariancePreservingDiffusion(), Given(times, eta)
    denoiser = Exact(case.prior, 2.0 if inside else 1.0)
    model = dinv.sampling.PosteriorDiffusion(fidelity, denoiser, sde, solver, minus_one_one=inside)
    x, y = sde.scale_t(times[0]) * sde.sigma_t(times[0]) * draw(0), case.y.expand(COUNT, *case.y.shape[1:])
    for k, (now, after) in enumerate(pairwise(times)):
        fidelity.weight = weights[k] if weights else fidelity.weight
        with torch.no_grad():
            x, _ = solver.step(model.posterior, now, after, x, y=y, physics=case.physics)
    return x  # the scale at time 0 is 1


TIMES = torch.linspace(1, 0, 13, dtype=torch.float64)
SIGMAS = [vp_sigma(float(t)) for t in TIMES[:-1]] + [0.0]


def close(a, b, tolerance=1e-9):
    return float((a - b).abs().max()) < tolerance * float(b.abs().max())
