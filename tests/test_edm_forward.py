"""EDM's networks against deepinv's with the same weights: names, sizes, forward passes, files that deepinv saved."""

import pytest
import torch
from foreign_networks import drawn
from test_edm import PUBLISHED, SMALL, empty, shapes

from invdiff.priors.edm_files import convention, network
from invdiff.priors.foreign import ImportOptions, open_foreign
from invdiff.priors.parametrization import Convention, Parametrized

THEIRS = {
    "cifar10 ddpmpp": ("NCSNpp", {"model_type": "ddpm", "img_resolution": 32, "channel_mult": (2, 2, 2)}),
    "ffhq ncsnpp": ("NCSNpp", {"model_type": "ncsn", "img_resolution": 64, "channel_mult": (1, 2, 2, 2)}),
    "imagenet adm": ("ADMUNet", {"img_resolution": 64, "label_dim": 1000}),
}
# Parameters as deepinv's port has them; Dhariwal and Nichol 2021 state 296 million for ADM at 64 x 64.
MILLIONS = {"cifar10 ddpmpp": 55.7, "ffhq ncsnpp": 62.8, "imagenet adm": 295.9}


@pytest.mark.parametrize("name", THEIRS)
def test_names_and_shapes_are_those_of_deepinv(name):
    import deepinv.models

    kind, options = THEIRS[name]
    with torch.device("meta"):
        theirs = getattr(deepinv.models, kind)(pretrained=None, **options)
    assert shapes(PUBLISHED[name]) == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in theirs.parameters()) == pytest.approx(MILLIONS[name] * 1e6, abs=5e4)


CASES = {
    "ncsn": ("NCSNpp", {"model_type": "ncsn", "model_channels": 32, "attn_resolutions": (8,)}),
    "ddpm": ("NCSNpp", {"model_type": "ddpm", "model_channels": 32, "attn_resolutions": (16,)}),
    "128 channels": ("NCSNpp", {"model_type": "ncsn", "model_channels": 128, "attn_resolutions": ()}),
    "adm": ("ADMUNet", {"model_channels": 64, "attn_resolutions": (8,)}),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_is_that_of_deepinv_with_the_same_weights(name):
    """Below 128 channels deepinv has 32 groups where EDM has fewer; from there on they are the same."""
    import deepinv.models

    kind, options = CASES[name]
    options = options | {"img_resolution": 16, "in_channels": 1, "out_channels": 1, "channel_mult": (1, 2)}
    theirs = getattr(deepinv.models, kind)(pretrained=None, num_blocks=1, label_dim=3, **options)
    theirs.load_state_dict(drawn(theirs))
    theirs.eval().requires_grad_(False)
    flags = {"class": 1} | ({} if name == "128 channels" else {"pixel_std": 0.75})
    config = network({k: v.shape for k, v in theirs.state_dict().items()}, flags)
    mine = empty(config).requires_grad_(False)
    mine.load_state_dict(theirs.state_dict(), assign=True)
    x, label = torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, -0.7])
    expected = theirs.forward_unet(x, label, torch.eye(3)[[1, 1]])
    assert torch.allclose(mine(x, label), expected, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["edm", "ve-baseline"])
def test_a_file_of_deepinv_denoises_as_deepinv(tmp_path, kind):
    from deepinv.models import NCSNpp

    options = {"model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": ()}
    theirs = NCSNpp("ncsn", kind, 16, 1, 1, pretrained=None, pixel_std=0.6, **options)
    theirs.load_state_dict(drawn(theirs))
    theirs.eval().requires_grad_(False)
    torch.save(theirs.state_dict(), tmp_path / "d.pt")
    (tmp_path / "d.yaml").write_text(f"precondition_type: {kind}\npixel_std: 0.6\n")
    prior = open_foreign(tmp_path / "d.pt", ImportOptions(check=False)).load(chunk=2)
    x, sigma = torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(1)), 0.3
    assert torch.allclose(prior.denoise(x, sigma), 2 * theirs((x + 1) / 2, sigma / 2) - 1, atol=1e-4)


def test_half_precision_gives_nearly_the_same_and_keeps_the_frequencies():
    net = empty(SMALL).requires_grad_(False)
    net.load_state_dict(drawn(net), assign=True)
    x, label = torch.randn(1, 1, 16, 16), torch.tensor([0.4])
    expected, frequencies = net(x, label), net.map_noise.freqs.clone()
    half = net.to(torch.bfloat16)
    out = half(x.to(torch.bfloat16), label)
    assert out.dtype == torch.bfloat16 and torch.equal(half.map_noise.freqs, frequencies)
    assert torch.allclose(out.float(), expected, atol=0.05 * float(expected.abs().max()))
    whole = Parametrized(half, Convention.from_dict(convention(SMALL, {})), 1)
    assert whole(x, torch.tensor([0.3])).dtype == torch.float32
