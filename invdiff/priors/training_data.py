"""What the trainer learns from: slices of volumes, random 2D phantoms, and the crops made of them."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.errors import InputError, UsageError
from invdiff.files import label, show
from invdiff.intensity import check_hu_range, magnitude_map
from invdiff.priors.masking import Measured, mask_slice
from invdiff.priors.random_phantoms import random_phantom
from invdiff.volume import is_part_of_series, load_volume, to_slices

warnings = logging.getLogger("invdiff")
MODALITIES = ("CT", "image", "phantom")
PICTURES = (".png", ".tif", ".tiff")


@dataclass(frozen=True)
class Source:
    """Slices of one file in the prior's range: float32 arrays ``(H, W)``; CT is HU / 1000, the rest about [-1, 1].

    Attributes:
        name: of the file.
        modality: "CT", "image" or "phantom".
        slices: pixels that were never measured are NaN.
        subject: who is shown; sources of one subject are validated together.
    """

    name: str
    modality: str
    slices: tuple[np.ndarray, ...]
    subject: str = ""

    @cached_property
    def digest(self) -> str:
        """What tells these slices from others, whatever their file is called: 16 hexadecimal digits of SHA-256."""
        found = hashlib.sha256()
        for image in self.slices:
            found.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        return found.hexdigest()[:16]


def load_source(path: Path, min_content: float = 0.1, name: str = "", subject: str = "") -> Source:
    """Slices of one volume of any format (an array ``hu`` of an npz is CT), mapped to the prior's range.

    The pictures of a folder may be of different sizes; they share one scale of grey, from 0, or from the 0.5th
    percentile where that is negative, to the 99.5th of what is not background.

    Args:
        path: a file, a DICOM series as a folder, or a folder of pictures.
        min_content: slices with a smaller share of pixels that are not air are left out.
        name: what logs and weights call it; the name of the file where none is given.
        subject: see :class:`Source`.

    Raises:
        InputError: unreadable, constant, CT that is not in HU, or without any slice that shows something.
    """
    modality, slices = _read(path)
    values = _values(slices)
    if not values.max() > values.min():
        raise InputError(f"{show(path)}: is constant ({values.min():.6g}), there is nothing to learn; leave it out")
    if modality == "CT":
        try:
            check_hu_range(values)
        except InputError as error:
            why = str(error).partition(";")[0]
            raise InputError(f"{show(path)}: {why}; give it in HU, not clipped to a window, or leave it out") from None
        slices = [np.clip(s, -1024, 3071) / 1000 for s in slices]
    elif np.percentile(values, 0.5) < 0:
        try:
            scale = magnitude_map(values)
        except InputError as error:
            raise InputError(f"{show(path)}: {str(error).partition(';')[0]}; leave it out") from None
        slices = [np.clip(scale.invert(s), -1, 2) for s in slices]
    else:
        inside = values[values > values.mean() * 0.1]
        high = float(np.percentile(inside, 99.5)) if inside.size else 0.0
        if not high > 0:
            raise InputError(f"{show(path)}: shows nothing (no values above 0); leave it out")
        slices = [np.clip(2 * s / high - 1, -1, 2) for s in slices]
    kept = tuple(s.astype(np.float32) for s in slices if (s > -0.9).mean() > min_content)
    if not kept:
        raise InputError(f"{show(path)}: no slice shows more than air; leave it out")
    return Source(name or label(path), modality, kept, subject or name or label(path))


def _values(slices: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(slices) if len({s.shape for s in slices}) == 1 else np.concatenate([s.ravel() for s in slices])


def _read(path: Path) -> tuple[str, list[np.ndarray]]:
    """Modality and slices ``(H, W)`` in the units of the file."""
    inside = sorted(p for p in path.iterdir() if p.name[0] != "." and not p.is_dir()) if path.is_dir() else []
    pictures = [p for p in inside if p.name.lower().endswith(PICTURES)]
    others = (p for p in inside if not p.name.lower().endswith(PICTURES))
    if pictures and not any(map(is_part_of_series, others)):  # each may have a size of its own
        volumes = [load_volume(p, modality="image") for p in pictures]
    else:
        volumes = [load_volume(path)]
    modality = "CT" if volumes[0].modality == "CT" else "image"
    return modality, [s for v in volumes for s in to_slices(v, axis="auto", allow_shear=True).data]


class CropSampler:
    """Endless random crops: a source by weight, a slice, one of 8 flips and turns, half of them zoomed.

    Args:
        sources: what is learnt from.
        weights: share of each modality, and factors for single files by name.
        phantoms: number of random phantoms that are made besides.
        seed: of phantoms and crops.
        measured: which pixels of a slice were measured; the others are forgotten (NaN), and crops are not zoomed,
            because a zoom would mix them. None where all are known.

    Raises:
        UsageError: no data have a positive weight.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: dict[str, float],
        phantoms: int,
        seed: int,
        measured: Measured | None = None,
    ):
        self.rng = np.random.default_rng(seed)
        made = tuple(random_phantom(self.rng) for _ in range(phantoms))
        self.sources = [*sources, Source("random phantoms", "phantom", made)] if phantoms else list(sources)
        self.measured = measured
        if measured is not None:
            self.sources = [_masked(s, measured, k) for k, s in enumerate(self.sources)]
        self.p = self._probabilities(weights)

    def _probabilities(self, weights: dict[str, float]) -> np.ndarray:
        """Modality share by ``weights``, inside a modality by sqrt(number of slices), times a weight per file name."""
        known = {*MODALITIES, *(s.name for s in self.sources)}
        if unknown := [name for name in weights if name not in known]:
            warnings.warning("training option weights: no data are called %s", ", ".join(map(show, sorted(unknown))))
        p = np.array([len(s.slices) ** 0.5 * weights.get(s.name, 1.0) for s in self.sources])
        modality = np.array([s.modality for s in self.sources])
        for m in set(modality):
            p[modality == m] *= weights.get(m, 1.0) / (p[modality == m].sum() or 1.0)
        if not p.sum() > 0:
            raise UsageError("training option weights: all data have the weight 0; give some of them more")
        return p / p.sum()

    def crop(self, size: int) -> np.ndarray:
        """One crop ``(size, size)``."""
        return self._draw(size)[0]

    def _draw(self, size: int) -> tuple[np.ndarray, str]:
        """A crop and its modality."""
        rng = self.rng
        source = self.sources[rng.choice(len(self.sources), p=self.p)]
        image = source.slices[rng.integers(len(source.slices))]
        step = 1.0 if rng.random() < 0.5 else float(np.exp(rng.uniform(np.log(0.75), np.log(2.0))))
        side = max(2, round(size * step)) if self.measured is None else size
        pad = [(max(0, side - n) // 2, max(0, side - n + 1) // 2) for n in image.shape]
        if any(map(any, pad)):
            image = np.pad(image, pad, mode="edge")
        i, j = (int(rng.integers(n - side + 1)) for n in image.shape)
        image = image[i : i + side, j : j + side]
        if side != size:
            x = torch.from_numpy(np.ascontiguousarray(image))[None, None]
            image = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)[0, 0].numpy()
        image = np.rot90(image, int(rng.integers(4)))
        image = image[:, ::-1] if rng.random() < 0.5 else image
        if source.modality not in ("CT", "phantom"):  # magnitude images have no absolute scale
            image = (image + 1) * rng.uniform(0.6, 1.1) - 1
        return np.ascontiguousarray(image), source.modality

    def batches(self, size: int, batch: int) -> Iterator[Tensor]:
        """Endless batches ``(batch, 1, size, size)`` float32."""
        for x, _ in self.labelled(size, batch):
            yield x

    def labelled(self, size: int, batch: int, classes: Sequence[str] = ()) -> Iterator[tuple[Tensor, Tensor]]:
        """The same with class labels ``(batch,)``: 1 + index of the modality in ``classes``, 0 where it is in none."""
        number = {name: k for k, name in enumerate(classes, 1)}
        while True:
            drawn = [self._draw(size) for _ in range(batch)]
            labels = torch.tensor([number.get(modality, 0) for _, modality in drawn])
            yield torch.from_numpy(np.stack([image for image, _ in drawn]))[:, None], labels


def _masked(source: Source, measured: Measured, index: int) -> Source:
    """The source as it was measured: what a slice is measured at is drawn once and for all."""
    slices = []
    for k, image in enumerate(source.slices):
        rng = np.random.default_rng((measured.seed, index, k))
        slices.append(mask_slice(image, measured, rng))
    return Source(source.name, source.modality, tuple(slices), source.subject)
