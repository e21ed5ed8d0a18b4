"""Which files a training takes, who they show, and which subjects are kept for validation."""

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from invdiff.errors import InputError
from invdiff.files import read_text, show
from invdiff.priors.training_data import Source, load_source
from invdiff.volume import is_part_of_series

#: Volumes of a folder; ``.npy`` beside them is taken only when it is named.
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz")
_UNREAD = (".jpg", ".jpeg", ".bmp", ".gif", ".hdr", ".mgz", ".mnc")  # images all the same
warnings = logging.getLogger("invdiff")


@dataclass(frozen=True)
class Found:
    """A file, or a folder that is one series.

    Attributes:
        path: of it.
        subject: who it shows, as validation names it.
        split: of a manifest, or None.
        name: what logs and weights call it: a file by its name, a folder, which may be a patient's, by a number.
        named: it was given by itself.
    """

    path: Path
    subject: str
    split: str | None
    name: str
    named: bool = False


def find_volumes(paths: Sequence[Path], split: str | None) -> list[Path]:
    """Volume files under ``paths``; in a folder with a ``manifest.json`` only the files of ``split`` are taken.

    Raises:
        InputError: a path does not exist, or nothing is left.
    """
    found = [f.path for f in find_files(paths) if split is None or f.named or f.split in (None, split)]
    if not found:
        raise _nothing(paths, split)
    return found


def find_files(paths: Sequence[Path]) -> list[Found]:
    """Everything under ``paths`` that can be learnt from.

    A folder is a DICOM series, a set of pictures, or holds volumes and such folders at any depth. Subjects are those of
    a ``manifest.json`` (a list of ``file``, ``subject``, ``split``), else what lies in one folder next to the top, else
    one file (``sub-NAME`` in its name where there is one). What is reached on two ways counts once, with the subject of
    its folder; links are followed.

    Raises:
        InputError: a path does not exist or cannot be read, or a manifest is none.
    """
    found: list[Found] = []
    subjects: dict[Path, str] = {}
    for path in paths:
        if not path.exists():
            raise InputError(
                f"{show(path)}: no such file or folder; give volumes, DICOM folders or folders of pictures"
            )
        if path.is_file():
            found.append(Found(path, _stem(path.name), None, show(path.name), named=True))
        elif os.path.exists(path / "manifest.json"):
            found += _of_manifest(path)
        else:
            found += _of_folder(path, len(found), subjects)
    once: dict[str, Found] = {}
    for each in found:
        place = _real(each.path)
        other = once.get(place, each)
        known = each if other.named else other  # a folder knows the subject
        once[place] = replace(known, named=other.named or each.named)
    return list(once.values())


def _real(path: Path) -> str:
    """Where links lead; the path itself if nowhere."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return str(path)


def _of_manifest(folder: Path) -> list[Found]:
    try:
        entries = json.loads(read_text(folder / "manifest.json"))
        entries = [e for e in entries if str(e["file"]).lower().endswith(VOLUME_SUFFIXES)]
        rows = [(str(e["file"]), str(e.get("subject") or _subject(e["file"])), e.get("split")) for e in entries]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{show(folder / 'manifest.json')}: is no list of objects with file, subject and split ({error}); repair it"
        ) from None
    without = [f for f, _, split in rows if split is None]
    if 0 < len(without) < len(rows):
        raise InputError(
            f"{show(folder / 'manifest.json')}: says no split of {show(without[0])}, but of others; give it "
            "one, or 'none' to leave it out"
        )
    return [Found(folder / f, who, None if split is None else str(split), show(f)) for f, who, split in rows]


def _subject(file: str) -> str:
    """Of a row that names none: the folder next to the manifest, else the file."""
    return show(Path(file).parts[0]) if len(Path(file).parts) > 1 else _stem(file)


def _of_folder(top: Path, before: int, subjects: dict[Path, str]) -> list[Found]:
    """Volumes and series at any depth, in the order of their names; ``subjects`` gets the folders next to ``top``."""
    found: list[Found] = []
    seen = {top.resolve()}
    for folder, inner, files in os.walk(top, onerror=lambda error: _unreadable(error, top), followlinks=True):
        place = Path(folder)
        below = {(place / name).resolve(): name for name in sorted(inner, reverse=True) if not name.startswith(".")}
        inner[:] = sorted(name for real, name in below.items() if real not in seen)  # a link can lead back
        seen |= set(below)
        names = sorted(name for name in files if not name.startswith("."))
        volumes = [name for name in names if name.lower().endswith(VOLUME_SUFFIXES)]
        parts = place.relative_to(top).parts
        others = (name for name in names if not name.lower().endswith(VOLUME_SUFFIXES))
        series = next((name for name in others if _is_of_series(place / name)), None)
        if volumes and series:
            warnings.warning(
                "%s: pictures or DICOM beside its volumes are not read, %s among them; give them a folder of their own",
                show(place),
                show(series),
            )
        if not volumes and not series:
            if unread := next((name for name in names if name.lower().endswith(_UNREAD)), None):
                warnings.warning("%s: is left out, %s is of no format that is read", show(place), show(unread))
            continue
        who = subjects.setdefault(top / parts[0], f"folder {len(subjects) + 1}") if parts else ""
        found += [Found(place / name, who or _stem(name), None, show(name)) for name in volumes]
        if not volumes:
            name = f"series {before + len(found) + 1}"
            found.append(Found(place, who or name, None, name))
    return found


def _is_of_series(path: Path) -> bool:
    """Whether a file is a picture or DICOM; what cannot be read is left out, with a warning."""
    try:
        return is_part_of_series(path)
    except (OSError, InputError):
        warnings.warning("%s: is left out, it cannot be read", show(path))
        return False


def _unreadable(error: OSError, top: Path) -> None:
    if Path(error.filename) == top:
        raise InputError(f"{show(top)}: cannot be read ({error.strerror}); allow it, or name another folder")
    warnings.warning("%s: is left out, it cannot be read (%s)", show(error.filename), error.strerror)


def _stem(name: str) -> str:
    """``sub-NAME`` of a file name, else the name without its ending."""
    subject = re.search(r"sub-[A-Za-z0-9]+", name)
    return subject[0] if subject else show(re.sub(r"(\.nii)?\.[^.]*$", "", name))


def split_files(
    paths: Sequence[Path], split: str, validation_split: str, hold_out: int | None = None
) -> tuple[list[Found], list[Found]]:
    """Files to train on and files to validate on, of different subjects.

    Args:
        paths: files and folders.
        split: of manifests, to train on. A file that is named by itself is trained on if its split is another than
            these two.
        validation_split: of manifests, to validate on.
        hold_out: how many of the subjects without a manifest are kept for validation; None for one in ten, at least
            one where there are two or more, and none where a manifest names subjects to validate on.

    Raises:
        InputError: nothing to train on, or a subject is in both splits.
    """
    found = [
        replace(f, split=split) if f.named and f.split not in (None, split, validation_split) else f
        for f in find_files(paths)
    ]
    train = [f for f in found if f.split == split]
    held = [f for f in found if f.split == validation_split]
    free = sorted({f.subject for f in found if f.split is None})
    if hold_out is None:
        hold_out = max(1, len(free) // 10) if len(free) > 1 and not held else 0
    if hold_out and hold_out >= len(free):
        raise InputError(f"{hold_out} subjects cannot be held out of {len(free)}: lower --hold-out or add data")
    chosen = {free[k * len(free) // hold_out] for k in range(hold_out)} if hold_out else set()
    train += [f for f in found if f.split is None and f.subject not in chosen]
    held += [f for f in found if f.split is None and f.subject in chosen]
    known = {split, validation_split, "test"}
    if other := sorted({f.split for f in found if f.split is not None} - known):
        left = sum(f.split in other for f in found)
        told = left, ", ".join(map(show, other[:3]))
        warnings.warning("%d files of other splits (%s) are left out; --split and --validation-split choose", *told)
    if both := {f.subject for f in train} & {f.subject for f in held}:
        raise InputError(f"subject {sorted(both)[0]} is both to train and to validate on: give it one split")
    if not train:
        raise _nothing(paths, split)
    return train, held


def load_sources(found: Sequence[Found]) -> list[Source]:
    """The slices of all of them."""
    return [load_source(f.path, name=f.name, subject=f.subject) for f in found]


def _nothing(paths: Sequence[Path], split: str | None) -> InputError:
    where = ", ".join(show(p) for p in paths)
    formats = "NIfTI, NRRD, MetaImage, npz, DICOM, PNG or TIFF"
    return InputError(f"no volumes of split '{split}' under {where} ({formats}): check the folder or --split")
