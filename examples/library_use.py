"""Use invdiff as a library: build an operator, simulate, whiten, iterate a solver, look at every step.

Offline, on a small built-in phantom (set INVDIFF_VOLUME to a CT volume in HU to use your own), under a minute.
"""

import os

import torch

import invdiff
from invdiff.case import example_volume
from invdiff.intensity import MU_WATER_PER_MM as MU
from invdiff.metrics import psnr
from invdiff.operators import build
from invdiff.simulate import as_tensors, simulate_ct
from invdiff.solvers import iterate, make_solver
from invdiff.volume import load_volume, to_slices

path = os.environ.get("INVDIFF_VOLUME")
volume = load_volume(path) if path else example_volume()
middle = volume.data.shape[2] // 2
stack = to_slices(volume, slices=(middle, middle + 2))
truth = stack.data.clip(-1000, 3071)

operator = build("ct-sparse", truth.shape[1:], stack.pixel_mm, views=60)
y, variance = as_tensors(simulate_ct(truth, operator))
problem = invdiff.whiten(y, operator, variance, scale=MU, shift=MU, model_error=0.0015)
prior = invdiff.load_prior("embedded")
for state in iterate(make_solver("pnp"), problem, prior):
    hu = 1000 * state.x0[0, :, 0].numpy()
    print(f"step {state.step:2}  {psnr(hu, truth):.2f} dB")
assert torch.isfinite(state.x0).all()
