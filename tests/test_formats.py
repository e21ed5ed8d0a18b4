"""One contract for every format of the table: values, place, units, damage, whole files or none."""

import itertools
import json
import os
import re
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from invdiff.errors import InputError, NumericalError, ResourceError, UsageError
from invdiff.files import sha256_file
from invdiff.formats import FORMATS, READS, WRITES, find_format
from invdiff.intensity import guess_modality
from invdiff.runner import Request, reconstruct
from invdiff.volume import Volume, in_order_of, load_volume, save_volume, to_slices

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
SHAPE = (7, 9, 5)
ORIENTATIONS = tuple(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
#: Formats that store 16 bits: largest error of values that are no whole numbers, as a share of their range.
HALF_STEP = {".png": 0.5 / 65535, ".dcm": 0.5 / 65535}
NO_PLACE = (".npy",)
CHECKED = (".nii.gz", ".nrrd", ".mha", ".npz", ".png")  # hold a checksum of the values
NEEDS = {suffix: entry.packages for entry in FORMATS.values() for suffix in entry.writes}


def turned():
    """Voxels of 0.8 x 1.1 x 3 mm, oblique to all three axes, 35 to 60 degrees off."""
    c, s = np.cos(0.6), np.sin(0.6)
    about_x, about_z = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return nib.affines.from_matvec(about_z @ about_x @ np.diag([0.8, 1.1, 3.0]), [-40, 25, 10])


OBLIQUE = turned()


def noise(seed=0, scale=100.0, shape=SHAPE):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def hu(shape=SHAPE):
    """Whole numbers that look like CT: air, lung, tissue, a little bone."""
    values = np.random.default_rng(1).choice([-1024, -1000, -850, -100, 0, 40, 60, 3071], size=shape)
    return values.astype(np.float32)


def reoriented(volume, order, flips):
    """The same volume in another storage order, by nibabel."""
    image = nib.Nifti1Image(volume.data, volume.affine).as_reoriented(np.column_stack([order, flips]))
    return Volume(np.asarray(image.dataobj), image.affine, volume.units, volume.modality)


def files_of(path):
    return sorted(path.iterdir()) if path.is_dir() else [path]


def tolerance(suffix, data):
    return HALF_STEP.get(suffix, 0) * float(np.ptp(data)) * 1.001


def refused(path, words, kind=InputError, **options):
    with pytest.raises(kind, match=words) as caught:
        load_volume(path, **options)
    assert "\n" not in str(caught.value) and path.name in str(caught.value), str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_exceptions_are_of_the_table():
    assert set(HALF_STEP) | set(NO_PLACE) | set(CHECKED) < set(WRITES) < set(READS) | {".dcm"}


@pytest.mark.parametrize("suffix", WRITES)
class TestEveryFormat:
    """What every format that is written owes; a new entry of the table is held to it without being named here."""

    @pytest.fixture(autouse=True)
    def _packages(self, suffix):
        for package in NEEDS[suffix]:
            pytest.importorskip(package, reason=f"{suffix} needs {package}")

    def test_values_and_place_return(self, suffix, tmp_path):
        volume = Volume(noise(), OBLIQUE)
        digest = save_volume(volume, tmp_path / f"a{suffix}")
        again = load_volume(tmp_path / f"a{suffix}")
        assert digest == sha256_file(tmp_path / f"a{suffix}") and again.data.dtype == np.float32
        if suffix in NO_PLACE:
            np.testing.assert_array_equal(again.data, volume.data)
            assert "no place in the file" in again.notes[0] and str(tmp_path) not in again.notes[0]
            return
        here, there = to_slices(volume), to_slices(again)
        np.testing.assert_allclose(there.data, here.data, rtol=0, atol=tolerance(suffix, volume.data))
        np.testing.assert_allclose(there.affine, here.affine, rtol=0, atol=1e-6)
        assert again.notes == ()

    def test_hu_stay_exact(self, suffix, tmp_path):
        volume = Volume(hu(), OBLIQUE, "HU", "CT")
        save_volume(volume, tmp_path / f"a{suffix}")
        again = load_volume(tmp_path / f"a{suffix}")
        assert (again.units, again.modality) == ("HU", "CT")
        if suffix in NO_PLACE:
            np.testing.assert_array_equal(again.data, volume.data)
        else:
            np.testing.assert_array_equal(to_slices(again).data, to_slices(volume).data)

    @pytest.mark.parametrize("top", [255, 65535])
    def test_bytes_and_words_stay_exact(self, suffix, top, tmp_path):
        data = np.random.default_rng(2).integers(0, top, SHAPE, endpoint=True).astype(np.float32)
        volume = Volume(data, np.diag([-1.0, -1, 1, 1]))
        save_volume(volume, tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(load_volume(tmp_path / f"a{suffix}").data, data)

    def test_the_place_is_kept_from_every_storage_order(self, suffix, tmp_path):
        if suffix in NO_PLACE:
            pytest.skip(f"{suffix} holds no place")
        volume = Volume(noise(shape=(4, 5, 3)), OBLIQUE)
        expected = to_slices(volume)
        for order, flips in ORIENTATIONS:
            save_volume(reoriented(volume, order, flips), tmp_path / f"a{suffix}", overwrite=True)
            found = to_slices(load_volume(tmp_path / f"a{suffix}"))
            np.testing.assert_allclose(found.data, expected.data, rtol=0, atol=tolerance(suffix, volume.data))
            np.testing.assert_allclose(found.affine, expected.affine, rtol=0, atol=1e-5)

    def test_equal_volumes_give_equal_bytes(self, suffix, tmp_path):
        paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
        assert len({save_volume(Volume(noise(), OBLIQUE), path) for path in paths}) == 1
        assert save_volume(Volume(noise(1), OBLIQUE), tmp_path / f"c{suffix}") != sha256_file(paths[0])

    def test_an_old_file_stays_unless_told(self, suffix, tmp_path, monkeypatch):
        path = tmp_path / f"a{suffix}"
        old = save_volume(Volume(noise(), OBLIQUE), path)
        with pytest.raises(UsageError, match="--overwrite"):
            save_volume(Volume(noise(1), OBLIQUE), path)
        with pytest.raises(NumericalError, match="1 voxels are NaN"):
            save_volume(Volume(np.where(noise() == noise().max(), np.nan, 0), OBLIQUE), path, overwrite=True)

        def full(handle):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ResourceError, match="No space left"):
                save_volume(Volume(noise(1), OBLIQUE), path, overwrite=True)
        assert sha256_file(path) == old and os.listdir(tmp_path) == [path.name]
        assert save_volume(Volume(noise(1), OBLIQUE), path, overwrite=True) == sha256_file(path) != old
        assert os.listdir(tmp_path) == [path.name]

    def test_no_text_of_the_source_is_copied(self, suffix, tmp_path):
        source = nib.Nifti1Image(hu(), OBLIQUE)
        source.header["descrip"], source.header["db_name"] = b"Jane Doe", b"Doe"
        nib.save(source, tmp_path / "Doe.nii")
        save_volume(load_volume(tmp_path / "Doe.nii"), tmp_path / f"a{suffix}")
        for file in files_of(tmp_path / f"a{suffix}"):
            assert b"Doe" not in file.read_bytes()

    def test_truncated_files_are_refused(self, suffix, tmp_path):
        path = tmp_path / f"a{suffix}"
        save_volume(Volume(noise(), OBLIQUE), path)
        file = files_of(path)[-1]
        good, expected = file.read_bytes(), load_volume(path).data
        for keep in sorted({0, 1, 10, 140, 200, 348, len(good) // 2, len(good) - 9, len(good) - 1}):
            file.write_bytes(good[:keep])
            try:
                found = load_volume(path)
            except InputError as error:
                assert "\n" not in str(error) and file.name in str(error), (keep, str(error))
            else:  # TIFF ends with links that a reader does not need
                assert suffix in (".tif", ".tiff") and keep >= len(good) - 9
                np.testing.assert_array_equal(found.data, expected)

    def test_damage_is_an_input_error_or_unseen(self, suffix, tmp_path):
        """Never another exception; formats with checksums notice every changed value."""
        path = tmp_path / f"a{suffix}"
        save_volume(Volume(noise(), OBLIQUE), path)
        file = files_of(path)[0]
        good, expected = file.read_bytes(), load_volume(path).data
        for position in range(0, len(good), max(1, len(good) // (40 if path.is_dir() else 150))):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            file.write_bytes(bad)
            try:
                found = load_volume(path)
            except InputError as error:
                assert "\n" not in str(error)
            else:
                if suffix in CHECKED and found.data.shape == expected.shape:
                    np.testing.assert_array_equal(found.data, expected, err_msg=f"byte {position}")

    def test_what_is_no_volume_is_refused(self, suffix, tmp_path):
        path = tmp_path / f"a{suffix}"
        refused(path, "does not exist")
        for content in (b"", os.urandom(3000), b"hello\n" * 100):
            path.write_bytes(content)
            refused(path, "empty|damaged|not|no ")
        path.unlink()
        save_volume(Volume(noise(), OBLIQUE), path)
        assert "limit 100" in refused(path, "declares .* voxels", max_voxels=100)

    def test_the_content_tells_where_the_name_does_not(self, suffix, tmp_path):
        path = tmp_path / f"a{suffix}"
        save_volume(Volume(noise(), OBLIQUE), path)
        path.rename(tmp_path / "IM0001")
        if suffix == ".npz":  # any zip archive starts like it
            return
        found = find_format(tmp_path / "IM0001")
        assert suffix in found.writes
        load_volume(tmp_path / "IM0001")

    def test_another_reader_sees_the_same_point(self, suffix, tmp_path):
        """SimpleITK: world position and value of three landmarks."""
        sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
        if FORMATS["arrays"].writes.count(suffix) or FORMATS["pictures"].writes.count(suffix):
            pytest.skip(f"{suffix} has no place that SimpleITK knows")
        volume, path = Volume(hu(), OBLIQUE, "HU", "CT"), tmp_path / f"a{suffix}"
        save_volume(volume, path)
        names = str(path)
        if path.is_dir():
            reader = sitk.ImageSeriesReader()
            names = reader.GetGDCMSeriesFileNames(names, reader.GetGDCMSeriesIDs(names)[0])
        image = sitk.ReadImage(names)
        assert image.GetSize() == SHAPE
        for index in ((0, 0, 0), (6, 0, 4), (2, 8, 1)):
            world = volume.affine[:3, :3] @ index + volume.affine[:3, 3]
            lps = world * [-1, -1, 1]
            np.testing.assert_allclose(
                image.TransformContinuousIndexToPhysicalPoint(image.TransformPhysicalPointToContinuousIndex(lps)),
                lps,
                atol=1e-4,
            )
            at = image.TransformPhysicalPointToIndex(lps)
            assert image[at] == volume.data[index]


def test_unknown_names_list_the_known_ones(tmp_path):
    (tmp_path / "a.xyz").write_text("hello")
    said = refused(tmp_path / "a.xyz", "of no known format")
    assert all(suffix in said for suffix in READS)
    with pytest.raises(UsageError, match=re.escape(".nii.gz, .nii, .nrrd, .mha, .dcm, ")):
        save_volume(Volume(noise(), OBLIQUE), tmp_path / "a.xyz")


def test_a_missing_package_names_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(10))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for act in (
        lambda: load_volume(tmp_path / "a.dcm"),
        lambda: save_volume(Volume(hu(), OBLIQUE), tmp_path / "b.dcm"),
    ):
        with pytest.raises(UsageError, match=r"needs pydicom, which .*: pip install 'invdiff\[dicom\]'"):
            act()
    assert os.listdir(tmp_path) == ["a.dcm"]


def test_whatever_the_storage_order_the_restored_volume_is_the_same():
    """All 48 orientations of an oblique volume, through a restoration: the same bits at the same place."""
    data = np.clip(noise(3, 400, (8, 10, 6)), -1000, 1000)
    volume = Volume(data, OBLIQUE, "HU", "CT")
    request = Request(op="blur", operator={"kernel": "gaussian:0.5"}, solver="wiener", noise_level=0.1, compare=())

    def restored(source):
        return to_slices(reconstruct(Request(**{**vars(request), "input": source})).volume)

    expected = restored(volume)
    assert np.abs(expected.data - to_slices(volume).data).max() > 1
    for order, flips in ORIENTATIONS:
        found = restored(reoriented(volume, order, flips))
        np.testing.assert_array_equal(found.data, expected.data)
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-9)


def test_real_files():
    if not DATA.is_dir():
        pytest.skip("real data absent; set INVDIFF_DATA to the folder that holds them")
    volume = load_volume(DATA / "mr_pyrad_brain1.nrrd")
    assert volume.data.shape == (256, 256, 25) and volume.notes == () and guess_modality(volume.data) == "image"
    np.testing.assert_allclose(volume.affine[:3, 3], [99.609375, -99.609375, -78])
    np.testing.assert_allclose(np.diag(volume.affine)[:3], [-0.78125, 0.78125, 6.5])
    stack = load_volume(DATA / "ct_covidny_slices.npz")
    with np.load(DATA / "ct_covidny_slices.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(to_slices(stack).data, archive["hu"])
    assert stack.modality == "CT"
    refused(DATA / "sens32_mchiew.npz", "complex")


def test_a_volume_is_compared_in_whatever_order_it_is_stored():
    volume = Volume(hu(), OBLIQUE, "HU", "CT")
    for order, flips in ORIENTATIONS:
        found = in_order_of(reoriented(volume, order, flips), volume)
        np.testing.assert_array_equal(found.data, volume.data)
        np.testing.assert_allclose(found.affine, OBLIQUE, atol=1e-9)


# The command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(world, tmp_path_factory):
    """The CT of ``world`` in every format that keeps its place."""
    folder = tmp_path_factory.mktemp("scans")
    volume = load_volume(world / "ct.nii.gz")
    for suffix in (".nrrd", ".mha", ".npz", ".tif"):
        save_volume(volume, folder / f"scan{suffix}")
    return folder


BLUR = ("--op", "blur", "--kernel", "gaussian:0.5", "--simulate", "--solver", "wiener", "--quiet")


def test_every_format_gives_the_same_result(run, scans, here):
    code, _, err = run("reconstruct", "$/ct.nii.gz", *BLUR, "-o", "r.nii.gz")
    assert code == 0, err
    expected = load_volume(here / "r.nii.gz", modality="CT")
    for source in sorted(scans.iterdir()):
        out = f"{source.suffix[1:]}{source.suffix}"
        assert run("reconstruct", source, *BLUR, "-o", out)[0] == 0
        found = load_volume(here / out, modality="CT")
        np.testing.assert_array_equal(found.data, expected.data)
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
        assert run("evaluate", out, "r.nii.gz", "--json")[0] == 0


def test_dicom_in_and_out_names_no_patient(run, world, here):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
    save_volume(load_volume(world / "ct.nii.gz", modality="CT"), here / "DOE_JANE.dcm")
    for file in (here / "DOE_JANE.dcm").iterdir():
        data = pydicom.dcmread(file)
        data.PatientName, data.PatientID = "DOE^JANE", "MRN77"
        data.save_as(file.with_name(f"DOE{file.name}"))
        file.unlink()
    (here / "DOE_JANE.dcm").rename(here / "DOE_JANE")
    code, out, err = run("reconstruct", "DOE_JANE", *BLUR[:-1], "-o", "r.dcm")
    assert code == 0 and "a folder of images" in out, err
    manifest = (here / "r.json").read_text()
    assert "DOE" not in out + err + manifest and "MRN77" not in out + err + manifest
    assert pydicom.dcmread(here / "r.dcm" / "0001.dcm").PatientID == "MRN77"
    assert run("reconstruct", "DOE_JANE", *BLUR, "-o", "nifti.nii.gz")[0] == 0
    assert run("evaluate", "r.dcm", "nifti.nii.gz", "--json")[0] == 0
    found, expected = (load_volume(here / name, modality="CT") for name in ("r.dcm", "nifti.nii.gz"))
    assert np.abs(found.data - expected.data).max() < np.ptp(expected.data) / 65535
    code, _, err = run("reconstruct", "DOE_JANE", *BLUR, "-o", "r.dcm")
    assert code == 2 and "r.dcm: exists already" in err
    assert run("reconstruct", "DOE_JANE", *BLUR, "-o", "r.dcm", "--overwrite")[0] == 0


def test_options_of_series_reach_the_reader(run, world, here):
    np.savez(here / "two.npz", one=np.zeros((2, 8, 9)), two=np.random.default_rng(0).normal(size=(2, 8, 9)))
    code, _, err = run("reconstruct", "two.npz", *BLUR, "-o", "r.npz")
    assert code == 3 and "--series one, two" in err
    assert run("reconstruct", "two.npz", *BLUR, "--series", "two", "-o", "r.npz")[0] == 0
    manifest = json.loads((here / "r.json").read_text())
    assert (manifest["options"]["series"], manifest["options"]["accept"]) == ("two", [])
    code, _, err = run("reconstruct", "$/m.h5", "--series", "two", "--solver", "fbp", "-o", "q.nii")
    assert code == 2 and "--series and --accept are for volumes" in err


def test_a_picture_does_not_overwrite_the_mosaic(run, here):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24), dtype=np.uint8)).save(here / "a.png")
    assert run("reconstruct", "a.png", *BLUR, "-o", "r.png")[0] == 0
    assert {"r.png", "r_picture.png", "r.json"} < set(os.listdir(here))
    assert load_volume(here / "r.png").data.shape == (24, 20, 1)


def test_pictures_beside_other_files_are_named(tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("of no scan")
    with pytest.raises(InputError, match=r"pictures and other files, first notes\.txt; leave the pictures alone"):
        load_volume(tmp_path)
