"""Priors, by name or folder: one explicit table, resolved on first use."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from invdiff.errors import PriorError
from invdiff.files import show

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


def split_class(name: str | Path) -> tuple[str | Path, str | None]:
    """``FOLDER:CLASS`` taken apart; the class is None where there is none.

    Folders and classes may have colons in their names: what exists as it stands is no class, and else the folder is
    the longest one that there is; the rest, after its colon, is the class. Where there is none, the class follows the
    last colon.
    """
    text = str(name)
    if text in PRIORS or ":" not in text or Path(text).exists():
        return name, None
    ends = [k for k, letter in enumerate(text) if letter == ":" and k]
    found = [k for k in ends if text[:k] in PRIORS or Path(text[:k]).exists()]
    if not (found or ends):
        return name, None
    end = (found or ends)[-1]
    return text[:end], text[end + 1 :]


def load_prior(name: str | Path = "embedded", device: str = "cpu", chunk: int | None = None) -> "Prior":
    """Load a prior.

    Args:
        name: a name of the table, a folder (our own, imported, or of diffusers; with an autoencoder in ``vae`` it
            becomes a :class:`LatentPrior`), or a checkpoint file that says enough about itself, with its configuration
            beside it. ``FOLDER:CLASS`` for a folder of our own that was trained with classes, to be told one: see
            :func:`split_class`.
        device: where its network runs.
        chunk: slices per network call; None for 1 on a CPU and 16 on a GPU.

    Raises:
        PriorError: neither a known name nor a folder nor a file, a class that it does not have, or what its reader
            refuses.
    """
    if str(name) not in PRIORS and Path(name).is_file():
        from invdiff.priors.foreign import open_foreign

        return open_foreign(name).load(device, chunk)
    name, label = split_class(name)
    if label is not None and Path(name).is_file():
        raise PriorError(
            f"{show(name)}: is a file, and class '{label[:40]}' is for a folder of our own: import it first"
        )
    folder = prior_folder(name)
    if str(name) not in PRIORS:
        from invdiff.priors.foreign import load_imported, open_foreign, read_card
        from invdiff.priors.unet2d_files import is_folder, is_latent

        if label is not None and (is_folder(folder) or is_latent(folder) or "architecture" in read_card(folder)):
            raise PriorError(
                f"class '{label[:40]}': {show(folder)} is no prior of our own: import it with --class, without ':'"
            )
        if is_latent(folder):
            from invdiff.priors.latent_files import load_latent

            return load_latent(folder, device, chunk)
        if "architecture" in read_card(folder):
            return load_imported(folder, device, chunk)
        if is_folder(folder):
            return open_foreign(folder).load(device, chunk)
    from invdiff.priors.network import load_network

    return load_network(folder, device, chunk, label)
