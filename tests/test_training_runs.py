"""Runs of a training: state on disk, kill and resume, signals, several processes, options; tiny networks."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from shutil import rmtree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_cases import FAST, QUIET, flat, gloo_threads, noise_source, shake

from invdiff.errors import InputError, NumericalError, PriorError, ResourceError, UsageError
from invdiff.priors import load_prior
from invdiff.priors.distributed import Ranks, ranks
from invdiff.priors.masking import Measured
from invdiff.priors.objective import edm_loss
from invdiff.priors.train import TrainConfig, Trainer
from invdiff.priors.train_config import with_settings
from invdiff.priors.training_data import CropSampler, Source
from invdiff.priors.training_files import load_sources, split_files
from invdiff.priors.training_state import resumed
from invdiff.priors.unet import EDMDenoiser, UNetConfig

# --- state ---


def test_a_kill_between_two_files_resumes_what_belongs_together(tmp_path):
    trainer = Trainer(TrainConfig(**FAST, steps=3), [noise_source()], tmp_path)
    trainer.run(QUIET)
    old = (tmp_path / "state.json").read_text()
    more = TrainConfig(**FAST, steps=5)
    trainer = Trainer(more, [noise_source()], tmp_path)
    trainer.run(QUIET)
    (tmp_path / "state.json").write_text(old)  # as if killed before it was replaced
    assert Trainer(more, [noise_source()], tmp_path).steps == 5
    assert not list(tmp_path.glob(".*"))


def test_folders_of_older_versions_are_resumed(tmp_path):
    """Counters in state.json alone, and a network without the newer options."""
    trainer = Trainer(TrainConfig(**FAST, steps=3), [noise_source()], tmp_path)
    trainer.run(QUIET)
    state = json.loads((tmp_path / "state.json").read_text())
    for name in ("classes", "masked"):
        del state["config"]["network"][name]
    for name in ("steps", "reference", "precision", "classes", "class_dropout", "measured", "validate_every_s"):
        del state["config"][name]
    del state["validation"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    save_file(load_file(tmp_path / "last.safetensors"), tmp_path / "last.safetensors")
    again = Trainer(TrainConfig(**FAST, steps=5), [noise_source()], tmp_path)
    assert again.steps == 3 and all(map(torch.equal, again.net.parameters(), trainer.net.parameters()))
    last = len(list(again.net.parameters())) - 1  # the head: what lies before it is still without gradients
    moments = [t.optimizer.state_dict()["state"][last]["exp_avg"] for t in (again, trainer)]
    assert torch.equal(*moments) and moments[0].abs().sum() > 0


def test_other_networks_and_damage_are_refused(tmp_path):
    Trainer(TrainConfig(**FAST, steps=1), [noise_source()], tmp_path).run(QUIET)
    for options in ({"classes": ("CT",)}, {"measured": Measured()}):
        with pytest.raises(InputError, match="training of another network"):
            Trainer(TrainConfig(**FAST, steps=1, **options), [noise_source()], tmp_path)
    data = (tmp_path / "last.safetensors").read_bytes()
    (tmp_path / "last.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read as a training"):
        Trainer(TrainConfig(**FAST, steps=1), [noise_source()], tmp_path)


def test_a_loss_that_is_not_finite_leaves_what_was_saved(tmp_path, monkeypatch):
    Trainer(TrainConfig(**FAST, steps=2), [noise_source()], tmp_path).run(QUIET)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    bad = Source("a", "CT", (np.full((24, 24), np.inf, np.float32),))
    with pytest.raises(NumericalError, match="lower 'rate'"):
        Trainer(TrainConfig(**FAST, steps=4), [bad], tmp_path).run(QUIET)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.fixture
def data(tmp_path):
    """Three subjects of small CT stacks, and the options of a short training."""
    folder = tmp_path / "data"
    folder.mkdir()
    for k in range(3):
        hu = np.random.default_rng(k).normal(0, 300, (2, 32, 32)).astype(np.float32)
        np.savez(folder / f"subject{k}.npz", hu=hu)
    network = {"channels": [8, 8], "blocks": [1, 1], "patch": 2, "embedding": 16}
    options = {"stages": [[0, 16, 4]], "phantoms": 0, "network": network, "save_every_s": 0.1, "validate_every_s": 0.2}
    (tmp_path / "options.json").write_text(json.dumps(options))
    return tmp_path


def test_the_same_command_goes_on_after_kill_9(data, run, monkeypatch):
    """Killed in a process of its own, wherever it is; finished in this one."""
    reported = []
    monkeypatch.setattr("invdiff.training_report.write_report", lambda *args, **options: reported.append(args))
    command = ["priors", "train", str(data / "data"), "-o", str(data / "out"), "--config", str(data / "options.json")]
    with subprocess.Popen([sys.executable, "-m", "invdiff", *command, "--quiet"]) as child:
        end = time.monotonic() + 60
        while not (data / "out" / "validation.json").exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    prior = load_prior(data / "out")  # whole at any moment
    steps = json.loads((data / "out" / "state.json").read_text())["steps"]
    code, out, err = run(*command, "--set", f"steps={steps + 40}")
    assert (code, err) == (0, ""), err
    state = json.loads((data / "out" / "state.json").read_text())
    assert steps > 0 and state["steps"] == steps + 40 and "held out" in out
    assert not torch.equal(*(next(p.net.parameters()) for p in (prior, load_prior(data / "out"))))
    assert len(reported) == 1 and not [p for p in (data / "out").iterdir() if p.name.startswith(".")]


def test_sigterm_saves_and_says_how_to_go_on(data, run, monkeypatch):
    step = Trainer._step

    def struck(self, *args):
        loss = step(self, *args)
        if self.steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(Trainer, "_step", struck)
    command = ["priors", "train", str(data / "data"), "-o", str(data / "out"), "--config", str(data / "options.json")]
    code, _, err = run(*command, "--set", "steps=50")
    assert code == 130 and "stopped at step 3 and saved; the same command goes on" in err
    assert json.loads((data / "out" / "state.json").read_text())["steps"] == 3


# --- several processes ---

TWO = """
import os, sys
from pathlib import Path
import torch
import invdiff.priors.train, invdiff.training_report
from invdiff.cli import main
sys.path.insert(0, sys.argv[1])
from training_cases import gloo_threads, shake
out = Path(sys.argv[2])

class Watched(invdiff.priors.train.Trainer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        shake(self.net)
        self.seen = []

    def _step(self, crops, *rest):
        loss = super()._step(crops, *rest)
        self.seen.append((crops, [p.grad.clone() for p in self.net.parameters()]))
        return loss

    def run(self, *args):
        done = super().run(*args)
        found = {"net": self.net.state_dict(), "seen": self.seen, "crops": self.crops}
        torch.save(found, out / f"{self.place.rank}.pt")
        try:
            self.place.check_equal(iter([torch.zeros(1) + self.place.rank]))
        except ArithmeticError as error:
            (out / f"differ{self.place.rank}").write_text(str(error))
        return done

invdiff.priors.train.Trainer = Watched
invdiff.training_report.write_report = lambda *args, **options: (out / "reported").open("x").close()
try:
    main(sys.argv[3:])
finally:
    (out / f"threads{os.environ['RANK']}").write_text(str(gloo_threads()))
"""


def test_two_processes_average_their_gradients(data, tmp_path):
    """The command under torchrun: gradients are those of one process that averages two losses; one of them writes."""
    script, out = tmp_path / "two.py", tmp_path / "both"
    script.write_text(TWO)
    out.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    launch += [os.path.dirname(__file__), str(out), "priors", "train", str(data / "data"), "-o", str(out / "cli")]
    launch += ["--config", str(data / "options.json"), "--set", "steps=4", "--set", "seed=5", "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [torch.load(out / f"{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(found[0]["net"][k], found[1]["net"][k]) for k in found[0]["net"])
    assert not torch.equal(found[0]["seen"][0][0], found[1]["seen"][0][0]) and found[0]["crops"] == 4 * 4 * 2
    options = with_settings(json.loads((data / "options.json").read_text()), ["steps=4", "seed=5"])
    sources = load_sources(split_files([data / "data"], "train", "validation")[0])
    for step, gradients in enumerate(by_hand(TrainConfig.from_dict(options), sources)):
        for a, b in zip(found[1]["seen"][step][1], gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    assert "different weights" in (out / "differ0").read_text() and (out / "reported").exists()
    assert [(out / f"threads{rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    assert json.loads((out / "cli" / "state.json").read_text())["crops"] == 4 * 4 * 2


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_of_the_group_outlives_it(monkeypatch, fails):
    """Threads of gloo that drop a tensor while Python ends abort the process (pytorch issue 190489)."""
    join = torch.distributed.init_process_group
    alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: join(backend, **alone))
    monkeypatch.setenv("WORLD_SIZE", "2")

    def train(place):
        net = place.shared(torch.nn.Linear(2, 2))
        net(torch.ones(1, 2)).sum().backward()
        place.agree(0.0, 0.0, stop=False)
        assert gloo_threads(seconds=0) > 0
        net.cycle = [net]  # which only the collector of garbage frees
        if fails:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if fails else nullcontext() as caught, ranks() as place:
        train(place)
    assert gloo_threads() == 0 and (caught is not None) == fails


def by_hand(config, sources):
    """Gradients of the first two steps, with the crops and the noise of two processes: means, clipped to norm 1. The
    rate of the first step is 0, so that both are those of the weights at the start."""
    torch.manual_seed(config.seed)
    net = shake(EDMDenoiser(config.network))
    seeds = [Ranks(rank, 2).seed(config.seed) for rank in (0, 1)]
    assert seeds[0] == config.seed != seeds[1] and config.learning_rate(0) == 0
    crops = [CropSampler(sources, config.weights, 0, seed).batches(16, 4) for seed in seeds]
    draws = [torch.Generator().manual_seed(seed + 1) for seed in seeds]
    for _ in range(2):
        net.zero_grad()
        for images, g in zip(crops, draws, strict=True):
            x = next(images)
            sigma = torch.exp(config.log_sigma[0] + config.log_sigma[1] * torch.randn(4, generator=g))
            (edm_loss(net, x, sigma, torch.randn(x.shape, generator=g)) / 2).backward()
        length = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
        yield [p.grad * min(1.0, 1 / length.item()) for p in net.parameters()]


def test_one_gpu_is_not_shared_by_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 processes cannot share it"), ranks("cuda:0"):
        pass
    with pytest.raises(UsageError, match="unknown device 'tpu0'"), ranks("tpu0"):
        pass


# --- from a prior ---


@pytest.fixture
def made(tmp_path):
    """A prior with a network and classes of its own, as a training leaves it."""
    config = TrainConfig(**FAST, steps=2, classes=("CT", "image"))
    Trainer(config, [noise_source()], tmp_path / "made").run(QUIET)
    return tmp_path / "made"


def test_a_training_starts_from_a_prior_once(made, tmp_path):
    """With its network, classes, weights and card; what is there when it goes on is the training's own."""
    card = json.loads((made / "config.json").read_text())
    card["info"] |= {"modality": "CT", "voxel_mm": [0.5, 2.0], "value_range": [-1.0, 3.0], "sigma_max": 10.0}
    (made / "config.json").write_text(json.dumps(card))
    options = {"start": str(made), "steps": 3, "phantoms": 2, "stages": FAST["stages"]}
    trainer = Trainer(TrainConfig.from_dict(options), [noise_source()], tmp_path / "more")
    before = [p.clone() for p in trainer.net.parameters()]
    kept = load_file(made / "model.safetensors")
    assert all(torch.equal(p.half(), kept[name].half()) for name, p in trainer.net.named_parameters())
    assert all(map(torch.equal, before, trainer.ema.parameters()))
    trainer.run(QUIET)
    rmtree(made)
    for again in (options, {k: v for k, v in options.items() if k != "start"}):
        config = TrainConfig.from_dict(resumed(tmp_path / "more", again | {"steps": 5}))
        later = Trainer(config, [noise_source()], tmp_path / "more")
        assert later.steps == 3 and all(map(torch.equal, later.net.parameters(), trainer.net.parameters()))
    later.run(QUIET)
    assert not all(map(torch.equal, later.net.parameters(), before))
    new = json.loads((tmp_path / "more" / "config.json").read_text())
    assert new["training"]["start"] == str(made) and len(new["training"]["start_sha256"]) == 64
    assert new["info"] == card["info"] | {"name": "more"}


def test_a_training_that_started_elsewhere_is_refused(made, tmp_path):
    with pytest.raises(UsageError, match=r"started from random weights, not from embedded; choose another folder"):
        resumed(made, {"start": "embedded"})
    with pytest.raises(UsageError, match="start is the folder to write to"):
        (made / "last.safetensors").unlink()
        Trainer(TrainConfig.from_dict({"start": str(made)}), [noise_source()], made)
    assert resumed(tmp_path / "none", {"steps": 3}) == {"steps": 3}


def test_the_shipped_prior_can_be_gone_on_from():
    config = TrainConfig.from_dict({"start": "embedded", "steps": 1})
    assert config.network == load_prior("embedded").net.config


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"network": {"channels": (16, 16), "blocks": (1, 1)}}, UsageError, "of another network"),
        ({"classes": ("CT",)}, UsageError, "of another network or other classes"),
        ({"measured": {"keep": 0.5}}, UsageError, "leave out 'network', 'classes' and 'measured'"),
        ({"start": "no/such"}, PriorError, "start 'no/such': no prior; name a folder"),
        ({"start": "x" * 5000}, PriorError, "no prior; name a folder"),
        ({"start": 3}, UsageError, "start is no name of a prior"),
    ],
)
def test_a_prior_that_cannot_be_gone_on_from_is_refused(made, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        Trainer(TrainConfig.from_dict({"start": str(made), "steps": 1} | options), [noise_source()], tmp_path / "more")


def test_an_imported_prior_is_not_gone_on_from(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "adm", "network": {}, "info": {}}')
    with pytest.raises(PriorError, match="is an imported prior"):
        TrainConfig.from_dict({"start": str(tmp_path)})


# --- options ---


def test_settings_reach_every_option():
    options = with_settings({"network": {"patch": 2}}, ["steps=9", "network.channels=16,24", "measured.keep=0.5"])
    options = with_settings(options, ["classes=CT,image", "weights.CT=0.4", "precision=auto", "network.blocks=1,1"])
    config = TrainConfig.from_dict(options)
    assert (config.steps, config.network.channels, config.network.patch) == (9, (16, 24), 2)
    assert config.measured == Measured(0.5) and config.network.masked and config.network.classes == 2
    assert config.weights == TrainConfig().weights | {"CT": 0.4} and config.precision == "auto"
    assert TrainConfig.from_dict(json.loads(json.dumps({"minutes": 3, "measured": None}))).minutes == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["step=3"], "did you mean 'steps'"),
        (["steps"], "write NAME=VALUE"),
        (["steps.x=1"], "steps has no parts"),
        (["steps=-1"], "steps is -1"),
        (["rate=fast"], "rate is fast, no number"),
        (["rate=Infinity"], "rate is inf, no number"),
        (["ema=1"], "ema is 1 or more"),
        (["seed=-1"], "seed is -1, no whole number"),
        (["phantoms=1.5"], "phantoms is 1.5, no whole number"),
        (["weights=3"], "weights are no names and shares"),
        (["weights.CT=-1"], "weights.CT is -1, no number from 0"),
        (["log_sigma=1,2,3"], "log_sigma is"),
        (["classes=1,2"], "no names"),
        (["stages=[[0,0,4]]"], "stage 0, 0, 4"),
        (["stages=[[0,16,0]]"], "stage 0, 16, 0"),
        (["measured.block=1.5"], "whole numbers"),
        (["measured.seed=-1"], "seed=-1.*and seed >= 0"),
        (["network.channels=[7,9,8,8]"], "multiples of 8"),
        (["network.channels=[1000000000,8,8,8]"], "whole numbers to 16384"),
        (["network.blocks=[1]"], "as many blocks as channels"),
        (["network.blocks=[1,1,1,100000000]"], "whole numbers to 16384"),
        (["network.patch=0"], "a patch of 1 to 64"),
        (["network.sigma_data=-1"], "sigma_data -1 is not positive"),
        (["precision=half"], "unknown precision 'half'"),
        (["measured.keep=0"], "needs 0 < keep"),
        (["measured.further=1"], "nothing would teach"),
        (["measured.keep=0.5", "reference=8"], "exclude each other"),
        (["network.depth=3"], "cannot be used"),
        (["classes=CT,CT"], "two classes of one name"),
        (["stages=[[0,20,4]]"], "crops of 20 do not fit the stride 16"),
    ],
)
def test_options_that_cannot_be_used_are_named(settings, words):
    with pytest.raises(UsageError, match=words):
        TrainConfig.from_dict(with_settings({"steps": 5} if "." in settings[0] else {}, settings))


def test_a_network_that_does_not_fit_is_refused_before_it_is_made(tmp_path, monkeypatch):
    """A convolution of 16384 channels to as many has 9.7 GB."""
    network = UNetConfig(channels=(16384, 16384), blocks=(4, 4), patch=2)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: pytest.fail("was made"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args, **options: pytest.fail("was allocated"))
    with pytest.raises(ResourceError, match=r"million weights takes \d+ GB.*network\.channels"):
        Trainer(TrainConfig(network=network), [], tmp_path)


def test_data_without_any_weight_are_refused(tmp_path):
    with pytest.raises(UsageError, match="all data have the weight 0"):
        Trainer(TrainConfig.from_dict({"phantoms": 0, "weights": {"CT": 0}}), [flat(0.0, "a")], tmp_path)
