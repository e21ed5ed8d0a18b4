"""Enhanced multi-frame DICOM: every frame where its functional groups put it, and the refusals of a series."""

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install 'invdiff[dicom]'")

from enhanced_cases import enhanced, save  # noqa: E402

from invdiff.errors import InputError  # noqa: E402
from invdiff.volume import load_volume, save_volume  # noqa: E402

COUNT, ROWS, COLUMNS = 6, 5, 4
STORED = (100 * np.arange(COUNT)[:, None, None] + 10 * np.arange(ROWS)[:, None] + np.arange(COLUMNS)).astype(np.uint16)


def test_values_and_place_of_every_frame(tmp_path):
    volume = load_volume(save(tmp_path / "a.dcm", enhanced(STORED)))
    assert (volume.units, volume.modality, volume.notes) == ("HU", "CT", ())
    for k in range(COUNT):
        np.testing.assert_array_equal(volume.data[:, :, k], (1 + k) * STORED[k].T - 1024.0)
    np.testing.assert_allclose(volume.affine @ [2, 3, 4, 1], [8.6, -21.5, 8, 1])


def test_frames_are_sorted_and_groups_may_be_shared(tmp_path):
    order = [3, 0, 5, 1, 4, 2]
    data = enhanced(STORED[order], positions=2.0 * np.array(order), shared_rescale=True)
    volume = load_volume(save(tmp_path / "a.dcm", data))
    np.testing.assert_array_equal(volume.data, STORED.transpose(2, 1, 0) - 1024.0)


def test_two_files_of_one_series_are_one_stack(tmp_path):
    (tmp_path / "s").mkdir()
    for n, part in enumerate((slice(0, 4), slice(4, 6))):
        positions = 2.0 * np.arange(COUNT)[part]
        data = enhanced(STORED[part], positions=positions, shared_rescale=True, SOPInstanceUID=f"1.2.9.{20 + n}")
        save(tmp_path / "s" / f"{n}.dcm", data)
    np.testing.assert_array_equal(load_volume(tmp_path / "s").data, STORED.transpose(2, 1, 0) - 1024.0)


def test_time_points_are_volumes(tmp_path):
    twice = np.concatenate([STORED, STORED + 7])
    data = enhanced(twice, positions=2.0 * np.tile(np.arange(COUNT), 2), shared_rescale=True)
    path = save(tmp_path / "a.dcm", data)
    with pytest.raises(InputError, match=r"holds 2 volumes .*--volume-index 0 ... 1"):
        load_volume(path)
    for index in (0, 1):
        data = load_volume(path, volume_index=index).data
        np.testing.assert_array_equal(data, STORED.transpose(2, 1, 0) - 1024.0 + 7 * index)


def test_equal_time_points_are_no_copies(tmp_path):
    data = enhanced(np.concatenate([STORED] * 2), positions=2.0 * np.tile(np.arange(COUNT), 2), shared_rescale=True)
    assert load_volume(save(tmp_path / "a.dcm", data), volume_index=1).data.shape[2] == COUNT


def test_compressed_frames(tmp_path):
    data = enhanced(STORED, shared_rescale=True)
    data.compress(pydicom.uid.RLELossless)
    np.testing.assert_array_equal(load_volume(save(tmp_path / "a.dcm", data)).data, STORED.transpose(2, 1, 0) - 1024.0)


def test_a_derived_series_names_the_frames(tmp_path):
    volume = load_volume(save(tmp_path / "a.dcm", enhanced(STORED, shared_rescale=True)))
    save_volume(volume, tmp_path / "out.dcm")
    third = pydicom.dcmread(tmp_path / "out.dcm" / "0003.dcm")
    (reference,) = third.SourceImageSequence
    assert (reference.ReferencedSOPInstanceUID, reference.ReferencedFrameNumber) == ("1.2.9.1", 3)
    assert third.PatientID == "MRN77" and "SECRET" not in str(third)


def without(name):
    """The group of the second frame and the shared one."""

    def change(data):
        for groups in (data.SharedFunctionalGroupsSequence[0], data.PerFrameFunctionalGroupsSequence[1]):
            if name in groups:
                delattr(groups, name)

    return change


def turned(data):
    orientation = pydicom.Dataset()
    orientation.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    data.PerFrameFunctionalGroupsSequence[1].PlaneOrientationSequence = [orientation]


Z = 2.0 * np.arange(COUNT)
REFUSED = {  # options, a change of the data set, words
    "gap": ({"positions": Z + 2 * (Z > 4)}, None, "1 slice is missing: 4.000 mm between slices at 4.000 and 8.000 mm"),
    "duplicate": (
        {"positions": [0, 2, 4, 4, 6, 8]},
        None,
        "2 different slices lie at 4.000 mm .a.dcm, frame 3, a.dcm, frame 4",
    ),
    "mixed": ({}, turned, "1 of 6 slices are of another kind .a.dcm, frame 2: another orientation"),
    "no position": ({}, without("PlanePositionSequence"), "frame 2: ImagePositionPatient is missing"),
    "no orientation": ({}, without("PlaneOrientationSequence"), "frame 1: ImageOrientationPatient is missing"),
    "no spacing": ({}, without("PixelMeasuresSequence"), "frame 1: PixelSpacing is missing"),
    "no rescale": ({}, without("PixelValueTransformationSequence"), "frame 2: is CT without a rescale"),
    "fewer groups": ({"NumberOfFrames": 7}, None, "says 7 frames and describes 6"),
    "no groups": ({"PerFrameFunctionalGroupsSequence": None}, None, "several frames without a place of each"),
    "few pixels": ({"PixelData": STORED[:5].tobytes()}, None, "damaged or truncated"),
    "colour": ({"SamplesPerPixel": 3}, None, "colours"),
    "too large": ({"Rows": 65535, "Columns": 65535}, None, "declares .* voxels, more than the limit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_irregular_frames_are_refused(tmp_path, case):
    options, change, words = REFUSED[case]
    data = enhanced(STORED, **options)
    if change:
        change(data)
    with pytest.raises(InputError, match=words) as caught:
        load_volume(save(tmp_path / "a.dcm", data))
    assert "\n" not in str(caught.value) and "DOE" not in str(caught.value)


@pytest.mark.parametrize(("case", "accept"), [("gap", "gaps"), ("duplicate", "duplicates"), ("mixed", "mixed")])
def test_irregular_frames_can_be_accepted(tmp_path, case, accept):
    options, change, _ = REFUSED[case]
    data = enhanced(STORED, **options)
    if change:
        change(data)
    path = save(tmp_path / "a.dcm", data)
    accepts = (accept, "gaps") if case == "mixed" else (accept,)  # the one that is left out leaves a gap
    volume = load_volume(path, accept=accepts)
    assert volume.notes and "DOE" not in repr(volume)
