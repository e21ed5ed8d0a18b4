"""What a training and its validation refuse, or say, so that no prior, file or figure is lost or false."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_cases import ARGS, FAST, QUIET, noise_source, volume

from invdiff.errors import InputError, ResourceError, UsageError
from invdiff.priors.distributed import Ranks, ranks
from invdiff.priors.train import TrainConfig, Trainer
from invdiff.priors.train_config import with_settings
from invdiff.priors.training_data import CropSampler, load_source
from invdiff.priors.training_files import split_files
from invdiff.stopping import stop_signals
from invdiff.training_report import write_report

pytestmark = pytest.mark.usefixtures("loud")


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


def test_what_a_prior_to_start_from_has_learnt_is_never_held_out(tmp_path):
    a, b = noise_source(0, "a"), noise_source(1, "b")
    Trainer(TrainConfig(**FAST, steps=2), [a], tmp_path / "one").run(QUIET)
    (tmp_path / "one" / "state.json").unlink()  # its card says it too
    config = TrainConfig(**FAST, steps=2, start=str(tmp_path / "one"))
    with pytest.raises(InputError, match=r"a: .*one has learnt from it"):
        Trainer(config, [b], tmp_path / "two", held_out=[a])
    Trainer(config, [b], tmp_path / "two").run(QUIET)
    with pytest.raises(InputError, match=r"a: .* has learnt from it"):
        Trainer(config, [b], tmp_path / "two", held_out=[a])
    with pytest.raises(InputError, match=r"a: .* has learnt from it"):
        write_report(tmp_path / "two", [b], [a])


def test_figures_are_written_beside_a_training_alone(tmp_path):
    trainer = Trainer(TrainConfig(**FAST, steps=9), [noise_source()], tmp_path / "out", held_out=[noise_source(1, "b")])
    trainer._validate(QUIET)  # and killed then
    assert {"validation.json", "last.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_validate_refuses_what_was_learnt_from_and_a_damaged_state(two_subjects, tmp_path, run, monkeypatch):
    monkeypatch.undo()  # with its report
    monkeypatch.chdir(tmp_path)
    learnt, _ = split_files([two_subjects], "train", "validation")
    Trainer(TrainConfig(**FAST, steps=2), [load_source(f.path) for f in learnt], tmp_path / "net").run(QUIET)
    volume(tmp_path / "z.npz", 9)
    assert [f.subject for f in learnt] == ["s1"]
    code, _, err = run("priors", "validate", tmp_path / "net", learnt[0].path, tmp_path / "z.npz")  # s1 is held out
    assert code == 3 and "has learnt from it" in err
    good = {"config": {"stages": [[0, 16, 2]]}}
    parts = ({"config": 5}, {"config": {}}, {"config": {"stages": []}})
    parts = (*parts, {"curve": [1]}, {"learnt": [[1]]}, {"validation": [{"crops": 1}]}, {"validation": None})
    parts = (*parts, {"config": {"stages": [[0, -16, 2]]}})
    for text in ("", "[]", "null", "[" * 100_000, *(json.dumps(good | part) for part in parts)):
        (tmp_path / "net" / "state.json").write_text(text)
        code, _, err = run("priors", "validate", tmp_path / "net", two_subjects)
        assert code == 3 and "state.json: is damaged" in err


def test_a_resume_with_other_options_or_data_says_so(tmp_path, caplog):
    Trainer(TrainConfig(**FAST, steps=2), [noise_source(0)], tmp_path).run(QUIET)
    Trainer(TrainConfig(**FAST, steps=3), [noise_source(0)], tmp_path)
    assert not caplog.text
    Trainer(TrainConfig(**FAST, steps=3, seed=5, ema=0.9), [noise_source(1)], tmp_path)
    assert "goes on with another ema, seed than before" in caplog.text
    assert "goes on with other data than before, 1 files more and 1 less" in caplog.text


@pytest.mark.parametrize(
    "change", [{"begun": 5}, {"curve": 5}, {"elapsed_s": None}, {"steps": -5}, {"learnt": "a"}, {"learnt": [[1]]}]
)
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


def test_seeds_may_be_times():
    assert TrainConfig.from_dict(with_settings({}, ["seed=1763900000000000000"])).seed == 1763900000000000000


def test_one_class_is_no_list_of_letters():
    assert TrainConfig.from_dict(with_settings({}, ["classes=CT"])).classes == ("CT",)


def test_weights_and_classes_of_no_data_are_said(tmp_path, caplog):
    CropSampler([noise_source(0, "a", "CT")], {"imge": 5.0, "a": 1.0, "image": 1.0}, 0, 0)
    assert "no data are called imge" in caplog.text
    Trainer(TrainConfig(**FAST, classes=("CT", "image")), [noise_source(0, "a", "CT")], tmp_path)
    assert "no data are of class image, only of CT: this training does not teach it" in caplog.text


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed": ' + "1" * 17_000_000])
def test_configurations_of_absurd_depth_or_length_are_refused(two_subjects, tmp_path, run, text):
    (tmp_path / "o.json").write_text(text)
    code, _, err = run("priors", "train", two_subjects, "-o", tmp_path / "out", "--config", tmp_path / "o.json", *ARGS)
    assert code == 3 and "o.json: not a readable JSON file" in err


@pytest.mark.parametrize("option", [("--device", "mps"), ("--device", "meta"), ("--threads", "100000")])
def test_devices_and_threads_that_there_are_not(two_subjects, tmp_path, run, option):
    code, _, err = run("priors", "train", two_subjects, "-o", tmp_path / "out", *ARGS, *option)
    assert code == 2 and option[1] in err and not (tmp_path / "out").exists()


# --- several processes ---


@pytest.mark.parametrize(("world", "words"), [("abc", "no number of processes"), ("2", "WORLD_SIZE is 2, but .*RANK")])
def test_an_environment_that_torchrun_did_not_set_is_refused(monkeypatch, world, words):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match=words), ranks():
        pass
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(UsageError, match=r"no number of processes|RANK is '5' of 2 processes"), ranks():
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
