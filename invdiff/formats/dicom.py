"""DICOM series in: slices in files of their own or frames of one, sorted along their normal, rescaled (CT: HU)."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError
from invdiff.files import show
from invdiff.formats.base import LPS, Image, Wanted, check_count, files_in
from invdiff.formats.dicom_files import frame_pixels, headers, open_dicom
from invdiff.formats.dicom_frames import GROUPS, Origin, placed
from invdiff.formats.series import Slice, grid, one_each, one_kind

MODALITIES = {"CT": "CT", "MR": "MR"}
#: What a derived series takes over: patient, study and place, so that it is filed beside its source.
KEPT = (
    "SpecificCharacterSet", "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex",
    "PatientIdentityRemoved", "DeidentificationMethod", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID", "PositionReferenceIndicator",
    "PatientPosition", "BodyPartExamined", "KVP", "LossyImageCompression", "LossyImageCompressionRatio",
    "LossyImageCompressionMethod", "BurnedInAnnotation",
)  # fmt: skip
_READ = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "Modality", "Rows",
    "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """What a derived series refers to.

    Attributes:
        kept: data set with the tags of ``KEPT``.
        normal: LPS unit vector across the slices.
        slices: ``(position along the normal in mm, SOP class UID, SOP instance UID, frame or None)`` of each.
    """

    kept: Any = field(repr=False)
    normal: np.ndarray
    slices: tuple[tuple[float, str, str, int | None], ...] = field(repr=False)


def read(path: Path, wanted: Wanted) -> Image:
    """A folder that holds a DICOM series, or a single DICOM image.

    Raises:
        UsageError: pydicom or a decoder is missing.
        InputError: no images, several series, or a series that is mixed, uneven, damaged or too large.
    """
    name, one = show(path), path.is_file()
    files = [path] if one else files_in(path)
    try:
        found, left = headers(files, [*_READ, *GROUPS, *KEPT])
        if not found:
            raise InputError("holds no DICOM images; name the folder that holds the files of one series")
        chosen = _one_series(found, wanted.series)
        notes = [f"{left} files that are no DICOM images were left out"] if left else []
        several = [s for file, header in chosen for s in placed(header, file)]
        slices, mixed = one_kind(several, wanted.accept)
        check_count("the series", math.prod(slices[0].shape) * len(slices), wanted.max_voxels)
        slices, twice = one_each(slices, _same, wanted.index, wanted.accept)
        header = slices[0].source.header
        affine, places, uneven = grid(slices, wanted.accept)
        check_count(
            "the series", math.prod(slices[0].shape) * len(slices if places is None else places), wanted.max_voxels
        )
        data = _stack(slices)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if places is not None:
        data = _between(data, places)
    modality = MODALITIES.get(str(header.get("Modality")), "image")
    notes = [*notes, *mixed, *twice, *uneven]
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        notes.append("is meant to be shown inverted (MONOCHROME1); the values are as stored")
    return Image(data, LPS @ affine, modality, _source(slices), tuple(notes))


def _one_series(headers: list[tuple[Path, Any]], wanted: str | None) -> list[tuple[Path, Any]]:
    """The files of the only series, or of the one that is asked for."""
    groups: dict[str, list[tuple[Path, Any]]] = {}
    for file, header in headers:
        groups.setdefault(str(header.get("SeriesInstanceUID") or ""), []).append((file, header))

    uids = sorted(groups, key=lambda uid: (str(groups[uid][0][1].get("SeriesNumber") or "").rjust(20), uid))

    def describe(n: int) -> str:
        header = groups[uids[n]][0][1]
        size = f"{header.Columns} x {header.Rows}"
        return f"{n + 1} = {show(str(header.get('Modality')))[:4]}, {len(groups[uids[n]])} images of {size}"

    if wanted is None:
        if len(uids) > 1:
            listed = "; ".join(describe(n) for n in range(min(len(uids), 12)))
            raise InputError(f"holds {len(uids)} series ({listed}); choose one with --series 1 ... {len(uids)}")
        return groups[uids[0]]
    hits = [
        uid for n, uid in enumerate(uids) if wanted in (str(n + 1), uid) or ("." in wanted and uid.startswith(wanted))
    ]
    if len(hits) != 1:
        raise InputError(f"has {len(hits)} series '{show(wanted)[:70]}'; --series can be 1 ... {len(uids)}, or a UID")
    return groups[hits[0]]


def _pixels(s: Slice, data: Any = None) -> np.ndarray:
    """Rescaled pixels ``(rows, columns)``, float32; ``data``: of its file, if that is open.

    Raises:
        InputError: damaged, or larger or smaller than the header says.
        UsageError: a decoder is missing.
    """
    origin: Origin = s.source
    stored = frame_pixels(open_dicom(origin.file) if data is None else data, s.name, origin.frame)
    if stored.shape != s.shape:
        raise InputError(f"{s.name}: holds {stored.shape} pixels, its header says {s.shape}; export it again")
    with np.errstate(over="ignore"):  # infinity is refused by whoever takes the image
        return (origin.slope * stored.astype(np.float64) + origin.intercept).astype(np.float32)


def _same(a: Slice, b: Slice) -> bool:
    """Two files of one image: same identity, same pixels."""
    if a.source.file == b.source.file or a.source.frame != b.source.frame:
        return False
    one, other = (s.source.header.get("SOPInstanceUID") or "" for s in (a, b))
    return one == other and np.array_equal(a.position, b.position) and np.array_equal(_pixels(a), _pixels(b))


def _stack(slices: list[Slice]) -> np.ndarray:
    """``(column, row, slice)``, float32; every file is opened once."""
    rows, columns = slices[0].shape
    data = np.empty((columns, rows, len(slices)), np.float32)
    file, content = None, None
    for k in sorted(range(len(slices)), key=lambda k: (str(slices[k].source.file), k)):
        if slices[k].source.file != file:
            file, content = slices[k].source.file, open_dicom(slices[k].source.file)
        data[:, :, k] = _pixels(slices[k], content).T
    return data


def _between(data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Slices at fractional places, by linear interpolation."""
    out = np.empty((*data.shape[:2], len(places)), np.float32)
    for k, place in enumerate(places):
        low = min(int(place), data.shape[2] - 1)
        share = np.float32(place - low)
        out[:, :, k] = (1 - share) * data[:, :, low] + share * data[:, :, min(low + 1, data.shape[2] - 1)]
    return out


def _source(slices: list[Slice]) -> Source:
    from pydicom import Dataset

    kept, header = Dataset(), slices[0].source[0]
    for key in KEPT:
        if key in header:
            kept[key] = header[key]

    def identity(h: Any) -> tuple[str, str]:
        meta = h.file_meta
        return (
            str(h.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""),
            str(h.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID") or ""),
        )

    return Source(kept, slices[0].normal, tuple((s.along, *identity(s.source.header), s.source.frame) for s in slices))
