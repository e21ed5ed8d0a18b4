"""An enhanced multi-frame DICOM file, written with pydicom."""

import numpy as np


def enhanced(stored, modality="CT", positions=None, order=None, shared_rescale=False, **changes):
    """A file with the frames ``stored`` ``(n, rows, columns)`` every 2 mm; pixels of 0.5 x 0.7 mm.

    Frame n has the rescale slope 1 + n and intercept -1024 (or 1 and -1024, shared); ``positions`` along z in mm;
    ``changes`` are attributes, None deletes one.
    """
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    data = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=bytes(128))
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = f"1.2.840.10008.5.1.4.1.1.{'2.1' if modality == 'CT' else '4.1'}"
    data.SOPInstanceUID, data.SeriesInstanceUID, data.StudyInstanceUID = "1.2.9.1", "1.2.9.2", "1.2.9.3"
    data.FrameOfReferenceUID, data.Modality, data.InstanceNumber = "1.2.9.4", modality, 1
    data.PatientName, data.PatientID, data.SeriesDescription = "DOE^JANE", "MRN77", "SECRET"
    data.NumberOfFrames, data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    positions = 2.0 * np.arange(len(stored)) if positions is None else positions

    def item(**values):
        one = Dataset()
        for name, value in values.items():
            setattr(one, name, value)
        return one

    shared = Dataset()
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    shared.PixelMeasuresSequence = [item(PixelSpacing=[0.5, 0.7], SliceThickness=2)]
    if shared_rescale:
        shared.PixelValueTransformationSequence = [item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")]
    data.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for n, z in enumerate(positions):
        frame = item(PlanePositionSequence=[item(ImagePositionPatient=[-10, 20, float(z)])])
        if not shared_rescale:
            frame.PixelValueTransformationSequence = [
                item(RescaleSlope=1 + n, RescaleIntercept=-1024, RescaleType="HU")
            ]
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = frames
    data.PixelData = np.ascontiguousarray(stored, "<u2").tobytes()
    for name, value in changes.items():
        delattr(data, name) if value is None else setattr(data, name, value)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    return data


def save(path, data):
    data.save_as(path, enforce_file_format=True)
    return path
