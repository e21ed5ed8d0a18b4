"""A chest CT phantom with known truth: implicit 3D anatomy in mm, evaluated on any voxel grid.

Organs are signed distances d(x, y, z) in mm (negative inside), joined by smooth unions and bent by a
low-frequency warp; a voxel takes the share smoothstep(1/2 - d/w) of an organ, w about one voxel, so edges
carry partial volume. Axes: x to the patient's left (image right), y to the back, z to the head; the origin is
the centre of the volume. Every structure and texture is a function of mm alone, so each grid samples one anatomy.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

Array = np.ndarray
Vec = tuple[float, float, float]

# Half outlines (x, y) in mm, from the posterior to the anterior midline, at z = -60, 0, 80.
_LEVELS = (-60.0, 0.0, 80.0)
_BODY = (
    ((0, 99), (22, 105), (55, 103), (95, 90), (128, 62), (147, 30), (153, 0), (146, -38), (122, -74), (88, -97), (52, -107), (22, -107), (0, -104)),
    ((0, 101), (22, 108), (55, 107), (97, 96), (132, 69), (153, 34), (159, 0), (151, -40), (126, -76), (90, -99), (55, -108), (24, -104), (0, -99)),
    ((0, 105), (22, 110), (60, 112), (105, 104), (142, 76), (161, 36), (162, 5), (152, -42), (126, -84), (90, -107), (50, -109), (20, -100), (0, -95)),
)
_CAVITY = (
    ((0, 80), (25, 86), (45, 91), (68, 88), (100, 70), (121, 40), (129, 3), (121, -36), (97, -62), (62, -76), (30, -81), (0, -80)),
    ((0, 78), (25, 82), (45, 86), (65, 83), (95, 66), (114, 38), (122, 3), (114, -35), (91, -59), (60, -72), (30, -77), (0, -76)),
    ((0, 70), (25, 74), (42, 78), (60, 75), (85, 58), (100, 32), (105, 0), (97, -30), (78, -52), (50, -64), (25, -68), (0, -68)),
)
# Great vessels and airways: polylines of (x, y, z, radius) in mm.
_AORTA = ((4, -16, -12, 11), (-8, -28, 4, 14.5), (-13, -34, 22, 15), (-13, -33, 40, 14.5), (-5, -20, 57, 14), (9, 6, 63, 13.5),
          (18, 28, 56, 13), (21, 38, 38, 12.5), (21, 41, 0, 12), (16, 41, -45, 11.5), (9, 36, -95, 11))
_PULMONARY = (((14, -50, -12, 12), (19, -42, 8, 13.5), (20, -26, 22, 13.5), (8, -10, 22, 10), (-14, -4, 19, 10), (-36, 0, 13, 8.5)),
              ((20, -26, 22, 12.5), (31, -4, 29, 11), (42, 14, 24, 9), (46, 18, 8, 7)))
_CAVA = (((-28, -22, 110, 8), (-29, -20, 50, 8.5), (-29, -18, 12, 9), (-28, -16, -6, 10)), ((-22, 2, -100, 11), (-25, -4, -30, 12)))
_BRANCHES = (((-8, -24, 58, 7), (-22, -12, 110, 6)), ((4, -4, 64, 4.5), (6, -2, 110, 4)), ((14, 14, 62, 5.5), (22, 12, 110, 5)),
             ((-8, 33, 60, 3.5), (-8, 34, -90, 4)))
_VEINS = (((6, 4, -4, 8), (-24, 2, -4, 6), (-46, 4, -6, 5)), ((12, 6, -2, 8), (34, 4, -2, 6), (52, 4, -4, 5)))
_CORONARY = (((12, -30, 2, 2), (24, -46, -8, 2), (44, -60, -30, 1.6), (54, -58, -52, 1.2)), ((-10, -34, -4, 1.8), (-26, -46, -20, 1.7), (-26, -40, -45, 1.5)))
_AIRWAY = (((0, 8, 120, 8.5), (1, 13, 32, 8.5)), ((1, 13, 32, 7.5), (-14, 14, 18, 7), (-34, 12, 6, 5.6), (-44, 14, -8, 4.2)),
           ((1, 13, 32, 7), (24, 15, 16, 6), (44, 16, 6, 5), (54, 18, -6, 4)))
_HEART = (((-27, -20, -20), (23, 26, 32)), ((-2, -44, -26), (31, 25, 27)), ((37, -32, -30), (33, 30, 32)), ((6, 0, -8), (31, 21, 21)))
_CHAMBERS = (((-29, -19, -20), (18, 21, 26)), ((-4, -47, -26), (24, 18, 20)), ((37, -30, -27), (20, 16, 20)), ((6, 0, -8), (27, 17, 17)))
_HILA = ((-38.0, 3.0, 8.0), (44.0, 10.0, 12.0))
_BLOOD, _MUSCLE, _FAT = 135.0, 52.0, -102.0


@dataclass(frozen=True)
class Phantom:
    """A CT volume with its truth.

    hu: float32 (slices, rows, columns) in HU, -1000..1300, air exactly -1000. voxel_mm: (z, y, x) spacing in mm.
    labels: bool masks of hu's shape: "body", "lung", "bone", "nodules". nodules: one dict per nodule, with
    center_mm (z, y, x) from the volume's centre, diameter_mm and hu (its mean density).
    """

    hu: Array
    voxel_mm: Vec
    labels: dict[str, Array]
    nodules: list[dict]


def _smin(a: Array, b: Array, k: float) -> Array:
    """Smooth union of two distances; k in mm is the radius of the blend."""
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.minimum(a, b) - h * h * (k / 4)


def _smax(a: Array, b: Array, k: float) -> Array:
    return -_smin(-a, -b, k)


def _step(lo: float, hi: float, v: Array) -> Array:
    t = np.clip((v - lo) / (hi - lo), 0, 1)
    return t * t * (3 - 2 * t)


def _cover(d: Array, w: float) -> Array:
    """Share of a voxel of width w inside the surface d = 0."""
    t = np.clip(0.5 - d / w, 0, 1)
    return t * t * (3 - 2 * t)


def _paint(hu: Array, d: Array, value: float | Array, w: float) -> None:
    hu += _cover(d, w) * (value - hu)


def _ellipsoid(f: _Field, centre: Vec, radii: Vec, turn: float = 0.0) -> Array:
    dx, dy, c, s = f.x - centre[0], f.y - centre[1], np.cos(turn), np.sin(turn)
    q = ((c * dx + s * dy), (c * dy - s * dx), f.z - centre[2])
    k0 = np.sqrt(sum((v / r) ** 2 for v, r in zip(q, radii)) + 1e-6)
    k1 = np.sqrt(sum((v / r**2) ** 2 for v, r in zip(q, radii)) + 1e-6)
    return k0 * (k0 - 1) / k1


def _capsule(x: Array, y: Array, z: Array, a: tuple, b: tuple, ra: float, rb: float) -> Array:
    """Distance to a tapering tube from a (radius ra) to b (radius rb), points (x, y, z) in mm."""
    u = [float(q - p) for p, q in zip(a, b)]
    px, py, pz = x - float(a[0]), y - float(a[1]), z - float(a[2])
    t = np.clip((px * u[0] + py * u[1] + pz * u[2]) * (1 / max(u[0] ** 2 + u[1] ** 2 + u[2] ** 2, 1e-6)), 0, 1)
    px, py, pz = px - t * u[0], py - t * u[1], pz - t * u[2]
    return np.sqrt(px * px + py * py + pz * pz) - (t * float(rb - ra) + float(ra))


def _tubes(f: _Field, *lines: tuple) -> Array:
    """Distance to polylines of (x, y, z, radius), joints blended over 4 mm."""
    out = np.float32(1e3)
    for line in lines:
        for p, q in zip(line[:-1], line[1:]):
            out = _smin(out, _capsule(f.x, f.y, f.z, p[:3], q[:3], p[3], q[3]), 4.0)
    return out


@lru_cache(maxsize=2)
def _tables(outline: tuple) -> tuple[Array, Array]:
    """Polar radius (3 levels, 721) of an outline over the angle 0 (back) .. pi (front), and the factor that
    turns a radial offset into a distance."""
    ang = np.linspace(0, np.pi, 721)
    r = []
    for level in outline:
        p = np.array(level, float)
        r.append(CubicSpline(np.arctan2(p[:, 0], p[:, 1]), np.hypot(*p.T), bc_type="clamped")(ang))
    r = np.array(r)
    return r, 1 / np.sqrt(1 + (np.gradient(r[1], ang) / r[1]) ** 2)


class _Field:
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
        up, down = _step(0, _LEVELS[2], self.z), _step(0, -_LEVELS[0], -self.z)
        radius = r[1] + up * (r[2] - r[1]) + down * (r[0] - r[1])
        return (self.rho - radius) * np.interp(self.ang, grid, factor).astype(np.float32)

    def organs(self) -> None:
        """Heart, vessels, airways, diaphragm, and what they leave to the lungs."""
        heart = np.float32(1e3)
        for centre, radii in _HEART:
            heart = _smin(heart, _ellipsoid(self, centre, radii, 0.35), 9.0)
        self.heart, self.aorta, self.pulmonary = heart, _tubes(self, _AORTA), _tubes(self, *_PULMONARY)
        self.veins, self.airway = _tubes(self, *_CAVA, *_VEINS, *_BRANCHES), _tubes(self, *_AIRWAY)
        right = -20 - ((self.x + 62) ** 2 + (self.y - 2) ** 2) / 150
        left = -46 - ((self.x - 62) ** 2 + (self.y - 5) ** 2) / 160
        self.dome = (self.z - _smax(right, left, 8.0)) * 0.8
        column = np.abs(self.x - 2) - (9 + 12 * _step(-62, -25, self.y) + 3 * _step(20, 60, self.z))
        spine = _smax(np.abs(self.x) - 17 - 11 * _step(58, 84, self.y), 33 - self.y, 12.0)
        med = _smin(_smin(column, spine, 6.0), heart - 3, 8.0)
        for tube in (self.aorta, self.pulmonary, self.veins, self.airway):
            med = _smin(med, tube - 2.5, 7.0)
        for h in _HILA:
            med = _smin(med, _capsule(self.x, self.y, self.z, h, (h[0], h[1], h[2] - 14), 9, 7), 9.0)
        self.spine = spine
        self.lung = _smax(_smax(self.cavity + 0.5, -med, 4.0), -self.dome, 4.0)


def _texture(axes: tuple[Array, Array, Array], rng: np.random.Generator, pitch_mm: float) -> Array:
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


def _grow(root: Vec, targets: Array, tip_mm: float, rng: np.random.Generator) -> list[tuple]:
    """Tree that splits its targets (n, 3) in two at every fork; radii follow r^2.7 = sum of the children's r^2.7.

    Returns segments (start, end, start radius, end radius) in mm.
    """
    segments, stack = [], [(np.array(root), targets, tip_mm * len(targets) ** (1 / 2.7))]
    while stack:
        pos, pts, r0 = stack.pop()
        r = tip_mm * len(pts) ** (1 / 2.7)
        gap = pts.mean(0) - pos
        size = float(np.linalg.norm(gap))
        end = pos + gap * (1.0 if len(pts) == 1 else rng.uniform(0.35, 0.6)) + (len(pts) > 1) * rng.normal(0, 0.05 * size, 3)
        mid = (pos + end) / 2 + rng.normal(0, 0.06 * np.linalg.norm(end - pos), 3)
        segments += [(pos, mid, r0, (r0 + r) / 2), (mid, end, (r0 + r) / 2, r * 0.95)]
        if len(pts) > 1:
            u = gap / (size + 1e-6)
            flat = (pts - pts.mean(0)) @ (np.eye(3) - np.outer(u, u))
            side = (pts - pts.mean(0)) @ (np.linalg.eigh(flat.T @ flat + 1e-6 * np.eye(3))[1][:, -1] + rng.normal(0, 0.2, 3))
            first = side > np.quantile(side, rng.uniform(0.3, 0.7))
            if first.all() or not first.any():
                first = np.arange(len(pts)) < len(pts) // 2
            stack += [(end, pts[first], r), (end, pts[~first], r)]
    return segments


def _box(axes: tuple[Array, Array, Array], lo: Array, hi: Array) -> tuple[slice, slice, slice]:
    return tuple(slice(*np.searchsorted(a, (l, h))) for a, l, h in zip(axes, lo[::-1], hi[::-1]))


def _draw(share: Array, axes: tuple, segments: list[tuple], w: float, grow_mm: float = 0.0) -> None:
    """Raise share (voxel fractions) to that of the tubes; tubes thinner than a voxel fade with their width."""
    for a, b, ra, rb in segments:
        ra, rb = ra + grow_mm, rb + grow_mm
        m = max(ra, rb) + w
        box = _box(axes, np.minimum(a, b) - m, np.maximum(a, b) + m)
        part = share[box]
        if part.size:
            z, y, x = np.ix_(*(ax[s] for ax, s in zip(axes, box)))
            c = _cover(_capsule(x, y, z, a, b, ra, rb), w) * min(1.0, (ra + rb) / w + 0.15)
            np.maximum(part, c, out=part)


def _vessels(hu: Array, axes: tuple, phase: Array, rng: np.random.Generator, w: float) -> None:
    """Arteries with their bronchi and veins of both lungs, grown in 3D towards points in the lung."""
    pts = rng.uniform((-130, -85, -85), (130, 95, 90), (9000, 3))
    f = _Field(pts[:, 2], pts[:, 1], pts[:, 0], phase)
    f.organs()
    pts = pts[f.lung < -3.0]
    blood, wall, lumen = (np.zeros_like(hu) for _ in range(3))
    for hilum, side in zip(_HILA, (pts[pts[:, 0] < 0], pts[pts[:, 0] > 0])):
        half = len(side) // 2
        artery = _grow(hilum, side[:half], 0.58, rng)
        vein = _grow((hilum[0], hilum[1] - 4, hilum[2] - 14), side[half:], 0.56, rng)
        _draw(blood, axes, artery + vein, w)
        shift = np.array((0.0, 0.8, -0.6))
        airway = [(a + shift * 1.8 * ra, b + shift * 1.8 * rb, 0.7 * ra, 0.7 * rb) for a, b, ra, rb in artery if rb > 2.0]
        _draw(wall, axes, airway, w, 0.7)
        _draw(lumen, axes, airway, w)
    for share, value in ((wall, -180.0), (lumen, -960.0), (np.where(lumen > 0.5, 0, blood), 80.0)):
        hu += share * (value - hu)


def _wall(hu: Array, f: _Field, w: float, streak: Array) -> None:
    """Skin, fat and the muscle layers of the chest wall."""
    a, cav, body, muscle = np.degrees(f.ang), f.cavity, f.body, _MUSCLE - 35 * _step(1.1, 2.6, streak)
    deep = 2 + 7 + 5 * _step(100, 70, a) + 3 * np.cos(f.ang * 3) + 3 * _step(20, -60, f.z)
    _paint(hu, body, 20.0, w)
    _paint(hu, body + 2.2, _FAT, w)
    ring = np.maximum(0.5 - cav, cav - 9.5 + 1.5 * streak * 0.5)
    pec = 12.5 + 13 * _step(168, 150, a) * _step(104, 132, a) * (0.75 + 0.25 * _step(-40, 30, f.z)) - 3
    serratus = 11 + 8 * _step(125, 105, a) * _step(55, 72, a) - 2 + 1.5 * np.sin(f.z / 5 + f.ang * 14)
    layers = [ring, np.maximum(12.5 - cav, cav - pec), np.maximum(11.5 - cav, cav - serratus)]
    layers.append(np.maximum(body + deep, -(body + deep + 1 + 10 * _step(105, 85, a) * _step(38, 52, a))))
    layers.append(np.maximum(body + deep - 2, -(body + deep - 1 + 7 * _step(44, 30, a) * _step(-70, 10, f.z))))
    scap = _step(-22, 35, f.z)
    layers.append(np.maximum(np.maximum(np.abs(a - 52) - 6 - 20 * scap, 11.5 - cav), cav - 11 - 15 * scap))
    sx = np.abs(f.x)
    spinae = _smin(np.hypot((sx - 19) / 1.25, f.y - 90) - 11, np.hypot((sx - 36) / 1.5, f.y - 92) - 7.5, 5.0)
    layers.append(_smax(spinae, body + 6, 4.0))
    for layer in layers:
        _paint(hu, np.maximum(layer, body + 5), muscle, w)


def _round_box(u: Array, v: Array, hu_: float, hv: float, r: float) -> Array:
    qu, qv = np.abs(u) - hu_ + r, np.abs(v) - hv + r
    return np.hypot(np.maximum(qu, 0), np.maximum(qv, 0)) + np.minimum(np.maximum(qu, qv), 0) - r


def _bones(hu: Array, f: _Field, w: float, grain: Array) -> Array:
    """Ribs, cartilage, sternum, scapulae and spine; returns the distance to bone."""
    a, sx = np.degrees(f.ang), np.abs(f.x)
    drop = 112 * _step(5, 150, a) - 34 * _step(136, 178, a)
    s = f.z + drop + 4 + np.sign(f.x) * 1.5
    s = (s - 23 * np.round(s / 23)) * 0.86
    rib = _round_box(f.cavity - 5.5, s, 4.1 + 0.6 * np.sin(2 * f.ang), 6.6, 3.2)
    cartilage = np.maximum(np.maximum(rib - 0.3, 138 - a), 20 - sx)
    rib = np.maximum(np.maximum(rib, a - 139), 29 - sx)
    width = 15 + 9 * _step(38, 62, f.z) + 2 * np.cos(f.z / 7)
    sternum = _round_box(f.x, f.y + 87 - 3 * _step(0, 80, f.z), width, 6.0, 4.5)
    arc = np.radians(a - 53) * f.rho
    blade = _round_box(f.cavity - 17 - 2 * np.sin(arc / 16), arc, 2.0 + 2.5 * _step(10, 30, np.abs(arc)), 2 + 38 * _step(-18, 70, f.z), 1.9)
    blade = np.maximum(blade, -14 - f.z)
    zl = f.z - 25 * np.round(f.z / 25)
    zs = f.z + 9 - 25 * np.round((f.z + 9) / 25) - 9
    plan = _ellipsoid(f, (0, 50, 0), (17.5, 15, 1e4))
    plan = _smax(plan, 9 - np.hypot(f.x / 1.1, f.y - 70.5), 4.0) + 1.6 * np.maximum(1 - (zl / 10) ** 2, 0)
    _paint(hu, _smax(_smax(f.spine + 2, 66 - f.y, 8.0), f.body + 8, 6.0), _MUSCLE, w)
    _paint(hu, np.maximum(plan + 0.5, np.abs(zl) - 14), 78.0, w)
    vertebra = _smax(plan, np.abs(zl) - 9.8, 2.0)
    for p, q, rp, rq in (((9, 60, 4), (14, 72, 3), 4.2, 4.6), ((14, 74, 2), (2, 84, -1), 3.8, 3.6), ((15, 74, 3), (37, 83, 5), 4.6, 4.0)):
        vertebra = _smin(vertebra, _capsule(sx, f.y, zl * 0.75, p, q, rp, rq), 3.0)
    vertebra = _smin(vertebra, _capsule(f.x * 1.2, f.y, zs, (0, 83, -2), (0, 99, -13), 3.6, 3.0), 3.0)
    neck = _capsule(sx, f.y, zl * 0.8, (19, 60, 7), (36, 84, 5), 3.4, 3.4)
    canal = np.hypot(f.x / 1.1, f.y - 70.5) - 8.2
    vertebra = np.maximum(np.minimum(vertebra, np.maximum(neck, 17 - sx)), -canal)
    _paint(hu, cartilage, 105.0 + 8 * grain, w)
    bone = np.minimum(np.minimum(rib, sternum), np.minimum(blade, vertebra))
    _paint(hu, bone, np.where(vertebra <= bone + 0.5, 680.0, 1100.0), w)
    _paint(hu, bone + 1.5, 215.0 + 55 * grain, w)
    _paint(hu, canal, -10.0, w)
    _paint(hu, canal + 3.2, 38.0, w)
    return bone


def _lungs(hu: Array, f: _Field, w: float, fine: Array, coarse: Array) -> None:
    """Parenchyma with its dependent gradient, oblique fissures and the right minor fissure."""
    tone = -850 + 0.3 * f.y + 24 * fine + 20 * coarse
    oblique = (f.z - 6 - 0.85 * f.y + np.sign(f.x) * 6 - 3 * np.sin(f.x / 19)) * 0.76
    minor = np.maximum(np.abs(f.z - 4 - 0.12 * f.y - 2 * np.sin(f.x / 23)), np.maximum(f.x, -oblique))
    sheet = np.maximum(_cover(np.abs(oblique) - 0.5, 2 * w), 0.5 * _cover(minor - 0.5, 2 * w))
    _paint(hu, f.lung, np.clip(tone, -920, -760) + 150 * sheet, w)


def _organs(hu: Array, f: _Field, w: float, coarse: Array) -> None:
    """Mediastinum and upper abdomen: fat, heart and chambers, vessels, airways, oesophagus, liver, spleen, stomach."""
    liver = _smax(_smax(f.cavity + 4, f.dome + 3, 5.0), f.x - 22 + 0.5 * f.y, 8.0)
    _paint(hu, liver, 68.0, w)
    veins = (((-24, 2, -38, 4), (-60, -14, -52, 2.5), (-85, -30, -60, 1.5)), ((-24, 2, -36, 4), (-62, 26, -46, 3), (-88, 44, -62, 1.5)))
    _paint(hu, np.maximum(_tubes(f, *veins), liver), 100.0, w)
    _paint(hu, _smax(_ellipsoid(f, (82, 42, -85), (36, 40, 34)), f.cavity + 4, 4.0), 64.0, w)
    stomach = _smax(_ellipsoid(f, (58, -18, -90), (42, 36, 38)), f.dome + 4, 4.0)
    _paint(hu, stomach, 45.0, w)
    _paint(hu, stomach + 4, np.where(f.y < -28, -980.0, 20.0), w)
    _paint(hu, f.heart - 1.6, -60.0, w)
    _paint(hu, f.heart, 72.0, w)
    _paint(hu, np.minimum(f.veins, f.pulmonary), 55.0, w)
    for k, (centre, radii) in enumerate(_CHAMBERS):
        d = _smax(_ellipsoid(f, centre, radii, 0.35), f.heart + (2.5, 3.5, 9, 2.5)[k], 3.0)
        _paint(hu, d + 1.2 * coarse, _BLOOD + (0, 4, -8, 0)[k], w)
    _paint(hu, _tubes(f, *_CORONARY), 125.0, w)
    _paint(hu, f.veins + 1.3, _BLOOD - 6, w)
    _paint(hu, f.pulmonary + 1.3, _BLOOD + 3, w)
    _paint(hu, np.maximum(f.aorta, -f.heart - 4), 60.0, w)
    _paint(hu, f.aorta + 1.3, _BLOOD, w)
    gullet = np.hypot((f.x - 7 - 3 * np.sin(f.z / 40)) / 1.5, f.y - 29) - 5.2
    _paint(hu, gullet, 42.0, w)
    _paint(hu, gullet + 4.0, -350.0, w)
    _paint(hu, f.airway - 1.6, 38.0, w)
    _paint(hu, f.airway, -990.0, w)


def _place_nodules(phase: Array, rng: np.random.Generator) -> list[dict]:
    """Five nodules in the lungs, within 28 mm of the middle slice and clear of walls and each other."""
    out: list[dict] = []
    for diameter, value in ((11.5, 35.0), (9.0, -520.0), (7.5, 60.0), (6.0, 25.0), (4.5, 180.0)):
        while True:
            p = rng.uniform((-115, -70, -28), (115, 85, 28))
            f = _Field(*(np.array([v]) for v in p[::-1]), phase)
            f.organs()
            far = all(np.linalg.norm(p[::-1] - n["center_mm"]) > 45 for n in out)
            if f.lung[0] < -diameter / 2 - 3 and far:
                break
        out.append({"center_mm": tuple(float(v) for v in p[::-1]), "diameter_mm": diameter, "hu": value})
    return out


def _couch(hu: Array, axes: tuple, body: Array, w: float) -> None:
    """Curved carbon-fibre couch top with a foam core, behind the back."""
    y, x = np.ix_(*axes[1:])
    d = np.maximum(np.abs(y + x * x / 1050 - 121.5) - 8, np.abs(x) - 140)
    flat = np.full(d.shape, -1000, np.float32)
    _paint(flat, d, -180.0, w)
    _paint(flat, d + 2, -930.0, w)
    np.copyto(hu, flat, where=(hu == -1000) & (body > w))


def _check(shape: tuple, voxel_mm: tuple) -> None:
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"thorax expects shape (slices, rows, columns) of positive integers, got {shape}; try (24, 192, 192)")
    if len(voxel_mm) != 3 or not all(np.isfinite(v) and v > 0 for v in voxel_mm):
        raise ValueError(f"thorax expects voxel_mm (z, y, x) of positive mm, got {voxel_mm}; try (3.0, 1.9, 1.9)")
    if min(shape[1] * voxel_mm[1], shape[2] * voxel_mm[2]) < 340:
        raise ValueError(f"thorax needs a field of 340 mm, got {shape[1] * voxel_mm[1]:g} x {shape[2] * voxel_mm[2]:g} mm; "
                         f"use voxels of {340 / min(shape[1:]):.2f} mm or more")
    if shape[0] * voxel_mm[0] > 160:
        raise ValueError(f"thorax covers 160 mm of height, got {shape[0] * voxel_mm[0]:g} mm; use fewer or thinner slices")


def thorax(shape: tuple[int, int, int] = (24, 192, 192), voxel_mm: Vec = (3.0, 1.9, 1.9), seed: int = 7) -> Phantom:
    """Make a chest CT with known truth, from carina to liver dome at the default size.

    shape: (slices, rows, columns), slices from feet to head, rows from front to back, columns from the patient's
    right to left, so that hu[k] shows as radiologists expect. voxel_mm: (z, y, x) spacing in mm; rows and
    columns must cover 340 mm, slices at most 160 mm. seed: vessels, nodules, textures and the body's warp.
    The same seed on another grid samples the same anatomy. Raises ValueError for a bad shape or spacing.
    """
    _check(shape, voxel_mm)
    axes = tuple(((np.arange(n) - (n - 1) / 2) * v).astype(np.float32) for n, v in zip(shape, voxel_mm))
    streams = np.random.default_rng(seed).spawn(6)
    phase = streams[0].uniform(0, 2 * np.pi, 6)
    w = float(1.15 * max(voxel_mm[1:]))
    f = _Field(*np.ix_(*axes), phase)
    f.organs()
    fine, coarse = _texture(axes, streams[1], 2.4), _texture(axes, streams[2], 7.0)
    hu = np.full(shape, -1000, np.float32)
    _wall(hu, f, w, coarse)
    _paint(hu, f.cavity, -92.0 + 45 * _step(0.8, 2.2, coarse), w)
    _lungs(hu, f, w, fine, coarse)
    _vessels(hu, axes, phase, streams[3], w)
    nodules = _place_nodules(phase, streams[4])
    spots = np.zeros(shape, bool)
    for n in nodules:
        z, y, x = (a - c for a, c in zip(np.ix_(*axes), n["center_mm"]))
        d = np.sqrt(x * x + y * y + z * z) - n["diameter_mm"] / 2
        _paint(hu, d + np.clip(0.35 * fine, -0.8, 0.8), n["hu"], w)
        spots |= d < 0
    _organs(hu, f, w, coarse)
    bone = _bones(hu, f, w, fine)
    inside = _cover(f.body, w)
    hu += inside * np.where(f.lung < 0, 0, 5 * fine + 3 * coarse)
    hu = np.where(inside > 0, np.clip(hu, -1000, 1300), -1000).astype(np.float32)
    _couch(hu, axes, f.body, w)
    return Phantom(hu, tuple(voxel_mm), {"body": f.body < 0, "lung": (f.lung < 0) & ~spots, "bone": bone < 0, "nodules": spots}, nodules)
