"""Priors: ``denoise(x, sigma)`` and the table of those that come with the package."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PriorEntry:
    """One line of the table: what it is and where it lies."""

    summary: str


PRIORS: dict[str, PriorEntry] = {}
