"""Whether samples are copies of training slices: the nearest one, wherever and however it lies."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.errors import ShapeError
from invdiff.priors.training_data import Source

_SIDE = 64  # pixels to which images are averaged down before they are compared
_CONTRAST = 0.1  # least standard deviation of a held-out crop: air is near to air


@dataclass(frozen=True)
class Memorisation:
    """Distances to the nearest training slice, see :func:`nearest`.

    Attributes:
        samples: of every sample.
        held_out: of crops of subjects that were not trained on; empty where there are none.
        slices: training slices compared with.
    """

    samples: tuple[float, ...]
    held_out: tuple[float, ...]
    slices: int

    @property
    def nearer(self) -> int:
        """Samples that are nearer to a training slice than every held-out crop."""
        return sum(d < min(self.held_out) for d in self.samples) if self.held_out else 0

    def sentence(self) -> str:
        """What was found, and what it does not say."""
        found = (
            f"{np.median(self.samples):.2f} of its contrast (smallest of {len(self.samples)}: {min(self.samples):.2f})"
        )
        text = f"memorisation: the nearest of {self.slices} training slices differs from a sample by {found}"
        if not self.held_out:
            return f"{text}; with no held-out subject there is nothing to compare this with"
        other = f"{np.median(self.held_out):.2f} (smallest of {len(self.held_out)}: {min(self.held_out):.2f})"
        chance = len(self.samples) / (len(self.held_out) + 1)
        return (
            f"{text}, from a crop of a subject not trained on by {other}; {self.nearer} samples are nearer than every "
            f"such crop, {chance:.1f} would be by chance. Copies at another scale or of parts of a slice are not found"
        )

    def as_dict(self) -> dict:
        """JSON-safe, with the sentence."""
        return asdict(self) | {"nearer": self.nearer, "sentence": self.sentence()}


def check_memorisation(
    samples: np.ndarray, train: Sequence[Source], held_out: Sequence[Source], crops: int = 16, most: int = 1500
) -> Memorisation:
    """Compare samples, and crops of other subjects, with what was trained on.

    Args:
        samples: ``(n, H, H)`` in the prior's range.
        train: what was trained on.
        held_out: of other subjects.
        crops: random crops of the held-out subjects, as large as samples.
        most: training slices at most, evenly spaced.
    """
    whole = [image for source in train for image in source.slices]
    chosen = [whole[k * len(whole) // min(most, len(whole))] for k in range(min(most, len(whole)))]
    others = _crops(held_out, samples.shape[-2:], crops)
    found = nearest(np.concatenate([samples, others]), chosen)
    return Memorisation(tuple(found[: len(samples)]), tuple(found[len(samples) :]), len(chosen))


def _crops(sources: Sequence[Source], shape: tuple[int, ...], count: int) -> np.ndarray:
    """Random crops with some contrast; fewer where they are hard to find."""
    rng = np.random.default_rng(0)
    found: list[np.ndarray] = []
    for _ in range(20 * count if sources else 0):
        source = sources[int(rng.integers(len(sources)))]
        image = _padded(source.slices[int(rng.integers(len(source.slices)))], shape)
        i, j = (int(rng.integers(n - side + 1)) for n, side in zip(image.shape, shape, strict=True))
        crop = image[i : i + shape[0], j : j + shape[1]]
        if crop.std() > _CONTRAST and len(found) < count:
            found.append(crop)
    return np.stack(found) if found else np.zeros((0, *shape), np.float32)


def nearest(images: np.ndarray, slices: Iterable[np.ndarray]) -> list[float]:
    """For each image the least |image - crop| / |image - mean(image)| over all crops of all slices and their turns.

    Crops lie anywhere, flipped and turned in 8 ways: all positions at once by the correlation theorem,
    |a - b|^2 = |a|^2 - 2 <a, b> + |b|^2. Images are averaged down to about 64 pixels a side first. 0 is a copy; an
    image that only its mean explains has 1.

    Args:
        images: ``(n, H, H)``.
        slices: ``(h, w)`` of any size, edges repeated where smaller than an image.

    Raises:
        ShapeError: images that are not square.
    """
    if images.ndim != 3 or images.shape[1] != images.shape[2]:
        raise ShapeError(f"nearest expects square images (n, H, H), got {images.shape}")
    factor = max(1, images.shape[1] // _SIDE)
    small = _smaller(torch.from_numpy(np.ascontiguousarray(images)).float(), factor)
    turned = torch.stack([torch.rot90(x, k, (1, 2)) for x in (small, small.flip(2)) for k in range(4)])
    best = torch.full((len(small),), torch.inf)
    for image in slices:
        padded = torch.from_numpy(np.ascontiguousarray(_padded(image, images.shape[1:]))).float()
        field = _smaller(padded[None], factor)[0]
        for view in turned:
            best = torch.minimum(best, _least(view, field))
    spread = (small - small.mean((1, 2), keepdim=True)).square().sum((1, 2))
    return (best.clamp(min=0) / spread.clamp(min=1e-12)).sqrt().tolist()


def _least(images: Tensor, field: Tensor) -> Tensor:
    """min over positions of |image - crop of the field|^2, ``(n,)``."""
    high, wide = (n - side + 1 for n, side in zip(field.shape, images.shape[1:], strict=True))
    spectrum = torch.fft.rfft2(field)
    inner = torch.fft.irfft2(spectrum * torch.fft.rfft2(images, field.shape).conj(), field.shape)[:, :high, :wide]
    sums = F.pad(field.double().square().cumsum(0).cumsum(1), (1, 0, 1, 0))
    a, b = images.shape[1:]
    energy = sums[a:, b:] - sums[:-a, b:] - sums[a:, :-b] + sums[:-a, :-b]
    distance = images.square().sum((1, 2))[:, None, None] - 2 * inner + energy.float()
    return distance.amin((1, 2))


def _smaller(x: Tensor, factor: int) -> Tensor:
    return F.avg_pool2d(x[:, None], factor)[:, 0] if factor > 1 else x


def _padded(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """With its edges repeated up to ``shape``, where it is smaller."""
    pad = [(max(0, side - n) // 2, max(0, side - n + 1) // 2) for n, side in zip(image.shape, shape, strict=True)]
    return np.pad(image, pad, mode="edge")
