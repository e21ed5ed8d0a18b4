"""DRUNet (Zhang et al. 2021, DPIR, section 3) of deepinv: a denoiser that is told the noise level by a map."""

from dataclasses import dataclass
from typing import Any

from invdiff.errors import PriorError


@dataclass(frozen=True)
class DRUNetConfig:
    """Shape of the network; JSON-safe.

    Args:
        channels: image channels.
        widths: features of the four levels (``nc`` in deepinv).
        blocks: residual blocks of a level (``nb``).

    Raises:
        PriorError: numbers that make no network, or an absurd one.
    """

    channels: int
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: int = 4

    def __post_init__(self):
        sound = len(self.widths) == 4 and all(1 <= w <= 16384 for w in self.widths)
        if not (sound and 1 <= self.blocks <= 64 and self.channels >= 1):
            raise PriorError(f"DRUNet with widths {self.widths} and {self.blocks} blocks: correct the configuration")

    @property
    def stride(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return 8


def build(config: DRUNetConfig):
    """The network ``f(z, sigma)``, its parameters named as in deepinv and DPIR."""
    from deepinv.models import DRUNet

    return DRUNet(config.channels, config.channels, nc=config.widths, nb=config.blocks, pretrained=None)


def network(shapes: dict[str, tuple[int, ...]], flags: dict[str, Any]) -> DRUNetConfig | None:
    """The configuration that names and shapes of the weights tell, or None if they are not of this network."""
    if not all(f"{name}.weight" in shapes for name in ("m_head", "m_tail")):
        return None
    blocks = sum(key.startswith("m_down1.") and key.endswith(".res.0.weight") for key in shapes)
    downs = [shapes.get(f"m_down{level}.{blocks}.weight", (0,))[0] for level in (1, 2, 3)]
    return DRUNetConfig(shapes["m_tail.weight"][0], (shapes["m_head.weight"][0], *downs), blocks)


def convention(config: DRUNetConfig, flags: dict[str, Any]) -> dict[str, Any]:
    """It gives the image, for images from 0 to 1 with noise of 50 / 255 at most, the training of DPIR."""
    found = {"predicts": "x0", "process": "ve", "label": "sigma", "sigma_min": 0.001, "sigma_max": 50 / 255}
    return found | {"network_range": (0.0, 1.0)}
