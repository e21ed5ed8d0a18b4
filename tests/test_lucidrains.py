"""Files of denoising-diffusion-pytorch: the network against the package itself, and everything else from the file."""

import math

import pytest
import torch

from invdiff.errors import PriorError
from invdiff.priors import load_prior
from invdiff.priors.foreign import ImportOptions, open_foreign
from invdiff.priors.lucidrains import Attention, LucidrainsConfig, LucidrainsUNet, sinusoids
from invdiff.priors.lucidrains_files import network

SMALL = LucidrainsConfig(1, 1, 8, (8, 8, 16), (False, True), (2, 2), (4, 4))
STEPS = 40
G = torch.Generator().manual_seed(9)
UNCHECKED = ImportOptions(check=False)


def betas() -> torch.Tensor:
    return torch.linspace(0.001, 0.3, STEPS)


def loss_weight(objective: str) -> torch.Tensor:
    """Of the package, without a largest signal-to-noise ratio."""
    bar = (1 - betas().double()).cumprod(0)
    snr = bar / (1 - bar)
    return {"pred_noise": torch.ones(STEPS), "pred_x0": snr, "pred_v": snr / (1 + snr)}[objective].float()


def weights(config: LucidrainsConfig = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LucidrainsUNet(config).state_dict().items()}
    return {k: 0.2 * torch.randn(shape, generator=g) + k.endswith(".g") for k, shape in shapes.items()}


def trainer(state: dict[str, torch.Tensor], objective: str = "pred_v") -> dict:
    """The layout of the package's ``Trainer.save``: diffusion with its tables, and the averages of ema-pytorch."""
    tables = {"betas": betas(), "alphas_cumprod": (1 - betas()).cumprod(0), "loss_weight": loss_weight(objective)}
    whole = tables | {f"model.{k}": v for k, v in state.items()}
    other = {k: v + 1 if k.startswith("model.") else v for k, v in whole.items()}
    ema = {f"online_model.{k}": v for k, v in other.items()} | {f"ema_model.{k}": v for k, v in whole.items()}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(7)}
    return {"step": 7, "model": other, "opt": {"state": {}}, "ema": ema, "scaler": None, "version": "2.3.4"}


def by_hand(z: torch.Tensor, index: int, objective: str, net) -> torch.Tensor:
    """E[x0] from the formulas of the package: ``predict_start_from_noise`` and ``predict_start_from_v``."""
    bar = float((1 - betas().double()).cumprod(0)[index])
    with torch.no_grad():
        out = net(z, torch.full((len(z),), float(index)))[:, : z.shape[1]]
    if objective == "pred_x0":
        return out
    return (
        bar**-0.5 * z - (1 / bar - 1) ** 0.5 * out
        if objective == "pred_noise"
        else bar**0.5 * z - (1 - bar) ** 0.5 * out
    )


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_a_trainers_file_denoises_as_its_package_from_table_to_objective(tmp_path, objective):
    state = weights()
    torch.save(trainer(state, objective), tmp_path / "model-3.pt")
    found = open_foreign(tmp_path / "model-3.pt", UNCHECKED)
    assert (found.card["architecture"], found.checkpoint.part) == ("lucidrains", "ema")
    assert LucidrainsConfig(**found.card["network"]) == SMALL
    net = LucidrainsUNet(SMALL)
    net.load_state_dict(state)
    x = torch.randn(2, 1, 16, 12, generator=torch.Generator().manual_seed(1))
    for index in (0, 11, STEPS - 1):
        bar = float((1 - betas().double()).cumprod(0)[index])
        expected = by_hand(bar**0.5 * x, index, objective, net)
        assert torch.allclose(found.load(chunk=2).denoise(x, (1 / bar - 1) ** 0.5), expected, atol=1e-4)


def test_the_other_weights_of_the_file_can_be_chosen(tmp_path):
    torch.save(trainer(weights()), tmp_path / "m.pt")
    one, two = (
        open_foreign(tmp_path / "m.pt", ImportOptions(part=part)).checkpoint.tensors for part in ("ema", "model")
    )
    assert set(one) == set(two) and all(torch.equal(one[k] + 1, two[k]) for k in one)


def test_the_default_network_is_recognised_from_its_weights():
    """Names and shapes of the default, Unet(dim=64, dim_mults=(1, 2, 4, 8)): parameters counted in version 2.3.4."""
    config = LucidrainsConfig(3, 3, 64, (64, 64, 128, 256, 512), (False,) * 3 + (True,), (4,) * 4, (32,) * 4)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in LucidrainsUNet(config).state_dict().items()}
    assert network(shapes, {}) == config
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 35_711_491
    assert network({"init_conv.weight": (1,)}, {}) is None


def test_embedding_and_linear_attention_by_hand():
    """sin and cos of t 10000^(-k / 3); softmax over features of q, over memories and pixels of k, then q (k' v)."""
    expected = [f(3 * 10000 ** (-k / 3)) for f in (math.sin, math.cos) for k in range(4)]
    assert torch.allclose(sinusoids(torch.tensor([3.0]), 8)[0], torch.tensor(expected), atol=1e-6)
    part = Attention(4, 2, 3, 2, full=False).double()
    state = {k: torch.randn(v.shape, generator=G, dtype=torch.float64) for k, v in part.state_dict().items()}
    part.load_state_dict(state)
    x, heads = torch.randn(1, 4, 2, 3, generator=G, dtype=torch.float64), []
    pixels = x[0].flatten(1)
    normed = pixels / pixels.norm(dim=0) * state["norm.g"].flatten()[:, None] * 2  # sqrt(4 channels)
    q, k, v = (state["to_qkv.weight"][:, :, 0, 0] @ normed).split(6)
    for h in range(2):
        own = [state["mem_kv"][i, h] for i in (0, 1)]  # (features, memories)
        keys, values = (torch.cat([m, t[3 * h : 3 * h + 3]], 1) for m, t in zip(own, (k, v), strict=True))
        heads.append((keys.softmax(1) @ values.T).T @ (q[3 * h : 3 * h + 3].softmax(0) / 3**0.5))
    out = state["to_out.0.weight"][:, :, 0, 0] @ torch.cat(heads) + state["to_out.0.bias"][:, None]
    out = out / out.norm(dim=0) * state["to_out.1.g"].flatten()[:, None] * 2
    with torch.no_grad():
        assert torch.allclose(part(x)[0].flatten(1), pixels + out, atol=1e-10)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("full", [(False, True), (True, False)])
def test_the_network_is_that_of_the_package(full, self_condition):
    package = pytest.importorskip("denoising_diffusion_pytorch", reason="denoising-diffusion-pytorch is not installed")
    torch.manual_seed(0)
    options = {"channels": 1, "attn_heads": (2, 3), "attn_dim_head": (4, 5), "self_condition": self_condition}
    theirs = package.Unet(8, init_dim=12, dim_mults=(1, 2), full_attn=full, **options).eval()
    state = {k: v + 0.1 * torch.randn_like(v) for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    config = network({k: tuple(v.shape) for k, v in state.items()}, {})
    assert config is not None and (config.heads, config.head_channels) == ((2, 3), (4, 5))
    ours = LucidrainsUNet(config)
    ours.load_state_dict(state)
    z, label = torch.randn(3, 1, 12, 8), torch.tensor([0.0, 3.0, 17.0])
    with torch.no_grad():
        assert torch.allclose(ours(z, label), theirs(z, label), atol=1e-5)
        z = torch.randn(1, 1, 12, 8)
    whole = package.GaussianDiffusion(theirs, image_size=(12, 8), timesteps=STEPS)
    if not self_condition:
        assert {"betas", "loss_weight"} < set(whole.state_dict())


def test_the_whole_file_of_the_package_is_read(tmp_path):
    package = pytest.importorskip("denoising_diffusion_pytorch", reason="denoising-diffusion-pytorch is not installed")
    torch.manual_seed(0)
    for objective in ("pred_noise", "pred_x0", "pred_v"):
        net = package.Unet(8, dim_mults=(1, 2), channels=1).eval()
        whole = package.GaussianDiffusion(net, image_size=16, timesteps=200, objective=objective)
        torch.save({"step": 1, "model": whole.state_dict()}, tmp_path / "m.pt")
        prior = open_foreign(tmp_path / "m.pt", UNCHECKED).load(chunk=2)
        x, t = torch.randn(2, 1, 16, 16), torch.tensor([120, 120])
        bar = float(whole.alphas_cumprod[120])
        with torch.no_grad():
            expected = whole.model_predictions(bar**0.5 * x, t).pred_x_start
        assert torch.allclose(prior.denoise(x, (1 / bar - 1) ** 0.5), expected, rtol=1e-3, atol=1e-3)


def saved(path, content):
    torch.save(content, path)
    return path


def test_files_that_do_not_say_enough_are_refused(tmp_path):
    state = weights()
    with pytest.raises(PriorError, match=r"how noise was added: give the trainer's whole file"):
        load_prior(saved(tmp_path / "a.pt", state))
    tables = trainer(state)["model"]
    other = {k: v for k, v in tables.items() if k != "loss_weight"}
    with pytest.raises(PriorError, match="objective 'None' of the network: give one of pred_noise, pred_x0, pred_v"):
        load_prior(saved(tmp_path / "a.pt", {"model": other}))
    (tmp_path / "a.yaml").write_text("objective: pred_x0\n")
    assert open_foreign(tmp_path / "a.pt", UNCHECKED).card["convention"]["predicts"] == "x0"
    old = {k: v for k, v in state.items() if not k.endswith("mem_kv")}
    with pytest.raises(PriorError, match=r"a\.pt: weights of denoising-diffusion-pytorch before version 2\.0"):
        load_prior(saved(tmp_path / "a.pt", {"model": {f"model.{k}": v for k, v in old.items()}}))
    lacking = {k: v for k, v in state.items() if k != "downs.0.3.1.weight"}
    with pytest.raises(PriorError, match=r"without downs\.0\.3\.1\.weight; get the whole file"):
        load_prior(saved(tmp_path / "a.pt", lacking))
    with pytest.raises(PriorError, match=r"1 missing: ups\.0\.0\.block1\.proj\.bias"):
        state.pop("ups.0.0.block1.proj.bias")
        open_foreign(saved(tmp_path / "a.pt", trainer(state)), UNCHECKED).load()
    with pytest.raises(PriorError, match="correct the settings"):
        LucidrainsConfig(1, 1, 8, (8, 2**20), (True,), (2,), (4,))
