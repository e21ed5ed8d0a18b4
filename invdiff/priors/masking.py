"""Which pixels of a training slice were measured, and which of these the network is shown."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.errors import UsageError


@dataclass(frozen=True)
class Measured:
    """Training on images of which only some pixels were ever measured; JSON-safe.

    Args:
        keep: share of the pixels of a training slice that is measured; the rest is forgotten before the training
            starts. 1 takes slices as they are (NaN is not measured).
        further: each crop shows the network a share of its measured pixels between this and 1; all measured ones are
            what it has to find. The less, the better it copes with other shares, whole images among them.
        block: pixels are measured and shown in squares of this many pixels a side.
        seed: of what is measured; the same slice is measured at the same pixels in every process and after a resume.

    Raises:
        UsageError: shares outside (0, 1], nothing left to find, or a block below 1.
    """

    keep: float = 0.6
    further: float = 0.5
    block: int = 1
    seed: int = 0

    def __post_init__(self):
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.block, self.seed))
        shares = 0 < self.keep <= 1 and 0 < self.further < 1
        if not whole or not shares or self.block < 1 or self.seed < 0:
            raise UsageError(
                f"measured {self}: needs 0 < keep <= 1, 0 < further < 1, and whole numbers block >= 1 and seed "
                ">= 0; with further 1 nothing would "
                "teach the network what lies between the measured pixels"
            )


def mask_slice(image: np.ndarray, measured: Measured, rng: np.random.Generator) -> np.ndarray:
    """``image`` ``(H, W)`` with NaN where it is not measured; the grid of blocks lies anywhere."""
    side = measured.block
    high, wide = (n // side + 2 for n in image.shape)
    top, left = rng.integers(side, size=2)
    keep = np.repeat(np.repeat(rng.random((high, wide)) < measured.keep, side, 0), side, 1)
    keep = keep[top : top + image.shape[0], left : left + image.shape[1]]
    return np.where(keep, image, np.float32("nan")).astype(np.float32)


def shown(x: Tensor, measured: Measured, rng: torch.Generator) -> Tensor:
    """Where the network sees ``x`` ``(batch, 1, H, W)``, bool: of each image a random share of its finite pixels."""
    side = measured.block
    grid = [n // side + 2 for n in x.shape[-2:]]
    share = 1 - (1 - measured.further) * torch.rand(len(x), 1, 1, 1, generator=rng)
    keep = (torch.rand(len(x), 1, *grid, generator=rng) < share).float()
    keep = F.interpolate(keep, scale_factor=float(side), mode="nearest") if side > 1 else keep
    corners = torch.randint(side, (len(x), 2), generator=rng).tolist()
    cut = torch.stack([k[:, i : i + x.shape[-2], j : j + x.shape[-1]] for k, (i, j) in zip(keep, corners, strict=True)])
    return (cut > 0.5) & x.isfinite().cpu()
