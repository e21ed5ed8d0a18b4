"""A chest CT phantom with known truth: implicit 3D anatomy in mm, evaluated on any voxel grid.

Organs are signed distances d(x, y, z) in mm (negative inside), joined by smooth unions and bent by a
low-frequency warp; a voxel takes the share smoothstep(1/2 - d/w) of an organ, w about one voxel, so edges
carry partial volume. Axes: x to the patient's left (image right), y to the back, z to the head; the origin is
the centre of the volume. Every structure and texture is a function of mm alone, so each grid samples one anatomy.
"""

from dataclasses import dataclass

import numpy as np

from invdiff.errors import UsageError
from invdiff.phantom_shapes import (
    CHAMBERS,
    CORONARY,
    HEPATIC,
    HILA,
    Array,
    Axes,
    Field,
    Vec,
    capsule,
    cover,
    draw,
    ellipsoid,
    grow,
    paint,
    round_box,
    smax,
    smin,
    step,
    texture,
    tubes,
)

_BLOOD, _MUSCLE, _FAT = 135.0, 52.0, -102.0  # HU
# Pedicle, lamina and transverse process of a vertebra: tapering tubes (start, end, radius, radius) in mm.
_ARCH = (
    ((9, 60, 4), (14, 72, 3), 4.2, 4.6),
    ((14, 74, 2), (2, 84, -1), 3.8, 3.6),
    ((15, 74, 3), (37, 83, 5), 4.6, 4.0),
)


@dataclass(frozen=True)
class Phantom:
    """A CT volume with its truth.

    Attributes:
        hu: float32 (slices, rows, columns) in HU, -1000..1300, air exactly -1000.
        voxel_mm: (z, y, x) spacing in mm.
        labels: bool masks of hu's shape: "body", "lung", "bone", "nodules".
        nodules: one dict per nodule, with center_mm (z, y, x) from the volume's centre, diameter_mm and hu (its mean
            density).
    """

    hu: Array
    voxel_mm: Vec
    labels: dict[str, Array]
    nodules: list[dict]


def _vessels(hu: Array, axes: Axes, phase: Array, rng: np.random.Generator, w: float) -> None:
    """Arteries with their bronchi and veins of both lungs, grown in 3D towards points in the lung."""
    pts = rng.uniform((-130, -85, -85), (130, 95, 90), (9000, 3))
    f = Field(pts[:, 2], pts[:, 1], pts[:, 0], phase)
    f.organs()
    pts = pts[f.lung < -3.0]
    blood, wall, lumen = (np.zeros_like(hu) for _ in range(3))
    for hilum, side in zip(HILA, (pts[pts[:, 0] < 0], pts[pts[:, 0] > 0]), strict=True):
        half = len(side) // 2
        artery = grow(hilum, side[:half], 0.58, rng)
        vein = grow((hilum[0], hilum[1] - 4, hilum[2] - 14), side[half:], 0.56, rng)
        draw(blood, axes, artery + vein, w)
        shift = np.array((0.0, 0.8, -0.6))
        wide = [segment for segment in artery if segment[3] > 2.0]
        airway = [(a + shift * 1.8 * ra, b + shift * 1.8 * rb, 0.7 * ra, 0.7 * rb) for a, b, ra, rb in wide]
        draw(wall, axes, airway, w, 0.7)
        draw(lumen, axes, airway, w)
    for share, value in ((wall, -180.0), (lumen, -960.0), (np.where(lumen > 0.5, 0, blood), 80.0)):
        hu += share * (value - hu)


def _wall(hu: Array, f: Field, w: float, streak: Array) -> None:
    """Skin, fat and the muscle layers of the chest wall."""
    a, cav, body, muscle = np.degrees(f.ang), f.cavity, f.body, _MUSCLE - 35 * step(1.1, 2.6, streak)
    deep = 2 + 7 + 5 * step(100, 70, a) + 3 * np.cos(f.ang * 3) + 3 * step(20, -60, f.z)
    paint(hu, body, 20.0, w)
    paint(hu, body + 2.2, _FAT, w)
    ring = np.maximum(0.5 - cav, cav - 9.5 + 1.5 * streak * 0.5)
    pec = 12.5 + 13 * step(168, 150, a) * step(104, 132, a) * (0.75 + 0.25 * step(-40, 30, f.z)) - 3
    serratus = 11 + 8 * step(125, 105, a) * step(55, 72, a) - 2 + 1.5 * np.sin(f.z / 5 + f.ang * 14)
    layers = [ring, np.maximum(12.5 - cav, cav - pec), np.maximum(11.5 - cav, cav - serratus)]
    layers.append(np.maximum(body + deep, -(body + deep + 1 + 10 * step(105, 85, a) * step(38, 52, a))))
    layers.append(np.maximum(body + deep - 2, -(body + deep - 1 + 7 * step(44, 30, a) * step(-70, 10, f.z))))
    scap = step(-22, 35, f.z)
    layers.append(np.maximum(np.maximum(np.abs(a - 52) - 6 - 20 * scap, 11.5 - cav), cav - 11 - 15 * scap))
    sx = np.abs(f.x)
    spinae = smin(np.hypot((sx - 19) / 1.25, f.y - 90) - 11, np.hypot((sx - 36) / 1.5, f.y - 92) - 7.5, 5.0)
    layers.append(smax(spinae, body + 6, 4.0))
    for layer in layers:
        paint(hu, np.maximum(layer, body + 5), muscle, w)


def _bones(hu: Array, f: Field, w: float, grain: Array) -> Array:
    """Ribs, cartilage, sternum, scapulae and spine; returns the distance to bone."""
    a, sx = np.degrees(f.ang), np.abs(f.x)
    drop = 112 * step(5, 150, a) - 34 * step(136, 178, a)
    s = f.z + drop + 4 + np.sign(f.x) * 1.5
    s = (s - 23 * np.round(s / 23)) * 0.86
    rib = round_box(f.cavity - 5.5, s, 4.1 + 0.6 * np.sin(2 * f.ang), 6.6, 3.2)
    cartilage = np.maximum(np.maximum(rib - 0.3, 138 - a), 20 - sx)
    rib = np.maximum(np.maximum(rib, a - 139), 29 - sx)
    width = 15 + 9 * step(38, 62, f.z) + 2 * np.cos(f.z / 7)
    sternum = round_box(f.x, f.y + 87 - 3 * step(0, 80, f.z), width, 6.0, 4.5)
    arc = np.radians(a - 53) * f.rho
    thick, tall = 2.0 + 2.5 * step(10, 30, np.abs(arc)), 2 + 38 * step(-18, 70, f.z)
    blade = round_box(f.cavity - 17 - 2 * np.sin(arc / 16), arc, thick, tall, 1.9)
    blade = np.maximum(blade, -14 - f.z)
    zl = f.z - 25 * np.round(f.z / 25)
    zs = f.z + 9 - 25 * np.round((f.z + 9) / 25) - 9
    plan = ellipsoid(f, (0, 50, 0), (17.5, 15, 1e4))
    plan = smax(plan, 9 - np.hypot(f.x / 1.1, f.y - 70.5), 4.0) + 1.6 * np.maximum(1 - (zl / 10) ** 2, 0)
    paint(hu, smax(smax(f.spine + 2, 66 - f.y, 8.0), f.body + 8, 6.0), _MUSCLE, w)
    paint(hu, np.maximum(plan + 0.5, np.abs(zl) - 14), 78.0, w)
    vertebra = smax(plan, np.abs(zl) - 9.8, 2.0)
    for p, q, rp, rq in _ARCH:
        vertebra = smin(vertebra, capsule(sx, f.y, zl * 0.75, p, q, rp, rq), 3.0)
    vertebra = smin(vertebra, capsule(f.x * 1.2, f.y, zs, (0, 83, -2), (0, 99, -13), 3.6, 3.0), 3.0)
    neck = capsule(sx, f.y, zl * 0.8, (19, 60, 7), (36, 84, 5), 3.4, 3.4)
    canal = np.hypot(f.x / 1.1, f.y - 70.5) - 8.2
    vertebra = np.maximum(np.minimum(vertebra, np.maximum(neck, 17 - sx)), -canal)
    paint(hu, cartilage, 105.0 + 8 * grain, w)
    bone = np.minimum(np.minimum(rib, sternum), np.minimum(blade, vertebra))
    paint(hu, bone, np.where(vertebra <= bone + 0.5, 680.0, 1100.0), w)
    paint(hu, bone + 1.5, 215.0 + 55 * grain, w)
    paint(hu, canal, -10.0, w)
    paint(hu, canal + 3.2, 38.0, w)
    return bone


def _lungs(hu: Array, f: Field, w: float, fine: Array, coarse: Array) -> None:
    """Parenchyma with its dependent gradient, oblique fissures and the right minor fissure."""
    tone = -850 + 0.3 * f.y + 24 * fine + 20 * coarse
    oblique = (f.z - 6 - 0.85 * f.y + np.sign(f.x) * 6 - 3 * np.sin(f.x / 19)) * 0.76
    minor = np.maximum(np.abs(f.z - 4 - 0.12 * f.y - 2 * np.sin(f.x / 23)), np.maximum(f.x, -oblique))
    sheet = np.maximum(cover(np.abs(oblique) - 0.5, 2 * w), 0.5 * cover(minor - 0.5, 2 * w))
    paint(hu, f.lung, np.clip(tone, -920, -760) + 150 * sheet, w)


def _organs(hu: Array, f: Field, w: float, coarse: Array) -> None:
    """Mediastinum and upper abdomen: fat, heart and chambers, vessels, airways, oesophagus, liver, spleen, stomach."""
    liver = smax(smax(f.cavity + 4, f.dome + 3, 5.0), f.x - 22 + 0.5 * f.y, 8.0)
    paint(hu, liver, 68.0, w)
    paint(hu, np.maximum(tubes(f, *HEPATIC), liver), 100.0, w)
    paint(hu, smax(ellipsoid(f, (82, 42, -85), (36, 40, 34)), f.cavity + 4, 4.0), 64.0, w)
    stomach = smax(ellipsoid(f, (58, -18, -90), (42, 36, 38)), f.dome + 4, 4.0)
    paint(hu, stomach, 45.0, w)
    paint(hu, stomach + 4, np.where(f.y < -28, -980.0, 20.0), w)
    paint(hu, f.heart - 1.6, -60.0, w)
    paint(hu, f.heart, 72.0, w)
    paint(hu, np.minimum(f.veins, f.pulmonary), 55.0, w)
    for k, (centre, radii) in enumerate(CHAMBERS):
        d = smax(ellipsoid(f, centre, radii, 0.35), f.heart + (2.5, 3.5, 9, 2.5)[k], 3.0)
        paint(hu, d + 1.2 * coarse, _BLOOD + (0, 4, -8, 0)[k], w)
    paint(hu, tubes(f, *CORONARY), 125.0, w)
    paint(hu, f.veins + 1.3, _BLOOD - 6, w)
    paint(hu, f.pulmonary + 1.3, _BLOOD + 3, w)
    paint(hu, np.maximum(f.aorta, -f.heart - 4), 60.0, w)
    paint(hu, f.aorta + 1.3, _BLOOD, w)
    gullet = np.hypot((f.x - 7 - 3 * np.sin(f.z / 40)) / 1.5, f.y - 29) - 5.2
    paint(hu, gullet, 42.0, w)
    paint(hu, gullet + 4.0, -350.0, w)
    paint(hu, f.airway - 1.6, 38.0, w)
    paint(hu, f.airway, -990.0, w)


def _place_nodules(phase: Array, rng: np.random.Generator) -> list[dict]:
    """Five nodules in the lungs, within 28 mm of the middle slice and clear of walls and each other."""
    out: list[dict] = []
    for diameter, value in ((11.5, 35.0), (9.0, -520.0), (7.5, 60.0), (6.0, 25.0), (4.5, 180.0)):
        while True:
            p = rng.uniform((-115, -70, -28), (115, 85, 28))
            x, y, z = p[:, None]
            f = Field(z, y, x, phase)
            f.organs()
            far = all(np.linalg.norm(p[::-1] - n["center_mm"]) > 45 for n in out)
            if f.lung[0] < -diameter / 2 - 3 and far:
                break
        out.append({"center_mm": tuple(float(v) for v in p[::-1]), "diameter_mm": diameter, "hu": value})
    return out


def _couch(hu: Array, axes: Axes, body: Array, w: float) -> None:
    """Curved carbon-fibre couch top with a foam core, behind the back."""
    y, x = np.ix_(*axes[1:])
    d = np.maximum(np.abs(y + x * x / 1050 - 121.5) - 8, np.abs(x) - 140)
    flat = np.full(d.shape, -1000, np.float32)
    paint(flat, d, -180.0, w)
    paint(flat, d + 2, -930.0, w)
    np.copyto(hu, flat, where=(hu == -1000) & (body > w))


def _check(shape: tuple, voxel_mm: tuple) -> None:
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise UsageError(
            f"thorax expects shape (slices, rows, columns), positive integers, got {shape}; try (24, 192, 192)"
        )
    if len(voxel_mm) != 3 or not all(np.isfinite(v) and v > 0 for v in voxel_mm):
        raise UsageError(f"thorax expects voxel_mm (z, y, x) of positive mm, got {voxel_mm}; try (3.0, 1.9, 1.9)")
    height, depth, width = (n * v for n, v in zip(shape, voxel_mm, strict=True))
    if min(depth, width) < 340:
        raise UsageError(
            f"thorax needs a field of 340 mm, got {depth:g} x {width:g} mm; "
            f"use voxels of {340 / min(shape[1:]):.2f} mm or more"
        )
    if height > 160:
        raise UsageError(f"thorax covers 160 mm of height, got {height:g} mm; use fewer or thinner slices")


def thorax(shape: tuple[int, int, int] = (24, 192, 192), voxel_mm: Vec = (3.0, 1.9, 1.9), seed: int = 7) -> Phantom:
    """Make a chest CT with known truth, from carina to liver dome at the default size.

    The same seed on another grid samples the same anatomy.

    Args:
        shape: (slices, rows, columns), slices from feet to head, rows from front to back, columns from the patient's
            right to left, so that hu[k] shows as radiologists expect.
        voxel_mm: (z, y, x) spacing in mm; rows and columns must cover 340 mm, slices at most 160 mm.
        seed: vessels, nodules, textures and the body's warp.

    Raises:
        UsageError: a shape or spacing that cannot be used.
    """
    _check(shape, voxel_mm)
    axes = tuple(((np.arange(n) - (n - 1) / 2) * v).astype(np.float32) for n, v in zip(shape, voxel_mm, strict=True))
    streams = np.random.default_rng(seed).spawn(6)
    phase = streams[0].uniform(0, 2 * np.pi, 6)
    w = float(1.15 * max(voxel_mm[1:]))
    z, y, x = np.ix_(*axes)
    f = Field(z, y, x, phase)
    f.organs()
    fine, coarse = texture(axes, streams[1], 2.4), texture(axes, streams[2], 7.0)
    hu = np.full(shape, -1000, np.float32)
    _wall(hu, f, w, coarse)
    paint(hu, f.cavity, -92.0 + 45 * step(0.8, 2.2, coarse), w)
    _lungs(hu, f, w, fine, coarse)
    _vessels(hu, axes, phase, streams[3], w)
    nodules = _place_nodules(phase, streams[4])
    spots = np.zeros(shape, bool)
    for n in nodules:
        z, y, x = (a - c for a, c in zip(np.ix_(*axes), n["center_mm"], strict=True))
        d = np.sqrt(x * x + y * y + z * z) - n["diameter_mm"] / 2
        paint(hu, d + np.clip(0.35 * fine, -0.8, 0.8), n["hu"], w)
        spots |= d < 0
    _organs(hu, f, w, coarse)
    bone = _bones(hu, f, w, fine)
    inside = cover(f.body, w)
    hu += inside * np.where(f.lung < 0, 0, 5 * fine + 3 * coarse)
    hu = np.where(inside > 0, np.clip(hu, -1000, 1300), -1000).astype(np.float32)
    _couch(hu, axes, f.body, w)
    labels = {"body": f.body < 0, "lung": (f.lung < 0) & ~spots, "bone": bone < 0, "nodules": spots}
    return Phantom(hu, (voxel_mm[0], voxel_mm[1], voxel_mm[2]), labels, nodules)
