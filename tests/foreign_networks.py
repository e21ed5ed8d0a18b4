"""Checkpoints whose denoiser is known in closed form, in the names of published ones."""

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
