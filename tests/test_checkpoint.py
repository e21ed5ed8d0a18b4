"""Reading checkpoints: what every kind of file holds, and that nothing in a file is run, inflated or believed."""

import argparse
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from invdiff.errors import PriorError, UsageError
from invdiff.priors.checkpoint import ALLOWED, read_checkpoint
from invdiff.priors.flags import parse_flags, read_flags

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, 2.0])}
OTHER = {k: v + 10 for k, v in STATE.items()}


def prefixed(prefix: str, state=STATE) -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in state.items()}


FILES = {
    "plain": (STATE, ""),
    "DataParallel": (prefixed("module."), ""),
    "compiled, wrapped": ({"state_dict": prefixed("module._orig_mod.model.")}, "state_dict"),
    "trainer": ({"epoch": 3, "model_state": STATE, "optimizer_state": {"lr": 0.1}}, "model_state"),
    "averaged first": ({"net": OTHER, "ema": prefixed("model.")}, "ema"),
    "averaged deeper": ({"model": OTHER, "ema": {"decay": 0.9, "model": STATE}}, "ema.model"),
    "ema-pytorch": (
        {"ema": {**prefixed("online_model.", OTHER), **prefixed("ema_model."), "step": torch.tensor(3)}},
        "ema",
    ),
    "Lightning": (
        {"state_dict": {**prefixed("model.diffusion_model."), "betas": torch.ones(3)}, "hyper_parameters": {}},
        "state_dict",
    ),
    "Lightning, averaged": (
        {
            "state_dict": {
                **prefixed("model.diffusion_model.", OTHER),
                "model_ema.diffusion_modelaweight": STATE["a.weight"],
                "model_ema.diffusion_modelabias": STATE["a.bias"],
                "model_ema.decay": torch.tensor(0.9),
            }
        },
        "state_dict",
    ),
    "Lightning, averaged network beside losses": (
        {"state_dict": {**prefixed("net.", OTHER), **prefixed("net_ema."), "metric.total": torch.ones(2)}, "epoch": 1},
        "state_dict",
    ),
    "Lightning, network beside losses": (
        {"state_dict": {**prefixed("model.net."), "loss.vgg.weight": torch.ones(2)}, "callbacks": {}},
        "state_dict",
    ),
    "diffusion with tables": (
        {"model": {**prefixed("denoise_fn."), "betas": torch.ones(3), "loss_weight": torch.ones(3)}, "step": 2},
        "model",
    ),
    "averaged diffusion with tables": (
        {
            "model": prefixed("model.", OTHER),
            "ema": {
                **prefixed("ema_model.module.model."),
                **{"ema_model.module.betas": torch.ones(3), "initted": torch.tensor(True), "step": torch.tensor(3)},
                **prefixed("online_model.module.model.", OTHER),
            },
        },
        "ema",
    ),
    "Lightning of a trainer's averages": (
        {"model_ema_state_dict": STATE, "model_state_dict": OTHER},
        "model_ema_state_dict",
    ),
    "U-Net of a pipeline beside an encoder": (
        {"state_dict": {**prefixed("unet."), "encoder.weight": torch.ones(2), "betas": torch.ones(3)}},
        "state_dict",
    ),
    "with counters": ({**STATE, "num_updates": 7}, ""),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_are_found_whatever_a_trainer_wraps_around_them(tmp_path, name):
    content, part = FILES[name]
    torch.save(content, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert found.part == part and list(found.tensors) == list(STATE)
    assert all(torch.equal(found.tensors[k], STATE[k]) for k in STATE)


def test_tables_of_the_noise_are_kept_apart_from_weights(tmp_path):
    tables = {"betas": torch.tensor([0.1, 0.2]), "loss_weight": torch.ones(2), "posterior_variance": torch.zeros(2)}
    for content in (
        {**STATE, **tables},
        {"ema": {f"ema_model.{k}": v for k, v in (prefixed("model.") | tables).items()}},
    ):
        torch.save(content, tmp_path / "a.pt")
        found = read_checkpoint(tmp_path / "a.pt")
        assert list(found.tensors) == list(STATE) and list(found.tables) == list(tables)
        assert torch.equal(found.tables["betas"], tables["betas"])


def test_a_part_can_be_chosen(tmp_path):
    torch.save({"ema": STATE, "net": OTHER}, tmp_path / "a.pt")
    assert torch.equal(read_checkpoint(tmp_path / "a.pt", "net").tensors["a.bias"], OTHER["a.bias"])
    with pytest.raises(PriorError, match=r"under teacher of ema, net.*--part"):
        read_checkpoint(tmp_path / "a.pt", "teacher")


def test_safetensors_old_archives_and_ordered_averages(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pth"):
        assert torch.equal(read_checkpoint(tmp_path / name).tensors["a.weight"], STATE["a.weight"])
    ema = {"decay": 0.999, "num_updates": 5, "shadow_params": list(OTHER.values())}
    torch.save({"optimizer": {}, "model": prefixed("module."), "ema": ema, "step": 5}, tmp_path / "s.pth")
    found = read_checkpoint(tmp_path / "s.pth")
    assert list(found.tensors) == list(STATE) and found.part == "ema.shadow_params"
    assert all(torch.equal(a, b) for a, b in zip(found.ordered, OTHER.values(), strict=True))


class Canary:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_file_is_named_and_never_run(tmp_path, new):
    canary = tmp_path / "sung"
    torch.save({"state_dict": STATE, "x": Canary(canary)}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(PriorError, match=r"more than tensors \(getattr\).*never run.*state_dict"):
        read_checkpoint(tmp_path / "a.pt")
    for types in ([*ALLOWED], []):
        with pytest.raises(PriorError):
            read_checkpoint(tmp_path / "a.pt", allow=types)
    assert not canary.exists()
    for protocol in (2, 4):
        (tmp_path / "raw.pt").write_bytes(pickle.dumps({"state_dict": STATE, "x": Canary(canary)}, protocol=protocol))
        with pytest.raises(PriorError, match="never run"):
            read_checkpoint(tmp_path / "raw.pt")
    assert not canary.exists()
    pickle.loads((tmp_path / "raw.pt").read_bytes())  # the canary does sing where it is let
    assert canary.exists()


@pytest.mark.parametrize(
    ("value", "type_name"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (Path("/data"), "pathlib.Path"),
        (np.float64(0.5), "numpy.scalar"),
    ],
)
def test_plain_objects_of_a_training_need_a_word(tmp_path, value, type_name):
    torch.save({"state_dict": STATE, "args": value}, tmp_path / "a.pt")
    with pytest.raises(PriorError, match=f"--allow {type_name}"):
        read_checkpoint(tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt", allow=[type_name])
    assert torch.equal(found.tensors["a.bias"], STATE["a.bias"])
    with pytest.raises(UsageError, match=r"argparse\.Namespace"):
        read_checkpoint(tmp_path / "a.pt", allow=["os.system"])


def test_an_archive_that_inflates_is_refused_before_it_does(tmp_path):
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "big.pt")
    with (
        zipfile.ZipFile(tmp_path / "big.pt") as big,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as z,
    ):
        for entry in big.infolist():
            z.writestr(entry.filename, big.read(entry))
    assert (tmp_path / "b.pt").stat().st_size < 20_000
    with pytest.raises(PriorError, match="would inflate to 41"):
        read_checkpoint(tmp_path / "b.pt")


def test_an_archive_that_is_compressed_without_gain_is_refused_as_well(tmp_path):
    torch.save({"a": torch.randn(64)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w") as z:
        for entry in plain.infolist():
            kind = zipfile.ZIP_DEFLATED if entry.filename.endswith("/0") else zipfile.ZIP_STORED
            z.writestr(entry.filename, plain.read(entry), kind)
    with zipfile.ZipFile(tmp_path / "b.pt") as z:
        assert sum(entry.file_size for entry in z.infolist()) < (tmp_path / "b.pt").stat().st_size
    with pytest.raises(PriorError, match="would inflate"):
        read_checkpoint(tmp_path / "b.pt")


def test_a_tensor_that_claims_more_than_its_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**6, 10**4)}, tmp_path / "a.pt")
    with pytest.raises(PriorError, match="more than the file holds"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("keep", [0, 1, 30, 600])
@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_truncated_files_are_refused(tmp_path, suffix, keep):
    path = tmp_path / f"a.{suffix}"
    if suffix == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=suffix == "pt")
    data = path.read_bytes()
    path.write_bytes(data[: min(keep, len(data) - 1)])
    with pytest.raises(PriorError, match=r"damaged|cannot be read"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "no dictionary"),
        ({"epoch": 3, "metrics": {"loss": 0.1}}, "of epoch, metrics"),
        ({}, "nothing"),
        ({"first_stage_model.a": torch.ones(2), "model.diffusion_model.b": torch.ones(2)}, "latent"),
        (
            {"state_dict": {"cond_stage_model.a": torch.ones(2), "model.diffusion_model.b": torch.ones(2)}},
            "vae and unet",
        ),
        ({"a": torch.ones(3).to_sparse()}, "no plain array"),
    ],
)
def test_files_without_usable_weights_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(PriorError, match=words):
        read_checkpoint(tmp_path / "a.pt")


def test_missing_files_and_other_names_are_refused(tmp_path):
    with pytest.raises(PriorError, match="no such file"):
        read_checkpoint(tmp_path / "a.pt")
    (tmp_path / "a.pkl").write_bytes(b"x")
    with pytest.raises(PriorError, match=r"is not read.*--trust-pickle"):
        read_checkpoint(tmp_path / "a.pkl")
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(PriorError, match=r"end it in \.safetensors"):
        read_checkpoint(tmp_path / "a.h5")


def test_options_are_read_in_three_forms_and_never_executed(tmp_path):
    expected = {"image_size": 256, "attention_resolutions": "32,16,8", "learn_sigma": True, "lr": 1e-4, "name": None}
    yaml = "---\na:\n  image_size: 256 # px\n  attention_resolutions: '32,16,8'\n"
    yaml += "b:\n  learn_sigma: yes\n  lr: 1e-4\n  name: ~\n"
    command = (
        "python train.py --image_size 256 --attention_resolutions 32,16,8 \\\n --learn_sigma --lr=1e-4 --name none"
    )
    json = (
        '{"a": {"image_size": 256, "attention_resolutions": "32,16,8"}, "learn_sigma": true, "lr": 1e-4, "name": null}'
    )
    for text in (yaml, command, json):
        assert parse_flags(text) == expected
    assert parse_flags("m:\n  - 1\n  - 2\nk: [1, 2.5, x]") == {"m": [1, 2], "k": [1, 2.5, "x"]}
    bad = {
        "a: !!python/object/apply:os.system [id]": "beyond plain values",
        "a: &x 1": "beyond plain values",
        "one:\n  a: 1\ntwo:\n  a: 2": "different sections",
        "no options here": "not 'name: value'",
        "{": "JSON",
        "": "holds no options",
    }
    for text, words in bad.items():
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(PriorError, match=words):
            read_flags(tmp_path / "c.yaml")
    with pytest.raises(PriorError, match="cannot be read"):
        read_flags(tmp_path / "none.yaml")
