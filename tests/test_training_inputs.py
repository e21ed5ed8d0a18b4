"""Which files a training takes and refuses, and how their values are mapped, so that nothing is lost or misread."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from training_cases import ARGS, volume

from invdiff.errors import InputError
from invdiff.priors.training_data import load_source
from invdiff.priors.training_files import find_files, load_sources, split_files

pytestmark = pytest.mark.usefixtures("loud")


# --- files ---


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "validation.json"])
def test_files_that_no_training_has_made_are_not_written_over(two_subjects, tmp_path, run, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    code, _, err = run("priors", "train", two_subjects, "-o", out, *ARGS)
    assert code == 2 and f"holds {name} but no training; name another folder with -o" in err
    assert [p.name for p in out.iterdir()] == [name] and (out / name).read_text() == "mine"


def test_an_empty_name_is_not_the_current_folder(two_subjects, run, here):
    for args in ((two_subjects, "-o", ""), ("", "-o", "out")):
        code, _, err = run("priors", "train", *args, *ARGS)
        assert code == 2 and "is empty; name a path" in err
    assert not (here / "model.safetensors").exists()


def test_a_file_reached_twice_is_one_and_links_are_followed(two_subjects, tmp_path, caplog):
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "linked").symlink_to(two_subjects)
    (two_subjects / "loop").symlink_to(tmp_path / "top")
    found = find_files([tmp_path / "top", two_subjects, two_subjects / "s0.npz"])
    assert [f.path.name for f in found] == ["s0.npz", "s1.npz"] and {f.subject for f in found} == {"folder 1"}
    (two_subjects / "look.png").write_text("")
    find_files([tmp_path / "top"])
    assert caplog.text.count("are not read") == 1  # a link that leads back is not followed


def test_a_folder_that_cannot_be_read_is_named(two_subjects, monkeypatch, caplog):
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    (two_subjects / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    (two_subjects / "README").write_text("closed")
    monkeypatch.setattr("invdiff.volume.is_dicom", lambda path: listed(path / "x"))  # an OSError
    assert len(find_files([two_subjects])) == 2
    assert "README: is left out, it cannot be read" in caplog.text
    assert "closed: is left out, it cannot be read (Permission denied)" in caplog.text
    with pytest.raises(InputError, match=r"closed: cannot be read \(Permission denied\); allow it"):
        find_files([two_subjects / "closed"])


def test_what_is_left_out_is_said(two_subjects, caplog):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(two_subjects / "look.png")
    find_files([two_subjects])
    assert "pictures or DICOM beside its volumes are not read, look.png among them" in caplog.text
    rows = [{"file": "s0.npz", "split": "train"}, {"file": "s1.npz", "split": "Train"}]
    (two_subjects / "manifest.json").write_text(json.dumps(rows))
    learnt, _ = split_files([two_subjects], "train", "validation")
    assert [f.path.name for f in learnt] == ["s0.npz"] and "1 files of other splits (Train) are left out" in caplog.text
    (two_subjects / "manifest.json").write_text(json.dumps([{"file": "s0.npz"}, {"file": "s1.npz"}]))
    assert {f.split for f in find_files([two_subjects])} == {None}  # as if there were none
    (two_subjects / "manifest.json").write_text(json.dumps([{"file": "s0.npz"}, {"file": "s1.npz", "split": "train"}]))
    with pytest.raises(InputError, match=r"manifest\.json: says no split of s0\.npz, but of others; give it one"):
        find_files([two_subjects])
    for broken in (json.dumps([{"split": "train"}]), "[" * 100_000):
        (two_subjects / "manifest.json").write_text(broken)
        with pytest.raises(InputError, match=r"manifest\.json: is no list of objects with file, subject and split"):
            find_files([two_subjects])


def test_only_what_could_be_a_series_is_told_of_or_learnt_from(two_subjects, tmp_path, caplog):
    for name in ("LICENSE", "a.raw.gz", "Thumbs.db", "x.safetensors"):
        (two_subjects / name).write_text("no image")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "README").write_text("no image")
    (tmp_path / "top" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "top" / "in").symlink_to(two_subjects)
    assert len(find_files([tmp_path / "top"])) == 2 and not caplog.text
    (tmp_path / "top" / "more").mkdir()
    (tmp_path / "top" / "more" / "a.JPG").write_text("")
    find_files([tmp_path / "top"])
    assert "more: is left out, a.JPG is of no format that is read" in caplog.text
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(pictures / "a.png")
    (pictures / "notes.txt").write_text("of no scan")
    (found,) = find_files([pictures])
    assert len(load_source(found.path).slices) == 1


def test_a_file_that_is_named_needs_no_split(two_subjects):
    rows = [{"file": "s0.npz", "subject": "x", "split": "test"}, {"file": "s1.npz", "subject": "y", "split": "train"}]
    (two_subjects / "manifest.json").write_text(json.dumps(rows))
    for paths in ([two_subjects, two_subjects / "s0.npz"], [two_subjects / "s0.npz", two_subjects]):
        learnt, held = split_files(paths, "train", "validation")
        assert {f.subject for f in learnt} == {"x", "y"} and not held


def test_a_file_that_is_named_keeps_the_split_that_it_has(two_subjects):
    for k in range(2, 4):
        volume(two_subjects / f"s{k}.npz", k)
    rows = [{"file": f"s{k}.npz", "subject": "xxyz"[k], "split": "train"} for k in range(3)]
    (two_subjects / "manifest.json").write_text(json.dumps([*rows, {"file": "s3.npz", "split": "validation"}]))
    for named in ("s0.npz", "s2.npz"), ("s3.npz",), ("s3.npz", "s0.npz"):
        learnt, held = split_files([two_subjects, *(two_subjects / name for name in named)], "train", "validation")
        assert [f.subject for f in learnt] == ["x", "x", "y"] and [f.subject for f in held] == ["s3"]


def test_files_come_in_the_order_in_which_they_were_given(two_subjects, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(pictures / "a.png")
    (pictures / "z.tif").mkdir()
    Image.fromarray(np.eye(9, dtype=np.uint8)).save(pictures / "z.tif" / "b.png")
    volume(tmp_path / "a.npz")
    found = find_files([tmp_path / "a.npz", two_subjects, pictures])
    assert [f.name for f in found] == ["a.npz", "s0.npz", "s1.npz", "series 4", "series 5"]
    assert [len(s.slices) for s in load_sources(found[3:])] == [1, 1]


def test_a_manifest_without_subjects_keeps_folders_together(two_subjects):
    rows = [{"file": name} for name in ("p1/a.npz", "p1/b.npz", "p2/a.npz", "sub-07_x.npz", "sub-07_y.npz")]
    (two_subjects / "manifest.json").write_text(json.dumps([*rows, {"file": "p2/b.npz", "subject": None}]))
    assert [f.subject for f in find_files([two_subjects])] == ["p1", "p1", "p2", "sub-07", "sub-07", "p2"]


def test_links_and_names_that_lead_nowhere_are_named(two_subjects, run):
    (two_subjects / "loop.npz").symlink_to(two_subjects / "loop.npz")
    code, _, err = run("priors", "train", two_subjects, "-o", two_subjects.parent / "out", *ARGS)
    assert code == 3 and "loop.npz: does not exist" in err
    (two_subjects / "manifest.json").write_text(json.dumps([{"file": "a\0.npz", "split": "train"}]))
    code, _, err = run("priors", "train", two_subjects, "-o", two_subjects.parent / "out", *ARGS)
    assert code == 3 and "mistake" not in err


def test_the_same_slices_under_two_names_are_not_learnt_from_and_held_out(two_subjects, tmp_path, run):
    (two_subjects / "copy.npz").write_bytes((two_subjects / "s1.npz").read_bytes())
    code, _, err = run("priors", "train", two_subjects, "-o", tmp_path / "out", *ARGS)
    assert code == 3 and "copy.npz: is held out, but shows the same slices as s1.npz, which is to train on" in err


# --- values ---


def test_negative_values_are_mapped_as_solvers_map_them(tmp_path):
    from invdiff.intensity import magnitude_map

    image = np.random.default_rng(0).normal(0, 1, (3, 40, 40)).astype(np.float32)
    np.save(tmp_path / "z.npy", image.transpose(2, 1, 0))
    found = np.stack(load_source(tmp_path / "z.npy").slices)
    assert sorted(found.ravel()) == pytest.approx(sorted(magnitude_map(image).invert(image).clip(-1, 2).ravel()))
    assert (found == -1).mean() < 0.01


@pytest.mark.parametrize(("hu", "words"), [(np.full((2, 9, 9), 7.0), "constant"), (np.eye(9)[None], "normalised")])
def test_what_reconstruct_refuses_is_not_learnt_from(tmp_path, hu, words):
    np.savez(tmp_path / "bad.npz", hu=hu)
    with pytest.raises(InputError, match=rf"bad\.npz.*{words}"):
        load_source(tmp_path / "bad.npz")


def test_a_window_of_ct_gets_a_remedy_that_a_training_has(tmp_path):
    np.savez(tmp_path / "w.npz", hu=np.random.default_rng(0).uniform(0, 80, (2, 24, 24)))
    with pytest.raises(InputError, match=r"w\.npz: .*not HU.*; give it in HU, not clipped to a window, or"):
        load_source(tmp_path / "w.npz")


def test_negative_values_are_looked_at_once(tmp_path, monkeypatch):
    from invdiff.priors import training_data

    calls, whole = [], training_data.magnitude_map
    monkeypatch.setattr(training_data, "magnitude_map", lambda values: calls.append(1) or whole(values))
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(0, 1, (24, 24, 9)).astype(np.float32))
    assert len(load_source(tmp_path / "z.npy").slices) > 1 and len(calls) == 1
