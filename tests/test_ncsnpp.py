"""NCSN++ and DDPM of score_sde: published settings, names and sizes, forward passes against independent ones, and files
in the layout of the original up to a reconstruction."""

import json
from dataclasses import replace

import pytest
import torch
from foreign_networks import over_rms, passing

from invdiff.errors import PriorError
from invdiff.priors import load_prior
from invdiff.priors.flags import read_flags
from invdiff.priors.foreign import ImportOptions, import_prior, open_foreign
from invdiff.priors.ncsnpp import NCSNppConfig, build
from invdiff.priors.ncsnpp_files import convention, network, recognise
from invdiff.priors.parametrization import Convention
from invdiff.priors.python_flags import parse_python

# The settings of DiffusionMBIR (configs/default_lsun_configs.py and ve/AAPM_256_ncsnpp_continuous.py of its
# repository), whose network is also that of its and Score-MRI's fastMRI priors.
DEFAULTS = """
import ml_collections
import torch

def get_default_configs():
  config = ml_collections.ConfigDict()
  config.training = training = ml_collections.ConfigDict()
  config.training.batch_size = 64
  training.continuous = True
  config.eval = evaluate = ml_collections.ConfigDict()
  evaluate.batch_size = 512
  config.data = data = ml_collections.ConfigDict()
  data.image_size = 256
  data.centered = False
  data.num_channels = 1
  config.model = model = ml_collections.ConfigDict()
  model.sigma_max = 378
  model.sigma_min = 0.01
  model.num_scales = 2000
  model.beta_min = 0.1
  model.beta_max = 20.
  model.embedding_type = 'fourier'
  config.optim = optim = ml_collections.ConfigDict()
  optim.eps = 1e-8
  config.device = torch.device('cuda:0') if torch.cuda.is_available() else torch.device('cpu')
  return config
"""
AAPM = """
from configs.default_lsun_configs import get_default_configs

def get_config():
  config = get_default_configs()
  training = config.training
  training.sde = 'vesde'
  model = config.model
  model.name = 'ncsnpp'
  model.scale_by_sigma = True
  model.nonlinearity = 'swish'
  model.nf = 128
  model.ch_mult = (1, 2, 2, 2)
  model.num_res_blocks = 4
  model.attn_resolutions = (16,)
  model.conditional = True
  model.fir = True
  model.fir_kernel = [1, 3, 3, 1]
  model.skip_rescale = True
  model.resblock_type = 'biggan'
  model.progressive = 'none'
  model.progressive_input = 'residual'
  model.progressive_combine = 'sum'
  model.conv_size = 3
  return config
"""
MEDICAL = NCSNppConfig(1, 128, 4, (1, 2, 2, 2), (), inward="residual")
PUBLISHED = {
    "AAPM_256": MEDICAL,
    "fastmri_knee_320_complex": replace(MEDICAL, channels=2),
    "ffhq_256": NCSNppConfig(3, 128, 2, (1, 1, 2, 2, 2, 2, 2), (4,), inward="skip", outward="skip"),
    "cifar10_ncsnpp_deep": NCSNppConfig(3, 128, 8, (1, 2, 2, 2), (1,), inward="residual"),
    "cifar10_ddpmpp": NCSNppConfig(3, 128, 4, (1, 2, 2, 2), (1,), fourier=False, fir=False, centered=True),
    "cifar10_ddpm": NCSNppConfig(
        *(3, 128, 2, (1, 2, 2, 2), (1,)), fourier=False, biggan=False, fir=False, rescale=False, fixed_groups=True
    ),
}
SMALL = NCSNppConfig(1, 16, 1, (1, 2), (), inward="residual")
FLAGS = {"sde": "vesde", "scale_by_sigma": True, "sigma_min": 0.01, "sigma_max": 378, "fir": True, "skip_rescale": True}
FLAGS |= {"centered": False, "continuous": True}


def empty(config: NCSNppConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return build(config)


def shapes(config: NCSNppConfig) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in empty(config).state_dict().items()}


VARIANTS = PUBLISHED | {
    "joined images": NCSNppConfig(3, 16, 1, (1, 2, 2), (1,), inward="skip", outward="skip", cat=True),
    "both residual": NCSNppConfig(1, 16, 2, (1, 1, 2), (0, 2), inward="residual", outward="residual"),
    "layers between, both residual": NCSNppConfig(
        1, 16, 1, (1, 2), (1,), biggan=False, inward="residual", outward="residual"
    ),
    "layers between, skips": NCSNppConfig(2, 16, 1, (1, 2), (), biggan=False, inward="skip", outward="skip"),
    "one level": NCSNppConfig(1, 16, 3, (1,), (0,)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_networks_are_recognised_by_their_weights(name):
    found = recognise(shapes(VARIANTS[name]))
    assert found == {k: getattr(VARIANTS[name], k) for k in found} and len(found) >= 10
    if name in ("AAPM_256", "joined images"):
        assert ("fir" in found) == (name == "AAPM_256")


def test_published_settings_are_read_from_python_text(tmp_path):
    flags = {}
    for name, text in (("a.py", DEFAULTS), ("b.py", AAPM)):
        (tmp_path / name).write_text(text)
        flags |= read_flags(tmp_path / name)
    assert network(shapes(MEDICAL), flags) == MEDICAL
    assert network(shapes(PUBLISHED["fastmri_knee_320_complex"]), flags | {"image_size": 320, "num_channels": 2})
    whole = Convention.from_dict(convention(MEDICAL, flags))
    assert whole == Convention("minus-eps", "ve", "sigma", sigma_min=0.01, sigma_max=378.0, network_range=(0.0, 1.0))
    assert "batch_size" in flags and flags["batch_size"] == 64 and "eps" not in flags and "device" not in flags


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model.sigma_max = compute()", "line 1 gives model.sigma_max no plain value"),
        ("if big:\n  model.nf = 256", "under a condition"),
        ("model.nf: int", "assigns no options"),
        ("model.nf = (", "line 1|closed"),
        ("open('sung', 'w')", "assigns no options"),
    ],
)
def test_python_that_is_more_than_settings_is_refused_and_never_run(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(PriorError, match=words):
        read_flags(tmp_path / "c.py")
    assert [p.name for p in tmp_path.iterdir()] == ["c.py"]


def test_names_in_settings_are_followed():
    text = "nf = 64\ndef get():\n  m = config.model\n  m.nf = nf\n  config.optim.nf = 3\n  m.ch_mult = (1, 2)\n"
    assert parse_python(text) == {"nf": 64, "ch_mult": [1, 2]}


def known(config: NCSNppConfig = SMALL) -> dict[str, torch.Tensor]:
    """Weights that give the image over its root mean square with a minus, the negative noise of an empty scene."""
    net = empty(config)
    last = len(net.all_modules) - 1
    entry = f"all_modules.{3 if config.fourier else 2}"
    state = passing(
        config, entry, f"all_modules.{last - 2}.Conv_2", f"all_modules.{last - 1}", f"all_modules.{last}", net
    )
    return state | {f"all_modules.{last}.weight": -state[f"all_modules.{last}.weight"]}


def saved(path, config=SMALL, **flags):
    """A file as score_sde writes it: wrapped names, a table of noise levels, and averages without names."""
    state, net = known(config), empty(config)
    averaged = [state[k] for k, p in net.named_parameters() if p.requires_grad]
    model = {f"module.{k}": (v if k == "all_modules.0.W" else torch.randn(v.shape)) for k, v in state.items()}
    model = {"module.sigmas": torch.ones(2000), **model}
    ema = {"decay": 0.999, "num_updates": 9, "shadow_params": averaged}
    torch.save({"optimizer": {"state": {}}, "model": model, "ema": ema, "step": 9}, path)
    path.with_suffix(".json").write_text(json.dumps(FLAGS | flags))
    return path


def images(channels: int = 1) -> torch.Tensor:
    return 0.4 * torch.randn(1, 3, channels, 32, 42, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("sigma", [0.03, 1.0, 40.0])
def test_a_file_of_the_original_denoises_as_worked_out_by_hand(tmp_path, sigma):
    """Trained on [0, 1] for [-1, 1]: the network sees (x + 1) / 2 and sigma / 2, and looks at 2 z - 1 = x."""
    path, x = saved(tmp_path / "c.pth"), images()
    import_prior(path, tmp_path / "safe")
    expected = x - sigma * over_rms(x)
    for prior in (load_prior(path), load_prior(tmp_path / "safe")):
        assert torch.allclose(prior.denoise(x, sigma).double(), expected, atol=2e-5 * (1 + sigma))
    assert (prior.info.sigma_min, prior.info.sigma_max) == (0.02, 756.0)
    assert json.loads((tmp_path / "safe" / "config.json").read_text())["source"]["part"] == "ema.shadow_params"


def test_the_order_of_averages_is_that_of_the_file(tmp_path):
    """A network whose parameters are numbered otherwise still takes every average to its own name."""
    path = saved(tmp_path / "c.pth")
    whole = torch.load(path, weights_only=True)
    names = list(whole["model"])
    order = [*names[:1], *reversed(names[1:])]
    trained = [k for k in names if not k.endswith(("all_modules.0.W", "sigmas"))]
    averages = dict(zip(trained, whole["ema"]["shadow_params"], strict=True))
    whole["model"] = {k: whole["model"][k] for k in order}
    whole["ema"]["shadow_params"] = [averages[k] for k in order if k in averages]
    torch.save(whole, path)
    assert torch.allclose(load_prior(path).denoise(images(), 1.0).double(), images() - over_rms(images()), atol=1e-4)


def test_complex_images_and_discrete_training(tmp_path):
    c = replace(SMALL, channels=2, fourier=False, centered=True)
    flags = {"centered": True, "continuous": False, "num_scales": 1000}
    prior, x = load_prior(saved(tmp_path / "c.pth", c, **flags)), images(2)
    assert torch.allclose(prior.denoise(x, 0.5).double(), x - 0.5 * over_rms(x), atol=1e-4)
    told = open_foreign(tmp_path / "c.pth").card["convention"]
    assert (told["label_scale"], told["label_offset"], told["prior_range"]) == (-999.0, 999.0, (-2.0, 2.0))
    seen = Convention.from_dict(told)
    assert seen.coefficients(378.0)[1] == pytest.approx(0) and seen.coefficients(0.01)[1] == pytest.approx(999)


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ({"sde": "vpsde"}, {"process": "vp-linear", "label_scale": 999.0, "beta_first": 0.1, "predicts": "eps"}),
        ({"sde": "subvpsde"}, {"process": "subvp-linear", "label_scale": 999.0}),
        ({"sde": "vpsde", "continuous": False}, {"process": "vp-table", "beta_first": 1e-4, "beta_last": 0.02}),
        ({"sde": "vesde", "sigma_min": 0.01, "sigma_max": 50}, {"predicts": "score", "label": "sigma"}),
    ],
)
def test_conventions_follow_the_settings(flags, fields):
    found = Convention.from_dict(convention(SMALL, flags))
    assert {k: getattr(found, k) for k in fields} == fields


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"sde": None, "fir": None, "centered": None}, "do not tell sde, centered"),
        ({"skip_rescale": None}, "do not tell skip_rescale"),
        ({"nf": 32}, "width 32, the weights say 16"),
        ({"ch_mult": [1, 4]}, r"multipliers \(1, 4\), the weights say \(1, 2\)"),
        ({"image_size": 32, "attn_resolutions": [16]}, "attention"),
        ({"progressive": "output_skip"}, "outward skip, the weights say none"),
        ({"progressive_input": "pyramid"}, "one of none, input_skip"),
        ({"fir": False}, "fir False, the weights say True"),
        ({"num_channels": 3}, "channels 3, the weights say 1"),
        ({"nonlinearity": "gelu"}, "nonlinearity 'gelu': one of swish"),
        ({"fir_kernel": [1, 2, 1]}, "fir_kernel"),
        ({"name": "ncsnv2"}, "model 'ncsnv2'"),
        ({"sde": "vpsde"}, "scale_by_sigma True"),
        ({"sigma_max": None}, "no sigma_min and sigma_max"),
        ({"sde": "vpsde", "scale_by_sigma": False}, "does not denoise"),
    ],
)
def test_settings_that_are_missing_or_wrong_are_refused_by_name(tmp_path, flags, words):
    with pytest.raises(PriorError, match=words) as error:
        load_prior(saved(tmp_path / "c.pth", **flags))
    assert "c.pth" in str(error.value) and "\n" not in str(error.value)


def test_wrong_weights_are_refused_by_name(tmp_path):
    path = saved(tmp_path / "c.pth")
    whole = torch.load(path, weights_only=True)
    shadow = whole["ema"]["shadow_params"]
    for change, words in (
        (shadow[:-1], r"has 63 averaged parameters.*has 64|has \d+ averaged parameters"),
        ([shadow[0].new_full(shadow[0].shape, torch.nan), *shadow[1:]], "all_modules.1.weight are NaN"),
        ([shadow[1], shadow[0], *shadow[2:]], r"of another shape: all_modules.1.weight \(64,\) instead of \(64, 32\)"),
    ):
        torch.save(whole | {"ema": {"decay": 0.9, "num_updates": 1, "shadow_params": change}}, path)
        with pytest.raises(PriorError, match=words):
            load_prior(path)
    short = {k: v for k, v in whole["model"].items() if not k.startswith("module.all_modules.5.")}
    torch.save({"model": short}, path)
    with pytest.raises(PriorError, match="fit no known architecture"):
        load_prior(path)


@pytest.mark.parametrize(
    "change", [{"blocks": 10**9}, {"width": 10**6}, {"multipliers": (1,) * 99}, {"attention": (7,)}, {"inward": "x"}]
)
def test_absurd_networks_are_refused_before_anything_is_made(change):
    with pytest.raises(PriorError, match=r"NCSN\+\+"):
        replace(SMALL, **change)


def test_a_reconstruction_from_such_a_file(run, here):
    saved(here / "c.pth")
    assert "architecture             ncsnpp" in run("priors", "info", "c.pth")[1]
    options = ("--simulate", "--slices", "0:1", "--views", "12", "--steps", "2", "--quiet", "-o", "r.nii.gz")
    code, _, err = run("reconstruct", "$/ct.nii.gz", "--op", "ct-sparse", "--prior", "c.pth", *options)
    assert code == 0, err
    assert json.loads((here / "r.json").read_text())["runs"]["pnp"]["chi2_per_datum"] > 0


def test_options_reach_the_import(tmp_path):
    prior = open_foreign(saved(tmp_path / "c.pth"), ImportOptions(prior_range=(-1, 2), modality="CT")).load()
    assert prior.info.value_range == (-1, 2) and prior.info.modality == "CT"
