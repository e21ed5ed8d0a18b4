"""Where a run may write: names and places checked before it starts, and one run at a time."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from invdiff.errors import ResourceError, UsageError
from invdiff.files import SERIES_SUFFIX, VOLUME_SUFFIXES, check_writable, is_series, show, split_suffix

CHECKPOINT_SUFFIX = ".checkpoint.safetensors"


@dataclass(frozen=True)
class Outputs:
    """The files of one run, resolved (no symbolic links).

    Attributes:
        volume: the result, ``.nii.gz``, ``.nii`` or another accepted suffix.
        manifest: ``.json`` beside it.
        picture: ``.png`` beside it.
        spread: ``_std`` volume beside it, for more than one sample.
        notes: remarks for the terminal and the manifest, e.g. that a symbolic link was followed.
    """

    volume: Path
    manifest: Path
    picture: Path
    spread: Path
    notes: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Path:
        """``NAME.checkpoint.safetensors`` beside it, while the run is not over."""
        return self.manifest.with_name(self.manifest.name.removesuffix(".json") + CHECKPOINT_SUFFIX)

    @property
    def all(self) -> tuple[Path, ...]:
        """Every path of the result."""
        return (self.volume, self.manifest, self.picture, self.spread)


def sidecars(volume: Path, suffixes: tuple[str, ...] = VOLUME_SUFFIXES) -> Outputs:
    """The names beside ``volume``: ``NAME.json``, ``NAME.png`` (or ``NAME_picture.png``), ``NAME_std.nii.gz``."""
    stem, suffix = split_suffix(volume, suffixes)
    folder, picture = volume.parent, f"{stem}_picture.png" if suffix.lower() == ".png" else f"{stem}.png"
    return Outputs(volume, folder / f"{stem}.json", folder / picture, folder / f"{stem}_std{suffix}")


def check_output(
    path: str | os.PathLike,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike] = (),
    needed_bytes: int = 0,
    suffixes: tuple[str, ...] = VOLUME_SUFFIXES,
    beside: bool = True,
) -> Outputs:
    """Find out before a long run whether its files can be written.

    Args:
        path: the result; a symbolic link is followed, and ``notes`` says so.
        overwrite: existing files of the run may be replaced.
        inputs: files that the run reads; never overwritten, whatever ``overwrite`` says.
        needed_bytes: estimated size of everything the run will write.
        suffixes: accepted endings, in lower case.
        beside: the run writes manifest, picture and spread as well.

    Raises:
        UsageError: wrong suffix, folder missing, a file exists already, or the output is an input.
        ResourceError: the folder cannot be written to, or the disk has too little room.
    """
    asked = Path(path)
    split_suffix(asked, suffixes)
    try:
        target = asked.resolve()
        notes = (f"{show(asked)} is a symbolic link: writing {show(target)}",) if asked.is_symlink() else ()
    except (OSError, RuntimeError) as error:  # a loop of symbolic links, a name that is too long
        raise UsageError(f"{show(asked)[:80]}: cannot be resolved ({str(error)[:40]}); name another output") from None
    outputs = replace(sidecars(target, suffixes), notes=notes)
    if max(len(os.fsencode(file.name)) for file in (*outputs.all, outputs.checkpoint)) > 255:
        raise UsageError(f"{show(asked)[:80]}...: is too long a name; name another output")
    _check_inputs(outputs, inputs)
    _check_folder(target.parent, needed_bytes)
    for file in outputs.all if beside else outputs.all[:1]:
        if file.is_dir() and not (file == target and target.suffix.lower() == SERIES_SUFFIX and is_series(file)):
            raise UsageError(f"{show(file)}: is a folder; name another output")
        if not overwrite and os.path.lexists(file):
            raise UsageError(f"{show(file)}: exists already; name another output or pass --overwrite")
    return outputs


def _check_inputs(outputs: Outputs, inputs: Iterable[str | os.PathLike]) -> None:
    for given in inputs:
        for file in outputs.all:
            if os.path.exists(given) and file.exists() and os.path.samefile(given, file):
                raise UsageError(f"{show(file)}: would overwrite the input {show(given)}; name another output")


def _check_folder(folder: Path, needed_bytes: int) -> None:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"{show(folder)}: {what}; create it or name another output")
    check_writable(folder)
    check_room(folder, needed_bytes)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise :class:`ResourceError` where the disk of ``folder`` has less room than ``needed_bytes``."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise ResourceError(
            f"{show(folder)}: {free / 1e6:.0f} MB free, the run needs about {needed_bytes / 1e6:.0f} MB; "
            "make room or name another folder"
        )


def next_free_name(folder: str | os.PathLike, stem: str, suffix: str = ".nii.gz", unfinished: bool = False) -> Path:
    """``stem.nii.gz``, or ``stem-2.nii.gz``, ``-3``, ... when a file of that run exists already.

    With ``unfinished`` the last one taken whose checkpoint is there, if any.
    """
    number, left = 1, None
    while True:
        path = Path(folder) / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
        files = sidecars(path, (suffix,))
        if files.checkpoint.exists() and not any(os.path.lexists(file) for file in files.all):
            left = path
        elif not any(os.path.lexists(file) for file in files.all):
            return left if unfinished and left is not None else path
        number += 1


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Keep other runs from writing ``path`` while the block lasts; an empty hidden file beside it holds the lock.

    A process that is killed leaves the file and no lock. File systems without locks have none.

    Raises:
        UsageError: another run holds the lock.
        ResourceError: the folder cannot be written to.
    """
    target = Path(path)
    lock = target.with_name(f".invdiff-lock-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}")
    handle = _lock(lock, target)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone, which is no reason to hide what else went wrong
            lock.unlink()  # before the lock goes: who opened it meanwhile sees that it is gone
        os.close(handle)


def _lock(lock: Path, target: Path) -> int:
    try:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise ResourceError(f"{show(lock.parent)}: cannot be written to ({error.strerror})") from None
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.fstat(handle).st_nlink > 0  # not removed by a run that just ended
    except BlockingIOError:
        free = False
    except (ImportError, OSError):
        free = True
    if not free:
        os.close(handle)
        raise UsageError(f"{show(target)}: another run is writing it; wait for its end or name another output")
    return handle
