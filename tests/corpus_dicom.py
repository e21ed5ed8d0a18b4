"""The corpus for DICOM series: a folder of four slices, one of which is damaged."""

import struct
import zlib

import numpy as np
from corpus import REFUSE, VALID, Reader
from corpus_volumes import AFFINE, bomb, volume_arrays

from invdiff.volume import Volume, load_volume, save_volume

STORED = np.random.default_rng(0).integers(-1000, 2000, (4, 5, 4)).astype(np.float32)
ONE = "a.dcm/0002.dcm"


def make(folder):
    save_volume(Volume(STORED, AFFINE, "HU", "CT"), folder / "a.dcm")


def changed(**changes):
    """Attributes of the second slice; None removes one."""

    def edit(folder):
        import pydicom

        data = pydicom.dcmread(folder / ONE)
        for name, value in changes.items():
            if value is None:
                delattr(data, name)
            else:
                data[name].value = value
        data.save_as(folder / ONE)

    return edit


def written(name, text):
    """A decimal string as it is, whatever it says."""

    def edit(folder):
        path, data = folder / ONE, (folder / ONE).read_bytes()
        place = data.index(struct.pack("<HH", *name))
        length = struct.unpack("<H", data[place + 6 : place + 8])[0]
        value = text.ljust(length + len(text) % 2)
        value += " " * (len(value) % 2)
        path.write_bytes(
            data[: place + 6] + struct.pack("<H", len(value)) + value.encode() + data[place + 8 + length :]
        )

    return edit


def added(build):
    """What ``build(data)`` does to the data set of the second slice."""

    def edit(folder):
        import pydicom

        data = pydicom.dcmread(folder / ONE)
        build(data)
        data.save_as(folder / ONE)

    return edit


def nested(folder):
    """Sequences of undefined length, 20 000 deep, in a private group."""
    path = folder / ONE
    open_item = struct.pack("<HH2sHIHHI", 0x0009, 0x1001, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    data = path.read_bytes()
    place = data.index(struct.pack("<HH", 0x0010, 0x0010))
    path.write_bytes(data[:place] + open_item * 20000 + data[place:])


def deflated(folder):
    """A deflated data set that goes on without end."""
    import pydicom
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    data = pydicom.dcmread(folder / ONE)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(folder / ONE)
    whole = (folder / ONE).read_bytes()
    place = whole.index(b"1.2.840.10008.1.2.1.99")
    head = whole[: whole.index(b"\0", place) + 1] if b"\0" in whole[place:] else whole
    length = struct.unpack("<I", whole[140:144])[0]
    head = whole[: 144 + length]
    private = struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, 400 * 2**20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    (folder / ONE).write_bytes(head + packer.compress(private) + packer.flush(zlib.Z_FULL_FLUSH) + bomb(400, -15))


def syntax(uid):
    def edit(folder):
        import pydicom
        from pydicom.encaps import encapsulate

        data = pydicom.dcmread(folder / ONE)
        data.PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(96)])
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = uid
        data.save_as(folder / ONE)

    return edit


def many_items(data):
    from pydicom import Dataset

    data.RequestAttributesSequence = [Dataset() for _ in range(3000)]


NAN = float("nan")
SPECIAL = {
    "a slice is missing": (lambda folder: (folder / ONE).unlink(), REFUSE),
    "position twice": (changed(ImagePositionPatient=[-4, -5, -6]), REFUSE),
    "position NaN": (written((0x20, 0x32), "nan\\nan\\nan"), REFUSE),
    "position 1e300": (written((0x20, 0x32), "0\\0\\1e300"), REFUSE),
    "position words": (written((0x20, 0x32), "here\\there\\up"), REFUSE),
    "position of two": (written((0x20, 0x32), "1\\2"), REFUSE),
    "no position": (changed(ImagePositionPatient=None), REFUSE),
    "orientation 0": (written((0x20, 0x37), "0\\0\\0\\0\\0\\0"), REFUSE),
    "orientation infinite": (written((0x20, 0x37), "inf\\0\\0\\0\\1\\0"), REFUSE),
    "spacing NaN": (written((0x28, 0x30), "nan\\nan"), REFUSE),
    "spacing negative": (written((0x28, 0x30), "-1\\1"), REFUSE),
    "slope NaN": (written((0x28, 0x1053), "nan"), REFUSE),
    "slope 1e300": (written((0x28, 0x1053), "1e300"), REFUSE),
    "intercept infinite": (written((0x28, 0x1052), "inf"), REFUSE),
    "rows 65535": (changed(Rows=65535, Columns=65535), REFUSE),
    "rows 0": (changed(Rows=0), REFUSE),
    "12 frames": (added(lambda data: setattr(data, "NumberOfFrames", 12)), REFUSE),
    "colour": (changed(SamplesPerPixel=3), REFUSE),
    "bits": (changed(BitsAllocated=7), REFUSE),
    "no pixels": (changed(PixelData=None), REFUSE),
    "fewer pixels": (changed(PixelData=bytes(10)), REFUSE),
    "deep nesting": (nested, REFUSE),
    "3000 items": (added(many_items), VALID),
    "a deflated bomb": (deflated, REFUSE),
    "JPEG 2000 of nothing": (syntax("1.2.840.10008.1.2.4.90"), REFUSE),
    "JPEG-LS of nothing": (syntax("1.2.840.10008.1.2.4.80"), REFUSE),
    "RLE of nothing": (syntax("1.2.840.10008.1.2.5"), REFUSE),
    "unknown transfer syntax": (syntax("1.2.3.4"), REFUSE),
    "another series": (changed(SeriesInstanceUID="1.2.3"), REFUSE),
    "no preamble": (lambda f: (f / ONE).write_bytes((f / ONE).read_bytes()[132:]) and None, REFUSE),
    "a number that is none": (written((0x20, 0x13), "many"), REFUSE),
}


def make_enhanced(folder):
    import enhanced_cases

    enhanced_cases.save(folder / "e.dcm", enhanced_cases.enhanced(np.arange(80).reshape(4, 4, 5) + 900))


def edited(change):
    """``change(data)`` of an enhanced file."""

    def edit(folder):
        import pydicom

        data = pydicom.dcmread(folder / "e.dcm")
        change(data)
        data.save_as(folder / "e.dcm")

    return edit


def frame_value(group, name, value):
    def change(data):
        for place in (data.PerFrameFunctionalGroupsSequence[1], data.SharedFunctionalGroupsSequence[0]):
            if group in place:
                setattr(place[group][0], name, value)
                return

    return edited(change)


ENHANCED = {
    "frames 0": (edited(lambda d: setattr(d, "NumberOfFrames", 0)), REFUSE),
    "frames 3": (edited(lambda d: setattr(d, "NumberOfFrames", 3)), REFUSE),
    "frames 10^9": (edited(lambda d: setattr(d, "NumberOfFrames", 10**9)), REFUSE),
    "no groups": (edited(lambda d: delattr(d, "PerFrameFunctionalGroupsSequence")), REFUSE),
    "groups empty": (edited(lambda d: setattr(d, "PerFrameFunctionalGroupsSequence", [])), REFUSE),
    "shared empty": (edited(lambda d: setattr(d, "SharedFunctionalGroupsSequence", [])), REFUSE),
    "a position twice": (frame_value("PlanePositionSequence", "ImagePositionPatient", [-10, 20, 0]), REFUSE),
    "a gap": (frame_value("PlanePositionSequence", "ImagePositionPatient", [-10, 20, 90]), REFUSE),
    "position 1e300": (frame_value("PlanePositionSequence", "ImagePositionPatient", [0, 0, 1e300]), REFUSE),
    "orientation 0": (frame_value("PlaneOrientationSequence", "ImageOrientationPatient", [0] * 6), REFUSE),
    "spacing 0": (frame_value("PixelMeasuresSequence", "PixelSpacing", [0, 0]), REFUSE),
    "slope 0": (frame_value("PixelValueTransformationSequence", "RescaleSlope", 0), REFUSE),
    "slope 1e300": (frame_value("PixelValueTransformationSequence", "RescaleSlope", "1e300"), REFUSE),
    "rows 60000": (edited(lambda d: (setattr(d, "Rows", 60000), setattr(d, "Columns", 60000))), REFUSE),
    "fewer pixels": (edited(lambda d: setattr(d, "PixelData", bytes(40))), REFUSE),
}

READERS = (
    Reader(
        "DICOM, enhanced",
        "e.dcm",
        make_enhanced,
        lambda folder: load_volume(folder / "e.dcm"),
        volume_arrays,
        ENHANCED,
        flips=40,
        needs=("pydicom",),
    ),
    Reader(
        "DICOM",
        ONE,
        make,
        lambda folder: load_volume(folder / "a.dcm"),
        volume_arrays,
        SPECIAL,
        "a.dcm",
        flips=40,
        needs=("pydicom",),
    ),
)
