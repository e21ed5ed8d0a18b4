"""The XML header of ISMRMRD: sizes and fields of view, and nothing else of it; no entity is ever expanded."""

import math
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from invdiff.errors import InputError
from invdiff.files import AGAIN

_MAX_TEXT = 2**20
_MAX_DEPTH = 100
_MM = (1e-3, 1e5)  # a field of view
_READOUT = ("rampUpTime", "flatTopTime", "dwellTime", "numSamples", "acqDelayTime")  # names of numbers of EPI


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


@dataclass(frozen=True)
class Encoding:
    """What the first encoding of a header says.

    Attributes:
        matrix: encoded matrix (readout, phase, slice), whole numbers.
        encoded_mm, recon_mm: encoded and reconstructed field of view (readout, phase, slice).
        trajectory: in lower case, empty where the header is silent.
        centre, centre_2: line and partition of zero frequency, ``encodingLimits/kspace_encoding_step_1/center`` and
            ``..._2/center``, or half the matrix.
        embedded: calibration lines belong to the image.
        bandwidth: relative bandwidth of the receiver in a noise scan.
        ramps: lines of EPI are sampled while the gradient of the readout rises or falls, unevenly in k-space.
    """

    matrix: tuple[int, int, int]
    encoded_mm: tuple[float, float, float]
    recon_mm: tuple[float, float, float]
    trajectory: str
    centre: int
    embedded: bool
    bandwidth: float
    centre_2: int = 0
    ramps: bool = False

    @property
    def oversampling(self) -> float:
        """Of the readout."""
        return self.encoded_mm[0] / self.recon_mm[0]

    def kept(self, axis: int) -> int:
        """Samples of the reconstructed field of view along an axis."""
        return max(1, round(self.matrix[axis] * min(1.0, self.recon_mm[axis] / self.encoded_mm[axis])))


def read_header(text: bytes) -> Encoding:
    """The first encoding of a header; nothing that names a patient or an institution is looked at.

    Raises:
        InputError: see :func:`parse`; or numbers that are missing, not finite or out of range.
    """
    root = parse(text)
    encoding = next(iter(children(root, "encoding")), root)
    matrix = _three(encoding, "encodedSpace", "matrixSize")
    encoded, recon = (_three(encoding, space, "fieldOfView_mm") for space in ("encodedSpace", "reconSpace"))
    for values in (encoded, recon):
        if not _MM[0] <= min(values) <= max(values) <= _MM[1]:
            raise InputError(f"the XML header has a field of view of {values} mm; check the file")
    if not 1 <= encoded[0] / recon[0] * (1 + 1e-3) <= 64:
        raise InputError(f"the XML header encodes {encoded[0]:g} mm of readout for {recon[0]:g}; check the file")
    if max(matrix) > 2**16 or any(n % 1 for n in matrix):
        raise InputError(f"the XML header has an encoded matrix of {matrix}; check the file")
    whole = (int(matrix[0]), int(matrix[1]), int(matrix[2]))
    centre, centre_2 = (
        int(_number(encoding, f"encodingLimits/kspace_encoding_step_{n}/center", whole[n] // 2, whole[n]))
        for n in (1, 2)
    )
    bandwidth = _number(root, "acquisitionSystemInformation/relativeReceiverNoiseBandwidth", 1.0, 1e3)
    mode = _text(encoding, "parallelImaging/calibrationMode").lower()
    trajectory = _text(encoding, "trajectory").lower()
    recon = (min(recon[0], encoded[0]), *recon[1:])
    ramps = _on_ramps(encoding)
    return Encoding(whole, encoded, recon, trajectory, centre, mode == "embedded", bandwidth or 1.0, centre_2, ramps)


def _on_ramps(encoding: ElementTree.Element) -> bool:
    """Whether the description of a readout has samples before or after the flat top of its trapezoid.

    Times in microseconds by the names of the format's converters: the readout lasts ``numSamples * dwellTime`` from
    ``acqDelayTime`` after the start of a gradient of ``rampUpTime``, ``flatTopTime`` and ``rampDownTime``.
    """
    said: dict[str, float] = {}
    for kind in ("userParameterLong", "userParameterDouble"):
        for node in _below(encoding, f"trajectoryDescription/{kind}"):
            if (name := _text(node, "name")) in _READOUT:  # others may be negative, or words
                said[name] = _number(node, "value", 0.0, 1e9)
    rise, flat, dwell = (said.get(name, 0.0) for name in _READOUT[:3])
    reading = said.get("numSamples", 0.0) * dwell
    start = said.get("acqDelayTime", rise + (flat - reading) / 2)
    return rise > 0 and (start < rise or start + reading > rise + flat + dwell)


def _below(node: ElementTree.Element, path: str) -> list[ElementTree.Element]:
    found = [node]
    for name in path.split("/"):
        found = [child for one in found for child in children(one, name)]
    return found


def _text(node: ElementTree.Element, path: str) -> str:
    return ((_below(node, path) or [ElementTree.Element("none")])[0].text or "").strip()


def _number(node: ElementTree.Element, path: str, default: float, most: float) -> float:
    """A number from 0 to ``most``; ``default`` where there is none."""
    text = _text(node, path)
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise InputError(f"the XML header has {path} {text[:20]!r}; check the file")
    return value


def _three(encoding: ElementTree.Element, space: str, kind: str) -> tuple[float, float, float]:
    texts = {axis.tag.rpartition("}")[2]: axis.text for node in _below(encoding, f"{space}/{kind}") for axis in node}
    try:
        x, y, z = (float(texts.get(axis) or "nan") for axis in "xyz")
    except ValueError:
        x = y = z = math.nan
    if not (math.isfinite(x + y + z) and min(x, y, z) > 0):
        raise InputError(f"the XML header has no {space}/{kind} with positive x, y, z; check the file")
    return x, y, z
