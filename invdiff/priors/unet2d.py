"""Folders of diffusers: a ``UNet2DModel`` and the configuration of its scheduler; the package itself is optional."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from invdiff.errors import PriorError
from invdiff.files import show
from invdiff.schedule import table_sigmas

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
BETAS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# Schedulers that step through one table of betas, whatever their formula.
TABLES = (
    *("DDPM", "DDIM", "DDIMInverse", "DDPMParallel", "DDIMParallel", "PNDM", "LMSDiscrete", "HeunDiscrete"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE"),
    *("DEISMultistep", "UniPCMultistep", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
)


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
            return super().forward(z, label, asked, return_dict=False)[0]

    try:
        return Network(**config.settings)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        why = " ".join(str(error).split())[:160]
        raise PriorError(f"diffusers makes no UNet2DModel of these settings ({why}); correct config.json") from None


def is_folder(folder: Path) -> bool:
    """Whether a folder holds a network of diffusers, itself or in ``unet``."""
    return any("_class_name" in _json(place / "config.json") for place in (folder, folder / "unet"))


def read_folder(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """File of the weights, settings of the network, and those of the scheduler.

    Raises:
        PriorError: another network than UNet2DModel, or one of the files is missing.
    """
    place = next(p for p in (folder, folder / "unet") if "_class_name" in _json(p / "config.json"))
    settings = _json(place / "config.json")
    if settings["_class_name"] != "UNet2DModel":
        raise PriorError(
            f"{show(folder)}: is a {settings['_class_name']}; only UNet2DModel, an unconditional network of images, "
            "can be used"
        )
    schedulers = (folder, folder / "scheduler", folder.parent / "scheduler")
    scheduler = next((s for p in schedulers if "_class_name" in (s := _json(p / "scheduler_config.json"))), None)
    if scheduler is None:
        raise PriorError(f"{show(folder)}: has no scheduler_config.json, which says how noise was added; add it")
    weights = next((place / name for name in WEIGHTS if (place / name).is_file()), None)
    if weights is None:
        raise PriorError(f"{show(place)}: has neither {' nor '.join(WEIGHTS)}; download the weights as well")
    return weights, {k: v for k, v in settings.items() if not k.startswith("_")}, scheduler


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PriorError(f"{show(path)}: is no JSON ({str(error)[:80]}); download it again") from None
    return found if isinstance(found, dict) else {}


def convention(scheduler: dict[str, Any], channels: int) -> dict[str, Any]:
    """Fields of :class:`Convention` of a scheduler's configuration, with the defaults of diffusers.

    Raises:
        PriorError: a scheduler or prediction without a posterior mean in closed form, e.g. of consistency models.
    """
    name = scheduler["_class_name"].removesuffix("Scheduler")
    found: dict[str, Any] = {"prior_range": (-2.0, 2.0)} if channels == 2 else {}  # complex: magnitudes from 0 to 2
    if name == "ScoreSdeVe":
        low, high = scheduler.get("sigma_min", 0.01), scheduler.get("sigma_max", 1348.0)
        return found | {"predicts": "score", "process": "ve", "label": "sigma", "sigma_min": low, "sigma_max": high}
    if name == "FlowMatchEulerDiscrete":
        scale = float(scheduler.get("num_train_timesteps", 1000))
        return found | {"predicts": "velocity", "process": "flow", "label_scale": scale}
    kind = scheduler.get("prediction_type", "epsilon")
    if name in ("EDMEuler", "EDMDPMSolverMultistep") and kind == "epsilon":
        found |= {"predicts": "edm", "process": "edm", "label": "ln-sigma", "label_scale": 0.25}
        defaults = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
        return found | {key: scheduler.get(key, value) for key, value in defaults.items()}
    if name not in TABLES or kind not in PREDICTIONS:
        raise PriorError(
            f"{name}Scheduler with prediction_type '{kind}' cannot be read as a denoiser; known are "
            f"{', '.join(TABLES[:4])}, ScoreSdeVe, EDMEuler, FlowMatchEulerDiscrete"
        )
    return found | {"predicts": PREDICTIONS[kind]} | _table(scheduler)


def _table(scheduler: dict[str, Any]) -> dict[str, Any]:
    """The table of betas; one rescaled to end in pure noise loses its last entry, which no denoiser can use."""
    betas = scheduler.get("trained_betas") or scheduler.get("beta_schedule", "linear")
    if isinstance(betas, str):
        if betas not in BETAS:
            raise PriorError(f"beta_schedule '{betas}': one of {', '.join(BETAS)} can be read")
        betas = BETAS[betas]
    found = {
        "betas": betas if isinstance(betas, str) else tuple(betas),
        "steps": scheduler.get("num_train_timesteps", 1000),
        "beta_first": scheduler.get("beta_start", 1e-4),
        "beta_last": scheduler.get("beta_end", 0.02),
    }
    if not scheduler.get("rescale_betas_zero_snr"):
        return found
    from invdiff.priors.parametrization import Convention

    roots = [(1 + sigma**2) ** -0.5 for sigma in Convention(**found).table]  # alpha
    roots = [(r - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for r in roots[:-1]]
    betas = [1 - roots[0] ** 2, *(1 - (b / a) ** 2 for a, b in pairwise(roots))]
    table_sigmas(betas)
    return found | {"betas": tuple(betas), "steps": len(betas)}
