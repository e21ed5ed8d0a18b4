"""Seven of ten pixels missing: biharmonic filling against annealed plug-and-play. Offline, under a minute."""

from _figure import run

run(
    "inpaint",
    "inpainting.png",
    lambda case: ("measured", case.measurement.y[0, 0]),
    mask="random:0.7",
    baseline="biharmonic",
)
