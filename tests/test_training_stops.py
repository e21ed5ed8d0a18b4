"""A training that is interrupted, or that finds no place to write: one line, and what was saved stays."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_cases import FAST, QUIET, noise_source

from invdiff.destination import locked
from invdiff.errors import ResourceError, UsageError
from invdiff.files import atomic_write, make_folder, save_tensors
from invdiff.priors import load_prior
from invdiff.priors.train import TrainConfig, Trainer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def train(tmp_path, run, monkeypatch):
    """``train(*args)``: the command on two small subjects, without its report, in ``out``."""
    (tmp_path / "data").mkdir()
    for k in range(2):
        hu = np.random.default_rng(k).normal(0, 300, (2, 32, 32)).astype(np.float32)
        np.savez(tmp_path / "data" / f"subject{k}.npz", hu=hu)
    network = {"channels": [8, 8], "blocks": [1, 1], "patch": 2, "embedding": 16}
    options = {"stages": [[0, 16, 4]], "phantoms": 0, "network": network, "steps": 8, "validate_every_s": 0.0}
    (tmp_path / "o.json").write_text(json.dumps(options | {"save_every_s": 0.0}))
    monkeypatch.setattr("invdiff.training_report.write_report", lambda *args, **options: None)
    start = ("priors", "train", str(tmp_path / "data"), "--config", str(tmp_path / "o.json"), "--quiet")
    return lambda *args, out="out": run(*start, "-o", tmp_path / out, *args)


def after(steps: int, what, monkeypatch):
    """Do ``what`` inside the step that follows so many, after its backward pass."""
    step = Trainer._step

    def changed(self, *args):
        loss = step(self, *args)
        if self.steps == steps + 1:
            what()
        return loss

    monkeypatch.setattr(Trainer, "_step", changed)


def saved(folder: Path) -> int:
    return json.loads((folder / "state.json").read_text())["steps"]


# --- signals ---


@pytest.fixture(autouse=True)
def _ctrl_c():
    """Heard, whether or not the tests run as a job in the background, which ignores it."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def signalled(number: int, times: int = 1):
    for _ in range(times):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_lets_a_step_end_and_saves_it(train, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        after(3, lambda: signalled(number), patch)
        code, _, err = train()
    assert code == 130 and "training stopped at step 4 and saved; the same command goes on" in err
    assert saved(tmp_path / "out") == 4 and not [p for p in (tmp_path / "out").iterdir() if p.name[0] == "."]
    assert train()[0] == 0 and saved(tmp_path / "out") == 8


def test_the_second_signal_stops_at_once_with_what_was_saved(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        after(3, lambda: signalled(signal.SIGINT, 2), patch)
        code, _, err = train()
        told = "invdiff: error: training stopped at once, 3 steps are saved; the same command goes on"
        assert (code, err.strip()) == (130, told) and saved(tmp_path / "out") == 3
    with monkeypatch.context() as patch:
        after(0, lambda: signalled(signal.SIGTERM, 2), patch)
        code, _, err = train(out="new")
        assert code == 130 and "stopped at once, nothing is saved yet" in err
    assert not (tmp_path / "new").exists()
    assert train()[0] == 0 and saved(tmp_path / "out") == 8 and load_prior(tmp_path / "out")


def test_ctrl_c_while_data_are_read_leaves_nothing(train, tmp_path, monkeypatch):
    monkeypatch.setattr("invdiff.priors.training_files.load_sources", lambda found: signalled(signal.SIGINT))
    code, out, err = train()
    assert (code, out) == (130, "") and err.strip() == "invdiff: error: interrupted; nothing was written over"
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_the_report_is_drawn_says_that_the_training_is_over(train, tmp_path, monkeypatch):
    monkeypatch.setattr("invdiff.training_report.write_report", lambda *args, **options: signalled(signal.SIGINT))
    code, _, err = train()
    assert code == 130 and "the training is finished and saved: 'invdiff priors validate'" in err
    assert saved(tmp_path / "out") == 8


def test_a_real_ctrl_c_in_a_process_of_its_own(train, tmp_path):
    """As a terminal sends it, to a process that has set up its own handlers."""
    start = ["priors", "train", "data", "--config", "o.json", "--quiet", "-o", "out", "--set", "steps=1000000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "invdiff", *start]
    pipes = {"stderr": subprocess.PIPE, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, env=environment, text=True, cwd=tmp_path, **pipes) as child:
        end = time.monotonic() + 120
        while not (tmp_path / "out" / "config.json").exists() and time.monotonic() < end:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        try:
            err = child.communicate(timeout=120)[1]
        finally:
            child.kill()
    steps = saved(tmp_path / "out")
    assert child.returncode == 130 and len(err.strip().splitlines()) == 2, err
    assert f"stopped at step {steps} and saved" in err and load_prior(tmp_path / "out")


# --- places to write ---


def test_a_folder_that_is_gone_is_made_again(train, tmp_path, monkeypatch):
    after(3, lambda: shutil.rmtree(tmp_path / "out"), monkeypatch)
    code, _, err = train()
    assert (code, err) == (0, "") and saved(tmp_path / "out") == 8 and load_prior(tmp_path / "out")


def blocked(folder: Path, aside: Path):
    """The folder is moved away, and a file is in its place."""
    folder.rename(aside)
    folder.touch()


@pytest.mark.parametrize("gone", ["disk", "disk/out"])
def test_without_a_place_the_training_goes_on_and_is_saved_once_there_is_one(
    train, tmp_path, monkeypatch, caplog, gone
):
    out, gone, aside = tmp_path / "disk" / "out", tmp_path / gone, tmp_path / "aside"
    caplog.set_level("WARNING", "invdiff")
    after(3, lambda: blocked(gone, aside), monkeypatch)
    after(5, lambda: (gone.unlink(), aside.rename(gone)), monkeypatch)
    code, _, err = train(out="disk/out")
    assert code == 0, err
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2 and all("the training goes on, of" in text and "\n" not in text for text in warned)
    assert "of 4 steps 3 are saved" in warned[0] and "of 5 steps 3 are saved" in warned[1]
    assert saved(out) == 8


def test_an_end_that_cannot_be_saved_says_what_is(train, tmp_path, monkeypatch, caplog):
    out, aside = tmp_path / "disk" / "out", tmp_path / "aside"
    caplog.set_level("WARNING", "invdiff")
    with monkeypatch.context() as patch:
        after(5, lambda: blocked(out.parent, aside), patch)
        code, _, err = train(out="disk/out")
    lines = err.strip().splitlines()
    assert code == 5 and "of 8 steps 5 are saved, the same command goes on" in lines[-1]
    assert lines[-1].startswith("invdiff: error: ") and len(caplog.records) == 3
    out.parent.unlink()
    aside.rename(out.parent)
    assert saved(out) == 5 and load_prior(out)
    assert train(out="disk/out")[0] == 0 and saved(out) == 8


def test_a_full_disk_leaves_the_last_state_whole(train, tmp_path):
    """Files of at most 8 kB, as on a full disk: every state fails, with a warning, and then the end, with an error."""
    assert train("--set", "steps=3")[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    start = ["priors", "train", "data", "--config", "o.json", "--quiet", "-o", "out", "--set", "steps=5"]
    done = subprocess.run(
        [sys.executable, "-m", "invdiff", *start],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 5 and len(lines) == 3, done.stderr
    assert all("cannot be written" in line and "goes on, of" in line for line in lines[:2])
    assert lines[2].startswith("invdiff: error: ") and "of 5 steps 3 are saved" in lines[2]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_folder_that_cannot_be_made_is_refused_before_data_are_read(train, tmp_path, monkeypatch):
    monkeypatch.setattr("invdiff.priors.training_files.load_sources", lambda found: pytest.fail("was read"))
    (tmp_path / "file").touch()
    for out, words in (("file", "is a file; name a folder"), ("file/out", "cannot be made")):
        code, printed, err = train(out=out)
        assert code == (2 if out == "file" else 5) and words in err and (printed, err.count("\n")) == ("", 1)
    with pytest.raises(ResourceError, match=r"cannot be made \(No such file"):
        make_folder(Path("/proc/none/out"))
    with pytest.raises(UsageError, match="is a file"):
        make_folder(tmp_path / "file")
    with pytest.raises(ResourceError, match="cannot be written to"):
        make_folder(Path("/proc"))


def test_the_first_error_is_told_not_that_of_tidying_up(tmp_path):
    """A folder that goes away while a file in it is written, or while it is locked."""
    (tmp_path / "out").mkdir()
    with pytest.raises(ResourceError, match="cannot be written"), atomic_write(tmp_path / "out" / "a") as part:
        part.write_text("x")
        blocked(tmp_path / "out", tmp_path / "aside")
    (tmp_path / "more").mkdir()
    with pytest.raises(KeyError, match="first"), locked(tmp_path / "more" / "a"):
        blocked(tmp_path / "more", tmp_path / "other")
        raise KeyError("first")
    with pytest.raises(OSError, match="directory"):
        save_tensors({}, tmp_path, {})


def test_a_trainer_interrupted_in_a_step_keeps_the_last_state(tmp_path, monkeypatch):
    Trainer(TrainConfig(**FAST, steps=2), [noise_source()], tmp_path).run(QUIET)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def interrupt():
        raise KeyboardInterrupt

    after(2, interrupt, monkeypatch)
    trainer = Trainer(TrainConfig(**FAST, steps=4), [noise_source()], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(QUIET)
    assert trainer.saved == 2 and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
