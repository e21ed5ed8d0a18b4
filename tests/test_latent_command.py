"""``invdiff reconstruct`` with a prior of latents: as from Python, resumed, predicted, or refused in one line."""

import json
import os
import signal
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_latent import UNET, VAE

from invdiff.case import Case
from invdiff.draws import Draws
from invdiff.errors import PriorError, ShapeError, UsageError
from invdiff.fitting import fit_prior, mismatches
from invdiff.latent import latent_problem
from invdiff.operators.identity import Identity
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.latent import LatentPrior
from invdiff.priors.latent_files import load_latent
from invdiff.priors.options import PriorOptions
from invdiff.problem import Problem
from invdiff.runner import Request, prepare, reconstruct
from invdiff.solvers.base import iterate
from invdiff.solvers.reddiff import REDDiff
from invdiff.volume import from_slices

SIDE, SLICES = 8, 3


def latent_prior(channels: int = 1) -> LatentPrior:
    """Means of 2 x 2 pixels, twice as large, of each channel less its number; every channel is seen."""
    latents = GaussianPrior(torch.zeros(1, 4, 4, dtype=torch.float64), torch.eye(16, dtype=torch.float64))
    lift = torch.arange(channels, dtype=torch.float64).view(-1, 1, 1)
    encode = lambda x: 2 * F.avg_pool2d((x.double() - lift).mean(1, keepdim=True), 2).to(x.dtype)  # noqa: E731
    decode = lambda z: ((z / 2).repeat_interleave(2, -1).repeat_interleave(2, -2) + lift).to(z.dtype)  # noqa: E731
    return LatentPrior(latents, encode, decode, channels, 2)


@pytest.fixture
def latents(monkeypatch):
    """Any prior that the command loads is one of latents."""
    monkeypatch.setattr("invdiff.runner.load_prior", lambda name, device="cpu", chunk=None: latent_prior())


@pytest.fixture
def volume(here):
    data = np.random.default_rng(0).normal(100, 30, (SIDE, SIDE, SLICES)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.diag([1.0, 1, 2, 1])), here / "v.nii.gz")
    return here / "v.nii.gz"


COMMAND = ("--op", "inpaint", "--mask", "random:0.5", "--simulate", "--steps", 5, "--quiet", "--prior", "folder")


@pytest.mark.parametrize("name", ["dps", "reddiff"])
@pytest.mark.usefixtures("latents")
def test_the_command_gives_what_python_gives(run, volume, name):
    """Two samples: decoded one by one and then averaged; the baseline beside them sees images."""
    code, _, err = run("reconstruct", volume, *COMMAND, "--solver", name, "--samples", 2, "-o", "r.nii.gz")
    assert (code, err) == (0, "")
    request = Request(
        volume, "inpaint", {"mask": "random:0.5"}, name, steps=5, simulate=True, prior="folder", samples=2
    )
    _, solvers, prior, case, problem = prepare(request)
    inner, solver = latent_problem(problem, prior), solvers[name]
    sigmas, images = solver.sigmas(5, inner, prior), []
    for k in range(2):
        *_, last = iterate(solver, inner, prior, sigmas, Draws(0, case.indices, (k,)))
        images.append(prior.decode(last.x0)[0])
    mean = case.picture((sum(images) / 2).numpy())
    apart = np.std([case.picture(i.numpy()) for i in images], axis=0, ddof=1)
    for stack, file in ((mean, "r.nii.gz"), (apart, "r_std.nii.gz")):
        written = nib.load(volume.parent / file).get_fdata()
        assert np.allclose(written, from_slices(stack, case.grid).data, rtol=0, atol=1e-4)
    manifest = json.loads((volume.parent / "r.json").read_text())
    assert manifest["metrics"].keys() == {"fill", name}
    assert any("latents of an autoencoder" in how for how in manifest["prior"]["adapted"])


@pytest.mark.usefixtures("latents")
def test_a_stopped_run_of_latents_goes_on_to_the_same_bits(run, volume, monkeypatch):
    command = ("reconstruct", volume, *COMMAND, "--solver", "reddiff", "--samples", 2)
    assert run(*command, "-o", "whole.nii.gz")[0] == 0
    step = REDDiff.step

    def struck(self, problem, prior, state, *rest):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, problem, prior, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(REDDiff, "step", struck)
        code, _, err = run(*command, "-o", "part.nii.gz")
        assert code == 130 and "after step 3 of reddiff, saved" in err
        code, _, err = run(*command, "-o", "part.nii.gz", "--resume")
        assert code == 130 and "after step 3 of reddiff, sample 2, saved" in err
    assert run(*command, "-o", "part.nii.gz", "--resume")[0] == 0
    found, expected = (nib.load(volume.parent / f"{name}.nii.gz").get_fdata() for name in ("part", "whole"))
    assert np.array_equal(found, expected)


@pytest.mark.usefixtures("latents")
def test_other_solvers_couplings_and_options_are_refused_in_one_line(refused, run, volume):
    start = ("reconstruct", volume, *COMMAND)
    for name in ("pnp", "dds", "diffpir"):
        words = f"solver '{name}' needs a linear operator|one of latents|use --solver dps or reddiff"
        refused(2, words, *start, "--solver", name)
    refused(2, "takes no options: drop --set", *start, "--solver", "dps", "--set", "prior.tile=32")
    refused(2, "are not coupled: drop --coupling", *start, "--solver", "dps", "--coupling", "tv-z")
    nib.save(nib.Nifti1Image(np.random.rand(9, 8, 2).astype(np.float32), np.eye(4)), volume.parent / "odd.nii.gz")
    odd = ("reconstruct", volume.parent / "odd.nii.gz", *COMMAND, "--solver", "dps", "--slice-axis", "2")
    refused(3, "sides of a multiple of 2 pixels", *odd)
    code, out, _ = run("reconstruct", volume, *COMMAND, "--solver", "dps", "--dry-run")
    assert code == 0 and "nothing was run or written" in out


def test_solvers_without_a_prior_ignore_it(volume, monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr("invdiff.runner.load_prior", never)
    assert reconstruct(input=volume, op="inpaint", solver="fill", simulate=True, prior="folder").metrics


def picture_problem(channels: int = 1, side: int = SIDE) -> Problem:
    operator = Identity((channels, side, side))
    operator.complex_image = channels == 2
    y = torch.randn(SLICES, channels, side, side, generator=torch.Generator().manual_seed(0))
    return Problem(y, operator, y)


def test_a_colour_autoencoder_serves_grey_images():
    """encode sees equal channels, less 0, 1 and 2 on average 1; decode gives 0, 1 and 2 more, on average 1."""
    colour, problem = latent_prior(3), picture_problem()
    fit = fit_prior(colour, problem, PriorOptions())
    x = problem.y[None]
    assert (fit.channels, fit.info.channels) == (1, 1) and torch.allclose(fit.encode(x), latent_prior().encode(x - 1))
    z = fit.encode(x)
    assert torch.allclose(fit.decode(z), latent_prior().decode(z) + 1)
    assert fit.info.adapted[-1].startswith("colour autoencoder: 3 equal channels")
    assert torch.equal(fit.restrict(slice(0, 1)).decode(z[:, :1]), fit.decode(z)[:, :1])
    own = latent_prior()
    assert fit_prior(own, problem, PriorOptions()) is own
    for wrong, words in ((picture_problem(2), "complex images of 2"), (picture_problem(3), "images of 3")):
        with pytest.raises(PriorError, match=f"takes images of 1 channels, the data are {words}"):
            fit_prior(own, wrong, PriorOptions())
    with pytest.raises(ShapeError, match="multiple of 2"):
        fit_prior(own, picture_problem(1, 7), PriorOptions())
    with pytest.raises(UsageError, match="takes no options"):
        fit_prior(own, problem, PriorOptions(tile="none"))


def test_the_size_of_a_prior_of_latents_is_that_of_images():
    within = latent_prior().prior
    within.info = replace(within.info, size=4)
    prior = LatentPrior(within, *(latent_prior().encoder, latent_prior().decoder, 1, 2))
    assert prior.info.size == 8 and prior.restrict(slice(0, 1)).info.size == 8
    case = Case.__new__(Case)
    object.__setattr__(case, "grid", type("Grid", (), {"source": type("Source", (), {"modality": "image"})}))
    assert mismatches(prior, picture_problem(), case) == []
    assert "trained on 8 x 8" in mismatches(prior, picture_problem(1, 16), case)[0]


def test_a_folder_of_diffusers_is_reconstructed_with(run, volume, tmp_path, monkeypatch):
    """Tiny AutoencoderKL and UNet2DModel of random weights, hence without the checks of what they do."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'invdiff[diffusers]'")
    folder = tmp_path / "ldm"
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**(VAE | {"in_channels": 3, "out_channels": 3}))
    vae.save_pretrained(folder / "vae")
    diffusers.UNet2DModel(**UNET).save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    load = lambda name, device, chunk: load_latent(folder, device, chunk, check=False)  # noqa: E731
    monkeypatch.setattr("invdiff.runner.load_prior", load)
    for name in ("dps", "reddiff"):
        output = f"{name}.nii.gz"
        code, _, err = run("reconstruct", volume, *COMMAND, "--solver", name, "-o", output, "--slices", "0:2")
        assert (code, err) == (0, ""), err
        assert np.isfinite(nib.load(volume.parent / output).get_fdata()).all()
    how = json.loads((volume.parent / "dps.json").read_text())["prior"]["adapted"]
    assert "sha256" in how[0] and len(how[0].split()[-1]) == 64 and how[1].startswith("colour autoencoder")
