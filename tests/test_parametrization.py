"""Every convention of networks against the exact Gaussian denoiser: a network that is written in the convention's own
definition (what it predicts of z = alpha x0 + s n, labelled in its own way) gives the same ``denoise``."""

import math

import numpy as np
import pytest
import torch

from invdiff.errors import PriorError
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.parametrization import BETAS, PREDICTIONS, PROCESSES, Convention, Parametrized

SHAPE = (1, 2, 3)


def published_betas(name: str, n: int, first: float, last: float) -> np.ndarray:
    """Tables as their papers and the diffusers documentation state them."""
    if name == "linear":
        return np.linspace(first, last, n)
    if name == "scaled-linear":
        return np.linspace(first**0.5, last**0.5, n) ** 2
    if name == "sigmoid":
        return first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, n)))
    bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


def of_table(name: str, n: int = 1000, first: float = 1e-4, last: float = 0.02, scale: float = 1.0):
    """(alpha, s) of a label that is ``scale`` times the index in a table."""
    bar = np.cumprod(1 - published_betas(name, n, first, last))
    log_sigma = np.log((1 - bar) / bar) / 2

    def there(label: float) -> tuple[float, float]:
        sigma = math.exp(np.interp(label / scale, np.arange(n), log_sigma))
        return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)

    return there


def of_linear_time(label: float, first: float = 0.1, last: float = 20.0) -> tuple[float, float]:
    t = label / 999
    alpha = math.exp(-(t**2) * (last - first) / 4 - t * first / 2)
    return alpha, math.sqrt(1 - alpha**2)


def of_linear_time_below(label: float) -> tuple[float, float]:
    """Sub-VP: the noise is the variance of VP (Song et al. 2021, equation 29)."""
    alpha, deviation = of_linear_time(label)
    return alpha, deviation**2


def of_cosine_time(t: float) -> tuple[float, float]:
    alpha = math.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    return alpha, math.sqrt(1 - alpha**2)


def of_edm(label: float) -> tuple[float, float]:
    sigma = math.exp(4 * label)
    total = math.sqrt(sigma**2 + 0.6**2)
    return 1 / total, sigma / total


VP = {"process": "vp-linear", "beta_first": 0.1, "beta_last": 20.0, "label_scale": 999.0}
VE = {"process": "ve", "sigma_min": 0.01, "sigma_max": 378.0}
CASES = {
    "DDPM": (Convention(), of_table("linear")),
    "DDPM in [0, 1]": (Convention(network_range=(0, 1)), of_table("linear")),
    "DDPM of 4000 steps, rescaled": (
        Convention(steps=4000, beta_first=2.5e-5, beta_last=0.005, label_scale=0.25),
        of_table("linear", 4000, 2.5e-5, 0.005, 0.25),
    ),
    "cosine table": (Convention(betas="cosine"), of_table("cosine")),
    "sigmoid table": (Convention(betas="sigmoid"), of_table("sigmoid")),
    "scaled linear, v": (
        Convention(predicts="v", betas="scaled-linear", beta_first=8.5e-4, beta_last=0.012),
        of_table("scaled-linear", first=8.5e-4, last=0.012),
    ),
    "table of numbers, x0": (
        Convention(predicts="x0", betas=tuple(published_betas("linear", 50, 1e-3, 0.3).tolist())),
        of_table("linear", 50, 1e-3, 0.3),
    ),
    "score_sde VP": (Convention(**VP), of_linear_time),
    "score_sde VP, score": (Convention(**VP, predicts="score"), of_linear_time),
    "score_sde sub-VP": (Convention(**(VP | {"process": "subvp-linear"})), of_linear_time_below),
    "continuous cosine, v": (Convention(predicts="v", process="vp-cosine"), of_cosine_time),
    "score_sde VE": (Convention(**VE, predicts="score", label="sigma"), lambda label: (1.0, label)),
    "score_sde VE by index": (
        Convention(**VE, predicts="score", label_scale=-1999.0, label_offset=1999.0),
        lambda label: (1.0, 0.01 * 37800 ** (1 - label / 1999)),
    ),
    "EDM's VE, range [0, 1] of [-1, 2]": (
        Convention(
            "minus-eps", "ve", "ln-sigma", label_offset=math.log(0.5), network_range=(0, 1), prior_range=(-1, 2)
        ),
        lambda label: (1.0, 2 * math.exp(label)),
    ),
    "EDM": (Convention("edm", "edm", "ln-sigma", 0.25, sigma_data=0.6), of_edm),
    "denoiser": (Convention("x0", "ve", "sigma", network_range=(0, 1)), lambda label: (1.0, label)),
    "flow": (Convention("velocity", "flow", label_scale=1000.0), lambda label: (1 - label / 1000, label / 1000)),
    "rectified flow": (
        Convention("velocity-to-data", "flow-to-data", label_scale=999.0),
        lambda label: (label / 999, 1 - label / 999),
    ),
}


def predicted(what: str, alpha: float, s: float, z, x0, noise):
    """What the network is asked for, by definition; ``x0`` and ``noise`` are the posterior means given z."""
    if what == "edm":
        sigma, d = s / alpha, 0.6
        return (x0 - d**2 / (sigma**2 + d**2) * z / alpha) * math.sqrt(sigma**2 + d**2) / (sigma * d)
    return {
        "eps": noise,
        "minus-eps": -noise,
        "x0": x0,
        "v": alpha * noise - s * x0,
        "score": -noise / s,
        "velocity": noise - x0,
        "velocity-to-data": x0 - noise,
    }[what]


def gaussian(low: float, high: float, convention: Convention) -> GaussianPrior:
    """N(m, C) given in the prior's range, carried over to where [prior_range] lies at [low, high]."""
    (c, d), gen = convention.prior_range, torch.Generator().manual_seed(1)
    gain = (high - low) / (d - c)
    mean = torch.randn(SHAPE, generator=gen, dtype=torch.float64)
    root = torch.randn(6, 6, generator=gen, dtype=torch.float64) / 3
    return GaussianPrior(gain * (mean - c) + low, gain**2 * root @ root.T)


class Exact(torch.nn.Module):
    """The ideal network of a convention, with two channels of learned variance behind its prediction."""

    def __init__(self, convention: Convention, of_label):
        super().__init__()
        self.convention, self.of_label = convention, of_label
        self.prior = gaussian(*convention.network_range, convention)

    def forward(self, z, label):
        outs = []
        for image, value in zip(z, label.tolist(), strict=True):
            alpha, s = self.of_label(value)
            x0 = self.prior.denoise(image / alpha, s / alpha)
            outs.append(predicted(self.convention.predicts, alpha, s, image, x0, (image - alpha * x0) / s))
        return torch.cat([torch.stack(outs), torch.full_like(z, 7.0)], 1)


@pytest.mark.parametrize("name", CASES)
def test_an_exact_network_in_this_convention_is_the_exact_denoiser(name):
    convention, of_label = CASES[name]
    prior = gaussian(*convention.prior_range, convention)
    net = Parametrized(Exact(convention, of_label), convention, channels=1)
    low, high = (s / convention.gain for s in convention.sigma_range)
    sigmas = torch.tensor(np.geomspace(low * 1.0001, high / 1.0001, 9))
    noise = torch.randn(9, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = prior.mean + sigmas.view(-1, 1, 1, 1) * noise
    exact = torch.stack([prior.denoise(a, float(s)) for a, s in zip(x, sigmas, strict=True)])
    assert torch.allclose(net(x, sigmas), exact, rtol=0, atol=1e-6)


def test_every_name_of_the_tables_has_a_case():
    found = [c for c, _ in CASES.values()]
    assert {c.predicts for c in found} == set(PREDICTIONS) and {c.process for c in found} == set(PROCESSES)
    assert {c.betas for c in found if isinstance(c.betas, str)} == set(BETAS)


def test_labels_of_a_table_are_its_indices_and_return():
    convention = Convention()
    for index in (0, 9, 99, 499, 999):
        assert convention.time(convention.table[index]) == pytest.approx(index, abs=1e-9)
    # Worked out with the published table (Ho et al. 2020): sigma at index 0, 9, 99, 499 and 999.
    published = (0.0100, 0.0436, 0.339, 3.424, 157.4)
    assert [convention.table[i] for i in (0, 9, 99, 499, 999)] == pytest.approx(published, rel=2e-3)
    middle = math.sqrt(convention.table[40] * convention.table[41])
    assert convention.time(middle) == pytest.approx(40.5)


def test_noise_levels_outside_the_training_are_brought_to_its_ends():
    convention = Convention()
    assert convention.coefficients(1e-6)[1] == pytest.approx(0) and convention.coefficients(1e6)[1] == pytest.approx(
        999
    )


def test_half_precision_stays_inside_the_network():
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, z, label):
            seen.extend((z.dtype, label.dtype))
            return z * 0

    x = torch.randn(1, 1, 4, 4)
    out = Parametrized(Net(), Convention(), 1)(x, torch.tensor([0.3]))
    assert seen == [torch.bfloat16, torch.float32] and torch.equal(out, x)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"predicts": "noise"}, "unknown predicts 'noise'.*eps"),
        ({"process": "vp"}, "vp-table"),
        ({"label": "t"}, "ln-sigma"),
        ({"betas": "square"}, "scaled-linear"),
        ({"betas": [0.1, 2.0]}, "between 0 and 1"),
        ({"predicts": "velocity"}, "needs process flow"),
        ({"network_range": [1, 1]}, "LOW,HIGH"),
        ({"steps": 10**9}, "100000"),
        ({"steps": "many"}, "convention"),
        ({"sigma_min": 90.0, "process": "ve"}, "sigma_max"),
        ({"speed": 1}, "speed"),
    ],
)
def test_settings_that_make_no_convention_are_refused_by_name(settings, words):
    with pytest.raises(PriorError, match=words):
        Convention.from_dict(settings)
