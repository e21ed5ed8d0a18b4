"""Noise models as values: how data are drawn, what they weigh, and how likely they are.

``sample`` works on arrays, with a NumPy generator, where measurements are simulated; ``debias``, ``variance`` and
``log_likelihood`` work on tensors, element by element, where problems are made and solved.
"""

import abc
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InputError, UsageError

TAIL = 9  # standard deviations of a normal distribution that count; beyond it 1e-19 is left


class Noise(abc.ABC):
    """The distribution of data y around ``clean``; final classes are frozen dataclasses."""

    model: ClassVar[str]

    @abc.abstractmethod
    def sample(self, clean: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Data drawn around ``clean``, same shape and dtype."""

    def debias(self, y: Tensor) -> Tensor:
        """Data whose mean is that of a linear measurement, for the data step; y itself where it is."""
        return y

    @abc.abstractmethod
    def variance(self, y: Tensor) -> Tensor:
        """Variance of ``debias(y)``, estimated from y alone: its inverse weighs the data step. Broadcasts to y."""

    @abc.abstractmethod
    def log_likelihood(self, y: Tensor, clean: Tensor) -> Tensor:
        """log p(y | clean) of each element of y as it was measured, natural logarithm, differentiable in ``clean``."""

    def describe(self) -> dict[str, Any]:
        """/noise of a measurement; :func:`noise_model` reads it."""
        return {"model": self.model, **asdict(self)}  # type: ignore[call-overload]


def _positive(what: str, *values: float) -> None:
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"noise: {what} must be positive and finite, got {value}")


@dataclass(frozen=True)
class Gaussian(Noise):
    """y = clean + std n.

    Args:
        std: standard deviation, in the units of y.
    """

    std: float

    model = "gaussian"

    def __post_init__(self):
        _positive("std", self.std)

    def sample(self, clean, generator):
        return clean + (self.std * generator.standard_normal(clean.shape)).astype(clean.dtype)

    def variance(self, y):
        return y.new_tensor(self.std**2)

    def log_likelihood(self, y, clean):
        return -((y - clean) ** 2) / (2 * self.std**2) - math.log(self.std * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class Poisson(Noise):
    """Counts of an image: ``(y - zero) / gain ~ Poisson((clean - zero) / gain)``, gain = (full - zero) / peak.

    Args:
        peak: mean counts where the image is ``full``.
        full: value of the image that gives ``peak`` counts.
        zero: value of the image that gives none; what lies below gives none either.
    """

    peak: float
    full: float
    zero: float = 0.0

    model = "poisson"

    def __post_init__(self):
        _positive("peak counts", self.peak)
        _positive("full - zero", self.full - self.zero)

    @property
    def gain(self) -> float:
        """Units of the image per count."""
        return (self.full - self.zero) / self.peak

    def sample(self, clean, generator):
        mean = np.maximum((clean.astype(np.float64) - self.zero) / self.gain, 0)
        return (self.zero + self.gain * generator.poisson(mean)).astype(clean.dtype)

    def variance(self, y):
        """``gain^2`` times the counts, at least one and a hundredth of ``peak``: weights that span more than that leave
        the data steps of solvers unconverged, and what they say of empty pixels is little.
        """
        return self.gain**2 * ((y - self.zero) / self.gain).clamp_min(max(1.0, 0.01 * self.peak))

    def log_likelihood(self, y, clean):
        """Of the counts, a probability: ``k log m - m - log k!``, m the mean counts."""
        k, m = ((y - self.zero) / self.gain).round(), ((clean - self.zero) / self.gain).clamp_min(0)
        return torch.xlogy(k, m) - m - torch.lgamma(k + 1)


@dataclass(frozen=True)
class BeerLambert(Noise):
    """Line integrals from photon counts: ``I ~ Poisson(I0 exp(-clean)) + N(0, s_e^2)``, ``y = ln(I0 / I)``.

    Args:
        photons: I0 per ray, without object.
        electronic_counts: s_e, standard deviation of the electronic noise, in counts.
    """

    photons: float
    electronic_counts: float = 0.0

    model = "poisson"

    def __post_init__(self):
        _positive("photons", self.photons)
        if not 0 <= self.electronic_counts < math.inf:
            raise UsageError(f"noise: electronic_counts must be finite, 0 or larger, got {self.electronic_counts}")

    def counts(self, clean: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Detector counts, double precision, of noise-free line integrals."""
        mean = self.photons * np.exp(-clean.astype(np.float64))
        return generator.poisson(mean) + self.electronic_counts * generator.standard_normal(mean.shape)

    def logarithm(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Line integrals and their variance, both float32. Counts below one are set to one: next to no weight."""
        safe = np.maximum(counts, 1.0)
        return np.log(self.photons / safe).astype(np.float32), self._variance(safe).astype(np.float32)

    def _variance(self, counts):
        """To first order ``(I + s_e^2) / I^2``."""
        return (counts + self.electronic_counts**2) / counts**2

    def sample(self, clean, generator):
        return self.logarithm(self.counts(clean, generator))[0].astype(clean.dtype)

    def variance(self, y):
        return self._variance(self.photons * torch.exp(-y))

    def log_likelihood(self, y, clean):
        """Of the counts I: their density with electronic noise, ``sum_k Poisson(k) N(I - k; s_e^2)`` over every k
        within ``TAIL`` s_e of I; their probability without."""
        counts, mean = self.photons * torch.exp(-y), self.photons * torch.exp(-clean)
        s = self.electronic_counts
        if s == 0:
            k = counts.round()
            return torch.xlogy(k, mean) - mean - torch.lgamma(k + 1)
        reach = math.ceil(TAIL * s)
        k = counts.round()[..., None] + torch.arange(-reach, reach + 1, dtype=y.dtype, device=y.device)
        poisson = torch.xlogy(k, mean[..., None]) - mean[..., None] - torch.lgamma(k.clamp_min(0) + 1)
        normal = -((counts[..., None] - k) ** 2) / (2 * s**2) - math.log(s * math.sqrt(2 * math.pi))
        return torch.logsumexp(torch.where(k >= 0, poisson + normal, -torch.inf), -1)


@dataclass(frozen=True)
class Rician(Noise):
    """Magnitude of a complex image with noise: ``y = |clean + std (n1 + i n2)|``.

    The data step uses ``sqrt(max(y^2 - std^2, 0))``, whose mean is that of the signal but for the third order of
    std / signal (Gudbjartsson & Patz 1995), with the exact variance of a magnitude of that signal-to-noise ratio t,
    ``std^2 (2 + t^2 - pi/8 exp(-t^2/2) ((2 + t^2) I0(t^2/4) + t^2 I1(t^2/4))^2)`` (Koay & Basser 2006, equation 18).
    The ratio is that of y, the only one known: squared residuals exceed the variance by 4 % at t = 6, 14 % at 4, and
    at most 60 % (t = 2); in air by 50 %, since a magnitude stays positive. That of the corrected value gives 80 %.

    Args:
        std: standard deviation of the real and of the imaginary part, in the units of y.
    """

    std: float

    model = "rician"

    def __post_init__(self):
        _positive("std", self.std)

    def sample(self, clean, generator):
        real, imaginary = (self.std * generator.standard_normal(clean.shape) for _ in range(2))
        return np.hypot(clean + real, imaginary).astype(clean.dtype)

    def debias(self, y):
        return (y**2 - self.std**2).clamp_min(0).sqrt()

    def variance(self, y):
        return self.std**2 * koay_basser(y / self.std)

    def log_likelihood(self, y, clean):
        """``log(y / s^2) - (y^2 + a^2) / (2 s^2) + log I0(a y / s^2)`` with ``log I0(z) = log(e^-z I0(z)) + z``."""
        square, clean = self.std**2, clean.abs()
        bessel = torch.special.i0e(clean * y / square).log()
        return torch.log(y / square) - (y - clean) ** 2 / (2 * square) + bessel


def koay_basser(t: Tensor) -> Tensor:
    """Variance of a Rician magnitude in units of std^2, from its signal-to-noise ratio t: 2 - pi / 2 at 0, 1 above.

    Beyond t = 10 the closed form cancels (in float32) and its series ``1 - 1/(2 t^2) - 1/(2 t^4)`` is exact to 2e-6.
    """
    half = t.clamp_max(10.0) ** 2
    factor = (2 + half) * torch.special.i0e(half / 4) + half * torch.special.i1e(half / 4)
    far = t.clamp_min(10.0) ** -2
    return torch.where(t < 10, 2 + half - math.pi / 8 * factor**2, 1 - far / 2 - far**2 / 2)


#: Noise of images by name, as on the command line.
NOISES: dict[str, type[Noise]] = {"gaussian": Gaussian, "rician": Rician, "poisson": Poisson}


def noise_model(described: dict[str, Any]) -> Noise:
    """The model that /noise of a measurement names, from its parameters there.

    "poisson" is that of CT where ``photons`` are given; "complex-gaussian" with one ``std`` for real and imaginary
    parts is that of every number by itself.

    Raises:
        InputError: no such model, or its level is missing.
    """
    models: dict[str, type[Noise]] = {"gaussian": Gaussian, "complex-gaussian": Gaussian, "rician": Rician}
    models["poisson"] = BeerLambert if "photons" in described else Poisson
    try:
        kind = models[described["model"]]
        names = [f.name for f in fields(kind) if f.name in described]  # type: ignore[arg-type]
        return kind(**{name: float(described[name]) for name in names})
    except (KeyError, TypeError, ValueError):  # TypeError: a level is missing
        raise InputError(
            "the measurement has neither weights nor a noise level: store /weights, or photons or std"
        ) from None
