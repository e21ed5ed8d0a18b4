"""Files as a whole: their names for people, and written completely or not at all."""

import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from invdiff.errors import ResourceError, UsageError

VOLUME_SUFFIXES = (".nii.gz", ".nii")
SERIES_SUFFIX = ".dcm"  # written as a folder of slices 0001.dcm, 0002.dcm, ...
AGAIN = "copy or download it again"
PRIVATE, KEPT = ".invdiff-part-", "old-"  # names of private folders, and of what waits in them to be replaced
_SETTLED = 5.0  # seconds in which a new folder is locked


def show(path: str | os.PathLike) -> str:
    """``path`` as one printable line, whatever bytes its name holds."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_text(path: str | os.PathLike, most: int = 16_000_000) -> str:
    """The text of a file of at most ``most`` bytes, whatever its size is said to be (pipes and devices have none);
    lines end with a line feed, however the file ends them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer, or no UTF-8.
    """
    with open(path, "rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise ValueError(f"longer than {most / 1e6:g} MB")
    return found.decode().replace("\r\n", "\n").replace("\r", "\n")


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


@contextmanager
def atomic_write(
    path: str | os.PathLike, overwrite: bool = False, folder: bool = False, mode: int = 0o666
) -> Iterator[Path]:
    """Yield a private temporary path in the same folder that becomes ``path`` when the block succeeds.

    The data reach the disk (fsync) before the name changes; on any failure the temporary file (with ``folder``: folder)
    is removed and an old ``path`` stays as it was. A symbolic link is followed, not replaced. Until it has its name it
    is for its owner alone; then it has ``mode``, less what the umask takes.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is false, also when another process created it meanwhile; or it is
            a folder that holds more than a written series.
        ResourceError: the disk is full or the folder cannot be written to.
    """
    target = Path(path).resolve()
    if not overwrite and os.path.lexists(target):
        raise UsageError(f"{show(target)}: exists already; name another output or pass --overwrite")
    if target.is_dir() and not (folder and is_series(target)):
        raise UsageError(f"{show(target)}: is a folder that holds other files; name another output")
    part = target.parent / f".{target.name[:48]}.part-{os.getpid()}-{secrets.token_hex(3)}"
    try:
        final = _allowed(part, mode)
        if folder:
            part.mkdir(mode=0o700)
        else:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield part
        for piece in part.iterdir() if folder else ():
            _sync(piece)
        part.chmod(final | (final & 0o444) >> 2 if folder else final)
        _sync(part)
        _rename(part, target, overwrite)
        _sync(target.parent)
    except OSError as error:
        raise ResourceError(f"{show(target)}: cannot be written ({error}); nothing was changed") from error
    finally:
        with suppress(OSError):  # which would hide what went wrong
            _remove(part)


def _allowed(path: Path, mode: int) -> int:
    """The permissions that a new file of ``mode`` gets here, less what the umask takes; it is removed again."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        path.unlink()


def is_series(folder: Path) -> bool:
    """Nothing but slices as a series is written: such a folder may be replaced."""
    return all(re.fullmatch(r"\d{4,}\.dcm", entry.name) and entry.is_file() for entry in folder.iterdir())


def _remove(path: Path) -> None:
    """A file or folder that may be gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what a killed process left of writing ``path``; only where no other process can be writing it.

    A series that was being replaced (``-old``) is no leftover: it may be the only one.
    """
    start = f".{path.name[:48]}.part-"
    for part in _entries(path.parent, start):
        if not part.name.endswith("-old"):
            _remove(part)


def _entries(folder: Path, start: str) -> list[Path]:
    """What lies in a folder under names of that start, as far as it can be listed."""
    try:
        return sorted(path for path in folder.iterdir() if path.name.startswith(start))
    except OSError:
        return []


@contextmanager
def private_folder(beside: Path) -> Iterator[Path]:
    """A hidden folder in the folder of ``beside``, for its owner alone, which is locked while the block lasts.

    Raises:
        OSError: it cannot be made.
    """
    with tempfile.TemporaryDirectory(prefix=PRIVATE, dir=beside.parent, ignore_cleanup_errors=True) as name:
        handle = os.open(name, os.O_RDONLY)
        try:
            _lock_free(handle)
            yield Path(name)
        finally:
            os.close(handle)


def sweep_private(folder: Path) -> tuple[str, ...]:
    """Remove the private folders that killed processes left in ``folder``; a live process holds the lock of its own.

    Returns:
        A remark for each that was left while a result was being replaced, which stays: it holds the old result.
    """
    notes = []
    for left in _entries(folder, PRIVATE):
        try:
            if left.is_symlink() or not left.is_dir():
                continue
            handle = os.open(left, os.O_RDONLY)
        except OSError:  # another user's
            continue
        try:
            if time.time() - left.stat().st_mtime < _SETTLED or not _lock_free(handle):
                continue
            if kept := [entry.name for entry in left.iterdir() if entry.name.startswith(KEPT)]:
                what = f"{show(left.name)} holds {len(kept)} files that a killed run was replacing"
                notes.append(f"{what}; move them back to their names, or remove the folder")
            else:
                _remove(left)
        finally:
            os.close(handle)
    return tuple(notes)


def _lock_free(handle: int) -> bool:
    """Lock an open file or folder; False where another process has it, or where the file system has no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


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
                aside = part.with_name(f"{KEPT}{target.name}"[:200])
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


def make_folder(folder: Path) -> None:
    """Make a folder with those above it, unless it is there, and find out whether files can be written in it.

    Raises:
        UsageError: it is a file.
        ResourceError: it cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{show(folder)}: is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{show(folder)}: cannot be made ({error.strerror}); name another folder") from None
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Raise :class:`ResourceError` where no file can be made in ``folder``."""
    try:  # permission bits say too little (root, read-only mounts, quotas): create a file and see
        with tempfile.TemporaryFile(dir=folder, prefix=".invdiff-probe-") as probe:
            probe.write(b"0")
    except OSError as error:
        raise ResourceError(f"{show(folder)}: cannot be written to ({error.strerror}); name another folder") from None


def save_tensors(tensors: dict[str, Any], part: Path, metadata: dict[str, str]) -> None:
    """Write a file of tensors, inside :func:`atomic_write`; a full disk, which has an error of its own, is OSError.

    The library first writes under a name of its own, which a kill leaves behind: here in a folder that :func:`sweep`
    takes for a part.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    inside = part.with_name(f"{part.name}-tensors")
    try:
        inside.mkdir(mode=0o700)
        save_file(tensors, inside / "whole", metadata)
        os.replace(inside / "whole", part)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        _remove(inside)


def sha256_file(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of the bytes of a file; of a folder, of the sorted hashes of its files, without names."""
    if os.path.isdir(path):
        hashes = sorted(sha256_file(file) for file in Path(path).iterdir() if file.is_file())
        return hashlib.sha256("".join(hashes).encode("ascii")).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
