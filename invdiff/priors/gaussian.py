"""The exact Gaussian prior: the ground truth of the tests."""

import torch
from torch import Tensor

from invdiff.errors import ShapeError
from invdiff.priors.base import Prior, PriorInfo


class GaussianPrior(Prior):
    """x0 ~ N(mean, covariance) on flattened images of shape ``(C, H, W)``; everything in closed form.

    denoise(x, sigma) = mean + C (C + sigma^2 I)^-1 (x - mean).

    Args:
        mean: ``(C, H, W)``.
        covariance: ``(n, n)`` with n = C H W, symmetric positive semi-definite.

    Raises:
        ShapeError: the covariance does not fit the mean.
    """

    def __init__(self, mean: Tensor, covariance: Tensor):
        if covariance.shape != (mean.numel(), mean.numel()):
            raise ShapeError(
                f"GaussianPrior expects covariance ({mean.numel()}, {mean.numel()}), got {tuple(covariance.shape)}"
            )
        self.mean, self.covariance = mean, covariance
        self.variances, self.axes = torch.linalg.eigh(covariance)
        self.info = PriorInfo("gaussian", channels=mean.shape[0], sigma_min=0.0, sigma_max=float("inf"))

    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        self.calls += x[..., 0, 0, 0].numel()
        gain = self.variances / (self.variances + sigma**2)
        z = (x - self.mean).reshape(*x.shape[:-3], -1) @ self.axes
        return self.mean + ((z * gain) @ self.axes.T).reshape(x.shape)

    def denoise_turned(self, x: Tensor, sigma: float, turn: int) -> Tensor:
        """As every prior, but without the turns that an image of unequal sides does not survive."""
        square = x.shape[-1] == x.shape[-2]
        return super().denoise_turned(x, sigma, turn if square else turn & 3)

    def posterior(self, matrix: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(C, H, W)`` and covariance ``(n, n)`` of x0 given ``y = matrix x0 + n``, n of unit variance."""
        c = self.covariance
        gain = c @ matrix.T @ torch.linalg.inv(matrix @ c @ matrix.T + torch.eye(len(matrix), dtype=c.dtype))
        mean = self.mean.flatten() + gain @ (y.flatten() - matrix @ self.mean.flatten())
        return mean.reshape(self.mean.shape), c - gain @ matrix @ c
