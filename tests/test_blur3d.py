"""Blur by 3D kernels from the command line: of the whole stack, in mm along all axes, and kernels that need a word."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from invdiff.errors import UsageError
from invdiff.operators import acts_on_stack, build, resolve
from invdiff.operators.blur import Blur
from invdiff.restoration import restoration_case
from invdiff.runner import Request
from invdiff.volume import load_volume, to_slices

SKEW = np.arange(1.0, 28).reshape(3, 3, 3) ** 1.5  # no symmetry
EDGES = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]], float)


def measured(world, noise=1e-9, **options):
    request = Request(input=world / "ct.nii.gz", op="blur", operator=options, simulate=True, noise_level=noise)
    return restoration_case(request, request.input)


def display(world):
    return to_slices(load_volume(world / "ct.nii.gz", modality="CT")).data


def test_the_same_width_in_mm_along_every_axis():
    x = torch.randn(12, 1, 30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for unit, spacing, sigma in (("mm", (3.0, 1.0, 2.0), (0.8, 2.4, 1.2)), ("px", (3.0, 1.0, 2.0), (1.1, 1.1, 1.1))):
        width = 2.4 if unit == "mm" else 1.1
        op = build("blur", (12, 30, 20), spacing, kernel=f"gaussian3d:{width}", unit=unit)
        expected = ndimage.gaussian_filter(x[:, 0].numpy(), sigma, mode="reflect", truncate=4.0)
        assert not op.slicewise and op.closed_form
        np.testing.assert_allclose(op(x)[:, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("boundary", "mode"), [("circular", "wrap"), ("reflect", "reflect"), ("replicate", "nearest")])
@pytest.mark.parametrize(("slices", "sigma"), [(1, 2.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 4.5)])
def test_a_gaussian_longer_than_a_thin_stack(boundary, mode, slices, sigma):
    """The stack goes on beyond its ends as often as the kernel needs it."""
    x = torch.randn(slices, 1, 40, 38, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    op = build("blur", (slices, 40, 38), 1.0, kernel=f"gaussian3d:{sigma}", boundary=boundary)
    assert len(op.kernel) > slices and op.closed_form is (boundary != "replicate")
    expected = ndimage.gaussian_filter(x[:, 0].numpy(), sigma, mode=mode, truncate=4.0)
    np.testing.assert_allclose(op(x)[:, 0].numpy(), expected, atol=1e-12)


def test_a_thin_stack_is_restored_from_the_command_line(run, here):
    blur = ("--op", "blur", "--kernel", "gaussian3d:2", "--simulate", "--slices", "1:4", "--solver", "wiener")
    assert run("reconstruct", "$/ct.nii.gz", *blur, "-o", "r.nii.gz", "--quiet")[0] == 0
    assert nib.load(here / "r.nii.gz").shape == (40, 36, 3)


def test_which_blurs_act_on_the_stack(tmp_path):
    np.save(tmp_path / "solid.npy", SKEW)
    np.save(tmp_path / "flat.npy", SKEW[0])
    whole = {"gaussian3d:1": True, str(tmp_path / "solid.npy"): True, str(tmp_path / "flat.npy"): False}
    for kernel, stack in ({"gaussian:1": False, "motion:3:0": False} | whole).items():
        assert acts_on_stack("blur", **resolve("blur", kernel=kernel)) is stack
    assert acts_on_stack("sr", **resolve("sr", axis="through-plane")) and not acts_on_stack("sr", **resolve("sr"))
    assert not acts_on_stack("ct-sparse", **resolve("ct-sparse"))
    for shape, pixel, words in (
        ((9, 9), 1.0, r"the kernel has 3 axes and blurs the whole stack: give \(slices, H, W\), got \(9, 9\)"),
        ((9, 9, 9), (1.0, 1.0), r"\(slice, row, column\) spacing, got \(1.0, 1.0\)"),
        ((9, 9, 9), (1.0, 1.0, 0.0), r"\(slice, row, column\) spacing"),
    ):
        with pytest.raises(UsageError, match=words):
            build("blur", shape, pixel, kernel="gaussian3d:0.5")


def test_a_simulation_blurs_the_stack_in_mm(world):
    """The volume has voxels of 3 x 9 x 9 mm."""
    case = measured(world, kernel="gaussian3d:1.5", unit="mm")
    expected = ndimage.gaussian_filter(display(world), (0.5, 1 / 6, 1 / 6), mode="reflect", truncate=4.0)
    np.testing.assert_allclose(case.measurement.y[:, 0], expected, atol=1e-2)  # HU


@pytest.mark.parametrize("name", ["k.npy", "k.nii"])
def test_a_kernel_file_with_three_axes(world, here, name):
    if name == "k.npy":
        np.save(name, SKEW)
    else:
        nib.save(nib.Nifti1Image(SKEW.T, np.eye(4)), name)
    case = measured(world, kernel=name)
    expected = ndimage.convolve(display(world).astype(float), SKEW / SKEW.sum(), mode="reflect")
    np.testing.assert_allclose(case.measurement.y[:, 0], expected, atol=1e-2)
    assert any(f"kernel file {name} has the sum {SKEW.sum():.4g} and was scaled to 1" in n for n in case.notes)


def test_restored_from_the_command_line(world, here, run):
    blur = ("--op", "blur", "--kernel", "gaussian3d:1.5", "--set", "operator.unit=mm", "--simulate")
    args = ("--solver", "wiener", "--compare", "pnp", "--compare", "tv", "--prior", "$/prior", "-o", "r.nii.gz")
    code, _, err = run("reconstruct", "$/ct.nii.gz", *blur, *args, "--quiet")
    assert (code, err) == (0, "")
    made = json.loads((here / "r.json").read_text())
    assert list(made["metrics"]) == ["pnp", "tv", "wiener"] and made["runs"]["tv"]["converged"]
    case = measured(world, noise=0.01, kernel="gaussian3d:1.5", unit="mm")
    op = build("blur", (5, 36, 40), (3.0, 9.0, 9.0), kernel="gaussian3d:1.5", unit="mm")
    expected = op.pinv(torch.from_numpy(case.measurement.y))[:, 0].numpy()
    found = to_slices(load_volume(here / "r.nii.gz", modality="CT")).data
    np.testing.assert_allclose(found, expected, atol=1e-2)
    assert made["metrics"]["tv"]["rmse"] < made["metrics"]["wiener"]["rmse"]


def test_a_kernel_of_sum_zero_is_named_and_not_scaled(world, here, run, caplog):
    np.save("edges.npy", EDGES)
    caplog.set_level("WARNING", "invdiff")  # --quiet of an earlier test is still in force
    op = build("blur", (20, 30), 1.0, kernel="edges.npy", boundary="circular")
    (note,) = op.notes
    assert "kernel file edges.npy has the sum 0 and is used as it is, not scaled to 1" in note
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "edges.npy has the sum 0" in caplog.text
    x = torch.randn(1, 20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(op(x)[0].numpy(), ndimage.convolve(x[0].numpy(), EDGES, mode="wrap"), atol=1e-12)
    assert op.norm == pytest.approx(8) and "has the sum 0" in Blur((9, 9), EDGES).notes[0]
    scan = ("reconstruct", "$/ct.nii.gz", "--op", "blur", "--kernel", "edges.npy", "--simulate", "--solver", "wiener")
    assert run(*scan, "-o", "r.nii.gz", "--quiet")[0] == 0
    made = json.loads((here / "r.json").read_text())
    assert note in made["warnings"] and made["runs"]["wiener"]["chi2_per_datum"] > 0


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (SKEW[:2], "2 x 3 x 3: an even side has no middle|crop or pad it with zeros"),
        (np.full((3, 37, 3), 1.0), "3 x 37 x 3, is larger than the image, 5 x 36 x 40|use a smaller kernel"),
        (np.where(SKEW > 100, np.nan, SKEW), "values that are not finite|replace them"),
        (-SKEW, "must not be negative|change its sign"),
        (0 * SKEW, "is zero everywhere|check it"),
        (np.ones((1, 1, 3, 3)), "4 axes|(slices, rows, columns) for 3D"),
    ],
)
def test_3d_kernels_that_cannot_be_used(refused, here, kernel, words):
    np.save("k.npy", kernel)
    refused(3, "k.npy|" + words, "reconstruct", "$/ct.nii.gz", "--op", "blur", "--kernel", "k.npy", "--simulate")


def test_widths_that_cannot_be_used(refused):
    scan = ("reconstruct", "$/ct.nii.gz", "--op", "blur", "--simulate", "--kernel")
    refused(2, "sigma of a Gaussian kernel must lie between 0.001 and 512", *scan, "gaussian3d:0")
    refused(2, "expected gaussian3d:SIGMA, got 'gaussian3d:'", *scan, "gaussian3d")
    refused(3, "the kernel gaussian3d:5, 41 x 41 x 41, is larger than the image, 5 x 36 x 40", *scan, "gaussian3d:5")
