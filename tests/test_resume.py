"""Runs that are stopped after any step, or killed, end in the same bits; checkpoints of others are refused."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from resume_cases import OFTEN, SAVED, SCAN, in_pieces, request, same
from safetensors import safe_open
from safetensors.torch import save_file

from invdiff import checkpoint
from invdiff.cli.reconstruct import Bar
from invdiff.errors import InputError, Interrupted, UsageError
from invdiff.fingerprint import differences
from invdiff.position import Done, Position, Samples
from invdiff.runner import reconstruct
from invdiff.solvers.base import State
from invdiff.stopping import Stop

ROOT = Path(__file__).resolve().parents[1]
CHAINS = {
    "pnp": {"solver_options": {"polish": 0.1}},
    "pnp in 3D": {"solver": "pnp", "coupling": "tv-z"},
    "dds": {"samples": 2},
    "dps": {"samples": 2, "solver_options": {"sampler": "dpmpp-2m"}},
    "reddiff": {"solver_options": {"times": "random", "optimizer": "momentum"}},
    "daps": {},
    "mbir": {},
    "cgls": {"steps": None},
}


@pytest.mark.parametrize("name", CHAINS)
def test_stopped_after_every_step_the_bits_are_the_same(world, tmp_path, name):
    wanted = request(world, **{"solver": name, "compare": ("fbp",), **CHAINS[name]})
    whole = reconstruct(wanted)
    pieces, count = in_pieces(wanted, tmp_path / SAVED)
    same(whole, pieces)
    runs = whole.record["runs"]
    steps = sum(runs[n]["steps"] for n in runs) + (wanted.samples - 1) * runs[wanted.solver]["steps"]
    assert count == steps and [p.name for p in tmp_path.iterdir()] == [SAVED]
    assert sum("resumed after" in text for text in pieces.record["warnings"]) == count


@pytest.mark.parametrize("name", ["tv", "pnp"])
def test_baselines_and_mri_with_its_phase_resume_as_well(world, tmp_path, name):
    """TV ends by its own rule; the phase is found again."""
    wanted = request(world, solver="tv", steps=None, compare=("cgls",))
    if name == "pnp":
        ct = nib.load(world / "ct.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(ct.dataobj) + 1000, ct.affine), tmp_path / "mr.nii.gz")
        wanted = request(
            world, input=tmp_path / "mr.nii.gz", op="mri", operator={}, slice_axis="2", compare=("zero-filled",)
        )
    pieces, count = in_pieces(wanted, tmp_path / SAVED, every=20 if name == "tv" else 2)
    same(reconstruct(wanted), pieces)
    assert count >= 2


def test_a_killed_run_goes_on(world, here, run):
    args = [str(a) for a in (world / "ct.nii.gz", *SCAN, "--prior", world / "prior", "--steps", "30")]
    command = [sys.executable, "-m", "invdiff", "reconstruct", *args, "-o", "r.nii.gz", *OFTEN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("pnp    step 6"))
        process.kill()
    assert (here / SAVED).exists() and not (here / "r.nii.gz").exists()
    code, out, _ = run("reconstruct", *args, "-o", "r.nii.gz", "--resume")
    assert code == 0 and re.search("resumed after step [0-9]+ of pnp", out) and "fbp    step" not in out
    assert sorted(p.name for p in here.iterdir()) == ["r.json", "r.nii.gz", "r.png"]
    assert run("reconstruct", *args, "-o", "whole.nii.gz", "--quiet")[0] == 0
    assert (here / "r.nii.gz").read_bytes() == (here / "whole.nii.gz").read_bytes()


@pytest.fixture
def interrupt(monkeypatch):
    """``interrupt(*numbers)``: these signals come during the second step; heard also where the tests' parent ignores
    Ctrl-C, as for jobs in the background."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)

    def call(*numbers):
        def heard(self, name, step, steps, info):
            for number in numbers if step == 2 else ():
                signal.raise_signal(number)

        monkeypatch.setattr(Bar, "__call__", heard)

    yield call
    signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_after_the_step(here, run, interrupt, number):
    args = ("reconstruct", "$/ct.nii.gz", *SCAN, "--prior", "$/prior", "--steps", "4", "-o", "r.nii.gz")
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    interrupt(number)
    code, _, err = run(*args)
    assert code == 130 and f"after step 2 of pnp, saved in {here / SAVED}" in err
    assert [p.name for p in here.iterdir()] == [SAVED]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    interrupt()
    code, out, _ = run(*args, "--resume", "--json")
    assert code == 0 and "resumed after step 2 of pnp" in json.loads(out)["warnings"]
    assert json.loads(out)["options"]["resume"] and str(here) not in out


def test_a_second_signal_stops_at_once(here, run, interrupt):
    args = ("reconstruct", "$/ct.nii.gz", *SCAN, "--prior", "$/prior", "--steps", "4", "-o", "r.nii.gz")
    interrupt(signal.SIGINT, signal.SIGTERM)
    code, _, err = run(*args)
    assert code == 130 and "nothing was written over" in err and not list(here.iterdir())
    interrupt(signal.SIGTERM)  # without checkpoints there is nothing to wait for
    assert run(*args, "--checkpoint-minutes", "0")[0] == 130 and not list(here.iterdir())


def test_a_checkpoint_is_neither_lost_nor_taken_for_another(world, here, run, refused, interrupt):
    args = ("$/ct.nii.gz", *SCAN, "--prior", "$/prior", "--steps", "4")
    interrupt(signal.SIGTERM)
    assert run("reconstruct", *args)[0] == 130
    (left,) = here.iterdir()
    assert left.name == "invdiff-ct-sparse.checkpoint.safetensors"
    named = ("reconstruct", *args, "-o", "invdiff-ct-sparse.nii.gz")
    refused(2, f"{left.name}: an unfinished run|--resume|--overwrite", *named)
    other = ("--seed", "3", "--set", "solver.lam=0.5", "--views", "13", "--steps", "9", "--resume")
    refused(2, "another run (--seed 0 -> 3, operator.views 12 -> 13, steps of pnp 4 -> 9 and 2 more)", *named, *other)
    interrupt()
    assert run("reconstruct", *args, "--quiet")[0] == 0  # the next free name
    assert left.exists() and (here / "invdiff-ct-sparse-2.nii.gz").exists()
    assert run("reconstruct", *args, "--quiet", "--resume")[0] == 0  # of the one that was left
    assert not left.exists()
    results = [(here / f"invdiff-ct-sparse{n}.nii.gz").read_bytes() for n in ("", "-2")]
    assert results[0] == results[1] and not (here / "invdiff-ct-sparse-3.nii.gz").exists()
    assert run("reconstruct", *args, "--resume", "-o", "new.nii.gz")[1].count("no checkpoint is there") == 1


def test_other_files_are_named(world, tmp_path):
    wanted = request(world, checkpoint=tmp_path / SAVED)
    stop = Stop()
    stop.asked = "SIGTERM"
    with pytest.raises(Interrupted):
        reconstruct(wanted, stop=stop)
    (tmp_path / "prior").mkdir()
    for path in (world / "prior").iterdir():
        (tmp_path / "prior" / path.name).write_bytes(path.read_bytes())
    with safe_open(tmp_path / "prior" / "model.safetensors", "pt") as archive:
        weights = {key: archive.get_tensor(key) * 1.01 for key in archive.keys()}  # noqa: SIM118
        save_file(weights, tmp_path / "prior" / "model.safetensors", archive.metadata())
    with pytest.raises(UsageError, match=r"another run \(prior sha256 [0-9a-f]{12}\.\.\. -> [0-9a-f]{12}\.\.\.\)"):
        reconstruct(replace(wanted, resume=True, prior=tmp_path / "prior"))
    copy = tmp_path / "ct.nii"
    copy.write_bytes((world / "ct.nii.gz").read_bytes())
    image = nib.load(world / "ct.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), copy)
    with pytest.raises(UsageError, match=r"another run \(input sha256 .*, measured data sha256 "):
        reconstruct(replace(wanted, resume=True, input=copy))
    with pytest.raises(UsageError, match=r"another run \(torch version .* -> 0\)"):
        checkpoint.load(tmp_path / SAVED, told(tmp_path / SAVED) | {"torch version": "0"}, (2, 1, 36, 40), CPU)


CPU = torch.device("cpu")


def told(path):
    """The fingerprint in a checkpoint."""
    with safe_open(path, "pt") as archive:
        return json.loads(archive.metadata()["run"])["fingerprint"]


def some_position():
    """Every kind of array: a shared one, a turned one, complex, 0-dimensional, of whole numbers, a view of another."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 1, 4, 5, generator=g)
    memory = {"turned": x.clone().transpose(-1, -2), "z": torch.complex(x, x + 1), "count": torch.tensor(7)}
    memory |= {"view": x[:, 1:], "wide": x[:, :1].expand(1, 3, 1, 4, 5), "none": torch.zeros(0, 3)}
    memory |= {"done": torch.tensor([True, False]), "levels": torch.tensor([0.1, 3], dtype=torch.float64)}
    samples = Samples(2, x[0].clone(), np.ones((3, 4, 5)), np.full((3, 4, 5), 1 / 3))
    done = Done(np.ones((3, 4, 5), np.float32), None, {"steps": 3, "chi2_per_datum": 0.1, "gap": float("inf")})
    return Position({"tv": done}, "dds", samples, State(x, x, 5, memory), 1.5, 9, 2, 16, ("a note",))


def test_a_checkpoint_returns_every_array_as_it_lay(tmp_path):
    old = some_position()
    checkpoint.save(tmp_path / "c", old, {"a": 1})
    new = checkpoint.load(tmp_path / "c", {"a": 1}, (3, 1, 4, 5), CPU)
    assert new.numbers() == old.numbers() and (tmp_path / "c").stat().st_mode & 0o777 == 0o600
    arrays = dict(new.arrays())
    assert list(arrays) == [name for name, _ in old.arrays()]
    for name, value in old.arrays():
        a, b = (torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in (value, arrays[name]))
        assert a.dtype == b.dtype and torch.equal(a, b), name
        steps = [[n for n, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (a, b)]
        assert steps[0] == steps[1] or name in ("memory.wide", "memory.view"), name
    assert new.state is not None and new.state.x is new.state.x0


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path, own, shape = tmp_path / "c", {"a": 1}, (3, 1, 4, 5)
    checkpoint.save(path, some_position(), own)
    whole = path.read_bytes()
    with safe_open(path, "pt") as archive:
        tensors = {key: archive.get_tensor(key).clone() for key in archive.keys()}  # noqa: SIM118
        metadata = archive.metadata()
    run = json.loads(metadata["run"])
    less = {k: v for k, v in tensors.items() if k != "x"}
    other = {**metadata, "run": json.dumps({**run, "position": {"solver": "pnp"}})}
    cases = [whole[: len(whole) // 2], whole[:-1], whole + b"x", b"", b"pickle" * 99]
    cases += [(tensors, {}), (tensors, metadata | {"version": "2"}), (tensors, metadata | {"run": "{"})]
    cases += [(less, metadata), (tensors, other), (tensors | {"x": torch.zeros(2, 2)}, metadata)]
    for case in cases:
        path.write_bytes(case) if isinstance(case, bytes) else save_file(case[0], path, case[1])
        with pytest.raises(InputError, match=r"cannot be read as a checkpoint .*--overwrite") as error:
            checkpoint.load(path, own, shape, CPU)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"x is \(1, 3, 1, 4, 5\), expected \(1, 3, 1, 4, 6\)"):
        checkpoint.load(path, own, (3, 1, 4, 6), CPU)


def test_differences_are_short():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    assert differences({"a": 1, "b": "y" * 99}, {"a": 2, "c": None}) == (
        "a 1 -> 2, c absent -> None, b yyyyyyyyyyyy... -> absent"
    )
    assert differences(dict(a=1, b=1, c=1, d=1, e=1), {}).endswith("c 1 -> absent and 2 more")
