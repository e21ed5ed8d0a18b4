"""Held-out denoising: the network against TV, non-local means and BM3D with the oracle noise level."""

from dataclasses import dataclass, field

import numpy as np
import torch

from invdiff.priors.training_data import Source

SIGMAS = (0.03, 0.05, 0.1, 0.3)


def _classical() -> dict:
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


def _psnr(estimate: np.ndarray, truth: np.ndarray) -> float:
    error = np.clip(estimate, -1, 1) - np.clip(truth, -1, 1)
    return float(10 * np.log10(4 / np.mean(error.astype(np.float64) ** 2)))


def denoising_table(denoise, sources: list[Source], slices: int = 4, classical: bool = True) -> DenoisingTable:
    """Denoise evenly spaced slices of each source at every noise level of ``SIGMAS``.

    Args:
        denoise: ``f(x, sigma)`` with x ``(n, 1, H, W)`` and sigma ``(n,)``; sides need not fit the network's stride.
        sources: slices in the prior's range.
        slices: how many slices of each source.
        classical: compare with TV, non-local means and BM3D where installed.
    """
    methods = {"network": None} | (_classical() if classical else {})
    table = DenoisingTable(list(methods))
    for source in sources:
        chosen = np.linspace(0, len(source.slices) - 1, slices + 2)[1:-1].round().astype(int)
        truth = np.stack(
            [s[: s.shape[0] // 16 * 16, : s.shape[1] // 16 * 16] for s in (source.slices[i] for i in chosen)]
        )
        for sigma in SIGMAS:
            noise = np.random.default_rng(0).standard_normal(truth.shape).astype(np.float32)
            noisy = truth + sigma * noise
            row = {"source": source.name, "sigma": sigma, "noisy": _psnr(noisy, truth)}
            with torch.no_grad():
                x = torch.from_numpy(noisy)[:, None]
                row["network"] = _psnr(denoise(x, torch.full((len(x),), sigma))[:, 0].numpy(), truth)
            for name in table.methods[1:]:
                row[name] = _psnr(np.stack([methods[name](n.astype(np.float64), sigma) for n in noisy]), truth)
            table.rows.append(row)
    return table
