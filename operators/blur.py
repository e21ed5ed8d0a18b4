"""Blur: convolution of slices with a 2D kernel, or of the whole stack with a 3D kernel, by FFT or directly."""

import logging
from functools import cached_property

import torch
from torch import Tensor

from invdiff.errors import InputError, UsageError, choose
from invdiff.linalg import cg, largest_eigenvalue, one_by_one, slice_dot, total_dot
from invdiff.operator import _check
from invdiff.operators.base import (
    ArrayLike,
    Matched,
    check_channels,
    check_plane,
    check_sizes,
    check_stack,
    spread,
)
from invdiff.operators.boundaries import BOUNDARIES, continue_, fold_, frame, place, shortened
from invdiff.operators.convolution import AT_ONCE, available, by_lanes, correlate, factors, fast_length
from invdiff.operators.kernels import is_volumetric, normalised, parse_kernel, remarks

_log = logging.getLogger("invdiff")
WIENER = 1e-2  # of |A|^2: regularisation of `pinv`


class Blur(Matched):
    """``y[i] = sum_d h[d] x[i - d]`` with d counted from the middle of h: images and results ``(..., *in_shape)``.

    A 2D kernel acts on each slice (``slicewise``, in_shape (channels, H, W)), a 3D kernel on the whole stack (in_shape
    (slices, channels, H, W)). Beyond its edges the image goes on "circular" (a b c | a b c), by "reflect"
    (c b a | a b c | c b a) or "replicate" (a a a | a b c | c c c), as "wrap", "reflect" and "nearest" of
    ``scipy.ndimage.convolve``; the adjoint is exact for each. A 3D kernel may be longer than the stack, which then goes
    on again and again.

    Args:
        shape: (H, W), or (slices, H, W) for a 3D kernel.
        kernel: array of as many axes as ``shape``, odd sides; scaled to sum 1 unless its sum is 0, of which a warning
            goes to the logger "invdiff" and into ``notes``.
        boundary: "circular", "reflect" or "replicate".
        channels: channels of an image.
        device: see :meth:`to`.
        name: of the kernel, for messages.

    Attributes:
        closed_form: :meth:`prox` and :attr:`norm` are exact, by one multiplication of spectra: the boundary is
            circular, or it is reflect and the kernel is mirror-symmetric along every axis (a Gaussian).

    Raises:
        UsageError: an unknown boundary, or a shape that does not fit the kernel's number of axes.
        InputError: a kernel that is larger than a slice or cannot be used, see :func:`kernels.normalised`.

    Source of the closed form under reflection: M. K. Ng, R. H. Chan and W.-C. Tang, SIAM J. Sci. Comput. 21 (1999)
    851-866.
    """

    pinv_kind = "wiener"

    def __init__(
        self,
        shape: tuple[int, ...],
        kernel: ArrayLike,
        boundary: str = "reflect",
        channels: int = 1,
        device: torch.device | str = "cpu",
        name: str = "the kernel",
    ):
        self._beyond = choose(boundary, BOUNDARIES, "boundary")
        self.boundary, self.channels, self._kernel = boundary, check_channels(channels), normalised(kernel, name)
        self.notes = remarks(self._kernel, name)
        for note in self.notes:
            _log.warning(note)
        if len(shape) != self._kernel.ndim:
            raise UsageError(
                f"a {self._kernel.ndim}D kernel blurs {'(H, W)' if self._kernel.ndim == 2 else '(slices, H, W)'}, "
                f"got the shape {tuple(shape)}"
            )
        self.shape = check_sizes(shape)
        if any(k > n for k, n in zip(self._kernel.shape[-2:], self.shape[-2:], strict=True)):
            sizes = [" x ".join(map(str, s)) for s in (self._kernel.shape, self.shape)]
            raise InputError(f"{name}, {sizes[0]}, is larger than the image, {sizes[1]}: use a smaller kernel")
        self.slicewise = len(shape) == 2
        in_shape = (*self.shape[:-2], channels, *self.shape[-2:])
        super().__init__(in_shape, in_shape, device)
        self._axes = (-2, -1) if self.slicewise else (-4, -2, -1)
        wrap = boundary == "circular"
        self._short = shortened(self._kernel, self.shape, boundary)
        self._reach = tuple(k // 2 for k in self._short.shape)
        self._radii = tuple(0 for _ in self._reach) if wrap else self._reach  # of the FFT, periodic by itself
        self._sizes = tuple(n if wrap else fast_length(n + 2 * r) for n, r in zip(self.shape, self._radii, strict=True))
        self._layout = self._axes, self.shape, self._radii, boundary
        flips = [self._kernel.flip(axis) for axis in range(self._kernel.ndim)]
        mirrored = all(bool((self._kernel - f).abs().max() <= 1e-9 * self._kernel.abs().max()) for f in flips)
        self.closed_form = wrap or (boundary == "reflect" and mirrored)

    def _arguments(self) -> tuple:
        return self.shape, self._kernel, self.boundary, self.channels

    @property
    def kernel(self) -> Tensor:
        """h, float64 on the CPU, of sum 1 or 0."""
        return self._kernel.clone()

    def _transfer(self, sizes: tuple[int, ...], offsets: tuple[int, ...]) -> Tensor:
        """Spectrum of h on a periodic grid, its middle at index ``-offsets``; shaped to multiply :meth:`_fft`."""
        h = self._short
        for axis, (size, offset, reach) in enumerate(zip(sizes, offsets, self._reach, strict=True)):
            index = (torch.arange(-reach, reach + 1) - offset) % size
            h = h.new_zeros(*h.shape[:axis], size, *h.shape[axis + 1 :]).index_add_(axis, index, h)
        return torch.fft.rfftn(h).unsqueeze(-3).to(self.device)

    @cached_property
    def _spectrum(self) -> Tensor:
        # The image is padded by the radii; shifted back by as much, the result begins at index 0.
        return self._transfer(self._sizes, self._radii)

    @cached_property
    def _power(self) -> Tensor:
        """Eigenvalues of A^T A (exact with ``closed_form``), for spectra of the periodic continuation of an image."""
        if self.boundary == "circular":
            return self._spectrum.abs().square()
        sizes = tuple(2 * n for n in self.shape)
        power = self._transfer(sizes, (0,) * len(sizes)).abs().square()
        for axis in self._axes[:-1]:  # real kernel: mirroring the other axes mirrors the last one, too
            power = (power + power.flip(axis).roll(1, axis)) / 2
        return power

    def _ifft(self, spectrum: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return torch.fft.irfftn(spectrum, s=sizes, dim=self._axes)

    def _fft(self, x: Tensor) -> Tensor:
        return torch.fft.rfftn(x, dim=self._axes)

    def _crop(self, x: Tensor, radii: tuple[int, ...] | None = None) -> Tensor:
        for axis, size, radius in zip(self._axes, self.shape, radii or (0,) * len(self.shape), strict=True):
            x = x.narrow(axis, 0, size + 2 * radius)
        return x

    @cached_property
    def _factors(self) -> tuple[Tensor, ...] | None:
        return factors(self._kernel) if self.slicewise else None

    def _direct(self, x: Tensor) -> Tensor:
        if self._factors is not None and available(x):
            flipped = [h.flip(0, 1) for h in self._factors]
            return by_lanes(
                lambda u: correlate(frame(u, self._reach, self.boundary), flipped), x, AT_ONCE[len(flipped)]
            )
        h, sizes, radii, layout = self._cast("_spectrum", x), self._sizes, self._radii, self._layout
        pad = lambda u: continue_(place(u, self._axes, sizes, radii), *layout)  # noqa: E731
        return one_by_one(lambda u: self._crop(self._ifft(self._fft(pad(u)) * h, sizes)), len(self.in_shape), x)

    def _transposed(self, y: Tensor) -> Tensor:
        if self._factors is not None and available(y):
            parts = self._factors
            return by_lanes(lambda u: self._spread_out(u, parts), y, AT_ONCE[len(parts)])
        h, sizes, layout = self._cast("_spectrum", y).conj(), self._sizes, self._layout
        nothing = tuple(0 for _ in self._radii)
        convolve = lambda u: self._ifft(self._fft(place(u, self._axes, sizes, nothing)) * h, sizes)  # noqa: E731
        return one_by_one(lambda u: fold_(self._crop(convolve(u), self._radii), *layout), len(self.in_shape), y)

    def _spread_out(self, u: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """A^T of planes ``(n, LANES, H, W)``; on a circle the turned kernel, without a fold."""
        if self.boundary == "circular":
            return correlate(frame(u, self._reach, self.boundary), parts)
        far, starts = [n + 4 * r for n, r in zip(self.shape, self._reach, strict=True)], [2 * r for r in self._reach]
        wide = correlate(place(u, self._axes, far, starts), parts)
        return fold_(wide, self._axes, self.shape, self._reach, self.boundary)

    def _divide(self, x: Tensor, weight: Tensor) -> Tensor:
        """``(P + weight)^-1 x`` with P of the eigenvalues ``_power``: A^T A itself with ``closed_form``."""
        power = self._cast("_power", x)
        circular = self.boundary == "circular"
        sizes = self.shape if circular else tuple(2 * n for n in self.shape)

        def solve(u: Tensor, w: Tensor) -> Tensor:
            for axis in () if circular else self._axes:
                u = torch.cat([u, u.flip(axis)], axis)
            return self._crop(self._ifft(self._fft(u) / (power + w), sizes))

        return one_by_one(solve, len(self.in_shape), x, weight)

    def prox(self, z: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
        """argmin_u 1/2 |A u - y|^2 + weight/2 |u - z|^2.

        Exact with ``closed_form``; otherwise by conjugate gradients, preconditioned by the closed form of a similar
        blur, to a relative residual of 1e-6 (float32) or 1e-10 (float64), at most 60 iterations.

        Args:
            z: ``(..., *in_shape)``.
            y: measurements, same shape.
            weight: positive; a number, or one per slice (per stack for a 3D kernel) with singleton axes.

        Raises:
            ShapeError: z or y of another shape.
        """
        _check("Blur", "images", z, self.in_shape)
        w = spread(weight, z, len(self.in_shape))
        rhs = self.adjoint(y) + w * z
        if self.closed_form:
            return self._divide(rhs, w)
        return cg(
            lambda u: self.normal(u) + w * u,
            rhs,
            z,
            iterations=60,
            tolerance=1e-6 if z.dtype == torch.float32 else 1e-10,
            precondition=lambda u: self._divide(u, w),
            dot=slice_dot if self.slicewise else total_dot,
        )

    @cached_property
    def _gain(self) -> float:
        return float(self._power.max())

    def pinv(self, y: Tensor) -> Tensor:
        """Regularised (Wiener) inverse ``argmin_u |A u - y|^2 + WIENER |h|^2 |u - y|^2``, |h| the gain of the kernel.

        Regularised towards y rather than 0, so that the mean stays and what the blur removed stays as blurred as it
        is; noise grows at most 5.05-fold, 1 / (2 sqrt(WIENER)) and less than one tenth.
        """
        return self.prox(y, y, WIENER * self._gain)

    @cached_property
    def norm(self) -> float:
        """Largest singular value: exact with ``closed_form``, else by Lanczos' method (relative accuracy 1e-3)."""
        if not self.closed_form:
            start = torch.ones(self.in_shape, device=self.device) if bool((self._kernel >= 0).all()) else self._probe()
            # Modes along the edges are a little above 1, everything smooth is close to 1: this takes long.
            return float(largest_eigenvalue(self.normal, start, iterations=200, tolerance=1e-6)) ** 0.5
        power = self._power
        if self.boundary == "reflect":  # the cosine transform has the frequencies 0 .. N - 1 of 2 N
            power = self._crop(power)
        return float(power.max()) ** 0.5

    @cached_property
    def mean_square(self) -> float:
        """trace(A^T A) / n, exactly: the sum of h[d] h[e] over pixels where the offsets d and e meet the same pixel."""
        met = self._kernel
        for axis, (size, count) in enumerate(zip(self.shape, self._kernel.shape, strict=True)):
            pixels = torch.arange(size)[:, None] - torch.arange(count) + count // 2
            index = self._beyond(pixels, size)
            same = torch.stack([(index == index[:, d : d + 1]).sum(0) for d in range(count)]).double() / size
            met = torch.tensordot(same, met, ([1], [axis])).movedim(0, axis)
        return float((met * self._kernel).sum())


def blur(shape, pixel_mm, *, kernel="gaussian:2", boundary="reflect", unit="px") -> Blur:
    """Blur of slices (H, W), or by a 3D kernel of a stack (slices, H, W).

    Args:
        shape: (H, W); (slices, H, W) for a 3D kernel.
        pixel_mm: pixel size in mm, or ([slice spacing,] row spacing, column spacing).
        kernel: ``gaussian:SIGMA``, ``gaussian3d:SIGMA`` (across slices as well), ``motion:LENGTH:ANGLE`` (degrees,
            counter-clockwise from the columns' direction), a file, or an array.
        boundary: "circular", "reflect" or "replicate".
        unit: of SIGMA and LENGTH, "px" or "mm".

    Raises:
        UsageError, InputError: options or a kernel that cannot be used.
    """
    stack = is_volumetric(kernel)
    if stack and len(shape) != 3:
        raise UsageError(f"the kernel has 3 axes and blurs the whole stack: give (slices, H, W), got {tuple(shape)}")
    shape, spacing = (check_stack if stack else check_plane)(shape, pixel_mm)
    h, notes = parse_kernel(kernel, spacing, unit)
    operator = Blur(shape, h, boundary, name=f"the kernel {kernel}" if isinstance(kernel, str) else "the kernel")
    operator.notes = notes
    return operator
