"""What diffusers keeps about a ``UNet2DModel``: folders, settings, schedulers; and weights saved without them."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from invdiff.errors import PriorError
from invdiff.files import show
from invdiff.priors.flags import truth
from invdiff.priors.parametrization import Convention
from invdiff.priors.unet2d import UNet2DConfig
from invdiff.schedule import table_sigmas

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
BETAS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# What a UNet2DModel is made of.
SETTINGS = (
    *("sample_size", "in_channels", "out_channels", "center_input_sample", "time_embedding_type", "time_embedding_dim"),
    *("freq_shift", "flip_sin_to_cos", "down_block_types", "mid_block_type", "up_block_types", "block_out_channels"),
    *(
        "layers_per_block",
        "mid_block_scale_factor",
        "downsample_padding",
        "downsample_type",
        "upsample_type",
        "dropout",
    ),
    *("act_fn", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "norm_eps", "add_attention"),
    *("resnet_time_scale_shift", "class_embed_type", "num_class_embeds", "num_train_timesteps"),
)
# Schedulers that step through one table of betas, whatever their formula.
TABLES = (
    *("DDPM", "DDIM", "DDIMInverse", "DDPMParallel", "DDIMParallel", "PNDM", "LMSDiscrete", "HeunDiscrete"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE"),
    *("DEISMultistep", "UniPCMultistep", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
)


def is_folder(folder: Path) -> bool:
    """Whether a folder holds a network of diffusers, itself or in ``unet``."""
    return any("_class_name" in _json(place / "config.json") for place in (folder, folder / "unet"))


def is_latent(folder: Path) -> bool:
    """Whether a folder holds an autoencoder beside its network."""
    return "_class_name" in _json(folder / "vae" / "config.json")


def read_folder(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """File of the weights, settings of the network, and those of the scheduler, empty where there is none.

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
    scheduler = next((s for p in schedulers if "_class_name" in (s := _json(p / "scheduler_config.json"))), {})
    weights = next((place / name for name in WEIGHTS if (place / name).is_file()), None)
    if weights is None:
        raise PriorError(f"{show(place)}: has neither {' nor '.join(WEIGHTS)}; download the weights as well")
    return weights, {k: v for k, v in settings.items() if not k.startswith("_")}, scheduler


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise PriorError(f"{show(path)}: is no JSON ({str(error)[:80]}); download it again") from None
    return {name: truth(value) for name, value in found.items()} if isinstance(found, dict) else {}


def of_scheduler(scheduler: dict[str, Any], channels: int) -> dict[str, Any]:
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
    roots = [(1 + sigma**2) ** -0.5 for sigma in Convention(**found).table]  # alpha
    roots = [(r - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for r in roots[:-1]]
    betas = [1 - roots[0] ** 2, *(1 - (b / a) ** 2 for a, b in pairwise(roots))]
    table_sigmas(betas)
    return found | {"betas": tuple(betas), "steps": len(betas)}


def network(shapes: dict[str, tuple[int, ...]], flags: dict[str, Any]) -> UNet2DConfig | None:
    """The configuration of weights that were saved alone, or None if they are not of this network.

    Widths, layers and attention are told by the weights; the rest is as in ``flags`` (a ``config.json`` of diffusers),
    else the default of the package.
    """
    needed = ("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight")
    if not all(name in shapes for name in needed):
        return None
    levels = len({match[1] for key in shapes if (match := re.match(r"down_blocks\.(\d+)\.", key))})
    widths = [shapes.get(f"down_blocks.{k}.resnets.0.conv1.weight", (0,))[0] for k in range(levels)]
    layers = len({match[1] for key in shapes if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", key))})

    def kinds(side: str) -> list[str]:
        found = [f"{side}_blocks.{k}.attentions.0.to_q.weight" in shapes for k in range(levels)]
        return [f"{'Attn' * attends}{side.capitalize()}Block2D" for attends in found]

    settings: dict[str, Any] = {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": kinds("down"),
        "up_block_types": kinds("up"),
        "add_attention": "mid_block.attentions.0.to_q.weight" in shapes,
    }
    settings |= {name: flags[name] for name in SETTINGS if name in flags}
    return UNet2DConfig(settings, flags.get("class"))


def convention(config: UNet2DConfig, flags: dict[str, Any]) -> dict[str, Any]:
    """Fields of :class:`Convention` from the options of a scheduler, of the class DDPMScheduler unless they name one.

    Raises:
        PriorError: the options say nothing of the noise.
    """
    if not ({"beta_schedule", "prediction_type", "trained_betas", "process"} & set(flags) or _scheduler(flags)):
        raise PriorError(
            "nothing says how noise was added: give a scheduler_config.json with --config, or a file with the line "
            "'beta_schedule: linear' if it was DDPM's default"
        )
    return of_scheduler(flags | {"_class_name": _scheduler(flags) or "DDPMScheduler"}, config.channels)


def _scheduler(flags: dict[str, Any]) -> str:
    name = str(flags.get("_class_name", ""))
    return name if name.endswith("Scheduler") else ""
