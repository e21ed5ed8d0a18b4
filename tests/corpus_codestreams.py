"""The corpus for compressed DICOM: a folder of four slices, the codestream of one of which is damaged.

No codestream but the deflated one has a checksum: a flipped bit among entropy-coded samples gives another sample, and
nothing can tell (VALID). Ends and sizes are written down in every one of them, so that a part of an image, or one of
another size, has to be refused, or to give every sample right (SAME).
"""

import io
import struct
import zlib

import numpy as np
from corpus import REFUSE, SAME, VALID, Reader
from corpus_dicom import ONE, changed
from corpus_volumes import AFFINE, volume_arrays

from invdiff.volume import Volume, load_volume, save_volume

ROWS, COLUMNS = 8, 6
PIXELS = np.add.outer(300 * np.arange(ROWS), 40 * np.arange(COLUMNS)) + np.arange(48).reshape(ROWS, COLUMNS) * 7919 % 97
PIXELS = PIXELS.astype("<u2")
J2K, LS, SV1, BASELINE = (f"1.2.840.10008.1.2.4.{n}" for n in (90, 80, 70, 50))
RLE, DEFLATED = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1.99"
# PIXELS as CharLS 2.4 and gdcm 3.2 encode them: there is no encoder for these among the packages of the tests.
MADE = {
    LS: "ffd8fff7000b0c0008000601011100ffda000801010000000084b9224c586003d4a94254a9401e240951a61289b4611a48826134112148"
    "428800f0214a0881189b1fa42045887da2c33e4a10ffd9",
    SV1: "ffd8ffc3000b100008000601011100ffc40017000101010100000000000000000000000003070910ffda0008010100010000eb32d9957"
    "5f556ccaba38b6655b368e2d9956cda396655b32e8e59956ccba39665b32aebeaad9957ffd9",
}


def _literal(plane):
    """A segment of RLE without runs, row by row, of even length."""
    rows = b"".join(bytes([len(row) - 1]) + row.tobytes() for row in plane)
    return rows + bytes(len(rows) % 2)


def image(uid):
    """What is encoded: JPEG 2000 by its usual six resolutions needs more than 8 x 6 pixels."""
    return np.tile(PIXELS, (6, 7)) if uid == J2K else PIXELS


def encoded(uid, pixels=None):
    """A codestream of ``pixels``, as a rule of :func:`image`."""
    pixels = image(uid) if pixels is None else pixels
    if uid in MADE:
        return bytes.fromhex(MADE[uid])
    if uid == BASELINE:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray((pixels // 16).astype(np.uint8)).save(file, "JPEG", quality=95)
        return file.getvalue()
    if uid == RLE:
        low, high = (_literal((pixels >> shift).astype(np.uint8)) for shift in (0, 8))
        return struct.pack("<16I", 2, 64, 64 + len(high), *[0] * 13) + high + low
    from openjpeg.utils import encode_array

    return encode_array(pixels, use_mct=False)


def make(uid):
    def build(folder):
        stack = np.repeat(image(uid).T[:, :, None], 4, 2).astype(np.float32)
        save_volume(Volume(stack, AFFINE, "1", "MR"), folder / "a.dcm")
        store(folder, uid, None if uid == DEFLATED else [encoded(uid)])

    return build


def store(folder, uid, fragments):
    """The second slice with these fragments of pixel data; None leaves them as they are."""
    import pydicom
    from pydicom.encaps import encapsulate

    data = pydicom.dcmread(folder / ONE)
    data.file_meta.TransferSyntaxUID = uid
    if uid == BASELINE:
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit = 7
    if fragments is not None:
        data.PixelData = encapsulate(fragments)
        data["PixelData"].is_undefined_length = True
    data.save_as(folder / ONE)


def stream(uid, change):
    """The codestream after ``change(bytes)``, which gives one fragment or several."""

    def edit(folder):
        made = change(encoded(uid))
        store(folder, uid, [made] if isinstance(made, bytes) else made)

    return edit


def flipped(place):
    def change(data):
        bad = bytearray(data)
        bad[place // 8 % len(bad)] ^= 1 << place % 8
        return bytes(bad)

    return change


FRAMES = {LS: b"\xff\xf7", SV1: b"\xff\xc3", BASELINE: b"\xff\xc0"}  # markers of the frame header


def sized(uid, rows, columns):
    """The codestream with another size in its header."""

    def change(data):
        if uid == J2K:  # Xsiz, Ysiz, and the same for the only tile
            place = data.index(b"\xff\x51") + 6
            wide = struct.pack(">II", columns, rows)
            return data[:place] + wide + data[place + 8 : place + 16] + wide + data[place + 24 :]
        place = data.index(FRAMES[uid]) + 5
        return data[:place] + struct.pack(">HH", rows, columns) + data[place + 4 :]

    return change


def precision(uid, bits):
    def change(data):
        place = data.index(b"\xff\x51") + 40 if uid == J2K else data.index(FRAMES[uid]) + 4
        return data[:place] + bytes([bits - 1 if uid == J2K else bits]) + data[place + 1 :]

    return change


def codestreams(uid):
    """Damage to a codestream: name to (edit, outcome)."""
    good, rng = encoded(uid), np.random.default_rng(0)
    rows, columns = image(uid).shape
    found = {
        f"codestream cut after {end}": (stream(uid, lambda d, end=end: d[:end]), SAME)
        for end in sorted({2, 10, 20, len(good) // 3, len(good) // 2, len(good) - 20, len(good) - 4, len(good) - 2})
    }
    found |= {
        f"codestream bit {place} flipped": (stream(uid, flipped(place)), VALID)
        for place in rng.choice(8 * len(good), 40, replace=False).tolist()
    }
    found |= {
        "codestream empty": (stream(uid, lambda d: bytes(2)), REFUSE),
        "codestream of zeros": (stream(uid, lambda d: bytes(len(d))), REFUSE),
        "codestream random": (stream(uid, lambda d: np.random.default_rng(1).bytes(len(d))), REFUSE),
        "codestream twice": (stream(uid, lambda d: d + d), SAME),
        "the last half is missing, the end is not": (stream(uid, lambda d: d[: len(d) // 2] + d[-2:]), VALID),
        "in two fragments": (stream(uid, lambda d: [d[:20], d[20:]]), SAME),
        "two frames": (stream(uid, lambda d: [d, d]), SAME),
        "zeros at the end": (stream(uid, lambda d: d + bytes(8)), SAME),
        "fewer rows in the header": (changed(Rows=rows // 2), REFUSE),
        "more rows in the header": (changed(Rows=2 * rows), REFUSE),
        "rows and columns exchanged in the header": (changed(Rows=columns, Columns=rows), REFUSE),
        "another syntax": (lambda folder: store(folder, LS if uid != LS else J2K, [good]), REFUSE),
        "rows 65535 in the header": (changed(Rows=65535, Columns=65535), REFUSE),
    }
    if uid == RLE:
        return found | {
            "15 segments": (stream(uid, lambda d: struct.pack("<I", 15) + d[4:]), REFUSE),
            "segments elsewhere": (stream(uid, lambda d: d[:4] + struct.pack("<I", 2**31) + d[8:]), REFUSE),
            "segments exchanged": (stream(uid, lambda d: d[:4] + d[8:12] + d[4:8] + d[12:]), REFUSE),
            "an image of other size": (stream(uid, lambda d: encoded(uid, PIXELS[:4])), REFUSE),
        }
    for size in ((rows // 2, columns), (2 * rows, columns), (columns, rows), (60000, 60000), (0, columns)):
        found["codestream of {} x {}".format(*size)] = (stream(uid, sized(uid, *size)), REFUSE)
    found["codestream of 24 bits"] = (stream(uid, precision(uid, 24)), REFUSE)
    if uid not in MADE:
        found["an image of other size"] = (stream(uid, lambda d: encoded(uid, np.tile(image(uid), (2, 1)))), REFUSE)
        found["an image on its side"] = (
            stream(uid, lambda d: encoded(uid, np.ascontiguousarray(image(uid).T))),
            REFUSE,
        )
    return found


def tail(change):
    """The deflated part of the file after ``change(bytes)``."""

    def edit(folder):
        data = (folder / ONE).read_bytes()
        start = 144 + struct.unpack("<I", data[140:144])[0]
        (folder / ONE).write_bytes(data[:start] + change(data[start:]))

    return edit


def repacked(change):
    def again(data):
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packer.compress(change(zlib.decompress(data, -15))) + packer.flush()

    return tail(again)


DEFLATE = {
    **{f"deflated part cut {n} before its end": (tail(lambda d, n=n: d[:-n]), SAME) for n in (1, 2, 5, 20, 60, 100)},
    **{
        f"deflated bit {place} flipped": (tail(flipped(place)), VALID)  # DICOM deflates without a checksum
        for place in np.random.default_rng(0).choice(3000, 40, replace=False).tolist()
    },
    "nothing deflated": (tail(lambda d: b""), REFUSE),
    "deflated zeros": (tail(lambda d: bytes(len(d))), REFUSE),
    "random": (tail(lambda d: np.random.default_rng(1).bytes(len(d))), REFUSE),
    "not deflated": (tail(lambda d: zlib.decompress(d, -15)), REFUSE),
    "deflated with a header of zlib": (tail(lambda d: zlib.compress(zlib.decompress(d, -15))), REFUSE),
    "pixels cut before deflating": (repacked(lambda d: d[:-30]), REFUSE),
    "zeros at the end": (tail(lambda d: d + bytes(8)), SAME),
}

KINDS = {  # name: transfer syntax, packages
    "DICOM, RLE": (RLE, ("pydicom",)),
    "DICOM, JPEG 2000": (J2K, ("pydicom", "openjpeg")),
    "DICOM, JPEG": (BASELINE, ("pydicom",)),
    "DICOM, JPEG-LS": (LS, ("pydicom", "gdcm")),
    "DICOM, JPEG lossless": (SV1, ("pydicom", "gdcm")),
    "DICOM, deflated": (DEFLATED, ("pydicom",)),
}


def special(uid, needs):
    from importlib.util import find_spec

    if any(find_spec(package) is None for package in needs):
        return {}
    return DEFLATE if uid == DEFLATED else codestreams(uid)


READERS = tuple(
    Reader(
        name,
        ONE,
        make(uid),
        lambda folder: load_volume(folder / "a.dcm"),
        volume_arrays,
        special(uid, needs),
        "a.dcm",
        flips=8,
        needs=needs,
    )
    for name, (uid, needs) in KINDS.items()
)
