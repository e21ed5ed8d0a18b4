"""EDM's networks, also PFGM++'s and InverseBench's: names, preconditioning, and files in the layout of the originals up
to a reconstruction."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign_networks import over_rms, passing
from safetensors.torch import save_file

from invdiff.errors import PriorError
from invdiff.priors import load_prior
from invdiff.priors.build import build_prior
from invdiff.priors.edm import EDMConfig, build
from invdiff.priors.edm_files import convention, network, recognise
from invdiff.priors.flags import parse_flags
from invdiff.priors.foreign import ImportOptions, import_prior, open_foreign
from invdiff.priors.parametrization import Convention

SONG = {"noise": 2, "fourier": True, "taps": 4, "encoder": "residual"}
# The configurations of EDM's training script (ddpmpp, ncsnpp, adm) for its data sets, and InverseBench's for MRI.
PUBLISHED = {
    "cifar10 ddpmpp": EDMConfig("SongUNet", 32, 3, 3, 128, 4, (2, 2, 2), (1,), augmented=9),
    "ffhq ncsnpp": EDMConfig("SongUNet", 64, 3, 3, 128, 4, (1, 2, 2, 2), (2,), **SONG, augmented=9),
    "imagenet adm": EDMConfig("DhariwalUNet", 64, 3, 3, 192, 3, (1, 2, 3, 4), (1, 2, 3), classes=1000, label=0),
    "imagenet adm of iddpm": EDMConfig(
        "DhariwalUNet", 64, 3, 6, 192, 3, (1, 2, 3, 4), (1, 2, 3), classes=1000, label=0
    ),
    "InverseBench MRI": EDMConfig("DhariwalUNet", 320, 2, 2, 128, 1, (1, 1, 1, 2, 2), ()),
    "skips": EDMConfig("SongUNet", 20, 1, 1, 16, 2, (1, 2, 3), (0, 2), taps=4, encoder="skip", skip_decoder=True),
}
SMALL = EDMConfig("SongUNet", 16, 1, 1, 16, 1, (1, 2), (), **SONG)


def empty(config: EDMConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return build(config)


def shapes(config: EDMConfig) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in empty(config).state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_are_recognised_by_their_weights(name):
    assert recognise(shapes(PUBLISHED[name])) == PUBLISHED[name]


def test_names_of_the_residual_and_skipped_images():
    """As SongUNet of the original numbers them, with a side that is no power of two."""
    found = {k for k in shapes(PUBLISHED["skips"]) if "aux" in k}
    ends = {"enc": ("10x10_aux_down.resample_filter", "5x5_aux_down.resample_filter"), "dec": ()}
    ends["dec"] += tuple(f"{s}_aux_up.resample_filter" for s in ("10x10", "20x20"))
    plain = {f"{side}.{name}" for side in ends for name in ends[side]}
    plain |= {f"enc.{s}_aux_skip.{p}" for s in ("10x10", "5x5") for p in ("weight", "bias")}
    plain |= {
        f"dec.{s}_aux_{n}.{p}" for s in ("20x20", "10x10", "5x5") for n in ("norm", "conv") for p in ("weight", "bias")
    }
    assert found == plain


# c_skip, c_out, c_in, c_noise of sigma, as in table 1 of the paper.
TABLE = {
    "edm": lambda s: (
        0.25 / (s**2 + 0.25),
        s * 0.5 / math.sqrt(s**2 + 0.25),
        1 / math.sqrt(s**2 + 0.25),
        math.log(s) / 4,
    ),
    "vp": lambda s: (1, -s, 1 / math.sqrt(1 + s**2), 999 * (math.sqrt(0.01 + 39.8 * math.log(1 + s**2)) - 0.1) / 19.9),
    "ve": lambda s: (1, s, 1, math.log(s / 2)),
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("sigma", [0.03, 1.0, 40.0])
def test_preconditioning_is_that_of_the_paper(name, sigma):
    c = Convention.from_dict(convention(SMALL, {"precond": name}))
    c_in, label, skip, out = c.coefficients(sigma)
    assert (skip, out, c_in, label) == pytest.approx(TABLE[name](sigma), rel=1e-9)
    assert convention(SMALL, {"class_name": f"training.networks.{name.upper()}Precond"}) == convention(
        SMALL, {"precond": name}
    )


def test_preconditioning_of_the_improved_ddpm():
    """u_0 > ... > u_{M-1} of the paper's table 1, counted backwards as labels."""
    config, steps = replace(SMALL, out_channels=2), 40
    for offset in (0.008, 0.02):
        bar = np.sin(np.pi / 2 * np.arange(steps + 1) / steps / (offset + 1)) ** 2
        u = np.zeros(steps + 1)
        for j in range(steps, 0, -1):
            u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1)
        c = Convention.from_dict(convention(config, {"precond": "iddpm", "M": steps, "C_2": offset}))
        for j in (0, 7, steps - 1):
            c_in, label, skip, out = c.coefficients(u[j])
            assert (skip, out, c_in) == pytest.approx((1, -u[j], 1 / np.hypot(1, u[j])), rel=1e-7)
            assert label == pytest.approx(steps - 1 - j, abs=1e-5)


def test_training_options_of_the_original_are_read():
    text = json.dumps(
        {
            "dataset_kwargs": {"class_name": "training.dataset.ImageFolderDataset", "resolution": 16},
            "network_kwargs": {
                "class_name": "training.networks.VEPrecond",
                "model_type": "SongUNet",
                "embedding_type": "fourier",
                "encoder_type": "residual",
                "decoder_type": "standard",
                "channel_mult_noise": 2,
                "resample_filter": [1, 3, 3, 1],
                "model_channels": 16,
                "channel_mult": [1, 2],
                "augment_dim": 0,
                "dropout": 0.13,
            },
            "loss_kwargs": {"class_name": "training.loss.VELoss"},
            "optimizer_kwargs": {"class_name": "torch.optim.Adam", "lr": 0.001},
            "augment_kwargs": {"class_name": "training.augment.AugmentPipe", "p": 0.12},
            "total_kimg": 200000,
        }
    )
    flags = parse_flags(text)
    assert network(shapes(SMALL), flags) == SMALL and convention(SMALL, flags)["process"] == "ve"


def test_pfgmpp_is_read_with_the_noise_levels_of_its_files():
    """Its exact denoiser of Gaussian images, for r = sigma sqrt(D) among N pixels, is nearly the Gaussian's at sigma.

    The noise is normal with a random deviation, sigma sqrt(D / w), w chi-squared with D degrees of freedom; given a
    noisy image its weight is the image's density under that deviation.
    """
    count, dimensions, sigma, spread = 4096, 128, 0.7, 0.5
    w = np.linspace(1e-3, 4 * dimensions, 40_001)
    deviation2 = sigma**2 * dimensions / w
    x = np.random.default_rng(0).normal(size=count) * math.hypot(spread, sigma)
    log = (dimensions / 2 - 1) * np.log(w) - w / 2
    log += -count / 2 * np.log(spread**2 + deviation2) - (x**2).sum() / 2 / (spread**2 + deviation2)
    weight = np.exp(log - log.max())
    shrink = (weight * spread**2 / (spread**2 + deviation2)).sum() / weight.sum()
    assert shrink == pytest.approx(spread**2 / (spread**2 + sigma**2), rel=0.02)
    found = convention(SMALL, parse_flags("pfgmpp: true\nD: 128\nprecond: edm"))
    assert found == convention(SMALL, {})


def known(config: EDMConfig = SMALL) -> dict[str, torch.Tensor]:
    """Weights that give the network's input over its root mean square."""
    side, last = f"{config.size}x{config.size}", config.blocks
    names = (f"enc.{side}_conv", f"dec.{side}_block{last}.skip", f"dec.{side}_aux_norm", f"dec.{side}_aux_conv")
    return passing(config, *names, empty(config))


def by_hand(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """What :func:`known` denoises to in EDM's preconditioning."""
    skip, out, c_in, _ = TABLE["edm"](sigma)
    return skip * x + out * over_rms(c_in * x)


def images(channels: int = 1) -> torch.Tensor:
    return 0.4 * torch.randn(1, 3, channels, 32, 42, generator=torch.Generator().manual_seed(4))


def write(path, state, prefix="model."):
    """A state dictionary as EDM's classes give it, or in the trainer's dictionary of InverseBench."""
    state = {prefix + k: v.contiguous() for k, v in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"ema": state, "net": {}}, path)
    return path


@pytest.mark.parametrize("name", ["edm.safetensors", "bench.pt"])
@pytest.mark.parametrize("sigma", [0.03, 1.0, 40.0])
def test_a_file_of_the_original_denoises_as_worked_out_by_hand(tmp_path, name, sigma):
    path, x = write(tmp_path / name, known()), images()
    import_prior(path, tmp_path / "safe")
    for prior in (load_prior(path), load_prior(tmp_path / "safe")):
        assert torch.allclose(prior.denoise(x, sigma).double(), by_hand(x, sigma).double(), atol=2e-5 * (1 + sigma))
    assert (prior.info.sigma_min, prior.info.sigma_max) == (0.002, 80.0)
    assert prior.info.size == SMALL.size  # a part of the names


def test_complex_images_classes_and_the_table_of_the_improved_ddpm(tmp_path):
    c = replace(SMALL, in_channels=2, out_channels=2, classes=5, label=3)
    state, x, path = {"model." + k: v for k, v in known(c).items()}, images(2), tmp_path / "c.pt"
    torch.save(state | {"u": torch.ones(1001)}, path)
    with pytest.raises(PriorError, match="--class 0 to 4"):
        load_prior(path)
    prior = open_foreign(path, ImportOptions(label=3)).load()
    assert torch.allclose(prior.denoise(x, 0.5).double(), 2 * by_hand(x / 2, 0.25).double(), atol=1e-4)
    assert prior.info.value_range == (-2, 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"precond": "ddim"}, "precond 'ddim'.*one of edm, vp, ve, iddpm"),
        ({"precond": "iddpm"}, "1 channels for 1, which does not fit"),
        ({"precond": "ve"}, "does not denoise"),
        ({"model_channels": 32}, "width 32, the weights say 16"),
        ({"channel_mult": [1, 1]}, "multipliers"),
        ({"attn_resolutions": [8]}, r"attention \(1,\), the weights say \(\)"),
        ({"model_type": "DhariwalUNet"}, "kind DhariwalUNet"),
        ({"encoder_type": "standard"}, "encoder standard, the weights say residual"),
        ({"label_dim": 10}, "classes 10"),
        ({"class": 3}, "not conditioned"),
        ({"num_groups": 16}, "num_groups 16"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(tmp_path, flags, words):
    path = write(tmp_path / "net.pt", known())
    path.with_suffix(".json").write_text(json.dumps(flags))
    with pytest.raises(PriorError, match=words) as error:
        load_prior(path)
    assert "net.pt" in str(error.value) and "\n" not in str(error.value)


CONV, LAST = "enc.16x16_conv.weight", "dec.16x16_aux_conv.weight"
WRONG = {
    "far too large": (known() | {LAST: 300 * known()[LAST]}, "does not denoise"),
    "not finite": (known() | {CONV: torch.full((16, 1, 3, 3), torch.nan)}, "16x16_conv.weight are NaN"),
    "missing": ({k: v for k, v in known().items() if k != "map_layer1.bias"}, "1 missing: map_layer1.bias"),
    "extra": (known() | {"teacher.weight": torch.ones(1)}, "1 unexpected: teacher.weight"),
    "another shape": (known() | {"map_layer1.bias": torch.ones(3)}, r"map_layer1.bias \(3,\) instead of \(64,\)"),
    "half of it": ({k: v for k, v in known().items() if "dec." not in k}, "not whole"),
    "no width": (known() | {CONV: torch.zeros(0, 1, 3, 3)}, "not whole"),
    "an absurd width": (
        {k: (torch.zeros(1).expand(8 * 10**6, 1, 1, 1) if k == CONV else v) for k, v in known().items()},
        "more than the file holds",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_are_refused_by_name(tmp_path, name):
    state, words = WRONG[name]
    torch.save({"net": {"model." + k: v for k, v in state.items()}}, tmp_path / "net.pt")
    with pytest.raises(PriorError, match=words) as error:
        load_prior(tmp_path / "net.pt")
    assert "net.pt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"blocks": 10**9}, {"width": 10**6}, {"kind": "UNet"}, {"attention": (7,)}, {"taps": 3}]
)
def test_absurd_networks_are_refused_before_anything_is_made(change):
    with pytest.raises(PriorError, match="EDM network"):
        replace(SMALL, **change)


def test_a_card_that_asks_for_more_than_the_file_is_refused_before_anything_is_allocated(tmp_path):
    """Of 16384 features on two levels the network would have hundreds of gigabytes."""
    foreign = open_foreign(write(tmp_path / "net.pt", known()))
    huge = foreign.card | {"network": foreign.card["network"] | {"width": 16384, "multipliers": (1, 1)}}
    assert sum(4 * v.numel() for v in empty(EDMConfig(**huge["network"])).state_dict().values()) > 100e9
    with pytest.raises(PriorError, match=r"do not fit.*of another shape"):
        build_prior(huge, known(), "net.pt")


def test_a_reconstruction_from_such_a_file(run, here):
    write(here / "net.safetensors", known())
    assert "architecture             edm" in run("priors", "info", "net.safetensors")[1]
    options = ("--simulate", "--slices", "0:1", "--views", "12", "--steps", "2", "--quiet", "-o", "r.nii.gz")
    code, _, err = run("reconstruct", "$/ct.nii.gz", "--op", "ct-sparse", "--prior", "net.safetensors", *options)
    assert code == 0, err
    assert json.loads((here / "r.json").read_text())["runs"]["pnp"]["chi2_per_datum"] > 0
