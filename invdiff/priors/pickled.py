"""Checkpoints that are pickles of whole objects, such as EDM's: read in a process of its own, and only where asked."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from invdiff.errors import PriorError
from invdiff.files import sha256_file, show
from invdiff.priors.checkpoint import Checkpoint, read_checkpoint

SCRIPT = Path(__file__).with_name("unpickle.py")
MOST_SECONDS = 1800
# Classes whose arguments and attributes are options by the names of ``edm_files`` and ``ncsnpp_files``; elsewhere the
# same word may mean something else, as attention_resolutions in guided-diffusion's network, which are no pixels.
HEEDED = ("Precond", "SongUNet", "DhariwalUNet", "NCSNpp", "ADMUNet")


def read_pickled(path: Path, part: str | None = None) -> tuple[Checkpoint, dict[str, Any]]:
    """The weights of a pickle, and what its network was made with, where that has a known meaning.

    ``unpickle.py`` runs in an isolated Python, without the user's paths, with limits on memory, disk and time. What it
    writes is read as any other checkpoint, that is, as weights only.

    Args:
        path: a pickle, or a file of ``torch.save`` that holds more than tensors.
        part: where in the file the weights are; None for the usual names.

    Raises:
        PriorError: no such file, not readable, or without weights.
    """
    if not path.is_file():
        raise PriorError(f"{show(path)}: no such file; check the path")
    with tempfile.TemporaryDirectory(prefix="invdiff-") as folder:
        command = [sys.executable, "-I", str(SCRIPT), str(path.resolve()), folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False, cwd=folder
            )
        except subprocess.TimeoutExpired:
            raise PriorError(f"{show(path)}: is not read within {MOST_SECONDS} seconds; do not use it") from None
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it was ended"])[-1][:200]
            raise PriorError(f"{show(path)}: no weights can be taken out ({why}); get it from its source again")
        try:
            checkpoint = read_checkpoint(Path(folder) / "weights.pt", part)
        except PriorError as error:
            raise PriorError(str(error).replace(show(Path(folder) / "weights.pt"), show(path), 1)) from None
        told = json.loads((Path(folder) / "options.json").read_text())
    options = told["modules"].get(checkpoint.part, {})
    if not str(options.get("class_name", "")).endswith(HEEDED):
        options = {}
    return replace(checkpoint, path=path, sha256=sha256_file(path), types=tuple(told["types"])), options
