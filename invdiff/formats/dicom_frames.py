"""What places one image of DICOM: the header of its file, or the functional groups of a frame of an enhanced file."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from invdiff.errors import InputError
from invdiff.files import show
from invdiff.formats.series import Slice

_SHARED, _EACH = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
GROUPS = (_SHARED, _EACH)
_GROUP_OF = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}
_MOST_FRAMES = 2**16


class Origin(NamedTuple):
    """Where the pixels of a slice are: in a file, which frame of it (None for its only one), and their rescale."""

    header: Any
    file: Path
    slope: float
    intercept: float
    frame: int | None


def placed(header: Any, file: Path) -> list[Slice]:
    """The slices of a file; ``source`` of each is an :class:`Origin`.

    Raises:
        InputError: several frames without functional groups, colours, or numbers that are missing or damaged.
    """
    name = show(file.name)
    try:
        return _placed(header, file, name)
    except InputError:
        raise
    except Exception as error:  # numbers that are none, in whatever form
        raise InputError(f"{name}: is damaged DICOM ({type(error).__name__}); export it again") from None


def _placed(header: Any, file: Path, name: str) -> list[Slice]:
    if int(header.get("SamplesPerPixel") or 1) != 1 or "ModalityLUTSequence" in header:
        raise InputError(f"{name}: holds colours or a table of values; convert it with dcm2niix")
    count = int(header.get("NumberOfFrames") or 1)
    if _EACH not in header:
        if count > 1:
            raise InputError(f"{name}: has several frames without a place of each; convert it with dcm2niix")
        return [_place(header.get, header, file, name, None)]
    each = header[_EACH].value
    if len(each) != count or not 0 < count <= _MOST_FRAMES:
        raise InputError(f"{name}: says {count} frames and describes {len(each)}; export it again")
    shared = (header.get(_SHARED) or [{}])[0]
    return [
        _place(_lookup(groups, shared, header), header, file, f"{name}, frame {n + 1}", n)
        for n, groups in enumerate(each)
    ]


def _lookup(groups: Any, shared: Any, header: Any):
    """``get(key)`` of a frame: its own functional group, or the one that all frames share."""

    def get(key: str) -> Any:
        for place in (groups, shared):
            items = place.get(_GROUP_OF[key])
            if items and (value := items[0].get(key)) is not None:
                return value
        return None

    return get


def _place(get, header: Any, file: Path, name: str, frame: int | None) -> Slice:
    orientation = _numbers(get, "ImageOrientationPatient", 6, name)
    row, column = orientation[:3], orientation[3:]
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3):
        raise InputError(f"{name}: ImageOrientationPatient is no pair of orthogonal unit vectors; export it again")
    spacing = _numbers(get, "PixelSpacing", 2, name)
    if spacing.min() <= 0:
        raise InputError(f"{name}: PixelSpacing is not positive; export it again")
    if header.get("Modality") == "CT" and get("RescaleIntercept") is None:
        raise InputError(f"{name}: is CT without a rescale to HU; export it again")
    values = (get("RescaleSlope"), get("RescaleIntercept"))
    slope, intercept = (default if v is None else float(v) for v, default in zip(values, (1.0, 0.0), strict=True))
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise InputError(f"{name}: has rescale slope {slope} and intercept {intercept}; export it again")
    return Slice(
        name,
        int(header.get("InstanceNumber") or 0) if frame is None else frame + 1,
        (int(header.Rows), int(header.Columns)),
        orientation,
        _numbers(get, "ImagePositionPatient", 3, name),
        (float(spacing[0]), float(spacing[1])),
        abs(float(get("SpacingBetweenSlices") or get("SliceThickness") or 1.0)),
        Origin(header, file, slope, intercept, frame),
    )


def _numbers(get, key: str, count: int, name: str) -> np.ndarray:
    value = get(key)
    try:
        numbers = np.array([float(v) for v in value], dtype=float) if value is not None else np.empty(0)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if len(numbers) != count or not np.isfinite(numbers).all():
        why = "is missing (projection data, or a secondary capture?)" if value is None else "is damaged"
        raise InputError(f"{name}: {key} {why}; convert it with dcm2niix")
    return numbers
