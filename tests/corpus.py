"""Bad inputs for every reader, and what counts as harmless; for tests/test_corpus.py and benchmarks/robustness.py.

A reader has one valid file or folder, and every case damages it. The outcome must be a refusal in one line that names
the file, or, where the damage cannot be seen, a finite value of the right shape; where all values are protected by a
checksum, the right value.
"""

import os
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InvdiffError

MEMORY, SECONDS = 2**28, 20  # bytes and seconds that reading a small file may take; more is a crash
# What a case may end in besides a refusal: nothing, the right value, any finite one of the right shape, any finite one.
REFUSE, SAME, VALID, FINITE = "refuse", "same", "valid", "finite"
Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: for the table.
        target: path of the file that the generic cases damage, from the folder of the valid files.
        make: writes the valid files into a folder.
        read: reads them from that folder.
        arrays: the value that was read, as arrays; their finiteness and shapes are checked.
        special: name to (edit of the folder, outcome).
        given: the path that messages name, if not the target.
        checked: the whole file is under checksums, every flipped bit is seen.
        flips: how many single bits are flipped.
        needs: packages.
    """

    name: str
    target: str
    make: Edit
    read: Callable[[Path], Any]
    arrays: Callable[[Any], tuple]
    special: dict[str, tuple[Edit, str]] = field(default_factory=dict)
    given: str = ""
    checked: bool = False
    flips: int = 24
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "refused", "read", or what must not be, "accepted" or "crash"; and what was said."""

    reader: str
    case: str
    verdict: str
    text: str = ""


class TooLong(BaseException):
    """A case ran into the limit of time."""


def content(data: bytes) -> Edit:
    """The target holds ``data`` instead."""
    return lambda target: target.write_bytes(data) and None


def _instead(target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def _folder(target: Path) -> None:
    _instead(target)
    target.mkdir()


def _loop(target: Path) -> None:
    _instead(target)
    target.symlink_to(target.name)


def _dangling(target: Path) -> None:
    _instead(target)
    target.symlink_to("nowhere")


def _unreadable(target: Path) -> None:
    target.chmod(0)


def generic(good: bytes, reader: Reader) -> Iterator[tuple[str, Edit, str]]:
    """Damage that knows nothing of the format: the name of each, an edit of the target, the outcome."""
    rng = np.random.default_rng(len(good))
    ends = {0, 1, 2, 4, 10, 100, 200, 348, len(good) // 2, len(good) - 2, len(good) - 1}
    ends |= set(rng.integers(0, len(good), 12).tolist())
    for end in sorted(e for e in ends if 0 <= e < len(good)):
        yield f"cut after {end} bytes", content(good[:end]), SAME
    yield "random bytes", content(rng.bytes(3000)), REFUSE
    yield "zeros", content(bytes(5000)), REFUSE
    yield "text", content(b"hello\n" * 500), REFUSE
    yield (
        "a gzip of text",
        content(b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xcbH\xcd\xc9\xc9\x07\0\x86\xa6\x106\x05\0\0\0"),
        REFUSE,
    )
    yield (
        "a pickle",
        content(b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."),
        REFUSE,
    )
    yield "a zip of nothing", content(b"PK\x05\x06" + bytes(18)), REFUSE
    yield "the first half twice", content(good[: len(good) // 2] * 2), SAME if reader.checked else VALID
    yield "a folder", _folder, REFUSE
    yield "a link to itself", _loop, REFUSE
    yield "a link to nowhere", _dangling, REFUSE
    if os.geteuid():
        yield "unreadable", _unreadable, REFUSE
    head = range(0, min(len(good), 400) * 8)
    places = [*rng.choice(head, reader.flips // 2, replace=False), *rng.integers(0, 8 * len(good), reader.flips // 2)]
    for place in map(int, places):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        yield f"bit {place} flipped", content(bytes(bad)), SAME if reader.checked else VALID


def cases(reader: Reader, folder: Path) -> Iterator[tuple[str, Edit, str]]:
    """All cases of a reader whose valid files lie in ``folder``: name, edit of a copy of it, outcome."""
    for name, edit, outcome in generic((folder / reader.target).read_bytes(), reader):
        yield name, lambda copy, edit=edit: edit(copy / reader.target), outcome
    for name, (edit, outcome) in reader.special.items():
        yield name, edit, outcome


@contextmanager
def limited() -> Iterator[None]:
    """At most twice ``MEMORY`` more bytes of address space and ``SECONDS``."""

    def late(*_):
        raise TooLong

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (old, hard))


def equal(one: tuple, other: tuple) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def judge(reader: Reader, folder: Path, case: str, outcome: str, good: tuple) -> Outcome:
    """Read what lies in ``folder`` within the limits, and say what came of it; ``good`` is the right value."""
    before = _peak()
    found = _judge(reader, folder, case, outcome, good)
    if (used := _peak() - before) > MEMORY:
        return Outcome(reader.name, case, "crash", f"took {used / 1e6:.0f} MB, and then: {found.text}")
    return found


def _peak() -> int:
    """Bytes of memory that this process had at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _judge(reader: Reader, folder: Path, case: str, outcome: str, good: tuple) -> Outcome:
    try:
        with limited():
            found = value(reader, folder)
    except InvdiffError as error:
        names = {Path(reader.given or reader.target).name, *(p.name for p in folder.rglob("*"))}
        named = any(name in str(error) for name in names)
        if "\n" in str(error) or not named:
            return Outcome(reader.name, case, "crash", f"not one line that names the file: {error}")
        return Outcome(reader.name, case, "refused", str(error))
    except (Exception, TooLong) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(reader.name, case, "crash", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
    if outcome == REFUSE or (outcome == SAME and not equal(found, good)):
        return Outcome(reader.name, case, "accepted", outcome)
    shaped = outcome == FINITE or [a.shape for a in found] == [a.shape for a in good]
    if not shaped or not all(np.isfinite(a).all() for a in found):
        return Outcome(reader.name, case, "accepted", f"{[a.shape for a in found]}")
    return Outcome(reader.name, case, "read")


def value(reader: Reader, folder: Path) -> tuple:
    """What lies in ``folder``, as arrays."""
    return tuple(np.asarray(a) for a in reader.arrays(reader.read(folder)))


def _work(reader: Reader, place: Path, start: int, pipe) -> None:
    """Judge the cases from number ``start`` on; say before and after each where it stands."""
    good = value(reader, place / "good")
    work = place / "work"
    for number, (name, edit, outcome) in enumerate(cases(reader, place / "good")):
        if number < start:
            continue
        pipe.send((number, name))
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(place / "good", work, symlinks=True)
        edit(work)
        pipe.send(judge(reader, work, name, outcome, good))
    pipe.send(None)


def run(reader: Reader, place: Path) -> list[Outcome]:
    """All cases of a reader, in a process of their own that may die: that counts as a crash, and the rest goes on."""
    (place / "good").mkdir(parents=True)
    reader.make(place / "good")
    outcomes: list[Outcome] = []
    start: int | None = 0
    while start is not None:
        with apart(_work, reader, place, start) as pipe:
            start = _listen(pipe, outcomes, reader.name)
    return outcomes


@contextmanager
def apart(work: Callable, *args) -> Iterator[Any]:
    """``work(*args, pipe)`` in a process of its own, which ends with the block; what it sends can be received."""
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(*args, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        yield ours
    finally:
        child.kill()
        child.join()


def _listen(pipe, outcomes: list[Outcome], reader: str) -> int | None:
    """Collect outcomes until the child ends or dies; the number of the case to go on with, None after the last."""
    number, name = -1, "the valid file"
    while True:
        try:
            said = pipe.recv() if pipe.poll(2 * SECONDS) else "hang"
        except EOFError:
            said = "the process died"
        if said is None:
            return None
        if isinstance(said, str):
            outcomes.append(Outcome(reader, name, "crash", said))
            return number + 1 if number >= 0 else None
        if isinstance(said, Outcome):
            outcomes.append(said)
        else:
            number, name = said


def _mutations(reader: Reader, folder: Path, good: tuple, search: Callable, pipe) -> None:
    right, outcome = (folder / "good" / reader.target).read_bytes(), SAME if reader.checked else VALID
    work = folder / "work"

    def harmless(data: bytes) -> Outcome:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / "good", work)
        (work / reader.target).write_bytes(data)
        pipe.send(data)
        return judge(reader, work, "mutation", outcome, good)

    try:
        search(right, harmless)
    except AssertionError as error:
        pipe.send(Outcome(reader.name, "mutation", "crash", str(error)))
    pipe.send(None)


def mutated(reader: Reader, folder: Path, search: Callable) -> str:
    """``search(good, harmless)`` in a process of its own, where ``harmless(bytes)`` is the outcome of a mutation.

    Returns:
        What the search found, empty for nothing.
    """
    (folder / "good").mkdir()
    reader.make(folder / "good")
    last: Any = b""
    with apart(_mutations, reader, folder, value(reader, folder / "good"), search) as pipe:
        while True:
            try:
                said = pipe.recv() if pipe.poll(2 * SECONDS) else "it hangs"
            except EOFError:
                said = "the process died"
            if not isinstance(said, bytes):
                return "" if said is None else f"{said} (last mutation: {last!r})"[:3000]
            last = said
