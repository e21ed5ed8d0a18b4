"""Schedules: decreasing lists of sigmas, even in what they say, and lists that are none."""

import math
from itertools import pairwise

import numpy as np
import pytest

from invdiff.errors import UsageError
from invdiff.schedule import (
    SCHEDULES,
    check_sigmas,
    cosine_sigma,
    discrete,
    karras,
    linear_betas,
    log_snr,
    make_schedule,
    table_sigmas,
)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_decreases_from_end_to_end(name):
    sigmas = make_schedule(name, 9, 12.0, 0.02)
    assert check_sigmas(sigmas) == sigmas and len(sigmas) == 10
    tolerance = 0.05 if name == "ddpm" else 1e-12  # entries of a table
    assert sigmas[0] == pytest.approx(12, rel=tolerance) and sigmas[-2] == pytest.approx(0.02, rel=10 * tolerance)
    assert len(make_schedule(name, 1, 12.0, 0.02)) == 2
    for wrong in ((0, 1.0, 0.1), (4, 0.1, 1.0), (4, math.inf, 0.1), (4, 1.0, 0.0), (2.5, 1.0, 0.1)):
        with pytest.raises(UsageError, match=r"steps|sigma_min"):
            make_schedule(name, *wrong)


def test_schedules_are_even_in_what_they_say():
    def even(values):
        return np.ptp(np.diff(values)) < 1e-9 * abs(values[0] - values[-1])

    s = {name: make_schedule(name, 12, 30.0, 0.01)[:-1] for name in SCHEDULES}
    assert even(np.log(s["log-snr"])) and even(np.array(s["karras"]) ** (1 / 7))
    a = 1 / (1 + np.array(s["uniform-time"]) ** 2)
    t = (-0.1 + np.sqrt(0.01 - 2 * 19.9 * np.log(a))) / 19.9  # ln a = -19.9 t^2 / 2 - 0.1 t
    assert even(t)
    a = 1 / (1 + np.array(s["quadratic"]) ** 2)
    assert even(np.sqrt((-0.1 + np.sqrt(0.01 - 2 * 19.9 * np.log(a))) / 19.9))
    a = 1 / (1 + np.array(s["cosine"]) ** 2)
    f0 = np.cos(np.pi / 2 * 0.008 / 1.008) ** 2
    assert even(np.arccos(np.sqrt(a * f0)))
    assert cosine_sigma(0.5) == pytest.approx(math.sqrt(f0 / np.cos(np.pi / 2 * 0.508 / 1.008) ** 2 - 1))


def test_the_table_of_ddpm():
    table = table_sigmas(linear_betas())
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(table, np.sqrt((1 - a) / a), rtol=1e-12)
    assert discrete(1000, 1e3, 1e-3)[:-1] == table[::-1]
    assert discrete(4, 1e3, 1e-3)[:-1] == [table[999], table[666], table[333], table[0]]
    nearest = [999 - math.floor(999 * k / 7 + 0.5) for k in range(8)]
    assert discrete(8, 1e3, 1e-3)[:-1] == [table[k] for k in nearest]
    with pytest.raises(UsageError, match="table of betas has 1000 entries"):
        discrete(1001, 1e3, 1e-3)
    with pytest.raises(UsageError, match="betas must lie"):
        table_sigmas([0.1, 1.0])


@pytest.mark.parametrize("sigmas", [[], [0.0], [1.0, 0.5], [1.0, 1.0, 0.0], [math.nan, 0.0], [math.inf, 1.0, 0.0]])
def test_lists_that_are_no_schedule_are_refused(sigmas):
    with pytest.raises(UsageError, match="decreasing list of finite sigmas that ends in 0"):
        check_sigmas(sigmas)


@pytest.mark.parametrize("make", [log_snr, karras])
def test_schedules_decrease_from_max_to_min_and_end_at_zero(make):
    s = make(9, 5.0, 0.02)
    assert len(s) == 10 and s[0] == pytest.approx(5) and s[-2] == pytest.approx(0.02) and s[-1] == 0
    assert all(a > b for a, b in pairwise(s))
    with pytest.raises(UsageError, match="steps"):
        make(0, 1.0, 0.1)
    with pytest.raises(UsageError, match="sigma_min"):
        make(4, 0.1, 1.0)
