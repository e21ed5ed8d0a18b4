"""Singular values of operators that the identity or the Fourier transform of a slice diagonalises."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.coupling import Coupling, coupled, smooth
from invdiff.data_step import point_spectrum
from invdiff.errors import UsageError
from invdiff.linalg import one_by_one, slice_dot, to_complex, to_real
from invdiff.problem import Problem

TOLERANCE = 1e-4  # of A^T A x against V S^2 V^T x, relative, for a random x
ZERO = {torch.float32: 1e-6, torch.float64: 1e-12}  # eigenvalues below, relative to the largest, are 0


@dataclass(frozen=True)
class Spectral:
    """A^T A = V S^2 V^T, V unitary.

    Attributes:
        fourier: V is the inverse discrete Fourier transform of each slice; False: the identity.
        complex_image: two channels are real and imaginary part.
        singular: s, in the basis: ``(1, slices, C, H, W)``, ``(..., H, W/2 + 1)`` for the transform of real images.
        known: V^T A^T y / s^2, 0 where s = 0; same shape.
    """

    fourier: bool
    complex_image: bool
    singular: Tensor
    known: Tensor

    def into(self, x: Tensor) -> Tensor:
        """V^T x."""
        if not self.fourier:
            return x
        if self.complex_image:
            return one_by_one(lambda u: torch.fft.fft2(to_complex(u), norm="ortho"), 3, x)
        return one_by_one(lambda u: torch.fft.rfft2(u, norm="ortho"), 3, x)

    def back(self, h: Tensor, like: Tensor) -> Tensor:
        """V h, of the shape of ``like``."""
        if not self.fourier:
            return h
        if self.complex_image:
            return one_by_one(lambda v: to_real(torch.fft.ifft2(v, norm="ortho")), 3, h)
        return one_by_one(lambda v: torch.fft.irfft2(v, s=like.shape[-2:], norm="ortho"), 3, h)


def drawn(
    problem: Problem,
    basis: Spectral,
    x0: Tensor,
    share: Callable[[], Tensor],
    sigma: float,
    coupling: Coupling | None,
    memory: dict[str, Tensor],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """V^T D, D and the new memory, D moved by what a coupling changes in the estimate that has met the data.

    D <- D + P(v) - v,  v = V (h - g (h - V^T A^+ y)),  h = V^T D,  P the minimiser of :func:`invdiff.coupling.smooth`.
    The published step corrects D by the data after it, so that a coupling never moves what they fix.

    Args:
        problem, basis: with their decomposition.
        x0: D ``(samples, slices, C, H, W)``.
        share: gives g in [0, 1], how far the step moves each coefficient to the data, in the basis; 0 where s = 0.
        sigma: noise level of D.
        coupling, memory: slice regulariser or None, and the memory of the solver.
    """
    h = basis.into(x0)
    if not coupled(coupling, problem):
        return h, x0, memory
    v = basis.back(h - share() * (h - basis.known), x0)
    u, memory = smooth(problem, v, sigma, coupling, memory)
    return h + basis.into(u - v), x0 + u - v, memory


def spectral(problem: Problem, name: str) -> Spectral:
    """The decomposition: missing pixels and denoising by pixels; circular blur and MRI with one coil by frequencies.

    Found by trial: A^T A of one random image per slice against both bases.

    Raises:
        UsageError: neither basis diagonalises A^T A; names the solver and others that fit.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(problem.image_shape, generator=g, dtype=problem.y.dtype).to(problem.y.device)
    image, back_projected = torch.empty_like(x), torch.empty_like(x)
    pixels = torch.ones_like(x)
    for b in problem.blocks():
        operator = problem.operator.restrict(b)
        image[b], back_projected[b] = operator.normal(x[b]), operator.adjoint(problem.y[b])
        pixels[b] = operator.normal(pixels[b])
    complex_image = problem.operator.complex_image
    for fourier in (False, True):
        power = (point_spectrum(problem) if fourier else pixels[None]).clamp_min(0)
        power = torch.where(power > ZERO[power.dtype] * power.amax(), power, 0.0)
        basis = Spectral(fourier, complex_image, power.sqrt(), power)
        error = basis.back(power * basis.into(x[None]), x)[0] - image
        if bool((slice_dot(error, error) <= TOLERANCE**2 * slice_dot(image, image)).all()):
            known = torch.where(power > 0, basis.into(back_projected[None]) / power.clamp_min(1e-30), 0.0)
            return Spectral(fourier, complex_image, power.sqrt(), known)
    raise UsageError(
        f"solver '{name}' needs singular values in closed form, which {type(problem.base).__name__} has not "
        "(missing pixels, denoising, circular blur and MRI with one coil have); try 'diffpir' or 'dds'"
    )


def first_slice(problem: Problem) -> Problem:
    """What a check before the run looks at."""
    return problem.restrict(slice(0, 1)) if problem.operator.slicewise else problem
