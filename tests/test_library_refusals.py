"""What the library refuses as the command does: estimates, levels and options that cannot be."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from solver_cases import SLICES, Case, Local

from invdiff.errors import NumericalError, UsageError
from invdiff.solvers import make_solver
from invdiff.solvers.base import solve


class Broken(Local):
    """A denoiser that returns what it is told from the third call on."""

    def __init__(self, value):
        super().__init__(SLICES)
        self.value, self.seen = value, 0

    def denoise(self, x, sigma, context=None):
        self.seen += 1
        return x / (1 + sigma) if self.seen < 3 else torch.full_like(x, self.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [(name, value, "not finite") for name in ("dds", "pnp", "diffpir", "reddiff") for value in (math.nan, math.inf)]
    + [(name, 1e9, r"values up to \d") for name in ("dds", "pnp", "diffpir")],
)
def test_an_estimate_that_no_image_can_be_stops_with_the_last_good_state(name, value, words):
    case, sigmas = Case("mask", 0.1), [2.0, 1.0, 0.5, 0.25, 0.1, 0.0]
    with pytest.raises(NumericalError, match=words + r".* at step 3 \(sigma 0\.5\): check the data") as caught:
        solve(make_solver(name), case.problem, Broken(value), sigmas=sigmas)
    assert caught.value.state.step == 2 and torch.isfinite(caught.value.state.x0).all()


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ([], "decreasing list"),
        ([0.0], "decreasing list"),
        ([0.1, 1.0, 0.0], "decreasing list"),
        ([1.0, 0.1], "decreasing list"),
        ([1.0, math.nan, 0.0], "decreasing list"),
        ([30.0, 1.0, 0.0], r"sigmas from 30 to 1 leave the range of the prior: stay within 20 to 0\.005"),
        ([1.0, 0.001, 0.0], "leave the range of the prior"),
    ],
)
def test_levels_that_are_no_schedule_of_the_prior_are_refused(sigmas, words):
    case, prior = Case("mask", 0.1), Local(SLICES)
    prior.info = replace(prior.info, sigma_min=0.005, sigma_max=20.0)
    with pytest.raises(UsageError, match=words):
        solve(make_solver("dds"), case.problem, prior, sigmas=sigmas)


def test_a_solver_that_needs_a_prior_says_so():
    with pytest.raises(UsageError, match="solver DDS needs a prior"):
        solve(make_solver("dds"), Case("mask", 0.1).problem)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dds", {"cg_iterations": 2.5}, "cg_iterations takes int, got 2.5"),
        ("dds", {"eta": None}, "eta takes float, got None"),
        ("dds", {"eta": True}, "eta takes float, got True"),
        ("dds", {"sampler": 3}, "sampler takes str, got 3"),
        ("dps", {"warm": 3}, "warm takes bool, got 3"),
        ("pnp", {"sampler": "heun"}, r"no option 'sampler'.*; dds, dps, diffpir, pigdm, mm have it"),
        ("dds", {"sampler": "ddim:ets=1"}, r"no option 'ets'.*did you mean 'eta'"),
    ],
)
def test_options_of_another_kind_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words):
        make_solver(name, **options)


def test_numbers_of_numpy_are_numbers():
    assert make_solver("dds", eta=np.float32(0.5), cg_iterations=np.int64(4), sigma_max=2).cg_iterations == 4
