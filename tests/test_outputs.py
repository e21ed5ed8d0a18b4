"""Outputs of a run: checked before it starts, one writer at a time, and no name of a file too odd."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from invdiff.volume import load_volume, save_volume

ROOT = Path(__file__).resolve().parents[1]
SCAN = ("--op", "ct-sparse", "--views", "12", "--simulate", "--solver", "fbp")


@pytest.fixture
def unstarted(monkeypatch):
    """The run must not have started."""

    def too_late(*args):
        raise AssertionError("the run has started")

    monkeypatch.setattr("invdiff.runner.run_solver", too_late)


@pytest.mark.parametrize("taken", ["r.nii.gz", "r.json", "r.png", "r_std.nii.gz"])
def test_an_existing_output_is_refused_before_the_run(here, refused, unstarted, taken):
    (here / taken).write_text("old")
    refused(2, f"{taken}: exists already|--overwrite", "reconstruct", "$/ct.nii.gz", *SCAN, "-o", "r.nii.gz")


def test_an_output_that_is_the_input_by_another_name(here, world, refused, unstarted):
    content = (world / "ct.nii.gz").read_bytes()
    (here / "scan.nii.gz").write_bytes(content)
    os.link(here / "scan.nii.gz", here / "hard.nii.gz")
    (here / "soft.nii.gz").symlink_to("scan.nii.gz")
    for name in ("scan.nii.gz", "hard.nii.gz", "soft.nii.gz", "./../" + here.name + "/scan.nii.gz"):
        refused(2, "would overwrite the input", "reconstruct", "scan.nii.gz", *SCAN, "-o", name, "--overwrite")


def test_links_that_lead_nowhere_or_in_a_circle(here, refused, unstarted):
    (here / "circle.nii.gz").symlink_to("circle.nii.gz")
    refused(2, "circle.nii.gz", "reconstruct", "$/ct.nii.gz", *SCAN, "-o", "circle.nii.gz")
    refused(3, "circle.nii.gz", "reconstruct", "circle.nii.gz", *SCAN, "-o", "r.nii.gz")
    (here / "away.nii.gz").symlink_to("none/r.nii.gz")
    refused(2, "none: does not exist", "reconstruct", "$/ct.nii.gz", *SCAN, "-o", "away.nii.gz")


def test_a_folder_is_no_output(here, refused, unstarted):
    (here / "r.nii.gz").mkdir()
    refused(2, "r.nii.gz: is a folder", "reconstruct", "$/ct.nii.gz", *SCAN, "-o", "r.nii.gz", "--overwrite")


def test_of_two_runs_at_once_one_writes_and_one_is_refused(here, world):
    """Two processes, the second while the first has the output; whichever comes first, there is one whole set."""
    command = [sys.executable, "-m", "invdiff", "reconstruct", str(world / "ct.nii.gz"), *SCAN, "-o", "r.nii.gz"]
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, **options) for _ in range(2)]
    ends = [(process.communicate()[1], process.returncode) for process in both]
    assert sorted(code for _, code in ends) == [0, 2], ends
    (said,) = [text for text, code in ends if code]
    assert said.count("\n") == 1 and any(w in said for w in ("another run", "exists already", "another process")), said
    assert sorted(p.name for p in here.iterdir()) == ["r.json", "r.nii.gz", "r.png"]
    assert json.loads((here / "r.json").read_text())["output"].keys() == {"r.nii.gz"}


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.nii.gz", b"two\nlines.nii.gz", "Jérôme ☃.nii.gz".encode(), b"%s{y}\\.nii.gz"]
)
def test_names_of_inputs_and_outputs_may_be_odd(here, world, run, name):
    (here / "in").mkdir()
    source = here / "in" / os.fsdecode(name)
    source.write_bytes((world / "ct.nii.gz").read_bytes())
    code, out, err = run("reconstruct", source, *SCAN, "-o", here / os.fsdecode(name))
    assert code == 0 and "\udcff" not in out, err
    manifest = (here / os.fsdecode(name[:-7] + b".json")).read_bytes()
    json.loads(manifest.decode("ascii"))
    assert load_volume(here / os.fsdecode(name), modality="CT").data.shape == (40, 36, 5)


def test_the_voxel_type_of_the_source_is_not_inherited(tmp_path):
    """Scaled 16-bit integers come in; numbers that these could not hold go out as they are."""
    source = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    source.header.set_slope_inter(0.5, -3)
    nib.save(source, tmp_path / "a.nii")
    volume = load_volume(tmp_path / "a.nii")
    volume.data[...] = np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    volume.data[0, 0, 0] = 1e30
    save_volume(volume, tmp_path / "b.nii")
    written = nib.load(tmp_path / "b.nii")
    assert written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), volume.data)


@pytest.mark.parametrize("slope", [0, np.nan, np.inf])
def test_a_slope_that_is_none_means_unscaled(tmp_path, slope):
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = np.array([slope, 7], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    np.testing.assert_array_equal(load_volume(tmp_path / "a.nii").data, data)


def test_a_negative_slope_is_applied_and_said(tmp_path):
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = np.array([-2, 7], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    volume = load_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.data, 7 - 2.0 * data)
    assert any("negative" in note for note in volume.notes)


def test_a_format_without_a_place_says_so(here, run):
    code, out, err = run("reconstruct", "$/ct.nii.gz", *SCAN, "-o", "r.npy")
    words = "r.npy: holds neither place nor units; name a .nii.gz or .npz to keep them"
    assert code == 0 and words in out and words in json.loads((here / "r.json").read_text())["warnings"], err
    assert words not in run("reconstruct", "$/ct.nii.gz", *SCAN, "-o", "r.npz", "--overwrite")[1]
