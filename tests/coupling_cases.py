"""What the tests of the slice coupling share."""

import torch
from solver_cases import SLICES

from invdiff.coupling import KNEE, QuadraticZ
from invdiff.draws import Draws

RNG = Draws(3, tuple(range(SLICES)))


def potential(coupling, u, weight, near):
    """Written out: Huber's function of the differences in units of s, or their squares."""
    d = (u[:, 1:] - u[:, :-1]).abs()
    if isinstance(coupling, QuadraticZ):
        return 0.5 * coupling.weight * weight * near**2 * d.square().sum()
    knee = KNEE * weight**-0.5
    rounded = torch.where(d < knee, 0.5 * d.square() / knee + 0.5 * knee, d)
    return coupling.weight * weight**0.5 * near * rounded.sum()
