"""Cone beam from the command line and in solvers: the whole stack is one unknown."""

import json
import logging
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from cone_cases import ball_image, gaussian, relative

from invdiff.data_step import data_step, point_spectrum
from invdiff.operators import build, lines
from invdiff.priors.gaussian import GaussianPrior
from invdiff.problem import whiten
from invdiff.solvers import make_solver
from invdiff.solvers.base import iterate


@pytest.mark.parametrize(
    ("compiled", "geometry", "large"), [(None, "cone", 0), (None, "cone", 10**9), (None, "fan", 0), (1, "cone", 0)]
)
def test_a_run_says_once_that_numba_would_help(run, here, monkeypatch, caplog, compiled, geometry, large):
    """On the terminal and in the manifest, only for a cone beam on the CPU without numba."""
    caplog.set_level(logging.WARNING, "invdiff")
    if compiled is None:
        monkeypatch.setattr(lines, "_compiled", lambda: None)
    else:
        pytest.importorskip("numba")
    monkeypatch.setattr(lines, "LARGE", large)
    lines._hint.cache_clear()
    options = ("--op", "ct-sparse", "--views", "8", "--geometry", geometry, "--simulate", "--solver", "fbp")
    code, out, err = run("reconstruct", "$/ct.nii.gz", *options, "-o", "r.nii.gz")
    expected = compiled is None and geometry == "cone"
    assert (code, out.count("invdiff[fast]"), err) == (0, int(expected), "")
    assert json.loads((here / "r.json").read_text())["warnings"].count(lines.HINT) == int(expected)


CONE = ("--op", "ct-sparse", "--geometry", "cone", "--views", "16")


def test_command_line_from_volume_and_from_file(run, world, here):
    image = nib.load(world / "ct.nii.gz")
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("RPI"))  # stored the other way up
    nib.save(turned, here / "turned.nii.gz")
    for name in ("$/ct.nii.gz", "turned.nii.gz"):
        assert run("simulate", name, *CONE, "-o", "m.h5", "--quiet", "--overwrite")[0] == 0
        assert run("reconstruct", "m.h5", "--solver", "fbp", "-o", "a.nii.gz", "--quiet", "--overwrite") == (0, "", "")
        done = run(
            "reconstruct", name, *CONE, "--simulate", "--solver", "fbp", "-o", "b.nii.gz", "--quiet", "--overwrite"
        )
        assert done == (0, "", "")
        a, b = (nib.as_closest_canonical(nib.load(here / n)).get_fdata() for n in ("a.nii.gz", "b.nii.gz"))
        np.testing.assert_array_equal(a, b)
        truth = nib.as_closest_canonical(image).get_fdata()[..., 1:-1]  # the ends are not seen by all views
        scores = [np.corrcoef(a[..., 1:-1].ravel(), t.ravel())[0, 1] for t in (truth, truth[..., ::-1])]
        assert scores[0] > 0.85 and scores[0] > scores[1]
    code, out, _ = run("simulate", "$/ct.nii.gz", *CONE, "-o", "c.h5")
    assert code == 0 and "data of 9 x 1 x 16 x " in out
    code, _, err = run("reconstruct", "m.h5", "--solver", "fbp", "--slices", "1:3", "-o", "c.nii.gz")
    assert code == 3 and "a cone beam measures all 5 slices together; drop --slices" in err and err.count("\n") == 1


def small_problem(std=0.002, shape=(4, 9, 9)):
    op = build("ct-sparse", shape, (2.0, 1.5, 1.5), geometry="cone", views=8)
    truth = ball_image(op.shape, op.voxel_mm, [(0.5, -0.7, 0.3, 4.0, 0.02)])
    y = op(truth) + std * gaussian(*op.out_shape, seed=6, dtype=torch.float64)
    return op, whiten(y, op, std**2, scale=0.02, spacing=(2.0, 1.5, 1.5)), truth / 0.02


def test_the_data_step_is_that_of_the_whole_stack():
    op, problem, _ = small_problem(0.01, (3, 5, 4))
    n, m = math.prod(op.in_shape), math.prod(op.out_shape)
    a = problem.operator(torch.eye(n, dtype=torch.float64).reshape(n, *op.in_shape)).reshape(n, m).T
    z = gaussian(1, *op.in_shape, dtype=torch.float64)
    expected = torch.linalg.solve(a.T @ a + 7 * torch.eye(n), a.T @ problem.y.flatten() + 7 * z.flatten())
    found, _ = data_step(problem, z, 7.0, z, iterations=300, tolerance=1e-12, spectrum=point_spectrum(problem))
    assert relative(found.flatten(), expected) < 1e-8


def test_tv_takes_the_stack():
    _, problem, truth = small_problem()
    *_, fbp = iterate(make_solver("fbp"), problem)
    solver = make_solver("tv", volumetric=True, gap=1e-2, check=10)
    *_, state = iterate(solver, problem)
    assert solver.finished(state) and state.memory["gaps"].shape == (1,)  # the duality gap of the whole stack
    assert relative(state.x0[0], truth) < 0.7 * relative(fbp.x0[0], truth)


def test_sirt_takes_published_steps_and_stops_with_the_stack():
    op, problem, _ = small_problem(0.01)
    first, *_, last = iterate(solver := make_solver("sirt"), problem)
    rows, columns = op.sensitivities(torch.float64)
    residual = torch.where(rows > 1e-6 * rows.max(), problem.measured / rows, 0.0)
    expected = solver.relaxation / problem.scale * op.adjoint(residual) / columns
    assert relative(first.x0[0], expected) < 1e-12
    assert solver.finished(last) and last.memory["chi2"].shape == (1, 1, 1, 1)
    assert problem.chi_squared(last.x0) < 1.01


@pytest.mark.parametrize("name, steps", [("pnp", 2), ("dds", 8), ("dps", 4)])
def test_solvers_with_a_prior_take_the_stack(name, steps):
    _, problem, _ = small_problem()
    prior = GaussianPrior(torch.full((1, 9, 9), 0.3).double(), 0.1 * torch.eye(81).double())
    solver = make_solver(name)
    *_, state = iterate(solver, problem, prior, solver.sigmas(steps, problem, prior))
    assert state.x0.shape == (1, *problem.image_shape) and bool(state.x0.isfinite().all())
    assert name == "dps" or 0.5 < problem.chi_squared(state.x0) < 1.5


def test_plug_and_play_on_the_command_line(run, world, here):
    options = ("--simulate", "--prior", "$/prior", "--steps", "2", "-o", "a.nii.gz", "--quiet")
    options += ("--set", "solver.cg_iterations=5")
    assert run("reconstruct", "$/ct.nii.gz", *CONE, *options) == (0, "", "")
    assert json.loads((here / "a.json").read_text())["operator"]["geometry"] == "cone"
