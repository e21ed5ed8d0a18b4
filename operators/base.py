"""What the restoration operators share: tensors on one device, matched gradients, checks of shapes."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from invdiff.errors import UsageError
from invdiff.operator import LinearOperator

ArrayLike = Tensor | np.ndarray


class _Apply(torch.autograd.Function):
    """A or A^T; the derivative of each is the other."""

    @staticmethod
    def forward(ctx, x, operator, transposed):
        ctx.operator, ctx.transposed = operator, transposed
        return operator._transposed(x) if transposed else operator._direct(x)

    @staticmethod
    def backward(ctx, g):
        return _Apply.apply(g, ctx.operator, not ctx.transposed), None, None


def _recorded(x: Tensor) -> bool:
    """Whether ``x`` has a tangent (forward mode) or a transform of :mod:`torch.func` works, without gradients too:
    both are the business of ``_Apply``."""
    return torch._C._are_functorch_transforms_active() or unpack_dual(x).tangent is not None


class Matched(LinearOperator):
    """A linear operator by its two maps ``_direct`` (A) and ``_transposed`` (A^T), differentiable any number of times.

    Its tensors live on one device, in float64; they are cast once per dtype of the input (float32 or float64), which
    the result keeps. Pickle and :meth:`to` build it again from its arguments.

    Raises:
        UsageError: an input in another dtype or on another device.
    """

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...], device: torch.device | str):
        self.in_shape, self.out_shape = in_shape, out_shape
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._casts: dict[tuple[str, torch.dtype], Tensor] = {}

    def _arguments(self) -> tuple:
        """Arguments of the constructor, without the device."""
        raise NotImplementedError

    def _direct(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _transposed(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self._require(x)
        return self._apply(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        self._require(y)
        return self._apply(y, True)

    def _apply(self, x: Tensor, transposed: bool) -> Tensor:
        """A or A^T; where nothing can be recorded without the function that records, half the time of a small mask."""
        if torch.is_grad_enabled() or _recorded(x):
            return _Apply.apply(x, self, transposed)
        return self._transposed(x) if transposed else self._direct(x)

    def __reduce__(self):
        return type(self), (*self._arguments(), str(self.device))

    def to(self, device: torch.device | str) -> "Matched":
        """The same operator for tensors on ``device``."""
        return type(self)(*self._arguments(), device)  # type: ignore[call-arg]

    def _probe(self) -> Tensor:
        return super()._probe().to(self.device)

    def _require(self, x: Tensor) -> None:
        name = type(self).__name__
        if x.dtype not in (torch.float32, torch.float64):
            raise UsageError(f"{name} works in float32 or float64, got {x.dtype}")
        if x.device != self.device:
            raise UsageError(f"{name} is on {self.device} and its input on {x.device}: move one with .to(device)")

    def _cast(self, name: str, x: Tensor) -> Tensor:
        """The float64 or complex128 attribute ``name`` in the precision of ``x``."""
        if (name, x.dtype) not in self._casts:
            value = getattr(self, name)
            self._casts[name, x.dtype] = value.to(x.dtype.to_complex() if value.is_complex() else x.dtype)
        return self._casts[name, x.dtype]


def spread(weight: float | Tensor, x: Tensor, ndim: int) -> Tensor:
    """``weight``, a number or one per item with ``ndim`` singleton axes, as one per item of ``x``, in its dtype."""
    weight = weight.to(x) if isinstance(weight, Tensor) else x.new_full((), weight)
    return weight.expand(*x.shape[: x.ndim - ndim], *(1,) * ndim)


def check_plane(shape, pixel_mm) -> tuple[tuple[int, int], tuple[float, float]]:
    """(H, W) and (row, column) spacing in mm, or a UsageError."""
    if len(shape) != 2 or any(not float(n).is_integer() or n < 1 for n in shape):
        raise UsageError(f"shape must be (H, W) with positive whole numbers, got {tuple(shape)}")
    spacing = (pixel_mm, pixel_mm) if isinstance(pixel_mm, (int, float)) else tuple(pixel_mm)
    if len(spacing) != 2 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise UsageError(f"pixel_mm must be a positive size in mm, or (row, column) spacing, got {pixel_mm}")
    return (int(shape[0]), int(shape[1])), (float(spacing[0]), float(spacing[1]))


def check_stack(shape, pixel_mm) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """(slices, H, W) and (slice, row, column) spacing in mm, or a UsageError."""
    if len(shape) != 3:
        raise UsageError(f"shape must be (slices, H, W), got {tuple(shape)}")
    slices, height, width = check_sizes(shape)
    spacing = (pixel_mm,) * 3 if isinstance(pixel_mm, (int, float)) else tuple(map(float, pixel_mm))
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise UsageError(f"pixel_mm must be positive, in mm, one size or (slice, row, column) spacing, got {pixel_mm}")
    return (slices, height, width), (spacing[0], spacing[1], spacing[2])


def check_sizes(shape) -> tuple[int, ...]:
    """Positive whole numbers, or a UsageError."""
    if any(not float(n).is_integer() or n < 1 for n in shape):
        raise UsageError(f"shape must hold positive whole numbers, got {tuple(shape)}")
    return tuple(int(n) for n in shape)


def check_channels(channels: int) -> int:
    """A positive whole number, or a UsageError."""
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise UsageError(f"channels must be a positive whole number, got {channels}")
    return channels


def numbers(text: str, count: int, form: str) -> list[float]:
    """``count`` finite numbers of ``text``, separated by colons.

    Raises:
        UsageError: anything else; the message shows ``form``.
    """
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) != count or not all(math.isfinite(v) for v in values):
        raise UsageError(f"expected {form}, got '{form.partition(':')[0]}:{text[:40]}'")
    return values
