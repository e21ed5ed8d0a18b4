"""Trajectories, their density compensation, and the gridding by it."""

import math

import numpy as np
import pytest
import torch
from noncartesian_cases import CASES, gaussian, relative

from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.operators.density import pipe_menon, ramp
from invdiff.operators.noncartesian import NonCartesianMRI, mri_radial
from invdiff.operators.trajectories import (
    check_trajectory,
    nyquist_spokes,
    radial,
    read_trajectory,
    spiral,
    spoke_spacing,
)


def disc(shape, radius=0.7):
    y, x = (np.arange(n) - n // 2 for n in shape)
    return torch.from_numpy((np.hypot(x, y[:, None]) < radius * min(shape) / 2).astype(np.float32))


@pytest.mark.parametrize("trajectory", ["radial", "golden", "spiral"])
@pytest.mark.parametrize("coils", [1, 4])
def test_gridding_returns_a_disc_at_its_value(trajectory, coils):
    shape = (64, 64)
    op = mri_radial(shape, 1.0, trajectory=trajectory, spokes=8 if trajectory == "spiral" else 120, coils=coils)
    x = torch.stack([disc(shape), -0.5 * disc(shape)])
    found, inside = op.pinv(op(x)), disc(shape, 0.5) > 0
    assert abs(float(found[0][inside].mean()) - 1) < 0.02 and abs(float(found[1][inside].mean()) + 0.5) < 0.01
    assert abs(float(found[0][disc(shape, 0.9) == 0].mean())) < 0.02
    assert op.pinv_kind == "zero-filled"


def test_areas_of_spokes_are_the_band_limited_ramp():
    for points in (radial((40, 30), 7), radial((40, 30), 12, 81, golden=True, start_deg=5), radial((3, 3), 3, 10)):
        (_, radius, step), area = spoke_spacing(points), ramp(points)
        assert area.sum() == pytest.approx(np.pi / 4, rel=1e-12) and (area > 0).all()  # of the whole disc
        n = len(radius)
        lag = np.arange(n) - n // 2
        kernel = np.where(
            lag % 2, -1 / (np.pi * np.where(lag, lag, 1)) ** 2, 0.25 * (lag == 0)
        )  # of filtered backprojection
        exact = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(kernel))).real * step
        assert np.allclose(area / area.sum(1, keepdims=True), exact / exact.sum())
    angle = [0, 10, 50, 120]  # each spoke stands for half the way to its neighbours: 120 to 180 + 0, and so on
    points = np.concatenate([radial((8, 8), 1, start_deg=a) for a in angle])
    assert np.allclose(ramp(points).sum(1) / np.pi * 720, [35, 25, 55, 65])
    assert np.allclose(ramp(points[::-1]), ramp(points)[::-1])
    twice = np.concatenate([points, points])
    assert np.allclose(ramp(twice).reshape(2, 4, -1).sum(0), ramp(points))  # measured twice: half each
    with pytest.raises(UsageError, match="evenly sampled spokes"):
        ramp(spiral((40, 30), 3))


def test_pipe_menon_agrees_with_closed_forms_and_is_a_fixed_point():
    shape = (48, 48)
    points = radial(shape, 90)
    k, found, exact = np.hypot(*np.moveaxis(points, -1, 0)), pipe_menon(points, shape), ramp(points)
    middle = (k > 0.05) & (k < 0.4)
    assert np.abs(found / exact - 1)[middle].mean() < 0.02 and found.sum() == pytest.approx(np.pi / 4, rel=0.04)
    points = spiral(shape, 4)
    near = np.hypot(*(points[:, :, None] - points[2, 100:140]).transpose(3, 0, 1, 2)) < 0.08
    area = pipe_menon(points, shape)
    for j in range(40):  # samples within a small disc stand for its area
        assert area[near[..., j]].sum() == pytest.approx(np.pi * 0.08**2, rel=0.1)
    assert area.sum() == pytest.approx(np.pi / 4, rel=0.02)


def test_density_is_an_option():
    points = radial((20, 20), 30)
    own = NonCartesianMRI(points, (20, 20), density=2 * ramp(points))
    plain, pipe = (NonCartesianMRI(points, (20, 20), density=name) for name in ("auto", "pipe"))
    y = own(gaussian(*own.in_shape))
    assert torch.equal(own.pinv(y), 2 * plain.pinv(y)) and relative(pipe.pinv(y), plain.pinv(y)) < 0.2
    assert plain.density is plain.density and np.array_equal(plain.density, ramp(points))
    with pytest.raises(UsageError, match=r"unknown density 'voronoi': choose one of auto, pipe, ramp"):
        NonCartesianMRI(points, (20, 20), density="voronoi")
    with pytest.raises(ShapeError, match=r"one area per sample, \(30, 40\), got \(40, 30\)"):
        NonCartesianMRI(points, (20, 20), density=ramp(points).T)
    with pytest.raises(InputError, match="finite, not negative"):
        NonCartesianMRI(points, (20, 20), density=-ramp(points))


def test_pinv_is_zero_where_no_coil_sees():
    trajectory, shape, maps = CASES["multi"]
    maps = maps.copy()
    maps[:, 1, 2] = 0
    op = NonCartesianMRI(trajectory, shape, maps)
    y = gaussian(*op.out_shape, dtype=torch.float64)
    x, total = op.pinv(y), torch.from_numpy((abs(maps) ** 2).sum(0))
    assert torch.isfinite(x).all() and not x[:, 1, 2].any()
    assert torch.allclose(x * total, op.adjoint(20 * op.density * y), atol=1e-12)


def test_spokes_run_through_the_centre_at_their_angles():
    points = radial((6, 8), 4, start_deg=30)
    assert points.shape == (4, 16, 2) and np.abs(points).max() <= 0.5 and not points[:, 8].any()
    assert np.allclose(points[1, :, 1], np.cos(np.deg2rad(75)) * (np.arange(16) - 8) / 16)
    assert np.allclose(points[1, :, 0], np.sin(np.deg2rad(75)) * (np.arange(16) - 8) / 16)
    angle = np.rad2deg(spoke_spacing(radial((6, 8), 5, golden=True))[0])
    assert np.allclose(angle, 111.24611797 * np.arange(5) % 180)
    assert spoke_spacing(points + 0.01) is None and spoke_spacing(points[:, 8:]) is None
    assert mri_radial((6, 8), 1.0, spokes=4).acceleration == pytest.approx(np.pi) == nyquist_spokes((6, 8)) / 4


def test_spirals_reach_the_edge_in_steps_of_the_grid():
    points = spiral((64, 48), 4, start_deg=20)
    radius, steps = np.hypot(*np.moveaxis(points, -1, 0)), np.linalg.norm(np.diff(points, axis=1), axis=-1)
    assert not points[:, 0].any() and np.allclose(radius[:, -1], 0.5)
    assert (steps < 1.001 / 64).all() and steps[:, 10:].min() > 0.99 / 64  # constant speed; chords cut the inmost bends
    turn = np.unwrap(np.arctan2(points[0, 1:, 0], points[0, 1:, 1]))
    assert turn[-1] == pytest.approx(np.deg2rad(20) + 2 * np.pi * 8, abs=1e-6)  # 4 x 8 turns: 1 / 64 apart
    turned = points[0] @ np.array([[0, -1], [1, 0]])  # by 90 degrees
    assert np.allclose(points[1], turned, atol=1e-12) or np.allclose(points[1], -turned, atol=1e-12)
    full, half = (mri_radial((64, 64), 1.0, trajectory="spiral", spokes=4, turns=t) for t in (8, 4))
    assert full.acceleration == pytest.approx(1, rel=0.05) and half.acceleration == pytest.approx(2, rel=0.05)


def test_other_units_are_refused_by_name():
    points = radial((64, 48), 5)
    for factor, words in (
        (2 * np.pi, r"reaches 3\.142: probably radians per pixel, divide it by 2 pi"),
        (2, "relative to the largest frequency, divide it by 2"),
        (64, "cycles per field of view, divide it by the 64 pixels"),
        (1 / 0.001, "probably 1/m, multiply it by the pixel size in m"),
    ):
        with pytest.raises(InputError, match=words):
            NonCartesianMRI(factor * points, (64, 48))
    assert np.array_equal(check_trajectory(points.astype(np.float32), (64, 48)), points.astype(np.float32))


def test_bad_trajectories_are_refused(tmp_path):
    points = radial((8, 8), 3)
    for bad in (points[0], points[..., :1], points[:, :0]):
        with pytest.raises(ShapeError, match=r"is \(shots, samples, 2\)"):
            NonCartesianMRI(bad, (8, 8))
    for bad in (np.where(points == 0, np.nan, points), points.astype(complex)):
        with pytest.raises(InputError, match="must be real and finite"):
            NonCartesianMRI(bad, (8, 8))
    np.save(tmp_path / "k.npy", points)
    assert np.array_equal(read_trajectory(tmp_path / "k.npy", (8, 8)), points)
    for name in ("none.npy", "k.txt", "rosette"):
        with pytest.raises(InputError, match="trajectory file .*" + name):
            mri_radial((8, 8), 1.0, trajectory=str(tmp_path / name))
    for options, words in (
        ({"spokes": 0}, "spokes must be a whole number from 1, got 0"),
        ({"spokes": 2.5}, "got 2.5"),
        ({"samples": 0}, "samples per spoke must be a whole number from 2"),
        ({"start": math.nan}, "must be finite, in degrees"),
        ({"trajectory": "spiral", "turns": 0}, "turns of a spiral must be positive"),
        ({"turns": 3}, "turns: trajectory 'radial' has no such option"),
        ({"trajectory": str(tmp_path / "k.npy"), "spokes": 3, "start": 0.0}, "spokes, start: trajectory .* drop"),
        ({"coils": 0}, "coils must be a whole number from 1"),
    ):
        with pytest.raises(UsageError, match=words):
            mri_radial((8, 8), 1.0, **options)
    from_file = mri_radial((8, 8), 1.0, trajectory=str(tmp_path / "k.npy"))
    assert np.array_equal(from_file.trajectory, points) and "3 shots of 16 samples, 8 x 8" in from_file.describe()
