"""Annealed plug-and-play: half-quadratic splitting with the denoiser, no noise injected."""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.coupling import Coupling
from invdiff.data_step import data_step, point_spectrum
from invdiff.errors import UsageError
from invdiff.linalg import gaussian_blur
from invdiff.problem import Problem
from invdiff.solvers.base import State
from invdiff.solvers.chain import Chain

EXPLAINED = 0.5  # what the last data step may leave unexplained, in units of the noise: a quarter of chi-squared


def pseudo_inverse(problem: Problem) -> Tensor:
    """Pseudo-inverse of the measured data (FBP for CT), ``(1, slices, C, H, W)``; zero where the operator has none."""
    out = torch.zeros(problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
    for b in problem.blocks():
        pinv = getattr(problem.base.restrict(b), "pinv", None)
        if pinv is not None:
            out[b] = (pinv(problem.measured[b]) - problem.shift) / problem.scale
    return out[None]


def warm_start(
    problem: Problem, spectrum: Tensor | None = None, *, spread: float = 0.3, blur: float = 4.0, iterations: int = 10
) -> Tensor:
    """A start without a prior: ridge estimate around the blurred pseudo-inverse, ``(1, slices, C, H, W)``.

    argmin 1/2 |A u - y|^2 + |u - G u_pinv|^2 / (2 spread^2), a few CG iterations, G a Gaussian of ``blur`` pixels. Data
    of low weight (rays through both arms, say) put streaks into a pseudo-inverse that no denoiser removes later, and
    which the weights keep out of this start: on one such slice the result of ``pnp`` rose from 27.4 to 32.3 dB.
    ``spectrum`` is that of :func:`point_spectrum`, where the caller has it already.
    """
    z = gaussian_blur(pseudo_inverse(problem), blur)
    spectrum = point_spectrum(problem) if spectrum is None else spectrum
    return data_step(problem, z, 1 / spread**2, z, iterations=iterations, spectrum=spectrum)[0]


@dataclass(frozen=True)
class PnP(Chain):
    """Annealed half-quadratic splitting (Zhang et al. 2021, DPIR, equations 6 and 7), deterministic.

    z_k = D(x_k + m (x_k - x_{k-1}); sigma_k);  x_{k+1} = argmin 1/2 |A u - y|^2 + lam / (2 sigma_k^2) |u - z_k|^2.

    Published: data steps in closed form, 8 levels even in log-SNR from 49 / 255 of the range to the noise of the data,
    whose lam 0.23 this one's is near; here the levels are those of :class:`Chain`, whatever the noise.

    ``momentum`` m extrapolates what the denoiser sees (Nesterov's, as in Kamilov, Mansour and Wohlberg 2017; published
    here: 0). What the data do not measure moves by the denoiser alone, a little at a step, and few steps end on the
    way: 40 steps with 0.7 reach what 160 reach without (MRI of one coil, three training slices: 28.0 dB with 40 steps
    and no momentum, 30.4, and 30.5 with 160). Where whole directions of frequencies are missing a large one overshoots.

    CG starts from x_k + z_k - z_{k-1}, which carries over what the last data step had already fitted. The denoiser
    sees a different flip or turn of the slice at every step (Terris et al. 2024, equivariant plug-and-play), which
    averages out its directional errors at no cost.

    On a Gaussian prior the fixed point is not the posterior mean: D already shrinks by the prior at sigma_k, and the
    annealing ends before the fixed point of any single sigma is reached. There is one result and no spread.

    On 4 x 4 pixels (spread 0.4, noise 0.05, default options) the result is off by 17.5 % of the norm of the posterior's
    mean where half of the pixels are missing, by 10.9 % for averages of 2 x 2.

    Volumes held: 7, and 8 of 32 slices; 5 more with a coupling: x of three steps, z of two, half a one of spectrum, CG
    (and twice the data, where these are fewer than the pixels).

    Args:
        lam: weight of the denoised image against the whitened data; 1 is the Bayesian weight of an error of
            standard deviation sigma_k.
        cg_iterations: most iterations of the data step.
        cg_tolerance, cg_reduction: residual relative to the right-hand side, and to that of the step's start, at which
            a slice stops.
        cg_error: RMS error of the data step, in units of sigma_k, at which a slice stops too: the next denoising takes
            away more than that; an estimate. With fewer data than pixels the last step goes on until it has explained
            the data too (:mod:`invdiff.data_space`).
        momentum: extrapolation before the denoiser, in [0, 1), from the third step on.
        turns: flip and turn slices from step to step; a prior of several planes sees one at a step, else all.
        start_blur: of the pseudo-inverse around which the start is fitted, in pixels.
        polish: noise level of one more denoising of the result, in units of the noise that the data leave in a pixel,
            1 / sqrt(mean square of the whitened columns), where the prior knows that level; 0 for none. For data that
            show the image itself.
        coupling: slice regulariser, or None.
        sigma_max, sigma_min, schedule: noise levels of the denoiser, see :class:`Chain`.
    """

    lam: float = 0.22
    sigma_max: float = 0.3
    sigma_min: float = 0.01
    cg_iterations: int = 100
    cg_tolerance: float = 1e-6
    cg_reduction: float = 0.02
    cg_error: float = 0.1
    momentum: float = 0.6
    turns: bool = True
    start_blur: float = 4.0
    polish: float = 0.0
    coupling: Coupling | None = None

    default_steps = 20

    def __post_init__(self):
        super().__post_init__()
        if not (self.lam > 0 and self.cg_iterations >= 1):
            raise UsageError(
                f"solver pnp needs lam > 0 and cg_iterations >= 1, got {self.lam} and {self.cg_iterations}"
            )
        if not 0 <= self.momentum < 1:
            raise UsageError(f"solver pnp needs momentum in [0, 1), got {self.momentum}")

    @property
    def turning(self) -> bool:  # type: ignore[override]
        return self.turns

    def init(self, problem, prior, sigmas, rng):
        spectrum = point_spectrum(problem)
        x = warm_start(problem, spectrum, blur=self.start_blur)
        return State(x, x, 0, {"spectrum": spectrum})

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        m = state.memory
        x, turn = state.x, 3 * state.step
        ahead = (x - m["before"]).mul_(self.momentum).add_(x) if "before" in m else x
        z = prior.denoise_turned(ahead, sigma, turn) if self.turns else prior.denoise(ahead, sigma)
        del ahead
        before = {"before": x} if self.momentum and state.step else {}  # not the start, which knows no prior
        x, memory = data_step(
            problem,
            z,
            self.lam / sigma**2,
            x + z - m["z"] if "z" in m else z,
            iterations=self.cg_iterations,
            tolerance=self.cg_tolerance,
            reduction=self.cg_reduction,
            error=self.cg_error * sigma,
            residual=0.0 if sigma_next else EXPLAINED,
            spectrum=m["spectrum"],
            coupling=self.coupling,
            memory=m,
        )
        x0 = x
        if self.polish and sigma_next == 0:
            rest = self.polish / problem.operator.mean_square**0.5
            x0 = prior.denoise(x, rest) if rest >= prior.info.sigma_min else x
        return State(x, x0, state.step + 1, {**memory, "z": z, **before})
