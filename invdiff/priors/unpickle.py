"""Take the weights out of a pickle, in a process of its own: ``python -I unpickle.py FILE FOLDER``.

Run by ``pickled.py`` for a user who said ``--trust-pickle``. Nothing that the file names is imported or called but the
few functions of ``KNOWN``, which make tensors; everything else becomes an inert :class:`Record`, also source text in
the file. Writes ``weights.pt``, nested dictionaries of tensors, and ``options.json``, or one line of error.
"""

import io
import json
import os
import pickle
import resource
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

# Events of the interpreter that no reading of tensors raises; a hook ends the process at any of them.
FORBIDDEN = ("exec", "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "import", "compile", "code.__new__")
NO_VALUE = object()
SEEN: dict[str, type] = {}  # records by the names that the file gives


class Record(dict):
    """Stands for an object of a class that is not built: what it would have been made of, and its state."""

    name = ""
    args: tuple = ()
    state: Any = None
    dump_patches = False  # torch asks for it where a file holds source text
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __eq__(self, other) -> bool:
        return self is other

    def __call__(self, *args, **kwargs):
        """What a call of it would have given: another record."""
        return Record(self, *args)

    def __setstate__(self, state) -> None:
        self.state = state

    def append(self, value) -> None:
        """As a list would take it; an opcode of pickle asks for this."""


def _storage(data: bytes):
    """A storage from the bytes inside a pickle, read as weights only."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _parameter(data, *_):
    return data


def _bytes(text: str, encoding: str) -> bytes:
    """Bytes as pickles before protocol 3 hold them."""
    return text.encode("latin1") if encoding == "latin1" else b""


KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # as protocols before 3 name it
    ("builtins", "frozenset"): frozenset,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class Inert(pickle.Unpickler):
    """An unpickler that builds tensors and plain values, and records for the rest."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        title = f"{module}.{name}"
        return SEEN.setdefault(title, type("Record", (Record,), {"name": title}))


def load(file, **options) -> Any:
    """One object of an open file; what torch asks of a pickle module."""
    return Inert(file, **options).load()


MODULE = SimpleNamespace(Unpickler=Inert, load=load, __name__="inert")


def read(path: str) -> Any:
    """The content of a pickle or of a file of ``torch.save``.

    Raises:
        ValueError: a TorchScript archive, which is a program, or one that inflates.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            first = file.read(64)
        if b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" not in first:  # not torch.save before 1.6, by its magic number
            with open(path, "rb") as file:
                return load(file)
    else:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.filename.endswith("constants.pkl") for entry in entries):
            raise ValueError("it is a TorchScript archive, which is a program")
        if sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise ValueError("it inflates when it is read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # source text in the file is not that of a record
        return torch.load(path, map_location="cpu", pickle_module=MODULE, weights_only=False)


def module_of(value: Any) -> tuple[str, Mapping] | None:
    """Class name and state of a record that stands for a network, or None."""
    if not isinstance(value, Record):
        return None
    inner = value.args[0] if value.args else None
    if isinstance(inner, Mapping) and isinstance(inner.get("state"), Mapping):  # EDM's persistent classes
        name, state = str(inner.get("class_name")), inner["state"]
    else:
        kind = inner if value.name.endswith("._reconstructor") and isinstance(inner, type) else value  # old protocols
        name, state = str(getattr(kind, "name", "")).rpartition(".")[2], value.state
    return (name, state) if isinstance(state, Mapping) and isinstance(state.get("_modules"), Mapping) else None


def weights(state: Mapping, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters and buffers of a network by name."""
    left_out = state.get("_non_persistent_buffers_set") or ()
    found = {}
    for part in ("_parameters", "_buffers"):
        for key, value in (state.get(part) or {}).items():
            if isinstance(value, torch.Tensor) and not (part == "_buffers" and key in left_out):
                found[prefix + key] = value.detach()
    for key, value in state["_modules"].items():
        if inner := module_of(value):
            found |= weights(inner[1], f"{prefix}{key}.")
    return found


def options(name: str, state: Mapping) -> dict[str, Any]:
    """What a network was made with: plain values among its arguments and attributes."""
    attributes = {k: v for k, v in state.items() if isinstance(k, str) and (k[:1] != "_" or k.startswith("_was_"))}
    arguments = state.get("_init_kwargs")
    pairs = attributes | dict(arguments if isinstance(arguments, Mapping) else {})
    return {k: v for k, v in pairs.items() if _simple(v)} | {"class_name": name}


def _simple(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 64 and all(isinstance(v, bool | int | float | str) for v in value)
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 200)


def plain(value: Any, path: str, found: dict[str, dict]) -> Any:
    """The content with states instead of networks, and without records; options of networks go to ``found``."""
    if module := module_of(value):
        found[path] = options(*module)
        return weights(module[1])
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        kept = {
            k: plain(v, f"{path}.{k}" if path else str(k), found) for k, v in value.items() if isinstance(k, str | int)
        }
        return {k: v for k, v in kept.items() if v is not NO_VALUE}
    if isinstance(value, list | tuple):
        return [v for part in value if (v := plain(part, path, found)) is not NO_VALUE]
    return value if isinstance(value, bool | int | float | str) or value is None else NO_VALUE


def guard(path: str) -> None:
    """Limit memory and disk to some times the file, and end the process where anything but reading is tried."""
    for new in (True, False):  # what torch imports on first use is imported now
        torch.load(_sample(new), pickle_module=MODULE, weights_only=False)
    _storage(_sample(False).getvalue())
    _bytes("", "latin1")
    size = os.path.getsize(path)
    with open("/proc/self/status") as file:
        held = next((1024 * int(line.split()[1]) for line in file if line.startswith("VmData")), 2**34)
    for kind, most in ((resource.RLIMIT_DATA, held + 6 * size + 2**30), (resource.RLIMIT_FSIZE, 2 * size + 2**24)):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))

    def hook(event: str, args: tuple) -> None:
        if event.startswith(FORBIDDEN) and event not in ("os.listdir", "os.scandir"):
            sys.stderr.write(f"it tries to do more than to give tensors ({event})\n")
            sys.stderr.flush()
            os._exit(3)

    sys.addaudithook(hook)


def _sample(new: bool) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=new)
    file.seek(0)
    return file


def main(path: str, folder: str) -> None:
    """See the module."""
    guard(path)
    found: dict[str, dict] = {}
    content = plain(read(path), "", found)
    names = sorted({name[:100] for name in SEEN})[:200]
    torch.save(content, os.path.join(folder, "weights.pt"))
    with open(os.path.join(folder, "options.json"), "w") as file:
        json.dump({"types": names, "modules": found}, file)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        sys.stderr.write(" ".join(f"{type(error).__name__}: {error}".split())[:300] + "\n")
        sys.exit(1)
