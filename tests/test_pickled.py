"""Weights out of pickles of whole objects: only where asked, in a process of its own, and nothing in them is run.

The pickles are written as EDM writes its own: every part of the network is a class that carries the source text of its
module along (``torch_utils.persistence``), in a dictionary of ``dnnlib``.
"""

import collections
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from test_edm import by_hand, images, known

from invdiff.errors import PriorError
from invdiff.files import sha256_file
from invdiff.priors import load_prior, unpickle
from invdiff.priors.foreign import ImportOptions, import_prior, open_foreign
from invdiff.priors.pickled import read_pickled


def taken(path: Path):
    """Weights and options of networks as the process takes them out, here without one."""
    found: dict[str, dict] = {}
    return unpickle.plain(unpickle.read(str(path)), "", found), found


TRUSTED = ImportOptions(trust_pickle=True)
ARGUMENTS = {"img_resolution": 16, "img_channels": 1, "label_dim": 0, "model_type": "SongUNet", "model_channels": 16}


class Part:
    """One module of a network, pickled as the original pickles it."""

    def __init__(self, state: dict, name: str, source: str, arguments: dict | None = None):
        self.state, self.name, self.source = state, name, source
        if arguments is not None:
            self.state["_init_kwargs"] = sys.modules["dnnlib.util"].EasyDict(arguments)

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.name, "state": self.state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


@pytest.fixture
def original(monkeypatch):
    """Names that a pickle of EDM refers to; read in the usual way they run its source text, as the original does."""
    for name in ("dnnlib", "dnnlib.util", "torch_utils", "torch_utils.persistence"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    sys.modules["dnnlib.util"].EasyDict = easy

    def _reconstruct_persistent_obj(meta):
        exec(meta["module_src"], {})

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    return easy


def modules(state: dict[str, torch.Tensor], source: str, name: str = "UNetBlock") -> Part:
    """Weights by name as a tree of parts."""
    here, inner = {}, {}
    for key, value in state.items():
        head, dot, tail = key.partition(".")
        (inner.setdefault(head, {}) if dot else here)[tail or head] = value
    buffers = {k: v for k, v in here.items() if k in ("freqs", "resample_filter")}
    parameters = {k: torch.nn.Parameter(v) for k, v in here.items() if k not in buffers}
    content = {"training": False, "_parameters": collections.OrderedDict(parameters), "_buffers": buffers}
    content["_non_persistent_buffers_set"] = set()
    content["_modules"] = {k: modules(v, source) for k, v in inner.items()}
    return Part(content, name, source)


def snapshot(path: Path, canary: Path, easy, **attributes) -> Path:
    """``network-snapshot.pkl`` of EDM around the weights of :func:`known`."""
    source = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass UNetBlock: pass"
    plain = {"training": False, "sigma_data": 0.5, "sigma_min": 0, "sigma_max": float("inf"), "use_fp16": True}
    blocks = modules(known(), source, "SongUNet")
    content = plain | attributes | {"_parameters": {}, "_buffers": {}, "_modules": {"model": blocks}}
    net = Part(content, "EDMPrecond", source, ARGUMENTS)
    whole = {"ema": net, "loss_fn": easy(P_mean=-1.2), "augment_pipe": None, "dataset_kwargs": easy(path="/data")}
    path.write_bytes(pickle.dumps(whole))
    return path


@pytest.fixture
def file(tmp_path, original):
    return snapshot(tmp_path / "network-snapshot.pkl", tmp_path / "sung", original)


def test_a_pickle_is_refused_in_one_line_that_names_the_flag(file, refused, here):
    for call in (lambda: load_prior(file), lambda: open_foreign(file), lambda: import_prior(file, here / "safe")):
        with pytest.raises(PriorError, match="--trust-pickle") as error:
            call()
        assert "\n" not in str(error.value) and "network-snapshot.pkl" in str(error.value)
    refused(4, "--trust-pickle", "priors", "import", file, "-o", "safe")
    assert not (file.parent / "sung").exists() and not (here / "safe").exists()


def test_weights_and_options_come_out_and_no_code_is_run(file, tmp_path):
    import_prior(file, tmp_path / "safe", TRUSTED)
    card = json.loads((tmp_path / "safe" / "config.json").read_text())
    assert card["source"]["sha256"] == sha256_file(file) and card["source"]["part"] == "ema"
    assert "torch_utils.persistence._reconstruct_persistent_obj" in card["source"]["left_out"]
    x = images()
    assert torch.allclose(load_prior(tmp_path / "safe").denoise(x, 0.4).double(), by_hand(x, 0.4), atol=1e-4)
    assert not (tmp_path / "sung").exists()
    with pytest.raises(TypeError):  # reached with None in place of a network: the canary does sing where it is let
        pickle.loads(file.read_bytes())["ema"]["model"]
    assert (tmp_path / "sung").exists()


def test_the_state_is_that_of_the_network(file):
    whole, found = taken(file)
    assert set(whole) == {"ema", "loss_fn", "augment_pipe", "dataset_kwargs"} and set(found) == {"ema"}
    assert whole["ema"].keys() == {"model." + k for k in known()}
    assert all(torch.equal(whole["ema"]["model." + k], v) for k, v in known().items())
    told = found["ema"]
    assert {k: told[k] for k in ARGUMENTS} == ARGUMENTS and told["class_name"] == "EDMPrecond"
    assert told["sigma_data"] == 0.5


def test_the_command_imports_and_says_what_was_left_out(run, file, here, original):
    """Options of the pickle are heeded, and a user's word comes first."""
    path = snapshot(here / "b.pkl", here / "sung", original, sigma_data=0.25)
    (here / "b.yaml").write_text("sigma_min: 0.004\n")
    code, out, err = run("priors", "import", path, "-o", "safe", "--trust-pickle")
    assert code == 0 and "left_out" in out and "--prior safe" in out, err
    card = json.loads((here / "safe" / "config.json").read_text())
    assert (card["convention"]["sigma_data"], card["convention"]["sigma_min"]) == (0.25, 0.004)
    options = ("--simulate", "--slices", "0:1", "--views", "12", "--steps", "2", "--quiet", "-o", "r.nii.gz")
    code, _, err = run("reconstruct", "$/ct.nii.gz", "--op", "ct-sparse", "--prior", "safe", *options)
    assert code == 0, err


class Block(torch.nn.Module):
    """A module as a user would pickle it whole."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 2))
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("left", torch.ones(2), persistent=False)


class Caller:
    """Calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("suffix", ["pt", "pkl"])
def test_whole_modules_and_objects_beside_weights(tmp_path, new, suffix):
    net = torch.nn.Sequential(Block(), torch.nn.Linear(2, 2))
    whole = {"net": net, "args": types.SimpleNamespace(lr=0.1), "x": Caller(Path.touch, tmp_path / "sung")}
    torch.save(whole, tmp_path / f"a.{suffix}", _use_new_zipfile_serialization=new)
    found, told = taken(tmp_path / f"a.{suffix}")
    assert list(found.pop("net")) == list(net.state_dict()) and found == {"args": {}, "x": {}}
    assert told["net"]["class_name"] == "Sequential"
    assert (
        torch.equal(taken(tmp_path / f"a.{suffix}")[0]["net"]["1.weight"], net[1].weight)
        and not (tmp_path / "sung").exists()
    )


@pytest.mark.parametrize(
    "function",
    [
        (os.system, "touch {}"),
        (exec, "open({!r}, 'w')"),
        (eval, "open({!r}, 'w')"),
        (os.mkdir, "{}"),
        (open, "{}", "w"),
    ],
)
def test_calls_are_never_made(tmp_path, function):
    canary = tmp_path / "sung"
    args = [a.format(str(canary)) for a in function[1:]]
    whole = {"state_dict": {"a": torch.ones(3)}, "x": Caller(function[0], *args)}
    for protocol in (0, 2, 4):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(whole, protocol))
        assert taken(tmp_path / "a.pkl")[0]["state_dict"].keys() == {"a"}
    assert not canary.exists()


@pytest.mark.parametrize("inner", [Caller(os.system, "touch {}"), Caller(torch.load, "{}")])
def test_bytes_inside_that_hold_code_are_refused(tmp_path, inner):
    """A storage in a pickle is a file of torch.save again."""
    inner.call = inner.call[0], (inner.call[1][0].format(tmp_path / "sung"),)
    torch.save(inner, tmp_path / "inner.pt")
    data = (tmp_path / "inner.pt").read_bytes()
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": Caller(torch.storage._load_from_bytes, data)}))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        taken(tmp_path / "a.pkl")
    assert not (tmp_path / "sung").exists()


def test_the_process_ends_where_more_than_reading_is_tried(tmp_path):
    """Were a function of torch persuaded to run something, a hook would end the process before it does."""
    text = f"import runpy, os, sys\nguard = runpy.run_path({unpickle.__file__!r})['guard']\nguard(__file__)\n"
    for what in ("os.system('touch sung')",):
        (tmp_path / "t.py").write_text(text + what + "\n")
        done = subprocess.run([sys.executable, "-I", "t.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 3 and "tries to do more than to give tensors" in done.stderr
    assert not (tmp_path / "sung").exists()


def test_other_files_are_refused_in_one_line(tmp_path, original):
    (tmp_path / "a.pkl").write_bytes(b"no pickle")
    with pytest.raises(PriorError, match=r"a\.pkl: no weights can be taken out \(UnpicklingError") as error:
        open_foreign(tmp_path / "a.pkl", TRUSTED)
    assert "\n" not in str(error.value)
    state = known() | {"map_layer1.bias": torch.full((64,), torch.nan)}
    net = modules(state, "", "UNetModel")
    net.state["attention_resolutions"] = [1, 2]  # of another class than is known: not heeded
    (tmp_path / "nan.pt").write_bytes(pickle.dumps({"ema": net}))
    assert taken(tmp_path / "nan.pt")[1]["ema"]["attention_resolutions"] == [1, 2]
    with pytest.raises(PriorError, match=r"nan\.pt: weights map_layer1.bias are NaN"):
        open_foreign(tmp_path / "nan.pt", TRUSTED).load()
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(PriorError) as error:
        read_pickled(tmp_path / "list.pkl")
    assert str(error.value).startswith(f"{tmp_path / 'list.pkl'}: holds a list")
    with pytest.raises(PriorError, match="no such file"):
        read_pickled(tmp_path / "none.pkl")


def test_programs_and_archives_that_inflate_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"x")  # as torch.jit.save names its parts
    with pytest.raises(ValueError, match="TorchScript archive, which is a program"):
        taken(tmp_path / "script.pt")
    torch.save({"a": torch.zeros(2**16)}, tmp_path / "big.pt")
    with (
        zipfile.ZipFile(tmp_path / "big.pt") as big,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in big.infolist():
            small.writestr(entry.filename, big.read(entry))
    with pytest.raises(ValueError, match="it inflates"):
        taken(tmp_path / "b.pt")
