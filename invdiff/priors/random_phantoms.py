"""Random 2D phantoms for training: outlines filled with superposed soft super-ellipses and texture."""

import numpy as np
from scipy.ndimage import gaussian_filter


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
