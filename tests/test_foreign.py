"""Foreign checkpoints from file to reconstruction: networks with known answers, and refusals of wrong ones."""

import json
from dataclasses import replace

import pytest
import torch
from foreign_networks import SMALL, empty, normalised, normaliser, random_state, saved

from invdiff.errors import PriorError, ShapeError, UsageError
from invdiff.files import sha256_file
from invdiff.priors import load_prior
from invdiff.priors.adm import ADMConfig
from invdiff.priors.build import build_prior
from invdiff.priors.foreign import ImportOptions, import_prior, open_foreign
from invdiff.priors.gaussian import GaussianPrior
from invdiff.problem import Problem
from invdiff.solvers.base import iterate
from invdiff.solvers.unconditional import Unconditional, no_data

COMPLEX = replace(SMALL, in_channels=2, out_channels=4)


@pytest.fixture
def file(tmp_path):
    return saved(tmp_path / "net.pt", normaliser())


def images(channels: int = 1, sides: tuple[int, int] = (33, 42)) -> torch.Tensor:
    return 0.4 * torch.randn(1, 3, channels, *sides, generator=torch.Generator().manual_seed(4))


def alpha(sigma: float) -> float:
    return (1 + sigma**2) ** -0.5


@pytest.mark.parametrize("sigma", [0.03, 1.0, 40.0])
def test_a_file_denoises_as_worked_out_by_hand_also_after_import(file, tmp_path, sigma):
    x = images(sides=(32, 42))
    expected = normalised(x, sigma, alpha(sigma))
    import_prior(file, tmp_path / "safe")
    for prior in (load_prior(file), load_prior(tmp_path / "safe")):
        assert torch.allclose(prior.denoise(x, sigma).double(), expected, atol=2e-5 * (1 + sigma))
        assert prior.calls == 3
    odd = load_prior(file, chunk=2).denoise(images(), sigma)  # sides that are padded
    assert odd.shape == images().shape


def test_ranges_are_mapped_and_noise_with_them(file):
    """Trained on [0, 1] for -1000 to 2000 HU, that is u = -1 to 2: the network sees (u + 1) / 3 and sigma / 3."""
    prior = open_foreign(file, ImportOptions(network_range=(0, 1), prior_range=(-1, 2))).load()
    x, sigma = images(sides=(32, 32)), 0.6
    expected = 3 * normalised((x + 1) / 3, sigma / 3, alpha(sigma / 3)) - 1
    assert torch.allclose(prior.denoise(x, sigma).double(), expected, atol=1e-4)
    assert prior.info.value_range == (-1, 2) and prior.info.sigma_min == pytest.approx(0.03, rel=1e-3)


def test_complex_images_are_scaled_and_never_shifted(tmp_path):
    prior = load_prior(saved(tmp_path / "knee.pt", normaliser(COMPLEX)))
    x, sigma = images(2, (32, 32)), 0.5
    expected = 2 * normalised(x / 2, sigma / 2, alpha(sigma / 2))
    assert torch.allclose(prior.denoise(x, sigma).double(), expected, atol=1e-4)
    assert prior.info.channels == 2 and prior.info.value_range == (-2, 2)


def test_drunet_is_deepinvs_in_the_range_of_solvers(tmp_path):
    from deepinv.models import DRUNet

    torch.manual_seed(0)
    net = DRUNet(1, 1, nc=(8, 8, 16, 16), nb=1, pretrained=None).eval()
    torch.save(net.state_dict(), tmp_path / "drunet.pth")
    prior = open_foreign(tmp_path / "drunet.pth", ImportOptions(check=False)).load(chunk=3)
    x, sigma = images(sides=(40, 32)), 0.3
    with torch.no_grad():
        expected = 2 * net((x[0] + 1) / 2, sigma / 2) - 1
    assert torch.allclose(prior.denoise(x, sigma)[0], expected, atol=1e-5)
    assert (prior.info.sigma_min, prior.info.sigma_max) == pytest.approx((0.002, 100 / 255))
    assert prior.denoise(images(), 0.1).shape == images().shape


def test_tables_that_deepinv_saves_with_a_network_are_no_weights(tmp_path):
    tables = {"sqrt_1m_alphas_cumprod": torch.ones(1000), "sqrt_alphas_cumprod": torch.ones(1000)}
    assert load_prior(saved(tmp_path / "net.pt", normaliser() | tables)).info.channels == 1


def test_card_and_weights_record_where_they_come_from(file, tmp_path):
    import_prior(file, tmp_path / "safe", ImportOptions(modality="CT"))
    card = json.loads((tmp_path / "safe" / "config.json").read_text())
    assert card["source"] == {"file": "net.pt", "part": "ema", "sha256": sha256_file(file)}
    assert card["info"]["modality"] == "CT" and card["info"]["name"] == "net"
    assert load_prior(tmp_path / "safe").info.sha256 == sha256_file(tmp_path / "safe" / "model.safetensors")
    with pytest.raises(UsageError, match="--overwrite"):
        import_prior(file, tmp_path / "safe")
    import_prior(file, tmp_path / "safe", overwrite=True)


def test_the_network_runs_in_half_precision_where_asked(file, tmp_path):
    import_prior(file, tmp_path / "half", ImportOptions(precision="bfloat16"))
    prior, x = load_prior(tmp_path / "half"), images(sides=(32, 32))
    assert next(prior.net.net.parameters()).dtype == torch.bfloat16
    assert torch.allclose(prior.denoise(x, 0.3).double(), normalised(x, 0.3, alpha(0.3)), atol=0.02)
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * 4 * sum(
        v.numel() for v in empty(SMALL).values()
    )


def test_averages_without_names_go_to_the_parameters_in_order(tmp_path):
    good = normaliser()
    ema = {"decay": 0.9, "num_updates": 1, "shadow_params": list(good.values())}
    torch.save({"model": random_state(SMALL), "ema": ema}, tmp_path / "s.pth")
    (tmp_path / "s.yaml").write_text("num_head_channels: 16\n")
    x = images(sides=(32, 32))
    assert torch.allclose(
        load_prior(tmp_path / "s.pth").denoise(x, 0.3).double(), normalised(x, 0.3, alpha(0.3)), atol=1e-4
    )
    ema["shadow_params"].pop()
    torch.save({"model": random_state(SMALL), "ema": ema}, tmp_path / "s.pth")
    with pytest.raises(PriorError, match=r"143 averaged parameters.*has 144"):
        load_prior(tmp_path / "s.pth")


WRONG = {
    "untrained": (random_state(SMALL), {}, "does not denoise.*--no-check"),
    "predicts v, said to predict the image": (normaliser(), {"predict_xstart": True}, "does not denoise"),
    "predicts noise, said to predict the score": (normaliser(), {"predicts": "score"}, "does not denoise"),
    "not finite": (normaliser() | {"out.2.bias": torch.tensor([0.0, float("nan")])}, {}, "out.2.bias are NaN"),
    "overflowing": (normaliser() | {"out.0.weight": torch.full((32,), 3e38)}, {}, "does not denoise.*error of nan"),
    "integers": (normaliser() | {"out.2.bias": torch.tensor([0, 3])}, {}, "out.2.bias are NaN, infinite or integers"),
    "extra": (normaliser() | {"teacher.weight": torch.ones(1)}, {}, "1 unexpected: teacher.weight"),
    "missing": (
        {k: v for k, v in normaliser().items() if k != "time_embed.2.bias"},
        {},
        "1 missing: time_embed.2.bias",
    ),
    "another shape": (normaliser() | {"time_embed.2.bias": torch.zeros(7)}, {}, r"time_embed.2.bias \(7,\) instead of"),
    "channels": (normaliser(COMPLEX), {"in_channels": 3}, "in_channels 3, the weights say 2"),
    "beyond memory": (normaliser(), {"num_channels": 2**22}, "width 4194304, the weights say 32"),
    "nothing": ({"a.weight": torch.ones(3)}, {}, "fit no known architecture"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_and_configurations_are_refused_by_name(tmp_path, name):
    state, flags, words = WRONG[name]
    with pytest.raises(PriorError, match=words) as error:
        load_prior(saved(tmp_path / "net.pt", state, **flags))
    assert "net.pt" in str(error.value) and "\n" not in str(error.value)


def test_the_first_five_names_of_each_kind_are_listed(file):
    card = open_foreign(file).card
    state = {("x" + k if k.startswith("out.") else k): v for k, v in normaliser().items()}
    state |= {f"y{k}": torch.ones(1) for k in range(9)}
    with pytest.raises(PriorError) as error:
        build_prior(card, state, "net.pt")
    text = str(error.value)
    assert "4 missing: out.0.weight, out.0.bias, out.2.weight, out.2.bias;" in text
    assert "13 unexpected: xout.0.weight, xout.0.bias, xout.2.weight, xout.2.bias, y0;" in text
    assert "adm (in_channels 1, out_channels 2, width 32" in text


def test_a_card_that_asks_for_a_hundred_gigabytes_is_refused_before_it_gets_them(file):
    """Meta tensors and a comparison of shapes come first: 16384 features are 1.4e11 bytes of float32."""
    card = open_foreign(file).card
    huge = card | {"network": card["network"] | {"width": 16384, "multipliers": (1.0, 1.0)}}
    with torch.device("meta"):
        from invdiff.priors.adm import ADMUNet

        size = sum(4 * p.numel() for p in ADMUNet(ADMConfig(**huge["network"])).parameters())
    assert size > 100e9
    with pytest.raises(PriorError, match=r"do not fit.*of another shape"):
        build_prior(huge, normaliser(), "net.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "resnet"}, "unknown architecture 'resnet': one of adm"),
        ({"network": {"width": 32}}, "configuration cannot be used"),
        ({"network": 3}, "card"),
        ({"convention": {"predicts": "noise"}}, "unknown predicts"),
        ({"info": {"colour": 1}}, "card"),
        ({"precision": "int8"}, "card"),
    ],
)
def test_damaged_cards_are_refused(file, tmp_path, change, words):
    import_prior(file, tmp_path / "safe")
    path = tmp_path / "safe" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PriorError, match=words):
        load_prior(tmp_path / "safe")


def test_images_of_other_channels_are_refused(file):
    with pytest.raises(ShapeError, match="of 1 channels, the images have 3"):
        load_prior(file).denoise(torch.zeros(1, 1, 3, 32, 32), 0.1)


def test_a_prior_that_is_no_posterior_mean_is_refused_by_every_solver(file):
    card = open_foreign(file).card | {"kind": "endpoint"}
    prior = build_prior(card, normaliser(), "net.pt")
    problem: Problem = no_data((1, 8, 8))
    with pytest.raises(PriorError, match="no posterior mean"):
        next(iterate(Unconditional(), problem, prior, [1.0, 0.0]))
    assert GaussianPrior(torch.zeros(1, 1, 1), torch.eye(1)).kind == "mean"


def test_info_describes_a_file_without_building_a_network(run, file, monkeypatch):
    count = sum(v.numel() for v in empty(SMALL).values())
    monkeypatch.setattr("invdiff.priors.adm.ADMUNet.__init__", lambda *a: pytest.fail("a network was built"))
    code, out, err = run("priors", "info", file)
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["architecture"] == "adm" and lines["network.head_channels"] == "16"
    assert lines["convention.predicts"] == "eps" and lines["source.sha256"] == sha256_file(file)
    assert lines["parameters"].startswith(f"{count / 1e6:.3f} million in 144")


def test_an_imported_prior_reconstructs(run, file, here):
    code, out, err = run("priors", "import", file, "-o", "safe", "--range", "-1,1", "--modality", "CT")
    assert code == 0 and "--prior safe" in out, err
    assert run("priors", "show", "safe")[1].splitlines()[0].split() == ["info.name", "net"]
    options = ("--simulate", "--slices", "0:1", "--views", "12", "--steps", "2", "--quiet")
    for prior in ("safe", file):
        result = f"r{len(list(here.glob('r*.nii.gz')))}.nii.gz"
        code, _, err = run("reconstruct", "$/ct.nii.gz", "--op", "ct-sparse", "--prior", prior, "-o", result, *options)
        assert code == 0, err
    one, two = (json.loads((here / f"r{k}.json").read_text())["runs"]["pnp"]["chi2_per_datum"] for k in (0, 1))
    assert one == two


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--range", "1"), 2, "--range '1'|LOW,HIGH"),
        (("--range", "1,0"), 4, "make no map"),
        (("--precision", "int8"), 2, "unknown precision|bfloat16"),
        (("--format", "resnet"), 4, "unknown architecture 'resnet'|adm"),
        (("--format", "unet2d"), 4, "fit no known architecture (unet2d)"),
        (("--class", "3"), 4, "not conditioned"),
        (("--allow", "os.system"), 2, "type to allow"),
        (("--part", "net"), 4, "no weights under net"),
        (("--config", "none.yaml"), 4, "none.yaml: cannot be read"),
    ],
)
def test_options_of_the_import_are_refused_in_one_line(refused, file, args, code, words):
    refused(code, words, "priors", "import", file, "-o", "safe", *args)


def test_other_folders_and_files_are_refused(refused, here):
    (here / "empty").mkdir()
    refused(4, "empty: is no folder of diffusers", "priors", "info", "empty")
    refused(4, "none.pt: no such file", "priors", "info", "none.pt")
    for card in ("[]", '{"info": 5}', '{"network": null}'):
        (here / "empty" / "config.json").write_text(card)
        refused(4, "empty: not a prior", "priors", "show", "empty")
    (here / "some.txt").write_text("x")
    scan = ("reconstruct", "$/ct.nii.gz", "--op", "ct-sparse", "--simulate")
    refused(4, "some.txt: is no checkpoint by its name", *scan, "--prior", "some.txt")


def test_a_table_of_betas_in_the_file_wins_over_its_name(tmp_path):
    """Latent diffusion's "linear" is linear in sqrt(beta), and its trainer keeps the table beside the network."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 400, dtype=torch.float64) ** 2
    state = {f"model.diffusion_model.{k}": v for k, v in normaliser().items()}
    torch.save({"state_dict": state | {"betas": betas}}, tmp_path / "last.ckpt")
    (tmp_path / "last.yaml").write_text("num_head_channels: 16\nnoise_schedule: linear\n")
    prior = load_prior(tmp_path / "last.ckpt")
    bar = float((1 - betas).prod())
    assert prior.info.sigma_max == pytest.approx(((1 - bar) / bar) ** 0.5, rel=1e-9)
    assert prior.net.convention.time(prior.info.sigma_max) == pytest.approx(399)
    for wrong in (torch.tensor(0.1), torch.ones(2, 2), torch.ones(4, dtype=torch.int64)):
        torch.save({"state_dict": state | {"betas": wrong}}, tmp_path / "last.ckpt")
        with pytest.raises(PriorError, match="betas are no list of numbers"):
            open_foreign(tmp_path / "last.ckpt")
