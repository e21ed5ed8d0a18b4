"""Training of the embedded network: crops, EMA, saved states, resume, validation, one process or several."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import NumericalError, ResourceError, UsageError
from invdiff.files import make_folder, show
from invdiff.priors import prior_folder
from invdiff.priors.distributed import Ranks
from invdiff.priors.masking import shown
from invdiff.priors.objective import Objective, edm_loss
from invdiff.priors.train_config import Start, TrainConfig, check_memory, check_start, started
from invdiff.priors.training_data import CropSampler, Source
from invdiff.priors.training_state import (
    VALIDATION,
    check_apart,
    check_held_out,
    digests,
    learnt_by,
    load_state,
    save_prior,
    save_state,
    write_json,
)
from invdiff.priors.unet import EDMDenoiser
from invdiff.priors.validate import subject_psnr

__all__ = ["TrainConfig", "Trainer", "edm_loss", "save_prior"]
Log = Callable[[str], None]
warnings = logging.getLogger("invdiff")
SIGMA_RANGE = (0.005, 20.0)
_FREE = ("minutes", "steps", "save_every_s", "validate_every_s", "start")  # options that may differ after a resume


class Trainer:
    """Owns network, EMA, optimizer and counters; ``run`` trains until the schedule's end or until it is stopped.

    Args:
        config: what decides the training.
        sources: slices to learn from.
        out: folder; a training that is in it is resumed.
        device: where the network is trained; with several processes each has one.
        held_out: slices of other subjects, denoised at intervals.
        place: this process among all, see :func:`invdiff.priors.distributed.ranks`; None for one alone.

    Raises:
        InputError: the folder holds a training of another network, a damaged one, or one that has learnt from what is
            held out.
        UsageError: the prior to start from is one of another network, or the processes were given different trainings.
        PriorError: it cannot be read.
        ResourceError: the network is too large for this machine.
    """

    def __init__(
        self,
        config: TrainConfig,
        sources: Sequence[Source],
        out: Path,
        device: str = "cpu",
        held_out: Sequence[Source] = (),
        place: Ranks | None = None,
    ):
        self.place = place or Ranks(device=torch.device(device))
        self.config, self.out, self.device, self.held_out = config, out, self.place.device, held_out
        check_memory(config)
        torch.manual_seed(config.seed)
        self.net = EDMDenoiser(config.network).to(self.device).to(memory_format=torch.channels_last)
        self.ema = EDMDenoiser(config.network).to(self.device).to(memory_format=torch.channels_last)
        self.ema.load_state_dict(self.net.state_dict())
        self.ema.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), config.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.steps = self.crops = 0
        self.elapsed_s = self.cpu_s = 0.0
        self.curve: list[dict] = []
        self.validation: list[dict] = []
        self.begun: dict[str, Any] = {}  # the prior that it started from
        self.learnt = sorted({source.digest for source in sources})  # or was, before a resume
        self._check_classes(sources)
        if state := load_state(out, config, self.net, self.ema, self.optimizer, self.device):
            self.steps, self.crops, self.curve = state["steps"], state["crops"], state["curve"]
            self.elapsed_s, self.cpu_s, self.validation = state["elapsed_s"], state["cpu_s"], state["validation"]
            self.begun = state["begun"]
            self._compare(state)
        elif config.start:
            self._begin()
        check_apart(sources, held_out)
        check_held_out(self.learnt, held_out, out)
        check_held_out(self.begun.get("learnt", []), held_out, Path(self.begun.get("start", "")))
        self.place.check_same(self.steps, config)
        self.saved = self.steps
        seed = self.place.seed(config.seed) + self.steps
        self.sampler = CropSampler(sources, config.weights, config.phantoms, seed, config.measured)
        self.rng = torch.Generator().manual_seed(seed + 1)
        self.objective = self.place.shared(Objective(self.net, config.precision))

    def _check_classes(self, sources: Sequence[Source]) -> None:
        there = {source.modality for source in sources} | ({"phantom"} if self.config.phantoms else set())
        missing = [name for name in self.config.classes if name not in there]
        if missing and self.place.first:  # a prior that knows it may go on with data of the others
            told = ", ".join(map(show, missing)), ", ".join(sorted(there))
            warnings.warning("no data are of class %s, only of %s: this training does not teach it", *told)

    def _compare(self, state: dict[str, Any]) -> None:
        """Say what a training that goes on does not share with the one before; what was learnt from then stays told."""
        before, now = state["config"], json.loads(json.dumps(asdict(self.config)))
        other = [name for name in now if name in before and name not in _FREE and now[name] != before[name]]
        if other and self.place.first:
            warnings.warning("%s: goes on with another %s than before", show(self.out), ", ".join(other))
        old, new = set(state["learnt"]), set(self.learnt)
        if old and old != new and self.place.first:
            told = show(self.out), len(new - old), len(old - new)
            warnings.warning("%s: goes on with other data than before, %d files more and %d less", *told)
        self.learnt = sorted(old | new)

    def _begin(self) -> None:
        """Weights of the prior to start from, and what its card says of images."""
        start, (net, info) = self.config.start, started(self.config.start)
        check_start(self.config, Start(net, info))
        if prior_folder(start).resolve() == self.out.resolve():
            raise UsageError(f"training options: start is the folder to write to, {show(self.out)}; choose another -o")
        self.net.load_state_dict(net.state_dict())
        self.ema.load_state_dict(net.state_dict())
        kept = {name: getattr(info, name) for name in ("modality", "value_range", "sigma_min", "sigma_max", "voxel_mm")}
        learnt = sorted(learnt_by(prior_folder(start)))
        self.begun = {"start": start, "sha256": info.sha256, "info": kept, "learnt": learnt}

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, 0 to 1."""
        if self.config.steps:
            return min(1.0, self.steps / self.config.steps)
        return min(1.0, self.elapsed_s / (60 * self.config.minutes))

    def run(self, log: Log, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train, and save at the end and every ``save_every_s``; the same folder resumes.

        Where a state cannot be saved on the way, the training goes on with a warning. An exception, Ctrl-C among them,
        leaves what was saved before, because it can come in the middle of a step; ``saved`` is its number of steps.

        Args:
            log: gets a line now and then, from the first process.
            stop: asked after every step; the training ends, saved, when it says yes in any process.

        Returns:
            Whether the schedule is over.

        Raises:
            NumericalError: the loss is not finite; what was saved before stays.
            ResourceError: the end cannot be saved; likewise.
        """
        self._train(log, stop)
        self.place.check_equal(iter([*self.net.parameters(), *self.ema.parameters()]))
        try:
            self.save()
        except (ResourceError, UsageError) as error:  # a file has taken the place of the folder
            raise ResourceError(f"{error}; of {self.steps} steps {self._kept}, the same command goes on") from None
        if done := self.progress >= 1:
            self._attempt(lambda: self._validate(log))
            self._attempt(self.save)
        return done

    @property
    def _kept(self) -> str:
        return f"{self.saved} are saved" if self.saved else "none is saved"

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write what can be written again later; else say so."""
        try:
            write()
        except (ResourceError, UsageError) as error:
            warnings.warning("%s; the training goes on, of %d steps %s", error, self.steps, self._kept)

    def _train(self, log: Log, stop: Callable[[], bool]) -> None:
        running, stage, asked = None, (0, 0), False
        clock = time.monotonic() - self.elapsed_s
        processor = time.process_time() - (self.cpu_s if self.place.first else 0.0)
        saved = validated = time.monotonic()
        while self.progress < 1 and not asked:
            progress = self.progress
            if (wanted := self.config.stage(progress)) != stage:
                stage, batches = wanted, self._batches(*wanted)
            loss = self._step(*next(batches), progress)
            running = loss if running is None else 0.98 * running + 0.02 * loss
            self.elapsed_s, self.cpu_s, asked = self.place.agree(
                time.monotonic() - clock, time.process_time() - processor, stop()
            )
            if self.steps % 100 == 0:
                self._note(stage[0], running, log)
            if 0 < self.config.validate_every_s < time.monotonic() - validated:
                before = time.monotonic()
                self._attempt(lambda: self._validate(log))
                validated = time.monotonic()
                clock += validated - before
            if time.monotonic() - saved > self.config.save_every_s:
                self._attempt(self.save)
                saved = time.monotonic()
        if running is not None and self.steps % 100:
            self._note(stage[0], running, log)

    def _note(self, side: int, loss: float, log: Log) -> None:
        """A point of the curve and a line of text."""
        point = {"step": self.steps, "crops": self.crops, "side": side, "loss": loss}
        self.curve.append(point | {"elapsed_s": self.elapsed_s, "cpu_s": self.cpu_s})
        if self.place.first:
            log(
                f"{self.elapsed_s / 60:6.1f} min ({100 * self.progress:.0f} %)  step {self.steps}  "
                f"{self.crops} crops of {side}  loss {loss:.4f}  {self.cpu_s / 3600:.2f} core-h"
            )

    def _batches(self, side: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Crops and their classes; those beyond ``batch`` are references alone."""
        return self.sampler.labelled(side, max(batch, self.config.reference), self.config.classes)

    def _step(self, crops: Tensor, classes: Tensor, progress: float) -> float:
        """One step of the optimizer; returns the loss, averaged over the batch of this process."""
        config = self.config
        x = crops.to(self.device).to(memory_format=torch.channels_last)
        batch = x[: config.stage(progress)[1]]
        mean, std = config.log_sigma
        sigma = torch.exp(mean + std * torch.randn(len(batch), generator=self.rng)).to(self.device)
        noise = torch.randn(batch.shape, generator=self.rng).to(batch)
        told = self._conditions(x, classes, len(batch))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(progress)
        loss = self.objective(batch, sigma, noise, **told)
        value = loss.item()
        if not math.isfinite(value):
            raise NumericalError(f"loss is {value} at step {self.steps}: lower 'rate', or check the training data")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        self.crops += len(batch) * self.place.size
        decay = min(config.ema, (1 + self.steps) / (20 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        return value

    def _conditions(self, x: Tensor, classes: Tensor, batch: int) -> dict[str, Tensor]:
        """Classes, references and shown pixels of a batch, as :class:`Objective` takes them."""
        config, told = self.config, {}
        kind = classes[:batch]
        if config.classes:
            kind = kind * (torch.rand(batch, generator=self.rng) >= config.class_dropout)
            told["kind"] = kind.to(self.device)
        if config.reference:
            told["reference"] = x
            if config.classes:  # what is shown without its class may be of any
                told["allowed"] = ((kind[:, None] == 0) | (kind[:, None] == classes[None])).to(self.device)
        if config.measured is not None:
            told["given"] = shown(x[:batch], config.measured, self.rng).to(self.device)
        return told

    def _validate(self, log: Log) -> None:
        """Denoise the held-out subjects, in the first process, where that was not done at this step."""
        if not self.held_out or not self.place.first or (self.validation and self.validation[-1]["step"] == self.steps):
            return
        point = {"step": self.steps, "crops": self.crops, "elapsed_s": self.elapsed_s}
        self.validation.append(point | {"psnr_db": subject_psnr(self.ema, self.held_out)})
        if not self.saved:  # figures without a training would be taken for another's
            self.save()
        make_folder(self.out)
        write_json(self.out / VALIDATION, {"history": self.validation})
        for subject, found in self.validation[-1]["psnr_db"].items():
            values = ", ".join(f"{psnr:.2f} dB at {sigma}" for sigma, psnr in found.items())
            log(f"        validation, {subject}: {values}")

    def save(self) -> None:
        """Write the state and the EMA as a prior, from the first process; see ``training_state``.

        Raises:
            ResourceError: the disk is full, or the folder is gone and cannot be made or written to.
        """
        if not self.place.first:
            return
        make_folder(self.out)
        counters: dict[str, Any] = {"steps": self.steps, "crops": self.crops}
        counters |= {"elapsed_s": self.elapsed_s, "cpu_s": self.cpu_s}
        counters |= {"curve": self.curve, "validation": self.validation}
        counters |= {"begun": self.begun, "learnt": self.learnt}
        save_state(self.out, self.config, counters, self.net, self.ema, self.optimizer)
        self.saved = self.steps
        info: dict[str, Any] = {"sigma_min": SIGMA_RANGE[0], "sigma_max": SIGMA_RANGE[1]}
        info |= self.begun.get("info", {}) | {"name": self.out.name}
        info |= {"classes": list(self.config.classes)} if self.config.classes else {}
        done: dict[str, Any] = {"steps": self.steps, "crops": self.crops, "core_hours": round(self.cpu_s / 3600, 3)}
        done |= {"start": self.begun["start"], "start_sha256": self.begun["sha256"]} if self.begun else {}
        save_prior(self.ema, self.out, info, done, digests(counters))
