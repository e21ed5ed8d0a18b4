"""Cartesian MRI: laws against dense matrices, masks, noise whitening, coil compression, maps, real k-space."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.operators import coils as raw
from invdiff.operators.kmask import PATTERNS, make_mask
from invdiff.operators.mri import CartesianMRI, birdcage_maps, mri, mri_multicoil, to_complex, to_real

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_mask(*shape, seed=0, share=0.4):
    mask = np.random.default_rng(seed).random(shape) < share
    mask[..., shape[-2] // 2, shape[-1] // 2] = True
    return mask


def random_maps(*shape, seed=0):
    z = np.random.default_rng(seed).normal(size=(2, *shape))
    return z[0] + 1j * z[1]


def complex_noise(*shape, seed=0):
    return random_maps(*shape, seed=seed) / np.sqrt(2)


lines = np.broadcast_to(random_mask(1, 7, seed=3), (6, 7))
CASES = {  # (mask, maps): odd and rectangular sizes, one coil or several, per-slice mask, maps or both
    "single": (random_mask(6, 5), None),
    "lines": (lines, None),
    "rows": (lines.T, None),
    "full": (np.ones((3, 4), bool), None),
    "multi": (random_mask(5, 4), random_maps(3, 5, 4)),
    "multi-lines": (lines, random_maps(2, 6, 7)),
    "multi-full": (np.ones((4, 3), bool), random_maps(2, 4, 3)),
    "slice-masks": (random_mask(3, 4, 5), None),
    "slice-maps": (random_mask(4, 5), random_maps(3, 2, 4, 5)),
    "slice-both": (random_mask(3, 5, 4), random_maps(3, 2, 5, 4)),
}
EACH = pytest.mark.parametrize("case", CASES)


def build(case):
    return CartesianMRI(*CASES[case])


def slices(op):
    return () if op.slices is None else (op.slices,)


def centred_dft(n):
    k = np.arange(n) - n // 2
    return np.exp(-2j * np.pi * np.outer(k, k) / n) / np.sqrt(n)


def dense(mask, maps):
    """Real matrix of one slice from the definition of the DFT alone: rows (re, im) per coil, columns (re, im)."""
    height, width = mask.shape
    fourier = np.kron(centred_dft(height), centred_dft(width)) * mask.reshape(-1, 1)
    maps = np.ones((1, height, width)) if maps is None else maps
    a = np.concatenate([fourier * s.reshape(1, -1) for s in maps])
    return torch.from_numpy(np.block([[a.real, -a.imag], [a.imag, a.real]]))


def dense_slices(case):
    mask, maps = CASES[case]
    count = slices(build(case))
    if not count:
        return [dense(mask, maps)]
    pick = lambda array, rank, i: array[i] if array is not None and array.ndim == rank else array  # noqa: E731
    return [dense(pick(mask, 3, i), pick(maps, 4, i)) for i in range(*count)]


def per_slice(op, x):
    """``(batch, [slices,] ...)`` with the slice axis first and always there, flattened: (slices, batch, values)."""
    x = x if op.slices is not None else x[:, None]
    return x.movedim(1, 0).flatten(2)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_prox_takes_one_weight_per_slice():
    for op in (mri((8, 6), 1.0), mri_multicoil((8, 6), 1.0, coils=2)):
        z, y = gaussian(3, *op.in_shape), gaussian(3, *op.out_shape)
        weight = torch.tensor([0.1, 1.0, 5.0]).reshape(3, 1, 1, 1)
        together = op.prox(z, y, weight)
        assert all(relative(together[i], op.prox(z[i], y[i], float(weight[i]))) < 1e-5 for i in range(3))


@pytest.mark.parametrize("case", ["single", "lines", "slice-masks", "full", "multi-full"])
def test_pinv_is_the_pseudo_inverse_without_maps_or_where_all_is_sampled(case):
    op = build(case)
    y = gaussian(2, *slices(op), *op.out_shape, dtype=torch.float64)
    found = per_slice(op, op.pinv(y))
    for i, a in enumerate(dense_slices(case)):
        assert relative(found[i].mT, torch.linalg.pinv(a) @ per_slice(op, y)[i].mT) < 1e-10


def test_pinv_combines_by_sensitivity_and_is_zero_where_no_coil_sees():
    mask, maps = random_mask(5, 4), random_maps(3, 5, 4)
    maps[:, 1, 2] = 0
    op = CartesianMRI(mask, maps)
    y = gaussian(*op.out_shape, dtype=torch.float64)
    x = op.pinv(y)
    total = torch.from_numpy((abs(maps) ** 2).sum(0))
    assert torch.isfinite(x).all() and not x[:, 1, 2].any()
    assert torch.allclose(x * total, op.adjoint(y), atol=1e-12)


def test_unsampled_entries_are_zero_and_have_no_effect():
    op = build("multi")
    y, never = op(gaussian(*op.in_shape)), ~op.mask
    assert not y[:, never].any() and y[:, op.mask].all()
    dirty = y.clone()
    dirty[:, never] = 1e6
    assert torch.equal(op.adjoint(dirty), op.adjoint(y))


def test_empty_stacks():
    for op in (build("multi"), build("lines")):
        empty = torch.zeros(0, *op.in_shape)
        assert op(empty).shape == (0, *op.out_shape) and op.adjoint(op(empty)).shape == empty.shape


def test_layout_is_real_parts_first():
    z = torch.from_numpy(random_maps(2, 3, 5, 4))
    assert torch.equal(to_complex(to_real(z)), z)
    assert torch.equal(to_real(z), torch.cat([z.real, z.imag], 1))
    mask, maps = CASES["multi"]
    op = CartesianMRI(mask, maps)
    assert np.array_equal(op.mask, mask) and np.array_equal(op.maps, maps) and op.out_shape == (6, 5, 4)
    x = gaussian(*op.in_shape, dtype=torch.float64)
    image = maps * to_complex(x).numpy()
    expected = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, (1, 2)), norm="ortho"), (1, 2)) * mask
    assert np.allclose(to_complex(op(x)), expected, atol=1e-12)


def test_refusals_name_the_operator_and_both_shapes():
    op = build("slice-both")
    with pytest.raises(ShapeError, match=r"CartesianMRI expects images \(\.\.\., 2, 6, 5\), got \(3, 2, 5, 6\)"):
        build("single")(torch.zeros(3, 2, 5, 6))
    with pytest.raises(ShapeError, match=r"expects measurements \(\.\.\., 4, 5, 4\), got \(3, 2, 5, 4\)"):
        op.adjoint(torch.zeros(3, 2, 5, 4))
    for f in (op, op.normal):
        with pytest.raises(ShapeError, match=r"expects images \(\.\.\., 3, 2, 5, 4\), got \(2, 2, 5, 4\)"):
            f(torch.zeros(2, 2, 5, 4))
    with pytest.raises(ShapeError, match="expects measurements"):
        op.adjoint(torch.zeros(4, 5, 4))
    with pytest.raises(UsageError, match=r"float32 or float64, got torch\.float16"):
        op(torch.zeros(3, 2, 5, 4, dtype=torch.float16))
    with pytest.raises(UsageError, match="is on cpu and its input on meta"):
        op(torch.zeros(3, 2, 5, 4, device="meta"))


def test_masks_and_maps_that_do_not_fit_are_refused():
    mask, maps = CASES["multi"]
    with pytest.raises(UsageError, match="0 and 1 only"):
        CartesianMRI(0.5 * mask)
    with pytest.raises(ShapeError, match=r"a mask \(H, W\) or \(slices, H, W\), got \(4,\)"):
        CartesianMRI(mask[0])
    with pytest.raises(InputError, match="holds no sample"):
        CartesianMRI(np.stack([mask, 0 * mask]))
    with pytest.raises(ShapeError, match=r"coil maps \(coils, 5, 4\) or .*, got \(3, 4, 5\)"):
        CartesianMRI(mask, maps.transpose(0, 2, 1))
    with pytest.raises(ShapeError, match="mask has 2 slices and the coil maps have 3"):
        CartesianMRI(np.stack([mask] * 2), np.stack([maps] * 3))
    with pytest.raises(UsageError, match="must be complex"):
        CartesianMRI(mask, maps.real)
    for bad in (0 * maps, np.nan * maps):
        with pytest.raises(InputError, match="finite and not all zero"):
            CartesianMRI(mask, bad)
    assert torch.equal(CartesianMRI(mask.astype(int)).mask, CartesianMRI(torch.from_numpy(mask)).mask)


@EACH
def test_pickle_and_gradients(case):
    op = build(case)
    x = gaussian(1, *slices(op), *op.in_shape, dtype=torch.float64).requires_grad_()
    y = gaussian(1, *slices(op), *op.out_shape, dtype=torch.float64).requires_grad_()
    again = pickle.loads(pickle.dumps(op))
    assert (
        torch.equal(again(x), op(x)) and again.norm == op.norm and torch.equal(op.to("cpu").adjoint(y), op.adjoint(y))
    )
    for f, v in ((op, x), (op.adjoint, y), (op.normal, x)):
        assert torch.autograd.gradcheck(f, (v,), fast_mode=True)


def test_restrict_cuts_per_slice_parameters():
    for case in ("slice-masks", "slice-maps", "slice-both"):
        op = build(case)
        x, y = gaussian(2, 3, *op.in_shape), gaussian(2, 3, *op.out_shape)
        assert op.norm > 0 and op.mean_square > 0  # cached: must not go along
        for part in (slice(0, 2), slice(2, 3), slice(1, None), slice(0, 3, 2)):
            cut = op.restrict(part)
            for f, g, v in ((op, cut, x), (op.adjoint, cut.adjoint, y), (op.normal, cut.normal, x)):
                assert torch.equal(g(v[:, part]), f(v)[:, part]), (case, part)
        cut = op.restrict(slice(1, 2))
        mean = float(dense_slices(case)[1].square().sum() / np.prod(op.in_shape))
        assert cut.slices == 1 and cut.mean_square == pytest.approx(mean, rel=1e-6)
        assert cut.restrict(slice(0, 1)).slices == 1
    op = build("multi")
    assert op.restrict(slice(1, 2)) is op


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(32, 24), (33, 25)])
@pytest.mark.parametrize("coils", [1, 5])
def test_a_slice_is_the_same_bits_in_any_group_and_with_any_threads(threads, shape, coils):
    sampling = {"center_fraction": 0.2, "acceleration": 2}
    op = mri(shape, 1.0, **sampling) if coils == 1 else mri_multicoil(shape, 1.0, coils=coils, **sampling)
    x, y = gaussian(13, *op.in_shape), gaussian(13, *op.out_shape)
    threads(1)
    alone = []
    for f, v in ((op, x), (op.adjoint, y), (op.normal, x), (op.pinv, y)):
        alone.append(f(v))
        for group in (1, 3, 12):
            assert torch.equal(torch.cat([f(part) for part in v.split(group)]), alone[-1]), (f, group)
    threads(2)
    assert torch.equal(op(x), alone[0]) and torch.equal(op.adjoint(y), alone[1]) and torch.equal(op.normal(x), alone[2])


def test_birdcage_maps_are_smooth_and_normalised():
    for shape, coils in (((32, 40), 8), ((31, 33), 1)):
        maps = birdcage_maps(shape, coils)
        assert maps.shape == (coils, *shape) and maps.dtype == np.complex64
        assert np.allclose((abs(maps) ** 2).sum(0), 1, atol=1e-6)
        assert max(abs(np.diff(maps, axis=a)).max() for a in (1, 2)) < 0.3
    maps = abs(birdcage_maps((32, 32), 4))
    assert maps[0, 16, 31] > maps[0, 16, 0] and maps[1, 31, 16] > maps[1, 0, 16]
    with pytest.raises(UsageError, match="at least one coil"):
        birdcage_maps((8, 8), 0)


def test_factories_agree_with_their_mask():
    mask, achieved = make_mask((20, 24), "random", 3, 0.1, 0.75, 5)
    options = {"pattern": "random", "acceleration": 3, "center_fraction": 0.1, "partial_fourier": 0.75, "seed": 5}
    for op in (mri((20, 24), 1.0, **options), mri_multicoil((20, 24), (1.0, 2.0), coils=4, **options)):
        assert np.array_equal(op.mask, mask) and op.acceleration == pytest.approx(achieved)
        assert op.in_shape == (2, 20, 24) and f"{achieved:.3g}" in op.describe()
    assert op.out_shape == (8, 20, 24) and op.maps.dtype == torch.complex64


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(48, 64), (33, 49), (64, 40)])
def test_masks_achieve_the_acceleration_around_a_full_centre(pattern, shape):
    for acceleration, fraction in ((1, 0.1), (1.5, 0.1), (2.5, 0.08), (4, 0.12)):
        mask, achieved = make_mask(shape, pattern, acceleration, fraction, seed=2)
        assert mask.shape == shape and mask.dtype == bool
        assert achieved == pytest.approx(mask.size / mask.sum())
        step = 0.05 if pattern == "poisson" else acceleration / (2 * shape[1]) + 1e-9  # half a column
        assert abs(acceleration / achieved - 1) <= step, (acceleration, achieved)
        sides = [round(fraction * n) if pattern == "poisson" or n == shape[1] else n for n in shape]
        box = tuple(slice(n // 2 - s // 2, n // 2 - s // 2 + s) for n, s in zip(shape, sides, strict=True))
        assert mask[box].all() and mask[shape[0] // 2, shape[1] // 2]
        if pattern != "poisson":
            assert (mask == mask[0]).all()
        assert np.array_equal(mask, make_mask(shape, pattern, acceleration, fraction, seed=2)[0])
    seeds = {make_mask(shape, pattern, 3.5, 0.08, seed=s)[0].tobytes() for s in range(6)}
    assert len(seeds) >= (2 if pattern == "equispaced" else 6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_partial_fourier_omits_the_far_side(pattern):
    for partial in (0.5, 0.625, 0.8):
        mask, achieved = make_mask((40, 60), pattern, 2, 0.1, partial, 1)
        kept = np.arange(60) < np.ceil(partial * 60) + np.zeros((40, 1))
        kept[18 if pattern == "poisson" else 0 : 22 if pattern == "poisson" else 40, 27:33] = (
            True  # the centre is kept in any case
        )
        assert not mask[~kept].any() and mask[18:22, 27:33].all()
        assert achieved == pytest.approx(2 * kept.size / kept.sum(), rel=0.05)
    assert make_mask((40, 60), pattern, 1, 0.1, 0.8)[1] == pytest.approx(60 / 48)


def test_patterns_are_what_their_names_say():
    lines = np.flatnonzero(make_mask((4, 240), "equispaced", 4, 0.05)[0][0])
    gaps = np.diff(lines[lines < 100])
    assert gaps.max() - gaps.min() <= 1
    middle = slice(80, 160)
    share = {
        p: np.mean([make_mask((4, 240), p, 4, 0.02, seed=s)[0][0, middle].mean() for s in range(10)])
        for p in ("random", "gaussian")
    }
    assert abs(share["random"] - 0.25) < 0.05 and share["gaussian"] > 0.4
    mask = make_mask((96, 96), "poisson", 6, 0.05)[0]
    assert mask[32:64, 32:64].mean() > 3 * mask[:16].mean()
    rim = np.concatenate([mask[:24].ravel(), [False], mask[-24:].ravel()])
    beside = (rim[1:] & rim[:-1]).sum() / rim.sum()
    assert beside < 0.5 * rim.mean()  # the share of neighbours that chance would give


def test_impossible_masks_are_refused_with_a_remedy():
    bad = {
        "acceleration must be at least 1": {"acceleration": 0.5},
        "acceleration must be": {"acceleration": np.nan},
        "lower center_fraction": {"acceleration": 8, "center_fraction": 0.3},
        "a share from 0 to 1": {"center_fraction": 1.2},
        "from 0.5 to 1": {"partial_fourier": 0.4},
        "unknown sampling pattern 'spiral': choose one of equispaced": {"pattern": "spiral"},
        "seed": {"seed": -1},
        "shape must be": {"shape": (0, 8)},
    }
    for words, options in bad.items():
        with pytest.raises(UsageError, match=words) as refusal:
            make_mask(**{"shape": (64, 64), **options})
        assert "\n" not in str(refusal.value)
    with pytest.raises(UsageError, match="lower center_fraction"):
        make_mask((64, 64), "poisson", 20, 0.3)


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
