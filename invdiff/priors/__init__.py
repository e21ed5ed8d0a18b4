"""Priors, by name or folder: one explicit table, resolved on first use."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from invdiff.errors import PriorError

if TYPE_CHECKING:
    from invdiff.priors.base import Prior

WEIGHTS = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True)
class PriorEntry:
    """One row: a line of text and the folder with model.safetensors, config.json and the model card."""

    summary: str
    folder: Path


PRIORS: dict[str, PriorEntry] = {
    "embedded": PriorEntry("small U-Net for CT and MR slices, trained on a CPU; the default", WEIGHTS / "embedded"),
}


def prior_folder(name: str | Path) -> Path:
    """The folder of a prior given by name or path.

    Raises:
        PriorError: neither a known name nor a folder; lists the names.
    """
    if str(name) in PRIORS:
        return PRIORS[str(name)].folder
    if Path(name).is_dir():
        return Path(name)
    raise PriorError(f"unknown prior '{name}': give a folder with model.safetensors, or one of {', '.join(PRIORS)}")


def load_prior(name: str | Path = "embedded", device: str = "cpu", chunk: int | None = None) -> "Prior":
    """Load a prior.

    Args:
        name: a name of the table, or a folder.
        device: where its network runs.
        chunk: slices per network call; None for 1 on a CPU and 16 on a GPU.
    """
    from invdiff.priors.network import load_network

    return load_network(prior_folder(name), device, chunk)
