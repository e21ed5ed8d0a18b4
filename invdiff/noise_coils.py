"""Noise of several coils, correlated between them."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.noise import Noise


@dataclass(frozen=True, eq=False)
class ComplexGaussian(Noise):
    """Circular noise of the coils of a scanner, independent between samples: ``y = clean + n``, ``n ~ CN(0, Psi)``.

    Real and imaginary part have half of the variance each, ``E n n^H = Psi``. Data are ``(..., 2 * coils, H, W)``: the
    real parts of all coils, then their imaginary parts. :attr:`whitener` W makes every channel's noise independent with
    variance 1: solve ``W y = (W S) F x`` with maps ``W S`` (Pruessmann et al. 2001, section on noise).

    Args:
        covariance: Psi, complex ``(coils, coils)``, Hermitian and positive definite.

    Raises:
        ShapeError: it is not square.
        InputError: it is not Hermitian or not positive definite.
    """

    covariance: Tensor

    model = "complex-gaussian"

    def __post_init__(self):
        psi = torch.as_tensor(self.covariance).to(torch.complex128)
        if psi.ndim != 2 or psi.shape[0] != psi.shape[1]:
            raise ShapeError(f"noise covariance expects (coils, coils), got {tuple(psi.shape)}")
        if not torch.allclose(psi, psi.mH, rtol=1e-5, atol=1e-8 * float(psi.abs().max())):
            raise InputError("noise covariance is not Hermitian: estimate it as the mean of n n^H")
        if int(torch.linalg.cholesky_ex(psi).info):
            raise InputError("noise covariance is not positive definite: estimate it from more noise samples")
        object.__setattr__(self, "covariance", psi)

    @cached_property
    def _factor(self) -> Tensor:
        return torch.linalg.cholesky(self.covariance)

    @property
    def whitener(self) -> Tensor:
        """``sqrt(2) L^-1`` with ``Psi = L L^H``, complex128 ``(coils, coils)``."""
        eye = torch.eye(len(self._factor), dtype=self._factor.dtype)
        return math.sqrt(2) * torch.linalg.solve_triangular(self._factor, eye, upper=False)

    def whiten(self, y: Tensor) -> Tensor:
        """``W y``, ``(..., 2 * coils, H, W)``, of data with that shape; also applied to coil maps stacked like it."""
        return _mix(self.whitener, self._checked(y))

    def _checked(self, y: Tensor) -> Tensor:
        if y.ndim < 3 or y.shape[-3] != 2 * len(self.covariance):
            raise ShapeError(f"noise of {len(self.covariance)} coils expects (..., {2 * len(self.covariance)}, H, W), "
                             f"got {tuple(y.shape)}")  # fmt: skip
        return y

    def sample(self, clean, generator):
        white = torch.from_numpy(generator.standard_normal(clean.shape) / math.sqrt(2))
        return clean + _mix(self._factor, self._checked(white)).numpy().astype(clean.dtype)

    def variance(self, y):
        """Of each channel by itself, ``Psi_cc / 2``; exact for the data step only where Psi is diagonal."""
        half = self.covariance.diagonal().real.repeat(2) / 2
        return half.to(y)[:, None, None]

    def log_likelihood(self, y, clean):
        """``-n^H Psi^-1 n - log det(pi Psi)`` of each sample, ``(..., H, W)``: the coils together."""
        white = _mix(self.whitener, self._checked(y - clean))
        determinant = 2 * self._factor.diagonal().real.log().sum() + len(self.covariance) * math.log(math.pi)
        return -white.square().sum(-3) / 2 - float(determinant)

    def describe(self):
        return {"model": self.model, "covariance_real": self.covariance.real.tolist()} | {
            "covariance_imag": self.covariance.imag.tolist()
        }


def _mix(matrix: Tensor, y: Tensor) -> Tensor:
    """A complex matrix on the coils of ``(..., 2 * coils, H, W)``, in real numbers."""
    a, b = matrix.real.to(y), matrix.imag.to(y)
    both = torch.cat([torch.cat([a, -b], 1), torch.cat([b, a], 1)])
    return torch.einsum("ij,...jhw->...ihw", both, y)
