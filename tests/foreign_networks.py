"""Checkpoints whose denoiser is known in closed form, in the names of published ones."""

import json

import torch

from invdiff.priors.adm import ADMConfig, ADMUNet

SMALL = ADMConfig(1, 2, 32, 1, (1, 2), (1,), head_channels=16, resblock_updown=True)
OPTIONS = {"num_head_channels": 16, "image_size": 32, "num_channels": 32, "learn_sigma": True}


def empty(config: ADMConfig) -> dict[str, torch.Tensor]:
    """A state of zeros."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in ADMUNet(config).state_dict().items()}
    return {k: torch.zeros(shape) for k, shape in shapes.items()}


def normaliser(config: ADMConfig = SMALL) -> dict[str, torch.Tensor]:
    """Weights for which the predicted noise is the input, each channel less its mean and over its deviation.

    The first convolution makes channels (x, -x), the last skip connection hands them to the output, and
    SiLU(a) - SiLU(-a) = a. Where a variance is learned, its channels are 3.
    """
    state = empty(config)
    last = max(int(k.split(".")[1]) for k in state if k.startswith("output_blocks."))
    skip = state[f"output_blocks.{last}.0.skip_connection.weight"]
    skip[:, -skip.shape[0] :, 0, 0] = torch.eye(skip.shape[0])
    state["out.0.weight"] += 1
    for c in range(config.in_channels):
        for sign, k in ((1, 2 * c), (-1, 2 * c + 1)):
            state["input_blocks.0.0.weight"][k, c, 1, 1] = sign
            state["out.2.weight"][c, k, 1, 1] = sign
    state["out.2.bias"][config.in_channels :] = 3
    return state


def normalised(x: torch.Tensor, sigma: float, alpha: float) -> torch.Tensor:
    """What :func:`normaliser` denoises ``x`` to, by hand; the network sees ``alpha x``."""
    z = alpha * x.double()
    deviation = (z.var((-2, -1), correction=0, keepdim=True) + 1e-5).sqrt()
    return x - sigma * (z - z.mean((-2, -1), keepdim=True)) / deviation


def random_state(config: ADMConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights none of which is zero; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {k: 0.05 * torch.randn(v.shape, generator=generator) for k, v in empty(config).items()}
    for key in state:
        if key.endswith((".norm.weight", ".in_layers.0.weight", ".out_layers.0.weight", "out.0.weight")):
            state[key] += 1
    return state


def drawn(net: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of any network, none of which is zero; scales of norms are around 1, filters sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, part in net.named_modules() if isinstance(part, torch.nn.GroupNorm)}
    state = {}
    for key, value in net.state_dict().items():
        if key.endswith("resample_filter"):
            taps = torch.tensor({2: [1.0, 1.0], 4: [1.0, 3.0, 3.0, 1.0]}[value.shape[-1]])
            state[key] = (taps.outer(taps) / taps.sum() ** 2)[None, None]
        else:
            state[key] = 0.05 * torch.randn(value.shape, generator=generator) + (key in norms)
    return state


def passing(c, entry: str, shortcut: str, norm: str, last: str, net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a network with sums over sqrt(2) that gives its input over the root of its mean square, per channel.

    The first convolution ``entry`` makes channels (x, -x, 0, 0), the shortcut of the last block hands them on, one
    group of the norm holds them, and SiLU(a) - SiLU(-a) = a.
    """
    state = {k: v * (k.endswith(("resample_filter", "freqs", ".W"))) for k, v in drawn(net).items()}
    weight = state[shortcut + ".weight"]
    weight[:, -weight.shape[0] :, 0, 0] = 2**0.5 * torch.eye(weight.shape[0])
    state[norm + ".weight"] += 1
    for channel in range(state[last + ".weight"].shape[0]):
        for sign, k in ((1, 4 * channel), (-1, 4 * channel + 1)):
            state[entry + ".weight"][k, channel, 1, 1] = sign
            state[last + ".weight"][channel, k, 1, 1] = sign * 0.5**0.5
    return state


def over_rms(z: torch.Tensor) -> torch.Tensor:
    """What :func:`passing` gives, by hand; 1e-6 is in the norm, of twice as many channels."""
    return z / (z.double().square().mean((-2, -1), keepdim=True) + 2e-6).sqrt()


def saved(path, state, **flags):
    """A checkpoint of a trainer with its options beside it."""
    torch.save({"epoch": 3, "ema": {"module." + k: v for k, v in state.items()}}, path)
    path.with_suffix(".json").write_text(json.dumps(OPTIONS | flags))
    return path
