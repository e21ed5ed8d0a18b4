"""The XML header of ISMRMRD: sizes and fields of view, and nothing else of it; no entity is ever expanded."""

import math
from typing import Any
from xml.etree import ElementTree

import numpy as np

from invdiff.errors import InputError
from invdiff.files import AGAIN

_MAX_TEXT = 2**20
_MAX_DEPTH = 100
_MM = (1e-3, 1e5)  # a field of view


def header_text(dataset: Any, name: str) -> bytes:
    """The one text of less than 1 MiB that a dataset of a file holds, of length 1 or a scalar.

    Raises:
        InputError: anything else.
    """
    import h5py

    info = h5py.check_string_dtype(dataset.dtype)
    if info is None or dataset.shape not in ((), (1,)) or (info.length or 0) > _MAX_TEXT:
        raise InputError(f"/{name} is not one text of less than 1 MiB; check the file")
    value = dataset[()] if dataset.shape == () else dataset[0]
    text = value.encode() if isinstance(value, str) else bytes(value)
    if len(text) > _MAX_TEXT:
        raise InputError(f"/{name} is not one text of less than 1 MiB; check the file")
    return text


class _Careful(ElementTree.TreeBuilder):
    """Refuses to go deep."""

    def __init__(self):
        super().__init__()
        self.depth = 0

    def start(self, tag, attrs, /):
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise InputError(f"the XML header is nested deeper than {_MAX_DEPTH}; check the file")
        return super().start(tag, attrs)

    def end(self, tag, /):
        self.depth -= 1
        return super().end(tag)

    def doctype(self, *_):  # of every encoding, unlike a search in the bytes
        raise InputError("the XML header has a DOCTYPE, which can define entities; remove it")


def parse(text: bytes) -> ElementTree.Element:
    """The root of a header.

    Raises:
        InputError: no XML, a DOCTYPE (entities of any kind need one), or deep nesting.
    """
    parser = ElementTree.XMLParser(target=_Careful())
    try:
        parser.feed(text)
        return parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the XML header is no XML ({str(error)[:80]}); {AGAIN}") from None


def children(node: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    """Elements of a name, in whatever namespace, directly below ``node``."""
    return [child for child in node if child.tag.rpartition("}")[2] == name]


def spaces(text: bytes) -> tuple[list[float], list[float], list[float]]:
    """Encoded matrix, encoded and reconstructed field of view (readout, phase, slice) in mm, of the first encoding.

    Raises:
        InputError: see :func:`parse`; or numbers that are missing, not finite or out of range.
    """
    root = parse(text)
    encoding = next(iter(children(root, "encoding")), root)
    size = _numbers(encoding, "encodedSpace", "matrixSize")
    fields = [_numbers(encoding, space, "fieldOfView_mm") for space in ("encodedSpace", "reconSpace")]
    for values in fields:
        if not _MM[0] <= min(values) <= max(values) <= _MM[1]:
            raise InputError(f"the XML header has a field of view of {values} mm; check the file")
    return size, fields[0], fields[1]


def _numbers(encoding: ElementTree.Element, space: str, kind: str) -> list[float]:
    found: dict[str, Any] = {}
    for part in children(encoding, space):
        for node in children(part, kind):
            found |= {axis.tag.rpartition("}")[2]: axis.text for axis in node}
    try:
        values = [float(found.get(axis) or "nan") for axis in "xyz"]
    except ValueError:
        values = [math.nan]
    if not np.isfinite(values).all() or min(values) <= 0:
        raise InputError(f"the XML header has no {space}/{kind} with positive x, y, z; check the file")
    return values
