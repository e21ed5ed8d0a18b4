"""The operator interface: two shapes and two short methods; algebra builds the rest.

Images are ``(..., channels, H, W)`` and measurements ``(..., *out_shape)``; leading axes are batch axes
(samples, slices). Nothing here knows units, priors or files.
"""

import abc
import math
from functools import cached_property

import torch
from torch import Tensor

from invdiff.errors import ShapeError, UsageError
from invdiff.linalg import largest_eigenvalue

PROBED = 2**19  # values of the random images from which `mean_square` is estimated


def _check(name: str, what: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.ndim < len(shape) or tuple(x.shape[x.ndim - len(shape) :]) != shape:
        want = ", ".join(map(str, shape))
        raise ShapeError(f"{name} expects {what} (..., {want}), got {tuple(x.shape)}")


class Forward(abc.ABC):
    """A differentiable map from images ``(..., *in_shape)`` to measurements ``(..., *out_shape)``."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    slicewise = True  # acts on each slice by itself; False: shapes are those of the whole stack, (slices, C, H, W)

    through_plane = False  # measures too few slices: what tells them apart is seen in the planes across them
    complex_image = False  # two channels, real and imaginary part
    measured_fraction = 1.0  # share of the entries of a measurement that hold data; the others are always 0
    notes: tuple[str, ...] = ()  # remarks for the terminal and the manifest
    advice: tuple[str, ...] = ()  # the same, about the device that it is on
    origin: Tensor | None = None  # of a map that is not linear: images to start from

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Measurement of ``x``; shapes are already checked."""

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Vector-Jacobian product ``J(x)^T v``, by automatic differentiation."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(self(x), x, v)
        return g

    def pullback(self, x: Tensor, v: Tensor) -> Tensor:
        """``J(x)^T v`` by the shortest way."""
        return self.vjp(x, v)

    def __call__(self, x: Tensor) -> Tensor:
        """``forward`` after a check of the whole shape.

        Raises:
            ShapeError: names the operator, the shape it expects and the one it got.
        """
        _check(type(self).__name__, "images", x, self.in_shape)
        return self.forward(x)


class LinearOperator(Forward):
    """A linear ``Forward`` A with an exact adjoint.

    ``norm`` is the largest singular value; ``mean_square`` is trace(A^T A) / n, the mean squared column norm. An
    operator with a ``pinv(y)`` names it in ``pinv_kind``, the solver that runs it.
    """

    pinv_kind: str | None = None

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y`` (shape-checked), ``(..., *out_shape) -> (..., *in_shape)``."""
        _check(type(self).__name__, "measurements", y, self.out_shape)
        return self._adjoint(y)

    def pullback(self, x: Tensor, v: Tensor) -> Tensor:
        """``A^T v``, whatever ``x``."""
        return self.adjoint(v)

    def _adjoint(self, y: Tensor) -> Tensor:
        batch = y.shape[: y.ndim - len(self.out_shape)]
        return self.vjp(torch.zeros(*batch, *self.in_shape, dtype=y.dtype, device=y.device), y)

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """``A^T W A x``, W diagonal: ``weights`` ``(..., *out_shape)``, or None for the identity."""
        y = self(x)
        return self.adjoint(y if weights is None else weights * y)

    def gram(self, y: Tensor) -> Tensor:
        """``A A^T y``, ``(..., *out_shape)``."""
        return self(self.adjoint(y))

    @cached_property
    def row_squares(self) -> Tensor | None:
        """Diagonal of A A^T, ``(*out_shape)``, of a non-negative A, which has ``sensitivities``: its row sums times the
        one factor that gives them the trace of A A^T; None for other operators."""
        if not hasattr(self, "sensitivities"):
            return None
        rows = self.sensitivities()[0]
        return rows * (self.mean_square * math.prod(self.in_shape) / rows.sum().clamp_min(torch.finfo(rows.dtype).tiny))

    def to(self, device: torch.device | str) -> "LinearOperator":
        """This operator with its buffers on ``device``."""
        return self

    def restrict(self, slices: slice) -> "LinearOperator":
        """The operator of those slices only, a ``slice`` or a tensor of indices; identical unless parameters differ
        between slices.
        """
        return self

    def _probe(self) -> Tensor:
        """One deterministic image on the operator's device, or one per slice where parameters differ between them."""
        g = torch.Generator().manual_seed(0)
        return torch.randn(self.in_shape, generator=g, dtype=torch.float32)

    @cached_property
    def norm(self) -> float:
        """Largest singular value of A, by Lanczos' method (relative accuracy better than 1e-3)."""
        return math.sqrt(float(largest_eigenvalue(self.normal, self._probe())))

    @cached_property
    def mean_square(self) -> float:
        """trace(A^T A) / n: exactly for small images, else by Hutchinson's estimator with fixed probes of +-1.

        At least 8 probes and ``PROBED`` values in all, for a relative error of about 2e-3; as many unit vectors, where
        they are enough for all pixels.
        """
        probe, n = self._probe(), math.prod(self.in_shape)
        if n * n <= PROBED:
            units = torch.eye(n).reshape(
                n, *[1 for _ in probe.shape[: probe.ndim - len(self.in_shape)]], *self.in_shape
            )
            return float(self(units.to(probe).expand(n, *probe.shape)).square().sum() / probe.numel())
        g = torch.Generator().manual_seed(1)
        z = torch.randn((max(8, PROBED // probe.numel()), *probe.shape), generator=g).sign().to(probe)
        return float(self(z).square().sum() / z.numel())

    def __matmul__(self, inner: "LinearOperator") -> "LinearOperator":
        return Compose(self, inner)

    def __rmul__(self, factor: float) -> "LinearOperator":
        return Scale(float(factor), self)


class Compose(LinearOperator):
    """``outer @ inner``."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator):
        if outer.in_shape != inner.out_shape:
            raise ShapeError(
                f"cannot compose {type(outer).__name__} after {type(inner).__name__}: "
                f"{outer.in_shape} is fed {inner.out_shape}"
            )
        self.outer, self.inner = outer, inner
        self.in_shape, self.out_shape = inner.in_shape, outer.out_shape
        self.complex_image = inner.complex_image
        self.slicewise = outer.slicewise and inner.slicewise

    @property
    def measured_fraction(self) -> float:  # type: ignore[override]
        """That of ``outer``."""
        return self.outer.measured_fraction

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def to(self, device):
        return Compose(self.outer.to(device), self.inner.to(device))

    def restrict(self, slices):
        return Compose(self.outer.restrict(slices), self.inner.restrict(slices))

    def _probe(self):
        inner, outer = self.inner._probe(), self.outer._probe()
        if inner.ndim > len(self.in_shape):
            return inner
        return inner.expand(*outer.shape[: outer.ndim - len(self.outer.in_shape)], *inner.shape)


class Scale(LinearOperator):
    """``factor * A`` for a finite, non-zero factor."""

    def __init__(self, factor: float, operator: LinearOperator):
        if not math.isfinite(factor) or factor == 0:
            raise UsageError(f"operator scale must be finite and non-zero, got {factor}")
        self.factor, self.operator = factor, operator
        self.in_shape, self.out_shape, self.slicewise = operator.in_shape, operator.out_shape, operator.slicewise
        self.complex_image = operator.complex_image

    @property
    def measured_fraction(self) -> float:  # type: ignore[override]
        """That of the operator."""
        return self.operator.measured_fraction

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.operator(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.operator.adjoint(y)

    def to(self, device):
        return Scale(self.factor, self.operator.to(device))

    def restrict(self, slices):
        return Scale(self.factor, self.operator.restrict(slices))

    def _probe(self):
        return self.operator._probe()

    @cached_property
    def norm(self) -> float:
        """|factor| times that of the operator."""
        return abs(self.factor) * self.operator.norm

    @cached_property
    def mean_square(self) -> float:
        """factor^2 times that of the operator."""
        return self.factor**2 * self.operator.mean_square


class Stack(LinearOperator):
    """Several operators on one image: measurements ``(..., m)``, the flattened ones of each, one after the other.

    Args:
        *operators: with one ``in_shape``; :meth:`split` takes their measurements apart again.

    Raises:
        UsageError: no operator.
        ShapeError: images of different shapes.
    """

    def __init__(self, *operators: LinearOperator):
        if not operators:
            raise UsageError("Stack needs at least one operator")
        for other in operators[1:]:
            if other.in_shape != operators[0].in_shape:
                raise ShapeError(
                    f"cannot stack {type(operators[0]).__name__} and {type(other).__name__}: "
                    f"images of {operators[0].in_shape} and of {other.in_shape}"
                )
        self.operators = operators
        self._counts = [math.prod(a.out_shape) for a in operators]
        self.in_shape, self.out_shape = operators[0].in_shape, (sum(self._counts),)
        self.slicewise = all(a.slicewise for a in operators)
        self.complex_image = operators[0].complex_image

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([a(x).flatten(-len(a.out_shape)) for a in self.operators], -1)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """The measurement ``(..., *out_shape)`` of each operator, views of ``y`` ``(..., m)`` (shape-checked)."""
        _check("Stack", "measurements", y, self.out_shape)
        parts = y.split(self._counts, -1)
        return tuple(part.unflatten(-1, a.out_shape) for a, part in zip(self.operators, parts, strict=True))

    def _adjoint(self, y: Tensor) -> Tensor:
        first, *rest = (a.adjoint(part) for a, part in zip(self.operators, self.split(y), strict=True))
        for x in rest:
            first = first + x
        return first

    def to(self, device):
        return Stack(*(a.to(device) for a in self.operators))

    def restrict(self, slices):
        return Stack(*(a.restrict(slices) for a in self.operators))

    def _probe(self):
        return max((a._probe() for a in self.operators), key=lambda probe: probe.ndim)

    @cached_property
    def mean_square(self) -> float:
        """The sum of those of the operators."""
        return sum(a.mean_square for a in self.operators)
