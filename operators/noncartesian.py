"""Non-Cartesian magnetic resonance imaging of single slices: k-space along spokes, spirals and other trajectories."""

import copy
import math
from functools import cached_property

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from invdiff.errors import InputError, ShapeError, UsageError, choose
from invdiff.linalg import largest_eigenvalue, one_by_one, slice_dot, to_complex, to_real
from invdiff.operator import _check
from invdiff.operators.base import Matched, check_plane
from invdiff.operators.density import pipe_menon, ramp
from invdiff.operators.nufft import Nufft
from invdiff.operators.sensitivities import birdcage_maps, by_sensitivity, checked_maps, tensor
from invdiff.operators.trajectories import (
    check_trajectory,
    nyquist_spokes,
    radial,
    read_trajectory,
    spiral,
    spoke_spacing,
)


class NonCartesianMRI(Matched):
    """Fourier samples of a complex slice anywhere in k-space, seen by one or several coils: ``y_c = F S_c x``.

    ``(F z)_j = (H W)^(-1/2) sum_p z_p exp(-2 pi i k_j . p)``, p counted from pixel ``(H // 2, W // 2)``: on the points
    of the grid these are the samples of :class:`invdiff.operators.mri.CartesianMRI`. S_c is the sensitivity of coil c
    (1 without ``maps``). Images are ``(..., 2, H, W)``: real part, imaginary part. Measurements are
    ``(..., 2 * coils, shots, samples)``: the real parts of all coils, then their imaginary parts. Both keep the dtype
    of the input, float32 (samples exact to about 1e-5) or float64 (1e-12); the adjoint is exact in both.

    Args:
        trajectory: ``(shots, samples, 2)`` in cycles per pixel, (row, column), in [-0.5, 0.5].
        shape: (H, W).
        maps: complex coil sensitivities ``(coils, H, W)`` or ``(slices, coils, H, W)``; None for a single uniform coil.
        density: of :meth:`pinv`: "ramp" (spokes), "pipe" (anything), "auto" (the one that fits), or the areas
            themselves, ``(shots, samples)`` in cycles^2 per pixel^2.

    With per-slice maps images are ``(..., slices, 2, H, W)``, and :meth:`restrict` cuts the maps.

    Raises:
        UsageError: finufft (cufinufft on a GPU) is not installed, maps that are not complex, an unknown density.
        InputError: a trajectory in another unit, or values that are not finite.
        ShapeError: a trajectory, maps or areas of another shape.

    Source: K. P. Pruessmann et al., Magn. Reson. Med. 46 (2001) 638-651.
    """

    complex_image = True
    pinv_kind = "zero-filled"

    def __init__(
        self,
        trajectory: ArrayLike | Tensor,
        shape: tuple[int, int],
        maps: ArrayLike | Tensor | None = None,
        density: str | ArrayLike | Tensor = "auto",
        device: torch.device | str = "cpu",
    ):
        (height, width), _ = check_plane(shape, 1.0)
        trajectory = trajectory.cpu().numpy() if isinstance(trajectory, Tensor) else trajectory
        self.trajectory = torch.from_numpy(check_trajectory(trajectory, (height, width)))
        self._maps, self.slices, coils = None, None, 1
        if maps is not None:
            maps = checked_maps(tensor(maps), (height, width), "NonCartesianMRI")
            self.slices, coils = len(maps) if maps.ndim == 4 else None, maps.shape[-3]
        super().__init__((2, height, width), (2 * coils, *self.trajectory.shape[:2]), device)
        self._maps = None if maps is None else to_real(maps).to(self.device)
        self._density = _density(density, self.out_shape[1:])
        self._nufft = Nufft(self.trajectory.flatten(0, 1), (height, width), self.device)
        self._kept: dict[str, tuple[Tensor, ...]] = {}  # areas and Toeplitz kernel, the same for all slices
        self._gain = 1 / math.sqrt(height * width)

    def _arguments(self) -> tuple:
        return self.trajectory, self.in_shape[1:], self.maps, self._density

    @property
    def maps(self) -> Tensor | None:
        """Coil sensitivities as given; None for a single uniform coil."""
        return None if self._maps is None else to_complex(self._maps)

    @property
    def acceleration(self) -> float:
        """``pi / 2 max(H, W)`` over the number of spokes; otherwise the pixels of a disc over the samples."""
        shots, samples = self.out_shape[1:]
        if spoke_spacing(self.trajectory.numpy()) is not None:
            return nyquist_spokes(self.in_shape[1:]) / shots
        return math.pi / 4 * math.prod(self.in_shape[1:]) / (shots * samples)

    def restrict(self, slices: slice) -> "NonCartesianMRI":
        """The operator of those slices; the same bits for each of them."""
        if self.slices is None or self._maps is None:
            return self
        other = copy.copy(self)  # shares plans, areas and kernel, which do not depend on the slice
        other.__dict__.pop("norm", None)
        other.__dict__.pop("mean_square", None)
        other._maps, other._casts = self._maps[slices], {}
        other.slices = len(other._maps)
        return other

    def _stack(self, what: str, x: Tensor, shape: tuple[int, ...]) -> None:
        _check("NonCartesianMRI", what, x, shape if self.slices is None else (self.slices, *shape))

    # Real products with the maps, as in CartesianMRI: complex ones round differently with the batch.
    def _spread(self, x: Tensor) -> Tensor:
        """``S_c x``, complex ``(..., coils, H, W)``."""
        re, im = x.chunk(2, -3)
        if self._maps is None:
            return torch.complex(re, im)
        c, d = self._cast("_maps", x).chunk(2, -3)
        return torch.complex((c * re).sub_(d * im), (c * im).add_(d * re))

    def _combine(self, z: Tensor) -> Tensor:
        """``sum_c conj(S_c) z_c``, real ``(..., 2, H, W)``: the adjoint of :meth:`_spread`."""
        re, im = z.real, z.imag
        if self._maps is not None:
            c, d = self._cast("_maps", re).chunk(2, -3)
            re, im = (c * re).add_(d * im), (c * im).sub_(d * re)
            re, im = re.sum(-3, keepdim=True), im.sum(-3, keepdim=True)
        return torch.cat([re, im], -3)

    def _direct(self, x: Tensor) -> Tensor:
        self._stack("images", x, self.in_shape)
        y = self._nufft.direct(self._spread(x))
        return to_real((self._gain * y).unflatten(-1, self.out_shape[1:]))

    def _transposed(self, y: Tensor) -> Tensor:
        self._stack("measurements", y, self.out_shape)
        return self._combine(self._gain * self._nufft.adjoint(to_complex(y).flatten(-2)))

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """``A^T W A x``; without weights, or with the same for all slices and coils, by Toeplitz embedding.

        ``F^H W F`` convolves with the point spread function of the samples; its spectrum on a grid of twice the size is
        computed once in float64 and kept until other weights come. Two FFTs instead of two NUFFTs: 3 to 4 times as fast
        on the CPU, and in float32 nearer to the truth (2e-7 instead of 1e-5). Weights that differ take the direct way;
        looking costs one pass over them.

        Source: J. A. Fessler et al., IEEE Trans. Signal Process. 53 (2005) 3393-3402.
        """
        plane = self._common(weights)
        if plane is None:
            return super().normal(x, weights)
        self._stack("images", x, self.in_shape)
        self._require(x)
        kernel, (height, width) = self._kernel(plane).to(x.dtype), self.in_shape[1:]

        def convolve(z: Tensor) -> Tensor:
            k = torch.fft.fft(torch.fft.fft(z, 2 * height, -2), 2 * width, -1) * kernel
            return torch.fft.ifft(torch.fft.ifft(k, dim=-1)[..., :width], dim=-2)[..., :height, :]

        return self._combine(one_by_one(convolve, 2, self._spread(x)))

    def _common(self, weights: Tensor | None) -> Tensor | None:
        """The weights ``(shots, samples)`` that all coils and slices share, or None."""
        if weights is None:
            return torch.ones((), device=self.device)
        if weights.requires_grad or weights.numel() == 0 or weights.shape[-3:] != self.out_shape:
            return None
        plane = weights.reshape(-1, *self.out_shape[1:])[0]
        return plane if bool((weights == plane).all()) else None

    def _kernel(self, plane: Tensor) -> Tensor:
        """Spectrum ``(2 H, 2 W)``, real, of the point spread function under these weights, in float64."""
        name = "kernel" if plane.ndim else "plain kernel"
        if name in self._kept and (not plane.ndim or torch.equal(self._kept[name][0], plane)):
            return self._kept[name][1]
        height, width = self.in_shape[1:]
        twice = Nufft(self.trajectory.flatten(0, 1), (2 * height, 2 * width), self.device)
        weight = plane.to(torch.complex128).expand(self.out_shape[1:]).flatten()
        spread = self._gain**2 * twice.adjoint(weight)
        spread[0], spread[:, 0] = 0, 0  # shifts by -H and -W never occur; without them the spectrum is real
        kernel = torch.fft.fft2(torch.fft.ifftshift(spread)).real.contiguous()
        self._kept[name] = plane.clone(), kernel
        return kernel

    @property
    def density(self) -> Tensor:
        """Areas of the samples, float64 ``(shots, samples)`` in cycles^2 per pixel^2, computed once."""
        if "density" not in self._kept:
            area = self._density
            if isinstance(area, str):
                trajectory, shape = self.trajectory.numpy(), self.in_shape[1:]
                area = torch.from_numpy(DENSITIES[area](trajectory, shape))
            self._kept["density"] = (area.to(self.device),)
        return self._kept["density"][0]

    def pinv(self, y: Tensor) -> Tensor:
        """``H W A^T (density y) / sum_c |S_c|^2``: gridding, 0 where no coil sees anything.

        It sums up the Fourier integral over the covered part of k-space: no exact pseudo-inverse, the usual start. The
        mean of a disc comes back within 0.2 % for spokes; for 4 to 16 spirals within 1.5 % where the disc is as wide as
        0.4 or 0.6 of the image. At 0.8 it is up to 4.5 % too bright with the turns that the grid asks for, 2.5 % with
        50 % more turns, and within 0.7 % with twice as many.
        """
        area = math.prod(self.in_shape[1:]) * self.density
        x = self.adjoint(area.to(y.dtype) * y)
        if self._maps is None:
            return x
        return by_sensitivity(x, self._cast("_maps", x).square().sum(-3, keepdim=True))

    def _probe(self) -> Tensor:
        probe = super()._probe()
        return probe if self.slices is None else probe.expand(self.slices, *self.in_shape)

    @cached_property
    def norm(self) -> float:
        """Largest singular value over all slices, by Lanczos' iteration (within 1e-3, from below)."""
        return math.sqrt(float(largest_eigenvalue(self.normal, self._probe(), dot=slice_dot).max()))

    @cached_property
    def mean_square(self) -> float:
        """trace(A^T A) / n, exactly: samples per pixel times the mean of ``sum_c |S_c|^2``."""
        total = 1.0 if self._maps is None else float(self._maps.double().square().sum(-3).mean())
        return math.prod(self.out_shape[1:]) / math.prod(self.in_shape[1:]) * total

    def describe(self) -> str:
        """One paragraph for people."""
        (_, height, width), (channels, shots, samples) = self.in_shape, self.out_shape
        coils = "one uniform coil" if self._maps is None else f"{channels // 2} coils"
        stack = "" if self.slices is None else f", maps of {self.slices} slices"
        return (
            f"Non-Cartesian MRI, {coils}, {shots} shots of {samples} samples, {height} x {width} pixels "
            f"(rows x columns), acceleration {self.acceleration:.3g}{stack}."
        )


def _auto(trajectory, shape):
    return pipe_menon(trajectory, shape) if spoke_spacing(trajectory) is None else ramp(trajectory)


DENSITIES = {"auto": _auto, "ramp": lambda trajectory, shape: ramp(trajectory), "pipe": pipe_menon}


def _density(density: str | ArrayLike | Tensor, shape: tuple[int, ...]) -> str | Tensor:
    if isinstance(density, str):
        choose(density, DENSITIES, "density")
        return density
    area = tensor(density).to("cpu", torch.float64)
    if tuple(area.shape) != shape:
        raise ShapeError(f"density must be one area per sample, {tuple(shape)}, got {tuple(area.shape)}")
    if not bool((torch.isfinite(area) & (area >= 0)).all() and area.any()):
        raise InputError("density must be finite, not negative and not all zero: give areas, or 'auto'")
    return area


def mri_radial(
    shape,
    pixel_mm,
    *,
    trajectory="radial",
    spokes=None,
    samples=None,
    turns=None,
    start=None,
    coils=1,
    density="auto",
) -> NonCartesianMRI:
    """MRI along spokes, spirals or a trajectory from a file.

    Args:
        shape: (H, W).
        pixel_mm: not used: frequencies are counted on the grid of the image.
        trajectory: "radial", "golden" (golden-angle spokes), "spiral", or a ``.npy`` file with ``(shots, samples, 2)``
            in cycles per pixel.
        spokes: spokes (None for 64), or interleaves of a spiral (None for 16).
        samples: of each; None for ``2 max(H, W)`` along a spoke, and for steps of the grid along a spiral.
        turns: of each interleave of a spiral; None for those that measure everything.
        start: angle of the first one, in degrees; None for 0.
        coils: 1 for a uniform coil, more for :func:`invdiff.operators.mri.birdcage_maps`.
        density: "auto", "ramp" or "pipe"; see :class:`NonCartesianMRI`.

    Raises:
        UsageError: finufft is not installed, or an option out of range or without meaning for this trajectory.
        InputError: a file that is missing, damaged or in another unit.
    """
    shape, _ = check_plane(shape, pixel_mm)
    if not float(coils).is_integer() or coils < 1:
        raise UsageError(f"coils must be a whole number from 1, got {coils}")
    maps = None if coils == 1 else birdcage_maps(shape, int(coils))
    named = trajectory in ("radial", "golden", "spiral")
    foreign = {"turns": turns} if named else {"spokes": spokes, "samples": samples, "turns": turns, "start": start}
    if trajectory != "spiral" and (given := [name for name, value in foreign.items() if value is not None]):
        raise UsageError(f"{', '.join(given)}: trajectory '{trajectory}' has no such option; drop it")
    if trajectory == "spiral":
        points = spiral(shape, 16 if spokes is None else spokes, samples, turns, start or 0.0)
    elif named:
        points = radial(shape, 64 if spokes is None else spokes, samples, trajectory == "golden", start or 0.0)
    else:
        points = read_trajectory(trajectory, shape)
    return NonCartesianMRI(points, shape, maps, density)
