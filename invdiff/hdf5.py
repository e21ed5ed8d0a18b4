"""HDF5 files of others, read with care: nothing outside the file, nothing larger than it may be, nothing unwritten."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from invdiff.errors import InputError
from invdiff.files import AGAIN, show

MAX_BYTES = 2**33
_CHUNK_BYTES = 2**26  # of an unpacked chunk that is larger than its array
DAMAGE = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError)  # what h5py raises for damage


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file, to read; every error of reading it is an InputError that names it.

    Raises:
        InputError: missing, a folder, not HDF5, damaged, or what the block refuses.
    """
    import h5py

    name = show(path)
    if not path.is_file():
        raise InputError(f"{name}: {'is not a file' if path.exists() else 'does not exist'}; check the path")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except DAMAGE as error:
        why = show(" ".join(str(error).split()))[:120].replace(str(path), "the file")
        raise InputError(f"{name}: is damaged or truncated ({why}); {AGAIN}") from None


def looks(path: Path, question) -> bool:
    """``question(file)`` of an open file; False where the file cannot be opened or asked."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return bool(question(file))
    except DAMAGE:
        return False


def own(group: Any, key: str, kind: str = "Dataset") -> Any:
    """The dataset (or ``"Group"``) ``key`` that lies in this file, with its numbers.

    Raises:
        InputError: missing, a link, of another kind, virtual, or with its numbers in another file.
    """
    import h5py

    link = group.get(key, getlink=True) if key in group.keys() else None  # noqa: SIM118  (`in group` follows links)
    if link is None:
        raise InputError(f"has no /{show(key)[:40]}; check the file")
    if not isinstance(link, h5py.HardLink):
        raise InputError(f"/{show(key)[:40]} is a link to elsewhere, which is not followed; store the data itself")
    if group.get(key, getclass=True) is not getattr(h5py, kind):
        raise InputError(f"/{show(key)[:40]} is not a {kind.lower()}; check the file")
    found = group[key]
    if kind == "Dataset" and (found.external or found.is_virtual):
        raise InputError(f"/{show(key)[:40]} has its data in another file, which is not read; store the data itself")
    return found


def check_size(dataset: Any, name: str, shape: tuple[int, ...] | None = None, max_bytes: int = MAX_BYTES) -> None:
    """Refuse what would take too much memory, before anything is allocated.

    Args:
        dataset: an open dataset.
        name: for messages.
        shape: of the part that will be read, None for all.
        max_bytes: of that part.

    Raises:
        InputError: larger than the limit, chunks much larger than the array, or declared and never written.
    """
    size = math.prod(dataset.shape if shape is None else shape) * max(dataset.dtype.itemsize, 4)
    if size > max_bytes:
        said = f"/{name} declares {size / 1e9:.3g} GB, the limit is {max_bytes / 1e9:.3g}"
        raise InputError(f"{said}; take part of it with --slices, or split the file")
    if dataset.chunks is None:
        complete = dataset.id.get_storage_size() >= math.prod(dataset.shape) * dataset.dtype.itemsize
    else:
        chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
        if chunk > max(_CHUNK_BYTES, 2 * size):
            raise InputError(f"/{name} has chunks of {chunk / 1e6:.0f} MB for {size / 1e6:.3g} MB; store it again")
        pieces = [math.ceil(n / c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]
        complete = dataset.id.get_num_chunks() == math.prod(pieces)
    if not complete:
        raise InputError(f"/{name} is incomplete (declared but never written); {AGAIN}")
