"""Missing pixels as a thin plate through the measured ones."""

from dataclasses import dataclass

import numpy as np
import torch

from invdiff.errors import InputError, UsageError
from invdiff.solvers.base import Solver, State


def laplacian(height: int, width: int):
    """Five-point Laplacian of an image whose edges are mirrored, sparse ``(H W, H W)``, symmetric."""
    from scipy import sparse

    def second(n):
        line = np.full(n, -2.0)
        line[[0, -1]] += 1
        ones = np.ones(n - 1)
        return sparse.diags([ones, line, ones], [-1, 0, 1]) if n > 1 else sparse.csr_array((1, 1))

    eye = sparse.identity
    return (sparse.kron(second(height), eye(width)) + sparse.kron(eye(height), second(width))).tocsc()


@dataclass(frozen=True)
class Biharmonic(Solver):
    """Delta^2 u = 0 on missing pixels, u = y on measured ones: the smallest sum of (Delta u)^2 through them.

    By a sparse LU decomposition in double precision, on the CPU, one for every run of slices with the same mask
    (Damelin & Hoang 2018, On surface completion and image inpainting by biharmonic functions).

    Volumes held: 8: x, the image in double precision, what is known; and the factors of one slice.

    Args:
        order: 2 for the biharmonic equation; 1 for the harmonic one, a membrane.
    """

    order: int = 2

    needs_prior = False

    def __post_init__(self):
        if self.order not in (1, 2):
            raise UsageError(f"solver option order must be 1 (harmonic) or 2 (biharmonic), got {self.order}")

    def require(self, problem):
        if problem.base.pinv_kind != "fill":
            name = type(problem.base).__name__
            raise UsageError(f"solver 'biharmonic' fills missing pixels, got {name}; use --op inpaint, or try 'tv'")

    def init(self, problem, prior, sigmas, rng):
        self.require(problem)
        x = torch.zeros(1, *problem.image_shape, dtype=problem.y.dtype, device=problem.y.device)
        known = problem.base(torch.ones_like(x))[0] != 0
        if not bool(known.any((-2, -1)).all()):
            raise InputError(
                "solver 'biharmonic': a slice has no measured pixel to start from; leave it out (--slices)"
            )
        return State(x, x, 0, {"known": known})

    def step(self, problem, prior, state, sigma, sigma_next, rng):
        image = (problem.measured - problem.shift) / problem.scale
        known, u = state.memory["known"].cpu().numpy(), image.double().cpu().numpy()
        operator = -laplacian(*u.shape[-2:])
        operator = (operator @ operator if self.order == 2 else operator).tocsc()
        before = None
        for index in np.ndindex(u.shape[:-2]):
            keep, plane = known[index].ravel(), u[index].ravel()
            if before is None or not np.array_equal(keep, before):
                solve, before = _factor(operator, ~keep), keep
            if not keep.all():
                plane[~keep] = solve(-(operator[~keep][:, keep] @ plane[keep]))
                u[index] = plane.reshape(u.shape[-2:])
        x = torch.from_numpy(u).to(state.x)[None]
        return State(x, x, state.step + 1, state.memory)


def _factor(operator, missing):
    """Solver of the equations of the missing pixels."""
    from scipy.sparse.linalg import splu

    return splu(operator[missing][:, missing].tocsc()).solve if missing.any() else None
