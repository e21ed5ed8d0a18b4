"""The corpus for volumes: NIfTI, NRRD, MetaImage, DICOM, pictures and arrays."""

import gzip
import json
import pickle
import re
import struct
import zipfile
import zlib

import nibabel as nib
import numpy as np
from corpus import FINITE, REFUSE, SAME, VALID, Reader

from invdiff.volume import Volume, load_volume, save_volume

SHAPE = (7, 9, 5)
AFFINE = np.array([[-0.8, 0, 0, 4], [0, -0.8, 0, 5], [0, 0, 3, -6], [0, 0, 0, 1.0]])
VALUES = np.random.default_rng(0).integers(-1000, 2000, SHAPE).astype(np.float32)


def saved(name):
    return lambda folder: save_volume(Volume(VALUES, AFFINE, "HU", "CT"), folder / name) and None


def loaded(name):
    return lambda folder: load_volume(folder / name)


def volume_arrays(volume):
    return volume.data, volume.affine


def patched(name, change):
    """``change(bytes)`` of a file."""

    def edit(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return edit


def bomb(megabytes: int, packing: int) -> bytes:
    """A deflate stream of so many zeros, made of one block again and again (its checksum is wrong, at the end)."""
    packer = zlib.compressobj(9, zlib.DEFLATED, packing)
    head = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * megabytes


# NIfTI ----------------------------------------------------------------------------------------------------------


def at(place, kind, *values):
    """Header values packed at a place of a plain NIfTI file."""
    return patched(
        "a.nii", lambda b: b[:place] + (p := struct.pack(f"<{len(values)}{kind}", *values)) + b[place + len(p) :]
    )


def array_as(kind, **options):
    def edit(folder):
        nib.save(nib.Nifti1Image(np.ones(options.get("shape", SHAPE), kind), AFFINE), folder / "a.nii")

    return edit


NAN, INF = float("nan"), float("inf")
NIFTI = {
    "dims 32767 cubed": (at(42, "h", 32767, 32767, 32767), REFUSE),
    "dim 0": (at(42, "h", 0), REFUSE),
    "dim -7": (at(42, "h", -7), REFUSE),
    "0 dimensions": (at(40, "h", 0), REFUSE),
    "9 dimensions": (at(40, "h", 9), REFUSE),
    "another dim": (at(42, "h", 8), REFUSE),
    "half a pair": (at(344, "4s", b"ni1\0"), REFUSE),
    "magic": (at(344, "4s", b"n+9\0"), REFUSE),
    "size of header": (at(0, "i", 349), REFUSE),
    "RGB": (at(70, "h", 128), REFUSE),
    "RGBA": (at(70, "h", 2304), REFUSE),
    "complex": (at(70, "h", 32), REFUSE),
    "unknown type": (at(70, "h", 999), REFUSE),
    "bits": (at(70, "h", 1), REFUSE),
    "type of another size": (at(70, "h", 64), REFUSE),
    "voxels at NaN": (at(108, "f", NAN), REFUSE),
    "voxels at infinity": (at(108, "f", INF), REFUSE),
    "voxels before 0": (at(108, "f", -352), REFUSE),
    "voxels at half a byte": (at(108, "f", 352.5), REFUSE),
    "voxels far behind the end": (at(108, "f", 2e9), REFUSE),
    "voxels inside the header": (at(108, "f", 300), REFUSE),
    "affine NaN": (at(280, "f", NAN), REFUSE),
    "affine 0": (at(280, "f", *[0] * 12), REFUSE),
    "affine huge": (at(280, "f", 1e30), REFUSE),
    "two equal columns": (at(280, "f", 1, 1, 0, 0, 2, 2, 0, 0, 0, 0, 3, 0), REFUSE),
    "slope 1, intercept NaN": (at(112, "f", 1, NAN), REFUSE),
    "slope 1e38": (at(112, "f", 1e38, 0), REFUSE),
    "codes": (at(252, "h", 77, 77), REFUSE),
    "too long": (patched("a.nii", lambda b: b + b"x"), REFUSE),
    "header only": (patched("a.nii", lambda b: b[:352]), REFUSE),
    "NaN voxel": (patched("a.nii", lambda b: b[:-4] + struct.pack("<f", NAN)), REFUSE),
    "infinite voxel": (patched("a.nii", lambda b: b[:-4] + struct.pack("<f", -INF)), REFUSE),
    "two volumes": (array_as(np.float32, shape=(7, 9, 5, 2)), REFUSE),
    "5 dimensions": (array_as(np.float32, shape=(7, 9, 5, 2, 2)), REFUSE),
    "a bomb": (lambda f: (f / "a.nii").write_bytes(gzip_bomb((f / "a.nii").read_bytes())) and None, REFUSE),
}


def gzip_bomb(plain: bytes) -> bytes:
    """A gzip file whose header declares the right size and which goes on without end."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = packer.compress(plain) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + head + bomb(400, -15)


def zipped(change):
    return patched("a.nii.gz", change)


NIFTI_GZ = {
    "wrong checksum": (zipped(lambda b: b[:-8] + bytes([b[-8] ^ 1]) + b[-7:]), REFUSE),
    "wrong length": (zipped(lambda b: b[:-1] + bytes([b[-1] ^ 1])), REFUSE),
    "bytes behind": (zipped(lambda b: b + b"x"), REFUSE),
    "another member behind": (zipped(lambda b: b + gzip.compress(b"x")), REFUSE),
    "zeros behind": (zipped(lambda b: b + bytes(8)), SAME),
    "dims 32767 cubed": (
        zipped(lambda b: gzip.compress((p := gzip.decompress(b))[:42] + struct.pack("<3h", *[32767] * 3) + p[48:])),
        REFUSE,
    ),
    "goes on without end": (zipped(lambda b: gzip_bomb(gzip.decompress(b))), REFUSE),
    "voxels behind 100 MB": (
        zipped(lambda b: gzip_bomb((p := gzip.decompress(b))[:108] + struct.pack("<f", 100 * 2**20) + p[112:])),
        REFUSE,
    ),
}

# Text headers -----------------------------------------------------------------------------------------------------


def header(name, pattern, new):
    """The first match of a pattern in a file, replaced."""
    return patched(name, lambda b: re.sub(pattern.encode(), lambda _: new.encode("latin-1"), b, count=1))


def nrrd(pattern, new):
    return header("a.nrrd", pattern, new)


def meta(pattern, new):
    return header("a.mha", pattern, new)


NRRD = {
    "sizes beyond all": (nrrd("sizes: .*", "sizes: 100000 100000 100000"), REFUSE),
    "sizes of 5000 digits": (nrrd("sizes: .*", f"sizes: {'9' * 5000} 1 1"), REFUSE),
    "negative sizes": (nrrd("sizes: .*", "sizes: -7 -9 5"), REFUSE),
    "size 0": (nrrd("sizes: .*", "sizes: 7 0 5"), REFUSE),
    "fewer sizes": (nrrd("sizes: .*", "sizes: 7 9"), REFUSE),
    "no sizes": (nrrd("sizes: .*\n", ""), REFUSE),
    "sizes twice": (nrrd("sizes: .*", "sizes: 7 9 5\nsizes: 7 9 5"), REFUSE),
    "other sizes": (nrrd("sizes: .*", "sizes: 7 9 6"), REFUSE),
    "type": (nrrd("type: .*", "type: block"), REFUSE),
    "encoding": (nrrd("encoding: .*", "encoding: bzip2"), REFUSE),
    "encoding text": (nrrd("encoding: .*", "encoding: txt"), REFUSE),
    "encoding raw": (nrrd("encoding: .*", "encoding: raw"), REFUSE),
    "space": (nrrd("space: .*", "space: scanner-xyz"), REFUSE),
    "directions NaN": (nrrd("space directions: .*", "space directions: (nan,0,0) (0,1,0) (0,0,1)"), REFUSE),
    "directions 0": (nrrd("space directions: .*", "space directions: (0,0,0) (0,1,0) (0,0,1)"), REFUSE),
    "directions 2D": (nrrd("space directions: .*", "space directions: (1,0) (0,1) (0,1)"), REFUSE),
    "directions words": (nrrd("space directions: .*", "space directions: (a,b,c) (0,1,0) (0,0,1)"), REFUSE),
    "origin NaN": (nrrd("space origin: .*", "space origin: (nan,0,0)"), REFUSE),
    "origin infinite": (nrrd("space origin: .*", "space origin: (inf,0,0)"), REFUSE),
    "voxels elsewhere": (nrrd("endian: ", "data file: ../../etc/passwd\nendian: "), REFUSE),
    "voxels at an absolute path": (nrrd("endian: ", "data file: /etc/passwd\nendian: "), REFUSE),
    "voxels in the header": (nrrd("endian: ", "data file: a.nrrd\nendian: "), REFUSE),
    "voxels in parts": (nrrd("endian: ", "data file: LIST\nendian: "), REFUSE),
    "skip": (nrrd("endian: ", "byte skip: -1\nendian: "), REFUSE),
    "skip far": (nrrd("endian: ", f"byte skip: {10**18}\nendian: "), REFUSE),
    "vectors": (nrrd("kinds: .*", "kinds: 3-vector domain domain"), REFUSE),
    "a header without end": (lambda f: (f / "a.nrrd").write_bytes(b"NRRD0004\n" + b"# x\n" * 10**6) and None, REFUSE),
    "goes on without end": (
        patched("a.nrrd", lambda b: b[: (k := b.index(b"\n\n") + 2)] + gzip_bomb(gzip.decompress(b[k:]))),
        REFUSE,
    ),
}
META = {
    "sizes beyond all": (meta("DimSize = .*", "DimSize = 100000 100000 100000"), REFUSE),
    "negative sizes": (meta("DimSize = .*", "DimSize = -7 -9 5"), REFUSE),
    "size 0": (meta("DimSize = .*", "DimSize = 7 0 5"), REFUSE),
    "other sizes": (meta("DimSize = .*", "DimSize = 7 9 6"), REFUSE),
    "5 dimensions": (meta("DimSize = .*", "DimSize = 7 9 5 1 1"), REFUSE),
    "NDims": (meta("NDims = .*", "NDims = 3.0"), REFUSE),
    "channels": (meta("NDims = ", "ElementNumberOfChannels = 3\nNDims = "), REFUSE),
    "type": (meta("ElementType = .*", "ElementType = MET_STRING"), REFUSE),
    "not deflated": (meta("CompressedData = True", "CompressedData = False"), REFUSE),
    "text": (meta("BinaryData = True", "BinaryData = False"), REFUSE),
    "spacing NaN": (meta("ElementSpacing = .*", "ElementSpacing = nan 1 1"), REFUSE),
    "spacing 0": (meta("ElementSpacing = .*", "ElementSpacing = 0 1 1"), REFUSE),
    "spacing of 2": (meta("ElementSpacing = .*", "ElementSpacing = 1 1"), REFUSE),
    "offset infinite": (meta("Offset = .*", "Offset = inf 0 0"), REFUSE),
    "matrix 0": (meta("TransformMatrix = .*", "TransformMatrix = " + "0 " * 9), REFUSE),
    "voxels elsewhere": (meta("ElementDataFile = .*", "ElementDataFile = ../../etc/passwd"), REFUSE),
    "voxels at an absolute path": (meta("ElementDataFile = .*", "ElementDataFile = /etc/passwd"), REFUSE),
    "voxels in the header": (meta("ElementDataFile = .*", "ElementDataFile = a.mha"), REFUSE),
    "voxels in parts": (meta("ElementDataFile = .*", "ElementDataFile = LIST"), REFUSE),
    "goes on without end": (
        patched("a.mha", lambda b: b[: b.index(b"LOCAL\n") + 6] + b"\x78\x9c" + bomb(400, -15)),
        REFUSE,
    ),
}

# Pictures ---------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits=8, colour=0, extra=b"", data=None):
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = zlib.compress(bytes(100)) if data is None else data
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return lambda folder: (folder / "a.png").write_bytes(whole) and None


def noted(**change):
    """The line of JSON that invdiff writes, changed."""
    note = {"invdiff": "x", "affine": AFFINE.tolist(), "slope": 1.0, "intercept": 0.0, "slices": 1, **change}
    text = b"invdiff\0" + json.dumps(note).encode()
    return png(9, 9, extra=chunk(b"tEXt", text), data=zlib.compress(bytes(90)))


PNG = {
    "a thousand million pixels": (png(2**31 - 1, 2**31 - 1), REFUSE),
    "60000 x 60000": (png(60000, 60000), REFUSE),
    "width 0": (png(0, 9), REFUSE),
    "colour": (png(5, 5, 8, 2, data=zlib.compress(bytes(80))), REFUSE),
    "fewer pixels": (png(30, 30), REFUSE),
    "pixels without end": (png(9, 9, data=b"\x78\x9c" + bomb(400, -15)), FINITE),
    "text without end": (png(9, 9, extra=chunk(b"zTXt", b"invdiff\0\0\x78\x9c" + bomb(400, -15))), REFUSE),
    "slices 0": (noted(slices=0), REFUSE),
    "slices 2": (noted(slices=2), REFUSE),
    "slices infinite": (noted(slices=INF), REFUSE),
    "slices a list": (noted(slices=[1]), REFUSE),
    "slope NaN": (noted(slope=NAN), REFUSE),
    "slope 1e38": (noted(slope=1e308, intercept=1e308), REFUSE),
    "affine words": (noted(affine="x"), REFUSE),
    "affine NaN": (noted(affine=[[NAN] * 4] * 4), REFUSE),
    "deep nesting": (
        png(9, 9, extra=chunk(b"tEXt", b'invdiff\0{"invdiff": ' + b"[" * 90000), data=zlib.compress(bytes(90))),
        FINITE,
    ),
}


def tiff(*tags, tail=b"", following=0):
    """Little-endian TIFF of one directory; a tag is (number, type, count, value or offset)."""
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    whole = b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", following) + tail
    return lambda folder: (folder / "a.tif").write_bytes(whole) and None


def grey(width=4, height=4, offset=200, following=0, **change):
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: offset, 277: 1, 278: height, 279: width * height}
    tags |= {int(k[1:]): v for k, v in change.items()}
    return tiff(*((n, 4, 1, v) for n, v in sorted(tags.items())), tail=bytes(300), following=following)


TIFF = {
    "60000 x 60000": (grey(60000, 60000), REFUSE),
    "a directory that follows itself": (grey(following=8), REFUSE),
    "width 0": (grey(0, 4), REFUSE),
    "colour": (grey(t277=3, t262=2), REFUSE),
    "pixels behind the end": (grey(offset=10**6), REFUSE),
    "12 bits": (grey(t258=12), REFUSE),
    "a tag of 4 GB": (tiff((256, 4, 2**30, 8), (257, 4, 1, 4)), REFUSE),
    "a directory behind the end": (lambda f: (f / "a.tif").write_bytes(b"II*\0\xff\xff\xff\x7f") and None, REFUSE),
    "packbits for pixels": (grey(t259=32773), REFUSE),
    "an unknown packing": (grey(t259=9999), REFUSE),
}

# Arrays -----------------------------------------------------------------------------------------------------------


class Canary:
    """Unpickling it ends the process, which no reader survives."""

    def __reduce__(self):
        import os

        return os._exit, (1,)


def npy_header(text: str, version=1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text.encode()


def npy(shape, kind="<f4", data=b"", order=False):
    text = f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
    return lambda folder: (folder / "a.npy").write_bytes(npy_header(text) + data) and None


def raw_npy(data):
    return lambda folder: (folder / "a.npy").write_bytes(data) and None


NPY = {
    "a million million values": (npy((10**4, 10**4, 10**4)), REFUSE),
    "4 GB of bytes": (npy((2048, 1024, 1024), "|u1"), REFUSE),
    "negative": (npy((-2, 3, 4), data=bytes(96)), REFUSE),
    "overflow": (npy((2**62, 2**62, 4)), REFUSE),
    "no axes": (npy((), data=bytes(4)), REFUSE),
    "5 axes": (npy((1, 1, 1, 2, 2), data=bytes(16)), REFUSE),
    "empty": (npy((0, 3, 3)), REFUSE),
    "objects": (npy((2, 2, 2), "|O", pickle.dumps(Canary())), REFUSE),
    "a record": (npy((2, 2, 2), [("a", "<f4")], bytes(32)), REFUSE),
    "complex": (npy((2, 2, 2), "<c8", bytes(64)), REFUSE),
    "dates": (npy((2, 2, 2), "<M8[s]", bytes(64)), REFUSE),
    "text": (npy((2, 2, 2), "<U1", bytes(32)), REFUSE),
    "NaN": (npy((2, 2, 2), "<f4", struct.pack("<8f", *[NAN] * 8)), REFUSE),
    "infinite in single precision": (npy((2, 2, 2), "<f8", struct.pack("<8d", *[1e300] * 8)), REFUSE),
    "code in the header": (raw_npy(npy_header("__import__('os')._exit(1)\n")), REFUSE),
    "version 9": (raw_npy(npy_header("{}", 9)), REFUSE),
    "a bare pickle": (raw_npy(pickle.dumps(Canary())), REFUSE),
    "an archive": (lambda f: np.savez(f / "b", a=np.ones(3)) or ((f / "b.npz").rename(f / "a.npy") and None), REFUSE),
    "deep nesting": (raw_npy(npy_header("(" * 9000)), REFUSE),
}


def npz(*members, method=zipfile.ZIP_DEFLATED, **arrays):
    """An archive of ``(name, bytes)`` and arrays."""

    def edit(folder):
        with zipfile.ZipFile(folder / "a.npz", "w", method) as archive:
            for name, data in members:
                archive.writestr(name, data)
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as out:
                    np.lib.format.write_array(out, np.asarray(array), allow_pickle=True)

    return edit


ONES = np.ones((5, 9, 7), np.float32)
HUGE = npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (4096, 1024, 1024), }\n")
NPZ = {
    "empty": (npz(), REFUSE),
    "no array": (npz(("readme.txt", b"hello")), REFUSE),
    "two arrays": (npz(a=ONES, b=ONES), REFUSE),
    "objects": (npz(data=np.array([Canary(), None, None]).reshape(1, 1, 3)), REFUSE),
    "affine of objects": (npz(data=ONES, affine=np.array([[Canary()]])), REFUSE),
    "affine NaN": (npz(data=ONES, affine=np.full((4, 4), NAN)), REFUSE),
    "affine 3 x 3": (npz(data=ONES, affine=np.eye(3)), REFUSE),
    "affine text": (npz(data=ONES, affine=np.array("x")), REFUSE),
    "modality": (npz(data=ONES, modality=np.array("../../x")), REFUSE),
    "modality a number": (npz(data=ONES, modality=np.zeros((3, 3))), REFUSE),
    "declares 4 GB": (npz(("data.npy", HUGE + bytes(100))), REFUSE),
    "inflates to 4 GB": (npz(("data.npy", HUGE + bytes(2**26))), REFUSE),
    "path traversal": (npz(("../../data.npy", b"x")), REFUSE),
    "a name with a line break": (npz(a=ONES, **{"b\nc": ONES}), REFUSE),
    "two of one name": (npz(("data.npy", b"x"), data=ONES), REFUSE),
    "encrypted": (patched("a.npz", lambda b: b[:6] + b"\1" + b[7:]), VALID),
    "bytes in front": (patched("a.npz", lambda b: b"x" * 100 + b), SAME),
}

READERS = (
    Reader("NIfTI", "a.nii", saved("a.nii"), loaded("a.nii"), volume_arrays, NIFTI),
    Reader("NIfTI, zipped", "a.nii.gz", saved("a.nii.gz"), loaded("a.nii.gz"), volume_arrays, NIFTI_GZ, checked=True),
    Reader("NRRD", "a.nrrd", saved("a.nrrd"), loaded("a.nrrd"), volume_arrays, NRRD),
    Reader("MetaImage", "a.mha", saved("a.mha"), loaded("a.mha"), volume_arrays, META),
    Reader("PNG", "a.png", saved("a.png"), loaded("a.png"), volume_arrays, PNG, checked=True),
    Reader("TIFF", "a.tif", saved("a.tif"), loaded("a.tif"), volume_arrays, TIFF),
    Reader("npy", "a.npy", saved("a.npy"), loaded("a.npy"), volume_arrays, NPY),
    Reader("npz", "a.npz", saved("a.npz"), loaded("a.npz"), volume_arrays, NPZ),
)
