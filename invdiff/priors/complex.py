"""A prior of magnitude images on complex images."""

from dataclasses import replace

import torch
from torch import Tensor

from invdiff.linalg import to_complex, to_real
from invdiff.priors.base import Prior


def slow_phase(x: Tensor, blur: float = 4.0) -> Tensor:
    """Phase factor ``exp(i phi)`` of a smoothed complex image, complex ``(..., 1, H, W)``.

    Args:
        x: ``(..., 2, H, W)``, real and imaginary part.
        blur: standard deviation of the Gaussian, in pixels; circular.
    """
    rows, columns = (torch.fft.fftfreq(n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
    transfer = torch.exp(-2 * (torch.pi * blur) ** 2 * (rows[:, None] ** 2 + columns**2))
    z = torch.fft.ifft2(transfer * torch.fft.fft2(to_complex(x)))
    size = z.abs()
    return torch.where(size > 0, z / size.clamp_min(torch.finfo(x.dtype).tiny), torch.ones_like(z))


class PhaseCorrected(Prior):
    """A 1-channel prior of magnitudes, on complex images ``(..., 2, H, W)`` whose slow phase is known.

    The phase is taken off, the real part, which holds the magnitude from 0 to 2, goes through the prior in its range
    (from -1 to 1), and the imaginary part, what the slow phase leaves over, is shrunk as if it were Gaussian of
    standard deviation v = ``imaginary_std``: v^2 / (v^2 + sigma^2).

    Args:
        prior: of one channel.
        phase: ``exp(i phi)`` of every slice, complex ``(slices, 1, H, W)``; see :func:`slow_phase`.
        imaginary_std: in the prior's range.
    """

    def __init__(self, prior: Prior, phase: Tensor, imaginary_std: float = 0.05):
        self.prior, self.phase, self.imaginary_std = prior, phase, imaginary_std
        self.info, self.kind, self.chunk = replace(prior.info, channels=2), prior.kind, prior.chunk

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Calls of the network per slice."""
        return self.prior.calls

    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        """See :class:`Prior`; ``x`` is ``(..., slices, 2, H, W)``."""
        return self._corrected(x, sigma, lambda real: self.prior.denoise(real, sigma, context))

    def denoise_turned(self, x: Tensor, sigma: float, turn: int) -> Tensor:
        """See :class:`Prior`; slices turn with their phase taken off."""
        return self._corrected(x, sigma, lambda real: self.prior.denoise_turned(real, sigma, turn))

    def restrict(self, slices: slice) -> "PhaseCorrected":
        """The prior of those slices, with their phase."""
        return PhaseCorrected(self.prior.restrict(slices), self.phase[slices], self.imaginary_std)

    def _corrected(self, x: Tensor, sigma: float, denoise) -> Tensor:
        phase = self.phase.to(x.dtype.to_complex())
        flat = to_complex(x) * phase.conj()
        shrunk = flat.imag * (self.imaginary_std**2 / (self.imaginary_std**2 + sigma**2))
        return to_real(phase * torch.complex(denoise(flat.real - 1) + 1, shrunk))
