"""Compressed pixels of DICOM, before and while they are decoded: whole, of the right size, by a decoder that may die.

Sources: ISO/IEC 10918-1 annex B and 14495-1 annex C (JPEG, JPEG-LS), 15444-1 annex A (JPEG 2000), DICOM PS3.5 annex G
(RLE). A flipped bit among the coded samples is another sample: none of these has a checksum.
"""

import io
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from invdiff.errors import InputError

_JPEG = "1.2.840.10008.1.2.4."
_RLE = "1.2.840.10008.1.2.5"
_FRAMES = {  # frame headers of JPEG by transfer syntax: baseline and extended, lossless, JPEG-LS
    **dict.fromkeys(("50", "51"), (0xC0, 0xC1, 0xC2)),
    **dict.fromkeys(("57", "70"), (0xC3,)),
    **dict.fromkeys(("80", "81"), (0xF7,)),
}
_J2K = ("90", "91", "201", "202", "203")
#: Decoders that are taken before any other; the rest can die of damage, and runs in a process of its own.
_SAFE = {_RLE: "pydicom", _JPEG + "50": "pillow", **dict.fromkeys((_JPEG + n for n in _J2K), "pylibjpeg")}
_SECONDS, _PATIENCE = 5, 120  # of computing for one frame; on the clock, for one that waits for ever
_ARRAY = b"a"  # before an array; else words follow
_WORD = 8  # bytes of the length before that


def decode(data: Any, frame: int | None) -> Any:
    """Stored pixels ``(rows, columns)`` of a data set, or of one of its frames.

    Raises:
        InputError: a codestream that is cut, of another size than its header says, or that kills its decoder.
        Exception: whatever decoders raise.
    """
    from pydicom.pixels import get_decoder, pixel_array

    syntax = data.file_meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_encapsulated:
        return data.pixel_array if frame is None else pixel_array(data, index=frame)
    _check(data, 0 if frame is None else frame, syntax)
    plugins, safe = get_decoder(syntax).available_plugins, _SAFE.get(syntax, "")
    if safe in plugins or not plugins:
        return pixel_array(data, index=frame, decoding_plugin=safe if plugins else "")
    return apart(lambda: pixel_array(data, index=frame))


def apart(work: Callable[[], np.ndarray]) -> np.ndarray:
    """``work()``, an array, in a process of its own, which may die or never end and says nothing.

    Raises:
        InputError: it did either.
        RuntimeError: with the words of what ``work`` raised.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _work(work, theirs)
        finally:
            os._exit(0)
    try:
        os.close(theirs)
        with os.fdopen(ours, "rb") as pipe:
            said = pipe.read()
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        raise
    finally:
        with suppress(ChildProcessError):  # where SIGCHLD is ignored nothing is left of it
            os.waitpid(child, 0)
    length, kind, content = said[:_WORD], said[_WORD : _WORD + 1], said[_WORD + 1 :]
    if not kind or len(content) != int.from_bytes(length, "big"):
        raise InputError("its decoder died of it")
    if kind != _ARRAY:
        raise RuntimeError(content.decode(errors="replace"))
    return np.load(io.BytesIO(content), allow_pickle=False)


def _work(work: Callable[[], np.ndarray], pipe: int) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what libraries in C print
        os.dup2(silent, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_PATIENCE)
    found, kind = io.BytesIO(), _ARRAY
    try:
        np.save(found, work(), allow_pickle=False)
    except Exception as error:
        found, kind = io.BytesIO(str(error).encode(errors="replace")), b"e"
    content = found.getbuffer()
    with os.fdopen(pipe, "wb") as out:
        out.write(len(content).to_bytes(_WORD, "big") + kind)
        out.write(content)


def _check(data: Any, frame: int, syntax: str) -> None:
    """Refuse a codestream that is not whole, or is of another size than the header says."""
    from pydicom.encaps import get_frame

    stream = get_frame(data.PixelData, frame, number_of_frames=int(data.get("NumberOfFrames") or 1))
    size, bits = (int(data.Rows), int(data.Columns)), int(data.BitsAllocated)
    kind = syntax.removeprefix(_JPEG)
    if syntax == _RLE:
        _check_segments(stream, bits // 8)
    elif kind in _FRAMES or kind in _J2K:
        if not stream.rstrip(b"\0").endswith(b"\xff\xd9"):
            raise InputError("its codestream has no end")
        found = _size_2000(stream) if kind in _J2K else _size(stream, _FRAMES[kind])
        if found[:2] != size or found[3] != 1 or not 0 < found[2] <= bits:
            raise InputError(
                f"its codestream has {found[0]} x {found[1]} pixels, {found[2]} bits, {found[3]} components; header "
                f"says {size[0]} x {size[1]}, {bits}, 1"
            )


def _check_segments(stream: bytes, count: int) -> None:
    """The header of RLE: 16 numbers, how many segments there are (a byte of every pixel each) and where they start."""
    numbers = [int.from_bytes(stream[n : n + 4], "little") for n in range(0, 64, 4)]
    starts = numbers[1 : 1 + count]
    ordered = starts == sorted(set(starts)) and starts[:1] == [64] and starts[-1] < len(stream)
    if numbers[0] != count or not ordered or any(numbers[1 + count :]):
        raise InputError(f"its RLE header has {numbers[0]} segments at {starts}, not {count} in order")


def _size(stream: bytes, frames: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Rows, columns, bits and components of the frame header of JPEG or JPEG-LS."""
    at = 2
    while stream[:2] == b"\xff\xd8" and at + 10 <= len(stream) and stream[at] == 0xFF and stream[at + 1] != 0xDA:
        if stream[at + 1] in frames:
            rows, columns = (int.from_bytes(stream[at + n : at + n + 2], "big") for n in (5, 7))
            return rows, columns, stream[at + 4], stream[at + 9]
        at += 1 if stream[at + 1] == 0xFF else 2 + max(2, int.from_bytes(stream[at + 2 : at + 4], "big"))
    raise InputError("its codestream has no frame header of its kind")


def _size_2000(stream: bytes) -> tuple[int, int, int, int]:
    """Rows, columns, bits and components of the SIZ marker of JPEG 2000, bare or in a JP2 file."""
    at = stream.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or len(stream) < at + 45:
        raise InputError("its codestream has no size")
    width, height, left, top = (int.from_bytes(stream[n : n + 4], "big") for n in range(at + 8, at + 24, 4))
    return height - top, width - left, 1 + (stream[at + 42] & 127), int.from_bytes(stream[at + 40 : at + 42], "big")
