"""CT of 40 views, a fan beam and its sinogram: converged TV against annealed plug-and-play. Offline, under a minute."""

from _figure import run

run("ct-sparse", "ct.png", lambda case: ("sinogram", case.measurement.y[0, 0]), views=40, geometry="fan", baseline="tv")
