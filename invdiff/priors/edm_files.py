"""What a checkpoint of EDM, PFGM++, InverseBench or deepinv says about its network, and what its options say."""

import math
import re
from itertools import pairwise
from typing import Any

from invdiff.errors import PriorError
from invdiff.priors.edm import EDMConfig
from invdiff.priors.flags import numbers

Shapes = dict[str, tuple[int, ...]]
# EDM's preconditioning classes, by the last word of their names without "Precond", and deepinv's words for them.
PRECONDITIONS = {"edm": "edm", "vp": "vp", "ve": "ve", "iddpm": "iddpm", "baseline_ve": "ve", "ve-baseline": "ve"}


def recognise(shapes: Shapes) -> EDMConfig | None:
    """The configuration that names and shapes of the weights tell, or None if they are not of this network.

    Raises:
        PriorError: the names are of this network, but it is not whole.
    """
    first = next((m for key in shapes if (m := re.fullmatch(r"enc\.(\d{1,5})x\1_conv\.weight", key))), None)
    if first is None or "map_layer0.weight" not in shapes:
        return None
    size, song = int(first[1]), "out_conv.weight" not in shapes
    embedding, noise = shapes["map_layer0.weight"]
    width, channels = (shapes[first[0]][0] if song else noise), shapes[first[0]][1]
    names = [f"{size >> k}x{size >> k}" for k in range(10)]
    sides = [name for name in names if f"enc.{name}_block0.conv0.weight" in shapes]
    blocks = len({key for key in shapes if re.fullmatch(rf"enc\.{size}x{size}_block\d+\.conv0\.weight", key)})
    last = next((n for n in (f"dec.{size}x{size}_aux_conv.weight", "out_conv.weight") if n in shapes), "")
    widths = [shapes[f"enc.{side}_block0.conv0.weight"][0] for side in sides]
    if not all((sides, last, blocks, width)) or any(w % width for w in (noise, embedding, *widths)):
        raise PriorError("weights of an EDM network that is not whole; get the whole file")
    encoders = {"residual": "_aux_residual.weight", "skip": "_aux_skip.weight"}
    classes = shapes["map_label.weight"][1] if "map_label.weight" in shapes else 0
    return EDMConfig(
        kind="SongUNet" if song else "DhariwalUNet",
        size=size,
        in_channels=channels,
        out_channels=shapes[last][0],
        width=width,
        blocks=blocks,
        multipliers=tuple(w // width for w in widths),
        attention=tuple(k for k, side in enumerate(sides) if f"enc.{side}_block0.qkv.weight" in shapes),
        noise=noise // width,
        embedding=embedding // width,
        fourier="map_noise.freqs" in shapes,
        taps=next((shape[-1] for key, shape in shapes.items() if key.endswith(".resample_filter")), 2),
        encoder=next((n for n, end in encoders.items() if any(key.endswith(end) for key in shapes)), "standard"),
        skip_decoder=sum(key.endswith("_aux_conv.weight") for key in shapes) > 1,
        classes=classes,
        label=0 if classes else None,
        augmented=shapes["map_augment.weight"][1] if "map_augment.weight" in shapes else 0,
    )


def network(shapes: Shapes, flags: dict[str, Any]) -> EDMConfig | None:
    """The configuration from weights and training options, which must not contradict each other.

    Args:
        shapes: of the weights, by name.
        flags: options by their names in EDM; ``class`` chooses a label, ``pixel_std`` says that deepinv trained it.

    Raises:
        PriorError: an option contradicts the weights, or a class is missing or too much.
    """
    found = recognise(shapes)
    if found is None:
        return None
    for name, value in _told(flags, found).items():
        if value != getattr(found, name):
            raise PriorError(
                f"the configuration says {name} {value}, the weights say {getattr(found, name)}; is it that of another "
                "file?"
            )
    label = flags.get("class")
    if label is not None and not found.classes:
        raise PriorError(f"class {label}: the network is not conditioned on classes; drop the option")
    groups = int(flags.get("num_groups", 32 if "pixel_std" in flags else 0))
    if groups not in (0, 32):
        raise PriorError(f"num_groups {groups}: 32 can be read; drop the option for the rule of EDM")
    changes = {"label": None if label is None else int(label), "fixed_groups": groups == 32}
    return EDMConfig(**(vars(found) | changes))


def _told(flags: dict[str, Any], found: EDMConfig) -> dict[str, Any]:
    """Fields of the configuration that training options fix."""
    told: dict[str, Any] = {}
    plain = (
        *(
            ("model_channels", "width"),
            ("num_blocks", "blocks"),
            ("label_dim", "classes"),
            ("img_channels", "in_channels"),
        ),
        *(("augment_dim", "augmented"), ("channel_mult_emb", "embedding")),
    )
    for name, field in plain:
        if flags.get(name) is not None:
            told[field] = int(numbers(flags[name])[0])
    kind = str(flags.get("model_type", ""))
    if kind in ("SongUNet", "DhariwalUNet"):
        told["kind"] = kind
    for name, field in (("encoder_type", "encoder"),):
        if flags.get(name) is not None:
            told[field] = str(flags[name])
    if multipliers := numbers(flags.get("channel_mult")):
        told["multipliers"] = tuple(int(m) for m in multipliers)
    if "attn_resolutions" in flags:
        sides = numbers(flags["attn_resolutions"])
        told["attention"] = tuple(k for k in range(len(found.multipliers)) if found.size >> k in sides)
    return told


def preconditioning(flags: dict[str, Any]) -> str:
    """Name in ``PRECONDITIONS`` that the options give, "edm" where they are silent, which is the default of EDM.

    Raises:
        PriorError: another one.
    """
    for key in ("precond", "precondition_type", "class_name", "_target_"):
        word = str(flags.get(key) or "").rpartition(".")[2]
        name = word.removesuffix("Precond").lower()
        if key in flags and (word.endswith("Precond") or key.startswith("precond")):
            if name not in PRECONDITIONS:
                raise PriorError(
                    f"{key} '{flags[key]}' of the configuration: one of {', '.join(PRECONDITIONS)} can be read"
                )
            return PRECONDITIONS[name]
    return "edm"


def convention(config: EDMConfig, flags: dict[str, Any]) -> dict[str, Any]:
    """Fields of :class:`Convention` from EDM's preconditioning (Karras et al. 2022, table 1).

    PFGM++ (Xu et al. 2023) tells its networks sigma = r / sqrt(D), and they are used as they are. Among N pixels its
    noise of scale r is heavy-tailed with (N + D) / 2 ln(|x - x0|^2 + sigma^2 D) as minus its logarithm; Gaussian noise
    of deviation sigma has |x - x0|^2 near N sigma^2, where the slope of that is the Gaussian's, 1 / (2 sigma^2).

    Raises:
        PriorError: an unknown preconditioning, or one that does not fit the network.
    """
    name = preconditioning(flags)
    if (config.out_channels > config.in_channels) != (name == "iddpm"):
        raise PriorError(
            f"the network gives {config.out_channels} channels for {config.in_channels}, which does not fit "
            f"preconditioning '{name}': give the right one with --config, e.g. the line 'precond: iddpm'"
        )
    found: dict[str, Any] = {"prior_range": (-2.0, 2.0)} if config.channels == 2 else {}  # complex: magnitudes to 2
    if "pixel_std" in flags and not flags.get("_was_trained_on_minus_one_one"):
        found["network_range"] = (0.0, 1.0)
    low, high = (float(flags.get(key) or 0) for key in ("sigma_min", "sigma_max"))
    if name == "vp":
        first, rise = float(flags.get("beta_min", 0.1)), float(flags.get("beta_d", 19.9))
        ends = {"beta_first": first, "beta_last": first + rise}
        return found | {"process": "vp-linear", "label_scale": float(flags.get("M", 1000)) - 1} | ends
    if name == "iddpm":
        return found | {"betas": _cosine(flags), "steps": int(flags.get("M", 1000))}
    if name == "ve":
        ends = {"sigma_min": low or 0.02, "sigma_max": high or 100.0}
        return (
            found | {"predicts": "minus-eps", "process": "ve", "label": "ln-sigma", "label_offset": -math.log(2)} | ends
        )
    found |= {"predicts": "edm", "process": "edm", "label": "ln-sigma", "label_scale": 0.25}
    found["sigma_data"] = float(flags.get("sigma_data", flags.get("pixel_std", 0.5)))
    return found | {"sigma_min": low or 0.002, "sigma_max": high if 0 < high < math.inf else 80.0}


def _cosine(flags: dict[str, Any]) -> str | tuple[float, ...]:
    """Betas of the improved DDPM: abar_j = sin^2(pi / 2 j / M / (1 + C_2)), j falling, ratios at least C_1."""
    least, offset, steps = (float(flags.get(k, v)) for k, v in (("C_1", 0.001), ("C_2", 0.008), ("M", 1000)))
    if (least, offset) == (0.001, 0.008):
        return "cosine"
    bars = [math.sin(math.pi / 2 * j / steps / (1 + offset)) ** 2 for j in range(int(steps), -1, -1)]
    return tuple(1 - max(after / before, least) for before, after in pairwise(bars))
