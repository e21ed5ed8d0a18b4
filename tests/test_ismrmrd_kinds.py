"""ISMRMRD beyond lines of slices: partitions, trajectories in whatever unit, EPI; against closed forms and FFTs."""

import numpy as np
import pytest
from ismrmrd_cases import CORRECTION, NAVIGATOR, REVERSE, acquisition, epi, write, xml

from invdiff.errors import InputError, UsageError
from invdiff.ismrmrd_header import read_header
from invdiff.ismrmrd_shots import in_cycles_per_pixel
from invdiff.raw import load_raw

RNG = np.random.default_rng(0)
PARTITIONS, H, W = 8, 32, 20


def centred(transform, x, axes=(-2, -1)):
    return np.fft.fftshift(transform(np.fft.ifftshift(x, axes), axes=axes, norm="ortho"), axes)


VOLUME = RNG.normal(size=(PARTITIONS, 1, H, W)) + 1j * RNG.normal(size=(PARTITIONS, 1, H, W))
SPACE = centred(np.fft.fftn, VOLUME, (0, 2, 3))
SLAB = {"matrix": (H, W, PARTITIONS), "field": (64, 30, 24), "recon": (64, 30, 24)}


def slab_lines(space=SPACE, first=0, skip=lambda z, row: False, **head):
    head = {"position": (3, -2, 10), **head}
    return [
        acquisition(space[z, :, :, row], kspace_encode_step_1=row, kspace_encode_step_2=z - first, **head)
        for z in range(first, len(space))
        for row in range(W)
        if not skip(z, row)
    ]


def recovered(m):
    return centred(np.fft.ifft2, m.y[:, 0] + 1j * m.y[:, 1])


def test_partitions_become_slices(tmp_path):
    m = load_raw(write(tmp_path / "a.h5", slab_lines(), xml(**SLAB)))
    assert m.operator["name"] == "mri" and m.y.shape == (PARTITIONS, 2, H, W) and m.arrays["mask"].all()
    np.testing.assert_allclose(recovered(m), VOLUME[:, 0], atol=2e-6)
    affine = np.array(m.volume["affine"])  # 3 mm slices; slice 4 of 8 is the middle of the slab, at (3, -2, 10) in LPS
    np.testing.assert_allclose(affine @ [W // 2, H // 2, PARTITIONS // 2, 1], [-3, 2, 10, 1], atol=1e-5)
    np.testing.assert_allclose(affine[:3, :3], np.diag([-1.5, -2, 3]), atol=1e-6)


def test_part_of_a_slab_lies_where_it_is(tmp_path):
    m = load_raw(write(tmp_path / "a.h5", slab_lines(), xml(**SLAB)), (5, 7))
    np.testing.assert_allclose(recovered(m), VOLUME[5:7, 0], atol=2e-6)
    assert (m.volume["first_slice"], m.volume["slices_of_scan"]) == (5, PARTITIONS)
    np.testing.assert_allclose((np.array(m.volume["affine"]) @ [W // 2, H // 2, 0, 1])[:3], [-3, 2, 13], atol=1e-5)


def test_oversampled_partitions_are_cropped(tmp_path):
    m = load_raw(write(tmp_path / "a.h5", slab_lines(), xml(**SLAB | {"recon": (64, 30, 18)})))
    np.testing.assert_allclose(recovered(m), VOLUME[1:7, 0], atol=2e-6)
    np.testing.assert_allclose((np.array(m.volume["affine"]) @ [W // 2, H // 2, 3, 1])[2], 10, atol=1e-5)


def test_lines_may_be_undersampled_partitions_may_not(tmp_path):
    skip = lambda z, row: row % 3 == 1  # noqa: E731
    m = load_raw(write(tmp_path / "a.h5", slab_lines(skip=skip), xml(**SLAB)))
    expected = centred(np.fft.fft2, VOLUME)[:, 0]
    expected[..., 1::3] = 0
    np.testing.assert_allclose(m.y[:, 0] + 1j * m.y[:, 1], expected, atol=2e-6)
    corner = lambda z, row: z == 0 and row == 0  # noqa: E731
    with pytest.raises(InputError, match="encoded in 3D with 159 of 160 lines, undersampled along the partitions"):
        load_raw(write(tmp_path / "b.h5", slab_lines(skip=corner), xml(**SLAB)))
    with pytest.raises(InputError, match="140 of 160 lines, undersampled"):  # counted from a centre of its own
        load_raw(write(tmp_path / "c.h5", slab_lines(first=1), xml(**SLAB, centre_2=3)))
    with pytest.raises(InputError, match="lies outside the encoded matrix"):
        load_raw(write(tmp_path / "d.h5", slab_lines(), xml(**SLAB, centre_2=3)))


def test_averages_of_partitions(tmp_path):
    lines = slab_lines(SPACE + 0.3, average=0) + slab_lines(SPACE - 0.3, average=1)
    m = load_raw(write(tmp_path / "a.h5", lines, xml(**SLAB)))
    np.testing.assert_allclose(recovered(m), VOLUME[:, 0], atol=2e-6)


# An ellipse in mm: half axes along (read, phase), middle. Its Fourier transform is a b J1(2 pi q) / q exp(-2 pi i k c).
AXES, MIDDLE, SIDE, PIXEL = np.array([14.0, 9.0]), np.array([7.0, -11.0]), 32, 2.0


def ellipse(k_per_mm):
    from scipy.special import j1

    q = np.linalg.norm(k_per_mm * AXES, axis=-1)
    disc = np.where(q > 0, j1(2 * np.pi * q) / np.where(q > 0, q, 1), np.pi)
    return AXES.prod() * disc * np.exp(-2j * np.pi * (k_per_mm * MIDDLE).sum(-1)) / (PIXEL**2 * SIDE)


def spokes(count=50, samples=2 * SIDE):
    angle = np.pi * np.arange(count)[:, None] / count
    radius = (np.arange(samples) - samples // 2) / samples
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)  # cycles per pixel, (read, phase)


def spiral(count=16, samples=120):
    theta = np.linspace(0, 1, samples) * 2 * np.pi * 2 + 2 * np.pi * np.arange(count)[:, None] / count
    radius = 0.5 * np.linspace(0, 1, samples)
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], -1)


ROUND = {"matrix": (2 * SIDE, SIDE, 1), "field": (4 * SIDE, 2 * SIDE, 5), "recon": (2 * SIDE, 2 * SIDE, 5)}
UNITS = {  # what a cycle per pixel is in others
    "cycles per pixel": (1, 1),
    "radians per pixel": (2 * np.pi, 2 * np.pi),
    "cycles per field of view": (SIDE, SIDE),
    "cycles per encoded field of view": (2 * SIDE, SIDE),
    "1/m": (1000 / PIXEL, 1000 / PIXEL),
    "rad/m": (2000 * np.pi / PIXEL, 2000 * np.pi / PIXEL),
}


def shot_lines(k, unit=(1, 1), coils=(1,), **head):
    y = ellipse(k / PIXEL)
    level = 1e-4 * np.abs(y).max()
    lines = []
    for n, (points, samples) in enumerate(zip(k, y, strict=True)):
        values = np.array(coils)[:, None] * samples
        values = values + level * (RNG.normal(size=values.shape) + 1j * RNG.normal(size=values.shape))
        lines.append(acquisition(values, points * unit, kspace_encode_step_1=n, position=(3, -2, 10), **head))
    return lines


def world_middle(m):
    """Centre of mass of the zero-filled magnitude in LPS+ mm, and its integral."""
    pytest.importorskip("finufft", reason="finufft is not installed")
    import torch

    from invdiff.mri_case import mri_operator

    image = mri_operator(m.arrays, tuple(m.operator["shape"][1:])).pinv(torch.from_numpy(m.y))[0].numpy()
    weight = np.maximum(np.hypot(*image) - 0.5, 0)
    row, column = (np.sum(weight * index) / weight.sum() for index in np.indices(weight.shape))
    ras = np.array(m.volume["affine"]) @ [column, row, 0, 1]
    return ras[:3] * [-1, -1, 1], np.hypot(*image)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("kind", "k"), [("radial", spokes()), ("spiral", spiral())])
def test_a_trajectory_in_whatever_unit_shows_the_ellipse_where_it_is(tmp_path, unit, kind, k):
    m = load_raw(write(tmp_path / "a.h5", shot_lines(k, UNITS[unit]), xml(**ROUND, trajectory=kind)))
    assert m.operator["name"] == "mri-radial" and m.y.shape == (1, 2, *k.shape[:2])
    np.testing.assert_allclose(m.arrays["trajectory"], k, atol=1e-6)
    np.testing.assert_allclose(m.y[0, 0] + 1j * m.y[0, 1], ellipse(k / PIXEL), atol=1e-3 * np.abs(m.y).max())
    middle, image = world_middle(m)  # read along +y, phase along +x of LPS from (3, -2, 10)
    np.testing.assert_allclose(middle, [3 + MIDDLE[1], -2 + MIDDLE[0], 10], atol=0.3)
    inside = image[SIDE // 2 + 3, SIDE // 2 - 6]  # row = read: 7 mm = 3.5 pixels; column = phase: -11 mm
    assert inside == pytest.approx(1, abs=0.1) and image.shape == (SIDE, SIDE)


def test_slices_of_one_trajectory_and_of_several(tmp_path):
    k = spokes(20)
    lines = [line for s in range(3) for line in shot_lines(k, slice=s, coils=(1 + s,))]
    for line in lines:
        line["head"]["position"][2] = 10 + 5 * line["head"]["idx"]["slice"]
    path = write(tmp_path / "a.h5", lines[::-1], xml(**ROUND, trajectory="radial"))
    m = load_raw(path, (1, 3))
    expected = ellipse(k / PIXEL)
    for s, factor in enumerate((2, 3)):
        np.testing.assert_allclose(m.y[s, 0] + 1j * m.y[s, 1], factor * expected, atol=3e-3 * np.abs(expected).max())
    for line in lines[20:40]:
        line["traj"] = -line["traj"]
    path = write(tmp_path / "b.h5", lines, xml(**ROUND, trajectory="radial"))
    with pytest.raises(InputError, match="differ between slices or partitions; take one slice at a time"):
        load_raw(path)
    np.testing.assert_allclose(load_raw(path, (1, 2)).arrays["trajectory"], -k, atol=1e-6)


def test_a_stack_of_stars(tmp_path):
    k, factor = spokes(20), RNG.normal(size=4) + 1j * RNG.normal(size=4)
    partitions = centred(np.fft.fftn, factor, (0,))
    lines = [line for z in range(4) for line in shot_lines(k, coils=(partitions[z],), kspace_encode_step_2=z)]
    header = xml(**ROUND | {"matrix": (2 * SIDE, SIDE, 4)}, trajectory="goldenangle")
    m = load_raw(write(tmp_path / "a.h5", lines, header))
    expected = ellipse(k / PIXEL) * factor[:, None, None]
    np.testing.assert_allclose(m.y[:, 0] + 1j * m.y[:, 1], expected, atol=5e-3 * np.abs(expected).max())
    with pytest.raises(InputError, match="partitions of 0 to 20 shots"):
        load_raw(write(tmp_path / "b.h5", lines[20:], header))


def test_discarded_samples_and_a_third_coordinate_of_zero(tmp_path):
    k = spokes(20)
    wide = np.pad(k, ((0, 0), (2, 3), (0, 0)), mode="edge")
    wide = np.concatenate([wide, np.zeros_like(wide[..., :1])], -1)
    lines = [
        acquisition(np.pad(ellipse(k[n] / PIXEL), (2, 3), constant_values=99)[None], wide[n], discard_pre=2,
                    discard_post=3, kspace_encode_step_1=n)
        for n in range(20)
    ]  # fmt: skip
    m = load_raw(write(tmp_path / "a.h5", lines, xml(**ROUND, trajectory="radial")))
    np.testing.assert_allclose(m.arrays["trajectory"], k, atol=1e-6)
    np.testing.assert_allclose(m.y[0, 0] + 1j * m.y[0, 1], ellipse(k / PIXEL), atol=1e-5 * np.abs(m.y).max())


def test_coils_along_a_trajectory(tmp_path):
    pytest.importorskip("sigpy", reason="sigpy is not installed")
    pytest.importorskip("finufft", reason="finufft is not installed")
    m = load_raw(
        write(tmp_path / "a.h5", shot_lines(spokes(60), coils=(1, 2j, -0.5)), xml(**ROUND, trajectory="radial"))
    )
    assert m.y.shape == (1, 6, 60, 2 * SIDE)
    inside = m.arrays["maps"][0, :, SIDE // 2 + 3, SIDE // 2 - 6]
    np.testing.assert_allclose(inside / inside[0], [1, 2j, -0.5], atol=0.02)
    assert np.linalg.norm(inside) == pytest.approx(1, abs=1e-3)


def test_what_the_estimate_of_maps_lacks_is_not_called_damage(tmp_path):
    pytest.importorskip("finufft", reason="finufft is not installed")
    path = write(tmp_path / "a.h5", shot_lines(spokes(8), coils=(1, 2j)), xml(**ROUND, trajectory="radial"))
    with pytest.raises(UsageError, match=r"a\.h5: ESPIRiT .* needs a calibration square of 12 to 32 samples, got 5"):
        load_raw(path)


def test_images_of_coils_too_large_for_memory_are_refused(tmp_path):
    big = {"matrix": (30000, 30000, 1), "field": (30000, 30000, 5), "recon": (30000, 30000, 5)}
    path = write(tmp_path / "a.h5", shot_lines(spokes(8), coils=(1, 2j)), xml(**big, trajectory="radial"))
    with pytest.raises(InputError, match=r"declares 14\.4 GB of images of its coils"):
        load_raw(path)


def test_numbers_of_a_trajectory_that_nobody_asks_for(tmp_path):
    more = epi(FOVCoeff_2_cm=-12.5, comment="none")
    m = load_raw(write(tmp_path / "a.h5", shot_lines(spiral()), xml(**ROUND, trajectory="spiral", more=more)))
    np.testing.assert_allclose(m.arrays["trajectory"], spiral(), atol=1e-6)
    asked = xml(**ROUND, more=epi(rampUpTime=-1))
    with pytest.raises(InputError, match="the XML header has value '-1'"):
        read_header(asked.encode())


def test_a_trajectory_as_the_package_of_the_format_writes_it(tmp_path):
    ismrmrd = pytest.importorskip("ismrmrd", reason="ismrmrd is not installed")
    k = spokes(30)
    y = ellipse(k / PIXEL)
    with ismrmrd.Dataset(str(tmp_path / "a.h5"), "dataset", True) as file:
        file.write_xml_header(xml(**ROUND, trajectory="radial").encode())
        for n in range(len(k)):
            one = ismrmrd.Acquisition.from_array(y[n : n + 1].astype(np.complex64), k[n].astype(np.float32))
            one.idx.kspace_encode_step_1 = n
            file.append_acquisition(one)
    m = load_raw(tmp_path / "a.h5")
    np.testing.assert_allclose(m.arrays["trajectory"], k, atol=1e-6)
    np.testing.assert_allclose(m.y[0, 0] + 1j * m.y[0, 1], y, atol=1e-6 * np.abs(y).max())


def test_units_that_cannot_be_told():
    # pixels of 1000 mm would make 1/m and cycles per pixel the same; of 1050 mm they differ, and both fit
    same, near = (read_header(xml((32, 32, 1), (32 * mm, 32 * mm, 5), (32 * mm, 32 * mm, 5), "radial").encode())
                  for mm in (1000, 1050))  # fmt: skip
    k = spokes()
    np.testing.assert_array_equal(in_cycles_per_pixel(k, same), k)
    with pytest.raises(InputError, match=r"fits 1/m and cycles per pixel|fits cycles per pixel and 1/m"):
        in_cycles_per_pixel(0.95 * k, near)
    header = read_header(xml(**ROUND, trajectory="radial").encode())
    np.testing.assert_array_equal(in_cycles_per_pixel(1.008 * k, header)[0, 0], [0.496, 0])  # -0.504, one cycle on
    for scale in (0.6, 2.0, 77.0):
        with pytest.raises(InputError, match="which fits no unit that is in use for an encoded matrix of 64 x 32"):
            in_cycles_per_pixel(scale * k, header)
    oblong = read_header(xml((32, 64, 1), (64, 64, 5), (64, 64, 5), "radial").encode())
    with pytest.raises(InputError, match="fits no unit"):
        in_cycles_per_pixel(k, oblong)
    np.testing.assert_allclose(in_cycles_per_pixel(k * [32, 64], oblong), k)


EH, EW = 64, 40
ECHOES = RNG.normal(size=(1, EH, EW)) + 1j * RNG.normal(size=(1, EH, EW))  # (coils, readout, phase)


def reversed_lines(**head):
    """EPI: samples 1 to 62 of 64, every other line backwards in time; frequency 0 is sample 32, number 31 of those."""
    part = ECHOES[:, 1:63]
    forward = [
        acquisition(part[..., row], kspace_encode_step_1=row, center_sample=31, **head) for row in range(0, EW, 2)
    ]
    head |= {"flags": REVERSE, "center_sample": 31}  # of 62: as far from either end
    return forward + [acquisition(part[:, ::-1, row], kspace_encode_step_1=row, **head) for row in range(1, EW, 2)]


FLAT = {"matrix": (EH, EW, 1), "field": (64, 30, 3), "recon": (64, 30, 3), "trajectory": "epi"}
EXTRA = [acquisition(np.full((1, 62), 9), flags=flag) for flag in (CORRECTION, CORRECTION | REVERSE, NAVIGATOR)]


def test_lines_read_backwards_are_turned_round_and_corrections_left_out(tmp_path):
    path = write(tmp_path / "a.h5", EXTRA + reversed_lines(), xml(**FLAT))
    m = load_raw(path)
    expected = ECHOES.copy()
    expected[:, [0, 63]] = 0
    np.testing.assert_allclose(m.y[:, 0] + 1j * m.y[:, 1], expected, atol=1e-6)
    assert (m.operator["reversed_lines"], m.operator["correction_lines"]) == (EW // 2, 2)


def test_discards_turn_with_their_line(tmp_path):
    whole = np.where(np.arange(EH)[:, None] < 3, 99, ECHOES)
    lines = [
        acquisition(whole[:, ::-1, row] if row % 2 else whole[:, :, row], kspace_encode_step_1=row,
                    **({"flags": REVERSE, "discard_post": 3} if row % 2 else {"discard_pre": 3}))
        for row in range(EW)
    ]  # fmt: skip
    m = load_raw(write(tmp_path / "a.h5", lines, xml(**FLAT)))
    expected = ECHOES.copy()
    expected[:, :3] = 0
    np.testing.assert_allclose(m.y[:, 0] + 1j * m.y[:, 1], expected, atol=1e-6)


def test_the_run_says_that_ghosts_were_not_corrected(tmp_path, run, here):
    from invdiff.measurement_file import save_measurement

    path = write(here / "a.h5", EXTRA + reversed_lines(), xml(**FLAT))
    code, _, err = run("reconstruct", path, "--solver", "zero-filled", "-o", "r.nii.gz")
    said = (here / "r.json").read_text()
    assert code == 0 and "20 lines were read backwards (EPI)" in said and "the 2 lines for it" in said, err
    save_measurement(here / "m.h5", load_raw(path))
    assert run("reconstruct", here / "m.h5", "--solver", "zero-filled", "-o", "s.nii.gz")[0] == 0
    assert "20 lines were read backwards (EPI)" in (here / "s.json").read_text()


@pytest.mark.parametrize(
    ("times", "ramps"),
    [
        ({"rampUpTime": 100, "flatTopTime": 320, "acqDelayTime": 100, "numSamples": 32, "dwellTime": 10}, False),
        ({"rampUpTime": 100, "flatTopTime": 320, "acqDelayTime": 60, "numSamples": 32, "dwellTime": 10}, True),
        ({"rampUpTime": 100, "flatTopTime": 280, "acqDelayTime": 110, "numSamples": 32, "dwellTime": 10}, True),
        ({"rampUpTime": 100, "flatTopTime": 320, "numSamples": 32, "dwellTime": 10}, False),
        ({"rampUpTime": 100, "flatTopTime": 250, "numSamples": 32, "dwellTime": 10}, True),
        ({"rampUpTime": 0, "flatTopTime": 250, "acqDelayTime": 0, "numSamples": 32, "dwellTime": 10}, False),
        ({}, False),
    ],
)
def test_sampling_on_ramps_is_refused_by_name(tmp_path, times, ramps):
    path = write(tmp_path / "a.h5", reversed_lines(), xml(**FLAT, more=epi(**times)))
    if not ramps:
        assert load_raw(path).y.shape == (1, 2, EH, EW)
        return
    with pytest.raises(InputError, match="is EPI sampled on the ramps of its gradient"):
        load_raw(path)


def test_uneven_positions_along_lines_of_epi_are_refused(tmp_path):
    even = np.linspace(-0.5, 0.5, 62)[:, None]
    assert load_raw(write(tmp_path / "a.h5", reversed_lines(traj=even), xml(**FLAT))).y.any()
    with pytest.raises(InputError, match="EPI sampled unevenly along its lines"):
        load_raw(write(tmp_path / "b.h5", reversed_lines(traj=np.sin(3 * even)), xml(**FLAT)))


def shots_with(n=3, **head):
    lines = shot_lines(spokes(20))
    for name, value in head.items():
        lines[n][name if name == "traj" else "head"] = value if name == "traj" else lines[n]["head"]
        if name != "traj":
            lines[n]["head"][name] = value
    return lines


REFUSED = {
    "no trajectory": ([acquisition(np.ones((1, 64))) for _ in range(5)], r"has trajectories of \[0\] dimensions"),
    "one dimension": ([acquisition(np.ones((1, 64)), np.ones((64, 1)))], r"has trajectories of \[1\] dimensions"),
    "short": (shots_with(traj=np.zeros(10, np.float32)), "acquisition 3 has a trajectory of 10 numbers"),
    "NaN": (shots_with(traj=np.full(128, np.nan, np.float32)), "acquisition 3 has a trajectory of 128 numbers"),
    "lengths": (shots_with(discard_pre=5), "shots of 59 to 64 samples"),
    "all discarded": (shots_with(discard_pre=500), "shots of -436 to 64 samples"),
    "in space": (
        [acquisition(np.ones((1, 64)), np.pad(p, ((0, 0), (0, 1)), constant_values=0.3)) for p in spokes(20)],
        "trajectory in three dimensions",
    ),
    "zeros": ([acquisition(np.ones((1, 64)), np.zeros((64, 2))) for _ in range(5)], "fits no unit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_trajectories_that_are_not_understood(tmp_path, case):
    lines, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as caught:
        load_raw(write(tmp_path / "a.h5", lines, xml(**ROUND, trajectory="radial")))
    assert "\n" not in str(caught.value) and "a.h5" in str(caught.value)
