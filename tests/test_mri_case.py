"""MRI from the command line: magnitudes measured, k-space in files, complex images through a magnitude prior."""

import json
from dataclasses import replace

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from invdiff.data_step import data_step, point_spectrum
from invdiff.linalg import to_complex, to_real
from invdiff.measurement import Measurement
from invdiff.measurement_file import load_measurement, save_measurement
from invdiff.mri_case import mri_operator, simulated_mri, smooth_phase
from invdiff.operators.mri import CartesianMRI, birdcage_maps
from invdiff.priors.base import Prior, PriorInfo
from invdiff.priors.complex import PhaseCorrected, slow_phase
from invdiff.problem import whiten
from invdiff.runner import Request, make_problem, prepare
from invdiff.volume import Volume

OPS = [
    ("mri", ("--acceleration", "1.5")),
    ("mri-multicoil", ("--coils", "4", "--pattern", "poisson", "--acceleration", "3")),
    ("mri-radial", ("--spokes", "30")),
]


@pytest.fixture(scope="module")
def magnitude(tmp_path_factory, world):
    """The CT of the world as a magnitude volume."""
    source = nib.load(world / "ct.nii.gz")
    data = np.clip(np.asarray(source.dataobj) + 1000, 0, None).astype(np.float32)
    nib.save(nib.Nifti1Image(data, source.affine / [[6], [6], [1], [1]]), world / "mr.nii.gz")
    return data


@pytest.mark.parametrize(("op", "options"), OPS)
def test_a_magnitude_volume_is_measured_and_reconstructed(magnitude, world, here, run, op, options):
    scan = ("--op", op, *options)
    plain = ("--prior", "$/prior", "--set", "solver.momentum=0")  # which would follow the untrained prior faster
    simulated = ("reconstruct", "$/mr.nii.gz", *scan, "--simulate", *plain)
    code, _, err = run(*simulated, "--compare", "zero-filled", "--compare", "tv", "-o", "a.nii.gz", "--quiet")
    assert (code, err) == (0, "")
    made = json.loads((here / "a.json").read_text())
    assert list(made["metrics"]) == ["zero-filled", "tv", "pnp"]
    assert made["noise"]["std"] == pytest.approx(0.01 * np.percentile(magnitude, 99.5), rel=1e-3)
    assert made["runs"]["tv"]["chi2_per_datum"] < 2
    a = nib.load(here / "a.nii.gz")
    np.testing.assert_array_equal(a.affine, nib.load(world / "mr.nii.gz").affine)
    assert np.corrcoef(magnitude.ravel(), np.asarray(a.dataobj).ravel())[0, 1] > 0.9  # neither flipped nor shifted

    assert run("simulate", "$/mr.nii.gz", *scan, "-o", "m.h5", "--quiet")[::2] == (0, "")
    reread = ("reconstruct", "m.h5", *plain, "--reference", "$/mr.nii.gz", "-o", "b.nii.gz", "--quiet")
    assert run(*reread)[::2] == (0, "")
    np.testing.assert_array_equal(np.asarray(nib.load(here / "b.nii.gz").dataobj), np.asarray(a.dataobj))


def test_slices_of_a_file_with_parameters_per_slice(magnitude, here, run, world):
    """Masks and maps per slice are cut with the slices and turned with them."""
    run("simulate", "$/mr.nii.gz", "--op", "mri-multicoil", "--coils", "3", "-o", "m.h5", "--quiet")
    whole = load_measurement(here / "m.h5")
    maps = whole.arrays["maps"] * np.exp(1j * np.arange(len(whole.y)))[:, None, None, None]
    mask = np.repeat(whole.arrays["mask"][None], len(whole.y), 0)
    save_measurement("s.h5", replace(whole, arrays={"maps": maps.astype(np.complex64), "mask": mask}))
    for name, cut in (("all", ()), ("part", ("--slices", "1:3"))):
        code, _, err = run("reconstruct", "s.h5", "--solver", "tv", "-o", f"{name}.nii.gz", *cut, "--quiet")
        assert (code, err) == (0, "")
    volume, part = (np.asarray(nib.load(here / f"{name}.nii.gz").dataobj) for name in ("all", "part"))
    np.testing.assert_allclose(part, volume[..., 1:3], rtol=0.1, atol=20)  # the intensity map is that of the slices


def test_noise_and_phase_are_those_of_the_slice():
    """A slice has its own draws: measured alone or with others, the same k-space."""
    data = np.random.default_rng(0).uniform(0, 1, (12, 10, 4)).astype(np.float32)
    whole = simulated_mri(Volume(data, np.eye(4), "1", "MR"), "mri", {}, seed=-3)
    alone = simulated_mri(Volume(data, np.eye(4), "1", "MR"), "mri", {}, seed=-3, slices=(2, 3), noise_level=0.01)
    row = whole.indices.index(alone.indices[0])
    scale = alone.measurement.noise["std"] / whole.measurement.noise["std"]
    assert alone.measurement.y.shape[1:] == whole.measurement.y.shape[1:]
    assert np.abs(alone.measurement.y[0] - whole.measurement.y[row]).max() < 6 * abs(scale - 1) * 0.01 + 1e-6
    phase = smooth_phase((40, 30), np.random.default_rng(1))
    assert phase.std() == pytest.approx(1) and np.abs(np.diff(phase, axis=0)).max() < 0.5
    mask = whole.operator.mask.numpy()
    assert (whole.measurement.y[..., ~mask] == 0).all() and (whole.measurement.y[..., mask] != 0).all()


class Shrink(Prior):
    """Halves the distance to -1, brightness 0, and singles out columns."""

    info, calls = PriorInfo("shrink"), 0

    def denoise(self, x, sigma, context=None):
        self.calls += x[..., 0, 0, 0].numel()
        return (x + 1) / 2 - 1 + 0.01 * torch.arange(x.shape[-1])


def test_a_magnitude_prior_serves_complex_images():
    """Without the slow phase the real part meets the prior in its own range, the imaginary part around its middle."""
    g = torch.Generator().manual_seed(0)
    phase = torch.exp(1j * torch.rand(3, 1, 6, 5, generator=g, dtype=torch.float64))
    flat = torch.complex(*torch.randn(2, 1, 3, 1, 6, 5, generator=g, dtype=torch.float64))
    prior = PhaseCorrected(Shrink(), phase)
    assert prior.info.channels == 2
    got = to_complex(prior.denoise(to_real(flat * phase), 0.3)) * phase.conj()
    columns = 0.01 * torch.arange(5)
    assert torch.allclose(got.real, flat.real / 2 + columns)
    assert torch.allclose(got.imag, (flat.imag + 1) / 2 - 1 + columns)
    assert prior.calls == 6
    turned = to_complex(prior.denoise_turned(to_real(flat * phase), 0.3, 1)) * phase.conj()
    assert torch.allclose(turned.real, flat.real / 2 + columns.flip(0))
    part = prior.restrict(slice(1, 2)).denoise(to_real(flat * phase)[:, 1:2], 0.3)
    assert torch.allclose(to_complex(part) * phase[1:2].conj(), got[:, 1:2])


def test_slow_phase_of_a_constant_phase_is_that_phase():
    x = torch.rand(2, 1, 24, 20, dtype=torch.float64) + 1
    found = slow_phase(to_real(x * torch.exp(torch.tensor(0.7j, dtype=torch.complex128))))
    assert torch.allclose(found, torch.exp(torch.tensor(0.7j)).to(found).expand_as(found))
    assert torch.equal(slow_phase(torch.zeros(1, 2, 4, 4)), torch.ones(1, 1, 4, 4, dtype=torch.complex64))


@pytest.mark.parametrize("maps", [None, birdcage_maps((9, 12), 4)])
def test_the_data_step_is_exact_and_preconditioned_for_complex_images(maps):
    """Without maps A^H A is a complex circulant: the preconditioned CG ends after one iteration."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(9, 12, generator=g) < 0.5
    operator = CartesianMRI(mask, maps)
    y = torch.randn(2, *operator.out_shape, generator=g) * torch.cat([mask[None]] * operator.out_shape[0])
    problem = whiten(y.double(), operator, 0.04, scale=1.5)
    z = torch.randn(1, *problem.image_shape, generator=g, dtype=torch.float64)
    spectrum = point_spectrum(problem)
    exact = {"tolerance": 1e-13} | ({"iterations": 1} if maps is None else {"iterations": 300})
    got, _ = data_step(problem, z, 3.0, z, spectrum=spectrum, **exact)
    gradient = problem.operator.adjoint(problem.operator(got[0]) - problem.y) + 3.0 * (got[0] - z[0])
    assert float(gradient.abs().max()) < (1e-9 if maps is None else 1e-6)


def test_uniform_weights_are_a_number():
    """The product of the normal equations is that with explicit weights."""
    operator = CartesianMRI(torch.rand(8, 6) < 0.6, birdcage_maps((8, 6), 3))
    y = torch.zeros(2, *operator.out_shape)
    one, many = whiten(y, operator, 0.25, scale=2.0), whiten(y, operator, torch.full_like(y, 0.25), scale=2.0)
    x = torch.randn(2, 2, 8, 6)
    assert one.operator.uniform == 2.0 and many.operator.uniform is None
    assert torch.allclose(one.operator.normal(x), many.operator.normal(x), atol=1e-5)


def test_chi_squared_of_the_truth_is_one():
    data = np.random.default_rng(0).uniform(0, 1, (64, 64, 2)).astype(np.float32)
    case = simulated_mri(Volume(data, np.eye(4), "1", "MR"), "mri", {"acceleration": 4})
    problem = make_problem(case, torch.device("cpu"))
    phases = [smooth_phase((64, 64), np.random.default_rng([0, i, False])) for i in case.indices]
    truth = torch.from_numpy(case.grid.data * np.exp(1j * np.stack(phases)))[:, None] / case.physical.scale
    assert problem.chi_squared(to_real(truth)[None].float()) == pytest.approx(1, abs=0.05)


def test_the_example_has_an_mri_phantom():
    request = Request(None, "mri", {"acceleration": 6}, solver="zero-filled", slices=(3, 4))
    _, _, prior, case, problem = prepare(request)
    assert prior is None and case.modality == "MR" and problem.image_shape == (1, 2, 192, 192)
    assert case.truth.min() == 0 and case.truth.max() <= 1


BAD = [
    ("--op mri $/ct.nii.gz --simulate", 3, "ct.nii.gz: has values down to|is this CT in HU"),
    ("--op mri $/mr.nii.gz", 2, "mr.nii.gz|is no mri measurement|--simulate"),
    ("--op mri $/mr.nii.gz --simulate --acceleration 0.5", 2, "acceleration must be at least 1"),
    ("--op mri $/mr.nii.gz --simulate --pattern spokes", 2, "spokes|equispaced"),
    ("--op mri $/mr.nii.gz --simulate --coils 4", 2, "has no option 'coils'"),
    ("--op mri $/mr.nii.gz --simulate --solver fbp", 2, "needs a CT operator"),
    ("--op mri $/m.h5", 2, "was measured with --op ct-sparse"),
]


@pytest.mark.parametrize(("args", "code", "words"), BAD)
def test_refusals(magnitude, refused, args, code, words):
    refused(code, words, "reconstruct", *args.split(), "-o", "r.nii.gz")


def edited(change):
    def edit(path):
        with h5py.File(path, "r+") as file:
            change(file)

    return edit


def swap(name, value):
    def change(file):
        file.pop(name, None)
        file[name] = value

    return edited(change)


FILES = [
    (edited(lambda file: file.pop("mask")), "neither /mask nor /trajectory"),
    (swap("mask", np.full((36, 40), 0.5)), "/mask|other than 0 and 1"),
    (swap("mask", np.ones((40, 36), np.uint8)), "coil maps"),
    (swap("maps", np.ones((5, 36, 40, 2), np.float32)), "make /y, /mask, /maps and /volume agree"),
    (swap("maps", np.ones((3, 36, 41, 2), np.float32)), "coil maps"),
    (swap("maps", np.full((3, 36, 40, 2), np.nan)), "/maps must be complex, finite"),
    (swap("maps", np.ones((3, 36, 40))), "/maps has shape|real and imaginary"),
]


@pytest.mark.parametrize(("edit", "words"), FILES)
def test_files_that_do_not_fit_themselves(magnitude, run, refused, here, edit, words):
    run("simulate", "$/mr.nii.gz", "--op", "mri-multicoil", "--coils", "3", "-o", "m.h5", "--quiet")
    edit(here / "m.h5")
    refused(3, f"m.h5|{words}", "reconstruct", "m.h5", "-o", "r.nii.gz")


def test_an_operator_is_made_of_its_arrays():
    maps = birdcage_maps((6, 8), 2)
    operator = mri_operator({"mask": np.eye(6, 8, dtype=bool), "maps": maps}, (6, 8))
    assert torch.equal(operator.mask, torch.eye(6, 8, dtype=torch.bool)) and np.allclose(operator.maps, maps)


def test_what_was_not_measured_is_not_looked_at(magnitude, run, here):
    """Noise where the mask is 0 changes neither the image nor how well the data are explained."""
    run("simulate", "$/mr.nii.gz", "--op", "mri", "-o", "m.h5", "--quiet")
    for name in ("a", "b"):
        assert run("reconstruct", "m.h5", "--solver", "sense-cg", "-o", f"{name}.nii.gz", "--quiet")[0] == 0
        with h5py.File(here / "m.h5", "r+") as file:
            y, mask = file["y"][()], file["mask"][()]
            file["y"][...] = np.where(mask, y, 1e4)
    a, b = (json.loads((here / f"{name}.json").read_text()) for name in "ab")
    assert a["runs"]["sense-cg"]["chi2_per_datum"] == b["runs"]["sense-cg"]["chi2_per_datum"]
    assert not any("transposed" in w for w in a["warnings"]) and any("transposed" in w for w in b["warnings"])
    np.testing.assert_array_equal(*(np.asarray(nib.load(here / f"{name}.nii.gz").dataobj) for name in "ab"))


def test_maps_that_fade_keep_the_scale():
    """Sensitivities next to nothing outside of the object are divided by nowhere."""
    maps = birdcage_maps((16, 16), 3)
    faint = np.where(np.hypot(*np.mgrid[-8:8, -8:8]) < 6, maps, 1e-4 * maps)
    y = CartesianMRI(np.ones((16, 16)), maps)(torch.ones(2, 16, 16))
    assert float(CartesianMRI(np.ones((16, 16)), faint).pinv(y).abs().max()) < 1.1


def test_coils_are_whitened_by_the_covariance_of_the_file(magnitude, run, here):
    """A unitary mix of coils with its covariance gives what the coils give."""
    run("simulate", "$/mr.nii.gz", "--op", "mri-multicoil", "--coils", "3", "-o", "m.h5", "--quiet")
    whole = load_measurement(here / "m.h5")
    mix = np.array([[2, 0, 0], [1, 1, 0], [0.5j, -1, 3]])
    k, std = whole.y[:, :3] + 1j * whole.y[:, 3:], whole.noise["std"]
    k, maps = (np.einsum("vc,...chw->...vhw", mix, z) for z in (k, whole.arrays["maps"]))
    covariance = 2 * std**2 * mix @ mix.conj().T
    noise = {"model": "complex-gaussian", "covariance_real": covariance.real.tolist()}
    noise["covariance_imag"] = covariance.imag.tolist()
    y = np.concatenate([k.real, k.imag], 1).astype(np.float32)
    arrays = {**whole.arrays, "maps": maps.astype(np.complex64)}
    save_measurement("mixed.h5", replace(whole, y=y, noise=noise, arrays=arrays))
    for name in ("m", "mixed"):
        assert run("reconstruct", f"{name}.h5", "--solver", "tv", "-o", f"{name}.nii.gz", "--quiet")[0] == 0
    a, b = (np.asarray(nib.load(here / f"{name}.nii.gz").dataobj) for name in ("m", "mixed"))
    np.testing.assert_allclose(a, b, atol=0.01 * a.max())


def test_a_single_slice_of_a_flipped_volume(magnitude, run, world, here):
    source = nib.load(world / "mr.nii.gz")
    turned = source.affine @ np.diag([1, 1, -1, 1.0])
    turned[:3, 3] = source.affine[:3, 3] + source.affine[:3, 2] * (source.shape[2] - 1)
    nib.save(nib.Nifti1Image(np.asarray(source.dataobj)[..., ::-1], turned), "flip.nii.gz")
    assert run("simulate", "flip.nii.gz", "--op", "mri", "--slices", "2:3", "-o", "one.h5", "--quiet")[0] == 0
    assert run("reconstruct", "one.h5", "--solver", "zero-filled", "-o", "one.nii.gz", "--quiet")[::2] == (0, "")


REFUSED = [
    (lambda m: {"noise": {"model": "rician", "std": 1.0}}, "of k-space is complex-gaussian"),
    (lambda m: {"volume": {**m.volume, "units": "HU", "modality": "CT"}}, "MRI gives '1' and 'MR'"),
    (lambda m: {"arrays": {**m.arrays, "kernel": np.ones((3, 3))}}, "/kernel has no meaning for MRI"),
    (lambda m: {"arrays": {**m.arrays, "mask": np.repeat(m.arrays["mask"][None], 4, 0)}}, "4 slices, /y has 5"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_files_that_say_what_k_space_cannot_mean(magnitude, run, refused, here, change, words):
    run("simulate", "$/mr.nii.gz", "--op", "mri", "-o", "m.h5", "--quiet")
    whole = load_measurement(here / "m.h5")
    save_measurement("bad.h5", replace(whole, **change(whole)))
    refused(3, f"bad.h5|{words}", "reconstruct", "bad.h5", "-o", "r.nii.gz")
    refused(3, "ct.nii.gz: has values down to", "reconstruct", "m.h5", "--reference", "$/ct.nii.gz", "-o", "r.nii.gz")


def test_a_square_mask_the_wrong_way_round_is_said(here, run):
    """Nothing in its shape shows it; most of the data then lie where it has zeros."""
    columns = np.zeros((32, 32), bool)
    columns[:, ::3] = True
    y = np.random.default_rng(0).normal(size=(2, 2, 32, 32)).astype(np.float32) * columns
    volume = {"shape": [32, 32, 2], "affine": np.diag([-1, -1, 3.0, 1]).tolist(), "units": "1", "modality": "MR"}
    noise = {"model": "complex-gaussian", "std": 0.1}
    for name, mask in (("right", columns), ("wrong", columns.T)):
        measurement = Measurement(y, {"name": "mri"}, volume | {"slice_axis": 2}, noise, arrays={"mask": mask})
        save_measurement(here / f"{name}.h5", measurement)
        code, out, err = run("reconstruct", f"{name}.h5", "--solver", "zero-filled", "-o", f"{name}.nii.gz")
        assert code == 0 and ("is the mask transposed?" in out) == (name == "wrong"), err
