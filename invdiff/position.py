"""How far a run has come: finished solvers, samples of the one under way, its state."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.solvers.base import State


@dataclass(frozen=True)
class Done:
    """Result of a solver: its picture ``(S, H, W)``, the standard deviation of the samples or None, what was used."""

    stack: np.ndarray
    spread: np.ndarray | None
    used: dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """Running sums over the samples that are done (Welford 1962).

    Attributes:
        count: samples so far.
        mean: their mean ``(S, C, H, W)``; a zero before the first.
        shown, scatter: mean and sum of squares around it of the pictures ``(S, H, W)``, for more than one sample.
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    shown: np.ndarray = field(default_factory=lambda: np.zeros(()))
    scatter: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def add(self, x0: Tensor, picture: np.ndarray | None) -> "Samples":
        """The sums with one more sample ``(S, C, H, W)`` and its picture."""
        count, shown, scatter = self.count + 1, self.shown, self.scatter
        if picture is not None:
            delta = picture - shown
            shown = shown + delta / count
            scatter = scatter + delta * (picture - shown)
        return Samples(count, self.mean + (x0 - self.mean) / count, shown, scatter)


@dataclass(frozen=True)
class Position:
    """How far a run has come: all that, with the same request, it takes to end in the same bits.

    Attributes:
        finished: results of the solvers that are done, by name.
        solver: name of the one under way, empty between two.
        samples: sums over the samples of it that are done.
        state: of the sample under way, or None before its first step.
        seconds, calls: spent on this solver so far; network calls count slices.
        chunk, block: slices per network call (None without a prior) and per data step, which a lack of memory halves.
        notes: remarks for the manifest.
    """

    finished: dict[str, Done] = field(default_factory=dict)
    solver: str = ""
    samples: Samples = field(default_factory=Samples)
    state: State | None = None
    seconds: float = 0.0
    calls: int = 0
    chunk: int | None = None
    block: int = 1
    notes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The last thing done, in words."""
        if self.state is not None:
            of = f", sample {self.samples.count + 1}" if self.samples.count else ""
            return f"step {self.state.step} of {self.solver}{of}"
        if self.solver:
            return f"sample {self.samples.count} of {self.solver}"
        return f"the end of {[*self.finished][-1]}" if self.finished else "the start"

    def arrays(self) -> Iterator[tuple[str, Tensor | np.ndarray]]:
        """Every array by its name in the file."""
        for name, done in self.finished.items():
            yield f"finished.{name}", done.stack
            if done.spread is not None:
                yield f"spread.{name}", done.spread
        yield from (("mean", self.samples.mean), ("shown", self.samples.shown), ("scatter", self.samples.scatter))
        if self.state is not None:
            yield from (("x", self.state.x), ("x0", self.state.x0))
            yield from ((f"memory.{name}", value) for name, value in self.state.memory.items())

    def numbers(self) -> dict[str, Any]:
        """Everything else, for JSON."""
        found = {k: getattr(self, k) for k in ("solver", "seconds", "calls", "chunk", "block", "notes")}
        found |= {"samples": self.samples.count, "step": None if self.state is None else self.state.step}
        return found | {"finished": {name: done.used for name, done in self.finished.items()}}
