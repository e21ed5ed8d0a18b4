"""Raw k-space of several coils: whitening, compression, oversampling, sensitivities."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mri_cases import gaussian, random_maps

from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.operators import coils as raw
from invdiff.operators.kmask import make_mask
from invdiff.operators.mri import CartesianMRI, birdcage_maps, to_complex, to_real

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def complex_noise(*shape, seed=0):
    return random_maps(*shape, seed=seed) / np.sqrt(2)


def test_whitened_noise_has_the_identity_as_covariance():
    mixing = random_maps(4, 4, seed=1)
    noise = np.einsum("vc,chw->vhw", mixing, complex_noise(4, 200, 200))
    covariance = raw.noise_covariance(noise)
    assert np.allclose(covariance, mixing @ mixing.conj().T, atol=0.05 * abs(covariance).max())
    assert np.allclose(raw.noise_covariance(raw.prewhiten(noise, covariance)), np.eye(4), atol=1e-10)
    fresh = raw.prewhiten(np.einsum("vc,chw->vhw", mixing, complex_noise(4, 200, 200, seed=7)), covariance)
    assert np.allclose(raw.noise_covariance(fresh), np.eye(4), atol=0.03)
    assert fresh.real.var() == pytest.approx(0.5, abs=0.01)
    stack = noise.astype(np.complex64)[None]
    assert raw.prewhiten(stack, covariance).dtype == np.complex64
    with pytest.raises(ShapeError, match=r"must be \(4, 4\), got \(3, 3\)"):
        raw.prewhiten(noise, np.eye(3))
    with pytest.raises(InputError, match="singular"):
        raw.prewhiten(noise, np.ones((4, 4)))
    with pytest.raises(InputError, match="not Hermitian"):
        raw.prewhiten(noise, np.triu(np.ones((4, 4))))
    with pytest.raises(InputError, match="too few"):
        raw.noise_covariance(noise[:, 0, :5])


def test_coil_compression_keeps_the_energy_of_low_rank_data():
    kspace = np.einsum("vc,schw->svhw", random_maps(12, 3), random_maps(2, 3, 10, 9, seed=1))
    kspace += 0.01 * random_maps(*kspace.shape, seed=2)
    small, matrix = raw.compress_coils(kspace, 3)
    assert small.shape == (2, 3, 10, 9) and matrix.shape == (3, 12)
    assert np.allclose(matrix @ matrix.conj().T, np.eye(3))
    energy = lambda z: (abs(z) ** 2).sum()  # noqa: E731
    assert energy(small) > 0.99 * energy(kspace) and energy(raw.compress_coils(kspace, 2)[0]) < 0.99 * energy(kspace)
    assert energy(raw.compress_coils(kspace, 12)[0]) == pytest.approx(energy(kspace))
    with pytest.raises(UsageError, match="1 to the 12 coils"):
        raw.compress_coils(kspace, 13)


@pytest.mark.parametrize("height", [16, 18, 22, 15])
def test_removing_oversampling_crops_the_image(height):
    full = CartesianMRI(np.ones((height, 5)))
    x = gaussian(3, 2, height, 5, dtype=torch.float64)
    cropped = raw.remove_oversampling(to_complex(full(x)).numpy(), 2)
    new = cropped.shape[-2]
    start = height // 2 - new // 2
    image = CartesianMRI(np.ones((new, 5))).adjoint(to_real(torch.from_numpy(cropped)))
    assert new == round(height / 2) and torch.allclose(image, x[:, :, start : start + new], atol=1e-12)
    turned = raw.remove_oversampling(to_complex(full(x)).numpy().swapaxes(-1, -2), 2, axis=-1)
    assert np.allclose(turned, cropped.swapaxes(-1, -2))
    with pytest.raises(UsageError, match="oversampling factor"):
        raw.remove_oversampling(cropped, 0.5)


def simulated(shape=(40, 36), coils=4, acceleration=2.0):
    """k-space of a smooth disc seen by birdcage coils, the maps and the disc."""
    maps = birdcage_maps(shape, coils)
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    inside = x**2 + y**2 < 0.6
    image = torch.from_numpy(np.stack([inside * (1 + 0.3 * np.cos(5 * x)), inside * 0.4 * np.sin(4 * y)])).float()
    op = CartesianMRI(make_mask(shape, "equispaced", acceleration, 0.45)[0], maps)
    return to_complex(op(image)).numpy(), maps, inside


def test_maps_need_a_calibration_region_and_sigpy(monkeypatch):
    kspace, _, _ = simulated()
    with pytest.raises(UsageError, match=r"square of 12 to 36 samples, got 8: measure a larger centre"):
        raw.estimate_maps(kspace, 8)
    with pytest.raises(InputError, match="central 24 x 24 samples of k-space are not all measured"):
        raw.estimate_maps(kspace, 24)
    with pytest.raises(ShapeError, match=r"\(\.\.\., coils, H, W\)"):
        raw.estimate_maps(kspace[0])
    monkeypatch.setitem(sys.modules, "sigpy.mri.app", None)
    with pytest.raises(UsageError, match=r"pip install invdiff\[mri\]"):
        raw.estimate_maps(kspace, 16)


def test_estimated_maps_are_the_true_ones_inside_the_object():
    pytest.importorskip("sigpy", reason="sigpy is not installed (extra mri)")
    kspace, maps, inside = simulated()
    found = raw.estimate_maps(kspace[None], 16)[0]
    expected = maps * np.exp(-1j * np.angle(maps[:1]))  # the phase of coil 0 is removed
    assert found.shape == maps.shape and found.dtype == np.complex64 and np.isfinite(found).all()
    assert np.linalg.norm((found - expected)[:, inside]) < 0.05 * np.linalg.norm(expected[:, inside])


@pytest.fixture(scope="module")
def brain():
    path = DATA / "ksp_brain8_sigpy.npz"
    if not path.is_file():
        pytest.skip(f"no real k-space: {path} is missing (set INVDIFF_DATA)")
    with np.load(path) as archive:
        return archive["kspace"]


def centred_ifft(kspace):
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, (-2, -1)), norm="ortho"), (-2, -1))


def test_real_kspace_without_undersampling_is_the_coil_combined_image(brain):
    taper = np.outer(*(np.maximum(0, 1 - abs(np.arange(n) - n // 2) / 12) for n in brain.shape[1:]))
    coarse = centred_ifft(brain * taper)
    maps = (coarse / np.sqrt((abs(coarse) ** 2).sum(0))).astype(np.complex64)
    expected = (maps.conj() * centred_ifft(brain)).sum(0) / (abs(maps) ** 2).sum(0)
    y = to_real(torch.from_numpy(brain))
    full, own = (CartesianMRI(mask, maps) for mask in (np.ones(brain.shape[1:]), (brain != 0).any(0)))
    assert np.linalg.norm(to_complex(full.pinv(y))[0].numpy() - expected) < 1e-5 * np.linalg.norm(expected)
    assert torch.equal(own.pinv(y), full.pinv(y))  # what was not measured is zero in this file
    magnitude = abs(expected) / abs(expected).max()
    assert magnitude[60:170, 50:130].mean() > 5 * magnitude[:15, :15].mean()  # a head in the middle, not in the corners


def test_espirit_on_real_kspace_explains_all_coils(brain):
    pytest.importorskip("sigpy", reason="sigpy is not installed (extra mri)")
    centre = brain[:, 115 - 24 : 115 + 24, 90 - 24 : 90 + 24]
    maps = raw.estimate_maps(centre, 24)
    coarse = centred_ifft(centre * np.outer(np.hanning(48), np.hanning(48)))
    projected = maps * (maps.conj() * coarse).sum(0)
    seen = abs(maps).sum(0) > 0
    assert seen.mean() > 0.3 and np.linalg.norm((projected - coarse)[:, seen]) < 0.1 * np.linalg.norm(coarse[:, seen])
