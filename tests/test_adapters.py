"""Adapters: deepinv's physics as operators against deepinv itself, operators in deepinv's and scipy's algorithms."""

import copy
import logging
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import lsqr, svds

from invdiff.errors import ShapeError, UsageError
from invdiff.linalg import cg
from invdiff.operators import build
from invdiff.operators.adapters import as_scipy, from_deepinv, to_deepinv
from invdiff.operators.mask import Mask
from invdiff.operators.mri import CartesianMRI
from invdiff.operators.superres import DownsampleZ

physics = pytest.importorskip("deepinv.physics")

SHAPE = (12, 9)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(a, b):
    return float((a - b).norm() / b.norm())


KERNEL = gaussian(1, 1, 5, 3, seed=1).abs()
SAMPLED = (gaussian(1, 1, *SHAPE, seed=2) > -0.3).float()
MAPS = gaussian(1, 3, *SHAPE, seed=3, dtype=torch.complex64)


def complex_fourier():
    """Complex images to complex measurements."""
    return physics.LinearPhysics(A=torch.fft.fft2, A_adjoint=lambda y: math.prod(SHAPE) * torch.fft.ifft2(y))


def half_spectrum():
    """Real images to complex measurements; without an adjoint of its own."""
    return physics.LinearPhysics(A=torch.fft.rfft2)


PHYSICS = {  # physics, image shape, measurement shape (None: as the image)
    "blur": (lambda: physics.Blur(KERNEL, padding="replicate"), (2, *SHAPE), None),
    "blur-valid": (lambda: physics.Blur(KERNEL, padding="valid"), (1, *SHAPE), (1, 8, 7)),
    "blur-fft": (lambda: physics.BlurFFT((1, *SHAPE), KERNEL), (1, *SHAPE), None),
    "inpainting": (lambda: physics.Inpainting((1, *SHAPE), SAMPLED), (1, *SHAPE), None),
    "downsampling": (
        lambda: physics.Downsampling((1, *SHAPE), "bicubic", 3, padding="circular"),
        (1, *SHAPE),
        (1, 4, 3),
    ),
    "tomography": (lambda: physics.Tomography(7, 11, normalize=False), (1, 11, 11), (1, 16, 7)),
    "tomography-fan": (lambda: physics.Tomography(5, 8, normalize=False, fan_beam=True), (1, 8, 8), (1, 258, 5)),
    "mri": (lambda: physics.MRI(SAMPLED.expand(1, 2, *SHAPE)), (2, *SHAPE), None),
    "mri-3d": (lambda: physics.MRI(img_size=(2, 4, 6, 5), three_d=True), (2, 4, 6, 5), (2, 4, 6, 5)),
    "mri-coils": (
        lambda: physics.MultiCoilMRI(SAMPLED.expand(1, 2, *SHAPE), MAPS),
        (2, *SHAPE),
        (2, 3, *SHAPE),
    ),
    "denoising": (physics.Denoising, (2, *SHAPE), None),
    "decolorize": (physics.Decolorize, (3, *SHAPE), (1, *SHAPE)),
    "compressed-sensing": (lambda: physics.CompressedSensing(40, (1, *SHAPE)), (1, *SHAPE), (40,)),
    "single-pixel": (lambda: physics.SinglePixelCamera(20, (1, 8, 8)), (1, 8, 8), None),
    "composed": (
        lambda: physics.compose(physics.Decolorize(), physics.Blur(KERNEL, padding="circular")),
        (3, *SHAPE),
        (1, *SHAPE),
    ),
    "half-spectrum": (half_spectrum, (1, *SHAPE), (2, 12, 5)),
}
EACH = pytest.mark.parametrize("name", PHYSICS)


def wrapped(name):
    make, shape, _ = PHYSICS[name]
    torch.manual_seed(0)  # of compressed sensing
    theirs = make()
    return theirs, from_deepinv(theirs, shape)


def as_real(y):
    return torch.cat([y.real, y.imag], 1) if y.is_complex() else y


@EACH
def test_a_physics_is_itself_and_its_adjoint_is_exact(name):
    theirs, op = wrapped(name)
    shape, measured = PHYSICS[name][1], PHYSICS[name][2] or PHYSICS[name][1]
    volume = len(shape) == 4
    assert op.in_shape == ((shape[1], shape[0], *shape[2:]) if volume else shape) and op.out_shape == measured
    assert op.slicewise is not volume
    x, y = gaussian(2, *shape), gaussian(2, *measured, seed=1)
    ours = x.transpose(1, 2) if volume else x
    assert relative(op(ours), as_real(theirs.A(x))) < 1e-6
    if name != "half-spectrum":
        expected = theirs.A_adjoint(y)
        assert relative(op.adjoint(y), expected.transpose(1, 2) if volume else expected) < 1e-6
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        x, y = gaussian(2, 3, *op.in_shape, dtype=dtype), gaussian(2, 3, *op.out_shape, seed=1, dtype=dtype)
        ax, aty = op(x), op.adjoint(y)
        assert ax.dtype == aty.dtype == dtype and ax.shape == y.shape and aty.shape == x.shape
        error = (ax.double() * y.double()).sum() - (x.double() * aty.double()).sum()
        assert abs(error) < tolerance * ax.double().norm() * y.double().norm()


@EACH
def test_slices_keep_their_bits_and_gradients_are_matched(name):
    _, op = wrapped(name)
    x, y = gaussian(5, *op.in_shape), gaussian(5, *op.out_shape, seed=1)
    for f, v in ((op, x), (op.adjoint, y), (op.normal, x)):
        assert torch.equal(torch.cat([f(part) for part in v.split(2)]), f(v))
    x, y = (t[:1].double().requires_grad_() for t in (x, y))
    for f, v in ((op, x), (op.adjoint, y)):
        assert torch.autograd.gradcheck(f, (v,), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, (v,), fast_mode=True)


def test_two_axes_of_a_blur_on_a_volume_are_those_of_the_kernel():
    theirs = physics.Blur(gaussian(1, 1, 3, 5, 3).abs(), padding="circular")
    op = from_deepinv(theirs, (1, 4, 8, 7))
    x = gaussian(2, 4, 1, 8, 7)
    assert op.in_shape == (4, 1, 8, 7) and op.out_shape == (1, 4, 8, 7) and not op.slicewise
    assert relative(op(x), theirs.A(x.transpose(1, 2))) < 1e-6
    with pytest.raises(ShapeError, match=r"expects images \(\.\.\., 4, 1, 8, 7\)"):
        op(x[:, 0])


def test_multi_coil_mri_is_ours_with_the_phase_of_images_and_maps():
    ours = CartesianMRI(SAMPLED[0, 0], MAPS[0])
    _, op = wrapped("mri-coils")
    x, y = gaussian(2, *op.in_shape), gaussian(2, *op.out_shape)
    assert relative(op(x).flatten(1, 2), ours(x)) < 1e-6
    assert relative(op.adjoint(y), ours.adjoint(y.flatten(1, 2))) < 1e-6
    conjugate = x * torch.tensor([1.0, -1.0])[:, None, None]
    assert relative(op(conjugate), op(x)) > 0.5
    assert op.norm == pytest.approx(ours.norm, rel=1e-3)


def test_complex_images_are_real_channels_and_the_adjoint_is_over_the_reals():
    op = from_deepinv(complex_fourier(), (1, *SHAPE), complex_image=True)
    assert op.in_shape == op.out_shape == (2, *SHAPE) and not op.notes
    x = gaussian(2, *op.in_shape)
    expected = torch.fft.fft2(torch.complex(x[:, :1], x[:, 1:]))
    assert torch.equal(op(x), torch.cat([expected.real, expected.imag], 1))
    assert relative(op.normal(x), math.prod(SHAPE) * x) < 1e-6


def test_several_measurements_are_one_after_the_other():
    parts = physics.Denoising(), physics.Decolorize()
    op = from_deepinv(physics.stack(*parts), (3, 5, 4))
    x = gaussian(2, 3, 5, 4)
    assert op.out_shape == (80,)
    assert relative(op(x), torch.cat([p.A(x).flatten(1) for p in parts], 1)) < 1e-6
    assert relative(op.normal(x), sum(p.A_adjoint(p.A(x)) for p in parts)) < 1e-6


def test_the_adjoint_is_found_where_it_is_wrong_or_missing(caplog):
    wrong = physics.LinearPhysics(A=lambda x: x.cumsum(-1), A_adjoint=lambda y: y.flip(-1).cumsum(-1))
    missing = physics.LinearPhysics(A=lambda x: x.cumsum(-1))
    y = gaussian(2, 1, *SHAPE)
    for theirs in (wrong, missing):
        with caplog.at_level(logging.WARNING, "invdiff"):
            op = from_deepinv(theirs, (1, *SHAPE))
        assert relative(op.adjoint(y), y.flip(-1).cumsum(-1).flip(-1)) < 1e-6
        assert op.notes == tuple(r.message for r in caplog.records) and "automatic differentiation" in op.notes[0]
        caplog.clear()
    unmatched = physics.Tomography(60, 64, normalize=False, adjoint_via_backprop=False)
    with pytest.raises(UsageError, match=r"Tomography: neither its A_adjoint nor .* adjoint_via_backprop=True"):
        from_deepinv(unmatched, (1, 64, 64))


def test_a_normalised_physics_is_announced(caplog):
    with caplog.at_level(logging.WARNING, "invdiff"):
        op = from_deepinv(physics.Tomography(7, 11, normalize=True), (1, 11, 11))
    (note,) = op.notes
    assert [r.message for r in caplog.records] == [note] and "Tomography is divided by its norm, " in note
    plain = wrapped("tomography")[1]
    assert float(note.split("norm, ")[1].split(":")[0]) == pytest.approx(plain.norm, rel=1e-2)
    assert op.norm == pytest.approx(1, rel=1e-2) and not plain.notes


def test_refusals():
    class Squares(physics.Physics):
        def A(self, x, **_):
            return x**2

    batch = physics.Inpainting((1, *SHAPE), SAMPLED.expand(3, 1, *SHAPE))
    for words, theirs, shape in (
        ("Squares is not a linear physics of deepinv: give one", Squares(), (1, 4, 4)),
        ("Haze is not a linear physics", physics.Haze(), (3, 4, 4)),
        (r"LinearPhysics is not linear: its A\(2 x", physics.LinearPhysics(A=lambda x: x + 1), (1, 4, 4)),
        (r"Tomography does not take images \(1, 8, 9\): ValueError: Input", PHYSICS["tomography"][0](), (1, 8, 9)),
        (r"images of Denoising are \(C, H, W\) or .*, got image_shape \(4, 4\)", physics.Denoising(), (4, 4)),
        ("Inpainting makes 3 measurements of one image, its parameters are those of a batch", batch, (1, *SHAPE)),
    ):
        with pytest.raises(UsageError, match=words) as refused:
            from_deepinv(theirs, shape)
        assert "\n" not in str(refused.value)
    op = wrapped("blur")[1]
    with pytest.raises(UsageError, match="a wrapped Blur cannot be pickled: build the physics there"):
        pickle.dumps(op)
    with pytest.raises(ShapeError, match="FromDeepinv expects measurements"):
        op.adjoint(torch.zeros(9, 12))


def test_the_copy_does_not_follow_the_physics_and_moves():
    theirs, op = wrapped("inpainting")
    x = gaussian(2, 1, *SHAPE)
    before = op(x)
    theirs.update(mask=torch.zeros_like(SAMPLED))
    assert torch.equal(op(x), before) and torch.equal(op.to("cpu")(x), before) and copy.deepcopy(op) is op


def test_our_ct_in_deepinvs_conjugate_gradients_is_ours():
    op = build("ct-sparse", (20, 16), 1.0, views=9)
    theirs = to_deepinv(op, max_iter=200, tol=1e-13)
    x, z = gaussian(2, *op.in_shape, dtype=torch.float64), gaussian(2, *op.in_shape, seed=1, dtype=torch.float64)
    y = op(x)
    assert torch.equal(theirs(x), y) and torch.equal(theirs.A_adjoint(y), op.adjoint(y))
    weight = 4.0
    expected = cg(lambda u: op.normal(u) + weight * u, op.adjoint(y) + weight * z, z, iterations=300, tolerance=1e-12)
    assert relative(theirs.prox_l2(z, y, 1 / weight), expected) < 1e-7  # deepinv adds 1e-8 to denominators
    assert relative(op.normal(theirs.A_dagger(y)), op.adjoint(y)) < 1e-3
    assert float(theirs.compute_norm(x[:1], squared=False, verbose=False)) == pytest.approx(op.norm, rel=1e-2)
    assert theirs.adjointness_test(img_size=op.in_shape) < 1e-5


def test_our_ct_in_deepinvs_gradient_descent_is_our_least_squares():
    from deepinv.optim import L2, Tikhonov
    from deepinv.optim.optimizers import GD

    op = build("ct-sparse", (12, 10), 2.0, views=9)
    y, weight = gaussian(2, *op.out_shape, dtype=torch.float64), 60.0
    step = 1.9 / (op.norm**2 + weight)
    model = GD(L2(), Tikhonov(), weight, stepsize=step, max_iter=400, early_stop=False)
    expected = cg(lambda u: op.normal(u) + weight * u, op.adjoint(y), op.adjoint(y), iterations=300, tolerance=1e-12)
    assert relative(model(y, to_deepinv(op)), expected) < 1e-8


def test_volumes_and_slices_with_their_own_parameters_in_deepinv():
    thick = DownsampleZ((6, 5, 4), 3)
    theirs = to_deepinv(thick)
    x = gaussian(2, 1, 6, 5, 4)
    assert theirs.img_size == (1, 6, 5, 4)
    assert torch.equal(theirs.A(x), thick(x.transpose(1, 2))) and theirs.A_adjoint(theirs.A(x)).shape == x.shape
    own = Mask(gaussian(3, 5, 4) > 0)
    x = gaussian(3, 1, 5, 4)
    assert torch.equal(to_deepinv(own).A(x), own(x))
    round_trip = from_deepinv(to_deepinv(thick), (1, 6, 5, 4))
    x = gaussian(2, 6, 1, 5, 4)
    assert torch.equal(round_trip(x), thick(x)) and round_trip.in_shape == thick.in_shape


def test_scipys_algorithms_on_our_operator():
    op = build("ct-sparse", (9, 8), 1.0, views=20)
    theirs = as_scipy(op)
    dense = op(torch.eye(72, dtype=torch.float64).reshape(72, 1, 9, 8)).reshape(72, -1).T.numpy()
    assert theirs.shape == dense.shape and theirs.dtype == np.float64
    v, w = np.random.default_rng(0).normal(size=(72, 3)), np.random.default_rng(1).normal(size=(dense.shape[0], 2))
    assert np.allclose(theirs @ v, dense @ v) and np.allclose(theirs @ v[:, 0], dense @ v[:, 0])
    assert np.allclose(theirs.T @ w, dense.T @ w) and np.allclose(theirs.rmatvec(w[:, 0]), dense.T @ w[:, 0])
    assert svds(theirs, k=1, return_singular_vectors=False)[0] == pytest.approx(op.norm, rel=1e-3)
    truth = np.random.default_rng(2).normal(size=72)
    assert np.allclose(lsqr(theirs, dense @ truth, atol=1e-14, btol=1e-14, iter_lim=2000)[0], truth, atol=1e-6)
    single = as_scipy(op, np.float32)
    assert (single @ v[:, 0]).dtype == np.float32 and np.allclose(single @ v[:, 0], dense @ v[:, 0], atol=1e-4)
    for refused in (lambda: theirs @ (1j * v[:, 0]), lambda: as_scipy(op, "float16"), lambda: as_scipy(op, complex)):
        with pytest.raises(UsageError, match="as_scipy"):
            refused()


def test_several_slices_are_one_vector_of_scipy():
    own = Mask(gaussian(3, 5, 4) > 0)
    theirs = as_scipy(own, batch=(3,))
    v = np.random.default_rng(0).normal(size=60)
    assert theirs.shape == (60, 60) and np.array_equal(theirs @ v, v * own.mask.numpy().ravel())


def test_importing_the_adapters_imports_neither_deepinv_nor_scipy_sparse():
    code = "import sys, invdiff.operators.adapters; sys.exit('deepinv' in sys.modules or 'scipy.sparse' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EACH
def test_gpu_equals_cpu(name):
    theirs, op = wrapped(name)
    gpu = from_deepinv(theirs.to("cuda"), PHYSICS[name][1])
    x, y = gaussian(3, *op.in_shape), gaussian(3, *op.out_shape)
    for moved in (gpu, op.to("cuda")):
        assert relative(moved(x.cuda()).cpu(), op(x)) < 1e-5
        assert relative(moved.adjoint(y.cuda()).cpu(), op.adjoint(y)) < 1e-5


def test_a_physics_that_works_in_place_leaves_images_and_data_alone():
    x = gaussian(3, 1, 16, 16)  # slices of 1024 bytes, which need no copy to be aligned
    seen, kept = (x[0] > -0.3).float(), x.clone()
    operator = from_deepinv(
        physics.LinearPhysics(A=lambda u: u.mul_(seen), A_adjoint=lambda y: y.mul_(seen)), (1, 16, 16)
    )
    y = operator(x)
    assert torch.equal(x, kept) and torch.equal(y, kept * seen)
    operator.adjoint(x)
    assert torch.equal(x, kept)
