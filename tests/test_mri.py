"""Cartesian MRI: laws against dense matrices, pseudo-inverses, refusals, maps and masks that differ by slice."""

import pickle

import numpy as np
import pytest
import torch
from mri_cases import dense, gaussian, lines, random_maps, random_mask

from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.operators.kmask import make_mask
from invdiff.operators.mri import CartesianMRI, birdcage_maps, mri, mri_multicoil, to_complex, to_real

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
