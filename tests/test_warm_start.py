"""The start of solvers without a prior's help, against dense matrices."""

import numpy as np
import pytest
import torch
from solver_cases import SIDE, SLICES, Dense

from invdiff.problem import whiten
from invdiff.solvers.pnp import pseudo_inverse, warm_start

SCALE, SHIFT, NOISE = 0.5, 0.3, 0.1


class Inverted(Dense):
    """A matrix with a pseudo-inverse."""

    def pinv(self, y):
        return (y @ torch.linalg.pinv(self.matrix).T).unflatten(-1, self.in_shape)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    a, y = rng.normal(0, 1, (9, SIDE**2)), rng.normal(0, 1, (SLICES, 9))
    return a, y, whiten(torch.from_numpy(y), Inverted(a), NOISE**2, scale=SCALE, shift=SHIFT)


def blurred(images, std):
    """Convolved with a Gaussian on a torus: a sum over its copies."""
    offset = np.arange(SIDE)[:, None] - np.arange(SIDE)[None]
    copies = np.exp(-0.5 * ((offset[..., None] + SIDE * np.arange(-12, 13)) / std) ** 2).sum(-1)
    line = copies / (std * np.sqrt(2 * np.pi))
    return np.einsum("ij,njk,lk->nil", line, images.reshape(-1, SIDE, SIDE), line).reshape(images.shape)


def test_the_pseudo_inverse_is_that_of_the_measured_data_in_the_range_of_the_prior(case):
    a, y, problem = case
    want = (y @ np.linalg.pinv(a).T - SHIFT) / SCALE  # physical image = scale u + shift
    assert np.abs(pseudo_inverse(problem).reshape(SLICES, -1).numpy() - want).max() < 1e-12


@pytest.mark.parametrize("blur, spread", [(2.0, 0.3), (3.0, 0.05)])
def test_the_warm_start_is_the_ridge_estimate_around_the_blurred_pseudo_inverse(case, blur, spread):
    a, y, problem = case
    got = warm_start(problem, blur=blur, spread=spread, iterations=60).reshape(SLICES, -1).numpy()
    center = blurred((y @ np.linalg.pinv(a).T - SHIFT) / SCALE, blur)
    rows = SCALE * a / NOISE
    data = (y - SHIFT * a.sum(1)) / NOISE
    system = rows.T @ rows + np.eye(SIDE**2) / spread**2
    want = np.linalg.solve(system, (data @ rows + center / spread**2).T).T
    assert np.abs(got - want).max() < 1e-7


def test_the_defaults_of_the_warm_start_are_those_that_it_says(case):
    *_, problem = case
    said = warm_start(problem, spread=0.3, blur=4.0, iterations=10)
    assert torch.equal(warm_start(problem), said) and (said - warm_start(problem, blur=2.0)).abs().max() > 1e-3
