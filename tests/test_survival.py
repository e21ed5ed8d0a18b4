"""Runs without enough memory or room, or beside another run: they go on with less, or say in one line why not."""

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from resume_cases import OFTEN, SAVED, SCAN, in_pieces, request, same
from solver_cases import Local

from invdiff.destination import locked
from invdiff.errors import ResourceError, is_out_of_memory
from invdiff.operators.identity import Identity
from invdiff.priors.network import NetworkPrior
from invdiff.problem import whiten
from invdiff.runner import reconstruct
from invdiff.solving import Run
from invdiff.stopping import Stop

ROOT = Path(__file__).resolve().parents[1]

# Memory --------------------------------------------------------------------------------------------------------------


CUDA = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.fixture
def scarce(monkeypatch):
    """``scarce(slices)``: more slices than that in one call of the network, or in one data step, find no memory."""
    from invdiff.solvers import pnp

    network, step, seen = NetworkPrior.denoise, pnp.data_step, {"network": [], "step": []}

    def call(chunk=99, block=99, error=CUDA):
        def denoise(self, x, sigma, context=None):
            seen["network"].append(self.chunk)
            if self.chunk > chunk:
                raise error
            return network(self, x, sigma, context)

        def data_step(problem, *args, **options):
            seen["step"].append(problem.block)
            if options.get("reduction") and problem.block > block:  # not that of the warm start
                raise error
            return step(problem, *args, **options)

        monkeypatch.setattr(NetworkPrior, "denoise", denoise)
        monkeypatch.setattr(pnp, "data_step", data_step)
        return seen

    return call


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_network_call_without_memory_is_done_again_with_half_the_slices(world, scarce, error):
    wanted = request(world, slice_batch=4, solver_options={"cg_iterations": 4}, slices=(0, 5))
    whole, seen = reconstruct(wanted), scarce(chunk=1, error=error)
    found = reconstruct(wanted)
    assert seen["network"] == [4, 2, 1, 1, 1]
    assert found.record["prior"]["slices_per_network_call"] == 1 and found.record["runs"]["pnp"]["steps"] == 3
    warned = [text for text in found.record["warnings"] if "out of memory in step 1 of pnp" in text]
    assert len(warned) == 2 and "2 instead of 4 slices" in warned[0] and "1 instead of 2" in warned[1]
    np.testing.assert_allclose(found.volume.data, whole.volume.data, atol=0.2)  # HU
    same(found, reconstruct(replace(wanted, slice_batch=1)))


def test_a_data_step_without_memory_is_done_again_on_half_the_slices(world, scarce):
    """Which changes no bit."""
    wanted = request(world, slice_batch=2, slices=(0, 5))
    whole, seen = reconstruct(wanted), scarce(block=1)
    found = reconstruct(wanted)
    # The start is repeated with the first step. Of 5 slices the half is 2.
    assert seen["step"] == [32, 32, 2, 2, 1, 1, 1, 1]
    assert found.record["prior"]["slices_per_network_call"] == 2
    np.testing.assert_array_equal(found.volume.data, whole.volume.data)


def test_what_was_halved_stays_so_after_a_resume(world, tmp_path, scarce):
    wanted, seen = request(world, slice_batch=2), scarce(chunk=1)
    pieces, _ = in_pieces(wanted, tmp_path / SAVED)
    assert seen["network"] == [2, 1, 1, 1] and pieces.record["prior"]["slices_per_network_call"] == 1
    same(pieces, reconstruct(wanted))


@pytest.mark.parametrize("network", [False, True])
def test_what_had_no_memory_is_halved_first_and_then_the_other(network):
    prior = Local(4)
    run = Run(None, None, whiten(torch.zeros(5, 1, 4, 4), Identity((1, 4, 4)), 1.0), prior, None)
    seen = []
    with pytest.raises(ResourceError, match="in step 2, with one slice at a time"):
        for _ in range(9):
            run.shrink("step 2", network)
            seen.append((prior.chunk, run.problem.block))
    assert seen == ([(2, 32), (1, 32), (1, 2), (1, 1)] if network else [(4, 2), (4, 1), (2, 1), (1, 1)])


def test_a_slice_at_a_time_without_memory_is_an_error(world, scarce):
    scarce(chunk=0)
    with pytest.raises(ResourceError, match=r"out of memory in step 1 of pnp, with one slice at a time: use fewer"):
        reconstruct(request(world, slice_batch=2))
    scarce(chunk=0, error=RuntimeError("another error"))
    with pytest.raises(RuntimeError, match="another error"):
        reconstruct(request(world))
    assert is_out_of_memory(RuntimeError("CUFFT_ALLOC_FAILED")) and not is_out_of_memory(ValueError("memory"))


# Disk ----------------------------------------------------------------------------------------------------------------


def test_without_room_the_run_goes_on_and_its_result_is_refused(world, here):
    """Files of at most 4 kB, as on a full disk: checkpoints fail with a warning, the result with an error."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    options = ("--prior", world / "prior", "--steps", "3", "-o", "r.nii.gz", "--overwrite", *OFTEN)
    args = [str(a) for a in (world / "ct.nii.gz", *SCAN, *options)]
    (here / "r.nii.gz").write_text("old")
    (here / "r.checkpoint.safetensors").write_text("older")
    command = [sys.executable, "-m", "invdiff", "reconstruct", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, preexec_fn=limit, check=False)
    assert done.returncode == 5 and "r.nii.gz: cannot be written" in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout.count("warning: no checkpoint could be saved") == 1
    assert {p.name: p.read_text() for p in here.iterdir()} == {"r.nii.gz": "old", SAVED: "older"}


def test_too_little_room_for_the_result_is_seen_before_the_run(refused, monkeypatch):
    def full(path):
        return type("Usage", (), {"free": 1000})

    monkeypatch.setattr("shutil.disk_usage", full)
    refused(5, "0 MB free|make room", "reconstruct", "$/ct.nii.gz", *SCAN, "--solver", "fbp", "-o", "r.nii.gz")


def test_a_stop_without_room_says_so(world, tmp_path, monkeypatch):
    def full(*_):
        raise ResourceError("r: cannot be written (No space left on device)")

    monkeypatch.setattr("invdiff.solving.save", full)
    stop = Stop()
    stop.asked = "SIGTERM"
    with pytest.raises(ResourceError, match="No space left"):
        reconstruct(request(world, checkpoint=tmp_path / SAVED), stop=stop)


def test_two_runs_to_one_output(here, run, refused, tmp_path):
    args = ("reconstruct", "$/ct.nii.gz", *SCAN, "--solver", "fbp", "-o", "r.nii.gz", "--quiet")
    with locked(here / "r.nii.gz"):
        refused(2, "r.nii.gz: another run is writing it|name another output", *args, "--overwrite")
        (here / "link.nii.gz").symlink_to("r.nii.gz")
        refused(2, "another run is writing it", *args, "--overwrite", "-o", "link.nii.gz")
        assert run(*args, "-o", "s.nii.gz")[0] == 0
    assert run(*args)[0] == 0 and not [p for p in here.iterdir() if "lock" in p.name]


def test_a_link_is_followed_and_what_a_killed_run_left_is_swept(here, run):
    (here / "real").mkdir()
    (here / "r.nii.gz").symlink_to("real/target.nii.gz")
    (here / "real" / ".target.checkpoint.safetensors.part-1-abc").write_text("half")
    args = ("reconstruct", "$/ct.nii.gz", *SCAN, "--solver", "fbp", "-o", "r.nii.gz")
    code, out, _ = run(*args)
    assert code == 0 and "is a symbolic link: writing" in out and (here / "r.nii.gz").is_symlink()
    assert sorted(p.name for p in (here / "real").iterdir()) == ["target.json", "target.nii.gz", "target.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_read_only_folder_is_seen_before_the_run(here, refused):
    (here / "locked").mkdir(mode=0o500)
    refused(5, "cannot be written to", "reconstruct", "$/ct.nii.gz", *SCAN, "-o", "locked/r.nii.gz")
