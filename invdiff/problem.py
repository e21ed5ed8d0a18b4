"""The whitened inverse problem that solvers see: unit noise, image in the prior's range."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.operator import LinearOperator

SLICE_BLOCK = 32  # slices per data step where slices are independent: bounds the work memory


class Whitened(LinearOperator):
    """``scale * W^(1/2) A``: rows divided by the noise standard deviation, images in the prior's range.

    Args:
        operator: A, in physical units.
        root_weights: W^(1/2) = 1 / standard deviation, ``(slices, *out_shape)``.
        scale: physical image = scale * u + shift.
        uniform: the number that all ``root_weights`` are, where they are one; spares operators the weights.
    """

    def __init__(self, operator: LinearOperator, root_weights: Tensor, scale: float, uniform: float | None = None):
        self.operator, self.root_weights, self.scale, self.uniform = operator, root_weights, scale, uniform
        self.in_shape, self.out_shape, self.slicewise = operator.in_shape, operator.out_shape, operator.slicewise
        self.complex_image = operator.complex_image
        self._span = 0, len(root_weights)  # of the slices for which `restrict` was first asked, which share _certain
        self._certain: dict[tuple[int, int], Tensor] = {}

    @property
    def measured_fraction(self) -> float:  # type: ignore[override]
        """That of the operator, which may have to count its samples."""
        return self.operator.measured_fraction

    def forward(self, x: Tensor) -> Tensor:
        return self.root_weights.to(x.dtype) * (self.scale * self.operator(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.scale * self.operator.adjoint(self.root_weights.to(y.dtype) * y)

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        if self.uniform is not None and weights is None:
            return (self.scale * self.uniform) ** 2 * self.operator.normal(x)
        own = self.root_weights.to(x.dtype) ** 2
        return self.scale**2 * self.operator.normal(x, own if weights is None else weights * own)

    def gram(self, y: Tensor) -> Tensor:
        root = self.root_weights.to(y.dtype)
        return self.scale**2 * (root * self.operator.gram(root * y))

    @property
    def row_squares(self) -> Tensor | None:
        """Of the operator, each row with its weight, ``(slices, *out_shape)``; None where it has none."""
        rows = self.operator.row_squares
        return None if rows is None else (self.scale * self.root_weights) ** 2 * rows.to(self.root_weights)

    @property
    def certainty(self) -> Tensor | None:
        """Mean weight of the data that see a pixel, A^T W 1 / A^T 1, relative to that of the middle of its slice,
        ``(slices, *in_shape)``; None where all data weigh the same, or A is not known to be non-negative.

        Computed once for each range of slices and kept: as much memory as the images that it is asked for.

        Source: J. A. Fessler and S. D. Booth, IEEE Trans. Image Process. 8 (1999) 688-699.
        """
        if self.uniform is not None or not hasattr(self.operator, "sensitivities"):
            return None
        if self._span not in self._certain:
            first, end = self._span
            for a, b in [span for span in self._certain if span[0] < end and first < span[1]]:
                del self._certain[a, b]  # of another number of slices at a time, which is over
            self._certain[self._span] = self._mean_weight()
        return self._certain[self._span]

    def _mean_weight(self) -> Tensor:
        tiny = torch.finfo(self.root_weights.dtype).tiny
        seen = self.operator.adjoint(torch.ones_like(self.root_weights[:1] if self.slicewise else self.root_weights))
        mean = self.operator.adjoint(self.root_weights**2) / seen.clamp_min(tiny)
        height, width = mean.shape[-2:]
        middle = mean[..., height // 2, width // 2, None, None]
        return (mean / middle.clamp_min(tiny)).clamp_max(1e6)

    def restrict(self, slices: slice) -> "Whitened":
        if isinstance(slices, slice) and slices.indices(len(self.root_weights)) == (0, len(self.root_weights), 1):
            return self
        part = Whitened(self.operator.restrict(slices), self.root_weights[slices], self.scale, self.uniform)
        if isinstance(slices, slice) and slices.step in (None, 1):
            start, stop, _ = slices.indices(len(self.root_weights))
            part._span, part._certain = (self._span[0] + start, self._span[0] + stop), self._certain
        return part

    def to(self, device) -> "Whitened":
        return Whitened(self.operator.to(device), self.root_weights.to(device), self.scale, self.uniform)

    def _probe(self) -> Tensor:
        probe = self.operator._probe()
        return probe.expand(len(self.root_weights), *self.in_shape) if self.slicewise else probe


@dataclass(frozen=True)
class Problem:
    """Find u with ``y = A u + n``, n of unit variance; the physical image is ``scale * u + shift``.

    Attributes:
        y: whitened data, ``(slices, *out_shape)``; ``out_shape`` where the operator acts on the whole stack.
        operator: whitened operator.
        measured: data in physical units, for baselines such as FBP.
        scale, shift: the affine map of the image.
        spacing: distance between slices and pixel size, mm, as (slice, row, column).
        block: most slices per data step, where slices are independent; changes memory and not results.
    """

    y: Tensor
    operator: LinearOperator
    measured: Tensor
    scale: float = 1.0
    shift: float = 0.0
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    block: int = SLICE_BLOCK

    @property
    def base(self) -> LinearOperator:
        """The operator in physical units."""
        return self.operator.operator if isinstance(self.operator, Whitened) else self.operator

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(slices, C, H, W)``."""
        return (len(self.y), *self.operator.in_shape) if self.operator.slicewise else self.operator.in_shape

    def restrict(self, slices: slice) -> "Problem":
        """The problem of those slices alone."""
        return Problem(
            self.y[slices],
            self.operator.restrict(slices),
            self.measured[slices],
            self.scale,
            self.shift,
            self.spacing,
            self.block,
        )

    def blocks(self) -> list[slice]:
        """Slices in groups of at most ``block``; one group of all where the operator couples them."""
        if not self.operator.slicewise:
            return [slice(None)]
        n = len(self.y)
        return [slice(i, min(i + self.block, n)) for i in range(0, n, self.block)]

    def chi_squared(self, u: Tensor) -> float:
        """Mean squared whitened residual of ``u`` ``(..., slices, C, H, W)``: 1 for the truth."""
        total = sum(
            float((self.operator.restrict(b)(u[..., b, :, :, :]) - self.y[b]).square().sum()) for b in self.blocks()
        )
        data = self.y.numel() * self.base.measured_fraction
        return total / (data * (u.numel() // math.prod(self.image_shape)))


def whiten(
    y: Tensor,
    operator: LinearOperator,
    variance: Tensor | float,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    model_error: float = 0.0,
    **geometry,
) -> Problem:
    """Divide data and operator by the noise standard deviation: y' = W^(1/2) (y - A shift), A' = scale W^(1/2) A.

    Args:
        y: measured data ``(slices, *out_shape)``, or ``out_shape`` for an operator that acts on the whole stack.
        operator: A in physical units.
        variance: of the noise, scalar or shaped like ``y``.
        scale, shift: physical image = scale * u + shift.
        model_error: known relative mismatch of the operator; variance grows by (model_error * y)^2.
        **geometry: ``spacing`` of :class:`Problem`.

    Raises:
        ShapeError: y does not fit the operator.
        InputError: y or the variance is not finite, or a variance is not positive.
    """
    if tuple(y.shape[1:] if operator.slicewise else y.shape) != tuple(operator.out_shape):
        slices = "slices, " if operator.slicewise else ""
        shape = ", ".join(map(str, operator.out_shape))
        raise ShapeError(f"{type(operator).__name__} measures ({slices}{shape}), got data {tuple(y.shape)}")
    total = torch.as_tensor(variance, dtype=y.dtype, device=y.device)
    if model_error:
        total = total + (model_error * y) ** 2
    uniform = total.numel() == 1
    total = total.expand(y.shape)
    if not bool(torch.isfinite(y).all() and torch.isfinite(total).all() and (total > 0).all()):
        raise InputError("data and noise variances must be finite and the variances positive: check the measurement")
    root = total.rsqrt()
    offset: Tensor | float = 0.0
    if shift:
        alike = not operator.slicewise or operator.restrict(slice(0, 1)) is operator  # one slice stands for all
        whole = operator.in_shape if alike else (len(y), *operator.in_shape)
        constant = torch.full(whole, shift, dtype=y.dtype, device=y.device)
        offset = operator(constant)
    whitened = Whitened(operator, root, scale, float(root.flatten()[0]) if uniform else None)
    return Problem(root * (y - offset), whitened, y, scale, shift, **geometry)
