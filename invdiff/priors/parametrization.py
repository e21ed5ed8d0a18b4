"""From the convention of a network to ``denoise(x, sigma)``: the one place where parametrisations are converted.

Whatever a network f predicts, the denoiser is linear in its output (Karras et al. 2022, equation 7):

    D(x; sigma) = c_skip x + c_out f(c_in x; label),    x = x0 + sigma n,

so that a convention is four functions of sigma: c_in and the label from the noise process, c_skip and c_out from what
is predicted. Processes add noise as z = s (x0 + sigma n), c_in = s.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.errors import PriorError, UsageError
from invdiff.schedule import COSINE_OFFSET, cosine_sigma, cosine_time, table_sigmas, vp_sigma, vp_time


def _linear(n: int, first: float, last: float) -> list[float]:
    return [first + (last - first) * k / max(n - 1, 1) for k in range(n)]


def _cosine_betas(n: int, first: float, last: float) -> list[float]:
    """Nichol and Dhariwal 2021, equation 17 and after it: beta_i = 1 - f((i + 1) / n) / f(i / n), at most 0.999."""
    f = [math.cos((k / n + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2 for k in range(n + 1)]
    return [min(1 - f[k + 1] / f[k], 0.999) for k in range(n)]


BETAS: dict[str, Callable[[int, float, float], list[float]]] = {
    "linear": _linear,
    "scaled-linear": lambda n, first, last: [b**2 for b in _linear(n, first**0.5, last**0.5)],
    "cosine": _cosine_betas,
    "sigmoid": lambda n, first, last: [first + (last - first) / (1 + math.exp(-b)) for b in _linear(n, -6.0, 6.0)],
}

# c_skip and c_out of (sigma, s = c_in, sigma_data), by what the network predicts; s sigma is the noise in z.
PREDICTIONS: dict[str, Callable[[float, float, float], tuple[float, float]]] = {
    "eps": lambda g, s, d: (1.0, -g),  # the noise n
    "minus-eps": lambda g, s, d: (1.0, g),  # the score of x times sigma
    "x0": lambda g, s, d: (0.0, 1.0),
    "v": lambda g, s, d: (1 / (1 + g * g), -g / (s * (1 + g * g))),  # s n - s sigma x0
    "score": lambda g, s, d: (1.0, s * g * g),  # of the density of z
    "velocity": lambda g, s, d: (s, -s * g),  # n - x0
    "velocity-to-data": lambda g, s, d: (s, s * g),  # x0 - n
    "edm": lambda g, s, d: (d * d / (g * g + d * d), g * d / math.hypot(g, d)),
}
PROCESSES = {
    "vp-table": "s = 1 / sqrt(1 + sigma^2), sigma from a table of betas; time is the index in it, interpolated",
    "vp-linear": "s = 1 / sqrt(1 + sigma^2), continuous linear betas; time from 0 to 1",
    "subvp-linear": "s = the solution of sigma = 1 / s - s, continuous linear betas; time from 0 to 1",
    "vp-cosine": "s = 1 / sqrt(1 + sigma^2), continuous cosine; time from 0 to 1",
    "ve": "s = 1; time from 0 to 1 in ln sigma",
    "edm": "s = 1 / sqrt(sigma^2 + sigma_data^2); time is ln sigma",
    "flow": "z = (1 - t) x0 + t n, s = 1 / (1 + sigma); time is t",
    "flow-to-data": "z = t x0 + (1 - t) n, s = 1 / (1 + sigma); time is t",
}
LABELS: dict[str, Callable[[float, float], float]] = {
    "time": lambda sigma, time: time,
    "sigma": lambda sigma, time: sigma,
    "ln-sigma": lambda sigma, time: math.log(sigma),
}
_NEEDS = {"velocity": ("flow", "flow-to-data"), "velocity-to-data": ("flow", "flow-to-data"), "edm": ("edm",)}


@dataclass(frozen=True)
class Convention:
    """How a network was trained to see noise; JSON-safe. The defaults are those of DDPM.

    Args:
        predicts: name in ``PREDICTIONS``.
        process: name in ``PROCESSES``.
        label: name in ``LABELS``; the network gets ``label_scale * label + label_offset``.
        label_scale, label_offset: e.g. 999 and 0, or 1/4 and 0 for EDM.
        betas: name in ``BETAS``, or the table itself.
        steps: length of the table.
        beta_first, beta_last: of the table; per unit of time for ``vp-linear`` (0.1 and 20).
        sigma_min, sigma_max: noise levels in the network's units; None for those of the process.
        sigma_data: of ``edm``.
        network_range, prior_range: values that the network sees, and the same ones in the range of solvers.

    Raises:
        PriorError: an unknown name, or numbers that make no convention.
    """

    predicts: str = "eps"
    process: str = "vp-table"
    label: str = "time"
    label_scale: float = 1.0
    label_offset: float = 0.0
    betas: str | tuple[float, ...] = "linear"
    steps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 0.02
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float = 0.5
    network_range: tuple[float, float] = (-1.0, 1.0)
    prior_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self):
        for name, table in (("predicts", PREDICTIONS), ("process", PROCESSES), ("label", LABELS)):
            if getattr(self, name) not in table:
                raise PriorError(
                    f"unknown {name} '{getattr(self, name)}' of a network: choose one of {', '.join(table)}"
                )
        if self.process not in _NEEDS.get(self.predicts, (self.process,)):
            raise PriorError(f"a network that predicts '{self.predicts}' needs process {_NEEDS[self.predicts][0]}")
        if isinstance(self.betas, str) and self.betas not in BETAS:
            raise PriorError(f"unknown betas '{self.betas}': give the table, or one of {', '.join(BETAS)}")
        (a, b), (c, d) = self.network_range, self.prior_range
        if not (a < b and c < d and all(map(math.isfinite, (a, b, c, d, self.label_scale, self.label_offset)))):
            raise PriorError(f"ranges {self.network_range} and {self.prior_range} make no map; give LOW,HIGH each")
        if not (1 < self.steps <= 100_000 and self.sigma_data > 0):
            raise PriorError(f"{self.steps} steps or sigma_data {self.sigma_data}: give 2 to 100000, and more than 0")
        low, high = self.sigma_range
        if not 0 < low < high < math.inf:
            raise PriorError(f"noise levels from {low} to {high} make no prior; give sigma_min and sigma_max")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Convention":
        """From JSON; lists become tuples.

        Raises:
            PriorError: a name that is none of the fields, or as above.
        """
        if foreign := set(settings) - {f.name for f in fields(cls)}:
            raise PriorError(f"unknown settings {sorted(foreign)[:5]} of a network's convention; remove them")
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
            return cls(**values)
        except (TypeError, ValueError, UsageError) as error:
            if isinstance(error, PriorError):
                raise
            raise PriorError(f"a network's convention cannot be used ({error}); correct config.json") from None

    @property
    def table(self) -> list[float]:
        """Increasing sigmas of the table of betas."""
        return list(_table(self.betas, self.steps, self.beta_first, self.beta_last))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest noise level that the network knows, in its units."""
        low, high = 0.002, 80.0
        if self.process == "vp-table":
            low, high = self.table[0], self.table[-1]
        elif self.process == "vp-linear":
            low, high = (vp_sigma(t, self.beta_first, self.beta_last) for t in (1e-3, 1.0))
        elif self.process == "subvp-linear":
            low, high = (
                g * g / math.hypot(1, g) for t in (1e-3, 1.0) for g in [vp_sigma(t, self.beta_first, self.beta_last)]
            )
        elif self.process == "vp-cosine":
            low, high = cosine_sigma(1e-3), cosine_sigma(0.995)
        elif self.process in ("flow", "flow-to-data"):
            low, high = 1e-3 / 0.999, 0.999 / 1e-3
        return self.sigma_min or low, self.sigma_max or high

    @property
    def gain(self) -> float:
        """Network units per unit of the prior's range."""
        (a, b), (c, d) = self.network_range, self.prior_range
        return (b - a) / (d - c)

    def time(self, sigma: float) -> float:
        """Time of a noise level in network units, as its process counts it; see ``PROCESSES``."""
        if self.process == "vp-table":
            return _interpolate(self.table, sigma)
        if self.process == "vp-linear":
            return vp_time(sigma, self.beta_first, self.beta_last)
        if self.process == "subvp-linear":
            return vp_time(math.sqrt(sigma / self.scale(sigma)), self.beta_first, self.beta_last)
        if self.process == "vp-cosine":
            return cosine_time(sigma)
        if self.process == "ve":
            low, high = self.sigma_range
            return math.log(sigma / low) / math.log(high / low)
        ends = {"edm": math.log(sigma), "flow": sigma / (1 + sigma), "flow-to-data": 1 / (1 + sigma)}
        return ends[self.process]

    def scale(self, sigma: float) -> float:
        """s = c_in: what clean image and noise are multiplied by before the network."""
        if self.process.startswith("vp"):
            return 1 / math.hypot(1, sigma)
        if self.process == "edm":
            return 1 / math.hypot(sigma, self.sigma_data)
        if self.process == "subvp-linear":
            return 2 / (sigma + math.hypot(sigma, 2))
        return 1.0 if self.process == "ve" else 1 / (1 + sigma)

    def coefficients(self, sigma: float) -> tuple[float, float, float, float]:
        """c_in, label, c_skip and c_out at a noise level in network units, which is brought into ``sigma_range``."""
        low, high = self.sigma_range
        sigma = min(max(sigma, low), high)
        label = self.label_scale * LABELS[self.label](sigma, self.time(sigma)) + self.label_offset
        return self.scale(sigma), label, *PREDICTIONS[self.predicts](sigma, self.scale(sigma), self.sigma_data)


@lru_cache(maxsize=16)
def _table(betas: str | tuple[float, ...], steps: int, first: float, last: float) -> tuple[float, ...]:
    return tuple(table_sigmas(BETAS[betas](steps, first, last) if isinstance(betas, str) else betas))


def _interpolate(table: list[float], sigma: float) -> float:
    """Index of sigma, linear in ln sigma between entries."""
    k = min(max(bisect.bisect_right(table, sigma) - 1, 0), len(table) - 2)
    return k + math.log(sigma / table[k]) / math.log(table[k + 1] / table[k])


class Parametrized(nn.Module):
    """A network of any convention as a denoiser in the prior's range.

    The first ``channels`` channels of its output count; a learned variance behind them is left out.

    Args:
        net: ``f(z, label)``, z ``(batch, channels, H, W)`` in its own precision, label ``(batch,)`` in float32.
        convention: what it predicts, of what.
        channels: image channels.
        stride: image sides must be multiples of this many pixels.
    """

    def __init__(self, net: nn.Module, convention: Convention, channels: int, stride: int = 1):
        super().__init__()
        self.net, self.convention, self.channels, self.stride = net, convention, channels, stride

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise ``x`` ``(batch, C, H, W)`` at noise levels ``sigma`` ``(batch,)``, both in the prior's range."""
        c, gain = self.convention, self.convention.gain
        shift = c.network_range[0] - gain * c.prior_range[0]
        rows = zip(*(c.coefficients(gain * level) for level in sigma.tolist()), strict=True)
        c_in, label, skip, out = (torch.tensor(row, dtype=torch.float64) for row in rows)
        c_in, skip, out = (v.to(x).view(-1, 1, 1, 1) for v in (c_in, skip, out))
        precision = next((p.dtype for p in self.net.parameters()), x.dtype)
        u = gain * x + shift
        label = label.to(x.device, torch.promote_types(precision, torch.float32))
        f = self.net((c_in * u).to(precision), label)[:, : self.channels].to(x.dtype)
        return (skip * u + out * f - shift) / gain
