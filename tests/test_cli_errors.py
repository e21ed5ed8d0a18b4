"""Refusals of the command line: one line that says why and what to do, its exit code, and nothing written."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from invdiff.errors import UsageError
from invdiff.measurement_file import load_measurement, save_measurement

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("INVDIFF_DATA", ROOT.parent / "shared" / "data"))
SCAN = ("--op", "ct-sparse", "--views", "12", "--simulate")


def damaged(world) -> dict[str, bytes]:
    whole = (world / "ct.nii.gz").read_bytes()
    plain = gzip.decompress(whole)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    huge = plain[:42] + np.array([32767] * 3, "<i2").tobytes() + plain[48:]
    singular = plain[:280] + bytes(48) + plain[328:]
    return {
        "half.nii.gz": whole[: len(whole) // 2],
        "tail.nii.gz": whole[:-4],
        "crc.nii.gz": bytes(flipped),
        "text.nii": b"hello " * 99,
        "empty.nii": b"",
        "huge.nii.gz": gzip.compress(huge),
        "singular.nii": singular,
    }


def odd(hu: np.ndarray) -> dict[str, np.ndarray]:
    with_nan = hu.copy()
    with_nan[3, 3, 3] = np.nan
    return {
        "nan.nii.gz": with_nan,
        "many.nii.gz": np.stack([hu, hu], -1),
        "mu.nii.gz": 0.0193 * (1 + hu / 1000),
        "stored.nii.gz": hu + 1024,
        "mr.nii.gz": np.clip(np.random.default_rng(0).gamma(1.2, 60, hu.shape), 0, None).astype(np.float32),
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.nii.gz", "no such file|check the path"),
        ("half.nii.gz", "truncated|download it again"),
        ("tail.nii.gz", "truncated|download it again"),
        ("crc.nii.gz", "damaged|download it again"),
        ("text.nii", "not NIfTI|convert it"),
        ("empty.nii", "is empty"),
        ("huge.nii.gz", "(32767, 32767, 32767)"),
        ("singular.nii", "affine cannot be inverted|repair the header"),
        ("nan.nii.gz", "1 voxels are NaN|--nan fill"),
        ("many.nii.gz", "holds 2 volumes|--volume-index 0 ... 1"),
        ("mu.nii.gz", "not HU|convert to HU first"),
        ("stored.nii.gz", "not HU|subtract 1024"),
        ("mr.nii.gz", "not HU|mri"),
        (".", "holds no DICOM images"),
    ],
)
def test_bad_volumes(world, here, refused, name, words):
    if name in (files := damaged(world)):
        (here / name).write_bytes(files[name])
    elif name in (arrays := odd(np.asarray(nib.load(world / "ct.nii.gz").dataobj))):
        nib.save(nib.Nifti1Image(arrays[name].astype(np.float32), nib.load(world / "ct.nii.gz").affine), here / name)
    refused(3, name.strip(".") + "|" + words, "reconstruct", name, *SCAN)
    refused(3, words.split("|")[-1], "simulate", name, *SCAN[:2], "-o", "m.h5")


CASES = [
    (2, "--op ct-sparse", ()),
    (2, "unknown operator 'ct-fan'|ct-limited, ct-lowdose, ct-sparse", ("$/ct.nii.gz", "--op", "ct-fan")),
    (2, "--simulate|.h5", ("$/ct.nii.gz", "--op", "ct-sparse")),
    (
        2,
        "unknown solver 'magic'|daps, ddnm, ddrm, dds, diffpir, dps, fbp|pnp, reddiff, sense-cg, sirt, tv",
        ("--solver", "magic"),
    ),
    (2, "unknown solver 'magic'", ("--compare", "magic")),
    (4, "unknown prior 'chest'|embedded", ("--prior", "chest")),
    (2, "no option 'arc'|views, start", ("--arc", "90")),
    (2, "--views|x>=1", ("--views", "0")),
    (2, "--steps|x>=1", ("--steps", "0")),
    (2, "--samples 3|deterministic|use dds, dps", ("--samples", "3")),
    (2, "tv-z|no slice coupling|use pnp, dds, dps", ("--solver", "sirt", "--coupling", "tv-z")),
    (2, "cuda:99|use cpu or auto", ("--device", "cuda:99")),
    (2, "cuda:999|use cpu or auto", ("--device", "cuda:999")),
    (2, "unknown device|cuda[:N]", ("--device", "abacus")),
    (2, "--slice-batch takes auto or|'x'", ("--slice-batch", "x")),
    (2, "A:B|10:20", ("--slices", "3")),
    (3, "slices 4:9|B <= 5", ("--slices", "4:9")),
    (2, "write solver.NAME=VALUE", ("--set", "lam=3")),
    (2, "no option 'foo'|lam, cg_iterations", ("--set", "solver.foo=3")),
    (2, "lam takes a float|'big'", ("--set", "solver.lam=big")),
    (2, "lam must be finite", ("--set", "solver.lam=nan")),
    (2, "use --coupling", ("--set", "solver.coupling=tv-z")),
    (2, "0 < sigma_min <= sigma_max", ("--set", "solver.sigma_min=5")),
    (2, "sigma_max is 50|knows noise levels from 0.005 to 20", ("--set", "solver.sigma_max=50")),
    (2, "unknown sampler 'magic'|dpmpp-3m, euler", ("--solver", "mm", "--set", "solver.sampler=magic")),
    (2, "unknown schedule 'karas'|did you mean 'karras'", ("--set", "solver.schedule=karas")),
    (2, "cg_iterations >= 1", ("--set", "solver.cg_iterations=0")),
    (2, "check must be positive", ("--solver", "tv", "--set", "solver.check=0")),
    (2, "relaxation in (0, 2)", ("--solver", "tv", "--set", "solver.relaxation=3")),
    (2, "no option 'name'", ("--set", "solver.name=x")),
    (2, "no option 'name'", ("--set", "operator.name=x")),
    (2, "no schedule of steps|drop the option", ("--solver", "sirt", "--steps", "10")),
    (2, "no option 'foo'|photons", ("--set", "operator.foo=3")),
    (2, "views must be a finite number|many", ("--set", "operator.views=many")),
    (2, "photons must be positive", ("--photons", "0")),
    (2, "photons must be a finite number", ("--photons", "nan")),
    (2, "detector elements, the limit", ("--detector-pitch", "1e-9")),
    (5, "GB|use fewer views", ("--views", "1000000", "--detector-count", "1000000")),
    (2, "drop the option", ("--reference", "$/ct.nii.gz")),
    (2, "end it in .nii.gz, .nii, ", ("-o", "result.txt")),
    (2, "does not exist; create it", ("-o", "none/r.nii.gz")),
    (2, "cannot be resolved|name another output", ("-o", "x" * 300 + ".nii.gz")),
    (2, "too long a name|name another output", ("-o", "x" * 246 + ".nii.gz")),
    (5, "cannot be written to|name another folder", ("-o", "/proc/r.nii.gz")),
    (2, "would overwrite the input", ("-o", "$/ct.nii.gz", "--overwrite")),
]


@pytest.mark.parametrize(("code", "words", "args"), CASES, ids=[words.split("|")[0] for _, words, _ in CASES])
def test_bad_usage(refused, monkeypatch, code, words, args):
    def too_late(*args):
        raise AssertionError("the run has started")

    monkeypatch.setattr("invdiff.runner.run_solver", too_late)
    whole = not args or args[0] == "$/ct.nii.gz"
    refused(code, words, "reconstruct", *(args if whole else ("$/ct.nii.gz", *SCAN, *args)))


def test_other_commands_refuse_as_well(run, refused):
    refused(2, "unknown command 'recon'|reconstruct", "recon")
    refused(2, "give it to 'reconstruct'", "simulate", "$/ct.nii.gz", *SCAN[:2], "-o", "m.h5", "--set", "solver.lam=1")
    refused(2, ".h5", "simulate", "$/ct.nii.gz", *SCAN[:2], "-o", "m.nii.gz")
    refused(3, "no known format", "evaluate", "$/m.h5", "$/ct.nii.gz")
    assert run()[:1] == (0,) and "reconstruct" in run("--help")[1]


def test_bad_measurements(world, here, refused):
    good = load_measurement(world / "m.h5")

    def bad(words, **parts):
        broken = replace(good)
        for name, part in parts.items():
            object.__setattr__(broken, name, part)
        save_measurement(here / "bad.h5", broken, overwrite=True)
        refused(3, "bad.h5|" + words, "reconstruct", "bad.h5", "--solver", "fbp")

    op = good.operator
    bad("11 angles but 12 projections", operator=op | {"views_deg": op["views_deg"][:-1]})
    bad("no scan that can be read", operator=op | {"rows": "many"})
    bad("mu_water_per_mm is -1|positive", operator=op | {"mu_water_per_mm": -1})
    bad("photons is None", noise=good.noise | {"photons": None})
    bad("5 slices", volume=good.volume | {"shape": [40, 36, 4]})
    bad("'HU' and 'CT'", volume=good.volume | {"modality": "MR"})
    bad("voxels, the limit", volume=good.volume | {"shape": [10**6, 10**6, 5]})
    (here / "half.h5").write_bytes((world / "m.h5").read_bytes()[:9000])
    refused(3, "half.h5: is damaged or truncated", "reconstruct", "half.h5")
    for args, words in ((("--views", "9"), "fixes the operator"), (("--simulate",), "a measurement already")):
        refused(2, words, "reconstruct", "$/m.h5", *args)
    refused(2, "was measured with --op ct-sparse", "reconstruct", "$/m.h5", "--op", "ct-limited")


def test_bad_priors(world, here, refused):
    weights = load_file(world / "prior" / "model.safetensors")
    card = json.loads((world / "prior" / "config.json").read_text())
    key = "net.stem.weight"
    nan = weights | {key: weights[key] * float("nan")}
    rest = {k: v for k, v in weights.items() if k != key}
    bad = [
        ("no such file|a prior is a folder with", None, card),
        ("NaN", nan, card),
        (f"keys or shapes differ|{key}|wrong config?", rest, card),
        ("keys or shapes differ", {"module." + k: v for k, v in weights.items()}, card),
        ("cannot be read as a prior", weights, {"network": None, "info": None}),
        ("cannot be read as a prior|sigma_min", weights, card | {"info": {"name": "x", "sigma_min": 0}}),
        ("cannot be read as a prior", weights, card | {"network": card["network"] | {"channels": [8, -8]}}),
    ]
    for number, (words, content, config) in enumerate(bad):
        folder = here / f"prior{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if content is not None:
            save_file(content, folder / "model.safetensors", {"format": "invdiff-unet-edm"})
        refused(4, words, "reconstruct", "$/ct.nii.gz", *SCAN, "--prior", folder)
    model = here / "prior1" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:5000])
    refused(4, "cannot be read as a prior|restore it", "reconstruct", "$/ct.nii.gz", *SCAN, "--prior", model.parent)


@pytest.mark.parametrize(
    ("where", "error", "code", "words"),
    [
        ("invdiff.output.build_manifest", KeyboardInterrupt(), 130, "interrupted"),
        ("invdiff.output.mosaic", OSError(errno.ENOSPC, "No space left on device"), 5, "No space left"),
        ("invdiff.runner.run_solver", MemoryError(), 5, "--slice-batch"),
        ("invdiff.runner.run_solver", RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "--slice-batch"),
        ("invdiff.runner.run_solver", IndexError("a\nb"), 1, "mistake in invdiff (IndexError: a b)"),
    ],
)
def test_failures_leave_the_old_output(refused, here, monkeypatch, where, error, code, words):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(where, fail)
    for name in ("r.nii.gz", "r.json", "r.png", "r_std.nii.gz"):
        (here / name).write_text("old")
    args = ("--solver", "fbp", "-o", "r.nii.gz")
    refused(2, "r.nii.gz: exists already|--overwrite", "reconstruct", "$/ct.nii.gz", *SCAN, *args)
    refused(code, words, "reconstruct", "$/ct.nii.gz", *SCAN, *args, "--overwrite", "--quiet")


@pytest.mark.skipif(not DATA.is_dir(), reason="real data absent; set INVDIFF_DATA to the folder that holds them")
@pytest.mark.parametrize("name", ["mr_adi_memprage.nii.gz", "mr_stroke_t1.nii.gz"])
def test_real_mr_volumes_are_refused(refused, name):
    refused(3, f"{name}|not HU", "reconstruct", DATA / name, *SCAN)


def test_numerical_failure(run, here, monkeypatch):
    monkeypatch.setattr("invdiff.priors.network.NetworkPrior.denoise", lambda self, x, *a: x / 0)
    code, _, err = run("reconstruct", "$/ct.nii.gz", *SCAN, "--prior", "$/prior")
    assert code == 6 and "not finite at step 1" in err and not list(here.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_of_a_running_process(world, here, number):
    (here / "r.nii.gz").write_text("old")
    source, prior = world / "ct.nii.gz", world / "prior"
    args = ("reconstruct", source, *SCAN, "--prior", prior, "--steps", "100000", "-o", "r.nii.gz", "--overwrite")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "invdiff", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("pnp"))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    said = err.strip().splitlines()
    assert process.returncode == 130 and number.name in said[0] and "invdiff: error: interrupted after step" in said[1]
    assert sorted(p.name for p in here.iterdir()) == ["r.checkpoint.safetensors", "r.nii.gz"]
    assert (here / "r.nii.gz").read_text() == "old"


def test_a_run_that_diverges_keeps_the_last_good_estimate(here, run):
    """A step so long that single precision ends at the next one; the estimate before that is written."""
    options = ("--solver", "dps", "--set", "solver.zeta=1e30", "--steps", "8", "--slices", "1:2")
    code, _, err = run("reconstruct", "$/ct.nii.gz", *SCAN, *options, "-o", "r.nii.gz", "--quiet")
    assert code == 6 and "not finite at step" in err and "sigma" in err and "r-last-good.nii.gz" in err
    assert sorted(p.name for p in here.iterdir()) == ["r-last-good.nii.gz"]
    assert np.isfinite(nib.load(here / "r-last-good.nii.gz").get_fdata()).all()


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("steps", 2.5), ("samples", 0), ("samples", True)])
def test_requests_of_the_library_need_whole_numbers(name, value):
    from invdiff.configure import configure
    from invdiff.runner import Request

    with pytest.raises(UsageError, match=f"{name} must be a whole number of at least 1, got {value}"):
        configure(Request(solver="dds", **{name: value}))


def test_an_unknown_operator_of_the_library_is_refused_by_name():
    from invdiff.runner import Request, prepare

    with pytest.raises(UsageError, match=r"unknown operator 'ct-spars': .*\(did you mean 'ct-sparse'\?\)"):
        prepare(Request(op="ct-spars"))
