"""What a checkpoint of guided diffusion says about its network, and what its training options say."""

import re
from dataclasses import replace
from typing import Any

from invdiff.errors import PriorError
from invdiff.priors.adm import ADMConfig
from invdiff.priors.flags import numbers

# Multipliers by image size where the options give none (guided-diffusion; 320: DDS).
MULTIPLIERS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    320: (1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
_SHAPE = {"head_channels": 64, "resblock_updown": True}
_WIDE = {"width": 256, "blocks": 2, "multipliers": MULTIPLIERS[256], "attention": (3, 4, 5)}
_MEDICAL = {"width": 256, "blocks": 1, "multipliers": MULTIPLIERS[256]}

# Configurations that were published with their weights; what weights do not tell is taken from here.
PUBLISHED: dict[str, ADMConfig] = {
    "ffhq_10m": ADMConfig(3, 6, 128, 1, MULTIPLIERS[256], (4,), **_SHAPE),  # type: ignore[arg-type]
    "256x256_diffusion_uncond": ADMConfig(3, 6, **_WIDE, **_SHAPE),  # type: ignore[arg-type]
    "256x256_diffusion": ADMConfig(3, 6, **_WIDE, **_SHAPE, classes=1000, label=0),  # type: ignore[arg-type]
    "512x512_diffusion": ADMConfig(
        3, 6, 256, 2, MULTIPLIERS[512], (4, 5, 6), 64, resblock_updown=True, classes=1000, label=0
    ),
    "128x128_diffusion": ADMConfig(
        3, 6, 256, 2, MULTIPLIERS[128], (2, 3, 4), resblock_updown=True, classes=1000, label=0
    ),
    "64x64_diffusion": ADMConfig(
        *(3, 6, 192, 3, MULTIPLIERS[64], (1, 2, 3), 64), new_order=True, resblock_updown=True, classes=1000, label=0
    ),
    "AAPM256": ADMConfig(1, 2, **_MEDICAL, attention=(4,), **_SHAPE),  # type: ignore[arg-type]
    # 320 // 16 = 20 is no power of 2: the published options leave attention in the middle block only.
    "fastmri_knee_320_complex": ADMConfig(2, 4, **_MEDICAL, attention=(), **_SHAPE),  # type: ignore[arg-type]
}


def recognise(shapes: dict[str, tuple[int, ...]]) -> ADMConfig | None:
    """The configuration that names and shapes of the weights tell, or None if they are not of this network.

    Heads, the order of q, k, v, and the label of a class-conditional network are not in the weights: heads are those
    of the published configuration of the same shapes, or ``heads = 0`` where there is none.

    Raises:
        PriorError: the names are of this network, but stages are missing.
    """
    needed = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight")
    if not all(name in shapes for name in needed):
        return None
    inputs, outputs = (_stages(shapes, name) for name in ("input_blocks", "output_blocks"))
    rises = [k for k in range(outputs) if _rises(shapes, k)]
    levels = len(rises) + 1
    blocks = (inputs - levels) // levels
    if blocks < 1 or inputs != levels * (blocks + 1) or outputs != inputs:
        raise PriorError(
            f"weights with {inputs} input and {outputs} output blocks on {levels} levels are no complete ADM network; "
            "get the whole file"
        )
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    width = shapes["time_embed.0.weight"][1]
    widths = [shapes[f"{name}.0.out_layers.3.weight"][0] for name in first if f"{name}.0.out_layers.3.weight" in shapes]
    emb = shapes.get(f"{first[0]}.0.emb_layers.1.weight")
    if len(widths) != levels or emb is None:
        raise PriorError("weights of an ADM network without its residual blocks; get the whole file")
    classes = shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else 0
    found = ADMConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        width=width,
        blocks=blocks,
        multipliers=tuple(w / width for w in widths),
        attention=tuple(k for k, name in enumerate(first) if f"{name}.1.qkv.weight" in shapes),
        heads=1,
        heads_up=1,
        scale_shift=emb[0] == 2 * widths[0],
        resblock_updown=levels > 1 and f"input_blocks.{blocks + 1}.0.op.weight" not in shapes,
        classes=classes,
        label=0 if classes else None,
    )
    same = [p for p in PUBLISHED.values() if _without_heads(p) == _without_heads(found)]
    return same[0] if same else found


def _without_heads(config: ADMConfig) -> ADMConfig:
    return replace(config, head_channels=0, heads=1, heads_up=1, new_order=False)


def _stages(shapes: dict[str, tuple[int, ...]], name: str) -> int:
    found = {int(match[1]) for key in shapes if (match := re.match(rf"{name}\.(\d{{1,4}})\.", key))}
    return len(found) if found == set(range(len(found))) else 0


def _rises(shapes: dict[str, tuple[int, ...]], stage: int) -> bool:
    """Whether a stage of the decoder ends by doubling the sides."""
    parts = [f"output_blocks.{stage}.{k}" for k in (1, 2)]
    return any(f"{part}.conv.weight" in shapes or f"{part}.in_layers.2.weight" in shapes for part in parts)


def network(shapes: dict[str, tuple[int, ...]], flags: dict[str, Any]) -> ADMConfig | None:
    """The configuration from weights and training options, which must not contradict each other.

    Args:
        shapes: of the weights, by name.
        flags: options by their names in guided-diffusion; ``class`` chooses a label.

    Raises:
        PriorError: heads are not known, or an option contradicts the weights.
    """
    found = recognise(shapes)
    if found is None:
        return None
    told = _told(flags, len(found.multipliers))
    for name, value in told.items():
        if name not in ("head_channels", "heads", "heads_up", "new_order") and value != getattr(found, name):
            raise PriorError(
                f"the configuration says {name} {value}, the weights say {getattr(found, name)}; is it that of another "
                "file?"
            )
    published = any(_without_heads(p) == _without_heads(found) for p in PUBLISHED.values())
    if not published and not {"head_channels", "heads"} & set(told):
        raise PriorError(
            "weights of an ADM network do not tell its attention heads: give its training options with --config, "
            "at least num_head_channels or num_heads"
        )
    if {"head_channels", "heads"} & set(told):
        heads = int(told.get("heads", 4))
        found = replace(
            found,
            head_channels=told.get("head_channels", 0),
            heads=heads,
            heads_up=told.get("heads_up", heads),
            new_order=told.get("new_order", False),
        )
    elif "new_order" in told:
        found = replace(found, new_order=told["new_order"])
    label = flags.get("class")
    if found.classes:
        return replace(found, label=None if label is None else int(label))
    if label is not None:
        raise PriorError(f"class {label}: the network is not conditioned on classes; drop the option")
    return found


def _told(flags: dict[str, Any], levels: int) -> dict[str, Any]:
    """Fields of the configuration of so many levels that training options fix."""
    found: dict[str, Any] = {}
    for name, field in (("num_channels", "width"), ("num_res_blocks", "blocks"), ("num_heads", "heads")):
        if flags.get(name) is not None:
            found[field] = int(numbers(flags[name])[0])
    for name, field in (("num_head_channels", "head_channels"), ("num_heads_upsample", "heads_up")):
        if flags.get(name) is not None and (value := int(numbers(flags[name])[0])) > 0:
            found[field] = value
    names = (
        *(("use_new_attention_order", "new_order"), ("use_scale_shift_norm", "scale_shift")),
        *(("resblock_updown", "resblock_updown"), ("in_channels", "in_channels")),
    )
    found |= {field: flags[name] for name, field in names if flags.get(name) is not None}
    size = int(numbers(flags["image_size"])[0]) if flags.get("image_size") else None
    if multipliers := numbers(flags.get("channel_mult")):
        found["multipliers"] = tuple(multipliers)
    elif size in MULTIPLIERS and "channel_mult" in flags:
        found["multipliers"] = MULTIPLIERS[size]
    if size and (pixels := numbers(flags.get("attention_resolutions"))):
        factors = {size // int(p) for p in pixels if p >= 1}
        found["attention"] = tuple(k for k in range(levels) if 2**k in factors)
    return found


def convention(config: ADMConfig, flags: dict[str, Any]) -> dict[str, Any]:
    """Fields of :class:`Convention` that training options fix; where they are silent, the defaults of the original.

    Raises:
        PriorError: a noise schedule or a prediction that the original does not know.
    """
    betas = flags.get("betas")
    length = len(betas) if isinstance(betas, tuple) else 1000
    steps = next((int(flags[k]) for k in ("diffusion_steps", "num_diffusion_timesteps", "steps") if k in flags), length)
    name = str(flags.get("noise_schedule", flags.get("beta_schedule", "linear")))
    if name not in ("linear", "cosine"):
        raise PriorError(f"noise schedule '{name}' of the configuration: linear or cosine can be read")
    first, last = flags.get("beta_start", 0.1 / steps), flags.get("beta_end", 20.0 / steps)
    found = {"betas": name, "steps": steps, "beta_first": float(first), "beta_last": float(last)}
    if flags.get("rescale_timesteps"):
        found["label_scale"] = 1000.0 / steps
    kind = "start_x" if flags.get("predict_xstart") else str(flags.get("model_mean_type", "epsilon")).lower()
    names = {"epsilon": "eps", "eps": "eps", "start_x": "x0", "xstart": "x0", "v": "v"}
    if kind not in names:
        raise PriorError(f"model_mean_type '{kind}' of the configuration: one of {', '.join(names)} can be read")
    found["predicts"] = names[kind]
    if config.in_channels == 2:
        found["prior_range"] = (-2.0, 2.0)  # complex images: magnitudes from 0 to 2
    return found
