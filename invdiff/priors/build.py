"""From a card and weights to a prior: strict names and shapes, finite weights, and a test on a noisy image.

A card is what ``config.json`` of an imported prior holds: ``architecture``, ``network``, ``convention``, ``info``, and
optionally ``kind``, ``precision``, ``check`` and ``source``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from invdiff.errors import PriorError
from invdiff.priors.architectures import architecture
from invdiff.priors.base import PriorInfo
from invdiff.priors.network import NetworkPrior, settings_digest
from invdiff.priors.parametrization import Convention, Parametrized

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build_prior(
    card: dict[str, Any],
    tensors: Mapping[str, Tensor],
    name: str,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
    chunk: int | None = None,
    ordered: Sequence[Tensor] | None = None,
) -> NetworkPrior:
    """The prior that a card describes, with these weights.

    Nothing is allocated before names and shapes agree with the weights.

    Args:
        card: see the module.
        tensors: weights by name.
        name: of the file, for messages.
        sha256: of the file.
        device: where the network runs.
        chunk: slices per call; None for 1 on a CPU and 16 on a GPU.
        ordered: averaged parameters that replace those of ``tensors``, in their order, without those never trained.

    Raises:
        PriorError: the card makes no prior, weights do not fit or are not finite, or the network does not denoise.
    """
    try:
        entry = architecture(card["architecture"])
        config, convention = entry.configure(card["network"]), Convention.from_dict(card["convention"])
        info: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card["info"].items()}
        precision = PRECISIONS[card.get("precision", "float32")]
        described = PriorInfo(**(info | {"sha256": sha256, "file": Path(name).name} | identity(card)))
        _check_info(described, describe_convention(convention) | {"channels": config.channels})
    except PriorError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise PriorError(f"{name}: its card lacks or misuses {error}; import the prior again") from None
    try:
        with torch.device("meta"):
            net = entry.build(config)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError, NameError) as error:
        if isinstance(error, PriorError):
            raise
        why = " ".join(str(error).split())[:160]
        raise PriorError(f"{name}: its network cannot be built ({why}); correct its configuration") from None
    state = fitted(net, tensors, name, f"{card['architecture']} {_short(card['network'])}", ordered)
    net.load_state_dict(state, assign=True)
    if any(part.is_meta for part in (*net.parameters(), *net.buffers())):  # what is no part of a state has to be made
        net = entry.build(config)
        net.load_state_dict(state)
    device = torch.device(device)
    net = nn.Module.to(net, device, precision)  # networks of diffusers have a ``to`` of their own, which warns
    net = nn.Module.to(net, memory_format=torch.channels_last)
    whole = Parametrized(net, convention, config.channels, config.stride)
    prior = NetworkPrior(whole, described, chunk or (1 if device.type == "cpu" else 16), card.get("kind", "mean"))
    if card.get("check", True):
        check_denoiser(prior, name)
    return prior


def _check_info(info: PriorInfo, follows: dict[str, Any]) -> None:
    """Raise ValueError where what a card says of images does not follow from its network and convention."""
    for name, value in follows.items():
        told = getattr(info, name)
        if not np.allclose(np.asarray(told, float), value, rtol=1e-6):
            raise ValueError(f"info.{name} {str(told)[:40]}, which would be {value}")
    if not (info.size is None or (type(info.size) is int and info.size > 0)) or info.classes:
        raise ValueError(f"info.size {str(info.size)[:40]} or info.classes {str(info.classes)[:40]}")


def identity(card: dict[str, Any]) -> dict[str, Any]:
    """Fields of :class:`PriorInfo` that say which prior a card makes of its weights."""
    decisive = {key: card.get(key) for key in ("architecture", "network", "convention", "kind", "precision")}
    precision = card.get("precision", "float32")
    return {"format": card["architecture"], "precision": precision, "settings_sha256": settings_digest(decisive)}


def describe_convention(convention: Convention) -> dict[str, Any]:
    """Fields of :class:`PriorInfo` that follow from a convention: range and noise levels in the prior's units."""
    low, high = (sigma / convention.gain for sigma in convention.sigma_range)
    return {"value_range": convention.prior_range, "sigma_min": low, "sigma_max": high}


def fitted(
    net: nn.Module, tensors: Mapping[str, Tensor], name: str, expected: str, ordered: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """The state of ``net`` from these weights, in float32: all names, all shapes, finite numbers, nothing left over.

    Raises:
        PriorError: else; names the first five of each kind.
    """
    state = dict(tensors)
    if ordered is not None:
        trained = {key for key, p in net.named_parameters() if p.requires_grad}
        names = [key for key in tensors if key in trained]  # in the order of the file, which is that of its network
        if len(names) != len(ordered):
            raise PriorError(
                f"{name}: has {len(ordered)} averaged parameters, {expected} has {len(names)}; give the configuration "
                "of its own training"
            )
        state |= dict(zip(names, ordered, strict=True))
    shapes = {key: part.shape for key, part in net.state_dict().items()}
    found = {
        "missing": [k for k in shapes if k not in state],
        "unexpected": [k for k in state if k not in shapes],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(shapes[k])}"
            for k in shapes
            if k in state and state[k].shape != shapes[k]
        ],
    }
    if any(found.values()):
        text = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:5])}" for what, keys in found.items() if keys)
        raise PriorError(f"{name}: weights do not fit {expected}: {text}; give the configuration of its own training")
    for key, tensor in state.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise PriorError(f"{name}: weights {key} are NaN, infinite or integers; get the file from its source again")
    # Copies, because how a file aligns its tensors in memory would show in the last bits of a convolution.
    return {key: tensor.to(torch.float32, copy=True) for key, tensor in state.items()}


def _short(network: dict[str, Any]) -> str:
    return f"({', '.join(f'{k} {v}' for k, v in list(network.items())[:6])})"[:200]


def check_denoiser(prior: NetworkPrior, name: str) -> None:
    """Denoise an image of steps and ramps: little noise must leave it as it is, much noise must go.

    With sigma of 1 % of the range (or the least the network knows) the error is below a tenth of the range; of noise
    alone, with sigma of 10 times the range or the most it knows, less than half is left.

    Raises:
        PriorError: neither weights nor convention can be right then.
    """
    info = prior.info
    low, high = info.value_range
    half, side = (high - low) / 2, max(32, 2 * prior.net.stride)
    ramp = torch.linspace(-0.5, 0.5, side).expand(info.channels, side, side)
    image = (low + high) / 2 + half * (ramp + 0.3 * (ramp.mT > 0).float())[None]
    device = next(prior.net.parameters()).device
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(device)
    image = image.to(device)
    small = max(info.sigma_min, 0.02 * half)
    large = min(info.sigma_max, 20 * half)
    with torch.no_grad():
        error = _rms(prior.denoise(image + small * noise, small) - image)
        left = _rms(prior.denoise(image + large * noise, large) - image) if large > 5 * half else 0.0
    prior.calls = 0
    what = ""
    if not error <= max(0.2 * half, 3 * small):
        what = f"of an image with little noise (sigma {small:.3g}) it returns one with an error of {error:.3g}"
    elif not left <= 0.5 * large:
        what = f"of noise of sigma {large:.3g} it leaves {left:.3g}"
    if what:
        raise PriorError(
            f"{name}: does not denoise ({what}): weights, prediction kind, noise schedule or --range are wrong; "
            "--no-check loads it nevertheless"
        )


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())
