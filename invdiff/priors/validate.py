"""Held-out denoising: the network against TV, non-local means and BM3D with the oracle noise level."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.priors.training_data import Source
from invdiff.priors.unet import EDMDenoiser

Denoise = Callable[[Tensor, Tensor], Tensor]
SIGMAS = (0.03, 0.05, 0.1, 0.3)


def classical_denoisers() -> dict:
    """Denoisers ``f(noisy, sigma)`` of the packages that are installed (scikit-image, bm3d); never required."""
    found = {}
    try:
        from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
    except ImportError:
        pass
    else:
        found["TV"] = lambda x, s: max(
            (denoise_tv_chambolle(x, weight=w * s, eps=1e-4, max_num_iter=300) for w in (0.6, 0.9, 1.3)),
            key=lambda d: -abs(float(np.std(x - d)) - s),
        )
        found["NLM"] = lambda x, s: denoise_nl_means(x, 5, 9, h=0.7 * s, sigma=s, fast_mode=True)
    try:
        from bm3d import bm3d
    except ImportError:
        pass
    else:
        found["BM3D"] = bm3d
    return found


@dataclass
class DenoisingTable:
    """One row per source and noise level: PSNR in dB with data range 2 (both clipped to [-1, 1])."""

    methods: list[str]
    rows: list[dict] = field(default_factory=list)

    def lines(self) -> list[str]:
        head = f"{'source':28} {'sigma':>6} " + " ".join(f"{m:>8}" for m in ("noisy", *self.methods))
        body = [
            f"{r['source'][:28]:28} {r['sigma']:6.2f} " + " ".join(f"{r[m]:8.2f}" for m in ("noisy", *self.methods))
            for r in self.rows
        ]
        return [head, *body]


def psnr(estimate: np.ndarray, truth: np.ndarray) -> float:
    error = np.clip(estimate, -1, 1) - np.clip(truth, -1, 1)
    return float(10 * np.log10(4 / np.mean(error.astype(np.float64) ** 2)))


def denoising_table(
    denoise: Denoise,
    sources: Sequence[Source],
    slices: int = 4,
    classical: bool = True,
    labelled: Callable[[Tensor, Tensor, str], Tensor] | None = None,
) -> DenoisingTable:
    """Denoise evenly spaced slices of each source at every noise level of ``SIGMAS``.

    Args:
        denoise: ``f(x, sigma)`` with x ``(n, 1, H, W)`` and sigma ``(n,)``; sides need not fit the network's stride.
        sources: slices in the prior's range.
        slices: how many slices of each source.
        classical: compare with TV, non-local means and BM3D where installed.
        labelled: ``f(x, sigma, modality)``, the network when it is told the modality; a column of its own.
    """
    methods = (
        {"network": None} | ({"labelled": None} if labelled else {}) | (classical_denoisers() if classical else {})
    )
    table = DenoisingTable(list(methods))
    for source in sources:
        truth = _evenly(source, slices)
        for sigma in SIGMAS:
            noise = np.random.default_rng(0).standard_normal(truth.shape).astype(np.float32)
            noisy = truth + sigma * noise
            row = {"source": source.name, "subject": source.subject, "sigma": sigma, "noisy": psnr(noisy, truth)}
            x, levels = torch.from_numpy(noisy)[:, None], torch.full((len(noisy),), sigma)
            with torch.no_grad():
                row["network"] = psnr(denoise(x, levels)[:, 0].numpy(), truth)
                if labelled is not None:
                    row["labelled"] = psnr(labelled(x, levels, source.modality)[:, 0].numpy(), truth)
            for name, method in methods.items():
                if method is not None:
                    row[name] = psnr(np.stack([method(n.astype(np.float64), sigma) for n in noisy]), truth)
            table.rows.append(row)
    return table


def _evenly(source: Source, count: int) -> np.ndarray:
    """Evenly spaced slices of a source ``(n, H, W)``, cut to a multiple of 16 pixels that all of them have."""
    chosen = np.linspace(0, len(source.slices) - 1, count + 2)[1:-1].round().astype(int)
    picked = [source.slices[i] for i in chosen]
    high, wide = (max(n // 16 * 16, 1) for n in np.min([p.shape for p in picked], axis=0))
    return np.stack([p[:high, :wide] for p in picked])


def subject_psnr(net: EDMDenoiser, sources: Sequence[Source], slices: int = 2) -> dict[str, dict[str, float]]:
    """Denoising PSNR in dB by subject and noise level (as text), the mean over what there is of the subject."""
    device = next(net.parameters()).device
    table = denoising_table(lambda x, s: _whole(net, x.to(device), s.to(device)).cpu(), sources, slices, False)
    found: dict[str, dict[str, float]] = {}
    for subject in dict.fromkeys(row["subject"] for row in table.rows):
        rows = [row for row in table.rows if row["subject"] == subject]
        levels = {s: [row["network"] for row in rows if row["sigma"] == s] for s in SIGMAS}
        found[subject] = {str(s): round(float(np.mean(values)), 3) for s, values in levels.items()}
    return found


def _whole(net: EDMDenoiser, x: Tensor, sigma: Tensor) -> Tensor:
    """D of sides that need not fit the stride, slice by slice."""
    high, wide = x.shape[-2:]
    x = F.pad(x, (0, -wide % net.stride, 0, -high % net.stride), mode="replicate")
    return torch.cat([net(x[k : k + 1], sigma[k : k + 1]) for k in range(len(x))])[..., :high, :wide]
