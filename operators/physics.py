"""Both directions between deepinv's physics and our operators. Imports deepinv: reached through :mod:`adapters`."""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from invdiff.errors import UsageError
from invdiff.linalg import one_by_one
from invdiff.operator import LinearOperator
from invdiff.operators.base import Matched, check_sizes

_log = logging.getLogger("invdiff")

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Relative mismatch of the two sides of a law that passes as rounding."""


class _Layout(NamedTuple):
    """Where the numbers of deepinv's images and measurements ``(B, ...)`` lie in ours, which are real."""

    image: tuple[int, ...]  # of deepinv: (C, H, W) or (C, D, H, W)
    complex_image: bool
    parts: tuple[tuple[tuple[int, ...], bool], ...] = ()  # of each, as real numbers, and whether it is complex
    collect: Callable | None = None  # makes deepinv's list of measurements

    @property
    def in_shape(self) -> tuple[int, ...]:
        channels, *depth, height, width = self.image
        return (*depth, channels * (2 if self.complex_image else 1), height, width)

    @property
    def out_shape(self) -> tuple[int, ...]:
        shapes = [shape for shape, _ in self.parts]
        return shapes[0] if self.collect is None else (sum(map(math.prod, shapes)),)

    def to_image(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, *self.in_shape)
        x = x.transpose(1, 2) if len(self.image) == 4 else x
        return torch.complex(*x.chunk(2, 1)) if self.complex_image else x

    def from_image(self, image: Tensor) -> Tensor:
        x = _real(image) if self.complex_image else image.real
        return x.transpose(1, 2) if len(self.image) == 4 else x

    def to_measurement(self, y: Tensor) -> Any:
        y = y.reshape(-1, *self.out_shape)
        if self.collect is None:
            return self._complex(y, self.parts[0][1])
        pieces = y.split([math.prod(shape) for shape, _ in self.parts], 1)
        return self.collect([self._complex(p.unflatten(1, s), c) for p, (s, c) in zip(pieces, self.parts, strict=True)])

    @staticmethod
    def _complex(y: Tensor, wanted: bool) -> Tensor:
        return torch.complex(*y.chunk(2, 1)) if wanted else y

    def from_measurement(self, y: Any) -> Tensor:
        if self.collect is None:
            return _real(y)
        return torch.cat([_real(part).flatten(1) for part in y], 1)

    def measured(self, y: Any) -> "_Layout":
        """This layout with measurements like ``y``."""
        parts = [y] if isinstance(y, Tensor) else list(y)
        shapes = tuple((tuple(_real(part).shape[1:]), part.is_complex()) for part in parts)
        return self._replace(parts=shapes, collect=None if isinstance(y, Tensor) else type(y))


class _Pair(NamedTuple):
    """A and A^T on our layout, ``(..., *in_shape)`` to ``(B, *out_shape)`` and back, and whether torch found A^T."""

    measure: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    automatic: bool


def _real(z: Tensor) -> Tensor:
    return torch.cat([z.real, z.imag], 1) if z.is_complex() else z


def _pairs(physics: LinearPhysics, layout: _Layout) -> Iterator[_Pair]:
    """The adjoint of the physics, and the one of automatic differentiation."""

    def measure(x: Tensor) -> Tensor:
        return layout.from_measurement(physics.A(layout.to_image(x)))

    def automatic(y: Tensor) -> Tensor:
        y = y.reshape(-1, *layout.out_shape)
        with torch.enable_grad():
            x = y.new_zeros(len(y), *layout.in_shape).requires_grad_()
            (g,) = torch.autograd.grad(measure(x), x, y)
        return g

    yield _Pair(measure, lambda y: layout.from_image(physics.A_adjoint(layout.to_measurement(y))), False)
    yield _Pair(measure, automatic, True)


def _gaussian(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def _mismatch(ax: Tensor, y: Tensor, x: Tensor, aty: Tensor) -> float:
    """``|<A x, y> - <x, B y>| sqrt(m) / (|A x| |y|)``, for Gaussian vectors of the size of ``|A^T - B| / |A|``.

    Without the root of the number m of measurements a wrong adjoint drowns in the dimension of a large operator.
    """
    difference = (ax.double() * y.double()).sum() - (x.double() * aty.double()).sum()
    scale = ax.double().norm() * y.double().norm() / math.sqrt(y.numel())
    return float(difference.abs() / scale.clamp_min(torch.finfo(torch.float64).tiny))


def _exact(pair: _Pair, layout: _Layout, dtype: torch.dtype, device: torch.device) -> bool:
    """The pair works in this precision and its adjoint is one, by three dot tests."""
    for seed in range(3):
        x = _gaussian(1, *layout.in_shape, seed=seed, dtype=dtype, device=device)
        y = _gaussian(1, *layout.out_shape, seed=seed + 10, dtype=dtype, device=device)
        try:
            ax, aty = pair.measure(x), pair.adjoint(y)
        except Exception:  # a precision it does not take, an adjoint it does not have: each library has its own errors
            return False
        if not ax.dtype == aty.dtype == dtype or ax.shape != y.shape or aty.shape != x.shape:
            return False
        if not _mismatch(ax, y, x, aty) <= ROUNDING[dtype]:
            return False
    return True


def _copy(physics: LinearPhysics, device: torch.device, dtype: torch.dtype | None = None) -> LinearPhysics:
    """A copy on a device; with ``dtype``, complex buffers in its complex partner (torch would drop imaginary parts)."""

    def cast(t: Tensor) -> Tensor:
        if dtype is not None and (t.is_floating_point() or t.is_complex()):
            t = t.to(dtype.to_complex() if t.is_complex() else dtype)
        return t.to(device)

    try:
        other = copy.deepcopy(physics)
    except (TypeError, RuntimeError):  # something that only deepinv's clone can copy, a thousand times as slowly
        other = physics.clone()
    other._auto_grad_adjoint_fn = None  # Tomography's: it would still be that of the original
    for module in (other, *getattr(other, "physics_list", ())):  # a stack keeps its parts out of torch's sight
        module._apply(cast)
    return other


class FromDeepinv(Matched):
    """A linear deepinv physics as an operator: :func:`from_deepinv` has the arguments.

    Attributes:
        notes: what a user must know about it, one line each.
    """

    def __init__(self, physics, image_shape, complex_image=False, device: torch.device | str = "cpu"):
        self._name = type(physics).__name__
        self._physics, self._device = _copy(physics, torch.device(device)), torch.device(device)
        self._layout, self._precision = self._measured(_Layout(check_sizes(image_shape), complex_image))
        super().__init__(self._layout.in_shape, self._layout.out_shape, device)
        self.slicewise = len(self._layout.image) == 3
        self._known: dict[torch.dtype, _Pair | None] = {}
        self.notes = self._checked()
        for note in self.notes:
            _log.warning(note)

    def _arguments(self) -> tuple:
        return self._physics, self._layout.image, self._layout.complex_image

    def __reduce__(self):
        raise UsageError(f"a wrapped {self._name} cannot be pickled: build the physics there and wrap it again")

    def __deepcopy__(self, _):
        return self  # it never changes

    def _measured(self, layout: _Layout) -> tuple[_Layout, torch.dtype]:
        """The layout with its measurements, and the first precision that the physics takes."""
        reason = ""
        for dtype in ROUNDING:
            zero = torch.zeros(1, *layout.in_shape, dtype=dtype, device=self._device)
            try:
                y = self._physics.A(layout.to_image(zero))
            except Exception as error:  # whatever a foreign library raises
                reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            count = len(y if isinstance(y, Tensor) else y[0])
            if count != 1:
                raise UsageError(
                    f"{self._name} makes {count} measurements of one image, its parameters are those of a batch: "
                    "build it for one image, or one for each"
                )
            return layout.measured(y), dtype
        raise UsageError(f"{self._name} does not take images {layout.image}: {reason}")

    def _checked(self) -> tuple[str, ...]:
        """Notes; refuses what is not linear or has no exact adjoint."""
        self._require_linear(next(_pairs(self._physics, self._layout)).measure)
        pair = self._pair(self._precision)
        if pair is None:
            raise UsageError(
                f"{self._name}: neither its A_adjoint nor automatic differentiation is the adjoint of its A; "
                "choose an exact one (Tomography: adjoint_via_backprop=True) or write it"
            )
        notes = []
        if pair.automatic:
            notes.append(f"{self._name}: its A_adjoint is not the adjoint of its A; automatic differentiation serves")
        if bool(getattr(self._physics, "normalize", False)):
            norm = float(getattr(self._physics, "operator_norm", math.nan))
            notes.append(
                f"{self._name} is divided by its norm, {norm:.4g}: divide measured data by it, too, "
                "or build the physics with normalize=False"
            )
        return tuple(notes)

    def _require_linear(self, measure: Callable[[Tensor], Tensor]) -> None:
        options: dict = {"dtype": self._precision, "device": self.device}
        x, z = (_gaussian(1, *self.in_shape, seed=seed, **options) for seed in (20, 21))
        expected = 2 * measure(x) - 3 * measure(z)
        if not (measure(2 * x - 3 * z) - expected).norm() <= ROUNDING[self._precision] * expected.norm():
            raise UsageError(f"{self._name} is not linear: its A(2 x - 3 z) differs from 2 A(x) - 3 A(z)")

    def _pair(self, dtype: torch.dtype) -> _Pair | None:
        """The first exact pair of the physics, or of a copy in ``dtype`` that measures the same; None without any."""
        if dtype not in self._known:
            candidates = (
                pair
                for make in (lambda: self._physics, lambda: _copy(self._physics, self.device, dtype))
                for pair in _pairs(make(), self._layout)
            )
            exact = (p for p in candidates if _exact(p, self._layout, dtype, self.device) and self._agrees(p, dtype))
            self._known[dtype] = next(exact, None)
        return self._known[dtype]

    def _agrees(self, pair: _Pair, dtype: torch.dtype) -> bool:
        own = next(_pairs(self._physics, self._layout)).measure
        x = _gaussian(1, *self.in_shape, seed=30, dtype=self._precision, device=self.device)
        expected = own(x).double()
        return bool((pair.measure(x.to(dtype)).double() - expected).norm() <= ROUNDING[torch.float32] * expected.norm())

    def _run(self, x: Tensor, name: str, inner: tuple[int, ...], outer: tuple[int, ...]) -> Tensor:
        """In the precision of x, or in the only one that the physics has; on a copy, which it may change."""
        dtype = x.dtype if self._pair(x.dtype) else self._precision
        f = getattr(self._pair(dtype), name)
        one = lambda u: f(u.clone()).reshape(*u.shape[: u.ndim - len(inner)], *outer)  # noqa: E731
        return one_by_one(one, len(inner), x.to(dtype)).to(x.dtype)

    def _direct(self, x: Tensor) -> Tensor:
        return self._run(x, "measure", self.in_shape, self.out_shape)

    def _transposed(self, y: Tensor) -> Tensor:
        return self._run(y, "adjoint", self.out_shape, self.in_shape)


class OperatorPhysics(LinearPhysics):
    """``y = A x`` on ``(B, C, H, W)``, for an operator that acts on the stack on ``(B, C, D, H, W)``.

    Args:
        operator: A; it follows the physics to other devices.
        **options: of ``LinearPhysics``.
    """

    def __init__(self, operator: LinearOperator, **options: Any):
        channels, height, width = operator.in_shape[-3:]
        depth = operator.in_shape[:-3]
        options = {"device": operator._probe().device, **options}
        super().__init__(img_size=(channels, *depth, height, width), **options)
        self.operator = operator

    def A(self, x: Tensor, **_: Any) -> Tensor:
        return self.operator(x if self.operator.slicewise else x.transpose(1, 2))

    def A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
        x = self.operator.adjoint(y)
        return x if self.operator.slicewise else x.transpose(1, 2)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if "operator" in self.__dict__:  # torch moves buffers only
            self.operator = self.operator.to(self._device_holder.device)
        return self
