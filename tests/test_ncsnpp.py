"""NCSN++ and DDPM of score_sde: published settings, names and sizes, forward passes against independent ones, and files
in the layout of the original up to a reconstruction."""

import json
from dataclasses import replace

import pytest
import torch
from foreign_networks import drawn, over_rms, passing

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


def filled(config: NCSNppConfig, seed: int = 0) -> torch.nn.Module:
    net = empty(config)
    net.load_state_dict(drawn(net, seed), assign=True)
    return net.eval().requires_grad_(False)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


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


def test_the_medical_network_has_the_parameters_of_deepinvs():
    """EDM's NCSN++ is the same network, with its 128 frequencies as a buffer."""
    from deepinv.models import NCSNpp

    with torch.device("meta"):
        theirs = NCSNpp("ncsn", "edm", 256, 1, 1, attn_resolutions=(), num_blocks=4, pretrained=None, augment_dim=0)
    count = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in empty(MEDICAL).parameters()) == count + 128 == 61_433_601


def in_deepinv(net: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Copy weights into deepinv's network, whose blocks stand in the same order and hold their attention."""
    modules = iter(net.all_modules)
    if net.config.fourier:
        theirs.map_noise.freqs.copy_(next(modules).W)

    def copy(target, source):
        target.weight.copy_(source.weight.reshape(target.weight.shape))
        target.bias.copy_(source.bias)

    for layer in (theirs.map_layer0, theirs.map_layer1):
        copy(layer, next(modules))
    for name, block in (*theirs.enc.items(), *theirs.dec.items()):
        part = next(modules)
        if not hasattr(block, "conv0"):
            copy(block, getattr(part, "Conv2d_0", part))
            continue
        names = {
            "norm0": "GroupNorm_0",
            "conv0": "Conv_0",
            "affine": "Dense_0",
            "norm1": "GroupNorm_1",
            "conv1": "Conv_1",
        }
        names |= {"skip": "Conv_2"} if block.skip is not None else {}
        for mine, other in names.items():
            copy(getattr(block, mine), getattr(part, other))
        if block.num_heads:
            attention = next(modules)
            copy(block.norm2, attention.GroupNorm_0)
            parts = (attention.NIN_0, attention.NIN_1, attention.NIN_2)
            block.qkv.weight.copy_(torch.stack([p.W.T for p in parts], 1).reshape(block.qkv.weight.shape))
            block.qkv.bias.copy_(torch.stack([p.b for p in parts], 1).flatten())
            block.proj.weight.copy_(attention.NIN_3.W.T[:, :, None, None])
            block.proj.bias.copy_(attention.NIN_3.b)
        assert name
    assert next(modules, None) is None


@pytest.mark.parametrize("kind", ["ncsn", "ddpm"])
def test_forward_is_that_of_deepinv_with_the_same_weights(kind):
    from deepinv.models import NCSNpp

    fourier = kind == "ncsn"
    c = NCSNppConfig(
        *(2, 128, 1, (1, 1), (1,)),
        fourier=fourier,
        fir=fourier,
        centered=True,
        inward="residual" if fourier else "none",
    )
    net = filled(c)
    options = {"model_channels": 128, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": (8,)}
    theirs = NCSNpp(kind, "edm", 16, 2, 2, augment_dim=0, pretrained=None, **options).requires_grad_(False)
    in_deepinv(net, theirs)
    x, label = torch.randn(2, 2, 16, 24, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 40.0])
    assert close(net(x, label), theirs.forward_unet(x, label.log() if fourier else label))
    if fourier:
        halves = replace(c, centered=False)
        other = empty(halves)
        other.load_state_dict(net.state_dict(), assign=True)
        assert close(other((x + 1) / 2, label), net(x, label))


def in_diffusers(net: torch.nn.Module, theirs: torch.nn.Module) -> None:  # noqa: PLR0912
    """Copy weights into diffusers' network: blocks stand in the same order."""
    modules = iter(net.all_modules)

    def copy(target, source):
        for name, value in target.named_parameters():
            value.copy_(getattr(source, name).reshape(value.shape))

    def block(target):
        part = next(modules)
        names = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "time_emb_proj": "Dense_0", "norm2": "GroupNorm_1"}
        for theirs_name, name in (names | {"conv2": "Conv_1"}).items():
            copy(getattr(target, theirs_name), getattr(part, name))
        if target.conv_shortcut is not None and hasattr(part, "NIN_0"):
            target.conv_shortcut.weight.copy_(part.NIN_0.W.T[:, :, None, None])
            target.conv_shortcut.bias.copy_(part.NIN_0.b)
        elif target.conv_shortcut is not None:
            copy(target.conv_shortcut, part.Conv_2)

    def attention(target):
        part = next(modules)
        copy(target.group_norm, part.GroupNorm_0)
        for k, layer in enumerate((target.to_q, target.to_k, target.to_v, target.to_out[0])):
            layer.weight.copy_(getattr(part, f"NIN_{k}").W.T)
            layer.bias.copy_(getattr(part, f"NIN_{k}").b)

    if net.config.fourier:
        theirs.time_proj.weight.copy_(next(modules).W)
    for layer in (theirs.time_embedding.linear_1, theirs.time_embedding.linear_2, theirs.conv_in):
        copy(layer, next(modules))
    for down in theirs.down_blocks:
        for k, resnet in enumerate(down.resnets):
            block(resnet)
            if getattr(down, "attentions", None):
                attention(down.attentions[k])
        if getattr(down, "resnet_down", None) is not None:
            block(down.resnet_down)
            copy(down.skip_conv, next(modules).Conv)
        elif getattr(down, "downsamplers", None):
            copy(down.downsamplers[0].conv, next(modules).Conv_0)
    block(theirs.mid_block.resnets[0])
    attention(theirs.mid_block.attentions[0])
    block(theirs.mid_block.resnets[1])
    for up in theirs.up_blocks:
        for resnet in up.resnets:
            block(resnet)
        if getattr(up, "attentions", None):
            attention(up.attentions[0])
        if getattr(up, "resnet_up", None) is not None:
            copy(up.skip_norm, next(modules))
            copy(up.skip_conv, next(modules))
            block(up.resnet_up)
        elif getattr(up, "upsamplers", None):
            copy(up.upsamplers[0].conv, next(modules).Conv_0)
    for layer in (theirs.conv_norm_out, theirs.conv_out):
        copy(layer, next(modules))
    assert next(modules, None) is None


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'invdiff[diffusers]'")


def test_forward_with_images_beside_it_is_that_of_diffusers(diffusers):
    """As diffusers has google/ncsnpp-ffhq-256; it divides by the noise level, which the convention does here.

    From 128 channels on both have 32 groups; below, diffusers has other ones than the original.
    """
    net = filled(NCSNppConfig(3, 128, 1, (1, 1, 1), (1,), inward="skip", outward="skip"))
    options = {"time_embedding_type": "fourier", "center_input_sample": True, "attention_head_dim": None}
    options |= {"mid_block_scale_factor": 2**0.5, "norm_num_groups": None, "norm_eps": 1e-6, "layers_per_block": 1}
    theirs = diffusers.UNet2DModel(
        block_out_channels=(128, 128, 128),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        **options,
    )
    theirs.eval().requires_grad_(False)
    in_diffusers(net, theirs)
    x, sigma = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 40.0])
    assert close(net(x, sigma) / sigma[:, None, None, None], theirs(x, sigma).sample)


def test_the_network_of_ffhq_256_has_the_parameters_of_diffusers(diffusers):
    """google/ncsnpp-ffhq-256, as its config.json says; its frequencies are parameters as well."""
    kinds = ["Skip"] * 4 + ["AttnSkip"] + ["Skip"] * 2
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(
            block_out_channels=(128, 128, *[256] * 5),
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            time_embedding_type="fourier",
            norm_num_groups=None,
            attention_head_dim=None,
        )
    count = sum(p.numel() for p in empty(PUBLISHED["ffhq_256"]).parameters())
    assert count == sum(p.numel() for p in theirs.parameters())


def test_forward_of_ddpm_is_that_of_diffusers(diffusers):
    c = replace(PUBLISHED["cifar10_ddpm"], width=32, blocks=1, multipliers=(1, 2), attention=(), centered=True)
    net = filled(c)
    options = {"norm_eps": 1e-6, "layers_per_block": 1, "downsample_padding": 0, "attention_head_dim": None}
    theirs = diffusers.UNet2DModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        freq_shift=1,
        flip_sin_to_cos=False,
        **options,
    )
    theirs.eval().requires_grad_(False)
    in_diffusers(net, theirs)
    x, label = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 740.25])
    assert close(net(x, label), theirs(x, label).sample)


def test_a_convolution_that_doubles_sides_is_that_of_diffusers(diffusers):
    from diffusers.models.resnet import FirDownsample2D, FirUpsample2D

    from invdiff.priors.ncsnpp_layers import Scaled

    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    for theirs_class, how in ((FirUpsample2D, "up"), (FirDownsample2D, "down")):
        theirs = theirs_class(4, 5, use_conv=True).requires_grad_(False)
        mine = Scaled(NCSNppConfig(1, 16, 1, (1, 2), ()), 4, 5, how).requires_grad_(False)
        mine.Conv2d_0.weight.copy_(theirs.Conv2d_0.weight)
        mine.Conv2d_0.bias.copy_(theirs.Conv2d_0.bias)
        assert close(mine(x), theirs(x))


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


def test_half_precision_gives_nearly_the_same_and_keeps_the_frequencies():
    net = filled(SMALL)
    x, sigma = torch.rand(1, 1, 16, 16), torch.tensor([0.4])
    expected, frequencies = net(x, sigma), net.all_modules[0].W.clone()
    half = net.to(torch.bfloat16)
    out = half(x, sigma)
    assert out.dtype == torch.bfloat16 and torch.equal(half.all_modules[0].W, frequencies)
    assert torch.allclose(out.float(), expected, atol=0.05 * float(expected.abs().max()))


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
