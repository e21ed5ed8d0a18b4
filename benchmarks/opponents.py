"""A supervised opponent: the network of the embedded prior, trained to turn the FBP of one CT scan into the image.

    python benchmarks/opponents.py train --views 30 --minutes 330 -o DIR       run it again to go on after a kill
    python benchmarks/quality.py --settings "30 views" --solvers fbp pnp unet --unet DIR

It learns from the CT of the training split as ``invdiff priors train`` reads it. A scan has no crops, so that it sees
whole slices, turned, flipped and half of them made smaller, with random pixel sizes, measured as ``quality.py`` does
(finer grid, photon noise) and reconstructed by FBP. The result is FBP + 0.25 F(2 FBP), F the U-Net at one
fixed noise level; the loss is the mean square error in HU / 1000. ``DIR`` gets last.safetensors, state.json, task.json.
The schedule is in core-minutes, so that it ends where it should on a busy machine. The steps of the
embedded prior take 389 core-minutes in float32 on one with AMX and 185 in bfloat16, in which this trains there.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from _data import DATA
from torch import Tensor, nn

from invdiff.errors import InputError, InvdiffError
from invdiff.files import show
from invdiff.intensity import MU_WATER_PER_MM
from invdiff.operators import build
from invdiff.priors import prior_folder
from invdiff.priors.precision import has_bfloat16
from invdiff.priors.train_config import TrainConfig
from invdiff.priors.training_data import CropSampler, Source
from invdiff.priors.training_files import load_sources, split_files
from invdiff.priors.training_state import STATE, TENSORS, load_state, save_state, write_json
from invdiff.priors.unet import UNet, UNetConfig
from invdiff.problem import Problem
from invdiff.simulate import as_tensors, simulate_ct
from invdiff.solvers.pnp import pseudo_inverse
from invdiff.stopping import stop_signals

TASK = "task.json"
FIELD_MM = 300.0, 500.0  # sides of a slice that are drawn from
NOTE_S = 120.0  # seconds between lines of text, which are seconds between saved states
IN, OUT = 2.0, 0.25  # of the network: about 1 / spread of images, and the spread of what FBP gets wrong


class Supervised(nn.Module):
    """FBP ``(batch, 1, H, W)`` in HU / 1000 to the image; starts as the identity, and a small bias."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.net = UNet(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + OUT * self.net(IN * x, x.new_zeros(len(x)))


class Slices:
    """Endless whole slices of the training data, square and at random 0.75 to 1 times as large, in HU / 1000.

    Args:
        sources: CT alone is used.
        seed: of what is drawn.
    """

    def __init__(self, sources: list[Source], seed: int):
        self.chosen = CropSampler([s for s in sources if s.modality == "CT"], {}, 0, seed)
        self.rng = self.chosen.rng

    def draw(self, side: int) -> np.ndarray:
        """One slice ``(side, side)``, at least -1."""
        rng, sources = self.rng, self.chosen.sources
        source = sources[rng.choice(len(sources), p=self.chosen.p)]
        image = square(source.slices[rng.integers(len(source.slices))])
        inner = side if rng.random() < 0.5 else round(side * rng.uniform(0.75, 1.0))
        image = np.rot90(resized(image, inner), int(rng.integers(4)))
        image = image[:, ::-1] if rng.random() < 0.5 else image
        margin = (side - inner) // 2, side - inner - (side - inner) // 2
        return np.pad(image, (margin, margin), constant_values=-1.0)


def square(image: np.ndarray) -> np.ndarray:
    """Padded with air to the longer side."""
    pad = [((max(image.shape) - n) // 2, (max(image.shape) - n + 1) // 2) for n in image.shape]
    return np.pad(image, pad, constant_values=-1.0)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """``(side, side)``, bicubic with antialiasing, at least -1."""
    x = torch.from_numpy(np.ascontiguousarray(image))[None, None]
    if image.shape != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return x[0, 0].numpy().clip(-1.0, None)


class Scanner:
    """FBP of simulated scans of slices; the operator is built once a side, for pixels of 1 mm.

    Pixels of p mm have p times the line integrals, so that p goes to the attenuation of water instead.
    """

    def __init__(self, views: int):
        self.views, self.built = views, {}

    def fbp(self, images: np.ndarray, field_mm: float, seed: int) -> Tensor:
        """``(S, side, side)`` in HU / 1000 to what FBP makes of its scan, ``(S, 1, side, side)``."""
        side = images.shape[-1]
        if side not in self.built:
            self.built[side] = build("ct-sparse", (side, side), (1.0, 1.0), views=self.views)
        mu = MU_WATER_PER_MM * field_mm / side
        scan = simulate_ct(1000 * images, self.built[side], seed=seed, mu_water_per_mm=mu)
        return self.built[side].pinv(as_tensors(scan)[0]) / mu - 1


def batches(slices: Slices, scanner: Scanner, side: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """FBP and truth, each ``(batch, 1, side, side)``, without end; one pixel size a batch."""
    while True:
        truth = np.stack([slices.draw(side) for _ in range(batch)])
        field = float(np.exp(slices.rng.uniform(*np.log(FIELD_MM))))
        yield scanner.fbp(truth, field, int(slices.rng.integers(2**31))), torch.from_numpy(truth)[:, None]


class Training:
    """Network, average and counters, gone on with where the folder holds them."""

    def __init__(self, config: TrainConfig, out: Path):
        self.config, self.out = config, out
        torch.manual_seed(config.seed)
        self.net, self.ema = Supervised(config.network), Supervised(config.network).requires_grad_(False)
        self.net = self.net.to(memory_format=torch.channels_last)
        self.ema.load_state_dict(self.net.state_dict())
        self.optimizer = torch.optim.AdamW(self.net.parameters(), config.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.count: dict[str, Any] = {"steps": 0, "crops": 0, "elapsed_s": 0.0, "cpu_s": 0.0, "curve": []}
        self.count |= load_state(out, config, self.net, self.ema, self.optimizer, torch.device("cpu")) or {}

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, 0 to 1."""
        return min(1.0, self.count["cpu_s"] / (60 * self.config.minutes))

    def step(self, x: Tensor, truth: Tensor) -> float:
        """One step of the optimizer; the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16(x.device)):
            loss = F.mse_loss(self.net(x.contiguous(memory_format=torch.channels_last)), truth)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.count["steps"] += 1
        self.count["crops"] += len(x)
        decay = min(self.config.ema, (1 + self.count["steps"]) / (20 + self.count["steps"]))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        return loss.item()

    def run(
        self,
        slices: Slices,
        scanner: Scanner,
        check: Callable[[nn.Module], float],
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the end of the schedule, or until ``stop`` says so; saved at intervals. Whether it is over."""
        c, stage, running = self.count, (0, 0), None
        clock, processor = time.monotonic() - c["elapsed_s"], time.process_time() - c["cpu_s"]
        noted = time.monotonic()
        while self.progress < 1 and not stop():
            if (wanted := self.config.stage(self.progress)) != stage:
                stage, drawn = wanted, batches(slices, scanner, *wanted)
            loss = self.step(*next(drawn))
            running = loss if running is None else 0.98 * running + 0.02 * loss
            c["elapsed_s"], c["cpu_s"] = time.monotonic() - clock, time.process_time() - processor
            if time.monotonic() - noted > NOTE_S or self.progress >= 1:
                c["curve"].append({"step": c["steps"], "side": stage[0], "loss": running, "psnr_db": check(self.ema)})
                self.save()
                print(f"{c['cpu_s'] / 60:.1f} core-minutes, step {c['steps']}: {c['curve'][-1]}", flush=True)
                noted = time.monotonic()
        self.save()
        return self.progress >= 1

    def save(self) -> None:
        """Write everything a resume needs."""
        save_state(self.out, self.config, self.count | {"validation": []}, self.net, self.ema, self.optimizer)


def checker(held_out: list[Source], scanner: Scanner, side: int = 256) -> Callable[[nn.Module], float]:
    """PSNR in dB (window -1000 .. 1000 HU) on a slice of each held-out CT volume."""
    truth = np.stack([resized(square(s.slices[len(s.slices) // 2]), side) for s in held_out if s.modality == "CT"])
    x = scanner.fbp(truth, 400.0, 0)

    def psnr(net: nn.Module) -> float:
        with torch.no_grad():
            error = net(x).clamp(-1, 1) - torch.from_numpy(truth)[:, None].clamp(-1, 1)
        return round(float(10 * torch.log10(4 / error.square().mean())), 2)

    return psnr


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    shape = json.loads((prior_folder("embedded") / "config.json").read_text())["network"]
    stages = ((0.0, args.side // 2, 4), (0.4, args.side, 2))
    config = TrainConfig.from_dict({"minutes": args.minutes, "stages": stages, "network": shape, "seed": args.seed})
    args.output.mkdir(parents=True, exist_ok=True)
    task = {"op": "ct-sparse", "views": args.views}
    if (args.output / TASK).exists() and read_json(args.output / TASK) != task:
        raise SystemExit(f"{args.output}: holds a training for another scan; choose another folder with -o")
    write_json(args.output / TASK, task)
    learnt, held_out = (load_sources(found) for found in split_files([DATA], "train", "validation"))
    training, scanner = Training(config, args.output), Scanner(args.views)
    slices = Slices(learnt, args.seed + training.count["steps"])
    with stop_signals() as stop, stop.between_steps():
        if not training.run(slices, scanner, checker(held_out, scanner), lambda: bool(stop.asked)):
            raise SystemExit(f"stopped at step {training.count['steps']} and saved; the same command goes on")


class Trained(NamedTuple):
    """A supervised network, the operator and options it is for, and the core-minutes it had."""

    net: Supervised
    op: str
    options: dict[str, Any]
    core_minutes: float
    steps: int

    def fits(self, op: str, options: dict[str, Any]) -> bool:
        """Whether it was trained for that scan."""
        return (op, options) == (self.op, self.options)

    def image(self, problem: Problem) -> Tensor:
        """``(1, S, 1, H, W)`` in HU / 1000, a slice at a time; sides are padded to the stride with air."""
        x = pseudo_inverse(problem)[0]
        high, wide = x.shape[-2:]
        stride = self.net.net.config.stride
        x = F.pad(x, (0, -wide % stride, 0, -high % stride), value=-1.0)
        with torch.no_grad():
            return torch.cat([self.net(one[None]) for one in x])[None, ..., :high, :wide]


def load_trained(folder: Path) -> Trained:
    """The average of the weights of a training by this file, as far as it has come.

    Raises:
        InputError: damaged files.
        SystemExit: no training is there.
    """
    if not all((folder / name).is_file() for name in (TASK, STATE, TENSORS)):
        raise SystemExit(f"{show(folder)}: no training of 'opponents.py train' is there")
    task, state = (read_json(folder / name) for name in (TASK, STATE))
    try:
        training = Training(TrainConfig.from_dict(state["config"]), folder)
        options = {k: v for k, v in task.items() if k != "op"}
        return Trained(training.ema.eval(), task["op"], options, training.count["cpu_s"] / 60, training.count["steps"])
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:160]
        raise InputError(f"{show(folder)}: {TASK} or {STATE} is damaged ({why}); give another folder") from None


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        InputError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{show(path)}: is no JSON ({str(error)[:80]}); give another folder") from None
    if not isinstance(found, dict):
        raise InputError(f"{show(path)}: is no object of JSON; give another folder")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(required=True).add_parser("train", help="train, or go on with a training")
    command.add_argument("--views", type=int, default=30)
    command.add_argument("--minutes", type=float, default=330.0, help="core-minutes of the whole schedule")
    command.add_argument(
        "--side", type=int, default=256, help="of slices in the last 60 %% of the schedule, before half"
    )
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        train(args)
    except InvdiffError as error:
        raise SystemExit(f"opponents.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from what was saved") from None


if __name__ == "__main__":
    main()
