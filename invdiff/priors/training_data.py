"""What the trainer learns from: slices of volumes, random 2D phantoms, and the crops made of them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from invdiff.errors import InputError
from invdiff.files import label

#: Volumes of a folder; pictures and ``.npy`` beside them are taken only when they are named.
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz")


@dataclass(frozen=True)
class Source:
    """Slices of one file in the prior's range: float32 arrays ``(H, W)``; CT is HU / 1000, the rest about [-1, 1]."""

    name: str
    modality: str
    slices: tuple[np.ndarray, ...]


def find_volumes(paths: list[Path], split: str | None) -> list[Path]:
    """Volume files under ``paths``; in a folder with a ``manifest.json`` only the files of ``split`` are taken.

    Raises:
        InputError: a path does not exist, or nothing is left.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; give volumes, DICOM folders or slice stacks (.npz)")
        if path.is_file():
            found.append(path)
            continue
        manifest = path / "manifest.json"
        if split and manifest.exists():
            entries = json.loads(manifest.read_text())
            names = [e["file"] for e in entries if e.get("split") == split]
            found += [path / n for n in names if n.endswith(VOLUME_SUFFIXES)]
        else:
            inside = sorted(p for p in path.iterdir() if p.name.lower().endswith(VOLUME_SUFFIXES))
            found += inside or ([path] if any(p.is_file() for p in path.iterdir()) else [])  # one DICOM series
    if not found:
        raise InputError(
            f"no volumes of split '{split}' under {', '.join(map(str, paths))}: check the folder or --split"
        )
    return found


def load_source(path: Path, min_content: float = 0.1) -> Source:
    """Slices of one volume of any format (an array ``hu`` of an npz is CT), mapped to the prior's range."""
    from invdiff.volume import load_volume, to_slices

    volume = load_volume(path)
    modality = "CT" if volume.modality == "CT" else "image"
    stack = to_slices(volume, axis="auto", allow_shear=True).data
    if modality == "CT":
        stack = np.clip(stack, -1024, 3071) / 1000
    else:
        low, high = 0.0, float(np.percentile(stack[stack > stack.mean() * 0.1], 99.5))
        stack = np.clip(2 * (stack - low) / (high - low) - 1, -1, 2)
    content = (stack > -0.9).mean((1, 2))
    return Source(label(path), modality, tuple(s.astype(np.float32) for s in stack[content > min_content]))


def random_phantom(rng: np.random.Generator, size: int = 160) -> np.ndarray:
    """One random 2D phantom in CT-like range: an outline filled with superposed soft super-ellipses and texture."""
    axis = (np.arange(size, dtype=np.float32) - size / 2 + 0.5) / (size / 2)
    yy, xx = axis[:, None], axis[None, :]
    u = rng.uniform

    def blob(cx, cy, a, b, angle, power=2.0):
        c, s = np.cos(angle), np.sin(angle)
        x, y = (xx - cx) * c + (yy - cy) * s, (yy - cy) * c - (xx - cx) * s
        d = (np.abs(x / a) ** power + np.abs(y / b) ** power) ** (1 / power)
        return np.clip((1 - d) * min(a, b) * size / 2 + 0.5, 0, 1)

    body = blob(u(-0.05, 0.05), u(-0.05, 0.05), u(0.5, 0.95), u(0.5, 0.95), u(0, 3.14), u(1.8, 3))
    image = np.where(body > 0, u(-0.15, 0.15), 0.0).astype(np.float32)
    for _ in range(rng.integers(5, 45)):
        small = u() < 0.6
        a, b = (u(0.01, 0.08, 2)) if small else (u(0.05, 0.4, 2))
        value = rng.choice([u(-0.9, -0.7), u(-0.15, 0.2), u(0.2, 1.2)], p=[0.25, 0.5, 0.25])
        cx, cy = u(-0.75, 0.75, 2)
        w = blob(cx, cy, a, b, u(0, 3.14), u(1.5, 4)) * (1.0 if u() < 0.7 else u(0.2, 0.8))
        image = image * (1 - w) + value * w
    texture = sum(
        gaussian_filter(rng.standard_normal((size, size)), s, mode="wrap") * s * u(0, 0.02) for s in (0.7, 1.5, 4, 10)
    )
    image = -1 + body * (image + texture + 1)
    return gaussian_filter(image, u(0, 0.9)).astype(np.float32)


class CropSampler:
    """Endless random crops: a source by weight, a slice, one of 8 flips and turns, half of them zoomed."""

    def __init__(self, sources: list[Source], weights: dict[str, float], phantoms: int, seed: int):
        self.rng = np.random.default_rng(seed)
        made = tuple(random_phantom(self.rng) for _ in range(phantoms))
        self.sources = [*sources, Source("random phantoms", "phantom", made)] if phantoms else list(sources)
        self.p = self._probabilities(weights)

    def _probabilities(self, weights: dict[str, float]) -> np.ndarray:
        """Modality share by ``weights``, inside a modality by sqrt(number of slices), times a weight per file name."""
        p = np.array([len(s.slices) ** 0.5 * weights.get(s.name, 1.0) for s in self.sources])
        modality = np.array([s.modality for s in self.sources])
        for m in set(modality):
            p[modality == m] *= weights.get(m, 1.0) / p[modality == m].sum()
        return p / p.sum()

    def crop(self, size: int) -> np.ndarray:
        """One crop ``(size, size)``."""
        rng = self.rng
        source = self.sources[rng.choice(len(self.sources), p=self.p)]
        image = source.slices[rng.integers(len(source.slices))]
        step = 1.0 if rng.random() < 0.5 else float(np.exp(rng.uniform(np.log(0.75), np.log(2.0))))
        side = max(2, round(size * step))
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
        return np.ascontiguousarray(image)

    def batches(self, size: int, batch: int) -> Iterator[Tensor]:
        """Endless batches ``(batch, 1, size, size)`` float32."""
        while True:
            yield torch.from_numpy(np.stack([self.crop(size) for _ in range(batch)]))[:, None]
