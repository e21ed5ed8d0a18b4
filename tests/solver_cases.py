"""A 4 x 4 case whose posterior is known, and published steps by hand, for the tests of solvers.

With a Gaussian prior most solvers are affine in data and draws. An affine expression is a matrix here: columns for the
state x, for the constant 1 and for every draw, so that the algorithm box can be written down as it stands; mean and
covariance of the result follow exactly, for the code from runs on unit vectors in place of random draws.
"""

import math
from itertools import pairwise

import numpy as np
import torch

from invdiff.draws import Draws
from invdiff.operator import LinearOperator
from invdiff.operators import build
from invdiff.priors.base import Prior, PriorInfo
from invdiff.priors.gaussian import GaussianPrior
from invdiff.problem import whiten
from invdiff.solvers.base import solve

SIDE, SLICES = 4, 2
PUBLISHED = [157.41, 84.3, 3.424, 0.339, 0.1, 0.01, 0.0]  # first and last levels of the linear VP chain of 1000 steps


class Dense(LinearOperator):
    """A matrix on images ``(C, 4, 4)``."""

    def __init__(self, matrix, complex_image=False):
        channels = matrix.shape[1] // SIDE**2
        self.matrix, self.complex_image = torch.as_tensor(matrix), complex_image
        self.in_shape, self.out_shape = (channels, SIDE, SIDE), (len(matrix),)

    def forward(self, x):
        return x.flatten(-3) @ self.matrix.T.to(x.dtype)


class Stacked(LinearOperator):
    """A matrix that mixes two slices."""

    slicewise = False

    def __init__(self, matrix):
        self.matrix, self.in_shape, self.out_shape = matrix, (SLICES, 1, SIDE, SIDE), (len(matrix),)

    def forward(self, x):
        return x.flatten(-4) @ self.matrix.T


def matrices(name):
    """Dense matrices made without the operators of the package, and CT's from its columns."""
    eye, n = np.eye(SIDE**2), SIDE**2
    if name == "mask":
        return eye[[0, 1, 3, 6, 7, 8, 10, 13]]
    if name == "blur":
        kernel = np.zeros((SIDE, SIDE))
        kernel[:2, :2] = [[0.5, 0.2], [0.2, 0.1]]
        return np.stack([np.roll(kernel, (i, j), (0, 1)).ravel() for i in range(SIDE) for j in range(SIDE)])
    if name == "average":
        return np.kron(np.kron(np.eye(2), [0.5, 0.5]), np.kron(np.eye(2), [0.5, 0.5]))
    if name == "ct":
        operator = build("ct-sparse", (SIDE, SIDE), (1.0, 1.0), views=6)
        columns = operator(torch.eye(n, dtype=torch.float64).reshape(n, 1, SIDE, SIDE)).reshape(n, -1).numpy().T
        return columns / np.linalg.norm(columns, 2)
    f = np.kron(np.fft.fft(np.eye(SIDE)), np.fft.fft(np.eye(SIDE)))[[0, 1, 3, 4, 5, 12, 15]] / SIDE
    return np.block([[f.real, -f.imag], [f.imag, f.real]])


def gaussian(channels, spread=0.4, white=False):
    """Prior of images whose neighbours are alike."""
    p = np.stack(np.meshgrid(range(SIDE), range(SIDE), indexing="ij"), -1).reshape(-1, 2)
    c = spread**2 * np.exp(-0.5 * ((p[:, None] - p[None]) ** 2).sum(-1) / 1.5**2) + 1e-3 * np.eye(SIDE**2)
    c = np.kron(np.eye(channels), spread**2 * np.eye(SIDE**2) if white else c)
    mean = np.linspace(-0.3, 0.4, len(c)).reshape(channels, SIDE, SIDE)
    prior = GaussianPrior(torch.from_numpy(mean), torch.from_numpy(c))
    prior.chunk = 1
    return prior


class Case:
    """Problem, prior and what the hand-written algorithms need of them, in numpy and in units of the data."""

    def __init__(self, name, noise, white=False, slices=SLICES):
        self.a, self.noise = matrices(name), noise
        self.n = self.a.shape[1]
        self.prior = gaussian(self.n // SIDE**2, white=white)
        self.c, self.mean = self.prior.covariance.numpy(), self.prior.mean.numpy().ravel()
        rng = np.random.default_rng(1)
        root = np.linalg.cholesky(self.c)  # not eigenvectors, which depend on the processor where values are equal
        truth = self.mean + rng.standard_normal((slices, self.n)) @ root.T
        self.y = truth @ self.a.T + noise * rng.standard_normal((slices, len(self.a)))
        self.problem = whiten(torch.from_numpy(self.y), Dense(self.a, name == "fft"), noise**2)

    def gain(self, sigma):
        return self.c @ np.linalg.inv(self.c + sigma**2 * np.eye(self.n))

    def denoise(self, x, sigma, one):
        """E[x0 | x] of an affine expression ``x``."""
        gain = self.gain(sigma)
        return gain @ x + np.outer((np.eye(self.n) - gain) @ self.mean, one)

    def posterior(self, s):
        gain = self.c @ self.a.T @ np.linalg.inv(self.a @ self.c @ self.a.T + self.noise**2 * np.eye(len(self.a)))
        return self.mean + gain @ (self.y[s] - self.a @ self.mean), self.c - gain @ self.a @ self.c


class Symbols:
    """The affine expressions x, 1 and z_1, z_2, ... in n unknowns."""

    def __init__(self, n, draws):
        whole = np.eye(n + 1 + draws * n)
        self.x, self.one = whole[:n], whole[n]
        self.z = [whole[n + 1 + k * n : n + 1 + (k + 1) * n] for k in range(draws)]


def vp(sigma):
    return 1 / (1 + sigma**2)


def diffpir(case, y, s, sigma, after, k, *, lam, zeta):
    """Algorithm 1 of the paper, in its variables."""
    at, as_, rho = vp(sigma), vp(after), lam * case.noise**2 / sigma**2
    x = math.sqrt(at) * s.x
    x0 = case.denoise(x / math.sqrt(at), sigma, s.one)
    system = case.a @ case.a.T + rho * np.eye(len(case.a))  # (A^T A + rho)^-1 A^T = A^T (A A^T + rho)^-1
    x0 = x0 + case.a.T @ np.linalg.solve(system, np.outer(y, s.one) - case.a @ x0)
    eps = (x - math.sqrt(at) * x0) / math.sqrt(1 - at)
    x = math.sqrt(as_) * x0 + math.sqrt(1 - as_) * (math.sqrt(1 - zeta) * eps + math.sqrt(zeta) * s.z[0])
    return x / math.sqrt(as_)


def pigdm(case, y, s, sigma, after, k, *, eta, adaptive=True, sigma_data=1.0):
    """Algorithm 1 of the paper with the code's weight of g, in their variables."""
    at, as_ = vp(sigma), vp(after)
    r2 = sigma**2 * sigma_data**2 / (sigma**2 + sigma_data**2)
    x = math.sqrt(at) * s.x
    x0 = case.denoise(x / math.sqrt(at), sigma, s.one)
    eps = (x - math.sqrt(at) * x0) / math.sqrt(1 - at)
    jacobian = case.gain(sigma) / math.sqrt(at)
    system = r2 * case.a @ case.a.T + case.noise**2 * np.eye(len(case.a))
    score = jacobian.T @ case.a.T @ np.linalg.solve(system, np.outer(y, s.one) - case.a @ x0)  # of p(y | x)
    c1 = eta * math.sqrt(max(0.0, (1 - at / as_) * (1 - as_) / (1 - at)))
    c2 = math.sqrt(max(0.0, 1 - as_ - c1**2))
    if adaptive:
        x = math.sqrt(as_) * x0 + c1 * s.z[0] + c2 * eps + math.sqrt(as_) * math.sqrt(at) * r2 * score
    else:  # DDIM with the conditional score
        x0, eps = x0 + (1 - at) / math.sqrt(at) * score, eps - math.sqrt(1 - at) * score
        x = math.sqrt(as_) * x0 + c1 * s.z[0] + c2 * eps
    return x / math.sqrt(as_)


def daps(case, y, s, sigma, after, k, *, steps, langevin, ode_steps, rate, weight):
    """Algorithm 1 of the paper; inner levels of degree 7 down to 0.01, the step of the Langevin iteration falls."""
    seventh = lambda j: sigma ** (1 / 7) + j / ode_steps * (0.01 ** (1 / 7) - sigma ** (1 / 7))  # noqa: E731
    levels = [seventh(j) ** 7 for j in range(ode_steps + 1)]
    z = s.x
    for now, then in pairwise(levels):
        z = z + (then - now) * (z - case.denoise(z, now, s.one)) / now
    largest = np.linalg.norm(case.a, 2) ** 2 / case.noise**2
    h = rate * (1 - 0.99 * k / (steps - 1)) / (weight * largest + 1 / sigma**2)
    u = z
    for j in range(langevin):
        grad = weight * case.a.T @ (case.a @ u - np.outer(y, s.one)) / case.noise**2 + (u - z) / sigma**2
        u = u - h * grad + math.sqrt(2 * h) * s.z[j]
    return u + after * s.z[langevin]


def ddrm(case, y, s, sigma, after, k, *, eta, eta_b):
    """Equations 7 and 8 of DDRM, with numpy's singular vectors, noise of the data in their units."""
    if after == 0:
        return case.denoise(s.x, sigma, s.one)
    u, values, vt = np.linalg.svd(case.a)
    values = np.concatenate([values, np.zeros(case.n - len(values))])
    h0 = vt @ case.denoise(s.x, sigma, s.one)
    h, z, out = vt @ s.x, vt @ s.z[0], np.zeros_like(h0)
    for i, v in enumerate(values):
        if v < 1e-9:
            out[i] = h0[i] + math.sqrt(1 - eta**2) * after * (h[i] - h0[i]) / sigma + eta * after * z[i]
            continue
        ybar = (u.T @ y)[i] / v * s.one
        if after < case.noise / v:
            out[i] = h0[i] + math.sqrt(1 - eta**2) * after * (ybar - h0[i]) / (case.noise / v) + eta * after * z[i]
        else:
            out[i] = (1 - eta_b) * h0[i] + eta_b * ybar + math.sqrt(after**2 - (eta_b * case.noise / v) ** 2) * z[i]
    return vt.T @ out


def ddnm(case, y, s, sigma, after, k, *, eta):
    """x0 - A^+ (A x0 - y), equation 9 of DDNM."""
    x0 = case.denoise(s.x, sigma, s.one)
    better = x0 - np.linalg.pinv(case.a, rcond=1e-9) @ (case.a @ x0 - np.outer(y, s.one))
    return better + after * (eta * s.z[0] + math.sqrt(1 - eta**2) * (s.x - x0) / sigma)


def law(case, y, step, sigmas, draws, **options):
    """Mean and covariance of the result, propagated through the hand-written steps from x = sigma_max z."""
    mean, covariance = np.zeros(case.n), sigmas[0] ** 2 * np.eye(case.n)
    s = Symbols(case.n, draws)
    for k, (sigma, after) in enumerate(pairwise(sigmas)):
        m = step(case, y, s, sigma, after, k, **options)
        f, b, noise = m[:, : case.n], m[:, case.n], m[:, case.n + 1 :]
        mean, covariance = f @ mean + b, f @ covariance @ f.T + noise @ noise.T
    return mean, covariance


class Units(Draws):
    """Sample 0 draws nothing, the others one unit vector each in one draw: the columns of an affine map."""

    @classmethod
    def of(cls, n, draws, slices):
        return cls(0, slices, tuple(range(1 + n * draws)))

    def normal(self, step, like):
        out, n = torch.zeros_like(like), like[0, 0].numel()
        assert step * n < len(self.samples) - 1  # a draw that was not foreseen
        out[1 + step * n : 1 + (step + 1) * n] = torch.eye(n, dtype=like.dtype).reshape(n, 1, *like.shape[2:])
        return out


def law_of(solver, case, sigmas, draws):
    """Mean ``(slices, n)`` and covariance ``(slices, n, n)`` of the running code, exactly."""
    out = solve(solver, case.problem, case.prior, sigmas=sigmas, rng=Units.of(case.n, draws, tuple(range(SLICES))))
    out = out.reshape(len(out), SLICES, case.n).numpy()
    jacobian = out[1:] - out[0]
    return out[0], np.einsum("ksi,ksj->sij", jacobian, jacobian)


EXACT = {"cg_iterations": 60, "cg_tolerance": 1e-16}


class Local(Prior):
    """A non-linear denoiser without matrix products: the bits of a slice depend on that slice alone."""

    def __init__(self, chunk=1):
        self.info, self.chunk, self.seen = PriorInfo("local", sigma_max=50.0), chunk, []

    def denoise(self, x, sigma, context=None):
        self.seen.append(sigma)
        self.calls += x[..., 0, 0, 0].numel()
        smooth = (x + x.roll(1, -1) + x.roll(-1, -1) + x.roll(1, -2) + x.roll(-1, -2)) / 5
        return torch.tanh((x + sigma * smooth) / (1 + sigma)) / (1 + sigma**2)
