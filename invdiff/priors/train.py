"""Training of the embedded network: EDM objective on crops, EMA, checkpoints, resume, held-out denoising PSNR."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from invdiff.errors import InputError, NumericalError, UsageError
from invdiff.priors.training_data import CropSampler, Source
from invdiff.priors.unet import EDMDenoiser, UNetConfig

Log = Callable[[str], None]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training; JSON-safe.

    Args:
        minutes: wall-clock minutes of the whole schedule (summed over resumes).
        stages: (fraction of the time at which the stage starts, crop side in pixels, batch).
        rate: peak AdamW learning rate; 1 % of the time warm-up, constant to 40 %, cosine to zero.
        log_sigma: mean and standard deviation of ln sigma (EDM training distribution).
        ema: longest decay of the ramped exponential moving average of the weights.
        weights: share of each modality, and factors for single files by name.
        phantoms: number of random phantoms made for this training.
    """

    minutes: float = 150.0
    stages: tuple[tuple[float, int, int], ...] = ((0.0, 64, 16), (0.35, 128, 8))
    rate: float = 1e-3
    log_sigma: tuple[float, float] = (-1.8, 1.4)
    ema: float = 0.999
    weights: dict[str, float] = field(default_factory=lambda: {"CT": 0.65, "image": 0.2, "phantom": 0.15})
    phantoms: int = 400
    seed: int = 0
    save_every_s: float = 120.0
    network: UNetConfig = field(default_factory=UNetConfig)

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """Build from a JSON object; unknown keys raise :class:`UsageError`."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise UsageError(f"unknown training options {sorted(unknown)}: known are {known}")
        values = dict(values)
        if "network" in values:
            net: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["network"].items()}
            values["network"] = UNetConfig(**net)
        if "stages" in values:
            values["stages"] = tuple(tuple(s) for s in values["stages"])
        return cls(**values)

    def stage(self, progress: float) -> tuple[int, int]:
        """Crop side and batch at ``progress`` in [0, 1]."""
        return [(side, batch) for start, side, batch in self.stages if progress >= start][-1]

    def learning_rate(self, progress: float) -> float:
        warm = min(1.0, progress / 0.01)
        return self.rate * warm * (1.0 if progress < 0.4 else 0.5 * (1 + math.cos(math.pi * (progress - 0.4) / 0.6)))


def edm_loss(net: EDMDenoiser, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Weighted denoising loss of EDM, lambda(sigma) |D(x + sigma n; sigma) - x|^2 (Karras et al. 2022, equation 8)."""
    sd = net.config.sigma_data
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    error = net(x + sigma.view(-1, 1, 1, 1) * noise, sigma) - x
    return (weight * error.square().mean((1, 2, 3))).mean()


def save_prior(net: EDMDenoiser, folder: Path, info: dict) -> None:
    """Write ``model.safetensors`` (fp16; the embedding's frequencies stay fp32) and ``config.json``, as loaded by
    :func:`invdiff.priors.load_prior`; ``info`` holds fields of :class:`invdiff.priors.base.PriorInfo`."""
    state = {k: (v if k.endswith("frequencies") else v.half()).contiguous() for k, v in net.state_dict().items()}
    save_file(state, folder / "model.part", metadata={"format": "invdiff-unet-edm"})
    (folder / "model.part").replace(folder / "model.safetensors")
    config = {"network": net.config.as_dict(), "info": info}
    (folder / "config.part").write_text(json.dumps(config, indent=1))
    (folder / "config.part").replace(folder / "config.json")


class Trainer:
    """Owns network, EMA, optimizer and counters; ``run`` trains until the schedule's end or an interrupt."""

    def __init__(self, config: TrainConfig, sources: list[Source], out: Path, device: str = "cpu"):
        self.config, self.out, self.device = config, out, torch.device(device)
        torch.manual_seed(config.seed)
        self.net = EDMDenoiser(config.network).to(self.device).to(memory_format=torch.channels_last)
        self.ema = EDMDenoiser(config.network).to(self.device).to(memory_format=torch.channels_last)
        self.ema.load_state_dict(self.net.state_dict())
        self.ema.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), config.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.steps = self.crops = 0
        self.elapsed_s = self.cpu_s = 0.0
        self.curve: list[dict] = []
        if (out / "state.json").exists():
            self._resume()
        self.sampler = CropSampler(sources, config.weights, config.phantoms, config.seed + self.steps)
        self.rng = torch.Generator().manual_seed(config.seed + 1 + self.steps)

    def run(self, log: Log) -> None:
        """Train to the end of the schedule; Ctrl-C saves and re-raises, so that the same command resumes."""
        start, cpu, saved, running = time.monotonic(), time.process_time(), time.monotonic(), None
        base, base_cpu = self.elapsed_s, self.cpu_s
        total = 60 * self.config.minutes
        stage = (0, 0)  # crop side, batch
        try:
            while self.elapsed_s < total:
                progress = self.elapsed_s / total
                if (wanted := self.config.stage(progress)) != stage:
                    stage, batches = wanted, self.sampler.batches(*wanted)
                loss = self._step(next(batches), progress)
                running = loss if running is None else 0.98 * running + 0.02 * loss
                self.elapsed_s = base + time.monotonic() - start
                self.cpu_s = base_cpu + time.process_time() - cpu
                if self.steps % 100 == 0:
                    point = {"step": self.steps, "crops": self.crops, "side": stage[0], "loss": running}
                    self.curve.append(point | {"elapsed_s": self.elapsed_s, "cpu_s": self.cpu_s})
                    log(
                        f"{self.elapsed_s / 60:6.1f}/{self.config.minutes:.0f} min  step {self.steps}  "
                        f"{self.crops} crops of {stage[0]}  loss {running:.4f}  {self.cpu_s / 3600:.2f} core-h"
                    )
                if time.monotonic() - saved > self.config.save_every_s:
                    self.save()
                    saved = time.monotonic()
        finally:
            self.save()

    def _step(self, x: Tensor, progress: float) -> float:
        x = x.to(self.device).to(memory_format=torch.channels_last)
        mean, std = self.config.log_sigma
        sigma = torch.exp(mean + std * torch.randn(len(x), generator=self.rng)).to(self.device)
        noise = torch.randn(x.shape, generator=self.rng).to(x)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(progress)
        loss = edm_loss(self.net, x, sigma, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        self.crops += len(x)
        decay = min(self.config.ema, (1 + self.steps) / (20 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        value = loss.item()
        if not math.isfinite(value):
            raise NumericalError(f"loss is {value} at step {self.steps}: lower 'rate', or check the training data")
        return value

    def save(self) -> None:
        """Write ``last.safetensors`` (weights, EMA, Adam moments), ``state.json``, fp16 ``model.safetensors``."""
        self.out.mkdir(parents=True, exist_ok=True)
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in moments.items()}
        tensors = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
        save_file(tensors, self.out / "last.part")
        (self.out / "last.part").replace(self.out / "last.safetensors")
        state: dict[str, Any] = {"steps": self.steps, "crops": self.crops}
        state |= {"elapsed_s": self.elapsed_s, "cpu_s": self.cpu_s}
        state |= {"config": asdict(self.config), "curve": self.curve}
        (self.out / "state.part").write_text(json.dumps(state))
        (self.out / "state.part").replace(self.out / "state.json")
        save_prior(self.ema, self.out, {"name": self.out.name, "sigma_min": 0.005, "sigma_max": 20.0})

    def _resume(self) -> None:
        state = json.loads((self.out / "state.json").read_text())
        if state["config"]["network"] != json.loads(json.dumps(asdict(self.config.network))):
            raise InputError(f"{self.out}: holds a training of another network; choose another folder with -o")
        self.steps, self.crops, self.curve = state["steps"], state["crops"], state["curve"]
        self.elapsed_s, self.cpu_s = state["elapsed_s"], state["cpu_s"]
        tensors = load_file(self.out / "last.safetensors", device=str(self.device))
        part = lambda p: {k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)}  # noqa: E731
        self.net.load_state_dict(part("net."))
        self.ema.load_state_dict(part("ema."))
        saved = self.optimizer.state_dict()
        saved["state"] = {i: part(f"adam.{i}.") for i in range(len(saved["param_groups"][0]["params"]))}
        self.optimizer.load_state_dict(saved)
