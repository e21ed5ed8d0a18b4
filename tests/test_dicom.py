"""DICOM series: regular ones in HU where they lie, irregular ones refused by name; derived series filed beside them."""

import copy
import logging
import os
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install 'invdiff[dicom]'")

from pydicom.dataset import FileDataset, FileMetaDataset  # noqa: E402
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, RLELossless  # noqa: E402

from invdiff.destination import check_output  # noqa: E402
from invdiff.errors import InputError, ResourceError, UsageError  # noqa: E402
from invdiff.files import sha256_file  # noqa: E402
from invdiff.formats.dicom import KEPT  # noqa: E402
from invdiff.formats.dicom_files import quiet  # noqa: E402
from invdiff.volume import Volume, from_slices, load_volume, save_volume, to_slices  # noqa: E402

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
COUNT, ROWS, COLUMNS = 6, 5, 4
SERIES, STUDY, FRAME = "1.2.3.1", "1.2.3.2", "1.2.3.3"


def pixels(k):
    """Stored values of slice k: every pixel tells where it lies."""
    return (100 * k + 10 * np.arange(ROWS)[:, None] + np.arange(COLUMNS)).astype(np.uint16)


def image(k, z=None, stored=None, **changes):
    """Slice k of a CT with 0.5 x 0.7 mm pixels every 2 mm; ``changes`` are attributes, None deletes one."""
    data = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=bytes(128))
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f"{SERIES}.{k + 1}"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = STUDY, SERIES, FRAME
    data.Modality, data.PatientName, data.PatientID, data.StudyDate = "CT", "DOE^JANE", "MRN77", "20240101"
    data.StudyDescription, data.SeriesDescription = "SECRET STUDY", "SECRET SERIES"
    data.InstanceNumber, data.KVP = k + 1, 120
    data.ImagePositionPatient = [-10, 20, 2 * k if z is None else z]
    data.ImageOrientationPatient, data.PixelSpacing, data.SliceThickness = [1, 0, 0, 0, 1, 0], [0.5, 0.7], 2
    stored = pixels(k) if stored is None else stored
    data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = stored.tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = (
        data.SOPClassUID,
        data.SOPInstanceUID,
    )
    return data


def write(folder, images):
    folder.mkdir(exist_ok=True)
    for n, data in enumerate(images):
        data.save_as(folder / f"s{7 * n % 97:03d}.dcm", enforce_file_format=True)  # names out of order
    return folder


def series(tmp_path, change=None, **changes):
    images = [image(k, **changes) for k in range(COUNT)]
    return write(tmp_path / "series", change(images) or images if change else images)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_values_are_hu_and_lie_where_the_header_says(tmp_path):
    volume = load_volume(series(tmp_path, lambda images: images[::-1]))
    assert volume.data.shape == (COLUMNS, ROWS, COUNT) and (volume.units, volume.modality) == ("HU", "CT")
    assert volume.notes == ()
    for k in range(COUNT):
        np.testing.assert_array_equal(volume.data[:, :, k], pixels(k).T - 1024.0)
    # column 2, row 3, slice 4 in LPS: (-10 + 2 * 0.7, 20 + 3 * 0.5, 8); x and y change sign in RAS
    np.testing.assert_allclose(volume.affine @ [2, 3, 4, 1], [8.6, -21.5, 8, 1])


def test_slices_are_sorted_along_their_normal(tmp_path):
    """Coronal slices, numbered against their position."""
    images = [
        image(
            k, ImageOrientationPatient=[1, 0, 0, 0, 0, -1], ImagePositionPatient=[0, 3.0 * k, 0], InstanceNumber=9 - k
        )
        for k in range(COUNT)
    ]
    volume = load_volume(write(tmp_path / "series", images))
    np.testing.assert_allclose(volume.affine @ [1, 2, 3, 1], [-0.7, -9, -1, 1])
    np.testing.assert_array_equal(volume.data[:, :, 3], pixels(3).T - 1024.0)


def test_every_slice_has_its_own_rescale(tmp_path):
    def change(images):
        images[2].RescaleSlope, images[2].RescaleIntercept = 2, 5

    data = load_volume(series(tmp_path, change)).data
    np.testing.assert_array_equal(data[:, :, 2], 2.0 * pixels(2).T + 5)
    np.testing.assert_array_equal(data[:, :, 3], pixels(3).T - 1024.0)


def test_signed_and_other_modalities(tmp_path):
    signed = [
        image(k, stored=(pixels(k).astype(np.int16) - 500), PixelRepresentation=1, Modality="MR") for k in range(3)
    ]
    for data in signed:
        del data.RescaleSlope, data.RescaleIntercept
    volume = load_volume(write(tmp_path / "mr", signed))
    assert (volume.modality, volume.units) == ("MR", "1")
    np.testing.assert_array_equal(volume.data[:, :, 1], pixels(1).T - 500.0)


def drop(*numbers):
    return lambda images: [data for k, data in enumerate(images) if k not in numbers]


def other_at(k, **changes):
    return lambda images: [
        *images,
        image(k, stored=pixels(k) + 1, SOPInstanceUID="1.2.9", InstanceNumber=50, **changes),
    ]


def replaced(k, **changes):
    return lambda images: [image(n, **changes) if n == k else data for n, data in enumerate(images)]


IRREGULAR = {  # what is refused, words that name it, and the override that is named
    "missing": (
        drop(3),
        "1 slice is missing: 4.000 mm between slices at 4.000 and 8.000 mm, 2.000 mm elsewhere",
        "gaps",
    ),
    "two missing": (drop(2, 3), "2 slices are missing: 6.000 mm between slices at 2.000 and 8.000 mm", "gaps"),
    "uneven": (replaced(5, z=11), "uneven slices: 3.000 mm between slices at 8.000 and 11.000 mm", "gaps"),
    "duplicate": (other_at(3), "2 different slices lie at 6.000 mm", "duplicates"),
    "scout": (
        other_at(9, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
        "1 of 7 slices .* another orientation",
        "mixed",
    ),
    "matrix": (other_at(9, Rows=4, PixelData=pixels(0)[:4].tobytes()), r"1 of 7 slices .* 4 x 4 beside 4 x 5", "mixed"),
    "spacing": (other_at(9, PixelSpacing=[1, 1]), "1 of 7 slices .* another pixel spacing", "mixed"),
}


@pytest.mark.parametrize("case", IRREGULAR)
def test_irregular_series_are_refused_unless_accepted(tmp_path, case):
    change, words, override = IRREGULAR[case]
    folder = series(tmp_path, change)
    with pytest.raises(InputError, match=f"{words}.*--accept {override}") as caught:
        load_volume(folder)
    assert "\n" not in str(caught.value)
    for other in {"gaps", "duplicates", "mixed"} - {override}:
        with pytest.raises(InputError, match=words):
            load_volume(folder, accept=(other,))
    volume = load_volume(folder, accept=(override,))
    assert len(volume.notes) == 1 and ".dcm" not in volume.notes[0] and str(tmp_path) not in volume.notes[0]
    if case != "uneven":  # values are linear in z, so that interpolation returns them
        assert volume.data.shape[2] == COUNT
        np.testing.assert_allclose(volume.data[:, :, 3], pixels(3).T - 1024.0)
        np.testing.assert_allclose(volume.affine @ [0, 0, 3, 1], [10, -20, 6, 1])


def test_uneven_slices_are_interpolated_where_they_lie(tmp_path):
    """Slices at 0, 2, 4, 6, 8, 11 mm on a grid of 7 from 0 to 11: values are linear between neighbours."""
    volume = load_volume(series(tmp_path, replaced(5, z=11)), accept=("gaps",))
    z = np.linspace(0, 11, 7)
    expected = np.interp(z, [0, 2, 4, 6, 8, 11], [100 * k - 1024 for k in range(COUNT)])
    np.testing.assert_allclose(volume.data[0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(volume.affine[:3, 2], [0, 0, 11 / 6])


def test_small_jitter_is_tolerated_and_large_is_not(tmp_path):
    assert load_volume(series(tmp_path, replaced(3, z=6.01))).notes == ()
    with pytest.raises(InputError, match="uneven"):
        load_volume(series(tmp_path, replaced(3, z=6.1)))


def test_identical_copies_are_dropped_and_said(tmp_path):
    volume = load_volume(series(tmp_path, lambda images: [*images, copy.deepcopy(images[3])]))
    assert volume.data.shape[2] == COUNT and "1 identical copies" in volume.notes[0]


def test_time_points_are_volumes(tmp_path):
    def twice(images):
        return [
            *images,
            *(image(k, stored=pixels(k) + 7, InstanceNumber=20 + k, SOPInstanceUID=f"1.2.{k}") for k in range(COUNT)),
        ]

    folder = series(tmp_path, twice)
    with pytest.raises(InputError, match=r"holds 2 volumes .*--volume-index 0 ... 1"):
        load_volume(folder)
    for index in (0, 1):
        data = load_volume(folder, volume_index=index).data
        np.testing.assert_array_equal(data[:, :, 2], pixels(2).T - 1024.0 + 7 * index)


def test_tilted_slices_keep_their_shear_and_need_an_override(tmp_path):
    angle = np.deg2rad(15)
    folder = series(tmp_path, ImageOrientationPatient=[1, 0, 0, 0, np.cos(angle), np.sin(angle)])
    volume = load_volume(folder)
    assert "tilted by 15.00 degrees" in volume.notes[0]
    np.testing.assert_allclose(volume.affine[:3, 2], [0, 0, 2])
    np.testing.assert_allclose(volume.affine[:3, 1], [0, -0.5 * np.cos(angle), 0.5 * np.sin(angle)], atol=1e-6)
    with pytest.raises(InputError, match=r"off by 15 degrees, gantry tilt.*--allow-shear"):
        to_slices(volume)
    assert to_slices(volume, allow_shear=True).spacing_mm == pytest.approx(2 * np.cos(angle))


def test_a_slice_shifted_sideways_is_named(tmp_path):
    with pytest.raises(InputError, match=r"s021.dcm is shifted sideways by 1.000 mm"):
        load_volume(series(tmp_path, replaced(3, ImagePositionPatient=[-9, 20, 6])))


def test_one_of_several_series(tmp_path):
    def two(images):
        for data in images[4:]:
            data.SeriesInstanceUID, data.SeriesNumber = "1.2.8", 5
        return images

    folder = series(tmp_path, two)
    with pytest.raises(
        InputError, match=r"holds 2 series \(1 = CT, 4 images of 4 x 5; 2 = CT, 2 images of 4 x 5\)"
    ) as e:
        load_volume(folder)
    assert "--series 1 ... 2" in str(e.value) and "SECRET" not in str(e.value)
    for wanted, count in (("1", 4), ("2", 2), ("1.2.8", 2), (SERIES, 4), ("1.2.3", 4)):
        assert load_volume(folder, series=wanted).data.shape[2] == count
    for wanted in ("3", "1.2", "9.9"):
        with pytest.raises(InputError, match=r"--series can be 1 ... 2, or a UID"):
            load_volume(folder, series=wanted)
    with pytest.raises(
        UsageError, match="unknown choice 'everything' for --accept: choose from gaps, duplicates, mixed"
    ):
        load_volume(folder, accept=("everything",))


REFUSED = {
    "no place": ({"ImagePositionPatient": None}, "ImagePositionPatient is missing"),
    "no orientation": ({"ImageOrientationPatient": None}, "ImageOrientationPatient is missing"),
    "no spacing": ({"PixelSpacing": None}, "PixelSpacing is missing"),
    "spacing 0": ({"PixelSpacing": [0, 1]}, "not positive"),
    "orientation": ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "no pair of orthogonal"),
    "no rescale": ({"RescaleIntercept": None}, "CT without a rescale"),
    "slope 0": ({"RescaleSlope": 0}, "rescale slope 0"),
    "frames": ({"NumberOfFrames": 3}, "several frames"),
    "colour": ({"SamplesPerPixel": 3}, "colours"),
    "no pixels": ({"PixelData": None}, "holds no pixels"),
    "no rows": ({"Rows": None}, "perhaps truncated"),
    "few pixels": ({"Rows": 60}, "damaged or truncated"),
    "too large": ({"Rows": 65535, "Columns": 65535}, "declares .* voxels, more than the limit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_placed_or_read_is_refused(tmp_path, case):
    changes, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as caught:
        load_volume(series(tmp_path, **changes))
    assert "\n" not in str(caught.value) and "DOE" not in str(caught.value)


def test_other_files_in_the_folder(tmp_path):
    folder = series(tmp_path)
    (folder / "README.txt").write_text("hello")
    (folder / "DICOMDIR").write_bytes(b"nothing")
    (folder / ".hidden").write_bytes(b"nothing")
    assert "2 files that are no DICOM images were left out" in load_volume(folder).notes[0]
    for name in ("IM0007", "s050.dcm", "1.2.840.7"):
        (folder / name).write_bytes(b"cut off")
        with pytest.raises(InputError, match=f"{name}: is no DICOM image, perhaps truncated"):
            load_volume(folder)
        (folder / name).unlink()


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_slices(tmp_path, syntax):
    images = [image(k) for k in range(3)]
    try:
        for data in images:
            data.compress(syntax)
    except RuntimeError:
        pytest.skip(f"no encoder for {syntax.name}")
    np.testing.assert_array_equal(load_volume(write(tmp_path / "a", images)).data[:, :, 2], pixels(2).T - 1024.0)


def test_a_missing_decoder_says_what_to_install(tmp_path, monkeypatch):
    def undecoded(self):
        raise RuntimeError("Unable to decompress: all plugins are missing dependencies: DOE needs pylibjpeg")

    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(undecoded))
    with pytest.raises(UsageError, match=r"s000.dcm: .* needs a decoder: pip install 'invdiff\[dicom\]'") as caught:
        load_volume(series(tmp_path))
    assert "DOE" not in str(caught.value)


def test_a_file_without_its_preamble_is_not_guessed(tmp_path):
    folder = series(tmp_path)
    content = (folder / "s007.dcm").read_bytes()
    (folder / "s007.dcm").write_bytes(content[132:])
    with pytest.raises(InputError, match=r"s007\.dcm: is no DICOM image, perhaps truncated"):
        load_volume(folder)


def test_a_link_to_nowhere_is_no_slice_that_is_left_out(tmp_path):
    folder = series(tmp_path)
    (folder / "s035.dcm").unlink()  # the last one: the rest is an even stack
    (folder / "s035.dcm").symlink_to("gone.dcm")
    with pytest.raises(InputError, match=r"s035\.dcm is a link to nowhere"):
        load_volume(folder)


def test_names_reach_neither_messages_nor_logs(tmp_path, caplog, recwarn):
    folder = series(tmp_path, PatientName="DOE^JANE" * 30, PatientID="MRN77" * 30)
    volume = load_volume(folder)
    save_volume(volume, tmp_path / "out.dcm")
    with quiet():
        logging.getLogger("pydicom").warning("DOE")
    assert "DOE" not in caplog.text + repr(volume) + " ".join(str(w.message) for w in recwarn)


# Derived series ------------------------------------------------------------------------------------------------


def test_a_derived_series_is_filed_beside_its_source(tmp_path):
    volume = load_volume(series(tmp_path))
    stack = to_slices(volume, slices=(2, 5))
    save_volume(from_slices(stack.data, stack), tmp_path / "out.dcm")
    files = sorted((tmp_path / "out.dcm").iterdir())
    assert [file.name for file in files] == ["0001.dcm", "0002.dcm", "0003.dcm"]
    written = [pydicom.dcmread(file) for file in files]
    uids = {data.SOPInstanceUID for data in written} | {written[0].SeriesInstanceUID}
    assert len(uids) == 4 and not any(uid.startswith("1.2.3") for uid in uids)
    for k, data in enumerate(written):
        assert (data.StudyInstanceUID, data.FrameOfReferenceUID, data.SOPClassUID) == (STUDY, FRAME, CTImageStorage)
        assert (data.PatientName, data.PatientID, data.InstanceNumber) == ("DOE^JANE", "MRN77", k + 1)
        assert data.SeriesInstanceUID == written[0].SeriesInstanceUID
        assert list(data.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"] and data.RescaleType == "HU"
        assert "research use only" in data.SeriesDescription and "not for diagnosis" in data.DerivationDescription
        (reference,) = data.SourceImageSequence
        assert (reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID) == (
            CTImageStorage,
            f"{SERIES}.{k + 3}",
        )
        assert reference.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        assert list(data.ImagePositionPatient) == [-10, 20, 2 * (k + 2)]
        np.testing.assert_array_equal(data.pixel_array + float(data.RescaleIntercept), pixels(k + 2) - 1024.0)
        assert "SECRET" not in str(data)


def test_a_derived_series_without_a_source_names_nobody(tmp_path):
    for modality, kind in (("CT", "CT Image Storage"), ("MR", "MR Image Storage"), ("image", "Secondary Capture")):
        save_volume(
            Volume(np.arange(60.0).reshape(3, 4, 5), np.eye(4), modality=modality), tmp_path / f"{modality}.dcm"
        )
        data = pydicom.dcmread(tmp_path / f"{modality}.dcm" / "0002.dcm")
        assert kind in data.SOPClassUID.name and data.PatientName == "" and "SourceImageSequence" not in data
        assert data.file_meta.MediaStorageSOPInstanceUID == data.SOPInstanceUID
    assert {"PatientName", "StudyInstanceUID", "LossyImageCompression"} < set(KEPT)
    assert not {"StudyDescription", "SeriesDescription", "ImageComments"} & set(KEPT)


def test_nothing_of_a_patient_reaches_other_formats(tmp_path):
    volume = load_volume(series(tmp_path))
    for suffix in (".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".png", ".npz"):
        save_volume(volume, tmp_path / f"out{suffix}")
        content = (tmp_path / f"out{suffix}").read_bytes()
        assert not any(word in content for word in (b"DOE", b"MRN77", b"SECRET", b"20240101", STUDY.encode()))


def test_only_a_written_series_is_replaced(tmp_path):
    volume, out = Volume(np.zeros((3, 4, 5)), np.eye(4)), tmp_path / "out.dcm"
    save_volume(volume, out)
    check_output(out, overwrite=True, suffixes=(".dcm",))
    save_volume(volume, out, overwrite=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is a folder"):
        check_output(out, overwrite=True, suffixes=(".dcm",))
    with pytest.raises(UsageError, match="holds other files"):
        save_volume(volume, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine" and len(list(out.iterdir())) == 6


def test_an_old_series_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out, move = tmp_path / "out.dcm", os.replace
    old = save_volume(Volume(np.zeros((3, 4, 5)), np.eye(4)), out)

    def fails(source, target):
        if str(target) == str(out) and ".part-" in str(source) and not str(source).endswith("-old"):
            raise OSError(5, "Input/output error")
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(ResourceError, match="Input/output error"):
            save_volume(Volume(np.ones((3, 4, 5)), np.eye(4)), out, overwrite=True)
    assert sha256_file(out) == old and os.listdir(tmp_path) == ["out.dcm"]


def test_rows_and_columns_must_be_orthogonal(tmp_path):
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    with pytest.raises(UsageError, match="orthogonal"):
        save_volume(Volume(np.zeros((3, 4, 5)), sheared), tmp_path / "out.dcm")
    assert os.listdir(tmp_path) == []


def test_the_real_series(tmp_path):
    """JPEG 2000; the NIfTI file beside it holds 2 x 2 averages, rounded, of the same slices."""
    if not DATA.is_dir():
        pytest.skip("real data absent; set INVDIFF_DATA to the folder that holds them")
    pytest.importorskip("openjpeg", reason="pylibjpeg-openjpeg is not installed")
    volume, known = load_volume(DATA / "dicom_totalseg"), load_volume(DATA / "ct_totalseg_dcm.nii.gz")
    assert volume.modality == "CT" and volume.notes == ()
    means = volume.data.clip(-1024, 3071).reshape(256, 2, 256, 2, 20).mean((1, 3))
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [0.5, 0.5, 0]
    affine[:3, :2] *= 2
    mine, theirs = to_slices(Volume(means, affine, modality="CT")), to_slices(known)
    assert abs(mine.data - theirs.data).max() <= 0.5
    np.testing.assert_allclose(mine.affine, theirs.affine, atol=1e-4)
