"""Raw k-space of fastMRI and BART: read where and as it is, refused where it is not."""

import h5py
import numpy as np
import pytest

from invdiff.errors import InputError
from invdiff.raw import is_raw, load_raw

SLICES, H, W = 3, 64, 40
HEADER = """<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>
<encodedSpace><matrixSize><x>128</x><y>48</y><z>1</z></matrixSize>
<fieldOfView_mm><x>128</x><y>30</y><z>4.5</z></fieldOfView_mm></encodedSpace>
<reconSpace><matrixSize><x>32</x><y>32</y><z>1</z></matrixSize>
<fieldOfView_mm><x>64</x><y>30</y><z>4.5</z></fieldOfView_mm></reconSpace></encoding></ismrmrdHeader>"""


def centred(transform, x):
    return np.fft.fftshift(transform(np.fft.ifftshift(x, (-2, -1)), norm="ortho"), (-2, -1))


@pytest.fixture
def image():
    """Smooth complex images, off centre, in the middle half of an oversampled readout, with a little noise."""
    rng = np.random.default_rng(0)
    row, column = np.arange(2 * H)[:, None], np.arange(W)
    blob = np.exp(-((row - 60) ** 2 + (column - 17) ** 2) / 72) * np.exp(0.1j * column)
    x = blob * (1 + np.arange(SLICES))[:, None, None]
    return x + 0.01 * (rng.normal(size=x.shape) + 1j * rng.normal(size=x.shape))


@pytest.fixture
def fastmri(tmp_path, image):
    path = tmp_path / "file1.h5"
    with h5py.File(path, "w") as file:
        file["kspace"], file["ismrmrd_header"] = centred(np.fft.fft2, image).astype(np.complex64), HEADER
        file.attrs["patient_id"], file.attrs["max"] = "DOE", 1.0
    return path


def bart(path, kspace, dims):
    """``kspace`` ``(slices, coils, H, W)`` as BART writes it."""
    kspace.transpose(2, 3, 1, 0).astype("<c8").ravel(order="F").tofile(path.with_suffix(".cfl"))
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + " \n# Command\nbart x\n")
    return path.with_suffix(".cfl")


def recovered(measurement):
    """Images of a single coil."""
    return centred(np.fft.ifft2, measurement.y[:, 0] + 1j * measurement.y[:, 1])


def test_fastmri_is_cropped_and_has_its_pixels(fastmri, image):
    assert is_raw(fastmri)
    m = load_raw(fastmri)
    assert m.operator["name"] == "mri" and m.y.shape == (SLICES, 2, H, W)
    np.testing.assert_allclose(recovered(m), image[:, H // 2 : H // 2 + H], atol=1e-5)
    voxel = np.linalg.norm(np.array(m.volume["affine"])[:3, :3], axis=0)
    np.testing.assert_allclose(voxel, [30 / W, 1, 4.5])
    assert m.noise["std"] == pytest.approx(0.01, rel=0.2) and "DOE" not in repr((m.volume, m.operator, m.noise))


def test_only_the_slices_asked_for_are_read(fastmri, image):
    m = load_raw(fastmri, (1, 3))
    np.testing.assert_allclose(recovered(m), image[1:, H // 2 : H // 2 + H], atol=1e-5)
    assert (m.volume["first_slice"], m.volume["slices_of_scan"]) == (1, SLICES)
    with pytest.raises(InputError, match="0 <= A < B <= 3"):
        load_raw(fastmri, (2, 4))


def test_raw_files_are_reconstructed_as_they_are(fastmri, run, here):
    code, out, err = run("reconstruct", fastmri, "--solver", "cgls", "--slices", "1:2", "-o", "r.nii.gz")
    assert code == 0 and "DOE" not in out + err + (here / "r.json").read_text(), err


def test_bart_is_read_in_its_order(tmp_path, image):
    x = image[:, None, H // 2 : H // 2 + H]
    path = bart(tmp_path / "a", centred(np.fft.fft2, x), (H, W, *[1] * 11, SLICES, 1, 1))
    assert is_raw(path)
    np.testing.assert_allclose(recovered(load_raw(path)), x[:, 0], atol=1e-5)
    np.testing.assert_allclose(recovered(load_raw(path, (2, 3))), x[2:, 0], atol=1e-5)


def test_several_coils(tmp_path, image):
    pytest.importorskip("sigpy", reason="sigpy is not installed")
    from invdiff.operators.mri import birdcage_maps

    x = image[:1, None, H // 2 : H // 2 + H] * birdcage_maps((H, W), 3)
    m = load_raw(bart(tmp_path / "a", centred(np.fft.fft2, x), (H, W, 1, 3)))
    assert m.operator["name"] == "mri-multicoil" and m.y.shape == (1, 6, H, W)
    found = centred(np.fft.ifft2, m.y[:, :3] + 1j * m.y[:, 3:])
    np.testing.assert_allclose(found, x, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "DOCTYPE"),
        ("<a>", "no XML"),
        ("<a/>", "no encodedSpace/matrixSize"),
        (HEADER.replace("<x>128</x>", "<x>-1</x>"), "with positive x, y, z"),
        (HEADER.replace("<x>128</x>", "<x>wide</x>"), "with positive x, y, z"),
    ],
)
def test_bad_headers_are_refused(fastmri, text, words):
    with h5py.File(fastmri, "a") as file:
        del file["ismrmrd_header"]
        file["ismrmrd_header"] = text
    with pytest.raises(InputError, match=words) as caught:
        load_raw(fastmri)
    assert "\n" not in str(caught.value) and fastmri.name in str(caught.value)


def test_bad_kspace_is_refused(fastmri, tmp_path):
    (tmp_path / "other.h5").write_bytes(fastmri.read_bytes())
    changes = {
        "link to elsewhere": lambda file: file.__setitem__("kspace", h5py.ExternalLink("other.h5", "kspace")),
        "not complex": lambda file: file.create_dataset("kspace", data=np.zeros((2, 3, 4))),
        "kspace declares 80 GB": lambda file: file.create_dataset(
            "kspace", (10**4, 10**3, 10**3), "c8", chunks=(1, 10, 10)
        ),
        "incomplete": lambda file: file.create_dataset("kspace", (3, 40, 40), "c8"),
    }
    for words, change in changes.items():
        with h5py.File(fastmri, "a") as file:
            del file["kspace"]
            change(file)
        with pytest.raises(InputError, match=words):
            load_raw(fastmri)
    content = (tmp_path / "other.h5").read_bytes()
    fastmri.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError):
        load_raw(fastmri)


def test_bad_bart_files_are_refused(tmp_path, image):
    x = image[:1, None, :H]
    for dims, words in (
        ((H, W + 1), "its header says"),
        ((H, 0), "has dimensions"),
        ((H, -W), "has dimensions"),
        ((H // 2, W, 2), "along dimension 2"),
        ((H, W, *[1] * 15), "has dimensions"),
    ):
        path = bart(tmp_path / "a", x, dims)
        with pytest.raises(InputError, match=words):
            load_raw(path)
    (tmp_path / "a.hdr").unlink()
    with pytest.raises(InputError, match="needs both"):
        load_raw(path)
