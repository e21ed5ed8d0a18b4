"""ISMRMRD: lines where their counters put them, noise as large as in the image; else it is refused."""

import h5py
import numpy as np
import pytest
from ismrmrd_cases import CALIBRATION, NAVIGATOR, NOISE, acquisition, lines_of, write, xml

from invdiff.errors import InputError
from invdiff.raw import is_raw, load_raw

SLICES, H, W = 3, 64, 40
RNG = np.random.default_rng(0)


def centred(transform, x):
    return np.fft.fftshift(transform(np.fft.ifftshift(x, (-2, -1)), norm="ortho"), (-2, -1))


def picture():
    """Smooth complex images ``(slices, 1, 2 H, W)`` in the middle half of an oversampled readout, a little noisy."""
    row, column = np.arange(2 * H)[:, None], np.arange(W)
    blob = np.exp(-((row - 60) ** 2 + (column - 17) ** 2) / 72) * np.exp(0.1j * column)
    x = blob * (1 + np.arange(SLICES))[:, None, None, None]
    return x + 0.01 * (RNG.normal(size=x.shape) + 1j * RNG.normal(size=x.shape))


IMAGE = picture()
KSPACE = centred(np.fft.fft2, IMAGE)
INNER = IMAGE[:, 0, H // 2 : H // 2 + H]


def recovered(m):
    return centred(np.fft.ifft2, m.y[:, 0] + 1j * m.y[:, 1])


def test_lines_lie_where_their_counters_say(tmp_path):
    path = write(tmp_path / "a.h5", lines_of(KSPACE))
    assert is_raw(path)
    m = load_raw(path)
    assert m.operator["name"] == "mri" and m.y.shape == (SLICES, 2, H, W)
    np.testing.assert_allclose(recovered(m), INNER, atol=1e-5)
    # read along +y (posterior), phase along +x (left), slices along +z of LPS+; the middle of slice 0 at (3, -2, 10)
    affine = np.array(m.volume["affine"])
    np.testing.assert_allclose(affine @ [W // 2, H // 2, 0, 1], [-3, 2, 10, 1], atol=1e-5)
    np.testing.assert_allclose(affine[:3, :3], np.diag([-30 / W, -1, 4.5]), atol=1e-5)
    assert "DOE" not in repr(vars(m)) and "CANARY" not in repr(vars(m))


def test_only_the_slices_asked_for(tmp_path):
    path = write(tmp_path / "a.h5", lines_of(KSPACE))
    m = load_raw(path, (1, 2))
    np.testing.assert_allclose(recovered(m), INNER[1:2], atol=1e-5)
    assert (m.volume["first_slice"], m.volume["slices_of_scan"]) == (1, SLICES)
    np.testing.assert_allclose((np.array(m.volume["affine"]) @ [W // 2, H // 2, 0, 1])[2], 14.5, atol=1e-5)
    with pytest.raises(InputError, match="slices 2:9: there are 3"):
        load_raw(path, (2, 9))


def test_slices_are_sorted_by_position(tmp_path):
    lines = lines_of(KSPACE, spacing=-4.5)
    m = load_raw(write(tmp_path / "a.h5", lines))
    np.testing.assert_allclose(recovered(m), INNER[::-1], atol=1e-5)
    assert np.array(m.volume["affine"])[2, 2] == pytest.approx(4.5)


def test_a_centre_of_its_own_and_partial_lines(tmp_path):
    """Lines counted from a centre at 12, of which 12 to 31 were measured; an early echo of which 100 of 128 samples."""
    lines = [
        acquisition(KSPACE[s, :, 28:, row], slice=s, kspace_encode_step_1=row - 8, center_sample=36)
        for s in range(SLICES)
        for row in range(8, W)
    ]
    m = load_raw(write(tmp_path / "a.h5", lines, xml(centre=12)))
    expected = KSPACE.copy()
    expected[:, :, :28], expected[..., :8] = 0, 0
    np.testing.assert_allclose(recovered(m), centred(np.fft.ifft2, expected)[:, 0, H // 2 : H // 2 + H], atol=1e-5)
    assert not m.arrays["mask"][:, :8].any() and m.arrays["mask"][:, 8:].all()


def test_discarded_samples_are_not_used(tmp_path):
    wide = np.pad(KSPACE, ((0, 0), (0, 0), (3, 5), (0, 0)), constant_values=99)
    m = load_raw(write(tmp_path / "a.h5", lines_of(wide, center_sample=67, discard_pre=3, discard_post=5)))
    np.testing.assert_allclose(recovered(m), INNER, atol=1e-5)


def test_averages_are_averaged_and_other_lines_left_out(tmp_path):
    apart = 0.5 * KSPACE
    lines = lines_of(KSPACE + apart, average=0) + lines_of(KSPACE - apart, average=1)
    other = [acquisition(np.full((1, 128), 9), flags=flag, slice=1) for flag in (NAVIGATOR, CALIBRATION)]
    m = load_raw(write(tmp_path / "a.h5", other + lines + other))
    np.testing.assert_allclose(recovered(m), INNER, atol=1e-5)
    embedded = xml(more="<parallelImaging><calibrationMode>embedded</calibrationMode></parallelImaging>")
    with pytest.raises(InputError, match="averages, or none"):
        load_raw(write(tmp_path / "b.h5", other + lines, embedded))
    with pytest.raises(InputError, match=r"lines of \[1, 2\] averages"):
        load_raw(write(tmp_path / "b.h5", [*lines_of(KSPACE), acquisition(KSPACE[0, :, :, 3], kspace_encode_step_1=3)]))


@pytest.mark.parametrize("averages", [1, 4])
def test_the_noise_scan_whitens_the_image(tmp_path, averages):
    """Noise of 0.01 per part in the image, in a scan of four times the bandwidth, of which a filter takes a fifth."""
    level = 0.01 * np.sqrt(averages) * np.sqrt(4 * 0.8)
    scan = level * (RNG.normal(size=(1, 50000)) + 1j * RNG.normal(size=(1, 50000)))
    noise = [acquisition(scan[:, n : n + 500], flags=NOISE, sample_time_us=1.25) for n in range(0, 50000, 500)]
    lines = [line for n in range(averages) for line in lines_of(KSPACE, average=n)]
    m = load_raw(write(tmp_path / "a.h5", noise + lines))
    assert m.noise["estimated"] is False
    np.testing.assert_allclose(recovered(m), INNER / (0.01 * np.sqrt(2)), rtol=0.02, atol=0.05)


def test_several_coils(tmp_path):
    pytest.importorskip("sigpy", reason="sigpy is not installed")
    from invdiff.operators.mri import birdcage_maps

    x = IMAGE[:1] * birdcage_maps((2 * H, W), 3)
    m = load_raw(write(tmp_path / "a.h5", lines_of(centred(np.fft.fft2, x))))
    assert m.operator["name"] == "mri-multicoil" and m.y.shape == (1, 6, H, W)
    found = centred(np.fft.ifft2, m.y[:, :3] + 1j * m.y[:, 3:])
    np.testing.assert_allclose(found, x[:, :, H // 2 : H // 2 + H], atol=1e-5)


def changed(n, **head):
    lines = lines_of(KSPACE)
    for name, value in head.items():
        (lines[n]["head"]["idx"] if name in ("contrast", "kspace_encode_step_1") else lines[n]["head"])[name] = value
    return lines


REFUSED = {
    "slabs": (lines_of(KSPACE), xml((128, 40, 8)), "3 slabs or slices of 8 partitions"),
    "unknown": (lines_of(KSPACE), xml(trajectory="rosette"), "trajectory 'rosette', which is not known"),
    "contrasts": (changed(5, contrast=1), None, "2 values of 'contrast', several images of a slice"),
    "outside": (changed(5, kspace_encode_step_1=400), None, "acquisition 5 lies outside the encoded matrix"),
    "centre": (changed(5, center_sample=100), None, "acquisition 5 lies outside"),
    "samples": (changed(5, number_of_samples=127), None, "acquisition 5 holds 256 numbers, its header says 254"),
    "declares": (changed(5, number_of_samples=65535, active_channels=60000), None, "declares .* MB in a file of"),
    "coils": (changed(5, active_channels=2, number_of_samples=64), None, r"lines of \[1, 2\] coils"),
    "discards": (changed(5, discard_pre=200), None, "acquisition 5 lies outside"),
    "nothing": ([acquisition(np.ones((1, 128)), flags=NOISE)], None, "holds no lines of an image"),
    "matrix": (lines_of(KSPACE), xml((128.5, 40, 1)), "encoded matrix of"),
    "uneven": (
        [
            acquisition(KSPACE[0, :, :, r], slice=s, kspace_encode_step_1=r, position=(0, 0, s * s))
            for s in range(3)
            for r in range(W)
        ],
        None,
        "uneven distances",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_kspace_is_refused(tmp_path, case):
    lines, header, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as caught:
        load_raw(write(tmp_path / "a.h5", lines, header))
    assert "\n" not in str(caught.value) and "a.h5" in str(caught.value)


def test_the_command_reads_it_and_names_nobody(tmp_path, run, here):
    path = write(here / "a.h5", lines_of(KSPACE))
    code, out, err = run("reconstruct", path, "--solver", "cgls", "--slices", "1:2", "-o", "r.nii.gz")
    said = out + err + (here / "r.json").read_text()
    assert code == 0 and "DOE" not in said and "CANARY" not in said, err


def test_what_the_package_of_the_format_writes(tmp_path):
    ismrmrd = pytest.importorskip("ismrmrd", reason="ismrmrd is not installed")
    with ismrmrd.Dataset(str(tmp_path / "a.h5"), "dataset", True) as file:
        file.write_xml_header(xml().encode())
        for line in lines_of(KSPACE):
            head = line["head"]
            one = ismrmrd.Acquisition.from_array(
                KSPACE[head["idx"]["slice"], :, :, head["idx"]["kspace_encode_step_1"]]
            )
            one.idx.slice, one.idx.kspace_encode_step_1 = head["idx"]["slice"], head["idx"]["kspace_encode_step_1"]
            one.center_sample, one.sample_time_us = 64, 5.0
            for name in ("position", "read_dir", "phase_dir", "slice_dir"):
                getattr(one, name)[:] = head[name].tolist()
            file.append_acquisition(one)
    m = load_raw(tmp_path / "a.h5")
    np.testing.assert_allclose(recovered(m), INNER, atol=1e-5)
    with h5py.File(tmp_path / "a.h5") as theirs, h5py.File(write(tmp_path / "b.h5", lines_of(KSPACE))) as ours:
        assert theirs["dataset/data"].dtype == ours["dataset/data"].dtype
