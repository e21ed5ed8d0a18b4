"""NRRD, MetaImage, pictures and arrays: what other programs write, and what is refused."""

import gzip
import json
import os
import pickle
import zipfile
import zlib

import numpy as np
import pytest

from invdiff.errors import InputError
from invdiff.volume import Volume, load_volume, save_volume, to_slices

SHAPE = (7, 9, 5)
STORED = np.arange(np.prod(SHAPE), dtype="<i2").reshape(SHAPE, order="F") - 100
NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "7 9 5",
    "space directions": "(0.5,0,0) (0,0.6,0.8) (0,-1.6,1.2)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(1,2,3)",
}
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 0.6 0.8 0 -0.8 0.6",
    "Offset": "1 2 3",
    "ElementSpacing": "0.5 1 2",
    "DimSize": "7 9 5",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}
#: Both headers say: from voxel (i, j, k) to RAS+ mm.
AFFINE = np.array([[-0.5, 0, 0, -1], [0, -0.6, 1.6, -2], [0, 0.8, 1.2, 3], [0, 0, 0, 1]])


def nrrd(payload=None, end="\n", **fields):
    """An NRRD file; ``fields`` change its header (None removes one)."""
    fields = {**NRRD, **{key.replace("_", " "): value for key, value in fields.items()}}
    lines = ["NRRD0004", "# comment", *(f"{k}: {v}" for k, v in fields.items() if v is not None), "note:=Jane Doe"]
    return (end.join(lines) + end + end).encode() + (STORED.tobytes("F") if payload is None else payload)


def meta(payload=None, **fields):
    """A MetaImage file; ``fields`` change its header (None removes one)."""
    fields = {**META, **fields}
    last = fields.pop("ElementDataFile")
    lines = [
        f"{k} = {v}" for k, v in {**fields, "Comment": "Jane Doe", "ElementDataFile": last}.items() if v is not None
    ]
    return ("\n".join(lines) + "\n").encode() + (STORED.tobytes("F") if payload is None else payload)


@pytest.fixture
def load(tmp_path):
    """``load(name, content)``: the volume in a file of this content."""

    def call(name, content, **options):
        (tmp_path / name).write_bytes(content)
        return load_volume(tmp_path / name, **options)

    return call


@pytest.fixture
def refused(load):
    def call(name, content, words, **options):
        with pytest.raises(InputError, match=words) as caught:
            load(name, content, **options)
        assert "\n" not in str(caught.value) and name in str(caught.value) and "; " in str(caught.value)

    return call


@pytest.mark.parametrize(("name", "make"), [("a.nrrd", nrrd), ("a.mha", meta)])
def test_values_and_place(load, name, make):
    volume = load(name, make())
    np.testing.assert_array_equal(volume.data, STORED)
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.notes == () and "Doe" not in repr(volume)


def test_variants_of_nrrd(load):
    big = STORED.astype(">f8").tobytes("F")
    for content in (
        nrrd(end="\r\n"),
        nrrd(gzip.compress(STORED.tobytes("F")), encoding="gzip"),
        nrrd(big, type="double", endian="big", encoding="RAW"),
        nrrd(b"xxxx" + STORED.tobytes("F"), byte_skip="4"),
        nrrd(space_units='"mm" "mm" "mm"', space="LPS"),
    ):
        volume = load("a.nrrd", content)
        np.testing.assert_array_equal(volume.data, STORED)
        np.testing.assert_allclose(volume.affine, AFFINE)
    signs = {"right-anterior-superior": (-1, -1, 1), "LAS": (1, -1, 1)}
    for space, sign in signs.items():
        np.testing.assert_allclose(load("a.nrrd", nrrd(space=space)).affine, np.diag([*sign, 1]) @ AFFINE)
    volume = load("a.nrrd", nrrd(space_units='"cm" "cm" "cm"'))
    np.testing.assert_allclose(volume.affine[:3], 10 * AFFINE[:3])
    assert "converted to mm (x 10)" in volume.notes[0]
    volume = load("a.nrrd", nrrd(space=None, space_directions=None, space_origin=None, spacings="0.5 NaN 2"))
    np.testing.assert_allclose(volume.voxel_mm, [0.5, 1, 2])
    assert "left and right are a guess" in volume.notes[0]


def test_variants_of_metaimage(load):
    packed = zlib.compress(STORED.tobytes("F"))
    for content in (
        meta(packed, CompressedData="True", CompressedDataSize=str(len(packed))),
        meta(STORED.astype(">f8").tobytes("F"), ElementType="MET_DOUBLE", BinaryDataByteOrderMSB="True"),
        meta(Offset=None, Position="1 2 3", TransformMatrix=None, Rotation=META["TransformMatrix"]),
        meta(NDims="4", DimSize="7 9 5 1", ElementSpacing="0.5 1 2 1", Offset="1 2 3 0",
             TransformMatrix="1 0 0 0  0 0.6 0.8 0  0 -0.8 0.6 0  0 0 0 1"),
    ):  # fmt: skip
        volume = load("a.mha", content)
        np.testing.assert_array_equal(volume.data, STORED)
        np.testing.assert_allclose(volume.affine, AFFINE)
    assert "guess" in load("a.mha", meta(TransformMatrix=None)).notes[0]


@pytest.mark.parametrize("kind", ["nrrd", "mha"])
def test_one_of_several_volumes(load, refused, kind):
    both = np.stack([STORED, STORED + 1000], -1).tobytes("F")
    content = nrrd(
        both, dimension="4", sizes="7 9 5 2", space_directions=NRRD["space directions"] + " none", kinds=None
    )
    if kind == "mha":
        content = meta(both, NDims="4", DimSize="7 9 5 2", ElementSpacing="0.5 1 2 1", Offset="1 2 3 0",
                       TransformMatrix="1 0 0 0  0 0.6 0.8 0  0 -0.8 0.6 0  0 0 0 1")  # fmt: skip
    for index in (0, 1):
        volume = load(f"a.{kind}", content, volume_index=index)
        np.testing.assert_array_equal(volume.data, STORED + 1000 * index)
        np.testing.assert_allclose(volume.affine, AFFINE)
    refused(f"a.{kind}", content, "choose one with --volume-index 0 ... 1")
    refused(f"a.{kind}", content, "can be 0 ... 1", volume_index=2)


def test_voxels_in_a_file_beside(load, refused, tmp_path):
    (tmp_path / "v.raw").write_bytes(STORED.tobytes("F"))
    (tmp_path / "v.raw.gz").write_bytes(gzip.compress(STORED.tobytes("F")))
    for name, content in (
        ("a.nhdr", nrrd(b"", data_file="v.raw")),
        ("a.nhdr", nrrd(b"", data_file="v.raw.gz", encoding="gzip")),
        ("a.mhd", meta(b"", ElementDataFile="v.raw")),
    ):
        volume = load(name, content)
        np.testing.assert_array_equal(volume.data, STORED)
        np.testing.assert_allclose(volume.affine, AFFINE)
    (tmp_path / "secret").write_bytes(STORED.tobytes("F"))
    (tmp_path / "in").mkdir()
    for elsewhere in ("../secret", str(tmp_path / "secret"), "LIST", "v%d.raw 1 5 1", "sub/v.raw", "", ".."):
        refused("in/a.mhd", meta(b"", ElementDataFile=elsewhere), "put all in one file|no known|beside")
        refused("in/a.nhdr", nrrd(b"", data_file=elsewhere), "put all in one file")
    with pytest.raises(InputError, match=r"names the voxels .none.raw., which are not beside it"):
        load("a.mhd", meta(b"", ElementDataFile="none.raw"))


BAD_NRRD = {
    "magic": (b"NRRX" + nrrd()[4:], "is not NRRD"),
    "no blank line": (nrrd().split(b"\n\n")[0], "truncated"),
    "field": ({"type": None}, "no 'type'"),
    "twice": (nrrd().replace(b"kinds: domain domain domain", b"type: short"), "damaged"),
    "rank": ({"dimension": "2"}, "dimension 2"),
    "size 0": ({"sizes": "7 0 5"}, "damaged"),
    "sizes": ({"sizes": "7 nine 5"}, "damaged"),
    "type": ({"type": "block"}, "several numbers|unknown voxel type"),
    "unknown type": ({"type": "int128"}, "unknown voxel type"),
    "encoding": ({"encoding": "bzip2"}, "has encoding 'bzip2'"),
    "endian": ({"endian": "middle"}, "endian 'middle'"),
    "space": ({"space": "scanner-xyz-time"}, "has space"),
    "colour": ({"kinds": "RGB-color domain domain"}, "several numbers per voxel"),
    "first axis": (
        {"sizes": "5 7 9 1", "dimension": "4", "space directions": "none (1,0,0) (0,1,0) (0,0,1)"},
        "not first",
    ),
    "origin": ({"space origin": "(1,2)"}, "three dimensions"),
    "units": ({"space units": '"mm" "inch" "mm"'}, "convert them to mm"),
    "singular": ({"space directions": "(1,0,0) (0,1,0) (0,1,0)"}, "cannot be inverted"),
    "NaN": ({"space origin": "(nan,0,0)"}, "not a finite"),
    "line skip": ({"line skip": "2"}, "skips lines"),
    "byte skip": ({"byte skip": "-1"}, "from the end"),
    "huge": ({"sizes": "100000 100000 100000"}, "truncated"),
    "short": (nrrd()[:-1], "truncated"),
    "long": (nrrd() + b"x", "longer than its header says"),
    "endless": (b"NRRD0004\n" + b"#" * 2**21, "does not end"),
}
BAD_META = {
    "other": (b"hello\n" * 20, "is not MetaImage"),
    "no end": (meta().split(b"ElementDataFile")[0], "no 'ElementDataFile'"),
    "field": ({"DimSize": None}, "no 'DimSize'"),
    "rank": ({"NDims": "2"}, "NDims 2"),
    "size 0": ({"DimSize": "7 0 5"}, "DimSize 7 0 5"),
    "sizes": ({"DimSize": "7 nine 5"}, "damaged"),
    "type": ({"ElementType": "MET_ASCII_CHAR"}, "voxel type 'MET_ASCII_CHAR'"),
    "text": ({"BinaryData": "False"}, "as text"),
    "header": ({"HeaderSize": "-1"}, "foreign header"),
    "channels": ({"ElementNumberOfChannels": "3"}, "several numbers per voxel"),
    "matrix": ({"TransformMatrix": "1 0 0 1"}, "another length"),
    "singular": ({"TransformMatrix": "1 0 0 0 1 0 0 1 0"}, "cannot be inverted"),
    "spacing": ({"ElementSpacing": "1 nan 1"}, "not finite"),
    "huge": ({"DimSize": "100000 100000 100000"}, "truncated"),
    "short": (meta()[:-1], "truncated"),
    "long": (meta() + b"x", "longer than its header says"),
    "packed": (meta(zlib.compress(STORED.tobytes("F"))[:-3], CompressedData="True"), "ends early"),
    "packed long": (meta(zlib.compress(STORED.tobytes("F")) + b"x", CompressedData="True"), "damaged"),
    "packed check": (meta(zlib.compress(STORED.tobytes("F"))[:-1] + b"x", CompressedData="True"), "damaged"),
}


@pytest.mark.parametrize("case", BAD_NRRD)
def test_bad_nrrd_is_refused(refused, case):
    content, words = BAD_NRRD[case]
    content = nrrd(**{k.replace(" ", "_"): v for k, v in content.items()}) if isinstance(content, dict) else content
    refused("a.nrrd", content, words)


@pytest.mark.parametrize("case", BAD_META)
def test_bad_metaimage_is_refused(refused, case):
    content, words = BAD_META[case]
    refused("a.mha", meta(**content) if isinstance(content, dict) else content, words)


def test_bombs_are_refused_before_they_are_read(refused):
    zeros = zlib.compress(bytes(2 * 10**6))
    refused("a.mha", meta(zeros, CompressedData="True", DimSize="100 100 100"), "more than the limit", max_voxels=1000)
    refused("a.mha", meta(zeros, CompressedData="True"), "longer than its header says")
    refused("a.nrrd", nrrd(gzip.compress(bytes(10**7)), encoding="gzip"), "longer than its header says")


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("packed", [True, False])
def test_what_simpleitk_writes(tmp_path, suffix, packed):
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    image = sitk.GetImageFromArray(np.ascontiguousarray(STORED.T))
    image.SetOrigin((1, 2, 3))
    image.SetSpacing((0.5, 1, 2))
    image.SetDirection((1, 0, 0, 0, 0.6, -0.8, 0, 0.8, 0.6))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"), useCompression=packed)
    volume = load_volume(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(volume.data, STORED)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-12)


def test_what_pynrrd_reads(tmp_path):
    nrrd_library = pytest.importorskip("nrrd", reason="pynrrd is not installed")
    save_volume(Volume(STORED, AFFINE), tmp_path / "a.nrrd")
    data, header = nrrd_library.read(str(tmp_path / "a.nrrd"))
    np.testing.assert_array_equal(data, STORED)
    np.testing.assert_array_equal(header["space directions"].T, np.diag([-1, -1, 1]) @ AFFINE[:3, :3])


# Pictures ------------------------------------------------------------------------------------------------------


def grey(kind, shape=(4, 6), top=None):
    return np.random.default_rng(5).integers(0, top or np.iinfo(kind).max, shape, dtype=kind, endpoint=True)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_pictures_of_other_programs(tmp_path, suffix, kind):
    """Rows run to the back, columns to the left: the display of an axial slice is the picture itself."""
    package = "skimage.io" if suffix == ".png" else "tifffile"
    other = pytest.importorskip(package, reason=f"{package} is not installed")
    stored = grey(kind)
    if suffix == ".png":
        other.imsave(tmp_path / "a.png", stored, check_contrast=False)
    else:
        other.imwrite(tmp_path / "a.tif", stored, photometric="minisblack")
    volume = load_volume(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(to_slices(volume, 2).data[0], stored)
    assert "no place in the file: pixels of 1 mm" in volume.notes[0]
    save_volume(volume, tmp_path / f"b{suffix}")
    again = other.imread(tmp_path / f"b{suffix}")
    np.testing.assert_array_equal(again, stored)
    assert again.dtype == kind


def test_pages_of_tiff_and_folders_of_pictures(tmp_path):
    from PIL import Image

    stack = grey(np.uint16, (12, 4, 6))
    first, *rest = (Image.fromarray(page) for page in stack)
    first.save(tmp_path / "a.tif", save_all=True, append_images=rest)
    np.testing.assert_array_equal(to_slices(load_volume(tmp_path / "a.tif"), 2).data, stack)
    (tmp_path / "stack").mkdir()
    for n, page in enumerate(stack):
        Image.fromarray(page).save(tmp_path / "stack" / f"slice{n}.png")  # 10 comes after 9, not after 1
    volume = load_volume(tmp_path / "stack")
    np.testing.assert_array_equal(to_slices(volume, 2).data, stack)
    with pytest.raises(InputError, match="more than the limit"):
        load_volume(tmp_path / "stack", max_voxels=100)
    Image.fromarray(stack[0][:3]).save(tmp_path / "stack" / "slice12.png")
    with pytest.raises(InputError, match=r"slice12.png: is \(3, 6\)"):
        load_volume(tmp_path / "stack")


def test_values_of_png_survive_another_reader(tmp_path):
    """Slices lie one below the other; slope and intercept are in the text of the file."""
    from PIL import Image

    data = np.random.default_rng(6).normal(0, 300, SHAPE).astype(np.float32)
    save_volume(Volume(data, AFFINE), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        known, stored = json.loads(file.info["invdiff"]), np.array(file)
    assert stored.shape == (9 * 5, 7) and stored.dtype == np.uint16 and (stored.min(), stored.max()) == (0, 65535)
    values = (known["slope"] * stored + known["intercept"]).reshape(5, 9, 7).T
    np.testing.assert_allclose(values, data, atol=np.ptp(data) / 65535 * 0.501)
    np.testing.assert_array_equal(known["affine"], AFFINE)


def test_the_checksum_of_pixels_is_compared(tmp_path):
    save_volume(Volume(grey(np.uint8, SHAPE), AFFINE), tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    at = content.index(b"IDAT")
    content[at + 4 + int.from_bytes(content[at - 4 : at])] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_volume(tmp_path / "a.png")


def test_pictures_that_are_not_grey_are_refused(tmp_path):
    from PIL import Image

    for mode, name in (("RGB", "a.png"), ("RGBA", "a.png"), ("P", "a.png"), ("LA", "a.png"), ("RGB", "a.tif")):
        Image.new(mode, (4, 5)).save(tmp_path / name)
        with pytest.raises(InputError, match=f"in colour .*{mode}"):
            load_volume(tmp_path / name)
    Image.new("RGB", (4, 5)).save(tmp_path / "a.jpg")
    os.rename(tmp_path / "a.jpg", tmp_path / "b.png")
    with pytest.raises(InputError, match="no grey PNG or TIFF"):
        load_volume(tmp_path / "b.png")


@pytest.mark.parametrize("kind", ["i1", "u4", "f8", "u2", "i2", "f4"])
def test_tiff_is_exact_or_refused(tmp_path, kind):
    """Pillow reads int8 as uint8 and uint32 as int32."""
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    stored = (np.arange(24).reshape(4, 6) - (0 if kind[0] == "u" else 12)).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack")
    if kind in ("u2", "i2", "f4"):
        np.testing.assert_array_equal(to_slices(load_volume(tmp_path / "a.tif"), 2).data[0], stored)
    else:
        with pytest.raises(InputError, match=r"8 or 16 bit|no grey PNG"):
            load_volume(tmp_path / "a.tif")


@pytest.mark.parametrize("change", [{"affine": 3}, {"slope": 0}, {"slices": 4}, {"slices": "x"}, {"intercept": None}])
def test_a_damaged_note_is_refused(tmp_path, change):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    good = {"invdiff": "", "affine": np.eye(4).tolist(), "slope": 1, "intercept": 0, "slices": 2}
    info.add_text("invdiff", json.dumps(good | change))
    Image.fromarray(grey(np.uint8, (10, 3))).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match="damaged"):
        load_volume(tmp_path / "a.png")


# Arrays --------------------------------------------------------------------------------------------------------


def test_arrays_are_slices_rows_columns(tmp_path):
    stack = np.random.default_rng(7).normal(size=(3, 4, 6))
    np.save(tmp_path / "a.npy", stack)
    np.testing.assert_array_equal(to_slices(load_volume(tmp_path / "a.npy"), 2).data, stack.astype(np.float32))
    np.save(tmp_path / "b.npy", np.asfortranarray(stack[0].astype(">i2")))
    np.testing.assert_array_equal(to_slices(load_volume(tmp_path / "b.npy"), 2).data[0], stack[0].astype(">i2"))
    np.save(tmp_path / "c.npy", stack[None].repeat(2, 0) * [[[[1]]], [[[5]]]])
    np.testing.assert_allclose(to_slices(load_volume(tmp_path / "c.npy", volume_index=1), 2).data, 5 * stack, rtol=1e-6)
    with pytest.raises(InputError, match="--volume-index"):
        load_volume(tmp_path / "c.npy")


def test_one_array_of_several(tmp_path):
    np.savez(tmp_path / "a.npz", one=np.zeros((2, 3, 4)), two=np.ones((2, 3, 4)))
    with pytest.raises(InputError, match="holds 2 arrays; choose one with --series one, two"):
        load_volume(tmp_path / "a.npz")
    assert load_volume(tmp_path / "a.npz", series="two").data.min() == 1
    with pytest.raises(InputError, match="has no array 'three'; --series can be one, two"):
        load_volume(tmp_path / "a.npz", series="three")
    np.savez(tmp_path / "b.npz", hu=np.ones((2, 3, 4)), names=np.array(["Doe"]), affine=AFFINE)
    volume = load_volume(tmp_path / "b.npz")
    assert (volume.modality, volume.data.shape) == ("CT", (4, 3, 2))
    np.testing.assert_array_equal(volume.affine, AFFINE)


class Trap:
    """Leaves a file when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("trapped",))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", data=np.array([Trap()], dtype=object))
    np.savez(tmp_path / "b.npz", data=np.ones((2, 3, 4)), affine=np.array([Trap()], dtype=object))
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("a.npy", "a.npz", "b.npz", "b.npy"):
        with pytest.raises(InputError, match=r"Python objects|damaged"):
            load_volume(tmp_path / name)
    assert not (tmp_path / "trapped").exists()


def test_arrays_that_are_no_volume_are_refused(tmp_path):
    for array, words in (
        (np.zeros(5), "has shape"),
        (np.zeros((2, 0, 3)), "has shape"),
        (np.zeros((1, 1, 1, 1, 1)), "has shape"),
        (np.zeros((2, 3), complex), "complex"),
        (np.zeros((2, 3), "M8[s]"), "has values of type"),
        (np.zeros((2, 3), [("a", "f4")]), "records"),
        (np.full((2, 2), "Doe"), "has shape"),
    ):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(InputError, match=words) as caught:
            load_volume(tmp_path / "a.npy")
        assert "Doe" not in str(caught.value)


def test_sizes_of_arrays_are_checked_before_they_are_read(tmp_path):
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 100000, 100000), }"
    head += b" " * (117 - len(head)) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(100)
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("data.npy", content)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(InputError, match="more than the limit"):
            load_volume(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("data.npy", content.replace(b"(100000, 100000, 100000)", b"(10, 10, 10)            "))
    with pytest.raises(InputError, match="truncated or too long for shape"):
        load_volume(tmp_path / "b.npz")
