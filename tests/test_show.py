"""``operators show``: the facts are right, the picture shows the scan that is measured, and bad options are refused."""

import json
import logging
import math

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

from invdiff.drawing import draw
from invdiff.drawing_ct import detector, frame
from invdiff.operators import OPERATORS, build, geometry
from invdiff.operators.fan import FanGeometry
from invdiff.operators.rays import ParallelGeometry, equispaced
from invdiff.overview import overview


@pytest.fixture
def facts(run):
    def call(*args):
        code, out, err = run("operators", "show", *args, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


def test_the_table_stays(run):
    code, out, _ = run("operators")
    assert code == 0 and [line.split(":")[0] for line in out.splitlines() if line[0] != " "] == list(OPERATORS)
    assert "axis_offset" in out and "gaussian[3d]:SIGMA" in out


def test_every_operator_is_shown_in_words_and_drawn(run, here):
    for name in OPERATORS:
        code, out, err = run(
            "operators", "show", name, "--shape", "4,24,20", "--pixel-mm", "2,1.5", "-o", f"{name}.png"
        )
        assert (code, err) == (0, "") and out.startswith(f"{name}: {OPERATORS[name].summary}\n")
        assert "4 slices of 24 x 20 pixels of 2 x 1.5 mm, every 3 mm" in out
        image = imread(here / f"{name}.png")
        assert image.shape == (930, 1650, 4) and np.ptp(image[..., :3]) > 0.7
    code, _, err = run("operators", "show", "blur", "-o", "blur.png")
    assert code == 2 and "exists already" in err and "--overwrite" in err
    assert run("operators", "show", "blur", "-o", "blur.png", "--overwrite")[0] == 0


def test_sizes_and_shares(facts):
    small = ("--shape", "4,24,20", "--pixel-mm", "1.5")
    ct = facts("ct-sparse", *small, "--views", "30", "--detector-count", "41", "--detector-pitch", "1.5")
    assert (ct["image"], ct["measurement"], ct["spacing_mm"]) == ([4, 1, 24, 20], [4, 1, 30, 41], [1.5, 1.5, 1.5])
    assert ct["ratio"] == pytest.approx(30 * 41 / 480) and ct["options"]["detector_pitch"] == 1.5
    assert ct["field_of_view_mm"] == pytest.approx(41 * 1.5) and ct["rays_missed"] == 0 and ct["missing_deg"] == []
    mask = facts("inpaint", *small, "--mask", "random:0.25")
    assert mask["ratio"] == pytest.approx(0.75) and mask["measured"] == "75 % of the pixels"
    assert facts("sr", *small)["measurement"] == [4, 1, 12, 10] and facts("sr", *small)["ratio"] == 0.25
    thick = facts("sr", *small, "--axis", "through-plane")
    assert thick["measurement"] == [2, 1, 24, 20] and thick["ratio"] == 0.5
    whole = facts("blur", *small[:3], "3,1,1", "--kernel", "gaussian3d:0.8", "--set", "operator.unit=mm")
    assert whole["kernel"] == "3 x 7 x 7 pixels, sum 1, boundary reflect" and whole["image"] == [4, 1, 24, 20]


def test_what_a_scan_misses(facts):
    fan = facts("ct-limited", "--geometry", "fan", "--arc", "120", "--views", "40", "--set", "operator.start=10")
    assert fan["missing_deg"] == [pytest.approx([10 + 120 - 1.5, 10 + 180 - 1.5])]
    one = facts("ct-limited", "--arc", "90", "--set", "operator.start=-30")
    assert sum(b - a for a, b in one["missing_deg"]) == pytest.approx(90)
    assert one["missing_deg"][0][0] == pytest.approx(59.5)
    small = facts("ct-sparse", "--geometry", "fan", "--detector-count", "101", "--sod", "600", "--sdd", "1000")
    pitch = 1.9 * 1000 / 600
    assert small["field_of_view_mm"] == pytest.approx(2 * 600 * math.sin(math.atan(101 * pitch / 2 / 1000)))
    assert small["rays_missed"] > 0.5 and "miss the detector" in small["notes"][0]
    assert "Opposite views pair up: 30 directions" in small["description"]
    odd = facts("ct-sparse", "--geometry", "fan", "--views", "61")
    assert "pair up" not in odd["description"]


def test_the_grid_of_a_volume(facts, world):
    like = facts("sr", "--like", world / "ct.nii.gz")
    assert like["image"] == [5, 1, 36, 40] and like["spacing_mm"] == pytest.approx([3, 9, 9])
    assert nib.load(world / "ct.nii.gz").shape == (40, 36, 5)


@pytest.mark.parametrize(
    "scan",
    [
        ("ct-sparse", "--geometry", "fan", "--views", "9", "--detector-count", "31", "--set", "operator.start=20"),
        ("ct-sparse", "--geometry", "cone", "--views", "8"),
        ("mri-multicoil", "--coils", "3"),
        ("inpaint", "--mask", "box:5"),
        ("sr", "--axis", "through-plane", "--slices", "0:4"),
    ],
)
def test_a_measurement_file_is_shown_as_the_operator_that_made_it(run, facts, here, scan):
    source = () if scan[0] == "mri-multicoil" else ("$/ct.nii.gz",)
    assert run("simulate", *source, "--op", *scan, "-o", "scan.h5", "--quiet")[0] == 0
    grid = ("--shape", "16,192,192") if not source else ("--like", "$/ct.nii.gz")
    if "--slices" in scan:
        scan, grid = scan[:-2], ("--shape", "4,36,40", "--pixel-mm", "3,9,9")
    of_file, expected = facts("scan.h5"), facts(*scan, *grid)
    assert of_file.pop("file") == "scan.h5"
    options = expected.pop("options")
    assert of_file["options"] and all(options[k] in (None, v) for k, v in of_file.pop("options").items())
    assert of_file == expected
    code, out, err = run("operators", "show", "scan.h5", "-o", "scan.png")
    assert (code, err) == (0, "") and out.startswith(f"scan.h5: {scan[0]}: {OPERATORS[scan[0]].summary}\n")
    assert np.ptp(imread(here / "scan.png")[..., :3]) > 0.7


def test_options_beside_a_measurement_file_are_refused(refused):
    for name in ("--views", "--factor", "--shape", "--pixel-mm"):
        refused(2, f"m.h5: the file fixes operator and grid; drop {name[2:]}", "operators", "show", "$/m.h5", name, "4")
    refused(2, "drop axis-offset", "operators", "show", "$/m.h5", "--set", "operator.axis_offset=1")
    refused(3, "none.h5: no such file", "operators", "show", "none.h5")
    refused(2, "end it in .png", "operators", "show", "$/m.h5", "-o", "m.h5")


def test_a_warning_is_printed_once(run, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "invdiff")
    monkeypatch.setattr(logging.getLogger("invdiff"), "propagate", False)  # else pytest, not stderr, has the log
    monkeypatch.setattr(geometry, "_announced", set())
    code, out, err = run("operators", "show", "ct-sparse", "--geometry", "fan", "--detector-count", "101")
    assert code == 0 and (out + err).count("the detector is too small for the slice") == 1
    monkeypatch.setattr(geometry, "_announced", set())
    scan = ("$/ct.nii.gz", "--op", "ct-sparse", "--views", "8", "--detector-count", "21")
    code, out, err = run("reconstruct", *scan, "--simulate", "--solver", "fbp", "-o", "r.nii.gz")
    assert code == 0 and (out + err).count("the detector is too small for the slice") == 1
    assert out.index("the detector is too small") < out.index("PSNR")


@pytest.mark.parametrize(
    ("code", "words", "args"),
    [
        (2, "unknown operator 'ct'", ("ct",)),
        (2, "--shape '4'|H,W or S,H,W", ("blur", "--shape", "4")),
        (2, "--shape '4,x'", ("blur", "--shape", "4,x")),
        (2, "--pixel-mm '0'|positive", ("blur", "--pixel-mm", "0")),
        (2, "drop --shape", ("blur", "--like", "$/ct.nii.gz", "--shape", "4,4")),
        (2, "end it in .png", ("blur", "-o", "x.jpg")),
        (2, "nothing is solved here", ("blur", "--set", "solver.lam=1")),
        (2, "no option 'arc'", ("ct-sparse", "--arc", "90")),
        (2, "inside the circle", ("ct-sparse", "--geometry", "fan", "--sod", "200")),
        (2, "look like radians", ("ct-limited", "--arc", "3.14159")),
        (3, "does not exist", ("blur", "--like", "none.nii")),
    ],
)
def test_refusals(refused, code, words, args):
    refused(code, words, "operators", "show", *args)


@pytest.mark.parametrize("axis", [0.0, 7.0])
@pytest.mark.parametrize("kind", ["parallel", "flat", "curved", "clockwise"])
def test_what_is_drawn_lies_on_the_rays(kind, axis):
    """Every element as drawn is on its ray beyond the axis, and so is the source."""
    angles = equispaced(7, 360, 20)
    g = ParallelGeometry(angles, 12, 2.0, 0.7, axis)
    if kind != "parallel":
        turn, shape = ("clockwise", "flat") if kind == "clockwise" else ("counterclockwise", kind)
        g = FanGeometry(angles, 12, 2.0, 40.0, 70.0, shape, 0.7, turn, axis)
    for view in range(7):
        rays = g.rays(view, view + 1).numpy()
        along, across, source = frame(g, view)
        edges = detector(g, view, 50.0, count=25)[1::2]  # 25 points from edge to edge: every other one is an element
        offset = edges - rays[:, :2]
        assert abs(offset[:, 0] * rays[:, 3] - offset[:, 1] * rays[:, 2]).max() < 1e-9
        assert (offset * rays[:, 2:]).sum(1).min() > 10 and abs(along @ across) < 1e-12
        if source is not None:
            offset = source - rays[:, :2]
            assert abs(offset[:, 0] * rays[:, 3] - offset[:, 1] * rays[:, 2]).max() < 1e-9


def test_pictures_of_odd_cases(here):
    np.save("edges.npy", np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]], float))
    keep = np.ones((3, 8, 8))
    keep[1, 2:4] = 0
    np.save("keep.npy", keep)
    cases = (
        ("blur", {"kernel": "edges.npy"}),
        ("inpaint", {"mask": "keep.npy"}),
        ("ct-sparse", {"views": 1, "geometry": "fan"}),
        ("ct-sparse", {"detector_count": 3, "detector_offset": 50.0}),
        ("sr", {"factor": 8, "filter": "average"}),
        ("sr", {"factor": 1}),
    )
    for number, (name, options) in enumerate(cases):
        draw(overview(name, (3, 8, 8), (2.0, 1.0, 1.5), **options), here / f"{number}.png")
    assert build("ct-sparse", (8, 8), 1.0, detector_count=3, detector_offset=50.0).geometry.field_of_view_mm == 0
