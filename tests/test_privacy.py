"""Names of patients and free text stay in the files they came in: none of it reaches an output, a message or a log."""

import gzip
import logging
import shutil
import signal
import zipfile

import h5py
import nibabel as nib
import numpy as np
import pytest
from ismrmrd_cases import lines_of, write, xml

from invdiff.cli.reconstruct import Bar
from invdiff.volume import load_volume, save_volume

CANARY = "CANARYBIRD"
SCAN = ("--op", "ct-sparse", "--views", "12", "--simulate", "--solver", "fbp")
BLUR = ("--op", "blur", "--kernel", "gaussian:0.5", "--simulate", "--solver", "wiener")


def nifti(world, here):
    image = nib.load(world / "ct.nii.gz")
    for name in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        image.header[name] = CANARY[: 10 if name in ("data_type",) else 16].encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", CANARY.encode()))
    nib.save(image, here / "in.nii.gz")
    return "in.nii.gz"


def nrrd(world, here):
    save_volume(load_volume(world / "ct.nii.gz"), here / "in.nrrd")
    head, voxels = (here / "in.nrrd").read_bytes().split(b"\n\n", 1)
    more = f"# {CANARY}\ncontent: {CANARY}\npatient:={CANARY}".encode()
    (here / "in.nrrd").write_bytes(head + b"\n" + more + b"\n\n" + voxels)
    return "in.nrrd"


def metaimage(world, here):
    save_volume(load_volume(world / "ct.nii.gz"), here / "in.mha")
    content = (here / "in.mha").read_bytes()
    (here / "in.mha").write_bytes(content.replace(b"NDims", f"Name = {CANARY}\nPatient = {CANARY}\nNDims".encode(), 1))
    return "in.mha"


def npz(world, here):
    data = np.asarray(nib.load(world / "ct.nii.gz").dataobj).T
    np.savez(here / "in.npz", hu=data, patient=np.array(CANARY.encode()))
    return "in.npz"


def pictures(suffix):
    def make(world, here):
        from PIL import Image, PngImagePlugin

        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24), dtype=np.uint8))
        notes = PngImagePlugin.PngInfo()
        notes.add_text("Comment", CANARY)
        more = {"pnginfo": notes} if suffix == ".png" else {"tiffinfo": {270: CANARY, 315: CANARY}}
        image.save(here / f"in{suffix}", **more)
        return f"in{suffix}"

    return make


def dicom(world, here):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
    save_volume(load_volume(world / "ct.nii.gz", modality="CT"), here / CANARY / ".." / "in.dcm")
    names = ("PatientName", "PatientID", "StudyDescription", "SeriesDescription", "ImageComments", "InstitutionName")
    names += ("ReferringPhysicianName", "PatientComments", "AccessionNumber", "StudyID", "ProtocolName", "StationName")
    (here / CANARY).mkdir()
    for file in (here / "in.dcm").iterdir():
        data = pydicom.dcmread(file)
        for name in names:
            setattr(data, name, CANARY)
        data.add_new((0x0009, 0x0010), "LO", CANARY)
        data.save_as(here / CANARY / file.name)
    shutil.rmtree(here / "in.dcm")
    return CANARY  # the folder of a patient has that name as well


def enhanced(world, here):
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    from enhanced_cases import enhanced, save

    stored = np.random.default_rng(0).integers(0, 3000, (4, 24, 20))
    save(here / "in.dcm", enhanced(stored, shared_rescale=True, PatientName=CANARY, PatientID=CANARY))
    return "in.dcm"


def measurement(world, here):
    shutil.copy(world / "m.h5", here / "in.h5")
    with h5py.File(here / "in.h5", "r+") as file:
        file.attrs["patient"] = CANARY
        file["y"].attrs["patient"] = CANARY
    return "in.h5"


def ismrmrd(world, here):
    k = np.random.default_rng(0).normal(size=(2, 1, 40, 24)) + 0j
    header = xml((40, 24, 1), (40, 24, 4), (20, 24, 4)).replace("DOE", CANARY).replace("CANARY<", f"{CANARY}<")
    write(here / "in.h5", lines_of(k), header)
    return "in.h5"


SOURCES = {
    "NIfTI": (nifti, SCAN),
    "NRRD": (nrrd, BLUR),
    "MetaImage": (metaimage, BLUR),
    "npz": (npz, SCAN),
    "PNG": (pictures(".png"), BLUR),
    "TIFF": (pictures(".tif"), BLUR),
    "DICOM": (dicom, SCAN),
    "enhanced DICOM": (enhanced, BLUR),
    "measurement": (measurement, ("--solver", "fbp")),
    "ISMRMRD": (ismrmrd, ("--solver", "cgls")),
}


def everything(path):
    """All bytes of a file, unpacked where it is packed."""
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return content + b"".join(archive.read(name) for name in archive.namelist())
    return content + (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else b"")


def new_files(here, before):
    return [p for p in here.rglob("*") if p.is_file() and p not in before]


@pytest.mark.parametrize("kind", SOURCES)
def test_no_free_text_reaches_an_output(world, here, run, caplog, kind):
    caplog.set_level(logging.DEBUG)
    make, options = SOURCES[kind]
    source = make(world, here)
    caplog.clear()
    before = set(here.rglob("*"))
    assert any(CANARY.encode() in everything(p) for p in before if p.is_file())
    for out in ("r.nii.gz", "r2.nrrd", "r3.mha", "r4.npz", "r5.tif"):
        code, said, err = run("reconstruct", source, *options, "-o", out, *(("--json",) if out == "r2.nrrd" else ()))
        assert code == 0, err
        assert CANARY not in said + err + caplog.text
    files = new_files(here, before)
    assert len(files) == 15 and [p for p in files if CANARY.encode() in everything(p)] == []
    assert not [p for p in files if CANARY in p.name]


def test_no_free_text_is_in_refusals(world, here, run, caplog):
    caplog.set_level(logging.DEBUG)
    for make in (nifti, nrrd, metaimage, measurement):
        name = make(world, here)
        whole = (here / name).read_bytes()
        for end in range(100, len(whole), max(1, len(whole) // 12)):
            (here / name).write_bytes(whole[:end])
            code, out, err = run("reconstruct", name, *((*SCAN,) if make is not measurement else ("--solver", "fbp")))
            assert code in (2, 3) and CANARY not in out + err + caplog.text, err


def test_nor_in_measurements_and_checkpoints(world, here, run, monkeypatch):
    source = nifti(world, here)
    before = set(here.rglob("*"))
    assert run("simulate", source, "--op", "ct-sparse", "--views", "12", "-o", "m.h5")[0] == 0

    def stop(self, name, step, steps, info):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Bar, "__call__", stop)
    args = (source, *SCAN[:-1], "pnp", "--prior", "$/prior", "--steps", "3", "-o", "r.nii.gz")
    assert run("reconstruct", *args)[0] == 130
    files = new_files(here, before)
    assert sorted(p.name for p in files) == ["m.h5", "r.checkpoint.safetensors"]
    assert [p for p in files if CANARY.encode() in p.read_bytes()] == []
    assert (here / "r.checkpoint.safetensors").stat().st_mode & 0o777 == 0o600
