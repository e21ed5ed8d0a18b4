"""A volume blurred by motion: the Wiener filter against annealed plug-and-play. Offline, under a minute."""

from _figure import run

run("blur", "blur.png", lambda case: ("measured", case.measurement.y[0, 0]), kernel="motion:9:30", baseline="wiener")
