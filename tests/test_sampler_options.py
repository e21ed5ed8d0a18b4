"""Samplers by name: options, refusals and the command line."""

import nibabel as nib
import numpy as np
import pytest

from invdiff.errors import UsageError
from invdiff.samplers import make_sampler
from invdiff.schedule import make_schedule


def test_unknown_names_and_options_are_refused():
    with pytest.raises(UsageError, match=r"unknown sampler 'magic': choose one of ddim, ddpm, deis-tab1"):
        make_sampler("magic")
    with pytest.raises(UsageError, match=r"unknown schedule 'magic': choose one of cosine"):
        make_schedule("magic", 5, 1.0, 0.1)
    with pytest.raises(UsageError, match="sampler 'ddim' has no option 'order': its options are eta"):
        make_sampler("ddim", order=2)
    for name, key, value, words in (
        ("ddim", "eta", "much", "takes a float"),
        ("ddim", "eta", "nan", "eta must lie"),
        ("ddpm", "variance", "huge", "small or large"),
        ("dpmpp-2m", "order", 4, "1, 2 or 3"),
        ("dpmpp-2m", "published", "maybe", "value of published"),
        ("dpm-2", "order", "0", "1, 2 or 3"),
        ("deis-tab1", "degree", 5, "degree must be"),
        ("plms", "order", 1, "2, 3 or 4"),
        ("heun", "churn", -1.0, "churn >= 0"),
    ):
        with pytest.raises(UsageError, match=words):
            make_sampler(name, **{key: value})
    assert make_sampler("dpmpp-3m", published="true").published and make_sampler("ddim", eta="0.5").eta == 0.5


def test_command_line(run, here):
    args = ("priors", "sample", "$/prior", "--steps", "3", "--size", "20,24", "--quiet")
    assert run(*args, "--count", "3", "-o", "s.nii.gz") == (0, "", "")
    volume = nib.load(here / "s.nii.gz")
    assert volume.shape == (24, 20, 3) and np.isfinite(volume.get_fdata()).all()
    assert run(*args, "--count", "1", "-o", "one.nii")[0] == 0
    np.testing.assert_array_equal(nib.load(here / "one.nii").get_fdata()[..., 0], volume.get_fdata()[..., 0])
    assert run(*args, "--count", "1", "--sampler", "ddim", "--set", "sampler.eta=1", "-o", "noisy.nii")[0] == 0
    assert abs(nib.load(here / "noisy.nii").get_fdata() - nib.load(here / "one.nii").get_fdata()).max() > 1e-3
    code, out, _ = run(*args[:-1], "--sampler", "heun", "--schedule", "karras", "--count", "2", "-o", "s.png")
    assert code == 0 and "s.png: tiny: heun, 3 steps (5 calls), karras, seed 0" in out
    assert (here / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("unknown sampler 'magic'|dpmpp-2m", ("--sampler", "magic")),
        ("unknown schedule 'magic'|karras", ("--schedule", "magic")),
        ("--size '3'|H,W", ("--size", "3")),
        ("--set 'eta=1'|sampler.NAME=VALUE", ("--set", "eta=1")),
        ("has no option 'eta'", ("--set", "sampler.eta=1")),
        ("table of betas|fewer steps", ("--schedule", "ddpm", "--steps", "990")),
    ],
)
def test_command_line_refuses(refused, words, args):
    refused(2, words, "priors", "sample", "$/prior", "-o", "s.png", *args)


def test_command_line_writes_over_nothing(run, refused, here):
    (here / "s.png").write_bytes(b"mine")
    refused(2, "exists already|--overwrite", "priors", "sample", "$/prior", "-o", "s.png")
