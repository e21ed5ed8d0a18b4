"""Restoration operators: independent oracles, files, options and refusals."""

import math
import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from scipy import ndimage, signal
from torch.nn import functional

from invdiff.errors import InputError, ShapeError, UsageError
from invdiff.operator import Stack
from invdiff.operators.blur import Blur, blur
from invdiff.operators.identity import Identity, denoise
from invdiff.operators.kernels import gaussian_kernel, load_kernel, motion_kernel
from invdiff.operators.mask import Mask, inpaint
from invdiff.operators.superres import Downsample, DownsampleZ, sr

BOUNDARIES = {"circular": "wrap", "reflect": "reflect", "replicate": "nearest"}  # scipy's names


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def skew(*shape):
    """A kernel without any symmetry, positive."""
    return gaussian(*shape, seed=7).abs() + 0.1


OPERATORS = {
    **{f"blur-{b}": Blur((7, 10), skew(5, 3), b) for b in BOUNDARIES},
    **{f"blur-even-{b}": Blur((8, 6), gaussian_kernel((0.6, 0.5)), b) for b in BOUNDARIES},
    **{f"blur-3d-{b}": Blur((3, 5, 4), skew(3, 5, 3), b) for b in BOUNDARIES},
    **{
        f"blur-long-{n}-{b}": Blur((n, 3, 4), skew(k, 3, 3), b)
        for n, k in ((1, 5), (2, 11), (3, 9))
        for b in BOUNDARIES
    },
    "blur-3d-mirrored": Blur((4, 5, 3), gaussian_kernel((0.3, 0.5, 0.2)), "reflect"),
    "blur-sharpens": Blur((5, 4), torch.tensor([-1.0, 3, -1])[:, None] * torch.tensor([-1.0, 3, -1]), "reflect"),
    "mask": Mask(gaussian(7, 6) > 0),
    "sr-bicubic": Downsample((6, 9), 3, "bicubic"),
    "sr-z-average": DownsampleZ((6, 3, 2), 3),
    "stack": Stack(Blur((6, 8), skew(3, 3)), Mask(gaussian(6, 8) > 0), Downsample((6, 8), 2)),
}


def columns(f, shape, dtype=torch.float64):
    """Dense matrix of a linear map on ``shape``, from its action on unit vectors."""
    n = math.prod(shape)
    return f(torch.eye(n, dtype=dtype).reshape(n, *shape)).reshape(n, -1).T


def dense(op, dtype=torch.float64):
    return columns(op, op.in_shape, dtype)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_which_blurs_have_a_closed_form():
    closed = {name for name, op in OPERATORS.items() if getattr(op, "closed_form", False)}
    assert closed == {
        "blur-circular",
        "blur-3d-circular",
        "blur-even-circular",
        "blur-long-1-circular",
        "blur-long-2-circular",
        "blur-long-3-circular",
        "blur-even-reflect",
        "blur-3d-mirrored",
        "blur-sharpens",
    }


@pytest.mark.parametrize("op", [OPERATORS[n] for n in ("blur-reflect", "mask", "sr-bicubic", "sr-z-average")])
def test_other_dtypes_and_devices_are_refused(op):
    with pytest.raises(UsageError, match=rf"{type(op).__name__} works in float32 or float64, got torch\.float16"):
        op(torch.zeros(op.in_shape, dtype=torch.float16))
    with pytest.raises(UsageError, match="is on cpu and its input on meta"):
        op.adjoint(torch.zeros(op.out_shape, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "op",
    [
        Blur((7, 9), skew(3, 5), "circular"),  # where the FFT of a batch differs from that of a slice
        Blur((45, 48), skew(5, 5), "circular"),
        Blur((41, 44), gaussian_kernel(0.5), "reflect"),
        Downsample((14, 18), 2),  # where the product of a batch with a matrix does
        Downsample((45, 48), 3),
    ],
    ids=["blur-small", "blur", "blur-reflect", "sr-small", "sr"],
)
def test_a_slice_is_the_same_bits_in_a_large_group(op, dtype):
    x, y = gaussian(37, *op.in_shape, dtype=dtype), gaussian(37, *op.out_shape, seed=1, dtype=dtype)
    start = x[:1]
    prox = lambda t: op.prox(start.expand(len(t), *op.in_shape), t, 0.3)  # noqa: E731
    for f in (op.adjoint, op.pinv, lambda t: op(op.adjoint(t)), prox):
        whole = f(y)
        for group in (1, 3, 12, 32):
            assert torch.equal(torch.cat([f(part) for part in y.split(group)]), whole)


@pytest.mark.parametrize("kernel", ["gaussian:1", "motion:7:30", "gaussian:12"])  # two passes, one pass, by FFT
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_both_ways_to_convolve_agree_and_keep_slices_apart(kernel, boundary):
    op = blur((104, 101), 1.0, kernel=kernel, boundary=boundary)
    assert [len(part) for part in op._factors or ()] == {"gaussian:1": [9, 1], "motion:7:30": [5]}.get(kernel, [])
    x, before = gaussian(11, 1, 104, 101), torch.get_num_threads()
    found = [f(x.float()) for f in (op, op.adjoint)]
    for y, expected in zip(found, (op(x), op.adjoint(x)), strict=True):  # float64 goes by FFT
        assert relative(y.double(), expected) < 1e-6
    torch.set_num_threads(2)
    assert torch.equal(op(x.float()), found[0]) and torch.equal(op.adjoint(x.float()), found[1])
    torch.set_num_threads(before)
    x[3] = math.nan
    others = [i for i in range(11) if i != 3]
    assert torch.equal(op(x.float())[others], found[0][others])


@pytest.mark.parametrize("boundary, mode", BOUNDARIES.items())
@pytest.mark.parametrize("shape, sides", [((9, 14), (5, 7)), ((8, 7), (7, 7)), ((4, 9, 6), (3, 5, 3))])
def test_blur_agrees_with_scipy(boundary, mode, shape, sides):
    kernel, x = skew(*sides), gaussian(2, *shape)
    op = Blur(shape, 3 * kernel, boundary)
    expected = [ndimage.convolve(image, (kernel / kernel.sum()).numpy(), mode=mode) for image in x.numpy()]
    assert np.allclose(op(x.unsqueeze(-3)).squeeze(-3).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("boundary, mode", [("circular", "wrap"), ("reflect", "symmetric"), ("replicate", "edge")])
@pytest.mark.parametrize("slices", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [5, 7, 9, 19])
def test_kernels_longer_than_the_stack_agree_with_a_padded_image(boundary, mode, slices, side):
    kernel, x = skew(side, 5, 3), gaussian(slices, 6, 5)
    padded = np.pad(x.numpy(), [(side // 2,) * 2, (2, 2), (1, 1)], mode)
    expected = signal.convolve(padded, kernel / kernel.sum(), mode="valid", method="direct")
    assert np.allclose(Blur((slices, 6, 5), kernel, boundary)(x[:, None])[:, 0].numpy(), expected, atol=1e-12)


def test_kernels():
    sigma, size = (1.5, 0.8), (41, 37)
    point = np.zeros(size)
    point[20, 18] = 1
    expected = ndimage.gaussian_filter(point, sigma)
    kernel = gaussian_kernel(sigma)
    assert kernel.shape == (13, 7)
    assert np.allclose(kernel, expected[14:27, 15:22], atol=1e-12)
    assert motion_kernel(6, 0).shape == (1, 7) and motion_kernel(6, 90).shape == (7, 1)
    assert torch.allclose(motion_kernel(6, 0)[0], torch.tensor([0.5, 1, 1, 1, 1, 1, 0.5]).double() / 6, atol=1e-4)
    assert torch.allclose(motion_kernel(6, 33), motion_kernel(6, 213)) and not torch.allclose(
        motion_kernel(6, 30), motion_kernel(6, 30).flip(0)
    )
    for length, angle in ((9.0, 30.0), (5.5, 110.0), (0.4, 20.0)):  # second moments of a segment, rows downwards
        kernel = motion_kernel(length, angle)
        assert float(kernel.sum()) == pytest.approx(1) and all(n % 2 for n in kernel.shape)
        r, c = (torch.arange(n, dtype=torch.float64) - n // 2 for n in kernel.shape)
        a, spread = math.radians(angle), length**2 / 12
        mixed = float((kernel * r[:, None] * c).sum())
        assert mixed == pytest.approx(-spread * math.sin(a) * math.cos(a), rel=0.02)
        along = float((kernel * (c * math.cos(a) - r[:, None] * math.sin(a)) ** 2).sum())
        assert spread < along < spread + 0.26  # linear interpolation adds at most 1/4 pixel^2


def test_blur_factory_in_pixels_and_mm():
    assert torch.equal(blur((20, 30), 1.0).kernel, gaussian_kernel(2.0))
    assert blur((20, 30), 1.0).boundary == "reflect"
    op = blur((40, 30), (1.0, 2.0), kernel="gaussian:3", unit="mm", boundary="circular")
    assert torch.equal(op.kernel, gaussian_kernel((3.0, 1.5)))
    down = blur((40, 30), (0.5, 2.0), kernel="motion:6:90", unit="mm")
    assert torch.allclose(down.kernel, motion_kernel(12, 90))
    diagonal = blur((40, 30), (1.0, 2.0), kernel="motion:10:45", unit="mm").kernel
    assert torch.allclose(diagonal, motion_kernel(10 * math.hypot(0.5, 1) / math.sqrt(2), math.degrees(math.atan(2))))


def test_wiener_inverse_keeps_the_mean_and_sharpens():
    x = functional.avg_pool2d(gaussian(1, 1, 33, 30), 3, 1, 1) + 5
    for boundary in BOUNDARIES:
        op = blur((33, 30), 1.0, kernel="gaussian:1", boundary=boundary)
        y = op(x)
        assert relative(op.pinv(y), x) < 0.7 * relative(y, x)
        assert torch.allclose(op.pinv(torch.full_like(y, 5.0)), torch.full_like(y, 5.0))
        noise = gaussian(4, *op.out_shape)
        assert relative(op.pinv(noise), 0 * noise + noise) < 6


def test_kernel_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kernel = np.round(skew(3, 5).numpy() * 80).clip(0, 255) / 255
    np.save("k.npy", kernel)
    imsave("k.png", np.repeat((kernel * 255).round().astype(np.uint8)[..., None], 3, -1))
    nib.save(nib.Nifti1Image(kernel.T[..., None], np.eye(4)), "k.nii.gz")
    for name in ("k.npy", "k.png", "k.nii.gz"):
        assert np.allclose(load_kernel(name), kernel / kernel.sum(), atol=1e-6), name
    assert torch.equal(blur((9, 9), 1.0, kernel="k.npy").kernel, load_kernel("k.npy"))
    solid = skew(3, 5, 7).numpy()
    nib.save(nib.Nifti1Image(solid.T, np.eye(4)), "solid.nii")
    assert np.allclose(load_kernel("solid.nii"), solid / solid.sum())
    with pytest.raises(UsageError, match=r"3 axes and blurs the whole stack: give \(slices, H, W\), got \(9, 9\)"):
        blur((9, 9), 1.0, kernel="solid.nii")
    whole = blur((4, 9, 9), 1.0, kernel="solid.nii")
    assert torch.equal(whole.kernel, load_kernel("solid.nii")) and not whole.slicewise


def test_bad_kernels_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nan, even, negative = torch.ones(3, 3), torch.ones(4, 3), torch.tensor([[1.0, 0, -2]])
    nan[0, 1] = math.nan
    np.save("object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save("complex.npy", np.ones((3, 3), complex))
    imsave("colour.png", np.random.default_rng(0).random((3, 3, 3)))
    for name in ("broken.png", "broken.npy", "broken.nii", "broken.nii.gz", "kernel.txt"):
        (tmp_path / name).write_bytes(b"not such a file")
    bad = {
        "holds 1 values that are not finite: replace": nan,
        "4 x 3: an even side has no middle; crop or pad": even,
        "has the sum -1, which must not be negative: change its sign": negative,
        "is zero everywhere: nothing would be measured": torch.zeros(3, 3),
        "has 1 axes: give": torch.ones(3),
        "11 x 3, is larger than the image, 9 x 8: use a smaller": torch.ones(11, 3),
        "object.npy: holds Python objects": "object.npy",
        "complex.npy: has complex values": "complex.npy",
        "colour.png: is in colour": "colour.png",
        "kernel.txt: its type is unknown; use one of .npy": "kernel.txt",
        **{
            f"{n}: (cannot be read|is not NIfTI)": n
            for n in ("broken.png", "broken.npy", "broken.nii", "broken.nii.gz")
        },
    }
    for words, kernel in bad.items():
        with pytest.raises(InputError, match=words) as refused:
            blur((9, 8), 1.0, kernel=kernel)
        assert "\n" not in str(refused.value)
    for kernel in (
        "gaussian:0",
        "gaussian:nan",
        "gaussian:1:2",
        "gaussian:",
        "gaussian",
        "motion:3",
        "motion:-1:0",
        "no",
    ):
        with pytest.raises(UsageError):
            blur((90, 80), 1.0, kernel=kernel)
    with pytest.raises(UsageError, match=r"between 0\.001 and 512 pixels, got 999"):
        blur((90, 80), 1.0, kernel="gaussian:999")
    with pytest.raises(UsageError, match="unknown boundary 'valid': choose one of circular, reflect, replicate"):
        blur((9, 8), 1.0, kernel="gaussian:1", boundary="valid")
    with pytest.raises(UsageError, match="choose one of mm, px"):
        blur((9, 8), 1.0, kernel="gaussian:1", unit="cm")
    with pytest.raises(UsageError, match=r"2D kernel blurs \(H, W\), got the shape \(2, 9, 8\)"):
        Blur((2, 9, 8), torch.ones(3, 3))


def test_mask_keeps_what_is_measured():
    keep = gaussian(5, 6) > 0
    x = gaussian(3, 1, 5, 6)
    x[..., ~keep] = math.nan
    y = Mask(keep.int())(x)
    assert torch.equal(y[..., keep], x[..., keep]) and not y[..., ~keep].any()
    filled = Mask(keep).pinv(y)
    assert torch.equal(Mask(keep)(filled), y)  # a right inverse
    assert torch.allclose(Mask(keep).pinv(Mask(keep)(torch.full_like(y, 3.0))), torch.full_like(y, 3.0))


def test_mask_per_slice_and_its_restriction():
    keep = gaussian(4, 5, 6) > 0
    op, x, z = Mask(keep.numpy()), gaussian(2, 4, 1, 5, 6), gaussian(2, 4, 1, 5, 6, seed=1)
    assert torch.equal(op(x), x * keep[:, None])
    assert op.mean_square == pytest.approx(float(keep.double().mean())) and op.norm == 1
    for part in (slice(1, 3), slice(2, 3)):
        cut = op.restrict(part)
        assert torch.equal(cut(x[:, part]), op(x)[:, part])
        assert torch.equal(cut.prox(z[:, part], x[:, part], 0.5), op.prox(z, x, 0.5)[:, part])
        assert torch.equal(pickle.loads(pickle.dumps(cut))(x[:, part]), cut(x[:, part]))
    for wrong in (x[:, :1], x[0, 0], x[:, :3]):
        with pytest.raises(ShapeError, match=r"expects \(\.\.\., 4, 1, 5, 6\), got \("):
            op(wrong)


def test_inpaint_patterns_files_and_refusals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    masks = {m: inpaint((8, 9), 1.0, mask=m).mask for m in ("random:0.25", "box:3", "stripes:2")}
    assert int((~masks["random:0.25"]).sum()) == 18
    again, other = (inpaint((8, 9), 1.0, mask="random:0.25", seed=s).mask for s in (0, 1))
    assert torch.equal(again, masks["random:0.25"]) and not torch.equal(other, again)
    assert (~masks["box:3"]).nonzero().tolist() == [[r, c] for r in (2, 3, 4) for c in (3, 4, 5)]
    assert masks["stripes:2"].all(1).tolist() == [True, True, False, False] * 2
    assert not masks["stripes:2"][2].any()
    keep = (gaussian(8, 9) > 0).numpy()
    np.save("m.npy", keep)
    imsave("m.png", np.repeat(keep[..., None].astype(np.uint8) * 255, 3, -1))
    nib.save(nib.Nifti1Image(np.stack([keep.T, ~keep.T], -1).astype(np.uint8), np.eye(4)), "m.nii")
    for name in ("m.npy", "m.png"):
        assert np.array_equal(inpaint((8, 9), 1.0, mask=name).mask, keep)
    assert np.array_equal(inpaint((8, 9), 1.0, mask="m.nii").mask, [keep, ~keep])
    for words, mask in {
        "must hold 1 .measured. and 0 .missing. only, found 0.5 .2 such values.: threshold": np.eye(8, 9) * 0 + 1,
        "the mask is 9 x 8, the slices are 8 x 9: make": keep.T,
        "removes every pixel": 0 * keep,
        "has the shape": keep[0],
    }.items():
        array = mask.astype(float)
        if "0.5" in words:
            array[1, 2:4] = 0.5
        with pytest.raises(InputError, match=words):
            inpaint((8, 9), 1.0, mask=array)
    with pytest.raises(InputError, match="found nan"):
        Mask(torch.tensor([[1.0, math.nan]]))
    for mask in ("random:0", "random:1", "random:x", "box:8", "box:1.5", "stripes:0", "stripes", "missing.npy"):
        with pytest.raises(UsageError):
            inpaint((8, 9), 1.0, mask=mask)


@pytest.mark.parametrize("factor, shape", [(1, (5, 7)), (2, (8, 6)), (3, (9, 15)), (4, (16, 8))])
def test_downsampling_agrees_with_torch(factor, shape):
    x = gaussian(2, 1, *shape)
    assert torch.allclose(sr(shape, 1.0, factor=factor, filter="average")(x), functional.avg_pool2d(x, factor))
    size = [n // factor for n in shape]
    expected = functional.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
    assert torch.allclose(sr(shape, 1.0, factor=factor)(x), expected, atol=1e-7)  # at the edges, too
    ones = torch.ones(1, *shape, dtype=torch.float64)
    assert torch.allclose(sr(shape, 1.0, factor=factor, filter="gaussian")(ones), ones[:, : size[0], : size[1]])


def test_gaussian_downsampling_against_its_definition():
    op, f = Downsample((12, 40), 4, "gaussian"), 4
    i, j = np.arange(10)[:, None], np.arange(40)[None]
    distance = (j - (4 * i + 1.5)) / f
    weights = np.exp(-4 * math.log(2) * distance**2)  # half at half a coarse pixel
    x = gaussian(1, 1, 1, 40).expand(1, 1, 12, 40)
    expected = x[0, 0, 0].numpy() @ (weights / weights.sum(1, keepdims=True)).T
    assert np.allclose(op(x)[0, 0], np.stack([expected] * 3), atol=2e-4)  # cut at 4 standard deviations


@pytest.mark.parametrize("filter", ["average", "bicubic", "gaussian"])
@pytest.mark.parametrize("factor", [2, 3])
def test_what_is_sampled_and_filled_lies_where_it_was(filter, factor):
    r, c = (torch.arange(n, dtype=torch.float64) for n in (42, 48))
    ramp = (2 * r[:, None] - 3 * c)[None]
    op = Downsample((42, 48), factor, filter)
    inner = slice(6 * factor, -6 * factor)
    assert torch.allclose(op.pinv(op(ramp))[:, inner, inner], ramp[:, inner, inner], atol=1e-9)
    thick = DownsampleZ((42, 1, 2), factor, filter if filter != "bicubic" else "average")
    stack = r[:, None, None, None].expand(42, 1, 1, 2).contiguous()
    assert torch.allclose(thick.pinv(thick(stack))[inner], stack[inner], atol=1e-9)
    assert torch.allclose(thick.pinv(torch.ones(42 // factor, 1, 1, 2)), torch.ones(42, 1, 1, 2))


def test_thick_slices_against_the_dense_matrix():
    x = gaussian(2, 12, 1, 3, 4)
    average = DownsampleZ((12, 3, 4), 4)
    matrix = torch.kron(torch.eye(3), torch.full((1, 4), 0.25)).double()
    assert torch.allclose(average(x), torch.einsum("ij,bjchw->bichw", matrix, x))
    assert average.norm == pytest.approx(0.5) and not average.slicewise
    i, j = np.arange(3)[:, None], np.arange(12)[None]
    weights = np.exp(-4 * math.log(2) * ((j - (4 * i + 1.5)) / 4) ** 2)
    weights[np.abs(j - (4 * i + 1.5)) / 4 > 4 / (2 * math.sqrt(2 * math.log(2)))] = 0
    matrix = torch.from_numpy(weights / weights.sum(1, keepdims=True))
    assert torch.allclose(DownsampleZ((12, 3, 4), 4, "gaussian")(x), torch.einsum("ij,bjchw->bichw", matrix, x))


def test_bad_factors_and_filters_are_refused():
    with pytest.raises(
        UsageError, match="Downsample by 3 does not fit 9 x 10 pixels: crop to 9 x 9 or pad to 9 x 12, or"
    ):
        sr((9, 10), 1.0, factor=3)
    with pytest.raises(UsageError, match="DownsampleZ by 4 does not fit 3 slices: pad to 4, or choose"):
        DownsampleZ((3, 4, 4), 4)
    with pytest.raises(UsageError, match="DownsampleZ by 4 does not fit 6 slices: crop to 4 or pad to 8"):
        DownsampleZ((6, 4, 4), 4)
    for factor in (0, -2, 1.5, True, math.nan):
        with pytest.raises(UsageError, match="whole number of at least 1"):
            sr((8, 8), 1.0, factor=factor)
    with pytest.raises(UsageError, match="unknown filter 'lanczos': choose one of average, bicubic, gaussian"):
        sr((8, 8), 1.0, filter="lanczos")
    with pytest.raises(UsageError, match="unknown slice profile 'bicubic': choose one of average, gaussian"):
        DownsampleZ((6, 4, 4), 2, "bicubic")


def test_stack_is_its_parts_one_below_the_other():
    op = OPERATORS["stack"]
    assert torch.equal(dense(op), torch.cat([dense(part) for part in op.operators]))
    x = gaussian(2, 3, *op.in_shape)
    parts = op.split(op(x))
    assert [p.shape[2:] for p in parts] == [a.out_shape for a in op.operators]
    assert all(torch.equal(p, a(x)) for p, a in zip(parts, op.operators, strict=True))
    per_slice = Stack(Identity((1, 5, 6)), Mask(gaussian(4, 5, 6) > 0))
    x = gaussian(4, 1, 5, 6)
    assert torch.equal(per_slice.restrict(slice(1, 3))(x[1:3]), per_slice(x)[1:3])
    assert not Stack(DownsampleZ((4, 3, 2), 2), Blur((4, 3, 2), torch.ones(1, 1, 1))).slicewise
    with pytest.raises(ShapeError, match=r"cannot stack Identity and Mask: images of \(1, 4, 4\) and of \(1, 5, 6\)"):
        Stack(Identity((1, 4, 4)), Mask(torch.ones(5, 6)))
    with pytest.raises(UsageError, match="at least one"):
        Stack()


def test_factories_refuse_bad_grids():
    for factory in (blur, inpaint, sr, denoise):
        for shape, pixel in (((4, 4, 4), 1.0), ((0, 4), 1.0), ((4, 4), 0.0), ((4, 4), (1.0, math.nan))):
            with pytest.raises(UsageError, match=r"shape must|pixel_mm must"):
                factory(shape, pixel)
    assert denoise((4, 6), 1.0).in_shape == (1, 4, 6)
