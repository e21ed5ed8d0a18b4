"""Shapes of the chest phantom: signed distances in mm, the outlines and tubes of its organs, textures, vessel trees.

A distance is negative inside. The tables and every formula here are fixed: the example volume is made of them.
"""

from functools import lru_cache
from itertools import pairwise

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

Array = np.ndarray
Vec = tuple[float, float, float]
Axes = tuple[Array, ...]  # coordinates in mm along z, y, x
Segment = tuple[Array, Array, float, float]  # start (x, y, z), end, radius at the start, radius at the end; mm

# fmt: off
# Half outlines (x, y) in mm, from the posterior to the anterior midline, at z = -60, 0, 80.
_LEVELS = (-60.0, 0.0, 80.0)
_BODY = (
    ((0, 99), (22, 105), (55, 103), (95, 90), (128, 62), (147, 30), (153, 0),
     (146, -38), (122, -74), (88, -97), (52, -107), (22, -107), (0, -104)),
    ((0, 101), (22, 108), (55, 107), (97, 96), (132, 69), (153, 34), (159, 0),
     (151, -40), (126, -76), (90, -99), (55, -108), (24, -104), (0, -99)),
    ((0, 105), (22, 110), (60, 112), (105, 104), (142, 76), (161, 36), (162, 5),
     (152, -42), (126, -84), (90, -107), (50, -109), (20, -100), (0, -95)),
)
_CAVITY = (
    ((0, 80), (25, 86), (45, 91), (68, 88), (100, 70), (121, 40), (129, 3),
     (121, -36), (97, -62), (62, -76), (30, -81), (0, -80)),
    ((0, 78), (25, 82), (45, 86), (65, 83), (95, 66), (114, 38), (122, 3),
     (114, -35), (91, -59), (60, -72), (30, -77), (0, -76)),
    ((0, 70), (25, 74), (42, 78), (60, 75), (85, 58), (100, 32), (105, 0),
     (97, -30), (78, -52), (50, -64), (25, -68), (0, -68)),
)
# Great vessels and airways: polylines of (x, y, z, radius) in mm.
_AORTA = (
    (4, -16, -12, 11), (-8, -28, 4, 14.5), (-13, -34, 22, 15), (-13, -33, 40, 14.5), (-5, -20, 57, 14),
    (9, 6, 63, 13.5), (18, 28, 56, 13), (21, 38, 38, 12.5), (21, 41, 0, 12), (16, 41, -45, 11.5), (9, 36, -95, 11),
)
_PULMONARY = (
    ((14, -50, -12, 12), (19, -42, 8, 13.5), (20, -26, 22, 13.5), (8, -10, 22, 10),
     (-14, -4, 19, 10), (-36, 0, 13, 8.5)),
    ((20, -26, 22, 12.5), (31, -4, 29, 11), (42, 14, 24, 9), (46, 18, 8, 7)),
)
_CAVA = (
    ((-28, -22, 110, 8), (-29, -20, 50, 8.5), (-29, -18, 12, 9), (-28, -16, -6, 10)),
    ((-22, 2, -100, 11), (-25, -4, -30, 12)),
)
_BRANCHES = (
    ((-8, -24, 58, 7), (-22, -12, 110, 6)), ((4, -4, 64, 4.5), (6, -2, 110, 4)),
    ((14, 14, 62, 5.5), (22, 12, 110, 5)), ((-8, 33, 60, 3.5), (-8, 34, -90, 4)),
)
_VEINS = (((6, 4, -4, 8), (-24, 2, -4, 6), (-46, 4, -6, 5)), ((12, 6, -2, 8), (34, 4, -2, 6), (52, 4, -4, 5)))
CORONARY = (
    ((12, -30, 2, 2), (24, -46, -8, 2), (44, -60, -30, 1.6), (54, -58, -52, 1.2)),
    ((-10, -34, -4, 1.8), (-26, -46, -20, 1.7), (-26, -40, -45, 1.5)),
)
_AIRWAY = (
    ((0, 8, 120, 8.5), (1, 13, 32, 8.5)),
    ((1, 13, 32, 7.5), (-14, 14, 18, 7), (-34, 12, 6, 5.6), (-44, 14, -8, 4.2)),
    ((1, 13, 32, 7), (24, 15, 16, 6), (44, 16, 6, 5), (54, 18, -6, 4)),
)
HEPATIC = (
    ((-24, 2, -38, 4), (-60, -14, -52, 2.5), (-85, -30, -60, 1.5)),
    ((-24, 2, -36, 4), (-62, 26, -46, 3), (-88, 44, -62, 1.5)),
)
# Ellipsoids (centre, radii) in mm of the heart and of its chambers.
_HEART = (((-27, -20, -20), (23, 26, 32)), ((-2, -44, -26), (31, 25, 27)),
          ((37, -32, -30), (33, 30, 32)), ((6, 0, -8), (31, 21, 21)))
CHAMBERS = (((-29, -19, -20), (18, 21, 26)), ((-4, -47, -26), (24, 18, 20)),
            ((37, -30, -27), (20, 16, 20)), ((6, 0, -8), (27, 17, 17)))
HILA = ((-38.0, 3.0, 8.0), (44.0, 10.0, 12.0))
# fmt: on


def smin(a: Array, b: Array, k: float) -> Array:
    """Smooth union of two distances; k in mm is the radius of the blend."""
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.minimum(a, b) - h * h * (k / 4)


def smax(a: Array, b: Array, k: float) -> Array:
    """Smooth intersection of two distances; k as in ``smin``."""
    return -smin(-a, -b, k)


def step(lo: float, hi: float, v: Array) -> Array:
    """0 below lo, 1 above hi (or the other way round when lo > hi), smooth between."""
    t = np.clip((v - lo) / (hi - lo), 0, 1)
    return t * t * (3 - 2 * t)


def cover(d: Array, w: float) -> Array:
    """Share of a voxel of width w inside the surface d = 0."""
    t = np.clip(0.5 - d / w, 0, 1)
    return t * t * (3 - 2 * t)


def paint(hu: Array, d: Array, value: float | Array, w: float) -> None:
    """Mix value (HU) into hu, in place, by the share of each voxel (width w, mm) inside d < 0."""
    hu += cover(d, w) * (value - hu)


def round_box(u: Array, v: Array, half_u: float | Array, half_v: float | Array, r: float) -> Array:
    """Distance to a rectangle in (u, v) with sides 2 half_u, 2 half_v and corners of radius r, mm."""
    qu, qv = np.abs(u) - half_u + r, np.abs(v) - half_v + r
    return np.hypot(np.maximum(qu, 0), np.maximum(qv, 0)) + np.minimum(np.maximum(qu, qv), 0) - r


def ellipsoid(f: "Field", centre: Vec, radii: Vec, turn: float = 0.0) -> Array:
    """Distance to an ellipsoid, turned about z by turn (rad); centre and radii in mm."""
    dx, dy, c, s = f.x - centre[0], f.y - centre[1], np.cos(turn), np.sin(turn)
    q = ((c * dx + s * dy), (c * dy - s * dx), f.z - centre[2])
    k0 = np.sqrt(sum((v / r) ** 2 for v, r in zip(q, radii, strict=True)) + 1e-6)
    k1 = np.sqrt(sum((v / r**2) ** 2 for v, r in zip(q, radii, strict=True)) + 1e-6)
    return k0 * (k0 - 1) / k1


def capsule(x: Array, y: Array, z: Array, a: tuple | Array, b: tuple | Array, ra: float, rb: float) -> Array:
    """Distance to a tapering tube from a (radius ra) to b (radius rb), points (x, y, z) in mm."""
    u = [float(q - p) for p, q in zip(a, b, strict=True)]
    px, py, pz = x - float(a[0]), y - float(a[1]), z - float(a[2])
    t = np.clip((px * u[0] + py * u[1] + pz * u[2]) * (1 / max(u[0] ** 2 + u[1] ** 2 + u[2] ** 2, 1e-6)), 0, 1)
    px, py, pz = px - t * u[0], py - t * u[1], pz - t * u[2]
    return np.sqrt(px * px + py * py + pz * pz) - (t * float(rb - ra) + float(ra))


def tubes(f: "Field", *lines: tuple) -> Array:
    """Distance to polylines of (x, y, z, radius), joints blended over 4 mm."""
    out = np.array(1e3, np.float32)
    for line in lines:
        for p, q in pairwise(line):
            out = smin(out, capsule(f.x, f.y, f.z, p[:3], q[:3], p[3], q[3]), 4.0)
    return out


@lru_cache(maxsize=2)
def _tables(outline: tuple) -> tuple[Array, Array]:
    """Polar radius (3 levels, 721) of an outline over the angle 0 (back) .. pi (front), and the factor that
    turns a radial offset into a distance."""
    ang = np.linspace(0, np.pi, 721)
    radii = []
    for level in outline:
        p = np.array(level, float)
        radii.append(CubicSpline(np.arctan2(p[:, 0], p[:, 1]), np.hypot(*p.T), bc_type="clamped")(ang))
    r = np.array(radii)
    return r, 1 / np.sqrt(1 + (np.gradient(r[1], ang) / r[1]) ** 2)


class Field:
    """Warped coordinates and the shared distances at points z, y, x (mm, broadcastable)."""

    def __init__(self, z: Array, y: Array, x: Array, phase: Array) -> None:
        p = phase
        self.x = (x + 2.2 * np.sin(y / 43 + p[0]) + 1.8 * np.sin(z / 31 + p[1])).astype(np.float32)
        self.y = (y + 1.8 * np.sin(x / 47 + p[2]) + 1.5 * np.sin(z / 35 + x / 90 + p[3])).astype(np.float32)
        self.z = (z + 2.5 * np.sin(x / 55 + p[4]) + 1.5 * np.sin(y / 50 + p[5])).astype(np.float32)
        self.rho, self.ang = np.hypot(self.x, self.y), np.abs(np.arctan2(self.x, self.y))
        self.body, self.cavity = self._outline(_BODY), self._outline(_CAVITY)

    def _outline(self, outline: tuple) -> Array:
        tables, factor = _tables(outline)
        grid = np.linspace(0, np.pi, 721)
        r = [np.interp(self.ang, grid, t).astype(np.float32) for t in tables]
        up, down = step(0, _LEVELS[2], self.z), step(0, -_LEVELS[0], -self.z)
        radius = r[1] + up * (r[2] - r[1]) + down * (r[0] - r[1])
        return (self.rho - radius) * np.interp(self.ang, grid, factor).astype(np.float32)

    def organs(self) -> None:
        """Heart, vessels, airways, diaphragm, and what they leave to the lungs."""
        heart = np.array(1e3, np.float32)
        for centre, radii in _HEART:
            heart = smin(heart, ellipsoid(self, centre, radii, 0.35), 9.0)
        self.heart, self.aorta, self.pulmonary = heart, tubes(self, _AORTA), tubes(self, *_PULMONARY)
        self.veins, self.airway = tubes(self, *_CAVA, *_VEINS, *_BRANCHES), tubes(self, *_AIRWAY)
        right = -20 - ((self.x + 62) ** 2 + (self.y - 2) ** 2) / 150
        left = -46 - ((self.x - 62) ** 2 + (self.y - 5) ** 2) / 160
        self.dome = (self.z - smax(right, left, 8.0)) * 0.8
        column = np.abs(self.x - 2) - (9 + 12 * step(-62, -25, self.y) + 3 * step(20, 60, self.z))
        spine = smax(np.abs(self.x) - 17 - 11 * step(58, 84, self.y), 33 - self.y, 12.0)
        med = smin(smin(column, spine, 6.0), heart - 3, 8.0)
        for tube in (self.aorta, self.pulmonary, self.veins, self.airway):
            med = smin(med, tube - 2.5, 7.0)
        for h in HILA:
            med = smin(med, capsule(self.x, self.y, self.z, h, (h[0], h[1], h[2] - 14), 9, 7), 9.0)
        self.spine = spine
        self.lung = smax(smax(self.cavity + 0.5, -med, 4.0), -self.dome, 4.0)


def texture(axes: Axes, rng: np.random.Generator, pitch_mm: float) -> Array:
    """Unit-variance noise on a fixed periodic lattice of pitch_mm, interpolated at z, y, x (mm)."""
    n = 72
    v = gaussian_filter(rng.standard_normal((n, n, n), dtype=np.float32), 0.8, mode="wrap")
    v /= v.std()
    for k, axis in enumerate(axes):
        q = axis / pitch_mm
        i = np.floor(q).astype(int)
        t = (q - i).astype(np.float32).reshape([-1 if j == k else 1 for j in range(3)])
        v = np.take(v, i % n, axis=k) * (1 - t) + np.take(v, (i + 1) % n, axis=k) * t
    return v


def grow(root: Vec, targets: Array, tip_mm: float, rng: np.random.Generator) -> list[Segment]:
    """Tree that splits its targets (n, 3) in two at every fork; radii follow r^2.7 = sum of the children's r^2.7.

    Returns segments (start, end, start radius, end radius) in mm.
    """
    segments: list[Segment] = []
    stack = [(np.array(root), targets, tip_mm * len(targets) ** (1 / 2.7))]
    while stack:
        pos, pts, r0 = stack.pop()
        r = tip_mm * len(pts) ** (1 / 2.7)
        gap = pts.mean(0) - pos
        size = float(np.linalg.norm(gap))
        reach = 1.0 if len(pts) == 1 else rng.uniform(0.35, 0.6)
        end = pos + gap * reach + (len(pts) > 1) * rng.normal(0, 0.05 * size, 3)
        mid = (pos + end) / 2 + rng.normal(0, 0.06 * np.linalg.norm(end - pos), 3)
        segments += [(pos, mid, r0, (r0 + r) / 2), (mid, end, (r0 + r) / 2, r * 0.95)]
        if len(pts) > 1:
            u = gap / (size + 1e-6)
            flat = (pts - pts.mean(0)) @ (np.eye(3) - np.outer(u, u))
            widest = np.linalg.eigh(flat.T @ flat + 1e-6 * np.eye(3))[1][:, -1]
            side = (pts - pts.mean(0)) @ (widest + rng.normal(0, 0.2, 3))
            first = side > np.quantile(side, rng.uniform(0.3, 0.7))
            if first.all() or not first.any():
                first = np.arange(len(pts)) < len(pts) // 2
            stack += [(end, pts[first], r), (end, pts[~first], r)]
    return segments


def _box(axes: Axes, lo: Array, hi: Array) -> tuple[slice, ...]:
    """Index ranges of the voxels between the corners lo and hi, (x, y, z) in mm."""
    return tuple(slice(*np.searchsorted(a, ends)) for a, *ends in zip(axes, lo[::-1], hi[::-1], strict=True))


def draw(share: Array, axes: Axes, segments: list[Segment], w: float, grow_mm: float = 0.0) -> None:
    """Raise share (voxel fractions) to that of the tubes; tubes thinner than a voxel fade with their width."""
    for a, b, start_mm, end_mm in segments:
        ra, rb = start_mm + grow_mm, end_mm + grow_mm
        m = max(ra, rb) + w
        box = _box(axes, np.minimum(a, b) - m, np.maximum(a, b) + m)
        part = share[box]
        if part.size:
            z, y, x = np.ix_(*(ax[s] for ax, s in zip(axes, box, strict=True)))
            c = cover(capsule(x, y, z, a, b, ra, rb), w) * min(1.0, (ra + rb) / w + 0.15)
            np.maximum(part, c, out=part)
