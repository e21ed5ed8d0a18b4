"""What the tests of the cone beam share: small scans and volumes."""

import math

import numpy as np
import torch

from invdiff.operators.cone import ConeGeometry
from invdiff.operators.rays import equispaced

MU_WATER = 0.0193  # 1/mm


TINY = [  # shape, voxel (slice, row, column) mm, geometry: odd, rectangular, anisotropic, shifted, truncated, steep
    ((3, 4, 5), (1.1, 1.3, 0.8), ConeGeometry(equispaced(4, 360, 5), 7, 5, 1.9, 1.7, 17.0, 31.0, 0.35, -0.4)),
    ((3, 5, 3), (0.4, 0.5, 1.0), ConeGeometry((0.0, 90.0, -30.0), 5, 4, 1.1, 0.5, 4.4, 6.0, -0.9, 0.7, "clockwise")),
    ((4, 3, 3), (1.6, 1.0, 1.0), ConeGeometry(equispaced(2, 240), 5, 12, 1.5, 0.3, 9.0, 14.0)),
    (  # the axis of rotation off the midline
        (3, 4, 4),
        (1.2, 1.0, 0.9),
        ConeGeometry(equispaced(5, 360, 7), 6, 5, 1.7, 1.6, 12.0, 21.0, 0.4, 0.3, "clockwise", axis_offset_mm=1.3),
    ),
    ((1, 4, 4), (1.0, 1.0, 1.0), ConeGeometry(equispaced(3, 180), 5, 1, 1.5, 3.0, 9.0, 14.0)),
]


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def ends(g):
    """Source ``(views, 3)`` and panel points ``(rows, views, columns, 3)`` by the definition alone, (x, y, z) in mm."""
    b = np.deg2rad(g.views_deg) * (-1 if g.rotation == "clockwise" else 1)
    down, right = np.stack([np.sin(b), -np.cos(b), 0 * b], -1), np.stack([np.cos(b), np.sin(b), 0 * b], -1)
    u = (np.arange(g.detector_count) - (g.detector_count - 1) / 2) * g.detector_pitch_mm + g.detector_offset_mm
    v = (np.arange(g.detector_rows) - (g.detector_rows - 1) / 2) * g.detector_row_pitch_mm + g.detector_row_offset_mm
    source = g.source_axis_mm * down - g.axis_offset_mm * right
    middle = source - g.source_detector_mm * down
    panel = middle[None, :, None] + u[:, None] * right[None, :, None]
    return source, panel + v[:, None, None, None] * np.array([0, 0, 1.0])


def joseph_by_hand(shape, voxel, geometry):
    """Dense A: where each ray meets the planes of rows (or columns), products of hat functions of the distances."""
    (slices, height, width), (dz, dy, dx) = shape, voxel
    z, x = (np.arange(slices) - (slices - 1) / 2) * dz, (np.arange(width) - (width - 1) / 2) * dx
    y = ((height - 1) / 2 - np.arange(height)) * dy
    source, panel = ends(geometry)
    rows = []
    for (_, v, _), e in zip(np.ndindex(*panel.shape[:3]), panel.reshape(-1, 3), strict=True):
        s, r = source[v], e - source[v]
        by_rows = abs(r[1]) / dy >= abs(r[0]) / dx
        at = (y - s[1]) / r[1] if by_rows else (x - s[0]) / r[0]
        other = (s[0] + at * r[0])[:, None] - x if by_rows else (s[1] + at * r[1])[:, None] - y
        hat = np.maximum(0, 1 - np.abs(other) / (dx if by_rows else dy))
        hat = hat if by_rows else hat.T  # (H, W)
        deep = np.maximum(0, 1 - np.abs((s[2] + at * r[2])[None] - z[:, None]) / dz)  # (S, planes)
        deep = deep[:, :, None] if by_rows else deep[:, None, :]
        length = np.linalg.norm(r) * (dy / abs(r[1]) if by_rows else dx / abs(r[0]))
        rows.append((length * deep * hat).ravel())
    return torch.from_numpy(np.stack(rows))


def chords(geometry, balls):
    """Lengths of rays inside balls (x, y, z, radius, value) times their values, shaped like a measurement."""
    source, panel = ends(geometry)
    e = panel - source[None, :, None]
    e = e / np.linalg.norm(e, axis=-1, keepdims=True)
    total = 0
    for x, y, z, r, value in balls:
        c = np.array([x, y, z]) - source[None, :, None]
        distance = np.linalg.norm(np.cross(c, e), axis=-1)
        total = total + 2 * value * np.sqrt(np.maximum(r**2 - distance**2, 0))
    return torch.from_numpy(total)[:, None]


def ball_image(shape, voxel, balls, fine=3):
    axes = [(np.arange(n * fine) - (n * fine - 1) / 2) * d / fine for n, d in zip(shape, voxel, strict=True)]
    z, y, x = axes[0][:, None, None], -axes[1][:, None], axes[2]
    image = sum(v * ((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < r**2) for cx, cy, cz, r, v in balls)
    s, h, w = shape
    return torch.from_numpy(image.reshape(s, fine, h, fine, w, fine).mean((1, 3, 5)))[:, None]


def blobs(g, parts):
    """Line integrals of Gaussian blobs (x, y, z, sigma, value), shaped like a measurement."""
    source, panel = ends(g)
    e = panel - source[None, :, None]
    e = e / np.linalg.norm(e, axis=-1, keepdims=True)
    total = 0
    for x, y, z, sigma, value in parts:
        distance = np.linalg.norm(np.cross(np.array([x, y, z]) - source[None, :, None], e), axis=-1)
        total = total + value * sigma * math.sqrt(2 * math.pi) * np.exp(-(distance**2) / (2 * sigma**2))
    return torch.from_numpy(total)[:, None]


def blob_image(shape, voxel, parts):
    z, y, x = ((np.arange(n) - (n - 1) / 2) * d for n, d in zip(shape, voxel, strict=True))
    z, y, square = z[:, None, None], -y[:, None], lambda t: t**2
    image = sum(
        value * np.exp(-(square(x - cx) + square(y - cy) + square(z - cz)) / (2 * sigma**2))
        for cx, cy, cz, sigma, value in parts
    )
    return torch.from_numpy(image)[:, None]


BLOBS = [(4.0, -6.0, 3.0, 3.0, MU_WATER), (-7.0, 5.0, -4.0, 2.5, 2 * MU_WATER)]
