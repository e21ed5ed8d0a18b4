"""Restoration from the command line: degraded images in, images in the right place out."""

import json

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from invdiff.operators import OPERATORS, build
from invdiff.restoration import estimate_noise

DEGRADED = [
    ("blur", ("--kernel", "gaussian:1"), "wiener"),
    ("blur", ("--kernel", "motion:3:30", "--set", "operator.boundary=circular"), "wiener"),
    ("inpaint", ("--mask", "random:0.3"), "fill"),
    ("sr", ("--factor", "2"), "bicubic"),
    ("sr", ("--factor", "2", "--axis", "through-plane", "--slices", "0:4"), "bicubic"),
    ("denoise", (), "measured"),
]


@pytest.mark.parametrize(("op", "options", "baseline"), DEGRADED)
def test_a_degraded_volume_is_restored_on_its_own_grid(world, here, run, op, options, baseline):
    scan = ("reconstruct", "$/ct.nii.gz", "--op", op, *options, "--simulate", "--prior", "$/prior")
    code, _, err = run(*scan, "--solver", baseline, "--compare", "pnp", "-o", "r.nii.gz", "--quiet")
    assert (code, err) == (0, "")
    source, result = nib.load(world / "ct.nii.gz"), nib.load(here / "r.nii.gz")
    np.testing.assert_array_equal(result.affine, source.affine)
    made = json.loads((here / "r.json").read_text())
    assert list(made["metrics"]) == ["pnp", baseline] and OPERATORS[op].baseline == baseline
    truth, image = np.asarray(source.dataobj)[..., : result.shape[2]], np.asarray(result.dataobj)
    assert np.corrcoef(truth.ravel(), image.ravel())[0, 1] > 0.9  # neither flipped nor shifted
    assert made["noise"]["std"] == pytest.approx(0.01 * np.ptp(np.percentile(truth, (0.5, 99.5))), rel=1e-3)


@pytest.mark.parametrize("through", [False, True])
def test_a_coarse_image_is_refined_where_it_lies(world, here, run, through):
    """A blob keeps its place in mm; the fine grid has the same corner."""
    source = nib.load(world / "ct.nii.gz")
    data = np.asarray(source.dataobj)[:, :, :4]
    shape, times = ((4, 40, 36), (1, 1, 2)) if through else ((40, 36), (2, 2, 1))
    fine = torch.from_numpy(np.ascontiguousarray(data.transpose(2, 0, 1)))[:, None]
    axis = "through-plane" if through else "inplane"
    coarse = build("sr", shape, 1.0, factor=2, filter="average", axis=axis)(fine)[:, 0].numpy().transpose(1, 2, 0)
    affine = source.affine @ np.diag([*times, 1.0])
    affine[:3, 3] = source.affine[:3, :3] @ (np.array(times) / 2 - 0.5) + source.affine[:3, 3]
    nib.save(nib.Nifti1Image(coarse, affine), here / "coarse.nii.gz")
    nib.save(nib.Nifti1Image(data, source.affine), here / "fine.nii.gz")
    args = (
        "reconstruct",
        "coarse.nii.gz",
        "--op",
        "sr",
        "--filter",
        "average",
        "--axis",
        axis,
        "--noise-level",
        "0.01",
    )
    code, _, err = run(*args, "--solver", "bicubic", "--reference", "fine.nii.gz", "-o", "r.nii.gz", "--quiet")
    assert (code, err) == (0, "")
    result = nib.load(here / "r.nii.gz")
    assert result.shape == data.shape
    np.testing.assert_allclose(result.affine, source.affine, atol=1e-4)
    assert json.loads((here / "r.json").read_text())["metrics"]["bicubic"]["psnr_db"] > 15


def test_noise_is_estimated_from_what_is_not_constant():
    g = np.random.default_rng(0)
    rows = np.linspace(0, 300, 64)[:, None]
    stack = (rows + np.zeros((3, 64, 64)) + 7.0 * g.standard_normal((3, 64, 64))).astype(np.float32)
    stack[:, :, 40:] = -1000.0
    assert estimate_noise(stack) == pytest.approx(7.0, rel=0.05)


@pytest.mark.parametrize(
    ("code", "words", "args"),
    [
        (2, "--noise-level|--photons", ("--op", "ct-sparse", "--simulate", "--noise-level", "0.1")),
        (2, "does not invert|wiener", ("--op", "blur", "--simulate", "--solver", "bicubic")),
        (2, "needs a CT operator", ("--op", "blur", "--simulate", "--solver", "sirt")),
        (2, "kernel|gaussian", ("--op", "blur", "--simulate", "--kernel", "box:3")),
        (2, "does not fit|factor", ("--op", "sr", "--simulate", "--factor", "7")),
        (2, "no option 'kernel'", ("--op", "sr", "--simulate", "--kernel", "gaussian:1")),
        (2, "drop the option", ("--op", "blur", "--simulate", "--reference", "$/ct.nii.gz")),
        (3, "differs from the input", ("--op", "sr", "--noise-level", "0.1", "--reference", "$/ct.nii.gz")),
    ],
)
def test_refusals(refused, code, words, args):
    refused(code, words, "reconstruct", "$/ct.nii.gz", *args)


STORED = [
    ("blur", ("--kernel", "k.npy")),
    ("inpaint", ("--mask", "random:0.3")),
    ("inpaint", ("--mask", "m.npy")),
    ("sr", ("--factor", "2")),
    ("sr", ("--factor", "2", "--axis", "through-plane", "--slices", "0:4")),
    ("denoise", ()),
]


@pytest.mark.parametrize(("op", "options"), STORED)
def test_an_image_measurement_is_stored_and_reconstructed_alike(world, here, run, op, options):
    """Bit for bit what one command does; an array that came from a file is in the measurement file."""
    np.save(here / "k.npy", np.array([[0.1, 0.2, 0.1], [0.1, 0.4, 0.1], [0, 0, 0.05]]))
    np.save(here / "m.npy", np.arange(40 * 36).reshape(40, 36).T % 3 > 0)
    both = ("--op", op, *options)
    direct = ("reconstruct", "$/ct.nii.gz", *both, "--simulate", "--solver", "tv", "-o", "a.nii.gz", "--quiet")
    assert run(*direct)[::2] == (0, "")
    assert run("simulate", "$/ct.nii.gz", *both, "-o", "m.h5", "--quiet")[::2] == (0, "")
    for name in ("k.npy", "m.npy"):
        (here / name).unlink()
    code, _, err = run("reconstruct", "m.h5", "--solver", "tv", "-o", "b.nii.gz", "--quiet")
    assert (code, err) == (0, "")
    a, b = nib.load(here / "a.nii.gz"), nib.load(here / "b.nii.gz")
    np.testing.assert_array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj))
    np.testing.assert_array_equal(a.affine, b.affine)


def test_a_mask_volume_lies_where_the_image_lies(world, here, run, refused):
    """Storage order and slice range of image and mask are undone together; a mask elsewhere is refused."""
    source = nib.load(world / "ct.nii.gz")
    data = np.asarray(source.dataobj)
    mask = np.ones(data.shape, np.float32)
    mask[3:12, 20:31, 1] = 0  # nowhere symmetric, and different in every slice
    mask[25:30, 4:9, 2] = 0
    nib.save(nib.Nifti1Image(mask, source.affine), here / "mask.nii.gz")
    scan = ("reconstruct", "$/ct.nii.gz", "--op", "inpaint", "--mask", "mask.nii.gz", "--simulate", "--solver", "fill")
    assert run(*scan, "--noise-level", "1e-6", "--slices", "1:4", "-o", "r.nii.gz", "--quiet")[0] == 0
    changed = abs(np.asarray(nib.load(here / "r.nii.gz").dataobj) - data[..., 1:4]) > 1
    assert changed.any() and not changed[mask[..., 1:4] == 1].any()
    shifted = source.affine.copy()
    shifted[0, 3] += 5
    nib.save(nib.Nifti1Image(mask, shifted), here / "far.nii.gz")
    refused(3, "far.nii.gz|shape or affine", *scan[:5], "far.nii.gz", *scan[6:])


def test_missing_pixels_may_hold_anything(world, here, run):
    """What stands where nothing was measured is neither seen nor scaled by."""
    source = nib.load(world / "ct.nii.gz")
    data = np.clip(np.asarray(source.dataobj) + 1000, 0, None)
    mask = np.arange(36 * 40).reshape(40, 36) % 3 > 0
    nib.save(nib.Nifti1Image(mask[..., None].repeat(5, 2).astype(np.float32), source.affine), here / "mask.nii.gz")
    for name, value in (("a", 0.0), ("b", -400.0)):
        image = np.where(mask[..., None], data, value).astype(np.float32)
        nib.save(nib.Nifti1Image(image, source.affine), here / f"{name}in.nii.gz")
        scan = ("reconstruct", f"{name}in.nii.gz", "--op", "inpaint", "--mask", "mask.nii.gz", "--solver", "tv")
        assert run(*scan, "--set", "solver.weight=1", "--noise-level", "0.01", "-o", f"{name}.nii.gz")[0] == 0
    a, b = (np.asarray(nib.load(here / f"{name}.nii.gz").dataobj) for name in "ab")
    np.testing.assert_array_equal(a, b)


def test_an_image_file_is_complete(world, here, run, refused):
    np.save(here / "k.npy", np.ones((3, 3)))
    run("simulate", "$/ct.nii.gz", "--op", "blur", "--kernel", "k.npy", "-o", "m.h5", "--quiet")
    with h5py.File(here / "m.h5", "r+") as file:
        del file["kernel"]
    refused(3, "m.h5|k.npy|/kernel is missing", "reconstruct", "m.h5", "-o", "r.nii.gz")
    run("simulate", "$/ct.nii.gz", "--op", "denoise", "-o", "d.h5", "--quiet")
    with h5py.File(here / "d.h5", "r+") as file:
        file["mask"] = np.ones((36, 40), np.uint8)
    refused(3, "d.h5|/mask has no meaning for denoise", "reconstruct", "d.h5", "-o", "r.nii.gz")


def test_a_constant_image_has_no_contrast(world, here, refused):
    nib.save(nib.Nifti1Image(np.full((20, 16, 3), 7, np.float32), np.eye(4)), here / "const.nii.gz")
    scan = ("reconstruct", "const.nii.gz", "--op", "denoise", "-o", "r.nii.gz")
    refused(3, "const.nii.gz|constant", *scan, "--simulate")
    refused(3, "const.nii.gz|constant", *scan, "--noise-level", "0.05")
