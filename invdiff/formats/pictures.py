"""PNG and TIFF: grey pictures, one or a stack; what invdiff writes carries its place and scale as a line of JSON."""

import json
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError
from invdiff.files import AGAIN, show
from invdiff.formats.base import LABEL, Image, Wanted, check_count, files_in, flat_affine, to_steps
from invdiff.formats.stream import check_file

SUFFIXES = (".png", ".tif", ".tiff")
_DTYPES = {"1": "u1", "L": "u1", "I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I": "i4", "F": "f4"}
_KEY, _TIFF_TEXT = "invdiff", 270
_TIFF_KINDS = ((1, 1), (1, 8), (1, 16), (2, 16), (2, 32), (3, 32))


def read(path: Path, wanted: Wanted) -> Image:
    """A picture, a TIFF of several pages, or a folder of pictures in the order of the numbers in their names.

    Columns run to the left of the patient, rows to the back, pages upwards, 1 mm each, unless the file says otherwise.

    Raises:
        InputError: damaged, in colour, of different sizes, or too large.
    """
    if path.is_file():
        stored, text = _pages(path, wanted, 0)
        return _image(stored, text, show(path), stacked=_directories(path) is None)
    pages: list[np.ndarray] = []
    for file in sorted(files_in(path), key=_natural):
        (page, *more), _ = _pages(file, wanted, sum(p.size for p in pages))
        if more or (pages and page.shape != pages[0].shape):
            raise InputError(f"{show(file)}: is {page.shape} and {len(more) + 1} pages, not one page like the others")
        pages.append(page)
    return _image(pages, None, show(path))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Key that puts slice10 behind slice9."""
    return [(int(word or 0), other) for other, word in re.findall(r"(\D*)(\d*)", path.name)]


def _pages(path: Path, wanted: Wanted, before: int) -> tuple[list[np.ndarray], str | None]:
    """The pages ``(rows, columns)`` as stored, and the text beside them; ``before`` pixels were read already."""
    from PIL import Image as Pictures

    check_file(path)
    name = show(path)
    linked = _directories(path)
    try:
        with _quiet():
            with Pictures.open(path, formats=("PNG", "TIFF")) as file:
                count = int(getattr(file, "n_frames", 1))
                if linked not in (None, count):
                    raise InputError(f"{name}: is damaged (its pages are not linked to each other); {AGAIN}")
                check_count(name, before + math.prod(file.size) * count, wanted.max_voxels)
                tags = getattr(file, "tag_v2", {})
                text = file.info.get(_KEY) or tags.get(_TIFF_TEXT)
                pages = [_page(file, page, name) for page in range(count)]
            if not tags:
                if not _ends_with(path, b"\0\0\0\0IEND\xaeB`\x82"):
                    raise InputError(f"{name}: is truncated, or longer than its last chunk; {AGAIN}")
                with Pictures.open(path, formats=("PNG",)) as file:
                    file.verify()  # checksums
            return pages, text
    except InputError:
        raise
    except Exception as error:  # what damage raises differs between formats and versions
        what = f"{type(error).__name__}: {' '.join(str(error).split())}".replace(str(path), "the file")
        raise InputError(f"{name}: is damaged or no grey PNG or TIFF ({show(what)[:80]}); {AGAIN}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no logs of Pillow, which quote the text of a picture; nothing that libtiff writes to stderr."""
    log = logging.getLogger("PIL")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), _no_stderr():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """What libraries in C write to the standard error goes nowhere."""
    try:
        old = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(old, 2)
        os.close(old)


def _directories(path: Path) -> int | None:
    """How many directories a TIFF links, one to the next, to the last; None for a file that is none.

    Pillow ends without a word where a link is broken. Source: TIFF 6.0, section 2; BigTIFF doubles the sizes.

    Raises:
        InputError: a link out of the file, or back to a directory that was met.
    """
    with open(path, "rb") as file:
        head, size = file.read(16), path.stat().st_size
        order: Any = {b"II": "little", b"MM": "big"}.get(head[:2])
        if order is None or int.from_bytes(head[2:4], order) not in (42, 43):
            return None
        big = int.from_bytes(head[2:4], order) == 43
        wide, counted, entry = (8, 8, 20) if big else (4, 2, 12)
        at, met = int.from_bytes(head[8:16] if big else head[4:8], order), set[int]()
        while at:
            file.seek(at)
            entries = int.from_bytes(file.read(counted), order)
            end = at + counted + entries * entry
            if at in met or not 0 < entries <= 65536 or end + wide > size:
                raise InputError(f"{show(path)}: is damaged (directory {len(met) + 1} of its pages); {AGAIN}")
            met.add(at)
            file.seek(end)
            at = int.from_bytes(file.read(wide), order)
    return len(met)


def _ends_with(path: Path, end: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(-min(len(end), path.stat().st_size), 2)
        return file.read() == end


def _page(file: Any, page: int, name: str) -> np.ndarray:
    file.seek(page)
    tags = getattr(file, "tag_v2", {})
    kind = (*tags.get(339, (1,)), *tags.get(258, (1,)))  # SampleFormat, BitsPerSample: Pillow reads some as others
    if file.mode not in _DTYPES or (tags and kind not in _TIFF_KINDS):
        raise InputError(f"{name}: is in colour or no 8 or 16 bit ({file.mode}, {kind}); convert it to grey first")
    return np.array(file).astype(_DTYPES[file.mode])


def _image(pages: list[np.ndarray], text: str | None, name: str, stacked: bool = False) -> Image:
    """Pages and the line of JSON, if it is invdiff's, as an image; ``stacked``: slices may lie one below the other."""
    if any(page.shape != pages[0].shape for page in pages):
        raise InputError(f"{name}: has pages of different sizes; give pages of one size")
    data, affine = np.stack(pages, axis=-1).swapaxes(0, 1), flat_affine()
    notes = ("no place in the file: pixels of 1 mm, columns to the left of the patient and rows to the back",)
    try:
        known = json.loads(text) if isinstance(text, str) and f'"{_KEY}"' in text else None
    except (ValueError, RecursionError):
        known = None
    if known is None:
        return Image(data, affine, notes=notes)
    try:
        affine = np.array(known["affine"], dtype=float)
        slope, intercept, slices = (float(known[key]) for key in ("slope", "intercept", "slices"))
        if affine.shape != (4, 4) or not np.isfinite([slope, intercept]).all() or slope <= 0:
            raise ValueError("out of range")
        if len(pages) != slices:
            if len(pages) > 1 or not stacked:
                raise ValueError("pages are missing")
            data = np.concatenate(np.split(data, int(slices), axis=1), axis=2)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise InputError(f"{name}: is damaged (what invdiff wrote of its place); {AGAIN}") from None
    with np.errstate(over="ignore"):  # infinity is refused by whoever takes the image
        return Image((slope * data.astype(np.float64) + intercept).astype(np.float32), affine)


def write(part: Path, image: Image, suffix: str) -> None:
    """TIFF: one page for each slice; PNG: slices one below the other. Place, slope and intercept go along as JSON.

    Whole numbers from 0 on are written as they are, in 8 or 16 bits. Others: TIFF as float32; PNG in 16 bits, off by
    half a step of 1/65535 of their range at most.
    """
    from PIL import Image as Pictures
    from PIL.PngImagePlugin import PngInfo

    stored, slope, intercept = to_steps(image.data, 65535)
    small = stored.max() <= 255 and (slope, intercept) == (1, 0)
    if suffix != ".png" and (slope, intercept) != (1, 0):
        stored, slope, intercept = image.data.astype("<f4"), 1.0, 0.0
    pages = np.moveaxis(stored.swapaxes(0, 1), -1, 0)
    pages = np.ascontiguousarray(pages.astype(np.uint8) if small else pages)
    place = {_KEY: LABEL, "affine": image.affine.tolist(), "slope": slope, "intercept": intercept}
    text = json.dumps(place | {"slices": len(pages)})
    if suffix == ".png":
        info = PngInfo()
        info.add_text(_KEY, text)
        Pictures.fromarray(pages.reshape(-1, pages.shape[2])).save(part, "PNG", pnginfo=info)
        return
    first, *rest = (Pictures.fromarray(page) for page in pages)
    tags = {_TIFF_TEXT: text}
    first.save(part, "TIFF", save_all=True, append_images=rest, tiffinfo=tags, compression="tiff_adobe_deflate")
