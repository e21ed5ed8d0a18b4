"""Networks of foreign priors, by name: one explicit table, resolved on first use."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from invdiff.errors import PriorError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One row.

    Args:
        summary: a line of text.
        config: ``"module:name"`` of a frozen dataclass, JSON-safe, with ``stride`` and ``channels``; it raises
            PriorError for numbers that make no network.
        network: ``"module:name"`` of a module ``f(z, label)`` that takes a configuration, its parameters named as in
            the published files.
        files: module with ``network(shapes, flags) -> configuration or None`` and ``convention(configuration, flags) ->
            fields of Convention``, from names and shapes of the weights and the options of the training.
    """

    summary: str
    config: str
    network: str
    files: str

    def configure(self, settings: dict[str, Any]):
        """The configuration from JSON; lists become tuples.

        Raises:
            PriorError: settings that the network does not have, or that make none.
        """
        try:
            return _get(self.config)(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        except (TypeError, ValueError) as error:
            if isinstance(error, PriorError):
                raise
            raise PriorError(f"the network's configuration cannot be used ({str(error)[:160]}); correct it") from None

    def build(self, config) -> "nn.Module":
        """The network of a configuration."""
        return _get(self.network)(config)


ARCHITECTURES: dict[str, Architecture] = {
    "adm": Architecture(
        "U-Net of guided diffusion (ADM)",
        "invdiff.priors.adm:ADMConfig",
        "invdiff.priors.adm:ADMUNet",
        "invdiff.priors.adm_files",
    ),
    "drunet": Architecture(
        "denoiser of DPIR and deepinv",
        "invdiff.priors.drunet:DRUNetConfig",
        "invdiff.priors.drunet:build",
        "invdiff.priors.drunet",
    ),
    "edm": Architecture(
        "SongUNet and DhariwalUNet of EDM, PFGM++, InverseBench; NCSNpp and ADMUNet of deepinv",
        "invdiff.priors.edm:EDMConfig",
        "invdiff.priors.edm:build",
        "invdiff.priors.edm_files",
    ),
    "ncsnpp": Architecture(
        "NCSN++, DDPM++ and DDPM of score_sde, also of DiffusionMBIR and Score-MRI",
        "invdiff.priors.ncsnpp:NCSNppConfig",
        "invdiff.priors.ncsnpp:build",
        "invdiff.priors.ncsnpp_files",
    ),
    "lucidrains": Architecture(
        "Unet of denoising-diffusion-pytorch, version 2",
        "invdiff.priors.lucidrains:LucidrainsConfig",
        "invdiff.priors.lucidrains:LucidrainsUNet",
        "invdiff.priors.lucidrains_files",
    ),
    "unet2d": Architecture(
        "UNet2DModel of diffusers (needs that package)",
        "invdiff.priors.unet2d:UNet2DConfig",
        "invdiff.priors.unet2d:build",
        "invdiff.priors.unet2d_files",
    ),
}


def architecture(name: str) -> Architecture:
    """The row of a name.

    Raises:
        PriorError: an unknown name; lists the choices.
    """
    if name not in ARCHITECTURES:
        raise PriorError(f"unknown architecture '{name}': one of {', '.join(ARCHITECTURES)} can be loaded")
    return ARCHITECTURES[name]


def _get(reference: str):
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
