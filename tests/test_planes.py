"""A prior of slices on all planes of a volume: by hand, in every solver, and where it is the default."""

import json
from dataclasses import replace
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
from test_fitting import Local

from invdiff import plan
from invdiff.configure import configure
from invdiff.draws import Draws
from invdiff.fitting import VOLUME, fit_prior, is_volume
from invdiff.operators import build, resolve
from invdiff.priors.base import Prior, PriorInfo
from invdiff.priors.complex import PhaseCorrected, RealImaginary
from invdiff.priors.gray import Gray
from invdiff.priors.options import PriorOptions
from invdiff.priors.planes import Planes, swapped
from invdiff.priors.tiled import Tiled
from invdiff.problem import whiten
from invdiff.runner import Request, prepare
from invdiff.solvers import make_solver
from invdiff.solvers.base import solve
from invdiff.solvers.pnp import pseudo_inverse, warm_start
from invdiff.volume import Volume

S, H, W = 4, 5, 6


class Shifts(Prior):
    """sigma times the neighbour in the row before, and twice the one in the column before, on a torus."""

    def __init__(self):
        self.info, self.seen = PriorInfo("shifts"), []

    def denoise(self, x, sigma, context=None):
        self.seen.append(tuple(x.shape))
        self.calls += x[..., 0, 0, 0].numel()
        return sigma * x.roll(1, -2) + 2 * x.roll(1, -1)


def stack(slices=S, samples=2, channels=1):
    g = torch.Generator().manual_seed(0)
    return torch.randn(samples, slices, channels, H, W, generator=g, dtype=torch.float64)


def thick(slices=S, factor=2, shape=(H, W), noise=0.1, options=None):
    operator = build("sr", (slices, *shape), (1.0, 1.0, 1.0), axis="through-plane", factor=factor, **(options or {}))
    y = torch.rand(operator.out_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return whiten(y, operator, noise**2)


def slicewise(op, slices=S):
    operator = build(op, (H, W), (1.0, 1.0))
    y = torch.rand(slices, *operator.out_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return whiten(y, operator, 0.1**2)


def images_of(plane, x):
    """The images of a plane, by their index; an image of plane 1 has the rows S, one of plane 2 the columns S."""
    if plane == 0:
        return [x[:, j] for j in range(x.shape[1])]
    if plane == 1:
        return [x[:, :, :, j].movedim(1, -2) for j in range(x.shape[3])]
    return [x[:, :, :, :, j].movedim(1, -1) for j in range(x.shape[4])]


def test_a_plane_is_the_stack_with_two_axes_swapped():
    x = stack()
    for plane in range(3):
        there = swapped(x, plane)
        want = images_of(plane, x)
        assert all(torch.equal(there[:, j], image) for j, image in enumerate(want)) and there.shape[1] == len(want)
        assert there.is_contiguous() and torch.equal(swapped(there, plane), x)


def test_the_denoiser_is_the_mean_over_the_planes():
    x, sigma = stack(), 0.3
    before = {axis: x.roll(1, axis) for axis in (1, 3, 4)}  # slice, row, column
    slices, columns, rows = (
        sigma * before[3] + 2 * before[4],
        sigma * before[1] + 2 * before[4],
        sigma * before[3] + 2 * before[1],
    )
    got = Planes(Shifts()).denoise(x, sigma)
    assert torch.allclose(got, (slices + columns + rows) / 3, atol=1e-12)


def test_a_turn_is_that_of_the_images_of_one_plane_and_all_come_in_24_steps():
    x, found = stack(), set()
    for step in range(24):
        got, plane = Planes(Shifts()).denoise_turned(x, 0.3, 3 * step), step % 3
        want = [Shifts().denoise_turned(image, 0.3, 3 * step) for image in images_of(plane, x)]
        assert all(torch.allclose(a, b) for a, b in zip(images_of(plane, got), want, strict=True))
        found.add((plane, 3 * step % 8))
    assert found == set(product(range(3), range(8)))


def test_a_pass_over_the_stack_counts_as_one_call_per_slice_in_any_plane():
    prior = Planes(Shifts())
    for turn in (0, 3, 6):
        before = prior.calls
        prior.denoise_turned(stack(), 0.3, turn)
        assert prior.calls - before == 2 * S
    assert prior.prior.calls == 2 * (S + H + W)
    before = prior.calls
    prior.denoise(stack(), 0.3)
    assert prior.calls - before == 3 * 2 * S == prior.passes * 2 * S


@pytest.mark.parametrize(("stride", "chunks"), [(1, [3, 6, 9]), (16, [3, 3, 3])])
def test_small_images_across_few_slices_go_through_the_network_together(stride, chunks):
    """Slices of 5 x 6 pixels, images across two of them of 2 x 6 and 5 x 2; 16 x 16 all, where they are padded."""

    class Chunked(Shifts):
        def denoise(self, x, sigma, context=None):
            found.append(self.chunk)
            if broken:
                raise MemoryError
            return super().denoise(x, sigma)

    found, broken, inner = [], [], Chunked()
    inner.chunk, inner.stride = 3, stride
    prior = Planes(inner)
    prior.denoise(stack(slices=2), 0.3)
    assert found == chunks and inner.chunk == 3
    found.clear()
    broken.append(True)
    for turn in (0, 3, 6):
        with pytest.raises(MemoryError):
            prior.denoise_turned(stack(slices=2), 0.3, turn)
    assert found == chunks and inner.chunk == 3


def test_a_single_slice_has_no_planes_across_it():
    x, prior = stack(slices=1), Planes(Shifts())
    assert torch.equal(prior.denoise(x, 0.3), Shifts().denoise(x, 0.3))
    for turn in range(0, 24, 3):
        assert torch.equal(prior.denoise_turned(x, 0.3, turn), Shifts().denoise_turned(x, 0.3, turn))


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_gradients_go_through_every_plane_a_chunk_at_a_time(chunk):
    inner = Local(1, chunk)
    x, v = stack().requires_grad_(), stack().flip(-1)
    (got,) = torch.autograd.grad(Planes(inner).denoise(x, 0.7), x, v)
    assert max(shape[-4] for shape in inner.shapes) == min(chunk, max(S, H, W))
    inner.shapes.clear()
    total = sum(swapped(Local(1).denoise(swapped(x, plane), 0.7), plane) for plane in range(3)) / 3
    (want,) = torch.autograd.grad(total, x, v)
    assert torch.allclose(got, want, atol=1e-12)
    Planes(inner).denoise(x.detach(), 0.7)
    assert {shape[-4] for shape in inner.shapes} == {S, H, W}  # the network divides them itself


@pytest.mark.parametrize("problem", [thick(), slicewise("denoise")], ids=["thick", "slicewise"])
@pytest.mark.parametrize("name", ["dps", "pigdm", "mm", "reddiff", "dds", "diffpir", "daps", "mbir"])
def test_solvers_give_the_prior_the_whole_stack_whatever_its_chunk(name, problem):
    found = []
    for chunk in (1, 8):
        prior = Planes(Local(1, chunk))
        solver = make_solver(name, **({"langevin": 3, "ode_steps": 2} if name == "daps" else {}))
        found.append(solve(solver, problem, prior, sigmas=[0.5, 0.2, 0.0], rng=Draws(0, tuple(range(S)))))
    assert torch.isfinite(found[0]).all() and torch.allclose(*found, atol=1e-9)


def test_pnp_takes_a_plane_a_step_and_without_turns_all():
    prior = Planes(Shifts())
    solve(make_solver("pnp"), thick(), prior, sigmas=[0.3, 0.2, 0.1, 0.05, 0.0])
    assert [shape[1] for shape in prior.prior.seen] == [S, H, W, S]
    prior = Planes(Shifts())
    solve(make_solver("pnp", turns=False), thick(), prior, sigmas=[0.3, 0.2, 0.0])
    assert [shape[1:] for shape in prior.prior.seen] == 2 * [(S, 1, H, W), (H, 1, S, W), (W, 1, H, S)]


def smooth(slices=16, side=32, related=True, speed=1.0):
    """A stack whose slices follow one another like rows, ``speed`` times as fast, or are far apart; little noise."""
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (slices, side, side)), indexing="ij")
    image = 1.5 + torch.sin(2 * torch.pi / side * (y + z * (speed if related else 13) + x))
    operator = build("denoise", (side, side), (1.0, 1.0))
    return whiten(operator(image[:, None]), operator, 0.05**2)


def test_a_volume_is_slices_that_follow_one_another_like_rows():
    assert is_volume(smooth()) and is_volume(smooth(40))
    assert not is_volume(smooth(VOLUME - 1))
    assert is_volume(smooth(speed=3.2)) and not is_volume(smooth(speed=3.8))  # about the square of which 12 is allowed
    assert not is_volume(smooth(40, related=False))
    assert is_volume(k_space_of_a_volume()) and not is_volume(k_space_of_a_volume(speed=4.0))


def test_streaks_in_all_slices_do_not_make_them_alike():
    """Which a blur takes away; with them rows differ more than these slices do."""
    apart = smooth(related=False)
    streaks = (-1.0) ** torch.arange(32, dtype=torch.float64)[:, None]
    assert not is_volume(whiten(apart.measured + streaks, apart.base, 0.05**2))


def test_slices_of_a_volume_are_at_most_three_pixels_apart():
    near, far = (replace(smooth(), spacing=(z, 4.0, 1.0)) for z in (5.9, 6.1))
    assert is_volume(near) and not is_volume(far)


@pytest.mark.parametrize("planes", ["auto", "slices", "all"])
@pytest.mark.parametrize(("related", "volumes"), [(True, True), (True, False), (False, True)])
def test_all_planes_of_a_volume_are_seen_in_turn(planes, related, volumes):
    fit = fit_prior(Local(1), smooth(related=related), PriorOptions(planes=planes), volumes)
    turned = planes == "auto" and related and volumes
    assert isinstance(fit, Planes) == (turned or planes == "all")
    if isinstance(fit, Planes):
        assert (fit.turned, fit.slicewise, fit.passes) == (turned, turned, 1 if turned else 3)
        assert fit.info.adapted[0].endswith("plane by plane") == turned


def test_planes_that_are_only_turned_leave_the_others_to_the_slices():
    x, prior = stack(), Planes(Shifts(), turned=True)
    assert torch.equal(prior.denoise(x, 0.3), Shifts().denoise(x, 0.3)) and prior.calls == 2 * S
    for turn in (0, 3, 6):
        assert torch.equal(prior.denoise_turned(x, 0.3, turn), Planes(Shifts()).denoise_turned(x, 0.3, turn))
    assert prior.calls == 4 * 2 * S
    tiled = fit_prior(Local(1, size=32), smooth(40, 20), PriorOptions(), True)
    assert isinstance(tiled, Planes) and isinstance(tiled.prior, Tiled)  # 40 slices, of 20 x 20
    complex_planes = fit_prior(Local(1), k_space_of_a_volume(), PriorOptions(), True)
    assert isinstance(complex_planes, PhaseCorrected) and complex_planes.slicewise
    assert isinstance(complex_planes.prior, Planes) and complex_planes.prior.turned


def k_space_of_a_volume(speed=1.0):
    """Of one coil, every fourth line; every slice has a phase of its own, and is aliased in another way."""
    image = smooth(side=64, speed=speed).measured
    operator, steepness = build("mri", (64, 64), (1.0, 1.0)), torch.linspace(-0.1, 0.1, 16, dtype=torch.float64)
    phase = steepness[torch.randperm(16, generator=torch.Generator().manual_seed(1))] * torch.arange(64)[:, None, None]
    phase = phase.permute(2, 1, 0)[..., None]
    return whiten(operator(torch.cat([image * phase.cos(), image * phase.sin()], 1)), operator, 0.05**2)


@pytest.mark.parametrize(
    ("op", "solver", "turned"),
    [
        ("ct-sparse", "pnp", True),
        ("ct-limited", "pnp", True),
        ("ct-sparse", "dds", False),
        ("denoise", "pnp", False),
    ],
)
def test_planes_of_a_volume_are_for_scanners_and_for_solvers_that_turn(op, solver, turned):
    image = smooth(16, 32).measured[:, 0].permute(2, 1, 0).numpy()
    volume = Volume(500 * (image - 1.5), np.eye(4), "HU", "CT")
    prior = prepare(Request(volume, op, solver=solver, simulate=True, slice_axis="2", device="cpu"))[2]
    assert any("plane by plane" in how for how in prior.info.adapted) == turned


CASES = [("thick", {}, True), ("thick", {"planes": "slices"}, False), ("thick", {"planes": "all"}, True)]
CASES += [(op, {}, False) for op in ("denoise", "blur", "sr", "inpaint", "gaussian3d", "cone")]
CASES += [("denoise", {"planes": "all"}, True)]
STACKS = {"gaussian3d": ("blur", {"kernel": "gaussian3d:0.4"}), "cone": ("ct-sparse", {"geometry": "cone", "views": 8})}


@pytest.mark.parametrize(("op", "options", "all_planes"), CASES)
def test_thick_slices_are_seen_in_all_planes_and_others_where_that_is_asked_for(op, options, all_planes):
    side = 12
    if op == "thick":
        problem = thick(4, shape=(side, side))
    else:
        name, given = STACKS.get(op, (op, {"kernel": "gaussian:1"} if op == "blur" else {}))
        whole = op in STACKS
        first = 0 if whole else 1
        operator = build(name, (4, side, side)[first:], (1.0, 1.0, 1.0)[first:], **given)
        shape = operator.out_shape if whole else (4, *operator.out_shape)
        problem = whiten(torch.zeros(shape), operator, 1.0)
    fit = fit_prior(Local(1), problem, PriorOptions(**options))
    assert isinstance(fit, Planes) == all_planes and fit.slicewise != all_planes
    assert (fit.info.adapted == ("slices and the two planes across them, as images",)) == all_planes


def test_planes_go_with_tiles_colours_and_complex_images():
    everywhere = PriorOptions(planes="all")
    colour = fit_prior(Local(1, channels=3), thick(), PriorOptions())
    assert isinstance(colour, Planes) and isinstance(colour.prior, Gray)
    deep = fit_prior(Local(1, size=32), thick(40, shape=(20, 20)), PriorOptions())
    assert isinstance(deep, Planes) and isinstance(deep.prior, Tiled)  # 40 slices, of 20 x 20
    flat = fit_prior(Local(1, size=32), thick(40, shape=(20, 20)), PriorOptions(planes="slices"))
    assert isinstance(flat, Local)
    operator = build("mri", (16, 16), (1.0, 1.0))
    y = torch.randn(3, *operator.out_shape, generator=torch.Generator().manual_seed(0))
    k_space = whiten(y, operator, 1.0)
    phase = fit_prior(Local(1), k_space, everywhere)
    assert isinstance(phase, PhaseCorrected) and isinstance(phase.prior, Planes) and not phase.slicewise
    parts = fit_prior(Local(1), k_space, PriorOptions(planes="all", complex="parts"))
    assert isinstance(parts, Planes) and isinstance(parts.prior, RealImaginary)
    for prior in (phase, parts):
        assert prior.denoise_turned(torch.randn(1, 3, 2, 16, 16), 0.3, 3).shape == (1, 3, 2, 16, 16)
        assert prior.calls == (6 if prior is phase else 2 * 3)


@pytest.mark.parametrize("factor", [2, 3])
def test_the_start_is_bicubic_where_that_fits_the_data(factor):
    """A ramp across slices, or a constant: interpolation finds it again inside, and the data have nothing to add."""
    slices = 8 * factor
    problem = thick(slices, factor)
    for ramp in (0.0, 0.05):
        truth = 0.2 + ramp * torch.arange(slices, dtype=torch.float64)[:, None, None, None] + 0.1 * stack(1, 1)[0]
        measured = problem.base(truth)
        exact = whiten(measured, problem.base, 0.1**2)
        start, bicubic = warm_start(exact, blur=0.0), pseudo_inverse(exact)
        inside = slice(None) if ramp == 0 else slice(2 * factor, -2 * factor)
        assert torch.allclose(bicubic[0, inside], truth[inside], atol=1e-12)
        assert torch.allclose(start[0, inside], truth[inside], atol=1e-9)


def test_the_start_elsewhere_is_the_image_nearest_to_bicubic_that_fits_the_data():
    problem = thick(6, 2, noise=0.2)
    matrix = np.kron(np.eye(3), [[0.5, 0.5]]) / 0.2
    bicubic = pseudo_inverse(problem)[0].reshape(6, -1).numpy()
    system = matrix.T @ matrix + np.eye(6) / 0.3**2
    want = np.linalg.solve(system, matrix.T @ problem.y.reshape(3, -1).numpy() + bicubic / 0.3**2)
    got = warm_start(problem, blur=0.0)[0].reshape(6, -1).numpy()
    assert np.abs(got - want).max() < 1e-9


@pytest.mark.parametrize(("axis", "lam", "blur"), [("through-plane", 0.5, 0.0), ("inplane", 0.22, 4.0)])
def test_pnp_has_options_of_its_own_through_the_plane_alone(axis, lam, blur):
    described = {"name": "sr", **resolve("sr", axis=axis)}
    solver = configure(Request(op="sr", operator={"axis": axis}), described)
    assert (solver.lam, solver.start_blur, solver.coupling) == (lam, blur, None)
    assert (solver.sigma_max, solver.sigma_min) == (0.3, 0.01)
    given = configure(Request(op="sr", operator={"axis": axis}, solver_options={"lam": 0.1}), described)
    assert (given.lam, given.start_blur) == (0.1, blur)


def test_the_plan_knows_how_many_planes_a_call_sees(monkeypatch):
    seen = []

    def times(prior, x, differentiates):
        seen.append(x.shape[1])
        return 6.0, 0.0

    monkeypatch.setattr("invdiff.plan._network_times", times)  # of three passes over the slices that are timed
    deep = thick(40)
    for solver, calls in (
        (make_solver("pnp"), 10 / 3),
        (make_solver("pnp", turns=False), 10),
        (make_solver("dds"), 10),
    ):
        assert plan._network_seconds(deep, Planes(Local(1)), solver, 10) == pytest.approx(calls * 6.0 * 40 / 16)
    assert plan._network_seconds(thick(4), Planes(Local(1)), make_solver("dds"), 10) == 60.0
    assert seen == [16, 16, 16, 4]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_thick_slices_become_thin_ones(run, here, world, count):
    """One, two or three slices of a file: the mean of every pair is the measured slice, within its noise."""
    data = np.asarray(nib.load(world / "ct.nii.gz").dataobj)[:, :, :count]
    nib.save(nib.Nifti1Image(data, np.diag([9.0, 9.0, 6.0, 1.0])), here / "thick.nii.gz")
    args = ("reconstruct", "thick.nii.gz", "--op", "sr", "--axis", "through-plane", "--slice-axis", "2")
    found = {}
    for planes in ("auto", "slices"):
        rest = (
            "--noise-level",
            "0.01",
            "--prior",
            "$/prior",
            "--set",
            f"prior.planes={planes}",
            "-o",
            f"{planes}.nii.gz",
        )
        code, _, err = run(*args, *rest)
        assert code == 0, err
        found[planes] = np.asarray(nib.load(f"{planes}.nii.gz").dataobj)
        record = json.loads((here / f"{planes}.json").read_text())
        assert ("across them" in json.dumps(record["prior"]["adapted"])) == (planes == "auto")
        assert record["runs"]["pnp"]["nfe_per_slice"] == record["runs"]["pnp"]["steps"] == 20
    thin = found["auto"]
    assert thin.shape == (*data.shape[:2], 2 * count) and np.isfinite(thin).all()
    low, high = np.percentile(data, (0.5, 99.5))
    assert np.sqrt(np.mean((thin.reshape(*data.shape, 2).mean(-1) - data) ** 2)) < 0.02 * (high - low)
    assert not np.allclose(thin, found["slices"], atol=1.0)
