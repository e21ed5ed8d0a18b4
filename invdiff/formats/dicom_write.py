"""DICOM series out: a derived series in its own folder, filed beside its source where there is one."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from invdiff import __version__
from invdiff.errors import UsageError
from invdiff.formats.base import LABEL, LPS, Image, to_steps
from invdiff.formats.dicom import KEPT, Source
from invdiff.formats.dicom_files import quiet

_KINDS = {  # by modality: SOP class, Modality, third value of ImageType
    "CT": ("1.2.840.10008.5.1.4.1.1.2", "CT", "AXIAL"),
    "MR": ("1.2.840.10008.5.1.4.1.1.4", "MR", "OTHER"),
    "image": ("1.2.840.10008.5.1.4.1.1.7", "OT", "OTHER"),
}
Reference = tuple[str, str, int | None]  # SOP class UID, SOP instance UID, frame
_EMPTY = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
          "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator")  # fmt: skip


def write(part: Path, image: Image, suffix: str) -> None:
    """One file for each slice along the last axis, ``0001.dcm`` on, into the folder ``part``.

    16 bits with one slope and intercept for the series: whole numbers (HU) stay exact, others are off by half a step of
    1/65535 of their range at most. Patient and study are those of the source series; series and instances are new, with
    UIDs that follow from the content, so that equal volumes give equal files.

    Raises:
        UsageError: pydicom is missing, or rows and columns are not orthogonal.
    """
    from pydicom.uid import generate_uid

    affine = LPS @ image.affine
    size = np.linalg.norm(affine[:3, :3], axis=0)
    row, column = (affine[:3, n] / size[n] for n in (0, 1))
    if abs(row @ column) > 1e-4:
        raise UsageError("DICOM holds no slices whose rows and columns are not orthogonal: name a .nii.gz")
    stored, slope, intercept = to_steps(image.data, 65535)
    digest = hashlib.sha256(repr((affine.tolist(), slope, intercept, image.modality, __version__)).encode())
    for k in range(stored.shape[2]):
        digest.update(stored[:, :, k].tobytes())
    source = image.header if isinstance(image.header, Source) else None
    known = repr([s[2] for s in source.slices] if source else None)
    base = _series(image, source, lambda what: generate_uid(entropy_srcs=[digest.hexdigest(), known, what]))
    normal = np.cross(row, column)
    step = abs(float(normal @ affine[:3, 2]))
    base["SliceThickness"] = step
    base |= {"ImageOrientationPatient": [*row, *column], "PixelSpacing": [size[1], size[0]]}
    base |= {"RescaleSlope": slope, "RescaleIntercept": intercept}
    low, high = float(image.data.min()), float(image.data.max())
    base |= {"WindowCenter": (low + high) / 2, "WindowWidth": max(high - low, 1.0)}
    for k in range(stored.shape[2]):
        uid = generate_uid(entropy_srcs=[digest.hexdigest(), known, str(k)])
        values = {**base, "SOPInstanceUID": uid, "InstanceNumber": k + 1}
        values["ImagePositionPatient"] = affine[:3, 3] + k * affine[:3, 2]
        with quiet():  # what is taken over is the source's to answer for
            _save(part / f"{k + 1:04d}.dcm", values, stored[:, :, k].T, _references(source, values, normal, step))


def _series(image: Image, source: Source | None, new_uid) -> dict[str, Any]:
    """Attributes that all slices share."""
    sop_class, modality, third = _KINDS[image.modality or "image"]
    base: dict[str, Any] = dict.fromkeys(_EMPTY, "")
    if source is not None:
        taken = [key for key in KEPT if key in source.kept and (key != "KVP" or modality == "CT")]
        base |= {key: source.kept[key].value for key in taken}
    for key in ("StudyInstanceUID", "FrameOfReferenceUID"):
        base[key] = base.get(key) or new_uid(key)
    base |= {"SOPClassUID": sop_class, "Modality": modality, "SeriesInstanceUID": new_uid("series")}
    base |= {"ImageType": ["DERIVED", "SECONDARY", third], "SeriesNumber": None, "Manufacturer": "invdiff"}
    base |= {"SeriesDescription": "invdiff, research use only", "SoftwareVersions": __version__}
    base["DerivationDescription"] = f"reconstructed by {LABEL}"
    if modality == "CT":
        base = {"KVP": None, "AcquisitionNumber": None, "RescaleType": "HU"} | base
    elif modality == "MR":
        base |= dict.fromkeys(("ScanOptions", "MRAcquisitionType", "EchoTime", "EchoTrainLength", "RepetitionTime"))
        base |= {"ScanningSequence": "RM", "SequenceVariant": "NONE"}
    else:
        base["ConversionType"] = "WSD"
    return base


def _references(source: Source | None, values: dict[str, Any], normal: np.ndarray, step: float) -> list[Reference]:
    """SOP class and instance, and frame if any, of the source slices less than a step away."""
    if source is None or abs(normal @ source.normal) < 0.999:
        return []
    here = float(source.normal @ values["ImagePositionPatient"])
    near = [s[1:] for s in source.slices if abs(s[0] - here) < 0.99 * step]
    return [(kind, uid, frame) for kind, uid, frame in near if kind and uid]


def _save(path: Path, values: dict[str, Any], pixels: np.ndarray, references: list[Reference]) -> None:
    from pydicom import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian
    from pydicom.valuerep import DSfloat

    def decimal(value):
        if isinstance(value, float):
            return DSfloat(value, auto_format=True)
        many = isinstance(value, list | np.ndarray) and not isinstance(value[0], str)
        return [DSfloat(float(v), auto_format=True) for v in value] if many else value

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = values["SOPClassUID"], values["SOPInstanceUID"]
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = Dataset()
    data.file_meta = meta
    for key, value in values.items():
        setattr(data, key, decimal(value))
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.PixelData = np.ascontiguousarray(pixels, "<u2").tobytes()
    if references:
        data.SourceImageSequence = [_reference(*reference) for reference in references]
    data.save_as(path, enforce_file_format=True)


def _reference(kind: str, uid: str, frame: int | None) -> Any:
    """A source image, with its purpose (DCM 121322: source image for image processing operation)."""
    from pydicom import Dataset

    purpose, item = Dataset(), Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = kind, uid
    if frame is not None:
        item.ReferencedFrameNumber = frame + 1
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item
