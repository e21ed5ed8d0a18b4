"""A denoising network as a prior: loading, padding, and calls in chunks of one fixed size."""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from invdiff.errors import PriorError
from invdiff.priors.base import Prior, PriorInfo
from invdiff.priors.unet import EDMDenoiser, UNetConfig

FORMAT = "invdiff-unet-edm"


class NetworkPrior(Prior):
    """The EDM-preconditioned U-Net on slices of any size.

    The network is called on chunks of exactly ``chunk`` slices (the last one filled up), so that results are equal
    bit for bit however slices are grouped; another chunk size is equal within rounding. Sides are padded to the
    network's stride by replication.

    Args:
        net: the network, on its device, in eval mode.
        info: its description.
        chunk: slices per call.
    """

    def __init__(self, net: EDMDenoiser, info: PriorInfo, chunk: int = 1):
        self.net, self.info, self.chunk = net.eval().requires_grad_(False), info, chunk

    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        sigma = min(max(sigma, self.info.sigma_min), self.info.sigma_max)
        flat = x.reshape(-1, *x.shape[-3:])
        self.calls += len(flat)
        height, width = x.shape[-2:]
        stride = self.net.config.stride
        bottom, right = -height % stride, -width % stride
        parts = []
        for i in range(0, len(flat), self.chunk):
            part = flat[i : i + self.chunk]
            count = len(part)
            if count < self.chunk:
                part = torch.cat([part, part[-1:].expand(self.chunk - count, -1, -1, -1)])
            if bottom or right:
                part = F.pad(part, (0, right, 0, bottom), mode="replicate")
            part = part.to(torch.float32).contiguous(memory_format=torch.channels_last)
            out = self.net(part, torch.full((self.chunk,), sigma, device=x.device))
            parts.append(out[:count, :, :height, :width].to(x.dtype))
        return torch.cat(parts).contiguous().reshape(x.shape)


def load_network(folder: Path, device: str | torch.device = "cpu", chunk: int | None = None) -> NetworkPrior:
    """Load ``model.safetensors`` and ``config.json`` of a folder; strict keys and shapes, finite weights.

    Raises:
        PriorError: a file is missing or damaged, keys or shapes differ (the first five are named), or weights are
            not finite.
    """
    weights, card = folder / "model.safetensors", folder / "config.json"
    for path in (weights, card):
        if not path.is_file():
            raise PriorError(f"{path}: no such file; a prior is a folder with model.safetensors and config.json")
    try:
        settings = json.loads(card.read_text())
        network = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["network"].items()}
        config = UNetConfig(**network)
        info = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["info"].items()}
        with safe_open(weights, "pt") as archive:
            if (archive.metadata() or {}).get("format") != FORMAT:
                raise PriorError(f"{weights}: is not in the format {FORMAT}; import it first")
            state = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PriorError(f"{folder}: cannot be read as a prior ({error}); restore it from its source") from None
    with torch.device("meta"):
        expected = {k: v.shape for k, v in EDMDenoiser(config).state_dict().items()}
    wrong = [k for k in (*expected, *state) if k not in state or expected.get(k) != state[k].shape]
    if wrong:
        raise PriorError(f"{weights}: keys or shapes differ from {config}, first {sorted(set(wrong))[:5]}; wrong config?")
    if not all(bool(torch.isfinite(v).all()) for v in state.values()):
        raise PriorError(f"{weights}: some weights are NaN or infinite; train or download it again")
    net = EDMDenoiser(config)
    net.load_state_dict({k: v.float() for k, v in state.items()})
    device = torch.device(device)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    net = net.to(device, memory_format=torch.channels_last)
    return NetworkPrior(net, PriorInfo(**info, sha256=digest), chunk or (1 if device.type == "cpu" else 16))
