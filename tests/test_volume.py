"""Volumes: the same slices from every storage order, written where they came from, damage refused."""

import gzip
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from invdiff.errors import InputError, NumericalError, ResourceError, ShapeError, UsageError
from invdiff.volume import Volume, from_slices, load_volume, save_volume, to_slices

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
SHAPE = (7, 9, 5)
ORIENTATIONS = [
    (order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)
]


def rotation(degrees, axis):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    out = np.eye(3)
    a, b = [i for i in range(3) if i != axis]
    out[a, a], out[a, b], out[b, a], out[b, b] = c, -s, s, c
    return out


STRAIGHT = nib.affines.from_matvec(np.diag([0.8, 1.0, 3.0]), [-40, 25, 10])
OBLIQUE = nib.affines.from_matvec(rotation(28, 0) @ rotation(-17, 2) @ np.diag([0.8, 1.0, 3.0]), [-40, 25, 10])


def world(affine, shape):
    """RAS+ mm of every index, ``(*shape, 3)``."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def coded(affine, shape=SHAPE):
    """A value for each point in space, so that every voxel tells where it lies."""
    return (world(affine, shape) @ [1.0, 0.01, 10.0]).astype(np.float32)


def reoriented(affine, order, flips):
    """The coded volume in another storage order, by nibabel."""
    image = nib.Nifti1Image(coded(affine), affine).as_reoriented(np.column_stack([order, flips]))
    return Volume(np.asarray(image.dataobj), image.affine)


@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize(("order", "flips"), ORIENTATIONS)
def test_every_storage_order_gives_the_same_slices(affine, order, flips):
    expected, stack = to_slices(Volume(coded(affine), affine)), to_slices(reoriented(affine, order, flips))
    np.testing.assert_array_equal(stack.data, expected.data)
    np.testing.assert_allclose(stack.affine, expected.affine, atol=1e-9)
    np.testing.assert_allclose(stack.data, coded(stack.affine, stack.data.shape), atol=1e-3)
    assert stack.plane == "axial" and stack.data.shape == (5, 9, 7)
    np.testing.assert_allclose([*stack.pixel_mm, stack.spacing_mm], [1.0, 0.8, 3.0])
    np.testing.assert_allclose(np.diff(stack.slice_positions), 3.0)


@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize(("order", "flips"), ORIENTATIONS)
def test_slices_return_to_where_they_were_cut(affine, order, flips, tmp_path):
    volume = reoriented(affine, order, flips)
    for axis in range(3):
        stack = to_slices(volume, axis, (1, 4))
        back = from_slices(stack.data, stack)
        taken = tuple(slice(1, 4) if i == axis else slice(None) for i in range(3))
        np.testing.assert_array_equal(back.data, volume.data[taken])
        np.testing.assert_allclose(back.data, coded(back.affine, back.data.shape), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 5, 3), (1, 1, 1)])
def test_axes_of_one_voxel_are_turned_into_arrays_of_torch(shape):
    volume = Volume(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), STRAIGHT)
    for axis in range(3):
        stack = to_slices(volume, axis)
        assert torch.from_numpy(stack.data).shape == stack.data.shape
        np.testing.assert_array_equal(from_slices(stack.data, stack).data, volume.data)


@pytest.mark.parametrize(
    ("axis", "plane", "slice_row_column"),
    [(2, "axial", "S P L"), (1, "coronal", "A I L"), (0, "sagittal", "R I P")],
)
def test_display_is_radiological(axis, plane, slice_row_column):
    stack = to_slices(Volume(coded(STRAIGHT), STRAIGHT), axis)
    assert stack.plane == plane
    assert " ".join(nib.aff2axcodes(stack.affine)) == slice_row_column


def test_a_swapped_axis_is_seen():
    swapped = STRAIGHT[:, [1, 0, 2, 3]]
    stack = to_slices(Volume(coded(STRAIGHT), swapped))
    assert np.abs(stack.data - coded(stack.affine, stack.data.shape)).max() > 0.5


@pytest.mark.parametrize(
    ("modality", "zooms", "plane"),
    [
        ("CT", (5, 1, 1), "axial"),
        ("MR", (5, 1, 1), "sagittal"),
        ("MR", (1, 5, 1), "coronal"),
        ("MR", (1.19, 1, 1), "axial"),
        ("MR", (1.21, 1, 1), "sagittal"),
        ("image", (1, 1, 1), "axial"),
    ],
)
def test_slice_axis_is_chosen(modality, zooms, plane):
    assert to_slices(Volume(np.zeros(SHAPE), np.diag([*zooms, 1]), modality=modality)).plane == plane


@pytest.mark.parametrize("wanted", [(0, 6), (-1, 2), (3, 3), (4, 2), (5, 6)])
def test_bad_slice_range_names_the_valid_one(wanted):
    with pytest.raises(InputError, match="0 <= A < B <= 5"):
        to_slices(Volume(np.zeros(SHAPE), STRAIGHT), slices=wanted)


def test_shear_is_refused_unless_allowed():
    sheared = STRAIGHT.copy()
    sheared[1, 2] = 0.5
    volume = Volume(coded(sheared), sheared)
    with pytest.raises(InputError, match="--allow-shear"):
        to_slices(volume)
    stack = to_slices(volume, allow_shear=True)
    assert stack.spacing_mm == pytest.approx(3.0)  # along the normal, not along the sheared edge
    np.testing.assert_allclose(stack.data, coded(stack.affine, stack.data.shape), atol=1e-3)


def test_wrong_arguments_are_named():
    stack = to_slices(Volume(coded(STRAIGHT), STRAIGHT))
    with pytest.raises(UsageError, match="auto, 0, 1, 2"):
        to_slices(stack.source, "z")
    with pytest.raises(ShapeError, match=r"\(5, 9, 7\)"):
        from_slices(stack.data[1:], stack)
    with pytest.raises(ShapeError, match=r"\(i, j, k\)"):
        Volume(np.zeros((2, 2)), np.eye(4))


# Files ---------------------------------------------------------------------------------------------------------------


def image(data=None, affine=STRAIGHT, kind=nib.Nifti1Image, **fields):
    """Bytes of an uncompressed NIfTI file; ``fields`` are set in the header afterwards, unchecked."""
    data = coded(affine) if data is None else data
    raw = bytearray(kind(data, affine).to_bytes())
    size = kind.header_class.sizeof_hdr
    header = kind.header_class(bytes(raw[:size]), check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(raw[size:])


def refuse(tmp_path, content, words, name="scan.nii", **options):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_volume(path, **options)
    assert "\n" not in str(caught.value) and name in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_round_trip_is_exact(tmp_path, suffix, kind):
    path, copy = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    data = np.random.default_rng(0).normal(0, 1e3, SHAPE).astype(np.float32)
    data[0, 0, 0] = 1e30
    source = kind(data, OBLIQUE)
    source.set_qform(OBLIQUE, 1)
    source.set_sform(OBLIQUE, 4)
    source.header["descrip"] = b"Jane Doe"
    nib.save(source, path)
    volume = load_volume(path)
    digest = save_volume(volume, copy)
    again = load_volume(copy)
    np.testing.assert_array_equal(again.data, data)
    np.testing.assert_array_equal(again.affine, volume.affine)
    written = nib.load(copy)
    assert type(written) is kind and written.get_data_dtype() == np.float32
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 4)
    np.testing.assert_array_equal(np.asarray(written.dataobj), data)
    assert b"Jane" not in written.header.binaryblock and written.header.get_xyzt_units()[0] == "mm"
    assert save_volume(volume, tmp_path / f"other{suffix}") == digest


@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (1, 1), (0, 0)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_cut_slices_are_written_where_they_lie(tmp_path, codes, suffix):
    source = nib.Nifti1Image(coded(OBLIQUE), OBLIQUE)
    source.set_qform(OBLIQUE, codes[0])
    source.set_sform(OBLIQUE, codes[1])
    nib.save(source, tmp_path / "in.nii")
    volume = load_volume(tmp_path / "in.nii")
    assert any("no orientation" in note for note in volume.notes) == (codes == (0, 0))
    stack = to_slices(volume, slices=(2, 4))
    save_volume(from_slices(stack.data, stack), tmp_path / f"out{suffix}")
    written = nib.load(tmp_path / f"out{suffix}")
    if codes != (0, 0):  # without an orientation there is no place to keep
        np.testing.assert_allclose(np.asarray(written.dataobj), coded(written.affine, written.shape), atol=2e-3)
        assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == codes
        for form, code in (written.get_qform(coded=True), written.get_sform(coded=True)):
            if code:
                np.testing.assert_allclose(form, written.affine, atol=1e-4)


def test_integers_slope_and_byte_order(tmp_path):
    stored = np.arange(np.prod(SHAPE), dtype=">i2").reshape(SHAPE)
    header = nib.Nifti1Header(endianness=">")
    (tmp_path / "a.nii").write_bytes(nib.Nifti1Image(stored, STRAIGHT, header).to_bytes())
    np.testing.assert_array_equal(load_volume(tmp_path / "a.nii").data, stored)
    (tmp_path / "b.nii").write_bytes(image(stored.astype("<i2"), scl_slope=-2, scl_inter=5))
    volume = load_volume(tmp_path / "b.nii")
    np.testing.assert_array_equal(volume.data, 5 - 2.0 * stored)
    assert any("negative" in note for note in volume.notes)
    (tmp_path / "c.nii").write_bytes(image(stored.astype("<i2"), scl_slope=0, scl_inter=5))
    np.testing.assert_array_equal(load_volume(tmp_path / "c.nii").data, stored)


def test_one_of_several_volumes(tmp_path):
    data = np.stack([coded(STRAIGHT), coded(STRAIGHT) + 1, coded(STRAIGHT) + 2], axis=-1)
    nib.save(nib.Nifti1Image(data, STRAIGHT), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(load_volume(tmp_path / "a.nii.gz", volume_index=1).data, data[..., 1])
    for index, words in ((None, "choose one with --volume-index 0 ... 2"), (3, "can be 0 ... 2"), (-1, "can be")):
        with pytest.raises(InputError, match=words):
            load_volume(tmp_path / "a.nii.gz", volume_index=index)
    nib.save(nib.Nifti1Image(data[..., :1], STRAIGHT), tmp_path / "b.nii.gz")
    assert load_volume(tmp_path / "b.nii.gz").data.shape == SHAPE


def test_forms_units_and_voxel_sizes_are_remarked(tmp_path):
    def notes(content):
        (tmp_path / "a.nii").write_bytes(content)
        volume = load_volume(tmp_path / "a.nii")
        return volume, " ".join(volume.notes)

    assert notes(image())[1] == ""
    volume, said = notes(image(qform_code=1, qoffset_x=3))
    assert "disagree" in said and "sform is used" in said
    np.testing.assert_allclose(volume.affine, STRAIGHT, rtol=1e-6)
    assert "negative" in notes(image(pixdim=[1, -0.8, -1, 3, 1, 1, 1, 1]))[1]
    assert "not a rotation" in notes(image(qform_code=1, quatern_b=3))[1]
    volume, said = notes(image(affine=np.diag([1e-3, 1e-3, 2e-3, 1]), xyzt_units=1))
    assert "converted to mm" in said
    np.testing.assert_allclose(volume.voxel_mm, [1, 1, 2], rtol=1e-6)
    save_volume(volume, tmp_path / "b.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "b.nii").affine, volume.affine, rtol=1e-6)


BAD_HEADERS = {
    "pair": ({"magic": b"ni1"}, "hdr/.img pair"),
    "magic": ({"magic": b"xyz"}, "not NIfTI"),
    "zero dim": ({"dim": [3, 7, 0, 5, 1, 1, 1, 1]}, "damaged"),
    "negative dim": ({"dim": [3, 7, -9, 5, 1, 1, 1, 1]}, "damaged"),
    "rank 9": ({"dim": [9, 7, 9, 5, 1, 1, 1, 1]}, "9 dimensions"),
    "rank 0": ({"dim": [0, 7, 9, 5, 1, 1, 1, 1]}, "0 dimensions"),
    "huge": ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "truncated"),
    "5D": ({"dim": [5, 7, 9, 5, 1, 3, 1, 1]}, "not one or several 3D volumes"),
    "offset": ({"vox_offset": 1e9}, "truncated"),
    "offset in header": ({"vox_offset": 100}, "voxels at byte 100"),
    "offset NaN": ({"vox_offset": np.nan}, "voxels at byte nan"),
    "voxel type": ({"datatype": 77}, "unknown voxel type 77"),
    "RGB": ({"datatype": 128}, "RGB"),
    "bits": ({"datatype": 1}, "RGB or bit"),
    "complex": ({"datatype": 32}, "complex"),
    "intercept": ({"scl_slope": 1, "scl_inter": np.nan}, "intercept is nan"),
    "singular": ({"srow_z": 0}, "cannot be inverted"),
    "affine NaN": ({"srow_z": np.nan}, "not a finite"),
    "zero pixdim": ({"sform_code": 0, "qform_code": 1, "pixdim": [1, 1, 0, 1, 1, 1, 1, 1]}, "cannot be inverted"),
    "form code": ({"sform_code": 77}, "unknown sform"),
    "overflow": ({"srow_z": 1e38}, "not a finite"),
    "quaternion": ({"sform_code": 0, "qform_code": 1, "quatern_b": 3}, "not a rotation"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_refused(tmp_path, case):
    fields, words = BAD_HEADERS[case]
    refuse(tmp_path, image(**fields), words)


def test_damaged_files_are_refused(tmp_path):
    good = image()
    for content, words in (
        (b"", "empty"),
        (b"ab", "truncated"),
        (os.urandom(4000), "not NIfTI"),
        (good[:200], "truncated"),
        (good[:352], "truncated"),
        (good[:-1], "truncated"),
        (good + b"x", "longer than its header says"),
    ):
        refuse(tmp_path, content, words)
    zipped = gzip.compress(good, mtime=0)
    flipped = bytearray(zipped)
    flipped[len(zipped) // 2] ^= 4
    wrong_crc = zipped[:-8] + bytes([zipped[-8] ^ 1]) + zipped[-7:]
    for content, words in (
        (zipped[: len(zipped) // 2], "truncated"),
        (zipped[:-4], "truncated"),
        (zipped[:20], "truncated"),
        (wrong_crc, "CRC"),
        (bytes(flipped), "damaged|truncated"),
        (zipped + b"garbage", "damaged"),
        (zipped + gzip.compress(b"more"), "longer than its header says"),
        (gzip.compress(good[:-1]), "truncated"),
        (gzip.compress(good[:300]), "truncated"),
        (gzip.compress(b"hello world"), "not NIfTI"),
    ):
        refuse(tmp_path, content, words, "scan.nii.gz")


def test_every_flipped_byte_is_noticed(tmp_path):
    good = gzip.compress(image(), mtime=0)
    (tmp_path / "good.nii.gz").write_bytes(good)
    expected = load_volume(tmp_path / "good.nii.gz").data
    for position in range(0, len(good), 11):
        damaged = bytearray(good)
        damaged[position] ^= 1 << (position % 8)
        (tmp_path / "bad.nii.gz").write_bytes(damaged)
        try:
            np.testing.assert_array_equal(load_volume(tmp_path / "bad.nii.gz").data, expected)
        except InputError as error:
            assert "\n" not in str(error)
        else:  # only the time, the level and the operating system in the gzip header may change
            assert position < 10


def test_bombs_are_refused_before_they_are_read(tmp_path):
    refuse(tmp_path, gzip.compress(image(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])), "truncated", "a.nii.gz")
    zeros = image(np.zeros((100, 100, 100), np.uint8))
    refuse(tmp_path, gzip.compress(zeros), "more than the limit", "a.nii.gz", max_voxels=1000)
    refuse(tmp_path, gzip.compress(image() + bytes(10**7)), "longer than its header says", "a.nii.gz")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_volume(tmp_path / "none.nii")
    with pytest.raises(InputError, match="no DICOM images"):
        load_volume(tmp_path)


def test_nan_is_refused_or_filled_and_recorded(tmp_path):
    data = coded(STRAIGHT)
    data[1, 2, 3], data[0, 0, 0] = np.nan, np.inf
    refuse(tmp_path, image(data), "2 voxels are NaN or infinite; .*--nan fill")
    volume = load_volume(tmp_path / "scan.nii", nan="fill")
    assert volume.data[1, 2, 3] == volume.data[0, 0, 0] == data[np.isfinite(data)].min()
    assert any("2 NaN or infinite voxels were filled" in note for note in volume.notes)
    refuse(tmp_path, image(np.full(SHAPE, np.nan, np.float32)), "no value is finite", nan="fill")
    with pytest.raises(UsageError, match="fill, refuse"):
        load_volume(tmp_path / "scan.nii", nan="ignore")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.nii.gz"
    volume = Volume(coded(STRAIGHT), STRAIGHT)
    save_volume(volume, path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        save_volume(volume, path)
    with pytest.raises(NumericalError, match="NaN"):
        save_volume(Volume(np.full(SHAPE, np.nan), STRAIGHT), path, overwrite=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("invdiff.files._sync", full)
    with pytest.raises(ResourceError, match="No space left"):
        save_volume(Volume(coded(OBLIQUE), OBLIQUE), path, overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.nii.gz"]


def test_real_volumes(tmp_path):
    if not DATA.is_dir():
        pytest.skip("real data absent; set INVDIFF_DATA to the folder that holds them")
    for name, modality in (("ct_totalseg_dcm", "CT"), ("mr_torchio_t2", "image"), ("mr_ms_p01_study1_FLAIR", "image")):
        volume = load_volume(DATA / f"{name}.nii.gz")
        oracle = nib.load(DATA / f"{name}.nii.gz")
        assert volume.modality == modality and volume.notes == ()
        np.testing.assert_array_equal(volume.data, oracle.get_fdata(dtype=np.float32))
        stack = to_slices(volume, slices=(4, 9))
        save_volume(from_slices(stack.data, stack), tmp_path / f"{name}.nii.gz")
        np.testing.assert_allclose(
            nib.load(tmp_path / f"{name}.nii.gz").affine, oracle.slicer[:, :, 4:9].affine, atol=1e-4
        )
    with pytest.raises(InputError, match="not orthogonal"):
        to_slices(load_volume(DATA / "ct_head_ge.nii.gz"))
