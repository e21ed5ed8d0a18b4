"""Files as a whole: names and places checked before a run, written completely or not at all."""

import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from invdiff.errors import ResourceError, UsageError

VOLUME_SUFFIXES = (".nii.gz", ".nii")
SERIES_SUFFIX = ".dcm"  # written as a folder of slices 0001.dcm, 0002.dcm, ...
CHECKPOINT_SUFFIX = ".checkpoint.safetensors"
AGAIN = "copy or download it again"


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


def show(path: str | os.PathLike) -> str:
    """``path`` as one printable line, whatever bytes its name holds."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def label(path: str | os.PathLike) -> str:
    """What manifests and pictures call an input: a file by its name, a folder, which may be a patient's, by none."""
    return "a folder of images" if Path(path).is_dir() else show(Path(path).name)


def _either(words: tuple[str, ...]) -> str:
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"


def split_suffix(path: str | os.PathLike, suffixes: tuple[str, ...] = VOLUME_SUFFIXES) -> tuple[str, str]:
    """``("scan", ".nii.gz")`` of ``scan.nii.gz``; case does not matter.

    Raises:
        UsageError: the name ends in none of ``suffixes``, or is nothing but a suffix.
    """
    name = Path(path).name
    for suffix in suffixes:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], name[-len(suffix) :]
    raise UsageError(f"{show(path)}: cannot be written under this name; end it in {_either(suffixes)}")


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
        if file.is_dir() and not (file == target and target.suffix.lower() == SERIES_SUFFIX and _is_series(file)):
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
    try:  # permission bits say too little (root, read-only mounts, quotas): create a file and see
        with tempfile.TemporaryFile(dir=folder, prefix=".invdiff-probe-") as probe:
            probe.write(b"0")
    except OSError as error:
        raise ResourceError(f"{show(folder)}: cannot be written to ({error.strerror}); name another folder") from None
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
        lock.unlink(missing_ok=True)  # before the lock goes: who opened it meanwhile sees that it is gone
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


@contextmanager
def atomic_write(
    path: str | os.PathLike, overwrite: bool = False, folder: bool = False, mode: int = 0o666
) -> Iterator[Path]:
    """Yield a private temporary path in the same folder that becomes ``path`` when the block succeeds.

    The data reach the disk (fsync) before the name changes; on any failure the temporary file (with ``folder``: folder)
    is removed and an old ``path`` stays as it was. A symbolic link is followed, not replaced. ``mode`` of a file is
    less what the umask takes.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is false, also when another process created it meanwhile; or it is
            a folder that holds more than a written series.
        ResourceError: the disk is full or the folder cannot be written to.
    """
    target = Path(path).resolve()
    if not overwrite and os.path.lexists(target):
        raise UsageError(f"{show(target)}: exists already; name another output or pass --overwrite")
    if target.is_dir() and not (folder and _is_series(target)):
        raise UsageError(f"{show(target)}: is a folder that holds other files; name another output")
    part = target.parent / f".{target.name[:48]}.part-{os.getpid()}-{secrets.token_hex(3)}"
    try:
        if folder:
            part.mkdir()
        else:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        yield part
        for piece in (*(part.iterdir() if folder else ()), part):
            _sync(piece)
        _rename(part, target, overwrite)
        _sync(target.parent)
    except OSError as error:
        raise ResourceError(f"{show(target)}: cannot be written ({error}); nothing was changed") from error
    finally:
        _remove(part)


def _is_series(folder: Path) -> bool:
    """Nothing but slices as a series is written: such a folder may be replaced."""
    return all(re.fullmatch(r"\d{4,}\.dcm", entry.name) and entry.is_file() for entry in folder.iterdir())


def _remove(path: Path) -> None:
    """A file or folder that may be gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what a killed process left of writing ``path``; only where no other process can be writing it."""
    start = f".{path.name[:48]}.part-"
    for part in [p for p in path.parent.iterdir() if p.name.startswith(start)]:
        part.unlink(missing_ok=True)


def _rename(part: Path, target: Path, overwrite: bool) -> None:
    if not overwrite and part.is_file():
        try:
            os.link(part, target)  # unlike a rename, fails when another process was faster
            return
        except FileExistsError:
            raise UsageError(f"{show(target)}: was created by another process meanwhile; pass --overwrite") from None
        except OSError:  # file systems without hard links
            pass
    if not (part.is_dir() and target.is_dir()):
        os.replace(part, target)
        return
    old = part.with_name(f"{part.name}-old")  # a folder cannot be replaced in one move
    os.replace(target, old)
    try:
        os.replace(part, target)
    except BaseException:
        os.replace(old, target)
        raise
    _remove(old)


def publish(parts: Iterable[Path], targets: Iterable[Path], overwrite: bool = False) -> None:
    """Move finished files to their names, all or none; without a new one, an old target of the set is removed.

    Old targets wait beside ``parts``, in the private folder that is removed afterwards, until all have their names.

    Raises:
        UsageError: a target exists and ``overwrite`` is false, also when it was created meanwhile.
        OSError: a file cannot be moved.
    """
    pairs = list(zip(parts, targets, strict=True))
    for _, target in pairs:
        if not overwrite and os.path.lexists(target):
            raise UsageError(f"{show(target)}: was created by another process meanwhile; pass --overwrite")
    kept: list[tuple[Path, Path]] = []  # old targets and where they wait
    made: list[Path] = []
    try:
        for part, target in pairs:
            if overwrite and os.path.lexists(target):
                aside = part.with_name(f"old-{target.name}"[:200])
                kept.append((aside, target))  # noted first: an interruption can come in between
                os.replace(target, aside)
            if part.exists():
                made.append(target)
                _rename(part, target, overwrite)
    except BaseException:  # also Ctrl-C: the old set comes back as a whole
        for target in made:
            _remove(target)
        for aside, target in kept:
            if aside.exists():
                os.replace(aside, target)
        raise
    _sync(pairs[0][1].parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of the bytes of a file; of a folder, of the sorted hashes of its files, without names."""
    if os.path.isdir(path):
        hashes = sorted(sha256_file(file) for file in Path(path).iterdir() if file.is_file())
        return hashlib.sha256("".join(hashes).encode("ascii")).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
