"""The forward pass of NCSN++ and DDPM, and their parameters, against deepinv and diffusers with the same weights."""

from dataclasses import replace

import pytest
import torch
from foreign_networks import drawn
from test_ncsnpp import MEDICAL, PUBLISHED, SMALL, empty

from invdiff.priors.ncsnpp import NCSNppConfig
from invdiff.priors.ncsnpp_layers import Scaled


def filled(config: NCSNppConfig, seed: int = 0) -> torch.nn.Module:
    net = empty(config)
    net.load_state_dict(drawn(net, seed), assign=True)
    return net.eval().requires_grad_(False)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


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

    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    for theirs_class, how in ((FirUpsample2D, "up"), (FirDownsample2D, "down")):
        theirs = theirs_class(4, 5, use_conv=True).requires_grad_(False)
        mine = Scaled(NCSNppConfig(1, 16, 1, (1, 2), ()), 4, 5, how).requires_grad_(False)
        mine.Conv2d_0.weight.copy_(theirs.Conv2d_0.weight)
        mine.Conv2d_0.bias.copy_(theirs.Conv2d_0.bias)
        assert close(mine(x), theirs(x))


def test_half_precision_gives_nearly_the_same_and_keeps_the_frequencies():
    net = filled(SMALL)
    x, sigma = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.4])
    expected, frequencies = net(x, sigma), net.all_modules[0].W.clone()
    half = net.to(torch.bfloat16)
    out = half(x, sigma)
    assert out.dtype == torch.bfloat16 and torch.equal(half.all_modules[0].W, frequencies)
    error = (out.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < error < 0.05  # 2 to 4 % on several inputs, with products in bfloat16 or not
