"""What is said beside a prior is heard or refused: the class behind a colon, betas and other fields of a convention."""

import json

import pytest
import torch
from foreign_networks import OPTIONS, normaliser
from training_cases import FAST, QUIET, flat

from invdiff.errors import PriorError
from invdiff.priors import load_prior, split_class
from invdiff.priors.flags import betas_of
from invdiff.priors.foreign import open_foreign
from invdiff.priors.train import TrainConfig, Trainer

# --- classes ---


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders ``both``, ``both:odd`` and ``a:b``, and a file ``net.pt``, in the current one."""
    for name in ("both", "both:odd", "a:b"):
        (tmp_path / name).mkdir()
    (tmp_path / "net.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("both", ("both", None)),
        ("both:CT", ("both", "CT")),
        ("both:CT:contrast", ("both", "CT:contrast")),
        ("both::", ("both", ":")),
        ("both:", ("both", "")),
        ("both:odd", ("both:odd", None)),  # what exists as it stands
        ("both:odd:CT", ("both:odd", "CT")),  # the longest folder
        ("both:oddly:CT", ("both", "oddly:CT")),
        ("a:b", ("a:b", None)),
        ("a:b:CT", ("a:b", "CT")),
        ("embedded", ("embedded", None)),
        ("embedded:CT:x", ("embedded", "CT:x")),
        ("none:x:CT", ("none:x", "CT")),
        ("net.pt:3", ("net.pt", "3")),
        (":CT", (":CT", None)),
    ],
)
@pytest.mark.usefixtures("folders")
def test_a_class_follows_the_longest_folder(text, parts):
    assert split_class(text) == parts


def test_a_class_with_colons_is_trained_and_told(folders):
    config = TrainConfig(**FAST, steps=2, classes=("CT", "CT:contrast", "image"), weights={})
    Trainer(config, [flat(0.6, "a")], folders / "both").run(QUIET)
    found = load_prior("both:CT:contrast")
    assert found.info.label == "CT:contrast" and found.info.name == "both:CT:contrast"
    assert load_prior("both:CT").info.label == "CT"
    with pytest.raises(PriorError, match="has no class 'contrast:CT': its classes are CT, CT:contrast, image"):
        load_prior("both:contrast:CT")


def test_a_class_of_what_has_none_by_name_is_refused(folders, refused):
    (folders / "a:b" / "config.json").write_text(json.dumps({"architecture": "adm"}))
    scan = ("reconstruct", "$/ct.nii.gz", "--op", "ct-sparse", "--simulate")
    refused(4, "class 'CT': a:b is no prior of our own|import it with --class", *scan, "--prior", "a:b:CT")
    refused(4, "net.pt: is a file, and class '3' is for a folder", *scan, "--prior", "net.pt:3")
    refused(4, "unknown prior 'none:x'", *scan, "--prior", "none:x:CT")


# --- fields of a convention ---

TABLE = [0.001 * k for k in range(1, 41)]


def adm(folder, **options):
    """A network of guided diffusion, with these options beside those that it needs."""
    torch.save(normaliser(), folder / "net.pt")
    (folder / "net.json").write_text(json.dumps(OPTIONS | options))
    return folder / "net.pt"


def sigmas(betas) -> list[float]:
    bar = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    return ((1 - bar) / bar).sqrt().tolist()


def test_betas_of_a_configuration_are_read_for_adm(tmp_path):
    """The table itself, which is 40 steps long, so that rescaled times are 25 each; a name; neither for an optimizer's
    pair."""
    found = load_prior(adm(tmp_path, betas=TABLE, rescale_timesteps=True)).net.convention
    assert found.table == pytest.approx(sigmas(TABLE)) and found.steps == 40 and found.label_scale == 25
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert load_prior(tmp_path / "net.pt").info.sigma_max == pytest.approx(sigmas(TABLE)[-1])
    same = load_prior(adm(tmp_path, betas=TABLE, noise_schedule="linear", diffusion_steps=40))
    assert torch.equal(same.denoise(x, 0.3), load_prior(adm(tmp_path, betas=TABLE)).denoise(x, 0.3))
    named = load_prior(adm(tmp_path, betas="scaled-linear", beta_start=1e-3, beta_end=0.02)).net.convention
    roots = torch.linspace(1e-3**0.5, 0.02**0.5, 1000, dtype=torch.float64)
    assert named.table == pytest.approx(sigmas((roots**2).tolist()))
    pair = load_prior(adm(tmp_path, betas=[0.9, 0.999])).net.convention
    assert pair == load_prior(adm(tmp_path)).net.convention
    yaml = "\n".join(f"{k}: {v}" for k, v in (OPTIONS | {"betas": TABLE}).items())
    (tmp_path / "net.json").unlink()
    (tmp_path / "net.yaml").write_text(yaml)
    assert load_prior(tmp_path / "net.pt").net.convention.table == pytest.approx(sigmas(TABLE))


def test_betas_of_the_configuration_go_before_those_of_the_file(tmp_path):
    torch.save({"state_dict": normaliser() | {"betas": torch.linspace(0.01, 0.5, 400)}}, tmp_path / "net.pt")
    for betas, expected in (({}, 400), ({"betas": TABLE}, 40), ({"betas": "cosine", "steps": 300}, 300)):
        (tmp_path / "net.json").write_text(json.dumps(OPTIONS | betas))
        assert len(open_foreign(tmp_path / "net.pt").load().net.convention.table) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"betas": "square"}, "unknown betas 'square'"),
        ({"betas": 0.02}, "betas 0.02 of the configuration: give the name"),
        ({"betas": []}, r"betas \[\] of the configuration"),
        ({"betas": [0.1, "a", 0.2]}, "should be numbers"),
        ({"betas": [0.1, 0.2, 1.5]}, "between 0 and 1"),
        ({"betas": TABLE, "diffusion_steps": 1000}, "has 40 betas and says 1000 steps"),
        ({"betas": "cosine", "noise_schedule": "linear"}, "betas 'cosine' and noise schedule 'linear'"),
        ({"betas": TABLE, "process": "flow", "predicts": "velocity"}, "process 'flow' does not have"),
        ({"betas": TABLE, "process": "edm"}, "process 'edm' does not have"),
    ],
)
def test_betas_that_cannot_be_meant_are_refused_by_name(tmp_path, options, words):
    with pytest.raises(PriorError, match=rf"net\.pt: .*{words}"):
        open_foreign(adm(tmp_path, **options))


def test_a_pair_is_no_table_and_a_list_is_one():
    assert betas_of({"betas": [0.9, 0.999]}) is None and betas_of({}) is None
    assert betas_of({"betas": TABLE, "steps": None, "diffusion_steps": ""}) == tuple(TABLE)
    for steps in ("inf", 39, [40, 40]):
        with pytest.raises(PriorError, match="has 40 betas and says"):
            betas_of({"betas": TABLE, "steps": steps})
    assert betas_of({"betas": [0.1, 0.2, 0.3], "steps": 3}) == (0.1, 0.2, 0.3)
    assert betas_of({"betas": "cosine", "beta_schedule": "cosine"}) == "cosine"


def test_other_fields_of_a_convention_are_read_for_adm(tmp_path):
    told = {"beta_first": 2e-4, "beta_last": 0.01, "label_scale": 2.0, "label_offset": 1.0, "prior_range": [-2.0, 2.0]}
    found = load_prior(adm(tmp_path, **told, network_range=[0.0, 1.0])).net.convention
    assert found.table == pytest.approx(sigmas(torch.linspace(2e-4, 0.01, 1000, dtype=torch.float64).tolist()))
    assert (found.label_scale, found.label_offset, found.gain) == (2.0, 1.0, 0.25)
