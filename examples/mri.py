"""Multi-coil MRI, 6 times accelerated: SENSE by conjugate gradients against plug-and-play. Offline, under a minute."""

import numpy as np
from _figure import run


def log_kspace(case):
    coils = np.hypot(*np.split(case.measurement.y[0], 2))
    return "k-space of the first coil, dB", 20 * np.log10(coils[0] + 1e-3 * coils.max())


run("mri-multicoil", "mri.png", log_kspace, baseline="sense-cg", slices=(8, 9), acceleration=6, pattern="poisson")
