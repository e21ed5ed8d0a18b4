"""Folders and weights of diffusers: schedulers by their documented configuration, and denoising by diffusers itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from invdiff.errors import PriorError
from invdiff.priors import load_prior
from invdiff.priors.foreign import ImportOptions, import_prior, open_foreign
from invdiff.priors.parametrization import Convention
from invdiff.priors.unet2d import UNet2DConfig
from invdiff.priors.unet2d_files import convention, network, of_scheduler

SMALL = {
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
}
# The open CT priors of DM4CT (train_pixel.py).
DM4CT = {
    "sample_size": 512,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 2,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
UNCHECKED = ImportOptions(check=False)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'invdiff[diffusers]'")


def folder(path: Path, diffusers, scheduler: dict | None, **settings) -> tuple[Path, torch.nn.Module]:
    """A saved network with random weights and its scheduler; the network as well."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**(SMALL | settings)).eval().requires_grad_(False)
    net.save_pretrained(path)
    if scheduler is not None:
        (path / "scheduler_config.json").write_text(json.dumps(scheduler))
    return path, net


def noisy() -> torch.Tensor:
    return torch.randn(2, 1, 16, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_denoise_as_their_own_scheduler(tmp_path, diffusers, kind, betas):
    settings = {"_class_name": "DDIMScheduler", "beta_schedule": betas, "prediction_type": kind, "clip_sample": False}
    path, net = folder(tmp_path, diffusers, settings)
    scheduler = diffusers.DDIMScheduler(**{k: v for k, v in settings.items() if k[0] != "_"})
    scheduler.set_timesteps(1000)
    prior = open_foreign(path, UNCHECKED).load(chunk=2)
    for t in (0, 120, 900):
        bar = float(scheduler.alphas_cumprod[t])
        x, sigma = noisy(), ((1 - bar) / bar) ** 0.5
        z = bar**0.5 * x
        expected = scheduler.step(net(z, t).sample, t, z).pred_original_sample
        assert torch.allclose(prior.denoise(x, sigma), expected, rtol=1e-3, atol=2e-3 * (1 + sigma))


def test_a_table_rescaled_to_pure_noise_is_that_of_diffusers(diffusers):
    settings = {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear", "beta_start": 8e-4, "beta_end": 0.012}
    bar = diffusers.DDIMScheduler(**settings).alphas_cumprod.double()[:-1]
    found = Convention.from_dict(of_scheduler(settings | {"_class_name": "DDIMScheduler"}, 1))
    expected = ((1 - bar) / bar).sqrt().numpy()
    assert len(found.table) == 999
    np.testing.assert_allclose(found.table[:900], expected[:900], rtol=2e-3)


def test_score_of_ve(tmp_path, diffusers):
    scheduler = {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 348.0}
    path, net = folder(tmp_path, diffusers, scheduler, time_embedding_type="fourier", flip_sin_to_cos=True)
    prior = open_foreign(path, UNCHECKED).load(chunk=2)
    x, sigma = noisy(), 0.7
    assert torch.allclose(prior.denoise(x, sigma), x + sigma**2 * net(x, torch.tensor(sigma)).sample, atol=1e-5)
    assert (prior.info.sigma_min, prior.info.sigma_max) == (0.01, 348.0)


def test_edm(tmp_path, diffusers):
    settings = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.6}
    path, net = folder(tmp_path, diffusers, settings)
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.6)
    prior = open_foreign(path, UNCHECKED).load(chunk=2)
    x, sigma = noisy(), torch.tensor(0.7)
    output = net(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)).sample
    assert torch.allclose(prior.denoise(x, 0.7), scheduler.precondition_outputs(x, output, sigma), atol=1e-5)


def test_flow(tmp_path, diffusers):
    path, net = folder(tmp_path, diffusers, {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    prior = open_foreign(path, UNCHECKED).load(chunk=2)
    x, t = noisy(), 0.4
    z = (1 - t) * x  # of x = x0 + t / (1 - t) n
    assert torch.allclose(prior.denoise(x, t / (1 - t)), z - t * net(z, 1000 * t).sample, atol=1e-5)


def test_import_of_a_pipeline_and_back(tmp_path, diffusers):
    settings = {"_class_name": "DDPMScheduler"}
    folder(tmp_path / "pipe" / "unet", diffusers, None, out_channels=2)
    (tmp_path / "pipe" / "scheduler").mkdir()
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    import_prior(tmp_path / "pipe", tmp_path / "safe", UNCHECKED)
    x = noisy()
    first, second = open_foreign(tmp_path / "pipe", UNCHECKED).load(), load_prior(tmp_path / "safe")
    assert torch.equal(first.denoise(x, 0.3), second.denoise(x, 0.3))
    assert second.info.name == "pipe" and second.denoise(x, 0.3).shape == x.shape  # the learned variance is left out
    with pytest.raises(PriorError, match="does not denoise"):
        load_prior(tmp_path / "pipe")


def test_classes(tmp_path, diffusers):
    path, net = folder(tmp_path, diffusers, {"_class_name": "DDPMScheduler"}, num_class_embeds=5)
    with pytest.raises(PriorError, match="5 classes: choose one with --class"):
        open_foreign(path, UNCHECKED)
    prior = open_foreign(path, ImportOptions(check=False, label=3)).load(chunk=2)
    x, sigma = noisy(), Convention().table[300]
    z = x / (1 + sigma**2) ** 0.5
    expected = x - sigma * net(z, 300, torch.tensor([3, 3])).sample
    assert torch.allclose(prior.denoise(x, sigma), expected, atol=1e-4)


def test_weights_saved_alone_and_old_names(tmp_path, diffusers):
    path, _ = folder(tmp_path / "a", diffusers, {"_class_name": "DDPMScheduler"})
    state = load_file(path / "diffusion_pytorch_model.safetensors")
    torch.save({"epoch": 3, "model_state": state, "optimizer_state": {}}, tmp_path / "checkpoint.pth")
    with pytest.raises(PriorError, match=r"how noise was added.*beta_schedule: linear"):
        open_foreign(tmp_path / "checkpoint.pth")
    (tmp_path / "checkpoint.yaml").write_text("beta_schedule: linear\nattention_head_dim: 16\n")
    alone = open_foreign(tmp_path / "checkpoint.pth", UNCHECKED).load()
    expected = open_foreign(path, UNCHECKED).load().denoise(noisy(), 0.3)
    assert torch.equal(alone.denoise(noisy(), 0.3), expected)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        state = {k.replace(f".{new}.", f".{old}.") if ".attentions." in k else k: v for k, v in state.items()}
    assert any("proj_attn" in k for k in state)
    save_file(state, path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(open_foreign(path, UNCHECKED).load().denoise(noisy(), 0.3), expected)


def test_the_open_ct_priors_of_dm4ct(diffusers):
    from invdiff.priors.unet2d import build

    config = UNet2DConfig(DM4CT)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in build(config).state_dict().items()}
    assert (config.stride, config.channels) == (32, 1)
    found = network(shapes, {}).settings
    assert found == {k: DM4CT[k] for k in found if k in DM4CT} | {"add_attention": True}
    assert sum(s.numel() for s in shapes.values()) == 113_668_609  # with diffusers 0.42
    told = convention(config, {"beta_schedule": "linear"})
    assert Convention.from_dict(told) == Convention()


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"_class_name": "CMStochasticIterativeScheduler"}, "cannot be read as a denoiser"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "flow"}, "prediction_type 'flow'"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "beta_schedule 'laplace'.*scaled_linear"),
    ],
)
def test_schedulers_without_a_denoiser_are_refused(scheduler, words):
    with pytest.raises(PriorError, match=words):
        of_scheduler(scheduler, 1)


def test_trained_betas_are_taken_as_they_are():
    table = [0.1, 0.2, 0.3]
    found = Convention.from_dict(of_scheduler({"_class_name": "PNDMScheduler", "trained_betas": table}, 1))
    bar = np.cumprod(1 - np.array(table))
    np.testing.assert_allclose(found.table, np.sqrt((1 - bar) / bar))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": {"_class_name": "UNet2DConditionModel"}}, "is a UNet2DConditionModel; only UNet2DModel"),
        ({"config.json": {"_class_name": "UNet2DModel"} | SMALL}, "has neither diffusion_pytorch_model.safetensors"),
        ({"config.json": {"_class_name": "UNet2DModel"} | SMALL, "w": None}, "how noise was added"),
        ({"config.json": {"_class_name": "UNet2DModel"} | SMALL | {"in_channels": 3}, "w": None}, "needs a condition"),
        ({"config.json": {"_class_name": "UNet2DModel"} | SMALL | {"layers_per_block": 999}, "w": None}, "correct its"),
        ({"config.json": "{"}, "no JSON"),
    ],
)
def test_folders_that_make_no_prior_are_refused(tmp_path, files, words):
    for name, content in files.items():
        if name == "w":
            save_file({"conv_in.weight": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
        else:
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(PriorError, match=words):
        load_prior(tmp_path)


def test_the_missing_package_is_named(monkeypatch):
    from invdiff.priors.unet2d import build

    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(PriorError, match=r"invdiff\[diffusers\]"):
        build(UNet2DConfig(SMALL))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"block_out_channels": None}),
        ("config.json", {"layers_per_block": "x"}),
        ("config.json", {"norm_num_groups": 0}),
        ("config.json", {"attention_head_dim": 0}),
        ("config.json", {"time_embedding_type": "x"}),
        ("scheduler_config.json", {"trained_betas": 5}),
        ("scheduler_config.json", {"beta_schedule": 5}),
        ("scheduler_config.json", {"prediction_type": ["epsilon"]}),
    ],
)
def test_settings_of_another_kind_are_refused(tmp_path, diffusers, name, change):
    path, _ = folder(tmp_path, diffusers, {"_class_name": "DDPMScheduler"})
    file = path / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(PriorError):
        open_foreign(path, UNCHECKED).load()


def test_a_table_is_not_rescaled_because_a_text_says_false(tmp_path, diffusers):
    path, _ = folder(tmp_path, diffusers, {"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": "False"})
    assert open_foreign(path, UNCHECKED).card["convention"]["steps"] == 1000
