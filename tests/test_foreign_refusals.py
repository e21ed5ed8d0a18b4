"""What of foreign checkpoints is refused, or said: cards, configurations and weights that fit no network."""

import json

import pytest
import torch
from foreign_networks import OPTIONS, SMALL, normaliser, random_state, saved
from safetensors.torch import save_file

from invdiff.errors import PriorError, UsageError
from invdiff.files import read_text
from invdiff.priors import load_prior
from invdiff.priors.flags import read_flags
from invdiff.priors.foreign import ImportOptions, import_prior, open_foreign
from invdiff.solvers.dds import DDS


@pytest.fixture
def file(tmp_path):
    return saved(tmp_path / "net.pt", normaliser())


@pytest.mark.parametrize("change", [{"blocks": 1.5}, {"out_channels": 1.5}, {"out_channels": True}])
def test_a_card_of_numbers_that_build_nothing_is_refused(file, change):
    foreign = open_foreign(file)
    foreign.card["network"] |= change
    with pytest.raises(PriorError, match=r"net\.pt: its network cannot be built"):
        foreign.load()


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 0},
        {"channels": 3},
        {"value_range": None},
        {"value_range": "ab"},
        {"value_range": [0, 100]},
        {"sigma_min": "x"},
        {"size": "abc"},
        {"size": 0},
        {"classes": ["a"]},
    ],
)
def test_a_card_that_contradicts_its_network_is_refused(file, change):
    foreign = open_foreign(file)
    foreign.card["info"] |= change
    with pytest.raises(PriorError, match=r"net\.pt: its card lacks or misuses .*; import the prior again"):
        foreign.load()


def test_weights_of_an_imported_prior_are_not_read_without_their_card(file, tmp_path):
    import_prior(file, tmp_path / "safe", ImportOptions(network_range=(0, 255), prior_range=(-1, 2)))
    with pytest.raises(PriorError, match=r"model\.safetensors: is the weights of an imported prior.*name the folder"):
        open_foreign(tmp_path / "safe" / "model.safetensors")
    assert load_prior(tmp_path / "safe").info.value_range == (-1, 2)


def test_a_configuration_that_names_its_architecture_is_no_card(tmp_path):
    save_file(random_state(SMALL), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(OPTIONS | {"architecture": "guided-diffusion"}))
    options = ImportOptions(config=(tmp_path / "config.json",), check=False)
    assert open_foreign(tmp_path / "model.safetensors", options).card["architecture"] == "adm"


def test_lines_may_end_as_in_other_systems(tmp_path):
    text = "--image_size 32 --use_fp16 \\\n --num_channels 32 \\\n --rescale_timesteps \\\n --learn_sigma True\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(text.replace("\n", "\r\n").encode())
    assert read_text(tmp_path / "b.txt") == text
    assert read_flags(tmp_path / "b.txt") == read_flags(tmp_path / "a.txt")
    assert read_flags(tmp_path / "b.txt")["rescale_timesteps"] is True


def test_truth_values_in_texts_are_no_truths(tmp_path):
    state, text = random_state(SMALL), {"use_new_attention_order": "False", "rescale_timesteps": "false"}
    word = open_foreign(saved(tmp_path / "a.pt", state, **text), ImportOptions(check=False)).card
    plain = {"use_new_attention_order": False, "rescale_timesteps": False}
    told = open_foreign(saved(tmp_path / "b.pt", state, **plain), ImportOptions(check=False)).card
    assert word["network"] == told["network"] and word["convention"] == told["convention"]
    for no in ("no", "off", "None", "null", "FALSE"):
        flags = {"predict_xstart": no, "rescale_timesteps": no}
        found = open_foreign(saved(tmp_path / "d.pt", state, **flags), ImportOptions(check=False)).card
        assert found["convention"] == told["convention"]
    yes = {"use_new_attention_order": "True"}
    assert open_foreign(saved(tmp_path / "c.pt", state, **yes), ImportOptions(check=False)).card["network"] == (
        told["network"] | {"new_order": True}
    )


@pytest.mark.parametrize(
    "flags",
    [
        {"diffusion_steps": 0},
        {"diffusion_steps": 1e400},
        {"num_head_channels": 1e400},
        {"image_size": 1e400},
        {"attention_resolutions": 1e400},
    ],
)
def test_numbers_that_no_training_has_are_refused(tmp_path, flags):
    with pytest.raises(PriorError, match=r"net\.pt"):
        open_foreign(saved(tmp_path / "net.pt", normaliser(), **flags)).load()


def test_a_configuration_without_an_end_is_refused():
    with pytest.raises(PriorError, match=r"/dev/zero: cannot be read .longer than 1 MB"):
        read_flags("/dev/zero")


def test_weights_in_double_precision_are_said(tmp_path, caplog):
    caplog.set_level("WARNING", "invdiff")
    double = {k: v.double() for k, v in normaliser().items()}
    prior = load_prior(saved(tmp_path / "net.pt", double))
    assert f"{len(double)} weights in float64" in caplog.text and next(prior.net.parameters()).dtype == torch.float32


def test_a_prior_whose_noise_no_solver_asks_for_is_named(file):
    prior = open_foreign(file, ImportOptions(network_range=(0, 1000), check=False)).load()
    with pytest.raises(UsageError, match=r"the prior net has noise levels from .* check --range and --prior-range"):
        DDS(sigma_max=1e-6, sigma_min=1e-7).sigmas(4, None, prior)
