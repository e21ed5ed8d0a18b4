"""DDRM: a diffusion chain in the singular basis of the operator."""

import math
from dataclasses import dataclass

import torch

from invdiff.coupling import Coupling
from invdiff.errors import UsageError
from invdiff.solvers.base import State
from invdiff.solvers.chain import Chain
from invdiff.solvers.spectral import Spectral, drawn, first_slice, spectral


@dataclass(frozen=True)
class DDRM(Chain):
    """DDRM (Kawar et al. 2022, equations 7 and 8), in the convention x = x0 + sigma n.

    With A = U S V^T, h = V^T D(x; sigma), e = V^T (x - D) / sigma, yb = V^T A^+ y, y whitened, per singular value s:
    s = 0           h + sigma' (sqrt(1 - eta^2) e + eta z)
    sigma' < 1 / s  h + sigma' (sqrt(1 - eta^2) s (yb - h) + eta z)
    sigma' >= 1 / s (1 - eta_b) h + eta_b yb + sqrt(sigma'^2 - eta_b^2 / s^2) z

    The start is yb + sqrt(sigma^2 - 1 / s^2) z where sigma s > 1, else sigma z; the end is D. Published: 20 steps, even
    in time; here even in log-SNR.

    On a Gaussian prior the mean is not that of the posterior: each frequency or pixel is the datum itself until the
    noise level falls below its noise, and D alone afterwards, never their mean weighted by precision.

    On 4 x 4 pixels, half of them missing (spread 0.4, noise 0.05, default options) the mean is off by 22 % of its norm,
    with 1.1 times the variance of the posterior.

    Volumes held: 12; 4 more with a coupling: x and D of two steps, z, singular values and data, six in the basis
    (complex ones of half size).

    Args:
        eta, eta_b: shares, in [0, 1]; published 0.85 and 1.
        coupling: slice regulariser of the estimate that has met the data, or None; D takes over what it changes.
        sigma_max, sigma_min, schedule: of :class:`Chain`.

    Raises:
        UsageError: shares out of range; an operator without singular values in closed form.
    """

    eta: float = 0.85
    eta_b: float = 1.0
    coupling: Coupling | None = None

    stochastic = True
    default_steps = 20

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.eta <= 1 and 0 <= self.eta_b <= 1):
            raise UsageError(f"solver ddrm needs eta and eta_b in [0, 1], got {self.eta} and {self.eta_b}")

    def require(self, problem):
        spectral(first_slice(problem), "ddrm")

    def init(self, problem, prior, sigmas, rng):
        basis = spectral(problem, "ddrm")
        zero = torch.zeros(len(rng.samples), *problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        z, seen = basis.into(rng.normal(0, zero)), sigmas[0] * basis.singular > 1
        spread = (sigmas[0] ** 2 - basis.singular.clamp_min(1 / sigmas[0]) ** -2).clamp_min(0).sqrt()
        x = basis.back(torch.where(seen, basis.known + spread * z, sigmas[0] * z), zero)
        return State(x, zero, 0, {"singular": basis.singular, "known": basis.known})

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        x0 = prior.denoise(state.x, sigma)
        s, known = state.memory["singular"], state.memory["known"]
        basis = Spectral(known.is_complex(), problem.operator.complex_image, s, known)
        kept, eps = math.sqrt(1 - self.eta**2), (state.x - x0) / sigma
        share = lambda: torch.where(sigma_next * s >= 1, self.eta_b, sigma_next * kept * s)  # noqa: E731
        h, x0, memory = drawn(problem, basis, x0, share, sigma, self.coupling, state.memory)
        if sigma_next == 0:
            return State(x0, x0, state.step + 1, memory)
        e, z = basis.into(eps), basis.into(rng.normal(state.step + 1, x0))
        below = h + sigma_next * (kept * torch.where(s > 0, s * (known - h), e) + self.eta * z)
        spread = (sigma_next**2 - (self.eta_b / s.clamp_min(1e-30)) ** 2).clamp_min(0).sqrt()
        above = (1 - self.eta_b) * h + self.eta_b * known + spread * z
        x = basis.back(torch.where(sigma_next * s >= 1, above, below), x0)
        return State(x, x0, state.step + 1, memory)
