"""The registry that the laws of operators run over: the whole table with its variants, and operators of the library.

A new operator gets a line in ``TABLE`` or ``LIBRARY``, and one in ``BY_HAND``: its dense matrix, written without it.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from cone_cases import joseph_by_hand as cone_by_hand
from mri_cases import dense as fourier_by_hand
from mri_cases import random_maps, random_mask
from noncartesian_cases import dense as sums_by_hand
from scipy import ndimage
from test_ct import joseph_by_hand as parallel_by_hand
from test_fan import joseph_by_hand as fan_by_hand

from invdiff.operator import Compose, LinearOperator, Scale, Stack
from invdiff.operators import build
from invdiff.operators.blur import Blur
from invdiff.operators.ct import CT, SCANNERS, CTFan, CTParallel
from invdiff.operators.ct_cone import CTCone
from invdiff.operators.fan import FanGeometry
from invdiff.operators.identity import Identity
from invdiff.operators.kernels import gaussian_kernel
from invdiff.operators.mask import Mask
from invdiff.operators.mri import CartesianMRI
from invdiff.operators.noncartesian import NonCartesianMRI
from invdiff.operators.rays import ParallelGeometry, equispaced
from invdiff.operators.superres import Downsample, DownsampleZ
from invdiff.operators.trajectories import radial
from invdiff.problem import Whitened

MODES = {"circular": "wrap", "reflect": "reflect", "replicate": "nearest"}  # scipy's names
PIXEL = (2.1, 1.3, 0.8)  # mm, slice, row, column


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def skew(*shape):
    """A kernel without any symmetry, positive."""
    return gaussian(*shape, seed=7).abs() + 0.1


def diagonal(values):
    return torch.diag(torch.as_tensor(values, dtype=torch.float64).flatten())


# Dense matrices that do not use the operators: one, or one per slice.


def ct_by_hand(op):
    return (fan_by_hand if isinstance(op, CTFan) else parallel_by_hand)(op.shape, op.pixel_mm, op.geometry)


def blur_by_hand(op):
    n, h = math.prod(op.in_shape), op.kernel.numpy()
    units, h = np.eye(n).reshape(n, *op.in_shape), h.reshape(1, *h.shape[:-2], 1, *h.shape[-2:])
    return torch.from_numpy(ndimage.convolve(units, h, mode=MODES[op.boundary]).reshape(n, n).T)


def mask_by_hand(op):
    masks = op.mask if op.mask.ndim == 3 else op.mask[None]
    return [diagonal(m.expand(op.channels, *m.shape)) for m in masks]


def rows_by_hand(size, factor, kind):
    """Coarse pixel i is centred on fine pixels ``factor i ...``; t in coarse pixels."""
    if factor == 1:
        return np.eye(size)
    t = np.abs((np.arange(size) + 0.5) / factor - (np.arange(size // factor)[:, None] + 0.5))
    weights = {
        "average": t < 0.5,
        "gaussian": np.exp(-4 * np.log(2) * t**2) * (t <= 2 / math.sqrt(2 * math.log(2))),
        "bicubic": np.where(
            t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0)
        ),
    }[kind].astype(float)
    return weights / weights.sum(1, keepdims=True)


def downsample_by_hand(op):
    plane = np.kron(*(rows_by_hand(n, op.factor, op.filter) for n in op.shape))
    return torch.from_numpy(np.kron(np.eye(op.channels), plane))


def thick_by_hand(op):
    rows = rows_by_hand(op.shape[0], op.factor, op.profile)
    return torch.from_numpy(np.kron(rows, np.eye(math.prod(op.in_shape[1:]))))


def mri_by_hand(op):
    mask, maps = op.mask.numpy(), None if op.maps is None else op.maps.numpy()
    pick = lambda a, rank, i: a[i] if a is not None and a.ndim == rank else a  # noqa: E731
    return [fourier_by_hand(pick(mask, 3, i), pick(maps, 4, i)) for i in range(op.slices or 1)]


def radial_by_hand(op):
    k, maps = op.trajectory.numpy(), None if op.maps is None else op.maps.numpy()
    return [sums_by_hand(k, op.in_shape[1:], m) for m in (maps if op.slices else [maps])]


def composed_by_hand(op):
    return [a @ b for a, b in zip(*match(by_hand(op.outer), by_hand(op.inner)), strict=True)]


def scaled_by_hand(op):
    return [op.factor * a for a in by_hand(op.operator)]


def stacked_by_hand(op):
    return [torch.cat(parts) for parts in zip(*match(*map(by_hand, op.operators)), strict=True)]


def whitened_by_hand(op):
    weights = op.root_weights.flatten(1)
    matrices, weights = match(by_hand(op.operator), list(weights))
    return [op.scale * w[:, None] * a for a, w in zip(matrices, weights, strict=True)]


def match(*lists):
    """A matrix that serves all slices, once for each."""
    count = max(map(len, lists))
    return [matrices * count if len(matrices) == 1 else matrices for matrices in lists]


BY_HAND = {
    CTParallel: ct_by_hand,
    CTFan: ct_by_hand,
    CTCone: lambda op: cone_by_hand(op.shape, op.voxel_mm, op.geometry),
    Blur: blur_by_hand,
    Mask: mask_by_hand,
    Downsample: downsample_by_hand,
    DownsampleZ: thick_by_hand,
    Identity: lambda op: torch.eye(math.prod(op.in_shape), dtype=torch.float64),
    CartesianMRI: mri_by_hand,
    NonCartesianMRI: radial_by_hand,
    Compose: composed_by_hand,
    Scale: scaled_by_hand,
    Stack: stacked_by_hand,
    Whitened: whitened_by_hand,
}


def by_hand(op):
    found = BY_HAND[type(op)](op)
    return found if isinstance(found, list) else [found]


# The registry.

TABLE = [  # name, shape, options: for every variant that `test_nothing_of_the_table_is_left_out` asks for
    ("ct-sparse", (7, 10), {"views": 9, "start": 5.0}),
    ("ct-sparse", (7, 10), {"views": 6, "start": 5.0, "geometry": "fan"}),
    ("ct-sparse", (5, 9), {"views": 7, "geometry": "fan", "detector_shape": "curved", "rotation": "clockwise"}),
    ("ct-limited", (9, 4), {"views": 8, "arc": 95.0, "start": 3.0, "detector_offset": 0.3}),
    ("ct-limited", (9, 4), {"views": 8, "arc": 95.0, "geometry": "fan", "detector_offset": 0.3}),
    ("ct-lowdose", (6, 5), {"views": 14, "start": 2.0}),
    ("ct-lowdose", (6, 5), {"views": 14, "start": 2.0, "geometry": "fan", "sod": 20.0}),
    ("ct-sparse", (3, 4, 5), {"views": 5, "start": 4.0, "geometry": "cone", "detector_rows": 4, "sod": 12.0}),
    ("ct-limited", (2, 5, 4), {"views": 4, "arc": 95.0, "geometry": "cone", "detector_rows": 3, "sod": 15.0}),
    ("ct-lowdose", (3, 4, 4), {"views": 4, "start": 2.0, "geometry": "cone", "rotation": "clockwise"}),
    ("mri", (7, 6), {"acceleration": 2.0, "seed": 2}),
    ("mri", (6, 9), {"acceleration": 1.5, "pattern": "poisson", "center_fraction": 0.2, "partial_fourier": 0.8}),
    ("mri-multicoil", (6, 5), {"acceleration": 2.0, "coils": 3, "pattern": "random"}),
    ("mri-radial", (7, 6), {"spokes": 5}),
    ("mri-radial", (6, 7), {"trajectory": "golden", "spokes": 4, "coils": 2, "samples": 9}),
    *(("blur", (9, 12), {"kernel": k, "boundary": b}) for k in ("gaussian:0.9", "motion:3:30") for b in MODES),
    ("blur", (11, 13), {"kernel": "gaussian:1.2", "unit": "mm"}),
    ("blur", (5, 6, 5), {"kernel": "gaussian3d:0.4", "boundary": "circular"}),
    *(("inpaint", (7, 6), {"mask": m}) for m in ("random:0.4", "box:3", "stripes:2")),
    *(("sr", (6, 9), {"factor": 3, "filter": f}) for f in ("average", "bicubic", "gaussian")),
    ("sr", (8, 4), {}),
    *(("sr", (6, 3, 2), {"factor": 3, "axis": "through-plane", "filter": f}) for f in ("average", "gaussian")),
    ("denoise", (4, 7), {}),
]
VARIANTS = {  # values of an option that a law may depend on
    "geometry": tuple(SCANNERS),
    "boundary": tuple(MODES),
    "axis": ("inplane", "through-plane"),
    "filter": ("average", "bicubic", "gaussian"),
}
LINES = np.broadcast_to(random_mask(1, 7, seed=3), (6, 7))
PARALLEL = ParallelGeometry((0.0, 90.0, -30.0, 200.0, 45.0), 6, 1.1, -0.9)
FAN = FanGeometry(equispaced(6, 360, 5), 11, 1.9, 17.0, 31.0, "flat", 0.35)
LIBRARY = {  # the operator, and slices with parameters of their own
    "parallel": (lambda: CTParallel((9, 4), (0.5, 1.0), PARALLEL), None),
    "parallel-on-the-fly": (lambda: CTParallel((9, 4), (0.5, 1.0), PARALLEL, memory_limit_bytes=0), None),
    "fan-on-the-fly": (lambda: CTFan((7, 10), (1.3, 0.8), FAN, memory_limit_bytes=0), None),
    **{f"blur-{b}": (lambda b=b: Blur((7, 10), skew(5, 3), b), None) for b in MODES},
    **{f"blur-3d-{b}": (lambda b=b: Blur((3, 5, 4), skew(3, 5, 3), b), None) for b in MODES},
    "blur-3d-mirrored": (lambda: Blur((4, 5, 3), gaussian_kernel((0.3, 0.5, 0.2)), "reflect"), None),
    "blur-channels": (lambda: Blur((5, 6), skew(3, 3), "reflect", channels=2), None),
    "blur-sharpens": (lambda: Blur((5, 4), torch.outer(*[torch.tensor([-1.0, 3, -1])] * 2), "reflect"), None),
    "blur-one": (lambda: Blur((1, 4), skew(1, 3), "reflect"), None),
    "mask-channels": (lambda: Mask(gaussian(5, 4) > 0, channels=2), None),
    "mask-slices": (lambda: Mask(gaussian(3, 5, 4) > 0), 3),
    "sr-channels": (lambda: Downsample((8, 4), 2, "bicubic", channels=2), None),
    "sr-one": (lambda: Downsample((3, 5), 1, "gaussian"), None),
    "mri": (lambda: CartesianMRI(random_mask(6, 5)), None),
    "mri-lines": (lambda: CartesianMRI(LINES), None),
    "mri-rows": (lambda: CartesianMRI(LINES.T), None),
    "mri-full": (lambda: CartesianMRI(np.ones((3, 4))), None),
    "mri-coils": (lambda: CartesianMRI(random_mask(5, 4), random_maps(3, 5, 4)), None),
    "mri-coils-lines": (lambda: CartesianMRI(LINES, random_maps(2, 6, 7)), None),
    "mri-coils-full": (lambda: CartesianMRI(np.ones((4, 3)), random_maps(2, 4, 3)), None),
    "mri-slice-masks": (lambda: CartesianMRI(random_mask(3, 4, 5)), 3),
    "mri-slice-maps": (lambda: CartesianMRI(random_mask(4, 5), random_maps(3, 2, 4, 5)), 3),
    "mri-slice-both": (lambda: CartesianMRI(random_mask(3, 5, 4), random_maps(3, 2, 5, 4)), 3),
    "radial-slice-maps": (lambda: NonCartesianMRI(radial((5, 4), 3), (5, 4), random_maps(3, 2, 5, 4)), 3),
    "identity": (lambda: Identity((2, 3, 5)), None),
    "compose": (lambda: Mask(gaussian(7, 6) > 0) @ Blur((7, 6), skew(3, 3)), None),
    "compose-ct": (lambda: build("ct-sparse", (7, 6), PIXEL[1:], views=5, start=5.0) @ Blur((7, 6), skew(3, 3)), None),
    "compose-slices": (lambda: Blur((5, 4), skew(3, 3)) @ Mask(gaussian(3, 5, 4) > 0), 3),
    "compose-stacks": (lambda: DownsampleZ((6, 3, 2), 3) @ Blur((6, 3, 2), skew(3, 1, 1)), None),
    "scale": (lambda: -2.5 * Blur((7, 6), skew(3, 3), "replicate"), None),
    "stack": (lambda: Stack(Blur((6, 8), skew(3, 3)), Mask(gaussian(6, 8) > 0), Downsample((6, 8), 2)), None),
    "stack-slices": (lambda: Stack(Identity((1, 5, 4)), Mask(gaussian(3, 5, 4) > 0)), 3),
    "whitened": (lambda: Whitened(Blur((5, 4), skew(3, 3)), gaussian(3, 1, 5, 4).exp(), 2.0), 3),
}


@dataclass(frozen=True)
class Case:
    """An operator of the registry and its dense matrix, in float64."""

    op: LinearOperator
    slices: int | None = None

    @property
    def batch(self):
        return () if self.slices is None else (self.slices,)

    @cached_property
    def matrices(self):
        """The dense matrix of every slice, or one."""
        matrices = by_hand(self.op)
        return matrices * self.slices if self.slices and len(matrices) == 1 else matrices

    @property
    def tolerance(self):
        """Of dense weights: those of CT go through angles and lengths along another way; a NUFFT is an approximation,
        in float32 by positions of that precision (in float64 see test_noncartesian).
        """
        if isinstance(self.op, NonCartesianMRI):
            return 2e-6
        return 1e-8 if any(isinstance(part, CT | CTCone) for part in (self.op, *vars(self.op).values())) else 1e-12

    @property
    def closed(self):
        """Norm and prox are formulas."""
        return getattr(self.op, "closed_form", isinstance(self.op, (Mask, Downsample, DownsampleZ, Identity)))

    def x(self, *lead, seed=1, dtype=torch.float64):
        return gaussian(*lead, *self.batch, *self.op.in_shape, seed=seed, dtype=dtype)

    def y(self, *lead, seed=2, dtype=torch.float64):
        return gaussian(*lead, *self.batch, *self.op.out_shape, seed=seed, dtype=dtype)

    def per_slice(self, t, shape):
        """``(lead, [slices,] *shape)`` as (slices or 1, lead, values), float64."""
        return t.reshape(-1, self.slices or 1, math.prod(shape)).transpose(0, 1).double()

    def columns(self, f, shape, other, dtype):
        """The matrix of a linear map per slice, from its action on unit vectors."""
        n = math.prod(shape)
        units = torch.eye(n, dtype=dtype).reshape(n, *[1 for _ in self.batch], *shape)
        out = f(units.expand(n, *self.batch, *shape))
        assert out.dtype == dtype
        return self.per_slice(out, other).mT

    def maps(self, dtype=torch.float64, device="cpu", items=5):
        """Every linear map that the operator claims, with a Gaussian argument of several items."""
        op, x, y = self.op, self.x(items, dtype=dtype).to(device), self.y(items, dtype=dtype).to(device)
        found = [(op, x), (op.adjoint, y), (op.normal, x)]
        if isinstance(op, Blur) and not self.closed and dtype == torch.float64:
            return found  # prox and pinv by many conjugate gradients: in float32 alone
        if self.claims("pinv"):
            found.append((op.pinv, y))
        if self.claims("prox"):
            found.append((lambda v: op.prox(x[:1].expand(len(v), *x.shape[1:]), v, 0.3), y))
        return found

    def claims(self, what):
        return getattr(self.op, what, None) is not None


@lru_cache
def case(name):
    if name in LIBRARY:
        make, slices = LIBRARY[name]
        return Case(make(), slices)
    operator, shape, options = TABLE[NAMES.index(name)]
    return Case(build(operator, shape, PIXEL[-len(shape) :], **options))


NAMES = ["-".join([name, *map(str, options.values())]) for name, _, options in TABLE]
