"""The network prior: loading, padding, chunks, training and resume; all with tiny random networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from invdiff.errors import PriorError, UsageError
from invdiff.priors import PRIORS, load_prior
from invdiff.priors.network import NetworkPrior
from invdiff.priors.train import TrainConfig, Trainer, edm_loss, save_prior
from invdiff.priors.training_data import CropSampler, Source, random_phantom
from invdiff.priors.training_files import find_volumes
from invdiff.priors.unet import EDMDenoiser, UNetConfig
from invdiff.priors.validate import denoising_table

TINY = UNetConfig(channels=(8, 8), blocks=(1, 1), patch=2, embedding=16)


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(0)
    net = EDMDenoiser(TINY)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_prior(net, tmp_path, {"name": "tiny", "sigma_min": 0.01, "sigma_max": 10.0})
    return tmp_path


def test_odd_sizes_are_padded_and_cut_back(folder):
    prior = load_prior(folder)
    x = torch.randn(1, 3, 1, 13, 18)
    assert prior.denoise(x, 0.2).shape == x.shape
    assert prior.calls == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_however_slices_are_grouped(folder, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(1, 7, 1, 40, 36)
        for chunk in (1, 4):
            prior = load_prior(folder, chunk=chunk)
            together = prior.denoise(x, 0.3)
            threes = torch.cat([prior.denoise(x[:, i : i + 3], 0.3) for i in range(0, 7, 3)], 1)
            alone = torch.cat([prior.denoise(x[:, i : i + 1], 0.3) for i in range(7)], 1)
            assert torch.equal(together, threes) and torch.equal(together, alone)
        other = load_prior(folder, chunk=2).denoise(x, 0.3)
        assert torch.allclose(together, other, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_edm_preconditioning_is_the_published_one():
    """c_skip, c_out, c_in and c_noise of Karras et al. 2022, table 1, with a network that returns its input."""

    class Echo(torch.nn.Module):
        config = TINY

        def forward(self, x, label):
            return x * label.view(-1, 1, 1, 1)

    net = EDMDenoiser(TINY)
    net.net = Echo()
    x, sigma, sd = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 2.0]), 0.5
    s = sigma.view(-1, 1, 1, 1)
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
    c_in, c_noise = 1 / (s**2 + sd**2).sqrt(), s.log() / 4
    assert torch.allclose(net(x, sigma), c_skip * x + c_out * (c_in * x * c_noise), atol=1e-6)
    noise = torch.randn_like(x)
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    error = (net(x + s * noise, sigma) - x).square().mean((1, 2, 3))
    assert torch.allclose(edm_loss(net, x, sigma, noise), (weight * error).mean())


def test_denoise_is_differentiable_and_near_identity_at_small_noise(folder):
    prior = load_prior(folder)
    x = torch.randn(1, 1, 1, 16, 16, requires_grad=True)
    prior.denoise(x, 0.5).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert torch.allclose(prior.denoise(x, 0.01), x, atol=0.1)


def damage(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "invdiff-unet-edm"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("net.stem.bias"), "net.stem.bias"),
        (lambda s: s.update(extra=torch.zeros(2)), "extra"),
        (lambda s: s.update({"net.stem.bias": torch.zeros(3)}), "net.stem.bias"),
        (lambda s: s["net.stem.bias"].fill_(float("nan")), "NaN"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, message):
    damage(folder, change)
    with pytest.raises(PriorError, match=message):
        load_prior(folder)


def test_missing_truncated_and_unknown_priors_are_refused(folder, tmp_path):
    with pytest.raises(PriorError, match="one of embedded"):
        load_prior("nothing")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(PriorError, match="cannot be read"):
        load_prior(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(PriorError, match="no such file"):
        load_prior(folder)


def sources() -> list[Source]:
    rng = np.random.default_rng(0)
    return [Source("a", "CT", tuple(random_phantom(rng, 48) for _ in range(4)))]


def test_training_learns_resumes_and_loads(tmp_path):
    options = {"stages": ((0.0, 32, 4),), "phantoms": 4, "network": TINY, "rate": 3e-3}
    first = Trainer(TrainConfig(minutes=0.1, **options), sources(), tmp_path)
    first.run(lambda text: None)
    x = torch.from_numpy(np.stack(sources()[0].slices))[:, None]
    noise, sigma = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.2)
    untrained = edm_loss(EDMDenoiser(TINY), x, sigma, noise)
    assert edm_loss(first.ema, x, sigma, noise) < 0.8 * untrained
    again = Trainer(TrainConfig(minutes=0.13, **options), sources(), tmp_path)
    assert again.steps == first.steps and again.elapsed_s == first.elapsed_s
    assert all(torch.equal(a, b) for a, b in zip(first.ema.parameters(), again.ema.parameters(), strict=True))
    again.run(lambda text: None)
    assert again.steps > first.steps
    assert isinstance(load_prior(tmp_path), NetworkPrior)
    assert json.loads((tmp_path / "state.json").read_text())["steps"] == again.steps


def test_learning_rate_warms_up_and_ends_at_zero():
    config = TrainConfig()
    assert config.learning_rate(0.0) == 0 and config.learning_rate(1.0) == pytest.approx(0, abs=1e-9)
    assert config.learning_rate(0.2) == config.rate
    assert config.stage(0.0) == (64, 16) and config.stage(0.9) == (128, 8)
    with pytest.raises(UsageError, match="unknown training options"):
        TrainConfig.from_dict({"speed": 1})


def test_crops_keep_absolute_ct_values_and_follow_the_weights():
    flat = Source("flat", "CT", (np.full((40, 50), 0.25, np.float32),))
    other = Source("b", "CT", (np.full((40, 50), -1.0, np.float32),))
    sampler = CropSampler([flat, other], {"b": 0.0}, 0, seed=1)
    batch = next(sampler.batches(32, 6))
    assert batch.shape == (6, 1, 32, 32)
    assert torch.allclose(batch, torch.full_like(batch, 0.25), atol=1e-5)


def test_splits_follow_the_manifest(tmp_path):
    entries = [{"file": "a.nii.gz", "split": "train"}, {"file": "b.nii.gz", "split": "test"}]
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    assert find_volumes([tmp_path], "train") == [tmp_path / "a.nii.gz"]


def test_denoising_table_prints_the_psnr_of_a_perfect_and_an_idle_denoiser():
    table = denoising_table(lambda x, s: x, sources(), slices=2, classical=False)
    row = next(r for r in table.rows if r["sigma"] == 0.05)
    assert row["network"] == pytest.approx(row["noisy"]) and 31.5 < row["noisy"] < 34.5
    assert len(table.lines()) == len(table.rows) + 1


def test_the_shipped_prior_denoises_better_than_doing_nothing():
    if not (PRIORS["embedded"].folder / "model.safetensors").exists():
        pytest.skip("no embedded weights in this checkout")
    from invdiff.phantom import thorax

    prior = load_prior("embedded")
    hu = thorax((2, 128, 128), (3.0, 3.0, 3.0)).hu
    truth = torch.from_numpy(hu / 1000)[None, :, None].float()
    noisy = truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    denoised = prior.denoise(noisy, 0.1)
    assert (denoised - truth).square().mean() < 0.3 * (noisy - truth).square().mean()
