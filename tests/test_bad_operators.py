"""Operators and measurements that cannot be right: refused, or warned of, in one line with the reason and a remedy."""

import json
import logging
import math
import warnings
from dataclasses import replace

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.measurement_file import load_measurement, save_measurement
from invdiff.operators import build
from invdiff.operators.ct import CTParallel
from invdiff.operators.fan import FanGeometry
from invdiff.operators.geometry import like_radians
from invdiff.operators.mri import CartesianMRI
from invdiff.operators.rays import ParallelGeometry, equispaced

CT = ("reconstruct", "$/ct.nii.gz", "--op", "ct-sparse", "--views", "12", "--simulate", "--solver", "fbp")
FAN = (*CT, "--geometry", "fan")


def image(op, *args):
    return ("reconstruct", "$/ct.nii.gz", "--op", op, "--simulate", *args)


# Scans


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("source, 150 mm from the axis|inside the circle around the slice|--sod", ("--sod", "150")),
        ("detector, 300 mm from the source|beyond the axis", ("--sod", "400", "--sdd", "300")),
        ("source-axis distance must be positive, in mm, got -400", ("--sod", "-400")),
        ("sod must be a finite number, got nan", ("--sod", "nan")),
        ("source-axis distance must be at most 1e+12, got", ("--sdd", "1e300")),
        ("axis_offset must be at most 1e+12, got 1e+300", ("--axis-offset", "1e300", "--detector-count", "9")),
        ("detector_pitch must be positive, in mm, got 0", ("--detector-pitch", "0")),
        ("detector_offset must be a finite number", ("--detector-offset", "inf")),
        ("axis_offset must be a finite number", ("--axis-offset", "nan")),
        ("start must be a finite number, got nan", ("--set", "operator.start=nan")),
        ("unknown rotation 'left': choose one of", ("--set", "operator.rotation=left")),
    ],
)
def test_scanners_that_cannot_be_built(refused, words, args):
    refused(2, words, *FAN, *args)


def test_arcs_that_cannot_be(refused):
    limited = ("reconstruct", "$/ct.nii.gz", "--op", "ct-limited", "--simulate", "--arc")
    for arc in ("0", "-90", "400"):
        refused(2, f"arc must be in (0, 360] degrees, got {float(arc)}", *limited, arc)
    for arc in ("3.14", "3.1416", "6.28"):
        refused(2, "90 views from 0 to|look like radians: give angles in degrees", *limited, arc)


@pytest.mark.parametrize("turn", [math.pi, 2 * math.pi])
@pytest.mark.parametrize("end", [True, False])
def test_views_in_radians_are_refused(turn, end):
    views = tuple(np.linspace(0.3, 0.3 + turn, 60, endpoint=end))
    for make in (
        lambda: ParallelGeometry(views, 20, 1.0),
        lambda: FanGeometry(views, 20, 1.0, 100.0, 180.0),
    ):
        with pytest.raises(
            UsageError, match=r"60 views from 0.3 to .* look like radians: give angles in degrees"
        ) as caught:
            make()
        assert "\n" not in str(caught.value)
    degrees = tuple(np.degrees(views))
    assert ParallelGeometry(degrees, 20, 1.0).doubts() == ()
    assert not like_radians(views[:15]) and not like_radians(equispaced(60, 4.0)) and not like_radians((1.0,))


def test_angles_that_may_be_radians_are_doubted(run, here, caplog):
    caplog.set_level(logging.WARNING, "invdiff")  # --quiet of an earlier test is still in force
    scan = ("reconstruct", "$/ct.nii.gz", "--op", "ct-limited", "--simulate", "--solver", "fbp", "-o", "r.nii.gz")
    assert run(*scan, "--arc", "1.57", "--set", "operator.start=0.785")[0] == 0
    made = json.loads((here / "r.json").read_text())
    words = ("cover only 1.553 degrees: angles are in degrees", "first view is at 0.785 degrees: angles are in degrees")
    assert all(any(w in line for line in made["warnings"]) and w in caplog.text for w in words)
    for plain in ({}, {"start": 1.5}, {"views": 200}, {"start": 45.0}):
        assert not build("ct-sparse", (20, 20), 1.0, **plain).notes


def test_a_detector_too_small_is_warned_of_with_the_share_of_rays_that_miss(run, here):
    assert run(*FAN, "--detector-count", "21", "-o", "r.nii.gz")[0] == 0
    (line,) = (w for w in json.loads((here / "r.json").read_text())["warnings"] if "too small" in w)
    share = float(line.split("slice: ")[1].split(" %")[0]) / 100
    full = build("ct-sparse", (36, 40), 9.0, geometry="fan", views=12)
    fine = replace(full.geometry, detector_count=40 * 61, detector_pitch_mm=full.geometry.detector_pitch_mm / 40)
    hit = type(full)((36, 40), 9.0, fine)(torch.ones(1, 36, 40))[0] > 0  # rays through the slice, seen or not
    seen = hit & (fine.elements_mm().abs() < 21 / 2 * full.geometry.detector_pitch_mm)
    assert share == pytest.approx(1 - float(seen.sum() / hit.sum()), abs=0.02) and 0.3 < share < 0.8


# Restoration


@pytest.mark.parametrize(
    ("code", "words", "args"),
    [
        (2, "--factor|0 is not in the range x>=1", ("--factor", "0")),
        (2, "factor must be a positive whole number up to|got 0", ("--set", "operator.factor=0")),
        (2, "factor must be a positive whole number up to|got 1.5", ("--set", "operator.factor=1.5")),
        (2, "factor must be a positive whole number up to|got -2", ("--set", "operator.factor=-2")),
        (2, "by 7 does not fit 36 x 40 pixels: crop to 35 x 35 or pad to 42 x 42", ("--factor", "7")),
        (2, "by 2 does not fit 5 slices: crop to 4 or pad to 6", ("--axis", "through-plane")),
    ],
)
def test_factors_that_cannot_be_used(refused, code, words, args):
    refused(code, words, *image("sr", *args))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((40, 36)), "40 x 36, the slices are 36 x 40: make a mask of the same size"),
        (np.ones((1, 40)), "1 x 40, the slices are 36 x 40"),
        (np.full((36, 40), 0.5), "1 (measured) and 0 (missing) only, found 0.5|threshold it"),
        (np.full((36, 40), 255), "found 255|threshold it"),
        (np.full((36, 40), np.nan), "found nan"),
        (np.zeros((36, 40)), "removes every pixel: 1 stands for measured"),
        (np.ones((2, 36, 40)), "has 2 slices, the image 5: give one mask for all slices, or one for each"),
    ],
)
def test_masks_that_cannot_be_used(refused, here, mask, words):
    np.save("m.npy", mask)
    refused(3, "m.npy|" + words, *image("inpaint", "--mask", "m.npy"))


def test_a_mask_volume_with_other_values_or_another_size(world, refused, here):
    source = nib.load(world / "ct.nii.gz")
    for name, mask, words in (
        (
            "half.nii",
            np.full(source.shape, 0.5),
            "must hold 1 (measured) and 0 (missing) only, 7200 voxels|threshold it",
        ),
        ("small.nii", np.ones((40, 36, 4)), "the mask differs from the image in shape or affine|resample it"),
    ):
        nib.save(nib.Nifti1Image(mask.astype(np.float32), source.affine), name)
        refused(3, f"{name}|{words}", *image("inpaint", "--mask", name))


def test_kernels_that_cannot_be_used(refused, here):
    nan = np.ones((3, 3))
    nan[1, 2] = np.nan
    for kernel, words in (
        (nan, "holds 1 values that are not finite: replace them"),
        (np.ones((3, 4)), "3 x 4: an even side has no middle"),
        (np.ones((41, 3)), "41 x 3, is larger than the image, 36 x 40: use a smaller kernel"),
        (np.zeros((3, 3)), "is zero everywhere"),
        (np.array([[{}]], object), "holds Python objects or records, which are not read"),
    ):
        np.save("k.npy", kernel, allow_pickle=True)
        refused(3, "k.npy|" + words, *image("blur", "--kernel", "k.npy"))


# Measurements


def test_measurements_that_do_not_fit_themselves(world, here, refused):
    good = load_measurement(world / "m.h5")
    nan, views = good.y.copy(), good.operator["views_deg"]
    nan[0, 0, 3, 4] = np.nan

    def bad(words, **parts):
        broken = replace(good)
        for name, part in parts.items():
            object.__setattr__(broken, name, part)
        save_measurement(here / "bad.h5", broken, overwrite=True)
        refused(3, "bad.h5|" + words, "reconstruct", "bad.h5", "--solver", "fbp")

    bad("13 angles but 12 projections; make", operator=good.operator | {"views_deg": [*views, 180.0]})
    bad("7 detector bins but|make /operator and /y agree", operator=good.operator | {"detector_count": 7})
    bad("1 NaN or infinite values; repair them, or give them weight 0", y=nan)
    bad("looks like photon counts|store -log(counts", y=(1e4 + good.y).astype(np.float32))
    bad("angles_rad; convert to degrees", operator=good.operator | {"angles_rad": [0.1]})
    radians = list(np.linspace(0, math.pi, 20, endpoint=False))
    rows = np.repeat(good.y, 2, axis=2)[:, :, :20]
    weights = {"weights": None}
    bad("like radians; convert them to degrees", y=rows, operator=good.operator | {"views_deg": radians}, **weights)
    bad("no scan that can be read|'left'|write it with", operator=good.operator | {"axis_offset_mm": "left"})


def test_measurement_files_that_reach_elsewhere_or_promise_too_much(world, here, refused):
    whole = (world / "m.h5").read_bytes()
    (here / "half.h5").write_bytes(whole[: len(whole) // 2])
    refused(3, "half.h5: is damaged or truncated|again", "reconstruct", "half.h5")
    (here / "link.h5").write_bytes(whole)
    with h5py.File(here / "link.h5", "r+") as file:
        del file["y"]
        file["y"] = h5py.ExternalLink(str(world / "m.h5"), "/y")
    refused(3, "link.h5: /y is a link to elsewhere|store the data itself", "reconstruct", "link.h5")
    (here / "huge.h5").write_bytes(whole)
    with h5py.File(here / "huge.h5", "r+") as file:
        del file["y"]
        file.create_dataset("y", (10**5, 1, 1000, 1000), "f4", chunks=(1, 1, 100, 100))
    refused(3, "huge.h5: /y declares 400 GB, the limit is|split the file", "reconstruct", "huge.h5")


# Magnetic resonance, a library so far


def test_masks_and_maps_of_k_space_that_do_not_match():
    maps = np.ones((4, 8, 6), complex)
    with pytest.raises(ShapeError, match=r"coil maps \(coils, 6, 8\) or .*, got \(4, 8, 6\)"):
        CartesianMRI(np.ones((6, 8)), maps)
    with pytest.raises(ShapeError, match="mask has 2 slices and the coil maps have 3: they must agree"):
        CartesianMRI(np.ones((2, 8, 6)), np.stack([maps] * 3))
    with pytest.raises(InputError, match="coil maps must be finite and not all zero: check how they were estimated"):
        CartesianMRI(np.ones((8, 6)), maps * np.nan)
    with pytest.raises(UsageError, match="holds 0 and 1 only: threshold it first"):
        CartesianMRI(np.full((8, 6), 0.5))
    column = CartesianMRI(np.ones((1, 6)))  # does not broadcast over the rows of an image
    with pytest.raises(ShapeError, match=r"images \(\.\.\., 2, 1, 6\), got \(2, 8, 6\)"):
        column(torch.zeros(2, 8, 6))
    coils = CartesianMRI(np.ones((8, 6)), maps)
    with pytest.raises(ShapeError, match=r"measurements \(\.\.\., 8, 8, 6\), got \(6, 8, 6\)"):
        coils.adjoint(torch.zeros(6, 8, 6))


def test_sinograms_of_another_shape_in_python():
    op = CTParallel((8, 8), 1.0, ParallelGeometry(equispaced(20), 13, 1.0))
    with pytest.raises(ShapeError, match=r"CTParallel expects measurements \(\.\.\., 1, 20, 13\), got \(1, 19, 13\)"):
        op.fbp(torch.zeros(1, 19, 13))
    with pytest.raises(ShapeError, match=r"CTParallel expects images \(\.\.\., 1, 8, 8\), got \(1, 8, 9\)"):
        op(torch.zeros(1, 8, 9))


def edited(measurement, **changes):
    """The measurement, saved, with entries of /noise changed and y replaced."""
    noise = {**measurement.noise, **changes.pop("noise", {})}
    save_measurement("m.h5", replace(measurement, noise=noise, **changes), overwrite=True)


def test_magnitudes_below_zero_are_no_magnitudes(run, here, refused):
    assert run("simulate", "$/ct.nii.gz", "--op", "denoise", "-o", "d.h5")[0] == 0
    made = load_measurement("d.h5")
    edited(made, noise={"model": "rician"})
    refused(3, "m.h5: /noise is rician, of magnitudes, but /y goes down to -1", "reconstruct", "m.h5")
    edited(made, noise={"model": "rician"}, y=np.abs(made.y))
    assert run("reconstruct", "m.h5", "--solver", "measured", "-o", "r.nii.gz")[0] == 0


def test_measured_pixels_that_are_all_zero_have_no_contrast(run, here, refused):
    brightness = nib.Nifti1Image(np.random.default_rng(0).random((8, 9, 2), np.float32), np.eye(4))
    nib.save(brightness, "image.nii")
    assert run("simulate", "image.nii", "--op", "inpaint", "-o", "i.h5")[0] == 0
    made = load_measurement("i.h5")
    edited(made, y=0 * made.y)
    refused(3, "m.h5: values from 0 to 0 leave no contrast", "reconstruct", "m.h5")


def test_k_space_too_large_for_single_precision_is_one_line(run, here):
    assert run("simulate", "--op", "mri", "-o", "k.h5")[0] == 0
    made = load_measurement("k.h5")
    edited(made, y=made.y[:1] * np.float32(1e25), volume={**made.volume, "shape": [192, 192, 1], "slices_of_scan": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        code, _, err = run("reconstruct", "m.h5", "--solver", "zero-filled", "-o", "r.nii.gz")
    assert code in (0, 6) and err.count("\n") <= 1 and "mistake" not in err
