"""A denoising network as a prior: loading, padding, and calls in chunks of one fixed size."""

import copy
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from invdiff.errors import PriorError, ShapeError
from invdiff.priors.base import Prior, PriorInfo
from invdiff.priors.parametrization import Parametrized
from invdiff.priors.unet import EDMDenoiser, UNetConfig

FORMAT = "invdiff-unet-edm"
_MOST_WEIGHT = 1e4  # trained weights are around 1; a flipped bit makes 1e38
_MOST = {"channels": 2**14, "blocks": 64, "patch": 64, "embedding": 2**14}  # of a network that is no attack
_LEVELS = 12
_SMALL, _TOGETHER = 2 * 10**7, 4  # weights of a network whose activations of that many slices may be held at once


class NetworkPrior(Prior):
    """A denoising network on slices of any size.

    The network is called on chunks of exactly ``chunk`` slices (the last one filled up), so that results are equal
    bit for bit however slices are grouped; another chunk size is equal within rounding. Sides are padded to the
    network's stride by replication.

    Args:
        net: ``D(x, sigma)``, x ``(batch, C, H, W)``, sigma ``(batch,)``, with a ``stride``, on its device.
        info: its description.
        chunk: slices per call.
        kind: see :class:`Prior`.

    Raises:
        ShapeError: by ``denoise``, images of another number of channels.
        PriorError: ``info.label``, or the context of ``denoise``, is no class that it has.
    """

    def __init__(self, net: EDMDenoiser | Parametrized, info: PriorInfo, chunk: int = 1, kind: str = "mean"):
        self.net, self.info = net.eval().requires_grad_(False), info
        self.chunk, self.kind, self.stride = chunk, kind, net.stride
        self.together = _TOGETHER if sum(p.numel() for p in net.parameters()) <= _SMALL else 1
        self.low = False
        self._class(info.label)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def in_bfloat16(self) -> "NetworkPrior":
        """The same prior with convolutions and matrix products in bfloat16, where the network is one of float32.

        What EDM's preconditioning leaves to the network is multiplied by at most sigma: on a CT slice the two differ by
        0.3 % of sigma. A slice of 256 x 256 takes a third of the time on a processor with AMX.

        Raises:
            PriorError: a network in another precision.
        """
        if self.info.precision != "float32":
            raise PriorError(f"prior {self.info.name} runs in {self.info.precision}: drop prior.precision")
        other = copy.copy(self)
        other.low, other.info = True, replace(self.info, precision="bfloat16")
        return other

    def _class(self, label: str | None) -> int | None:
        """The number of a class, 0 for none; None for a network without classes."""
        if label is not None and label not in self.info.classes:
            known = f"its classes are {', '.join(self.info.classes)}" if self.info.classes else "it has none"
            raise PriorError(f"prior {self.info.name} has no class '{str(label)[:40]}': {known}")
        if not self.info.classes:
            return None
        return 0 if label is None else 1 + self.info.classes.index(label)

    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        if x.shape[-3] != self.info.channels:
            raise ShapeError(
                f"prior {self.info.name} is one of {self.info.channels} channels, the images have {x.shape[-3]}: "
                "use another prior"
            )
        number = self._class(self.info.label if context is None else context)
        told = () if number is None else (torch.full((self.chunk,), number, device=x.device),)
        sigma = min(max(sigma, self.info.sigma_min), self.info.sigma_max)
        flat = x.reshape(-1, *x.shape[-3:])
        self.calls += len(flat)
        height, width = x.shape[-2:]
        bottom, right = -height % self.stride, -width % self.stride
        parts = []
        for i in range(0, len(flat), self.chunk):
            part = flat[i : i + self.chunk]
            count = len(part)
            if count < self.chunk:
                part = torch.cat([part, part[-1:].expand(self.chunk - count, -1, -1, -1)])
            if bottom or right:
                part = F.pad(part, (0, right, 0, bottom), mode="replicate")
            part = part.to(torch.float32).contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.low):
                out = self.net(part, part.new_full((self.chunk,), sigma), *told)
            parts.append(out[:count, :, :height, :width].to(x.dtype))
        return torch.cat(parts).contiguous().reshape(x.shape)


def load_network(
    folder: Path, device: str | torch.device = "cpu", chunk: int | None = None, label: str | None = None
) -> NetworkPrior:
    """Load ``model.safetensors`` and ``config.json`` of a folder; strict keys and shapes, finite weights.

    ``label`` is a class that the prior is told throughout; it becomes part of its name.

    Raises:
        PriorError: a file is missing or damaged, keys or shapes differ (the first five are named), or weights are
            not finite.
    """
    weights, card = folder / "model.safetensors", folder / "config.json"
    for path in (weights, card):
        if not path.is_file():
            raise PriorError(f"{path}: no such file; a prior is a folder with model.safetensors and config.json")
    try:
        config, info, state, expected = _read(weights, card)
    except PriorError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise PriorError(f"{folder}: cannot be read as a prior ({why}); restore it from its source") from None
    wrong = [k for k in (*expected, *state) if k not in state or expected.get(k) != state[k].shape]
    if wrong:
        raise PriorError(
            f"{weights}: keys or shapes differ from {config}, first {sorted(set(wrong))[:5]}; wrong config?"
        )
    if not all(v.is_floating_point() and bool((v.abs() <= _MOST_WEIGHT).all()) for v in state.values()):
        raise PriorError(
            f"{weights}: some weights are NaN, beyond {_MOST_WEIGHT:g} or integers; train or download it again"
        )
    net = EDMDenoiser(config)
    net.load_state_dict({k: v.float() for k, v in state.items()})
    device = torch.device(device)
    info = info if label is None else replace(info, name=f"{info.name}:{label}", label=label)
    net = net.to(device).to(memory_format=torch.channels_last)
    return NetworkPrior(net, info, chunk or (1 if device.type == "cpu" else 16))


def _read(weights: Path, card: Path) -> tuple[UNetConfig, PriorInfo, dict[str, Tensor], dict[str, torch.Size]]:
    """Architecture, description, weights by name, and the shapes that the architecture expects."""
    settings = json.loads(card.read_text())
    parts: list[dict[str, Any]] = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in settings[part].items()} for part in ("network", "info")
    ]
    config = UNetConfig(**parts[0])
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    info = PriorInfo(**parts[1], sha256=digest, file=weights.name, settings_sha256=settings_digest(settings["network"]))
    _check_numbers(config, info)
    with safe_open(weights, "pt") as archive:
        if (archive.metadata() or {}).get("format") != FORMAT:
            raise PriorError(f"{weights}: is not in the format {FORMAT}; import it first")
        state = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
    with torch.device("meta"):
        return config, info, state, {k: v.shape for k, v in EDMDenoiser(config).state_dict().items()}


def settings_digest(settings: Any) -> str:
    """SHA-256 of what JSON holds, whatever the order of names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _check_numbers(config: UNetConfig, info: PriorInfo) -> None:
    """What the shapes of the weights do not show, or only after an absurd network was built."""
    for name, most in _MOST.items():
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if not 1 <= len(values) <= _LEVELS or not all(type(n) is int and 1 <= n <= most for n in values):
            raise ValueError(f"{name} {str(value)[:40]} should be whole numbers from 1 to {most}")
    if not 0 < config.sigma_data <= 1e6:
        raise ValueError(f"sigma_data {config.sigma_data} is not positive, or absurd")
    if info.channels != 1 or not 0 < info.sigma_min < info.sigma_max < math.inf:
        raise ValueError(f"needs 1 channel and 0 < sigma_min < sigma_max, says {info}")
    low, high = info.value_range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"value_range {info.value_range} is no range")
    if len(info.classes) != config.classes:
        raise ValueError(f"the network has {config.classes} classes, {len(info.classes)} are named")
    if info.voxel_mm is not None:
        low, high = info.voxel_mm
        if not 0 < low <= high < math.inf:
            raise ValueError(f"voxel_mm {info.voxel_mm} is no range")
