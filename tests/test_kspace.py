"""Raw k-space of a scanner: whitened, cropped, compressed, and reconstructed where it lies."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from invdiff.errors import InputError, ShapeError
from invdiff.kspace import measurement_from_kspace
from invdiff.measurement_file import save_measurement
from invdiff.operators.mri import birdcage_maps

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"))
COILS, H, W = 4, 40, 36
MIX = np.eye(COILS) + 0.3 * np.random.default_rng(5).standard_normal((COILS, COILS, 2)).view(complex)[..., 0]


def transform(image):
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, (-2, -1)), norm="ortho"), (-2, -1))


@pytest.fixture(scope="module")
def scan():
    """Two slices with a bright corner, twice oversampled along the rows, coils with coupled noise."""
    rng = np.random.default_rng(0)
    image = np.zeros((2, 1, H, W))
    image[..., 8:32, 6:30] = 1
    image[1, :, 8:14, 6:12] = 3
    maps = birdcage_maps((H, W), COILS)
    wide = np.zeros((2, COILS, 2 * H, W), complex)
    wide[..., H // 2 : H // 2 + H, :] = image * maps
    draw = lambda *shape: (rng.standard_normal((*shape, 2)) @ [1, 1j]) * 0.02  # noqa: E731
    k = transform(wide) + np.einsum("vc,schw->svhw", MIX, draw(*wide.shape))
    return image[:, 0], maps, k, MIX @ draw(COILS, 5000)


def test_whitened_scan_comes_back_where_and_as_it_is(scan, run, here):
    image, maps, k, noise = scan
    affine = np.array([[-1.5, 0, 0, 20], [0, -1.5, 0, 30], [0, 0, 4, -9], [0, 0, 0, 1.0]])
    m = measurement_from_kspace(k, noise=noise, maps=maps, oversampling=2, affine=affine)
    assert m.noise["std"] == pytest.approx(0.5**0.5) and m.y.shape == (2, 2 * COILS, H, W)
    save_measurement("raw.h5", m)
    code, _, err = run("reconstruct", "raw.h5", "--solver", "sense-cg", "-o", "r.nii.gz", "--json")
    assert (code, err) == (0, "")
    result = nib.load(here / "r.nii.gz")
    np.testing.assert_allclose(result.affine, affine)
    found = np.asarray(result.dataobj)
    assert np.abs(found[..., 1].T - image[1]).max() < 0.4  # corner bright where it was, amplitude right
    assert found[6:12, 8:14, 1].mean() == pytest.approx(3, rel=0.05)


def test_whitening_makes_the_noise_white(scan):
    _, maps, k, noise = scan
    rng = np.random.default_rng(1)
    alone = np.einsum("vc,schw->svhw", MIX, (rng.standard_normal((*k.shape, 2)) @ [1, 1j]) * 0.02)
    m = measurement_from_kspace(alone, noise=noise, maps=maps, oversampling=2)
    parts = m.y.reshape(2, 2, COILS, -1)
    flat = (parts[:, 0] + 1j * parts[:, 1]).transpose(1, 0, 2).reshape(COILS, -1)
    assert np.abs(flat @ flat.conj().T / flat.shape[1] - np.eye(COILS)).max() < 0.1


def test_coils_are_compressed_with_their_maps_and_levels_estimated(scan):
    _, maps, k, _ = scan
    full = measurement_from_kspace(k, maps=maps, oversampling=2)
    few = measurement_from_kspace(k, maps=maps, oversampling=2, virtual_coils=3)
    assert few.arrays["maps"].shape == (3, H, W) and few.y.shape[1] == 6
    assert full.noise["estimated"] and 0.015 < full.noise["std"] < 0.06  # coupled coils, about 0.02 each
    one = measurement_from_kspace(k[:, :1])
    assert one.operator["name"] == "mri" and set(one.arrays) == {"mask"}


def test_refusals(scan):
    _, maps, k, noise = scan
    with pytest.raises(ShapeError, match="k-space is"):
        measurement_from_kspace(k[0, 0])
    with pytest.raises(ShapeError, match="has 4 coils, the noise"):
        measurement_from_kspace(k, maps=maps, noise=noise[:3])
    with pytest.raises(ShapeError, match=r"coil maps .* do not fit"):
        measurement_from_kspace(k, maps=maps[:, ::2], oversampling=2)
    few = np.zeros_like(k)
    few[..., 38:42, 16:20] = 1
    with pytest.raises(InputError, match="too few outer samples"):
        measurement_from_kspace(few, maps=np.ones((COILS, 2 * H, W), complex))


@pytest.mark.skipif(not (DATA / "ksp_knee1_larson.npz").exists(), reason="no raw knee in INVDIFF_DATA")
def test_a_real_knee(run, here):
    """Fully sampled: the zero-filled image is the transform, magnitude and scale included."""
    k = np.load(DATA / "ksp_knee1_larson.npz")["kspace"].T[None]
    save_measurement("knee.h5", measurement_from_kspace(k, oversampling=2, pixel_mm=(0.5, 0.5)))
    assert run("reconstruct", "knee.h5", "--solver", "zero-filled", "-o", "k.nii.gz", "--quiet")[0] == 0
    found = np.asarray(nib.load(here / "k.nii.gz").dataobj)[..., 0].T
    whole = np.abs(np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(k[0]), norm="ortho")))
    assert found.shape == (320, 332)
    np.testing.assert_allclose(found, whole[160:480], atol=2e-5 * whole.max())
