"""Noise models: moments by simulation and from scipy.stats, likelihoods against scipy and by integration."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.noise import BeerLambert, Gaussian, Poisson, Rician, koay_basser, noise_model
from invdiff.noise_coils import ComplexGaussian
from invdiff.operators.mri import CartesianMRI, birdcage_maps
from invdiff.problem import whiten
from invdiff.restoration import make_noise
from invdiff.simulate import add_photon_noise

COUNT = 200_000


def draws(noise, value, count=COUNT):
    return noise.sample(np.full(count, value), np.random.default_rng(0))


def likelihood(noise, y, clean):
    clean = torch.as_tensor(clean, dtype=torch.float64)
    return noise.log_likelihood(torch.as_tensor(y, dtype=torch.float64), clean).numpy()


def whitened(noise, clean, count=COUNT):
    """Mean squared residual of the data step over the variance that weighs it."""
    y = torch.from_numpy(draws(noise, clean, count))
    return float(((noise.debias(y) - clean) ** 2 / noise.variance(y)).mean())


def test_gaussian():
    noise = Gaussian(0.3)
    y = draws(noise, 2.0)
    assert y.mean() == pytest.approx(2.0, abs=0.003) and y.std() == pytest.approx(0.3, rel=0.01)
    assert np.allclose(likelihood(noise, y, 2.0), stats.norm(2.0, 0.3).logpdf(y))
    assert whitened(noise, 2.0) == pytest.approx(1, rel=0.01)
    assert noise.sample(np.zeros(3, np.float32), np.random.default_rng(0)).dtype == np.float32


def test_poisson_of_an_image():
    noise = Poisson(peak=400.0, full=3.0, zero=-1.0)  # 0.01 per count
    counts = stats.poisson(100)
    y = draws(noise, 0.0)
    assert y.mean() == pytest.approx(0.0, abs=1e-3) and y.std() == pytest.approx(noise.gain * counts.std(), rel=0.01)
    assert draws(noise, 3.0).std() == pytest.approx(4.0 / math.sqrt(400), rel=0.01)
    k = np.arange(60, 140)
    assert np.allclose(likelihood(noise, noise.zero + noise.gain * k, 0.0), counts.logpmf(k))
    assert np.allclose(likelihood(noise, [-1.0, -0.99], -1.0), [0.0, -np.inf])  # nothing counted where nothing shines
    assert np.all(draws(noise, -5.0, 9) == -1.0)
    assert whitened(Poisson(1e4, 1.0), 0.5) == pytest.approx(1, rel=0.01)
    assert float(noise.variance(torch.tensor(-1.0))) == pytest.approx(4 * noise.gain**2)  # a hundredth of the peak
    assert float(Poisson(50.0, 1.0).variance(torch.tensor(0.0))) == pytest.approx(1 / 50**2)  # one count


def test_beer_lambert_is_what_simulations_do():
    integrals = np.linspace(0, 4, 24, dtype=np.float32).reshape(2, 1, 3, 4)
    noise = BeerLambert(1e4, 5.0)
    data = add_photon_noise(integrals, 1e4, seed=3, slices=(7, 9), electronic=5.0)
    for row, index in enumerate((7, 9)):
        g = np.random.default_rng([3, index])
        mean = 1e4 * np.exp(-integrals[row].astype(np.float64))
        counts = np.maximum(g.poisson(mean) + 5.0 * g.standard_normal(mean.shape), 1)
        assert np.array_equal(data.y[row], np.log(1e4 / counts).astype(np.float32))
        assert np.array_equal(data.variance[row], ((counts + 25) / counts**2).astype(np.float32))
        assert np.array_equal(noise.sample(integrals[row], np.random.default_rng([3, index])), data.y[row])
    y = torch.from_numpy(data.y)
    counts = 1e4 * torch.exp(-y)
    assert torch.equal(noise.variance(y), (counts + 25.0) / counts**2)
    assert whitened(BeerLambert(1e5, 5.0), 2.0) == pytest.approx(1, rel=0.01)


def test_beer_lambert_likelihood_is_that_of_the_counts():
    mean, clean = 50 * np.exp(-1.0), 1.0
    k = np.arange(1, 60)
    assert np.allclose(likelihood(BeerLambert(50.0), np.log(50 / k), clean), stats.poisson(mean).logpmf(k))
    s = 3.0
    noise, counts = BeerLambert(50.0, s), np.array([1.0, 7.25, 18.4, 60.0])
    every = np.arange(0, 400)  # the convolution, by the sum over all numbers of photons
    density = (stats.poisson(mean).pmf(every) * stats.norm(every, s).pdf(counts[:, None])).sum(1)
    assert np.allclose(likelihood(noise, np.log(50 / counts), clean), np.log(density), atol=1e-10)
    grid = np.linspace(1e-3, 80, 20001)
    total = np.trapezoid(np.exp(likelihood(noise, np.log(50 / grid), clean)), grid)
    below = (stats.poisson(mean).pmf(every) * stats.norm(every, s).cdf(1e-3)).sum()  # counts below 0 have no logarithm
    assert total + below == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 2.0, 8.0])
def test_rician_moments_and_likelihood(ratio):
    noise, s = Rician(0.4), 0.4
    rice = stats.rice(ratio, scale=s)
    y = draws(noise, ratio * s)
    assert y.mean() == pytest.approx(rice.mean(), rel=0.01) and y.var() == pytest.approx(rice.var(), rel=0.02)
    assert (y**2).mean() == pytest.approx((ratio**2 + 2) * s**2, rel=0.01)
    factor = float(koay_basser(torch.tensor(ratio, dtype=torch.float64)))
    assert factor == pytest.approx(rice.var() / s**2, rel=1e-9)
    grid = np.linspace(1e-9, (ratio + 12) * s, 20001)
    found = likelihood(noise, grid, ratio * s)
    assert np.allclose(found[1:], rice.logpdf(grid[1:]), atol=1e-8)
    assert np.trapezoid(np.exp(found), grid) == pytest.approx(1, abs=1e-6)


def test_rician_stays_finite_at_any_signal_to_noise_ratio():
    ratio = torch.logspace(-3, 5, 400)
    single, double = koay_basser(ratio), koay_basser(ratio.double())
    assert (single - double).abs().max() < 1e-3 and (double.diff() > -1e-4).all()
    assert abs(float(koay_basser(torch.tensor(9.999999).double()) - koay_basser(torch.tensor(10.0).double()))) < 5e-6
    y, a = torch.tensor(1000.0), torch.tensor(999.0, requires_grad=True)
    noise = Rician(1.0)
    value = noise.log_likelihood(y, a)
    (slope,) = torch.autograd.grad(value, a)
    assert float(value) == pytest.approx(stats.norm(999, 1).logpdf(1000), abs=2e-3)
    assert float(slope) == pytest.approx(1.0, abs=2e-3)
    clean = noise.debias(torch.tensor([0.5, 5.0]))
    assert float(clean[0]) == 0 and float(clean[1]) == pytest.approx(math.sqrt(24))


def test_rician_data_step_is_unbiased_and_has_unit_noise():
    noise, signal = Rician(1.0), 6.0
    y = torch.from_numpy(draws(noise, signal))
    assert abs(float(y.mean()) - signal) > 0.08  # what the correction is for
    assert abs(float(noise.debias(y).mean()) - signal) < 0.01
    assert whitened(noise, 20.0) == pytest.approx(1, rel=0.01)
    assert whitened(noise, signal) == pytest.approx(1.04, abs=0.02)  # as in its docstring
    assert all(1 < whitened(noise, t) < 1.62 for t in (0.0, 0.5, 1.0, 2.0, 3.0))


def covariance(coils=3):
    g = np.random.default_rng(1)
    a = g.standard_normal((coils, coils)) + 1j * g.standard_normal((coils, coils))
    return torch.from_numpy(0.01 * (a @ a.conj().T + np.eye(coils)))


def test_coil_noise_has_its_covariance_and_whitens():
    psi = covariance()
    noise, clean = ComplexGaussian(psi), np.zeros((6, 200, 300))
    y = torch.from_numpy(noise.sample(clean, np.random.default_rng(0)))
    n = torch.complex(y[:3], y[3:]).flatten(1)
    assert torch.allclose(n @ n.mH / n.shape[1], psi, atol=0.02 * float(psi.abs().max()))
    assert (n @ n.mT / n.shape[1]).abs().max() < 0.02 * float(psi.abs().max())  # circular
    assert torch.allclose(noise.variance(y)[:, 0, 0], y.var((-2, -1)), rtol=0.02)
    white = noise.whiten(y).flatten(1)
    assert torch.allclose(white @ white.T / white.shape[1], torch.eye(6, dtype=torch.float64), atol=0.02)
    eye = noise.whitener @ psi @ noise.whitener.mH / 2
    assert torch.allclose(eye, torch.eye(3, dtype=torch.complex128), atol=1e-12)


def test_coil_likelihood_against_scipy():
    noise, g, psi = ComplexGaussian(covariance()), np.random.default_rng(2), covariance().numpy()
    y, clean = (torch.from_numpy(g.standard_normal((2, 6, 2, 2))) for _ in range(2))
    real = np.block([[psi.real, -psi.imag], [psi.imag, psi.real]]) / 2
    points = (y - clean).permute(0, 2, 3, 1).numpy()
    assert np.allclose(noise.log_likelihood(y, clean), stats.multivariate_normal(np.zeros(6), real).logpdf(points))


def test_whitened_coils_are_an_ordinary_problem():
    """Maps and data whitened alike: the residual of the truth has chi-squared 1."""
    psi, maps = covariance(), torch.from_numpy(birdcage_maps((24, 20), 3)).to(torch.complex128)
    noise, mask = ComplexGaussian(psi), torch.ones(24, 20)
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((40, 2, 24, 20)))
    y = torch.from_numpy(noise.sample(CartesianMRI(mask, maps)(x).numpy(), np.random.default_rng(0)))
    white_maps = torch.einsum("ij,jhw->ihw", noise.whitener, maps)
    problem = whiten(noise.whiten(y), CartesianMRI(mask, white_maps), 1.0)
    assert problem.chi_squared(x[None]) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("noise", [Gaussian(2.0), Rician(3.0), Poisson(900.0, 5.0, -1.0), BeerLambert(1e5, 5.0)])
def test_models_survive_a_measurement_file(noise):
    assert noise_model(json.loads(json.dumps(noise.describe()))) == noise


def test_bad_levels_are_refused():
    for make in (lambda: Gaussian(0.0), lambda: Rician(math.nan), lambda: Poisson(-1, 1), lambda: Poisson(9, 1, 1)):
        with pytest.raises(UsageError, match="must be positive and finite"):
            make()
    with pytest.raises(UsageError, match="electronic_counts"):
        BeerLambert(1e5, -1.0)
    for described in ({"model": "gaussian"}, {"model": "none"}, {"model": "poisson"}, {"model": "rician", "std": None}):
        with pytest.raises(InputError, match="neither weights nor a noise level"):
            noise_model(described)
    with pytest.raises(ShapeError, match=r"\(coils, coils\), got \(2, 3\)"):
        ComplexGaussian(torch.ones(2, 3))
    with pytest.raises(InputError, match="not Hermitian"):
        ComplexGaussian(torch.tensor([[1.0, 1j], [1j, 1.0]]))
    with pytest.raises(InputError, match="not positive definite"):
        ComplexGaussian(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ShapeError, match=r"\(\.\.\., 4, H, W\), got \(2, 5, 5\)"):
        ComplexGaussian(torch.eye(2)).whiten(torch.zeros(2, 5, 5))


def test_levels_of_images():
    image = np.random.default_rng(0).uniform(-1000, 1000, (2, 50, 50)).astype(np.float32)
    poisson = make_noise("poisson", image, 20.0)
    full = float(np.percentile(image, 99.5))
    assert draws(poisson, full).std() == pytest.approx(20.0, rel=0.01)  # the level is the deviation there
    assert poisson.zero == float(image.min())
    with pytest.raises(InputError, match="goes down to"):
        make_noise("rician", image, 20.0)
    assert make_noise("rician", abs(image), 20.0) == Rician(20.0)


@pytest.mark.parametrize("model", ["gaussian", "poisson", "rician"])
def test_noise_from_the_command_line(world, here, run, model):
    import nibabel as nib

    source = nib.load(world / "ct.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(source.dataobj) + 1000, source.affine), here / "image.nii.gz")
    scan = ("reconstruct", "image.nii.gz", "--op", "denoise", "--simulate", "--noise", model, "--noise-level", "0.05")
    code, _, err = run(*scan, "--solver", "measured", "-o", "r.nii.gz", "--quiet")
    assert (code, err) == (0, "")
    made = json.loads((here / "r.json").read_text())
    assert made["noise"]["model"] == model
    truth, image = (np.asarray(nib.load(here / n).dataobj) for n in ("image.nii.gz", "r.nii.gz"))
    level = 0.05 * np.ptp(np.percentile(truth, (0.5, 99.5)))
    bright = truth > np.percentile(truth, 90)
    assert (image - truth)[bright].std() == pytest.approx(level, rel=0.15)
    dark = truth <= np.percentile(truth, 5)
    assert ((image - truth)[dark].std() < 0.5 * level) == (model == "poisson")


@pytest.mark.parametrize(
    ("code", "words", "args"),
    [
        (2, "--noise rician|--photons", ("$/ct.nii.gz", "--op", "ct-sparse", "--simulate", "--noise", "rician")),
        (2, "--noise gaussian|--noise-level", ("$/ct.nii.gz", "--op", "mri", "--simulate", "--noise", "gaussian")),
        (2, "--noise poisson|--noise-level", ("$/ct.nii.gz", "--op", "denoise", "--noise", "poisson")),
        (3, "rician|gaussian or poisson", ("$/ct.nii.gz", "--op", "blur", "--simulate", "--noise", "rician")),
        (2, "the file holds the noise|--noise", ("$/m.h5", "--noise", "gaussian")),
    ],
)
def test_noise_options_that_do_not_fit(refused, code, words, args):
    refused(code, words, "reconstruct", *args)
