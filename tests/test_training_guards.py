"""What a training and its validation refuse, or say, so that no prior, file or figure is lost or false."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_cases import FAST, QUIET, noise_source

from invdiff.errors import InputError, ResourceError, UsageError
from invdiff.priors.distributed import Ranks, ranks
from invdiff.priors.train import TrainConfig, Trainer
from invdiff.priors.train_config import with_settings
from invdiff.priors.training_data import CropSampler, load_source
from invdiff.priors.training_files import find_files, split_files
from invdiff.stopping import stop_signals

ARGS = ("--set", "network.channels=[8,8]", "--set", "network.blocks=[1,1]", "--set", "phantoms=0", "--quiet")
ARGS = (*ARGS, "--set", "stages=[[0,16,2]]", "--set", "steps=2")


@pytest.fixture(autouse=True)
def loud(caplog):
    caplog.set_level("WARNING", "invdiff")  # commands that ran before may have asked for quiet


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two subjects; reports are left out."""
    monkeypatch.setattr("invdiff.training_report.write_report", lambda *args, **options: None)
    (tmp_path / "data").mkdir()
    for k in range(2):
        volume(tmp_path / "data" / f"s{k}.npz", k)
    return tmp_path / "data"


def volume(path, seed=0):
    np.savez(path, hu=np.random.default_rng(seed).normal(0, 300, (2, 32, 32)).astype(np.float32))


# --- files ---


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "validation.json"])
def test_files_that_no_training_has_made_are_not_written_over(data, tmp_path, run, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    code, _, err = run("priors", "train", data, "-o", out, *ARGS)
    assert code == 2 and f"holds {name} but no training; name another folder with -o" in err
    assert [p.name for p in out.iterdir()] == [name] and (out / name).read_text() == "mine"


def test_an_empty_name_is_not_the_current_folder(data, run, here):
    for args in ((data, "-o", ""), ("", "-o", "out")):
        code, _, err = run("priors", "train", *args, *ARGS)
        assert code == 2 and "is empty; name a path" in err
    assert not (here / "model.safetensors").exists()


def test_a_file_reached_twice_is_one_and_links_are_followed(data, tmp_path):
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "linked").symlink_to(data)
    (data / "loop").symlink_to(tmp_path / "top")
    found = find_files([tmp_path / "top", data, data / "s0.npz"])
    assert [f.path.name for f in found] == ["s0.npz", "s1.npz"] and {f.subject for f in found} == {"folder 1"}


def test_a_folder_that_cannot_be_read_is_named(data, monkeypatch):
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    (data / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"closed: cannot be read \(Permission denied\); allow it"):
        find_files([data])


def test_what_is_left_out_is_said(data, caplog):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(data / "look.png")
    find_files([data])
    assert "1 files beside its volumes are not read, first look.png" in caplog.text
    rows = [{"file": "s0.npz", "split": "train"}, {"file": "s1.npz", "split": "Train"}]
    (data / "manifest.json").write_text(json.dumps(rows))
    learnt, _ = split_files([data], "train", "validation")
    assert [f.path.name for f in learnt] == ["s0.npz"] and "1 files of split Train are left out" in caplog.text
    for broken in (json.dumps([{"file": "s0.npz"}]), "[" * 100_000):
        (data / "manifest.json").write_text(broken)
        with pytest.raises(InputError, match=r"manifest\.json: is no list of objects with file, subject and split"):
            find_files([data])


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


# --- what was learnt from ---


def test_what_was_learnt_from_is_never_held_out(tmp_path):
    a, b = noise_source(0, "a"), noise_source(1, "b")
    Trainer(TrainConfig(**FAST, steps=2), [a, b], tmp_path).run(QUIET)
    with pytest.raises(InputError, match=r"b: .* has learnt from it, so that it cannot be held out"):
        Trainer(TrainConfig(**FAST, steps=4), [a], tmp_path, held_out=[b])
    again = Trainer(TrainConfig(**FAST, steps=4), [a], tmp_path)
    again.run(QUIET)
    with pytest.raises(InputError, match="has learnt from it"):  # b is not forgotten
        Trainer(TrainConfig(**FAST, steps=6), [a], tmp_path, held_out=[noise_source(1, "renamed")])


def test_validate_refuses_what_was_learnt_from_and_a_damaged_state(data, tmp_path, run, monkeypatch):
    monkeypatch.undo()  # with its report
    monkeypatch.chdir(tmp_path)
    learnt, _ = split_files([data], "train", "validation")
    Trainer(TrainConfig(**FAST, steps=2), [load_source(f.path) for f in learnt], tmp_path / "net").run(QUIET)
    volume(tmp_path / "z.npz", 9)
    assert [f.subject for f in learnt] == ["s1"]
    code, _, err = run("priors", "validate", tmp_path / "net", learnt[0].path, tmp_path / "z.npz")  # s1 is held out
    assert code == 3 and "has learnt from it" in err
    for text in ("", "[]", "null", '{"config": 5}', "[" * 100_000):
        (tmp_path / "net" / "state.json").write_text(text)
        code, _, err = run("priors", "validate", tmp_path / "net", data)
        assert code == 3 and "state.json: is damaged" in err


def test_a_resume_with_other_options_or_data_says_so(tmp_path, caplog):
    Trainer(TrainConfig(**FAST, steps=2), [noise_source(0)], tmp_path).run(QUIET)
    Trainer(TrainConfig(**FAST, steps=3), [noise_source(0)], tmp_path)
    assert not caplog.text
    Trainer(TrainConfig(**FAST, steps=3, seed=5, ema=0.9), [noise_source(1)], tmp_path)
    assert "goes on with another ema, seed than before" in caplog.text
    assert "goes on with other data than before, 1 files more and 1 less" in caplog.text


@pytest.mark.parametrize("change", [{"begun": 5}, {"curve": 5}, {"elapsed_s": None}, {"steps": -5}, {"learnt": "a"}])
def test_counters_that_no_training_has_are_refused(tmp_path, change):
    Trainer(TrainConfig(**FAST, steps=2), [noise_source()], tmp_path).run(QUIET)
    with safe_open(tmp_path / "last.safetensors", "pt") as archive:
        state = json.loads(archive.metadata()["state"])
    save_file(
        load_file(tmp_path / "last.safetensors"), tmp_path / "last.safetensors", {"state": json.dumps(state | change)}
    )
    with pytest.raises(InputError, match=r"cannot be read as a training \(" + next(iter(change))):
        Trainer(TrainConfig(**FAST, steps=4), [noise_source()], tmp_path)


@pytest.mark.parametrize("which", ["all", "some", "shape"])
def test_moments_that_are_missing_are_not_replaced(tmp_path, which):
    Trainer(TrainConfig(**FAST, steps=2), [noise_source()], tmp_path).run(QUIET)
    path = tmp_path / "last.safetensors"
    with safe_open(path, "pt") as archive:
        about = archive.metadata()
    tensors = load_file(path)
    if which == "shape":
        tensors["adam.0.exp_avg"] = torch.zeros(3)
    drop = {"all": "adam.", "some": "adam.0.", "shape": "no"}[which]
    save_file({k: v for k, v in tensors.items() if not k.startswith(drop)}, path, about)
    with pytest.raises(InputError, match="cannot be read as a training"):
        Trainer(TrainConfig(**FAST, steps=4), [noise_source()], tmp_path)


# --- options ---


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=99999999999999999999", "seed is"),
        ("phantoms=1000000000", "phantoms is 1000000000, no whole number from 0 to 100000"),
        ("reference=100000000", "reference is"),
        ("stages=[[0,16,1000000000]]", "no share, pixels"),
        ("stages=[[0,100000,2]]", "no share, pixels"),
        ("stages=[[0,16,2],[1.5,32,2]]", "one after another before 1"),
        ("stages=[[0,16,2],[0.5,32,2],[0.2,16,2]]", "one after another before 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(setting, words):
    with pytest.raises(UsageError, match=words):
        TrainConfig.from_dict(with_settings({}, [setting]))


def test_one_class_is_no_list_of_letters():
    assert TrainConfig.from_dict(with_settings({}, ["classes=CT"])).classes == ("CT",)


def test_weights_and_classes_of_no_data_are_said(tmp_path, caplog):
    CropSampler([noise_source(0, "a", "CT")], {"imge": 5.0, "a": 1.0, "image": 1.0}, 0, 0)
    assert "no data are called imge" in caplog.text
    Trainer(TrainConfig(**FAST, classes=("CT", "image")), [noise_source(0, "a", "CT")], tmp_path)
    assert "no data are of class image, only of CT: this training does not teach it" in caplog.text


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed": ' + "1" * 17_000_000])
def test_configurations_of_absurd_depth_or_length_are_refused(data, tmp_path, run, text):
    (tmp_path / "o.json").write_text(text)
    code, _, err = run("priors", "train", data, "-o", tmp_path / "out", "--config", tmp_path / "o.json", *ARGS)
    assert code == 3 and "o.json: not a readable JSON file" in err


@pytest.mark.parametrize("option", [("--device", "mps"), ("--device", "meta"), ("--threads", "100000")])
def test_devices_and_threads_that_there_are_not(data, tmp_path, run, option):
    code, _, err = run("priors", "train", data, "-o", tmp_path / "out", *ARGS, *option)
    assert code == 2 and option[1] in err and not (tmp_path / "out").exists()


# --- several processes ---


@pytest.mark.parametrize(("world", "words"), [("abc", "no number of processes"), ("2", "WORLD_SIZE is 2, but .*RANK")])
def test_an_environment_that_torchrun_did_not_set_is_refused(monkeypatch, world, words):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match=words), ranks():
        pass


def test_processes_with_other_states_or_options_are_refused(monkeypatch):
    def others(value, op=None):
        if op == torch.distributed.ReduceOp.MAX:
            value[0] += shift

    monkeypatch.setattr(torch.distributed, "all_reduce", others)
    place, config = Ranks(1, 2), TrainConfig(**FAST)
    shift = 0
    place.check_same(40, config)
    shift = 1
    with pytest.raises(UsageError, match="different options, or states of different steps"):
        place.check_same(40, config)


def test_a_process_that_has_ended_is_no_mistake_of_invdiff(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *args: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ResourceError, match="another process of the training has ended"), ranks():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="something else"), ranks():
        raise RuntimeError("something else")


@pytest.mark.parametrize("launched", [True, False])
def test_the_echo_of_a_launcher_is_no_second_signal(monkeypatch, launched):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with stop_signals() as stop, stop.between_steps():
        stop._hear(2, None)
        if launched:
            stop._hear(2, None)
            stop.since -= 2  # seconds later
        with pytest.raises(KeyboardInterrupt):
            stop._hear(2, None)
