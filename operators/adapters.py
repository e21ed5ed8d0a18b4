"""Operators of other libraries as ours, and ours as theirs: deepinv's physics, scipy's linear operators.

deepinv and scipy are imported when an operator is made, not with this module.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import UsageError
from invdiff.operator import LinearOperator

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    from invdiff.operators.physics import FromDeepinv


def from_deepinv(physics: "LinearPhysics", image_shape: tuple[int, ...], complex_image: bool = False) -> "FromDeepinv":
    """Any linear physics of deepinv 0.5 as an operator: its A, without its noise and sensor.

    Images ``(B, C, H, W)`` of deepinv are ``(..., C, H, W)``; volumes ``(B, C, D, H, W)`` are ``(..., D, C, H, W)`` and
    act on the stack. Complex images and complex measurements become real channels, all real parts first, then all
    imaginary parts (as in :mod:`invdiff.operators.mri`), and A^T is the transpose over the reals. Several
    measurements (deepinv's ``TensorList``) are flattened, one after the other. Slices go one at a time on the CPU, so
    that their bits do not depend on the batch. A copy of the physics is kept: later changes of it have no effect.

    Args:
        physics: a ``deepinv.physics.LinearPhysics``; the operator lives on the device of its buffers.
        image_shape: of its images, without the batch axis: (C, H, W) or (C, D, H, W).
        complex_image: it takes complex tensors (radio interferometry), which become 2 C real channels. Physics that
            take real tensors of two channels (MRI) do without.

    Returns:
        The operator, in float32 and float64; a physics made for one precision alone keeps to it inside. The adjoint is
        the physics' own where it passes a dot test, else that of automatic differentiation. ``notes`` says so, and
        warns of a physics that deepinv has divided by its norm; both go to the logger "invdiff".

    Raises:
        UsageError: a physics that is not linear, does not take such images, holds parameters of a whole batch, or
            has no exact adjoint at all.
    """
    from deepinv.physics import LinearPhysics

    from invdiff.operators.physics import FromDeepinv

    name = type(physics).__name__
    if not isinstance(physics, LinearPhysics):
        raise UsageError(f"{name} is not a linear physics of deepinv: give one that derives from LinearPhysics")
    device = next((t.device for t in (*physics.buffers(), *physics.parameters())), torch.device("cpu"))
    if len(image_shape) not in (3, 4):
        raise UsageError(f"images of {name} are (C, H, W) or (C, D, H, W), got image_shape {tuple(image_shape)}")
    return FromDeepinv(physics, image_shape, complex_image, device)


def to_deepinv(operator: LinearOperator, **options: Any) -> "LinearPhysics":
    """An operator as ``deepinv.physics.LinearPhysics``, for deepinv's algorithms, losses and networks.

    Its batch axis B stands for the leading axes: ``(B, C, H, W)``, for an operator on the stack ``(B, C, D, H, W)``.
    Operators with parameters per slice take exactly their slices as the batch. ``A_dagger`` and ``prox_l2`` are
    deepinv's, by conjugate gradients to its tolerance (1e-4 and 50 iterations unless ``options`` say otherwise).

    Args:
        operator: A.
        **options: of LinearPhysics, such as ``noise_model``, ``max_iter``, ``tol``.
    """
    from invdiff.operators.physics import OperatorPhysics

    return OperatorPhysics(operator, **options)


def as_scipy(
    operator: LinearOperator, dtype: str | np.dtype | type = "float64", batch: tuple[int, ...] = ()
) -> "ScipyOperator":
    """An operator as ``scipy.sparse.linalg.LinearOperator`` of shape (m, n) on flattened images and measurements.

    Several columns are applied at a time. The operator runs on its own device; vectors are numpy arrays.

    Args:
        operator: A.
        dtype: float32 or float64, in which the operator runs.
        batch: leading axes of an image, where one vector holds several: (slices,) for parameters per slice.

    Raises:
        UsageError: another dtype, or complex vectors.
    """
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    real = np.dtype(dtype)
    if real not in (np.float32, np.float64):
        raise UsageError(f"as_scipy works in float32 or float64, got {real}")
    device, count = operator._probe().device, math.prod(batch)

    def columns(f: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
        def apply(v: np.ndarray) -> np.ndarray:
            if np.iscomplexobj(v):
                raise UsageError("as_scipy takes real vectors, got complex ones: apply it to both parts")
            rows = torch.from_numpy(np.array(v.T, real, order="C")).to(device)
            out = f(rows.reshape(*v.shape[1:], *batch, *shape))
            return out.detach().reshape(*v.shape[1:], -1).cpu().numpy().T

        return apply

    direct, back = columns(operator, operator.in_shape), columns(operator.adjoint, operator.out_shape)
    shape = (count * math.prod(operator.out_shape), count * math.prod(operator.in_shape))
    return ScipyOperator(shape, direct, back, direct, real, back)
