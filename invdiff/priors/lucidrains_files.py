"""What a file of denoising-diffusion-pytorch says about its network and its noise: everything, in version 2."""

from typing import Any

from invdiff.errors import PriorError
from invdiff.priors.lucidrains import LucidrainsConfig

NEEDED = ("init_conv.weight", "time_mlp.1.weight", "mid_block1.block1.proj.weight", "final_conv.weight")
OBJECTIVES = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}


def network(shapes: dict[str, tuple[int, ...]], flags: dict[str, Any]) -> LucidrainsConfig | None:
    """The configuration that names and shapes of the weights tell, or None if they are not of this network.

    Raises:
        PriorError: the names are of this network, but of version 1, or incomplete.
    """
    if not {"init_conv.weight", "time_mlp.1.weight", "mid_block1.block1.proj.weight", "final_conv.weight"} <= set(
        shapes
    ):
        return None
    levels = 0
    while f"downs.{levels}.2.mem_kv" in shapes:
        levels += 1
    if not levels or "mid_attn.mem_kv" not in shapes:
        raise PriorError(
            "weights of denoising-diffusion-pytorch before version 2.0, or of a part of its network; only version 2 "
            "can be read"
        )
    first, taken, *_ = shapes["init_conv.weight"]
    given = shapes["final_conv.weight"][0]
    names = [f"downs.{k}.3.{'1.' if k < levels - 1 else ''}weight" for k in range(levels)]
    if missing := [name for name in names if name not in shapes]:
        raise PriorError(f"weights of denoising-diffusion-pytorch without {missing[0]}; get the whole file")
    full = tuple(f"downs.{k}.2.to_out.weight" in shapes for k in range(levels))
    memory = [shapes[f"downs.{k}.2.mem_kv"] for k in range(levels)]
    alone = taken == 2 * given  # an image and an estimate of it go in, one image comes out
    return LucidrainsConfig(
        channels=given if alone else taken,
        out_channels=given,
        dim=shapes["time_mlp.1.weight"][1],
        widths=(first, *(shapes[name][0] for name in names)),
        full=full,
        heads=tuple(m[1] for m in memory),
        head_channels=tuple(m[3 if f else 2] for m, f in zip(memory, full, strict=True)),
        memories=shapes["mid_attn.mem_kv"][2],
        self_condition=alone,
    )


def convention(config: LucidrainsConfig, flags: dict[str, Any]) -> dict[str, Any]:
    """Fields of :class:`Convention`: the table of betas in the file, and what is predicted, told by loss weights.

    With snr the ratio of signal and noise variance, the package weights the loss by 1 for the noise, by snr for the
    image and by snr / (1 + snr) for v; weights clipped to a largest snr agree with these where noise is strong.

    Raises:
        PriorError: the file has no table (weights saved alone), or the objective is not told.
    """
    betas = flags.get("betas")
    if not isinstance(betas, tuple | list) or len(betas) < 2:
        raise PriorError(
            "nothing says how noise was added: give the trainer's whole file (model-N.pt), which holds the betas"
        )
    objective = flags.get("objective") or _objective(betas, flags.get("loss_weight"))
    if objective not in OBJECTIVES:
        raise PriorError(f"objective '{objective}' of the network: give one of {', '.join(OBJECTIVES)} with --config")
    return {"predicts": OBJECTIVES[objective], "betas": tuple(betas), "steps": len(betas)}


def _objective(betas, weights) -> str | None:
    """The objective whose loss weights these are at three quarters of the table, or None."""
    if weights is None or len(weights) != len(betas):
        return None
    k, bar = 3 * len(betas) // 4, 1.0
    for beta in betas[: k + 1]:
        bar *= 1 - beta
    snr = bar / (1 - bar)
    expected = {"pred_noise": 1.0, "pred_x0": snr, "pred_v": snr / (1 + snr)}
    near = [name for name, value in expected.items() if abs(weights[k] - value) <= 0.01 * value]
    return near[0] if len(near) == 1 else None
