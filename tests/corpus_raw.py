"""The corpus for raw data of other programs: fastMRI HDF5, ISMRMRD and BART."""

import h5py
import ismrmrd_cases
import numpy as np
from corpus import REFUSE, VALID, Reader
from corpus_measurement import NAN, RNG, attacks, edited, linked, stored

from invdiff.raw import load_raw

KSPACE = (RNG.normal(size=(2, 40, 24)) + 1j * RNG.normal(size=(2, 40, 24))).astype(np.complex64)
_SPACE = (
    "<matrixSize><x>40</x><y>24</y><z>1</z></matrixSize><fieldOfView_mm><x>{}</x><y>24</y><z>4</z></fieldOfView_mm>"
)
XML = (
    '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><subjectInformation><patientName>DOE'
    f"</patientName></subjectInformation><encoding><encodedSpace>{_SPACE.format(32)}</encodedSpace>"
    f"<reconSpace>{_SPACE.format(16)}</reconSpace></encoding></ismrmrdHeader>"
)
LAUGHS = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
BOMB = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a0 "ha">{LAUGHS}]><x>&a9;</x>'
EXTERNAL = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>'
XMLS = {
    "header expands": BOMB,
    "header expands, UTF-16": BOMB.replace('<?xml version="1.0"?>', "").encode("utf-16"),
    "header reads a file": EXTERNAL,
    "header reads a file, UTF-16": EXTERNAL.replace('<?xml version="1.0"?>', "").encode("utf-16"),
    "header nested": "<a>" * 10**5,
    "header cut": XML[:200],
    "header empty": "",
    "header of 2 MB": XML.replace("DOE", "D" * 2**21),
    "field of view 0": XML.replace("<x>32</x>", "<x>0</x>"),
    "field of view negative": XML.replace("<x>32</x>", "<x>-1</x>"),
    "field of view NaN": XML.replace("<x>32</x>", "<x>nan</x>"),
    "field of view 1e300": XML.replace("<x>32</x>", "<x>1e300</x>"),
    "field of view 1e-300": XML.replace("<x>32</x>", "<x>1e-300</x>"),
    "matrix words": XML.replace("<x>40</x>", "<x>many</x>"),
    "not UTF-8": XML.encode().replace(b"DOE", b"\xff\xfe"),
}


def make_fastmri(folder):
    with h5py.File(folder / "k.h5", "w") as file:
        file["kspace"], file["ismrmrd_header"] = KSPACE, XML


FASTMRI = attacks("k.h5", "kspace", (10**4, 10**4, 10**4), KSPACE) | {
    name: (stored("k.h5", "ismrmrd_header", np.bytes_(value) if isinstance(value, bytes) else value), REFUSE)
    for name, value in XMLS.items()
}
FASTMRI |= {
    "header is a number": (stored("k.h5", "ismrmrd_header", 3), REFUSE),
    "header is a list": (stored("k.h5", "ismrmrd_header", np.zeros(3)), REFUSE),
    "header is a link": (linked("k.h5", "ismrmrd_header", lambda f: h5py.ExternalLink("other.h5", "x")), REFUSE),
    "header missing": (edited("k.h5", lambda file, _: file.pop("ismrmrd_header")), REFUSE),
    "k-space of zeros": (stored("k.h5", "kspace", KSPACE * 0), REFUSE),
    "5 axes": (stored("k.h5", "kspace", KSPACE[None, None]), REFUSE),
    "real": (stored("k.h5", "kspace", KSPACE.real), REFUSE),
}


LINES = ismrmrd_cases.lines_of(KSPACE[:, None])
HEADER = ismrmrd_cases.xml((40, 24, 1), (40, 24, 4), (20, 24, 4))


def make_ismrmrd(folder):
    ismrmrd_cases.write(folder / "k.h5", LINES, HEADER)


def acquisitions(change):
    """Acquisitions changed by ``change(lines)``, written anew."""

    def edit(folder):
        lines = [line.copy() for line in LINES]
        ismrmrd_cases.write(folder / "k.h5", change(lines) or lines, HEADER)

    return edit


def first_line(**head):
    def change(lines):
        for name, value in head.items():
            (lines[0]["head"]["idx"] if name in ismrmrd_cases.COUNTERS else lines[0]["head"])[name] = value

    return acquisitions(change)


def numbers(change):
    def edit(lines):
        lines[0]["data"] = change(lines[0]["data"])

    return acquisitions(edit)


def retyped(data):
    def change(file, folder):
        del file["dataset/data"]
        file["dataset/data"] = data

    return edited("k.h5", change)


def text_of(value):
    def change(file, folder):
        del file["dataset/xml"]
        file["dataset/xml"] = np.array([value], dtype=h5py.special_dtype(vlen=bytes))

    return edited("k.h5", change)


def relinked(key, link):
    def change(file, folder):
        (folder / "other.h5").write_bytes((folder / "k.h5").read_bytes())
        del file[key]
        file[key] = link

    return edited("k.h5", change)


OUTSIDE = h5py.ExternalLink("other.h5", "dataset")
ISMRMRD = {
    name: (text_of(value if isinstance(value, bytes) else value.encode()), REFUSE)
    for name, value in XMLS.items()
    if "UTF-16" not in name  # zeros end such a text
}
ISMRMRD |= {
    "the group is elsewhere": (relinked("dataset", OUTSIDE), REFUSE),
    "the group is a soft link": (relinked("dataset", h5py.SoftLink("/none")), REFUSE),
    "the header is elsewhere": (relinked("dataset/xml", h5py.ExternalLink("other.h5", "dataset/xml")), REFUSE),
    "the data are elsewhere": (relinked("dataset/data", h5py.ExternalLink("other.h5", "dataset/data")), REFUSE),
    "the data are a group": (
        edited("k.h5", lambda file, _: (file.pop("dataset/data"), file.create_group("dataset/data"))),
        REFUSE,
    ),
    "plain numbers": (retyped(np.zeros(30)), REFUSE),
    "a record": (retyped(np.zeros(30, [("head", "i4"), ("data", "f4")])), REFUSE),
    "nothing": (retyped(np.zeros(0, ismrmrd_cases.ACQUISITION)), REFUSE),
    "never written": (
        edited(
            "k.h5",
            lambda file, _: (
                file.pop("dataset/data"),
                file.create_dataset("dataset/data", (10**7,), ismrmrd_cases.ACQUISITION, chunks=(1,)),
            ),
        ),
        REFUSE,
    ),
    "samples 65535, coils 65535": (first_line(number_of_samples=65535, active_channels=65535), REFUSE),
    "samples 0": (first_line(number_of_samples=0), REFUSE),
    "coils 0": (first_line(active_channels=0), REFUSE),
    "fewer samples than said": (numbers(lambda d: d[:-2]), REFUSE),
    "more samples than said": (numbers(lambda d: np.append(d, d)), REFUSE),
    "no samples": (numbers(lambda d: d[:0]), REFUSE),
    "NaN": (numbers(lambda d: d * NAN), REFUSE),
    "infinity": (numbers(lambda d: d + np.float32(np.inf)), REFUSE),
    "a line beyond the matrix": (first_line(kspace_encode_step_1=60000), REFUSE),
    "a slice of one line": (first_line(slice=60000), REFUSE),
    "a centre beyond the line": (first_line(center_sample=60000), REFUSE),
    "all discarded": (first_line(discard_pre=60000), REFUSE),
    "two repetitions": (first_line(repetition=1), REFUSE),
    "3D": (first_line(kspace_encode_step_2=1), REFUSE),
    "all flags": (first_line(flags=2**64 - 1), REFUSE),
    "position NaN": (first_line(position=(NAN, 0, 0)), VALID),
    "direction 0": (first_line(read_dir=(0, 0, 0)), VALID),
    "sampling time NaN": (first_line(sample_time_us=NAN), VALID),
}


ANGLE = np.pi * np.arange(30)[:, None] / 30
RADIUS = np.linspace(-0.5, 0.5, 40)
SPOKES = np.stack([RADIUS * np.cos(ANGLE), RADIUS * np.sin(ANGLE)], -1)
ROUND = ismrmrd_cases.xml((20, 20, 1), (40, 40, 4), (40, 40, 4), "radial")


def shots(**changes):
    """Spokes with the first one changed: fields of its header, ``traj`` and ``data``."""

    def edit(folder):
        lines = [
            ismrmrd_cases.acquisition(KSPACE[:1, :, n % 24], SPOKES[n], kspace_encode_step_1=n, position=(0, 0, 1))
            for n in range(30)
        ]
        for name, value in changes.items():
            place = lines[0] if name in ("traj", "data") else lines[0]["head"]
            (place["idx"] if name in ismrmrd_cases.COUNTERS else place)[name] = value
        ismrmrd_cases.write(folder / "k.h5", lines, ROUND)

    return edit


TRAJECTORY = {
    "no trajectory": (shots(trajectory_dimensions=0), REFUSE),
    "one dimension": (shots(trajectory_dimensions=1), REFUSE),
    "three dimensions": (shots(trajectory_dimensions=3), REFUSE),
    "60000 dimensions": (shots(trajectory_dimensions=60000), REFUSE),
    "trajectory of nothing": (shots(traj=np.zeros(0, np.float32)), REFUSE),
    "trajectory twice": (shots(traj=np.zeros(160, np.float32)), REFUSE),
    "trajectory NaN": (shots(traj=np.full(80, np.nan, np.float32)), REFUSE),
    "trajectory infinite": (shots(traj=np.full(80, np.inf, np.float32)), REFUSE),
    "trajectory 1e30": (shots(traj=np.full(80, 1e30, np.float32)), REFUSE),
    "trajectory at a point": (shots(traj=np.zeros(80, np.float32)), VALID),
    "fewer samples": (shots(number_of_samples=20), REFUSE),
    "all discarded": (shots(discard_pre=60000), REFUSE),
    "another slice": (shots(slice=3), REFUSE),
    "a partition": (shots(kspace_encode_step_2=3), VALID),  # means nothing without partitions
    "coils 0": (shots(active_channels=0), REFUSE),
    "data NaN": (shots(data=np.full(80, np.nan, np.float32)), REFUSE),
}


def make_bart(folder):
    KSPACE.transpose(1, 2, 0).astype("<c8").ravel(order="F").tofile(folder / "k.cfl")
    (folder / "k.hdr").write_text("# Dimensions\n40 24 1 1 1 1 1 1 1 1 1 1 1 2 1 1 \n")


def hdr(words):
    words = words.encode() if isinstance(words, str) else words
    return lambda folder: (folder / "k.hdr").write_bytes(words) and None


def gone(name):
    return lambda folder: (folder / name).unlink()


def header_folder(folder):
    (folder / "k.hdr").unlink()
    (folder / "k.hdr").mkdir()


BART = {
    "no header": (gone("k.hdr"), REFUSE),
    "header empty": (hdr(""), REFUSE),
    "header of words": (hdr("# Dimensions\nmany few\n"), REFUSE),
    "header of 5000 digits": (hdr("# Dimensions\n" + "9" * 5000 + " 8\n"), REFUSE),
    "header without numbers": (hdr("# Dimensions\n\n"), REFUSE),
    "header binary": (hdr(bytes(range(256)) * 10), REFUSE),
    "header of a million million": (hdr("# Dimensions\n1000000 1000000\n"), REFUSE),
    "header negative": (hdr("# Dimensions\n-40 -24 1 2\n"), REFUSE),
    "header of 17 dimensions": (hdr("# Dimensions\n40 24" + " 1" * 14 + " 2\n"), REFUSE),
    "3D": (hdr("# Dimensions\n20 24 2\n"), REFUSE),
    "header a folder": (header_folder, REFUSE),
    "NaN": (lambda f: (f / "k.cfl").write_bytes(b"\xff" * 15360) and None, REFUSE),
}


def raw_arrays(measurement):
    return measurement.y, np.asarray(measurement.volume["affine"])


def loaded(name):
    return lambda folder: load_raw(folder / name)


READERS = (
    Reader("fastMRI", "k.h5", make_fastmri, loaded("k.h5"), raw_arrays, FASTMRI, flips=60),
    Reader("ISMRMRD", "k.h5", make_ismrmrd, loaded("k.h5"), raw_arrays, ISMRMRD, flips=60),
    Reader("ISMRMRD, trajectories", "k.h5", shots(), loaded("k.h5"), raw_arrays, TRAJECTORY, flips=30),
    Reader("BART", "k.cfl", make_bart, loaded("k.cfl"), raw_arrays, BART),
)
