"""Details of solvers without a prior: shifts of the wavelet grid, a mask for every slice."""

import pytest
import torch

from invdiff.operators.mask import Mask
from invdiff.problem import whiten
from invdiff.solvers import make_solver
from invdiff.solvers.base import solve
from invdiff.solvers.wavelet import shrink

F64 = torch.float64


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("shift", [(0, 0), (5, 7), (15, 0), (3, 12)])
def test_shrinking_on_a_shifted_grid_shifts_there_and_back(shift):
    x = gaussian(1, 1, 1, 32, 16)
    back = tuple(-s for s in shift)
    assert torch.allclose(shrink(x, 0.0, shift), x, atol=1e-12)
    moved = shrink(x.roll(shift, (-2, -1)), 0.4).roll(back, (-2, -1))
    assert torch.allclose(shrink(x, 0.4, shift), moved, atol=1e-12) and (moved - x).abs().max() > 0.1


def test_biharmonic_filling_of_a_slice_knows_its_own_mask_only():
    """As many pixels missing in each slice, in other places."""
    keep = torch.ones(3, 12, 9, dtype=torch.bool)
    keep[0, 4:7, 3:6] = keep[1, 1, :] = keep[2, ::2, 4] = False
    keep[2, 1:4, 0] = False
    assert len(set(keep.sum((-2, -1)).tolist())) == 1
    operator, x = Mask(keep), gaussian(3, 1, 12, 9)
    together = solve(make_solver("biharmonic"), whiten(operator(x), operator, 1.0))[0]
    for i in range(3):
        own = Mask(keep[i])
        alone = solve(make_solver("biharmonic"), whiten(own(x[i : i + 1]), own, 1.0))[0]
        assert torch.allclose(together[i], alone[0], atol=1e-10)
        assert torch.equal(together[i, 0][keep[i]], x[i, 0][keep[i]])
