"""Latent diffusion as diffusers keeps it: folders ``vae`` (AutoencoderKL), ``unet`` (UNet2DModel) and ``scheduler``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.errors import PriorError
from invdiff.files import show
from invdiff.priors.build import fitted
from invdiff.priors.checkpoint import read_checkpoint
from invdiff.priors.foreign import ImportOptions, open_foreign
from invdiff.priors.latent import LatentPrior
from invdiff.priors.unet2d_files import WEIGHTS


class Autoencoder:
    """Encoder and decoder of an ``AutoencoderKL``, in its precision; the encoder gives the mean, no sample.

    Args:
        net: on its device.
    """

    def __init__(self, net: nn.Module):
        self.net = net.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """Images ``(batch, C, H, W)`` in [-1, 1] to latents, not scaled."""
        return self.net.encode(x.float()).latent_dist.mode().to(x.dtype)  # type: ignore[operator]

    def decode(self, z: Tensor) -> Tensor:
        """Latents to images."""
        return self.net.decode(z.float(), return_dict=False)[0].to(z.dtype)  # type: ignore[operator]


def load_latent(folder: Path, device="cpu", chunk: int | None = None, check: bool = True) -> LatentPrior:
    """The latent prior of a folder, for images in [-1, 1].

    Raises:
        PriorError: diffusers is missing, files are missing, damaged or do not fit, or the network does not denoise, or
            the autoencoder does not give an image back (unless ``check`` is false).
    """
    settings, net, digest = _autoencoder(folder / "vae", torch.device(device))
    options = ImportOptions(network_range=(-1.0, 1.0), prior_range=(-1.0, 1.0), check=check)
    prior = open_foreign(folder / "unet", options).load(device, chunk)
    prior.info = replace(prior.info, name=folder.absolute().name)
    latents, channels = settings.get("latent_channels", 4), settings.get("in_channels", 3)
    if prior.info.channels != latents:
        raise PriorError(
            f"{show(folder)}: latents have {latents} channels, the network {prior.info.channels}; repair it"
        )
    factor = 2 ** (len(settings.get("block_out_channels", (64,))) - 1)
    coder = Autoencoder(net)
    scale, shift = settings.get("scaling_factor") or 1.0, settings.get("shift_factor") or 0.0
    whole = LatentPrior(prior, coder.encode, coder.decode, channels, factor, scale, shift, digest)
    if check:
        check_autoencoder(whole, show(folder), torch.device(device))
    return whole


def _autoencoder(folder: Path, device: torch.device) -> tuple[dict[str, Any], nn.Module, str]:
    """Settings and network of ``vae``, and the SHA-256 of its weights."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise PriorError("this prior needs the package diffusers: pip install 'invdiff[diffusers]'") from None
    settings = json.loads((folder / "config.json").read_text())
    if settings["_class_name"] != "AutoencoderKL" or settings.get("latents_mean") or settings.get("latents_std"):
        raise PriorError(
            f"{show(folder)}: is a {settings['_class_name']}, or has means of its latents; only AutoencoderKL without "
            "can be used"
        )
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise PriorError(f"{show(folder)}: has neither {' nor '.join(WEIGHTS)}; download the weights as well")
    checkpoint = read_checkpoint(weights)
    try:
        with torch.device("meta"):
            net: Any = AutoencoderKL(**{k: v for k, v in settings.items() if not k.startswith("_")})
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        why = " ".join(str(error).split())[:160]
        raise PriorError(f"diffusers makes no AutoencoderKL of these settings ({why}); correct config.json") from None
    net.load_state_dict(fitted(net, checkpoint.tensors, show(weights), "AutoencoderKL"), assign=True)
    return settings, nn.Module.to(net, device), checkpoint.sha256


def check_autoencoder(prior: LatentPrior, name: str, device: torch.device) -> None:
    """An image of a ramp and a step, encoded and decoded, is wrong by less than a tenth of the range.

    Raises:
        PriorError: else; the weights or the settings are wrong.
    """
    side = max(64, 8 * prior.factor)
    ramp = torch.linspace(-0.5, 0.5, side, device=device).expand(prior.channels, side, side)
    image = (ramp + 0.3 * (ramp.mT > 0).float())[None]
    with torch.no_grad():
        error = float((prior.decode(prior.encode(image)) - image).square().mean().sqrt())
    if not error < 0.2:
        raise PriorError(f"{name}: its autoencoder gives an image back with an error of {error:.3g}; get it again")
