"""How a prior is fitted to images that differ from those it was made for; ``--set prior.NAME=VALUE``."""

from dataclasses import dataclass, fields
from typing import Any

from invdiff.errors import UsageError, choose, nearest
from invdiff.priors.precision import PRECISIONS

COMPLEX = {
    "phase": "slow phase removed; magnitude and remainder through the prior",
    "parts": "real and imaginary part through the prior",
}
PLANES = {
    "slices": "the slices",
    "all": "the slices and the two planes across them: in turn where the solver turns them, else their mean",
}


@dataclass(frozen=True)
class PriorOptions:
    """What may be chosen.

    Args:
        tile: side in pixels of the tiles that larger slices are cut into; "none" for whole slices; "auto" for the size
            that the prior was trained on where its card says one.
        overlap: of neighbouring tiles, in pixels; "auto" for a quarter of a tile.
        complex: name in ``COMPLEX``, how a 1-channel prior serves complex images.
        planes: name in ``PLANES``, which images of the volume the prior sees; "auto" for all where slices were too
            thick (``through_plane`` of the operator), and of a volume that a scanner measured
            (:func:`invdiff.fitting.is_volume`) in solvers that take the planes in turn; else the slices.
        precision: name in ``PRECISIONS``, of the network; "auto" is for networks of our own, else float32.

    Raises:
        UsageError: another value.
    """

    tile: int | str = "auto"
    overlap: int | str = "auto"
    complex: str = "phase"
    planes: str = "auto"
    precision: str = "auto"

    def __post_init__(self):
        choose(self.complex, COMPLEX, "value of prior.complex")
        choose(self.planes, {"auto": "", **PLANES}, "value of prior.planes")
        choose(self.precision, PRECISIONS, "value of prior.precision")
        for name, words in (("tile", ("auto", "none")), ("overlap", ("auto",))):
            value = getattr(self, name)
            if value not in words and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"prior.{name} takes {' or '.join(words)} or a positive number of pixels, got {value}")

    @classmethod
    def of(cls, given: dict[str, Any]) -> "PriorOptions":
        """From names and values, numbers also as text.

        Raises:
            UsageError: an unknown name (lists the known ones), or another value.
        """
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise UsageError(f"unknown prior.{key}: choose one of {', '.join(known)}{nearest(key, known)}")
        values: dict[str, Any] = {k: int(v) if isinstance(v, str) and v.isdecimal() else v for k, v in given.items()}
        return cls(**values)
