"""Output files: found writable before the run, written whole or not at all; manifests and pictures."""

import json
import os

import numpy as np
import pytest
import torch

from invdiff.destination import check_output, next_free_name
from invdiff.errors import ResourceError, ShapeError, UsageError
from invdiff.files import atomic_write, publish, save_tensors, sha256_file, show, split_suffix, sweep
from invdiff.provenance import Timings, manifest, write_json
from invdiff.report import mosaic


def test_outputs_lie_beside_the_volume(tmp_path):
    outputs = check_output(tmp_path / "a.b.nii.gz")
    assert [file.name for file in outputs.all] == ["a.b.nii.gz", "a.b.json", "a.b.png", "a.b_std.nii.gz"]
    assert check_output(tmp_path / "X.NII").spread.name == "X_std.NII"
    assert check_output(tmp_path / "m.h5", suffixes=(".h5",)).manifest.name == "m.json"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz", ".nii.gz", "a.nii.gz.bak"])
def test_wrong_suffix(tmp_path, name):
    with pytest.raises(UsageError, match=r"\.nii\.gz or \.nii"):
        check_output(tmp_path / name)


@pytest.mark.parametrize("taken", ["a.nii.gz", "a.json", "a.png", "a_std.nii.gz"])
def test_existing_files_and_sidecars_need_overwrite(tmp_path, taken):
    (tmp_path / taken).write_text("old")
    with pytest.raises(UsageError, match=f"{taken}: exists already; .*--overwrite"):
        check_output(tmp_path / "a.nii.gz")
    check_output(tmp_path / "a.nii.gz", overwrite=True)
    assert (tmp_path / taken).read_text() == "old"


def test_an_input_is_never_overwritten(tmp_path):
    source, hard, soft = tmp_path / "in.nii.gz", tmp_path / "hard.nii.gz", tmp_path / "soft.nii.gz"
    source.write_text("data")
    os.link(source, hard)
    soft.symlink_to(source)
    for output in (source, hard, soft, tmp_path / "." / "in.nii.gz"):
        with pytest.raises(UsageError, match="overwrite the input"):
            check_output(output, overwrite=True, inputs=[source])
    std = tmp_path / "out_std.nii.gz"
    std.write_text("data")
    with pytest.raises(UsageError, match="overwrite the input"):
        check_output(tmp_path / "out.nii.gz", overwrite=True, inputs=[std])


def test_folders_are_probed(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="does not exist"):
        check_output(tmp_path / "none" / "a.nii")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        check_output(tmp_path / "file" / "a.nii")
    (tmp_path / "dir.nii").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path / "dir.nii", overwrite=True)
    with pytest.raises(ResourceError, match="MB free"):
        check_output(tmp_path / "a.nii", needed_bytes=10**18)

    def readonly(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", readonly)
    with pytest.raises(ResourceError, match="Read-only file system"):
        check_output(tmp_path / "a.nii")


def test_a_symbolic_link_is_followed_and_said(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "target.nii", tmp_path / "link.nii"
    link.symlink_to(target)
    outputs = check_output(link)
    assert outputs.volume == target and outputs.manifest == target.with_suffix(".json")
    assert "symbolic link" in outputs.notes[0] and "target.nii" in outputs.notes[0]
    with atomic_write(link) as part:
        part.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    loop = tmp_path / "loop.nii"
    loop.symlink_to(loop)
    with pytest.raises(UsageError):
        check_output(loop)


def test_next_free_name(tmp_path):
    assert next_free_name(tmp_path, "invdiff-blur").name == "invdiff-blur.nii.gz"
    (tmp_path / "invdiff-blur.png").write_text("")
    assert next_free_name(tmp_path, "invdiff-blur").name == "invdiff-blur-2.nii.gz"
    (tmp_path / "invdiff-blur-2.nii.gz").symlink_to("nowhere")
    assert next_free_name(tmp_path, "invdiff-blur").name == "invdiff-blur-3.nii.gz"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path, overwrite=True) as part:
        assert part.parent == tmp_path and f".part-{os.getpid()}" in part.name
        part.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_full_disk_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match="No space left"), atomic_write(tmp_path / "a") as _:
        raise OSError(28, "No space left on device")
    with pytest.raises(ResourceError, match="cannot be written"), atomic_write(tmp_path / "none" / "a"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("moves", range(5))
def test_a_set_of_files_is_published_as_a_whole(tmp_path, monkeypatch, error, moves):
    """A failure at any of the moves leaves the old set."""
    (tmp_path / "part").mkdir()
    parts, targets = ([folder / name for name in "abc"] for folder in (tmp_path / "part", tmp_path))
    for part, target in zip(parts[:2], targets[:2], strict=True):  # the new set has no c
        part.write_text("new")
        target.write_text("old")
    targets[2].write_text("old")
    real, count = os.replace, iter(range(9))

    def replace(old, new):
        if next(count) == moves:
            raise error
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(type(error)):
        publish(parts, targets, overwrite=True)
    assert [t.read_text() for t in targets] == ["old"] * 3
    monkeypatch.setattr(os, "replace", real)


def test_publishing_replaces_the_set(tmp_path):
    (tmp_path / "part").mkdir()
    parts, targets = ([folder / name for name in "abc"] for folder in (tmp_path / "part", tmp_path))
    for path in (*parts[:2], *targets):
        path.write_text(path.parent.name)
    publish(parts, targets, overwrite=True)
    assert [t.exists() and t.read_text() for t in targets] == ["part", "part", False]


def test_a_faster_process_wins(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(UsageError, match="another process"), atomic_write(path) as part:
        part.write_text("late")
        path.write_text("first")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a") as part:
            part.write_text("x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_names_of_any_kind_print_on_one_line(tmp_path):
    assert "\n" not in show("a\nb\x1b[31m.nii") and "\x1b" not in show("a\nb\x1b[31m.nii")
    show(os.fsdecode(b"\xff.nii")).encode()
    assert split_suffix("A.Nii.GZ") == ("A", ".Nii.GZ")


# Manifest ------------------------------------------------------------------------------------------------------------


def test_manifest_is_strict_json(tmp_path):
    source = tmp_path / "scan.nii"
    source.write_bytes(b"abc")
    timings = Timings()
    for _ in range(2):
        with timings.phase("solve"):
            pass
    record = manifest(
        {"steps": 20, "level": np.float32(0.5), "path": tmp_path / os.fsdecode(b"\xff")},
        inputs={"input": source},
        timings=timings.seconds,
        warnings=["one"],
        metrics={"psnr_db": float("inf"), "rmse": float("nan"), "angles": np.arange(3)},
    )
    write_json(tmp_path / "a.json", record)

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "a.json").read_bytes().decode("ascii")
    again = json.loads(text, parse_constant=refuse)
    assert again["metrics"] == {"psnr_db": "inf", "rmse": "nan", "angles": [0, 1, 2]}
    assert again["inputs"]["input"] == {"name": "scan.nii", "bytes": 3, "sha256": sha256_file(source)}
    assert again["options"]["level"] == 0.5 and again["timings_s"].keys() == {"solve"}
    assert again["peak_memory_mb"] > 10 and again["packages"]["numpy"] == np.__version__
    assert "research use only" in again["notice"]


# Picture -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_every_plane_shows_the_same_views(tmp_path, plane):
    from invdiff.report import _TO_AXIAL, _View
    from invdiff.volume import Volume, to_slices

    volume = Volume(np.random.default_rng(0).normal(size=(5, 6, 7)), np.eye(4))
    axis = {"axial": 2, "coronal": 1, "sagittal": 0}
    order, flips = _TO_AXIAL[plane]
    stack = np.flip(to_slices(volume, axis[plane]).data.transpose(order), flips)
    np.testing.assert_array_equal(stack, to_slices(volume, 2).data)
    view = to_slices(volume, axis[plane]).data  # what the radiologist's display shows of that plane
    for index in range(len(view)):
        place = {"axial": index, "coronal": stack.shape[1] - 1 - index, "sagittal": stack.shape[2] - 1 - index}[plane]
        np.testing.assert_array_equal(_View(plane, place, 1, 1).of(stack), view[index])


@pytest.mark.parametrize("shape", [(1, 16, 24), (6, 24, 16)])
@pytest.mark.parametrize("known", [True, False])
def test_mosaic_is_written(tmp_path, shape, known):
    stack = np.random.default_rng(0).normal(size=shape)
    path = tmp_path / "a.png"
    columns = [("FBP", stack, ""), ("pnp", stack, "30.0 dB")]
    mosaic(path, columns, stack if known else None, (1, 1), 2, "1", (-1, 1), plane="coronal", title="T")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and os.listdir(tmp_path) == ["a.png"]
    mosaic(path, [("pnp", np.zeros(shape), "")], None, (1, 1), 2, "HU", (0, 1), overwrite=True)
    with pytest.raises(UsageError, match="exists already"):
        mosaic(path, columns, None, (1, 1), 2, "1", (-1, 1))


def test_mosaic_refuses_what_it_cannot_show(tmp_path):
    stack = np.zeros((3, 12, 12))
    with pytest.raises(ShapeError, match="one shape"):
        mosaic(tmp_path / "a.png", [("a", stack, "")], stack[1:], (1, 1), 1, "1", (0, 1))
    with pytest.raises(UsageError, match="low < high"):
        mosaic(tmp_path / "a.png", [("a", stack, "")], None, (1, 1), 1, "1", (1, 1))
    with pytest.raises(UsageError, match="axial, coronal, sagittal"):
        mosaic(tmp_path / "a.png", [("a", stack, "")], None, (1, 1), 1, "1", (0, 1), plane="oblique")
    with pytest.raises(UsageError, match="at least one"):
        mosaic(tmp_path / "a.png", [], None, (1, 1), 1, "1", (0, 1))


def test_tensors_are_written_where_a_sweep_finds_what_a_kill_leaves(tmp_path, monkeypatch):
    import safetensors.torch

    def killed(tensors, path, metadata):
        (path.parent / ".tmpABCDEF").write_bytes(b"half")
        seen.append(path.parent)
        raise KeyboardInterrupt

    seen = []
    target = tmp_path / "a.safetensors"
    with monkeypatch.context() as m:
        m.setattr(safetensors.torch, "save_file", killed)
        m.setattr("invdiff.files._remove", lambda path: None)  # as after kill -9
        with pytest.raises(KeyboardInterrupt), atomic_write(target) as part:
            save_tensors({}, part, {})
    assert seen[0].parent == tmp_path and list(seen[0].iterdir())
    sweep(target)
    assert not list(tmp_path.iterdir())
    with atomic_write(target) as part:
        save_tensors({"a": torch.ones(2)}, part, {"b": "c"})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert safetensors.torch.load_file(target)["a"].tolist() == [1, 1]
