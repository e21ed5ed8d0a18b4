"""The data step of the solvers: a proximal centre fitted to the data, by preconditioned conjugate gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.coupling import Coupling, Memory, Solution, Weight, coupled, plus_difference_normal
from invdiff.data_space import Bounds, few_data, through_data
from invdiff.linalg import cg, one_by_one, slice_dot, to_complex, to_real, total_dot
from invdiff.problem import Problem

FEWEST = 10  # iterations: fewer leave q far from what it should be, and the image with it


def point_spectrum(problem: Problem) -> Tensor:
    """Half spectrum of |F A^T A delta|, the response to a point in the middle of each slice, ``(1, S, C, H, W/2+1)``.

    Exact where A^T A is a circular convolution (MRI masks, circular blur); for CT it holds the sampling pattern and
    the 1 / |frequency| law, which is what a preconditioner needs. Complex images, whose response need not be real,
    have the whole spectrum of one complex channel, ``(1, S, 1, H, W)``.
    """
    whole = problem.operator.complex_image
    parts = []
    for b in problem.blocks():
        part = problem.restrict(b)
        point = torch.zeros(part.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        point[..., slice(0, 1 if whole else None), point.shape[-2] // 2, point.shape[-1] // 2] = 1
        response = part.operator.normal(point)
        transform = (lambda u: torch.fft.fft2(to_complex(u))) if whole else torch.fft.rfft2
        parts.append(one_by_one(transform, 3, response).abs())
    return torch.cat(parts)[None]


def data_step(
    problem: Problem,
    z: Tensor,
    weight: float | Tensor,
    start: Tensor,
    *,
    iterations: int,
    tolerance: float = 0.0,
    reduction: float = 0.0,
    error: float = 0.0,
    residual: float = 0.0,
    spectrum: Tensor | None = None,
    coupling: Coupling | None = None,
    memory: Memory | None = None,
) -> Solution:
    """argmin_u 1/2 |A u - y|^2 + weight/2 |u - z|^2 (+ the coupling), by CG from ``start``.

    Without coupling every slice has its own CG and slices are handled in blocks, so that work memory does not grow
    with their number; with coupling the inner products run over the whole stack.

    Args:
        problem: whitened problem.
        z: proximal centre ``(samples, slices, C, H, W)``.
        weight: 1 / variance around z; a number, or without coupling one per slice, ``(slices, 1, 1, 1)``.
        start: first iterate.
        iterations, tolerance, reduction: bounds of :func:`invdiff.linalg.cg`.
        error: RMS error of the minimiser at which CG may stop, in the unit of the image, by the energy of the error e,
            at least weight |e|^2, as ``spectrum`` estimates it: not reached where the circulant is exact or the weight
            is large, exceeded up to four times on CT with data of very unequal weight. Needs ``spectrum``. Above 0,
            and with :data:`FEWEST` iterations or more, :func:`through_data` solves the step where it can.
        residual: with ``error``, of :class:`Bounds`; for the last step of a run.
        spectrum: of :func:`point_spectrum`; preconditions CG, see :func:`preconditioner`.
        coupling: slice regulariser with its ``memory``.

    Returns:
        The minimiser (one ADMM iteration of it with a coupling) and the new memory.
    """
    memory = memory or {}
    stacked = coupled(coupling, problem)
    converges = max(tolerance, reduction, error) > 0 and iterations >= FEWEST
    if error > 0 and converges and spectrum is not None and not stacked and few_data(problem):
        bounds = Bounds(iterations, tolerance, reduction, error, residual)
        return through_data(problem, z, weight, memory, bounds)
    joint = stacked or not problem.operator.slicewise
    if coupled(coupling, problem):
        memory = coupling.start(start, memory)
        penalty = coupling.penalty(problem, weight)
        pull = coupling.pull(memory, penalty)
    out = torch.empty_like(z)
    for b in [slice(None)] if stacked else problem.blocks():
        part, zb = problem if stacked else problem.restrict(b), z[:, b]
        own = weight[b] if isinstance(weight, Tensor) and len(weight) > 1 else weight
        rhs = part.operator.adjoint(part.y) + own * zb

        def normal(v: Tensor, part: Problem = part, own: float | Tensor = own) -> Tensor:
            image = part.operator.normal(v)
            image = image.addcmul(own, v) if isinstance(own, Tensor) else image.add(v, alpha=own)
            return plus_difference_normal(image, v, penalty) if stacked else image

        out[:, b] = cg(
            normal,
            rhs + pull if stacked else rhs,
            start[:, b],
            iterations=iterations,
            tolerance=tolerance,
            reduction=reduction,
            enough=error**2 * own * rhs[0, 0].numel() * (len(rhs[0]) if joint else 1),
            precondition=None if spectrum is None else preconditioner(part, spectrum[:, b], own, converges),
            dot=total_dot if joint else slice_dot,
        )
    if not coupled(coupling, problem):
        return out, memory
    return out, {**memory, **coupling.update(problem, out, weight, memory)}


def preconditioner(
    problem: Problem, spectrum: Tensor, weight: Weight, converges: bool = True
) -> Callable[[Tensor], Tensor]:
    """Approximate inverse of ``A^T A + weight``: the circulant K = 1 / (spectrum + weight), as E^-1 K E^-1 for a CG
    that ``converges``.

    E^2 = (c s + weight) / (s + weight), s the mean of the spectrum and c the certainty of the data (Fessler & Booth
    1999, with one circulant): data of unequal weight, as CT's, see the air beside a patient hundreds of
    times better than the middle, for which K is made. On 128^2 it takes 40 % off the iterations to 2 % of the residual;
    few iterations that stop anywhere are better without (ten of ``dds`` with gamma 0.15, low dose: 31.2 dB, and 26.3
    with).
    """
    inner = circulant(spectrum + weight, problem.operator.complex_image)
    certainty = getattr(problem.operator, "certainty", None) if converges else None
    if certainty is None:
        return inner
    mean = spectrum.mean((-1, -2), keepdim=True)
    scale = ((mean + weight) / (certainty * mean + weight)).sqrt()
    return lambda r: scale * inner(scale * r)


def circulant(spectrum: Tensor, whole: bool) -> Callable[[Tensor], Tensor]:
    """Division by ``spectrum`` in frequencies, of real images or (``whole``) of complex ones in two channels."""
    inverse = spectrum.reciprocal()

    def divide(r: Tensor, own: Tensor) -> Tensor:
        if whole:
            return to_real(torch.fft.ifft2(own * torch.fft.fft2(to_complex(r))))
        return torch.fft.irfft2(own * torch.fft.rfft2(r), s=r.shape[-2:])

    return lambda r: one_by_one(divide, 3, r, inverse.expand(*r.shape[:2], *inverse.shape[2:]))
