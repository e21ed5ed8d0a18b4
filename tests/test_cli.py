"""The command line: results lie where they should, say how they were made, and do not depend on grouping."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from invdiff.files import sha256_file
from invdiff.solvers.dds import DDS

ROOT = Path(__file__).resolve().parents[1]
SCAN = ("--op", "ct-sparse", "--views", "12", "--simulate")


@pytest.fixture
def solve(run, here):
    """``solve(name, *args)``: two steps with the small prior, then data and affine of the result."""

    def call(name, *args, source="$/ct.nii.gz", scan=SCAN):
        steps = () if {"--steps", "fbp", "tv", "sirt"} & {*args} else ("--steps", "2")
        code, _, err = run("reconstruct", source, *scan, "--prior", "$/prior", "-o", name, "--quiet", *steps, *args)
        assert (code, err) == (0, "")
        return np.asarray(nib.load(here / name).dataobj), nib.load(here / name).affine

    return call


def test_the_result_lies_where_the_input_lies(world, solve):
    whole, affine = solve("whole.nii.gz")
    source = nib.load(world / "ct.nii.gz")
    assert whole.shape == source.shape and whole.dtype == np.float32
    np.testing.assert_array_equal(affine, source.affine)
    part, shifted = solve("part.nii.gz", "--slices", "1:3")
    assert part.shape == (40, 36, 2)
    np.testing.assert_allclose(shifted[:3, 3], (source.affine @ [0, 0, 1, 1])[:3])
    truth = np.asarray(source.dataobj)
    fbp, _ = solve("fbp.nii.gz", "--solver", "fbp", "--views", "90", scan=SCAN[:2] + SCAN[4:])
    assert np.corrcoef(fbp.ravel(), truth.ravel())[0, 1] > 0.95  # neither flipped nor turned


def test_storage_order_does_not_matter(world, here, solve):
    image = nib.load(world / "ct.nii.gz")
    for codes in ("LPS", "PIR", "RAS"):
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
        nib.save(image.as_reoriented(turn), here / f"{codes}.nii.gz")
        solve(f"out{codes}.nii.gz", "--solver", "dds", source=f"{codes}.nii.gz")
    back = [nib.as_closest_canonical(nib.load(here / f"out{codes}.nii.gz")) for codes in ("LPS", "PIR", "RAS")]
    for other in back[1:]:
        np.testing.assert_allclose(other.affine, back[0].affine, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(other.dataobj), np.asarray(back[0].dataobj))
    # PIR counts its slices from the top: slice 3 there is slice 1 of the others, noise and draws included.
    part, _ = solve("part.nii.gz", "--solver", "dds", "--slices", "3:4", source="PIR.nii.gz")
    np.testing.assert_array_equal(part, np.asarray(nib.load(here / "outPIR.nii.gz").dataobj)[:, 3:4])


@pytest.mark.parametrize("given", [{}, {"source": "$/m.h5", "scan": ()}], ids=["simulated", "measured"])
def test_same_seed_same_bits(solve, given):
    runs = (("a.nii.gz", 3), ("b.nii.gz", 3), ("c.nii.gz", -4))
    one, again, other = (solve(name, "--solver", "dds", "--seed", seed, **given)[0] for name, seed in runs)
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).max() > 1


@pytest.mark.parametrize("solver", ["pnp", "dds", "dps", "fbp"])
def test_grouping_does_not_matter(solve, solver):
    # Many CG iterations in float32 would amplify the rounding of the network beyond any useful tolerance.
    options = ("--solver", solver, *(("--set", "solver.cg_iterations=4") if solver in ("pnp", "dds") else ()))
    whole, _ = solve("whole.nii.gz", *options)
    alone, _ = solve("alone.nii.gz", *options, "--slices", "1:2")
    np.testing.assert_array_equal(alone, whole[:, :, 1:2])
    pairs, _ = solve("pairs.nii.gz", *options, "--slice-batch", "2")
    np.testing.assert_allclose(pairs, whole, atol=0.2)  # HU, where the network alone rounds by 1e-4


@pytest.mark.parametrize("cut", [(), ("--slices", "2:4")])
def test_measuring_first_gives_the_same_bits(world, here, run, solve, cut):
    assert run("simulate", "$/ct.nii.gz", *SCAN[:4], *cut, "--seed", "5", "-o", "m.h5")[0] == 0
    options = ("--solver", "dds", "--seed", "5")
    direct, affine = solve("direct.nii.gz", *options, *cut)
    read, same = solve("read.nii.gz", *options, "--reference", "$/ct.nii.gz", source="m.h5", scan=())
    np.testing.assert_array_equal(read, direct)
    np.testing.assert_array_equal(same, affine)
    scores = [json.loads((here / f"{name}.json").read_text())["metrics"] for name in ("direct", "read")]
    assert scores[0] == scores[1] and scores[0]["dds"]["psnr_db"] > 5


def test_samples_give_mean_and_spread(here, solve):
    first, _ = solve("first.nii.gz", "--solver", "dds")
    mean, affine = solve("both.nii.gz", "--solver", "dds", "--samples", "2")
    spread = nib.load(here / "both_std.nii.gz")
    np.testing.assert_array_equal(spread.affine, affine)
    np.testing.assert_allclose(np.asarray(spread.dataobj), np.sqrt(2) * abs(mean - first), atol=0.02)
    assert np.asarray(spread.dataobj).max() > 1 and not (here / "first_std.nii.gz").exists()
    solve("both.nii.gz", "--solver", "dds", "--overwrite")
    assert not (here / "both_std.nii.gz").exists()  # it belonged to the old result


def test_manifest(world, here, solve):
    solve("r.nii.gz", "--samples", "2", "--solver", "dds", "--set", "solver.eta=0.5", "--seed", "9")
    record = json.loads((here / "r.json").read_text())
    options = record["options"]
    assert (options["seed"], options["samples"], options["steps"], options["solver"]) == (9, 2, 2, "dds")
    resolved = options["solver_options"]["dds"]
    assert resolved["eta"] == 0.5 and resolved["gamma"] == DDS().gamma
    assert record["inputs"]["input"] == {
        "name": "ct.nii.gz",
        "bytes": (world / "ct.nii.gz").stat().st_size,
        "sha256": sha256_file(world / "ct.nii.gz"),
    }
    assert record["inputs"]["prior"]["sha256"] == sha256_file(world / "prior" / "model.safetensors")
    assert record["output"] == {name: sha256_file(here / name) for name in ("r.nii.gz", "r_std.nii.gz")}
    assert len(record["operator"]["views_deg"]) == 12 and record["noise"]["photons"] == 1e5
    assert record["geometry"]["shape"] == [40, 36, 5] and record["geometry"]["voxel_mm"] == [9, 9, 3]
    assert record["intensity"]["units"] == "HU"
    assert set(record["timings_s"]) == {"measure or read", "fbp", "dds"} and record["peak_memory_mb"] > 100
    assert record["runs"]["dds"]["nfe_per_slice"] == 4  # two samples of two steps
    assert "data range 2000 HU" in record["metrics"]["dds"]["convention"]["psnr_db"]
    assert any("chi-squared" in line for line in record["warnings"])  # two steps of a random prior


def test_evaluate_repeats_the_manifest_and_names_its_conventions(here, run, solve):
    solve("r.nii.gz", "--solver", "fbp")
    code, out, _ = run("evaluate", "r.nii.gz", "$/ct.nii.gz", "--json")
    figures = json.loads((here / "r.json").read_text())["metrics"]["fbp"]
    assert code == 0
    for name in ("psnr_db", "ssim", "nrmse", "rmse", "rmse_body_hu"):
        assert json.loads(out)[name] == pytest.approx(figures[name], rel=1e-6), name
    lines = run("evaluate", "r.nii.gz", "$/ct.nii.gz")[1].splitlines()
    assert len(lines) == 5 and f"{figures['psnr_db']:.4f}" in lines[0] and "data range 2000 HU" in lines[0]


def test_names_quiet_and_json(here, run):
    args = ("reconstruct", "$/ct.nii.gz", *SCAN, "--solver", "fbp")
    assert run(*args, "--quiet") == (0, "", "")
    code, out, err = run(*args, "--json")
    assert (code, err) == (0, "") and json.loads(out) == json.loads((here / "invdiff-ct-sparse-2.json").read_text())
    code, out, err = run(*args)
    assert (code, err) == (0, "") and "PSNR" in out and "wrote invdiff-ct-sparse-3.nii.gz" in out
    stems = ("invdiff-ct-sparse", "invdiff-ct-sparse-2", "invdiff-ct-sparse-3")
    assert {p.name for p in here.iterdir()} == {stem + end for stem in stems for end in (".nii.gz", ".json", ".png")}


def test_a_baseline_may_need_the_prior(here, solve):
    solve("r.nii.gz", "--solver", "fbp", "--compare", "pnp")
    record = json.loads((here / "r.json").read_text())
    assert list(record["metrics"]) == ["pnp", "fbp"] and record["inputs"]["prior"]["sha256"]


def test_dry_run_writes_nothing_and_adds_up(here, run, monkeypatch):
    monkeypatch.setattr("invdiff.plan._seconds", lambda problem, prior, solver, steps: (50.0, 1000.0, None))
    options = ("--prior", "$/prior", "--solver", "dds", "--samples", "3", "--steps", "4")
    args = ("reconstruct", "$/ct.nii.gz", *SCAN, *options)
    code, out, _ = run(*args, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and not list(here.iterdir())
    assert (plan["slices"], plan["data"][:3], plan["steps"]) == ([5, 36, 40], [5, 1, 12], 4)
    assert plan["seconds"] == pytest.approx(3 * (50 + 4 * 1000) + 50 + 1000, abs=45)  # and fbp, and the set-up
    assert run(*args, "--quiet", "-o", "r.nii.gz")[0] == 0
    assert 0.9 < plan["memory_mb"] / json.loads((here / "r.json").read_text())["peak_memory_mb"] < 1.5


def test_a_real_run_with_the_embedded_prior(world, tmp_path):
    """The only run with the real picture and the shipped weights, under a name that needs care."""
    source = tmp_path / "scän $\\bad$ 中.nii.gz"
    source.write_bytes((world / "ct.nii.gz").read_bytes())
    args = ("reconstruct", source, *SCAN, "--steps", "1", "-o", "é.nii.gz")
    command = [sys.executable, "-m", "invdiff", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"") and b"research use only" in done.stdout
    assert (tmp_path / "é.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((tmp_path / "é.json").read_text())["inputs"]["input"]["name"] == source.name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, "é.nii.gz", "é.json", "é.png"])
