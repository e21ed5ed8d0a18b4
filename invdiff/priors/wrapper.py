"""Priors made of another prior, for images that it was not made for."""

import abc
from dataclasses import replace
from typing import Any

from invdiff.priors.base import Prior


class Wrapper(Prior, abc.ABC):
    """A prior that calls ``prior``; its calls and its slices per call are those of that one.

    Args:
        prior: the prior within.
        how: one line for the manifest.
        **info: fields of its :class:`PriorInfo` that differ.
    """

    def __init__(self, prior: Prior, how: str, **info: Any):
        self.prior, self.kind, self.stride = prior, prior.kind, prior.stride
        self.slicewise, self.passes, self.together = prior.slicewise, prior.passes, prior.together
        self.info = replace(prior.info, adapted=(*prior.info.adapted, how), **info)

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Calls of the network within."""
        return self.prior.calls

    @property
    def chunk(self) -> int:
        """Slices per call of the network within."""
        return self.prior.chunk

    @chunk.setter
    def chunk(self, count: int) -> None:
        self.prior.chunk = count
