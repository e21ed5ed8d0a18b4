"""DICOM series in: one folder, one series, sorted along its normal, in rescaled values (CT: HU)."""

import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InputError, UsageError
from invdiff.files import show
from invdiff.formats.base import LPS, Image, Wanted, check_count, files_in
from invdiff.formats.series import Slice, grid, one_each, one_kind

SUFFIXES = (".dcm", ".ima")
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
        slices: ``(position along the normal in mm, SOP class UID, SOP instance UID)`` of each.
    """

    kept: Any = field(repr=False)
    normal: np.ndarray
    slices: tuple[tuple[float, str, str], ...] = field(repr=False)


def read(path: Path, wanted: Wanted) -> Image:
    """A folder that holds a DICOM series, or a single DICOM image.

    Raises:
        UsageError: pydicom or a decoder is missing.
        InputError: no images, several series, or a series that is mixed, uneven, damaged or too large.
    """
    name, one = show(path), path.is_file()
    files = [path] if one else files_in(path)
    try:
        headers, left = _headers(files)
        if not headers:
            raise InputError("holds no DICOM images; name the folder that holds the files of one series")
        chosen = _one_series(headers, wanted.series)
        notes = [f"{left} files that are no DICOM images were left out"] if left else []
        slices, mixed = one_kind([_placed(header, file) for file, header in chosen], wanted.accept)
        check_count("the series", math.prod(slices[0].shape) * len(slices), wanted.max_voxels)
        slices, twice = one_each(slices, _same, wanted.index, wanted.accept)
        header = slices[0].source[0]
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


def _headers(files: list[Path]) -> tuple[list[tuple[Path, Any]], int]:
    """Headers of the images among ``files``, without pixels; and how many are none."""
    from pydicom.errors import InvalidDicomError

    found, left = [], 0
    for file in files:
        try:
            header = _open(file, stop_before_pixels=True, specific_tags=[*_READ, *KEPT])
            kind = header.file_meta.MediaStorageSOPClassUID
            if "Rows" in header and "Columns" in header:
                found.append((file, header))
                continue
            other = kind.name not in ("", str(kind)) and "Image Storage" not in kind.name  # reports, directories, ...
        except InvalidDicomError:
            known = file.suffix.lower() in SUFFIXES
            other = not known and re.fullmatch(r"[^\W\d]+(\.[^\W\d]\w*)?", file.name) is not None
        if not other:
            raise InputError(f"{show(file.name)}: is no DICOM image, perhaps truncated; remove it or export it again")
        left += 1
    return found, left


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and logs of pydicom, which quote what headers hold, maybe a name."""
    from pydicom.config import disable_value_validation

    log = logging.getLogger("pydicom")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings(), disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def _open(file: Path, **options: Any) -> Any:
    """A data set; what is wrong with it is said without its words, which may name a patient.

    Raises:
        InvalidDicomError: not DICOM.
        InputError: damaged in whatever way.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError
    from pydicom.uid import UID

    try:
        with quiet():
            data = pydicom.dcmread(file, **options)
            data.file_meta.MediaStorageSOPClassUID = UID(str(data.file_meta.get("MediaStorageSOPClassUID", "")))
            for element in data if options else ():  # values are converted here and now
                _ = element.value
            return data
    except InvalidDicomError:
        raise
    except Exception as error:  # damage shows in many ways, too deep nesting as a RecursionError
        raise InputError(f"{show(file.name)}: is damaged DICOM ({type(error).__name__}); export it again") from None


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


def _numbers(header: Any, key: str, count: int, name: str) -> np.ndarray:
    value = header.get(key)
    try:
        numbers = np.array([float(v) for v in value], dtype=float) if value is not None else np.empty(0)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if len(numbers) != count or not np.isfinite(numbers).all():
        why = "is missing (projection data, or a secondary capture?)" if value is None else "is damaged"
        raise InputError(f"{name}: {key} {why}; convert it with dcm2niix")
    return numbers


def _placed(header: Any, file: Path) -> Slice:
    """What places a slice, after a look at what it holds; ``source`` is (header, file, slope, intercept)."""
    name = show(file.name)
    try:
        return _place(header, file, name)
    except InputError:
        raise
    except Exception as error:  # numbers that are none, in whatever form
        raise InputError(f"{name}: is damaged DICOM ({type(error).__name__}); export it again") from None


def _place(header: Any, file: Path, name: str) -> Slice:
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise InputError(f"{name}: has several frames in one file; convert it with dcm2niix")
    if int(header.get("SamplesPerPixel") or 1) != 1 or "ModalityLUTSequence" in header:
        raise InputError(f"{name}: holds colours or a table of values; convert it with dcm2niix")
    orientation = _numbers(header, "ImageOrientationPatient", 6, name)
    row, column = orientation[:3], orientation[3:]
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3):
        raise InputError(f"{name}: ImageOrientationPatient is no pair of orthogonal unit vectors; export it again")
    spacing = _numbers(header, "PixelSpacing", 2, name)
    if spacing.min() <= 0:
        raise InputError(f"{name}: PixelSpacing is not positive; export it again")
    if header.get("Modality") == "CT" and header.get("RescaleIntercept") is None:
        raise InputError(f"{name}: is CT without a rescale to HU; export it again")
    values = (header.get("RescaleSlope"), header.get("RescaleIntercept"))
    slope, intercept = (default if v is None else float(v) for v, default in zip(values, (1.0, 0.0), strict=True))
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise InputError(f"{name}: has rescale slope {slope} and intercept {intercept}; export it again")
    thickness = abs(float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 1.0))
    return Slice(
        name,
        int(header.get("InstanceNumber") or 0),
        (int(header.Rows), int(header.Columns)),
        orientation,
        _numbers(header, "ImagePositionPatient", 3, name),
        (float(spacing[0]), float(spacing[1])),
        thickness,
        (header, file, slope, intercept),
    )


def _pixels(s: Slice) -> np.ndarray:
    """Rescaled pixels ``(rows, columns)``, float32.

    Raises:
        InputError: damaged, or larger or smaller than the header says.
        UsageError: a decoder is missing.
    """
    _, file, slope, intercept = s.source
    full = _open(file)
    if "PixelData" not in full and "FloatPixelData" not in full:
        raise InputError(f"{s.name}: holds no pixels; export it again")
    syntax = full.file_meta.get("TransferSyntaxUID")
    try:
        with quiet():
            stored = full.pixel_array
    except Exception as error:  # decoders raise what they like
        if syntax is not None and "missing dependencies" in str(error):
            raise UsageError(f"{s.name}: {syntax.name} needs a decoder: pip install 'invdiff[dicom]'") from None
        why = show(" ".join(str(error).split()))[:80]
        raise InputError(f"{s.name}: is damaged or truncated ({why}); export it again") from None
    if stored.shape != s.shape:
        raise InputError(f"{s.name}: holds {stored.shape} pixels, its header says {s.shape}; export it again")
    return (slope * stored.astype(np.float64) + intercept).astype(np.float32)


def _same(a: Slice, b: Slice) -> bool:
    """Two files of one image: same identity, same pixels."""
    one, other = (s.source[0].get("SOPInstanceUID") or "" for s in (a, b))
    return one == other and np.array_equal(a.position, b.position) and np.array_equal(_pixels(a), _pixels(b))


def _stack(slices: list[Slice]) -> np.ndarray:
    """``(column, row, slice)``, float32."""
    rows, columns = slices[0].shape
    data = np.empty((columns, rows, len(slices)), np.float32)
    for k, s in enumerate(slices):
        data[:, :, k] = _pixels(s).T
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

    return Source(kept, slices[0].normal, tuple((s.along, *identity(s.source[0])) for s in slices))
