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
    raise PriorError(f"unknown prior '{name}': give a folder or a checkpoint file, or one of {', '.join(PRIORS)}")


def load_prior(name: str | Path = "embedded", device: str = "cpu", chunk: int | None = None) -> "Prior":
    """Load a prior.

    Args:
        name: a name of the table, a folder (our own, imported, or of diffusers; with an autoencoder in ``vae`` it
            becomes a :class:`LatentPrior`), or a checkpoint file that says enough about itself, with its configuration
            beside it. ``FOLDER:CLASS`` for a folder of our own that was trained with
            classes, to be told one.
        device: where its network runs.
        chunk: slices per network call; None for 1 on a CPU and 16 on a GPU.
    """
    if str(name) not in PRIORS and Path(name).is_file():
        from invdiff.priors.foreign import open_foreign

        return open_foreign(name).load(device, chunk)
    label = None
    if str(name) not in PRIORS and ":" in str(name) and not Path(name).exists():
        name, _, label = str(name).rpartition(":")
    folder = prior_folder(name)
    if str(name) not in PRIORS and label is None:
        from invdiff.priors.foreign import load_imported, open_foreign, read_card
        from invdiff.priors.unet2d_files import is_folder, is_latent

        if is_latent(folder):
            from invdiff.priors.latent_files import load_latent

            return load_latent(folder, device, chunk)
        if "architecture" in read_card(folder):
            return load_imported(folder, device, chunk)
        if is_folder(folder):
            return open_foreign(folder).load(device, chunk)
    from invdiff.priors.network import load_network

    return load_network(folder, device, chunk, label)
