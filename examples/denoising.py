"""Noise alone: total variation against annealed plug-and-play. Offline, under a minute."""

from _figure import run

run("denoise", "denoising.png", lambda case: ("measured", case.measurement.y[0, 0]), baseline="tv")
