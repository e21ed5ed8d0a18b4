"""Linear algebra against known answers."""

import pytest
import torch

from invdiff.linalg import cg, largest_eigenvalue, slice_dot


def test_cg_is_exact_per_slice_whatever_the_neighbours():
    g = torch.Generator().manual_seed(0)
    m = torch.randn(9, 9, generator=g, dtype=torch.float64)
    m = m @ m.T + 0.1 * torch.eye(9, dtype=torch.float64)
    apply = lambda v: (v.reshape(-1, 9) @ m).reshape(v.shape)  # noqa: E731
    rhs = torch.randn(4, 1, 3, 3, generator=g, dtype=torch.float64) * torch.tensor([1e-6, 1, 1e3, 0]).view(4, 1, 1, 1)
    x = cg(apply, rhs, torch.zeros_like(rhs), iterations=60, tolerance=1e-12, dot=slice_dot)
    assert torch.allclose(x.reshape(4, 9), torch.linalg.solve(m, rhs.reshape(4, 9).T).T, rtol=1e-7, atol=1e-14)


def test_largest_eigenvalue_of_a_known_matrix():
    d = torch.tensor([3.0, 1.0, 0.5])
    assert largest_eigenvalue(lambda v: d * v, torch.ones(3), 200, 1e-9) == pytest.approx(3, rel=1e-5)
