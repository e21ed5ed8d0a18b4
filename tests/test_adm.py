"""The ADM U-Net: published configurations, names and sizes, and its forward pass against independent ones."""

from dataclasses import replace

import pytest
import torch
from foreign_networks import OPTIONS, SMALL, random_state

from invdiff.errors import PriorError
from invdiff.priors.adm import ADMConfig, ADMUNet
from invdiff.priors.adm_files import PUBLISHED, convention, network, recognise
from invdiff.priors.flags import parse_flags
from invdiff.priors.parametrization import Convention

# Parameters of the configurations: the first two as deepinv's DiffUNet counts them (93.56 M; 552.8 M, "ADM" of table 4
# of Dhariwal and Nichol 2021 has 554 M with its class labels), the others with 1 and 2 channels instead of 3.
COUNTS = {"ffhq_10m": 93.564, "256x256_diffusion_uncond": 552.814, "256x256_diffusion": 553.838}

DPS_YAML = """# Defaults for image training.

image_size: 256
num_channels: 128
num_res_blocks: 1
channel_mult: ""
learn_sigma: True
attention_resolutions: 16   # pixels
num_heads: 4
num_head_channels: 64
num_heads_upsample: -1
use_scale_shift_norm: True
resblock_updown: True
use_new_attention_order: False
"""
DDS_YAML = """
data:
    image_size: 320
    channels: 2
model:
    in_channels: 2
    num_channels: 256
    num_heads: 4
    num_res_blocks: 1
    attention_resolutions: "16"
    num_head_channels: 64
    image_size: 320
diffusion:
    beta_schedule: linear
    beta_start: 0.0001
    beta_end: 0.02
    num_diffusion_timesteps: 1000
"""


def shapes(config: ADMConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in ADMUNet(config).state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_recognised_by_their_weights(name):
    found = recognise(shapes(PUBLISHED[name]))
    assert found == PUBLISHED[name]
    if name in COUNTS:
        assert sum(s.numel() for s in shapes(found).values()) == pytest.approx(COUNTS[name] * 1e6, abs=500)


@pytest.mark.parametrize(("name", "large"), [("ffhq_10m", False), ("256x256_diffusion_uncond", True)])
def test_names_and_shapes_are_those_of_the_published_files(name, large):
    from deepinv.models import DiffUNet

    with torch.device("meta"):
        theirs = {k: v.shape for k, v in DiffUNet(large_model=large, pretrained=None).state_dict().items()}
    own_buffers = {"sqrt_1m_alphas_cumprod", "sqrt_alphas_cumprod"}
    assert shapes(PUBLISHED[name]) == {k: v for k, v in theirs.items() if k not in own_buffers}


def test_forward_is_that_of_deepinv_with_the_same_weights():
    from deepinv.models import DiffUNet

    config = ADMConfig(1, 2, 128, 1, (1, 1, 2, 2, 4, 4), (4,), 64, resblock_updown=True)
    state = random_state(config)
    with torch.device("meta"):
        mine, theirs = ADMUNet(config).eval(), DiffUNet(1, 2, pretrained=None).eval()
    mine.load_state_dict(state, assign=True)
    table = torch.zeros(1000)
    extra = {"sqrt_1m_alphas_cumprod": table, "sqrt_alphas_cumprod": table}
    theirs.load_state_dict(state | extra, assign=True)
    x, label = torch.randn(1, 1, 32, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([417.0])
    with torch.no_grad():
        expected = theirs(x, label, type_t="timestep")
        assert torch.allclose(mine(x, label), expected, atol=1e-4 * float(expected.abs().max()))


VARIANTS = {
    "resblocks, half width": replace(SMALL, width=64, multipliers=(0.5, 1.0, 2.0), attention=(0, 2), heads=2),
    "convolutions, added embedding": ADMConfig(2, 4, 32, 2, (1, 1, 2), (1, 2), heads=4, heads_up=2, scale_shift=False),
    "classes, new order": ADMConfig(
        3, 3, 32, 2, (1, 2), (0,), heads=2, heads_up=2, new_order=True, classes=10, label=3
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_with_azula(name):
    unet = pytest.importorskip("azula.plugins.adm._src.unet", reason="azula is not installed")
    c = VARIANTS[name]
    theirs = unet.UNetModel(
        image_size=32,
        in_channels=c.in_channels,
        model_channels=c.width,
        out_channels=c.out_channels,
        num_res_blocks=c.blocks,
        attention_resolutions=[2**k for k in c.attention],
        channel_mult=c.multipliers,
        num_classes=c.classes or None,
        num_heads=c.heads,
        num_heads_upsample=c.heads_up,
        num_head_channels=c.head_channels or -1,
        use_scale_shift_norm=c.scale_shift,
        resblock_updown=c.resblock_updown,
        use_new_attention_order=c.new_order,
    ).eval()
    state = random_state(c)
    theirs.load_state_dict(state)
    mine = ADMUNet(c).eval()
    mine.load_state_dict(state)
    x, label = torch.randn(2, c.in_channels, 16, 24), torch.tensor([3.0, 740.25])
    with torch.no_grad():
        expected = theirs(x, label, *([torch.full((2,), c.label)] if c.classes else []))
        assert torch.allclose(mine(x, label), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", VARIANTS)
def test_all_but_heads_and_labels_is_told_by_the_weights(name):
    c = VARIANTS[name]
    label = 0 if c.classes else None
    assert recognise(shapes(c)) == replace(c, heads=1, heads_up=1, head_channels=0, new_order=False, label=label)


def test_options_fill_in_what_weights_do_not_tell():
    flags = parse_flags(DPS_YAML)
    assert network(shapes(PUBLISHED["ffhq_10m"]), flags) == PUBLISHED["ffhq_10m"]
    medical = network(shapes(PUBLISHED["fastmri_knee_320_complex"]), parse_flags(DDS_YAML))
    assert medical == PUBLISHED["fastmri_knee_320_complex"] and medical.stride == 32 and medical.channels == 2
    assert convention(medical, parse_flags(DDS_YAML))["prior_range"] == (-2.0, 2.0)
    few = parse_flags("--num_heads 2 --num_heads_upsample 4 --use_new_attention_order True")
    found = network(shapes(SMALL), few)
    assert (found.heads, found.heads_up, found.head_channels, found.new_order) == (2, 4, 0, True)
    assert network(shapes(SMALL), OPTIONS) == SMALL


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "heads.*--config.*num_head_channels"),
        (OPTIONS | {"num_channels": 64}, "width 64, the weights say 32"),
        (OPTIONS | {"channel_mult": "1,4"}, "multipliers"),
        (OPTIONS | {"attention_resolutions": "32"}, "attention"),
        (OPTIONS | {"class": 3}, "not conditioned"),
        ({"num_heads": 7}, "parts of"),
    ],
)
def test_options_that_do_not_fit_the_weights_are_refused(flags, words):
    with pytest.raises(PriorError, match=words):
        network(shapes(SMALL), flags)


def test_a_network_with_classes_asks_for_one():
    state = shapes(VARIANTS["classes, new order"])
    with pytest.raises(PriorError, match="--class 0 to 9"):
        network(state, {"num_heads": 2})
    assert network(state, {"num_heads": 2, "class": 3}).label == 3


def test_other_and_incomplete_weights_are_told_apart():
    assert recognise({"conv.weight": torch.Size((3, 3))}) is None
    state = shapes(SMALL)
    with pytest.raises(PriorError, match="no complete ADM"):
        recognise({k: v for k, v in state.items() if not k.startswith("output_blocks.3")})


def test_conventions_follow_the_options():
    cases = {
        "--noise_schedule cosine --diffusion_steps 4000 --rescale_timesteps True": {
            "betas": "cosine",
            "steps": 4000,
            "label_scale": 0.25,
        },
        "--diffusion_steps 500": {"beta_first": 2e-4, "beta_last": 0.04, "steps": 500},
        "--predict_xstart True": {"predicts": "x0"},
        "steps: 1000": {"beta_first": 1e-4, "beta_last": 0.02, "predicts": "eps", "betas": "linear"},
    }
    for text, fields in cases.items():
        found = Convention.from_dict(convention(SMALL, parse_flags(text)))
        assert [getattr(found, k) for k in fields] == list(fields.values())
    with pytest.raises(PriorError, match="linear or cosine"):
        convention(SMALL, {"noise_schedule": "jsd"})


@pytest.mark.parametrize(
    "change",
    [{"blocks": 10**9}, {"width": 10**6}, {"multipliers": (1.0,) * 99}, {"attention": (7,)}, {"width": 40}],
)
def test_absurd_networks_are_refused_before_anything_is_made(change):
    with pytest.raises(PriorError, match="ADM"):
        replace(SMALL, **change)


def test_half_precision_gives_nearly_the_same():
    mine = ADMUNet(SMALL).eval()
    mine.load_state_dict(random_state(SMALL))
    x, label = torch.randn(1, 1, 16, 16), torch.tensor([500.0])
    with torch.no_grad():
        expected = mine(x, label)
        half = mine.to(torch.bfloat16)(x.to(torch.bfloat16), label)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), expected, atol=0.05 * float(expected.abs().max()))
