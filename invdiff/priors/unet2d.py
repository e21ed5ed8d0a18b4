"""``UNet2DModel`` of diffusers: the network, through the package, which is optional."""

from dataclasses import dataclass
from typing import Any

from invdiff.errors import PriorError


@dataclass(frozen=True)
class UNet2DConfig:
    """Settings of a ``UNet2DModel``, as in its ``config.json``.

    Args:
        settings: what the class takes.
        label: the class that is asked for, where the network is conditioned on classes.

    Raises:
        PriorError: settings that make no prior of images, or an absurd network.
    """

    settings: dict[str, Any]
    label: int | None = None

    def __post_init__(self):
        s, widths = self.settings, self.settings.get("block_out_channels", (224, 448, 672, 896))
        sound = all(isinstance(w, int) and 1 <= w <= 16384 for w in widths) and 1 <= len(widths) <= 10
        if not (sound and 1 <= s.get("layers_per_block", 2) <= 16):
            raise PriorError(f"UNet2DModel with block_out_channels {widths}: correct its config.json")
        if s.get("out_channels", 3) not in (self.channels, 2 * self.channels):
            raise PriorError(
                f"UNet2DModel takes {self.channels} channels and gives {s.get('out_channels', 3)}: it needs a "
                "condition beside the image; use an unconditional one"
            )
        classes = s.get("num_class_embeds") or 0
        if s.get("class_embed_type") is not None or bool(classes) != (self.label is not None):
            raise PriorError(f"the network has {classes} classes: choose one with --class, or none where it has none")
        if classes and not 0 <= self.label < classes:  # type: ignore[operator]
            raise PriorError(f"class {self.label}: the network has classes 0 to {classes - 1}; choose one of them")

    @property
    def channels(self) -> int:
        """Image channels."""
        return self.settings.get("in_channels", 3)

    @property
    def stride(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return 2 ** (len(self.settings.get("block_out_channels", (224, 448, 672, 896))) - 1)


def build(config: UNet2DConfig):
    """The network ``f(z, label)`` of a configuration, its parameters named as in diffusers.

    Raises:
        PriorError: diffusers is not installed, or does not take the settings.
    """
    try:
        import torch
        from diffusers import UNet2DModel
    except ImportError:
        raise PriorError("this prior needs the package diffusers: pip install 'invdiff[diffusers]'") from None

    class Network(UNet2DModel):
        """Gives the tensor instead of a record."""

        def forward(self, z, label):
            asked = None if config.label is None else torch.full_like(label, config.label, dtype=torch.long)
            return super().forward(z, label, asked, return_dict=False)[0]  # type: ignore[misc, unused-ignore]

    try:
        return Network(**config.settings)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        why = " ".join(str(error).split())[:160]
        raise PriorError(f"diffusers makes no UNet2DModel of these settings ({why}); correct config.json") from None
