"""What a checkpoint of score_sde says about its network, and what the settings of its training say."""

import re
from typing import Any

from invdiff.errors import PriorError
from invdiff.priors.flags import numbers
from invdiff.priors.ncsnpp import NCSNppConfig

Shapes = dict[str, tuple[int, ...]]
# What a module is, by the first of these that it has.
KINDS = (
    *(("W", "fourier"), ("NIN_3.W", "attention"), ("GroupNorm_0.weight", "block"), ("Conv.weight", "combine")),
    *(("Conv2d_0.weight", "fir"), ("Conv_0.weight", "scaled")),
)
JOINT_NAMES = {"none": "none", "input_skip": "skip", "output_skip": "skip", "residual": "residual"}
BLOCKS = {"biggan": True, "ddpm": False}
EMBEDDINGS = {"fourier": True, "positional": False}
INCOMPLETE = "weights of NCSN++ that make no complete network; get the whole file"


def _modules(shapes: Shapes) -> list[tuple[str, Shapes]]:
    """Kind and weights of every module in order; empty if the names are not of this network."""
    parts: dict[int, Shapes] = {}
    for key, shape in shapes.items():
        if match := re.fullmatch(r"all_modules\.(\d{1,4})\.(.+)", key):
            parts.setdefault(int(match[1]), {})[match[2]] = shape
    if not parts or set(parts) != set(range(len(parts))):
        return []
    plain = {4: "conv", 2: "linear", 1: "norm"}
    found = []
    for k in range(len(parts)):
        kind = next((name for key, name in KINDS if key in parts[k]), plain.get(len(parts[k].get("weight", ())), ""))
        found.append((kind, parts[k]))
    return found


def recognise(shapes: Shapes) -> dict[str, Any] | None:
    """Fields of the configuration that names and shapes of the weights tell, or None if they are not of this network.

    Not in the weights are ``rescale``, ``centered``, ``taps``, ``activation``, and ``fir`` where no convolution is
    joined with a filter.

    Raises:
        PriorError: the names are of this network, but it is not whole.
    """
    modules = _modules(shapes)
    if not modules:
        return None
    kinds = [kind for kind, _ in modules]
    start = 1 + kinds.index("conv") if "conv" in kinds else 0
    if start < 3 or kinds[start - 3 : start] != ["linear", "linear", "conv"] or "norm" not in kinds:
        raise PriorError(INCOMPLETE)
    channels, width = (modules[start - 1][1]["weight"][k] for k in (1, 0))
    biggan = any("Conv_2.weight" in part for kind, part in modules if kind == "block")
    joints = _joints(modules, biggan)
    levels, first = len(joints) // 2 + 1, joints[0] if joints else len(kinds)
    blocks = kinds[start:first].count("block") if joints else (kinds.count("block") - 3) // 2
    inward = "skip" if "combine" in kinds else "none"
    if joints and kinds[first + 1] in ("fir", "scaled"):
        inward = "residual"
    found: dict[str, Any] = {"channels": channels, "width": width, "blocks": blocks, "biggan": biggan}
    found |= {"fourier": kinds[0] == "fourier", "inward": inward, "cat": False}
    found |= _levels(modules, start, levels, blocks, inward != "none")
    found["outward"] = _outward(modules, channels)
    if {"fir", "scaled"} & set(kinds):
        found["fir"] = "fir" in kinds
    if inward == "skip":
        at = kinds.index("combine")
        following = next((p["Conv_0.weight"][1] for kind, p in modules[at:] if kind == "block"), 0)
        found["cat"] = following == 2 * modules[at][1]["Conv.weight"][0]
    return found


def _joints(modules: list[tuple[str, Shapes]], biggan: bool) -> list[int]:
    """Where the sides of features change, first halved, then doubled."""
    if biggan:
        return [
            k
            for k, (kind, part) in enumerate(modules)
            if kind == "block" and "Conv_2.weight" in part and part["Conv_2.weight"][0] == part["Conv_2.weight"][1]
        ]
    scaled = [k for k, (kind, _) in enumerate(modules) if kind in ("fir", "scaled")]
    return [k for k in scaled if k - 1 not in scaled]


def _levels(modules: list[tuple[str, Shapes]], start: int, levels: int, blocks: int, beside: bool) -> dict[str, Any]:
    """Multipliers and attention of the encoder.

    Raises:
        PriorError: it is not as such networks are.
    """
    width, at, multipliers, attention = modules[start - 1][1]["weight"][0], start, [], []
    for level in range(levels):
        for _ in range(blocks):
            if at >= len(modules) or modules[at][0] != "block":
                raise PriorError(INCOMPLETE)
            channels, at = modules[at][1]["Conv_0.weight"][0], at + 1
            if at < len(modules) and modules[at][0] == "attention" and level not in attention:
                attention.append(level)
            at += level in attention
        if not blocks or not width or channels % width:
            raise PriorError(INCOMPLETE)
        multipliers.append(channels // width)
        at += 1 + beside
    return {"multipliers": tuple(multipliers), "attention": tuple(attention)}


def _outward(modules: list[tuple[str, Shapes]], channels: int) -> str:
    norms = [k for k, (kind, _) in enumerate(modules) if kind == "norm"]
    if len(norms) == 1:
        return "none"
    return "skip" if modules[norms[0] + 1][1].get("weight", (0,))[0] == channels else "residual"


def network(shapes: Shapes, flags: dict[str, Any]) -> NCSNppConfig | None:
    """The configuration from weights and training settings, which must not contradict each other.

    Args:
        shapes: of the weights, by name.
        flags: settings by their names in score_sde.

    Raises:
        PriorError: settings that the weights do not tell are missing, or one contradicts the weights.
    """
    found = recognise(shapes)
    if found is None:
        return None
    original = str(flags.get("name", "ncsnpp")).lower()
    if original not in ("ncsnpp", "ddpm") or flags.get("conditional") is False or flags.get("conv_size", 3) != 3:
        raise PriorError(
            f"model '{original}' of score_sde, or one that is not told the noise, cannot be read; use NCSN++"
        )
    if original == "ddpm":
        flags = {"skip_rescale": False, "fir": False} | flags
    told = _told(flags, len(found["multipliers"]))
    for name, value in told.items():
        if name in found and value != found[name]:
            raise PriorError(
                f"the configuration says {name} {value}, the weights say {found[name]}; is it that of another file?"
            )
    missing = [name for name, field in (("fir", "fir"), ("skip_rescale", "rescale")) if field not in found | told]
    missing += [name for name in ("sde", "centered") if flags.get(name) is None]
    if missing:
        raise PriorError(
            f"weights of NCSN++ do not tell {', '.join(missing)}: give the settings of its training with --config "
            "(score_sde's .py files, defaults first, or YAML or JSON)"
        )
    return NCSNppConfig(**(told | found), fixed_groups=original == "ddpm")


def _told(flags: dict[str, Any], levels: int) -> dict[str, Any]:
    """Fields of the configuration of so many levels that training settings fix.

    Raises:
        PriorError: a word that score_sde does not know.
    """
    found: dict[str, Any] = {}
    for name, field in (("nf", "width"), ("num_res_blocks", "blocks"), ("num_channels", "channels")):
        if flags.get(name) is not None:
            found[field] = int(numbers(flags[name])[0])
    for name, field in (("fir", "fir"), ("skip_rescale", "rescale"), ("centered", "centered")):
        if flags.get(name) is not None:
            found[field] = bool(flags[name])
    tables = (
        *(("progressive_input", "inward", JOINT_NAMES), ("progressive", "outward", JOINT_NAMES)),
        *(("resblock_type", "biggan", BLOCKS), ("embedding_type", "fourier", EMBEDDINGS)),
    )
    ddpm = str(flags.get("name", "")).lower() == "ddpm"  # settings of NCSN++ in its file mean nothing
    for name, field, table in tables if not ddpm else ():
        word = str(flags.get(name) if flags.get(name) is not None else "none").lower()  # None is written without quotes
        if name in flags and word not in table:
            raise PriorError(f"{name} '{flags[name]}' of the configuration: one of {', '.join(table)} can be read")
        if name in flags:
            found[field] = table[word]
    if flags.get("nonlinearity"):
        found["activation"] = str(flags["nonlinearity"]).lower()
    if taps := numbers(flags.get("fir_kernel")):
        found["taps"] = tuple(taps)
    if multipliers := numbers(flags.get("ch_mult")):
        found["multipliers"] = tuple(int(m) for m in multipliers)
    if flags.get("image_size") and "attn_resolutions" in flags:
        sides = [int(numbers(flags["image_size"])[0]) // 2**k for k in range(levels)]
        found["attention"] = tuple(k for k in range(levels) if sides[k] in numbers(flags["attn_resolutions"]))
    return found


def convention(config: NCSNppConfig, flags: dict[str, Any]) -> dict[str, Any]:
    """Fields of :class:`Convention` from the settings of the SDE (Song et al. 2021, appendices B and C).

    Raises:
        PriorError: an unknown SDE, or its noise levels are missing.
    """
    sde, scaled = str(flags.get("sde")).lower(), bool(flags.get("scale_by_sigma", False))
    found: dict[str, Any] = {}
    if config.channels == 2:
        found["prior_range"] = (-2.0, 2.0)  # complex images: magnitudes from 0 to 2
    elif not config.centered:
        found["network_range"] = (0.0, 1.0)
    continuous, count = bool(flags.get("continuous", config.fourier)), int(flags.get("num_scales", 1000))
    if sde == "vesde":
        if any(flags.get(name) is None for name in ("sigma_min", "sigma_max")):
            raise PriorError(
                "the configuration has no sigma_min and sigma_max: give those of the training with --config"
            )
        found |= {"predicts": "minus-eps" if scaled else "score", "process": "ve"}
        found |= {name: float(flags[name]) for name in ("sigma_min", "sigma_max")}
        index = {"label_scale": 1.0 - count, "label_offset": count - 1.0}  # counted from the largest
        return found | ({"label": "sigma"} if continuous else index)
    if sde not in ("vpsde", "subvpsde") or scaled:
        raise PriorError(f"sde '{sde}', scale_by_sigma {scaled}: vesde, or vpsde and subvpsde without it, can be read")
    first, last = (float(flags.get(name, value)) for name, value in (("beta_min", 0.1), ("beta_max", 20.0)))
    if continuous or sde == "subvpsde":
        process = "vp-linear" if sde == "vpsde" else "subvp-linear"
        return found | {"process": process, "beta_first": first, "beta_last": last, "label_scale": 999.0}
    return found | {"steps": count, "beta_first": first / count, "beta_last": last / count}
