"""Pixels three times too large: bicubic interpolation against annealed plug-and-play. Offline, under a minute."""

from _figure import run

run("sr", "super_resolution.png", lambda case: ("measured", case.measurement.y[0, 0]), factor=3, baseline="bicubic")
