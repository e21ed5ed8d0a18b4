"""Figures of merit against scikit-image and closed forms; intensity maps and their checks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from invdiff import intensity
from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.metrics import body_mask, chi2, evaluate, nrmse, psnr, rmse_body, ssim
from invdiff.provenance import plain

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))


def body(shape=(3, 40, 48)):
    """A filled ellipse of tissue in air with a lung, a bone, and a table below, HU."""
    s, r, c = np.indices(shape).astype(float)
    stack = np.full(shape, -1000.0)
    stack[((r - 18) / 15) ** 2 + ((c - 24) / 20) ** 2 < 1] = 40
    stack[((r - 18) / 6) ** 2 + ((c - 18) / 5) ** 2 < 1] = -850
    stack[((r - 24) / 3) ** 2 + ((c - 26) / 3) ** 2 < 1] = 1200
    stack[:, 37:39, 5:40] = 0
    return stack + s


@pytest.mark.parametrize("data_range", [2000.0, 700.0])
def test_ssim_equals_scikit_image(data_range):
    skimage = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a = body()
    b = (a + rng.normal(0, 60, a.shape)).astype(np.float32)
    theirs = [
        skimage.structural_similarity(
            x, y, data_range=data_range, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(a, b.astype(np.float64), strict=True)
    ]
    assert ssim(b, a, data_range, window=None) == pytest.approx(np.mean(theirs), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_psnr_is_that_of_the_window():
    a = np.zeros((2, 12, 12))
    assert psnr(a + 20, a) == pytest.approx(40)
    assert psnr(a + 3000, a) == pytest.approx(20 * np.log10(2))  # saturates at 1000 HU
    assert psnr(a + 3000, a, 3000, window=None) == pytest.approx(0)
    assert psnr(a, a) == np.inf


def test_body_mask_is_filled_and_leaves_out_the_table():
    stack = body()
    mask = body_mask(stack)
    _, r, c = np.indices(stack.shape)
    np.testing.assert_array_equal(mask, ((r - 18) / 15) ** 2 + ((c - 24) / 20) ** 2 < 1)
    assert not body_mask(np.full((2, 8, 8), -1000)).any()


def test_errors_outside_the_body_do_not_count():
    stack = body()
    mask = body_mask(stack)
    assert rmse_body(stack + np.where(mask, 7, 500), stack) == pytest.approx(7)
    assert np.isnan(rmse_body(np.full((2, 8, 8), -1000.0), np.full((2, 8, 8), -1000.0)))


def test_nrmse_and_chi2():
    reference = np.array([[[3.0, 4.0]]])
    assert nrmse(reference + np.array([0, 1]), reference) == pytest.approx(0.2)
    assert np.isnan(nrmse(reference, np.zeros_like(reference)))
    assert nrmse(np.full((1, 1, 2), -900.0), np.full((1, 1, 2), 0.0), 1000) == pytest.approx(0.9)
    residual = np.random.default_rng(0).normal(0, 3, 100_000).astype(np.float32)
    assert chi2(residual, 3) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("modality", ["CT", "MR", "image"])
def test_every_number_has_its_convention(modality):
    stack = body()
    result = evaluate(stack + 5, stack, modality)
    names = set(result) - {"units", "convention"}
    assert names == set(result["convention"]) and ("rmse_body_hu" in names) == (modality == "CT")
    assert result["rmse"] == pytest.approx(5)
    if modality != "CT":
        assert result["psnr_db"] == pytest.approx(20 * np.log10(np.ptp(stack) / 5))
        assert f"{np.ptp(stack):.6g}" in result["convention"]["psnr_db"]
    json.dumps(plain(evaluate(stack, stack, modality)), allow_nan=False)


def test_metrics_refuse_what_they_cannot_compare():
    stack = body()
    with pytest.raises(ShapeError, match="one shape"):
        evaluate(stack[1:], stack, "CT")
    with pytest.raises(UsageError, match="CT, MR, image"):
        evaluate(stack, stack, "PET")
    with pytest.raises(ShapeError, match="11"):
        ssim(stack[:, :8], stack[:, :8])
    with pytest.raises(InputError, match="NaN"):
        psnr(np.full_like(stack, np.nan), stack)
    assert evaluate(stack[:, :8], stack[:, :8], "MR")["ssim"] is None


# Intensity -----------------------------------------------------------------------------------------------------------


def test_attenuation_and_back():
    hu = np.array([-1000.0, -500, 0, 1000, 3000])
    mu = intensity.hu_to_mu(hu, 0.02)
    np.testing.assert_allclose(mu, [0, 0.01, 0.02, 0.04, 0.08])
    np.testing.assert_allclose(intensity.mu_to_hu(mu, 0.02), hu)
    np.testing.assert_allclose(intensity.hu_to_mu(np.array([-3024, 9999]), 0.02, hu_max=1000), [0, 0.04])


def test_affine_map():
    u = np.linspace(-1, 1, 5)
    np.testing.assert_allclose(intensity.CT_MAP.apply(u), [-1000, -500, 0, 500, 1000])
    mapping = intensity.AffineMap(3.0, -7.0)
    np.testing.assert_allclose(mapping.invert(mapping.apply(u)), u)
    for scale in (0, -1, np.nan):
        with pytest.raises(UsageError, match="positive scale"):
            intensity.AffineMap(scale, 0)


def test_implausible_hu_are_refused():
    stack = body()
    intensity.check_hu_range(stack)
    intensity.check_hu_range(np.random.default_rng(0).normal(40, 15, (4, 9, 9)))  # a crop inside the liver
    for bad, words in (
        (np.zeros((3, 3)), "constant"),
        ((stack + 1000) / 3000, "normalised"),
        (intensity.hu_to_mu(stack), "attenuation"),
        (stack + 1024, "intercept"),
        (np.where(stack > -500, 300, 0), "intercept"),
        (stack * 1e3, "beyond"),
        (np.array([np.nan, 0]), "NaN"),
    ):
        with pytest.raises(InputError, match=words):
            intensity.check_hu_range(bad)


def test_modality_is_told_by_the_values():
    stack = body()
    assert intensity.guess_modality(stack) == "CT"
    for other in (stack + 1000, stack / 1000, np.abs(stack), np.zeros((3, 3))):
        assert intensity.guess_modality(other) == "image"


def test_modality_of_real_volumes():
    from invdiff.volume import load_volume

    files = sorted(DATA.glob("*.nii.gz"), key=lambda file: file.stat().st_size)[:12]
    if not files:
        pytest.skip("real data absent; set INVDIFF_DATA to the folder that holds them")
    for file in files:
        volume = load_volume(file)
        assert volume.modality == ("CT" if file.name.startswith("ct_") else "image"), file.name
        if volume.modality == "CT":
            intensity.check_hu_range(volume.data)
        else:
            with pytest.raises(InputError):
                intensity.check_hu_range(volume.data)
