"""Denoising: the measurement is the image itself."""

from torch import Tensor

from invdiff.operator import LinearOperator
from invdiff.operators.base import check_plane, check_sizes


class Identity(LinearOperator):
    """``y = x``, images ``(..., *in_shape)`` of any dtype on any device.

    Args:
        in_shape: shape of a slice, such as (1, H, W).

    Raises:
        UsageError: sizes that are not positive whole numbers.
    """

    norm = 1.0
    mean_square = 1.0

    pinv_kind = "measured"

    def __init__(self, in_shape: tuple[int, ...]):
        self.in_shape = self.out_shape = check_sizes(in_shape)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def _adjoint(self, y: Tensor) -> Tensor:
        return y

    def pinv(self, y: Tensor) -> Tensor:
        """The exact inverse, ``y``."""
        return self.adjoint(y)

    def prox(self, z: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
        """argmin_u 1/2 |u - y|^2 + weight/2 |u - z|^2 = ``(y + weight z) / (1 + weight)``.

        Args:
            z, y: ``(..., *in_shape)``.
            weight: positive; a number, or a tensor that broadcasts, one per slice.
        """
        return (self.adjoint(y) + weight * self(z)) / (1 + weight)


def denoise(shape, pixel_mm) -> Identity:
    """The identity on slices (H, W); the noise is not here."""
    shape, _ = check_plane(shape, pixel_mm)
    return Identity((1, *shape))
