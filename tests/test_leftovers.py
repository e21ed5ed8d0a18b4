"""What a killed process leaves: swept by the next run where it is safe, named where an old result is in it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from invdiff.files import atomic_write, private_folder, publish, sweep, sweep_private

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import os, signal, sys
from pathlib import Path
from invdiff import files
here, how = Path(sys.argv[1]), sys.argv[2]
targets = [here / name for name in ("r.nii.gz", "r.json")]
real, moves = os.replace, []
def replace(old, new):
    moves.append(new)
    if how == "moving" and len(moves) == 2:  # after the first old file went aside
        os.kill(os.getpid(), signal.SIGKILL)
    real(old, new)
os.replace = replace
with files.private_folder(targets[0]) as hidden:
    parts = [hidden / target.name for target in targets]
    for part in parts:
        part.write_text("new")
    print("ready", flush=True)
    if how == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "waiting":
        sys.stdin.read()
    files.publish(parts, targets, overwrite=True)
"""


def start(here, how):
    command = [sys.executable, "-c", SCRIPT, str(here), how]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    return subprocess.Popen(command, text=True, **pipes)


def age(here):
    """Hidden folders become a minute old."""
    hidden = [p for p in here.iterdir() if p.name.startswith(".invdiff-part-")]
    for path in hidden:
        os.utime(path, (time.time() - 60,) * 2)
    return hidden


def test_what_a_process_left_that_was_killed_while_writing_is_removed(tmp_path):
    with start(tmp_path, "writing") as process:
        process.communicate()
    assert process.returncode == -9 and len(age(tmp_path)) == 1
    assert sweep_private(tmp_path) == () and not list(tmp_path.iterdir())


def test_an_old_result_that_was_being_replaced_is_kept_and_named(tmp_path):
    for name in ("r.nii.gz", "r.json"):
        (tmp_path / name).write_text("old")
    with start(tmp_path, "moving") as process:
        process.communicate()
    (left,) = age(tmp_path)
    (note,) = sweep_private(tmp_path)
    assert process.returncode == -9 and left.name in note and "move them back" in note and "\n" not in note
    assert sorted(p.name for p in left.iterdir()) == ["old-r.nii.gz", "r.json", "r.nii.gz"]
    assert (left / "old-r.nii.gz").read_text() == "old"


def test_the_folder_of_a_living_process_stays(tmp_path):
    with start(tmp_path, "waiting") as process:
        assert process.stdout.readline() == "ready\n"
        (folder,) = age(tmp_path)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert sweep_private(tmp_path) == () and folder.exists()
        process.communicate("go on")
    assert process.returncode == 0 and (tmp_path / "r.nii.gz").read_text() == "new" and not age(tmp_path)


def test_a_new_folder_is_given_time_to_be_locked(tmp_path):
    (tmp_path / ".invdiff-part-abc").mkdir()
    assert sweep_private(tmp_path) == () and len(age(tmp_path)) == 1
    (tmp_path / ".invdiff-part-link").symlink_to(tmp_path)
    (tmp_path / ".invdiff-part-file").write_text("x")
    sweep_private(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".invdiff-part-file", ".invdiff-part-link"]


def test_parts_of_files_and_series_are_swept_but_not_an_old_series(tmp_path):
    (tmp_path / ".r.dcm.part-1-abc").mkdir()
    (tmp_path / ".r.dcm.part-1-abc" / "0001.dcm").write_text("half")
    (tmp_path / ".r.dcm.part-1-abc-old").mkdir()
    (tmp_path / ".s.dcm.part-1-abc").write_text("of another")
    sweep(tmp_path / "r.dcm")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".r.dcm.part-1-abc-old", ".s.dcm.part-1-abc"]


def test_the_command_sweeps_and_names(here, run):
    (here / ".invdiff-part-1").mkdir()
    (here / ".invdiff-part-2").mkdir()
    (here / ".invdiff-part-2" / "old-x.nii.gz").write_text("old")
    (here / ".r.nii.gz.part-1-abc").write_text("half")
    age(here)
    scan = ("--op", "ct-sparse", "--views", "12", "--simulate", "--solver", "fbp")
    code, out, err = run("reconstruct", "$/ct.nii.gz", *scan, "-o", "r.nii.gz")
    assert code == 0 and ".invdiff-part-2 holds 1 files that a killed run was replacing" in out, err
    assert "a killed run was replacing" in (here / "r.json").read_text()
    assert sorted(p.name for p in here.iterdir()) == [".invdiff-part-2", "r.json", "r.nii.gz", "r.png"]


@pytest.mark.parametrize("folder", [False, True])
def test_nobody_else_reads_what_is_being_written(tmp_path, folder):
    old = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "a.dcm", folder=folder) as part:
            assert part.stat().st_mode & 0o777 == (0o700 if folder else 0o600)
            (part / "0001.dcm" if folder else part).write_text("x")
        assert (tmp_path / "a.dcm").stat().st_mode & 0o777 == (0o755 if folder else 0o644)
        with atomic_write(tmp_path / "b", mode=0o600) as part:
            part.write_text("x")
        assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)


def test_a_private_folder_goes_with_its_block(tmp_path):
    with pytest.raises(ValueError, match="x"), private_folder(tmp_path / "r") as hidden:
        (hidden / "a").write_text("new")
        publish([hidden / "a"], [tmp_path / "a"])
        raise ValueError("x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
