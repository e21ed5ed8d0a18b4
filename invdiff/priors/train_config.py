"""Everything that decides a training, from JSON, and its schedule."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from invdiff.errors import PriorError, ResourceError, UsageError, choose, nearest
from invdiff.files import show
from invdiff.priors import prior_folder
from invdiff.priors.base import PriorInfo
from invdiff.priors.foreign import read_card
from invdiff.priors.masking import Measured
from invdiff.priors.network import load_network
from invdiff.priors.precision import PRECISIONS
from invdiff.priors.unet import EDMDenoiser, UNetConfig

_MOST = {"steps": 2**48, "seed": 2**62, "phantoms": 100_000, "reference": 65_536, "side": 4096, "batch": 65_536}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training; JSON-safe.

    Args:
        minutes: wall-clock minutes of the whole schedule (summed over resumes).
        steps: optimizer steps of the whole schedule, instead of minutes; 0 for minutes.
        stages: (fraction of the schedule at which the stage starts, crop side in pixels, batch of each process).
        rate: peak AdamW learning rate; 1 % of the schedule warm-up, constant to 40 %, cosine to zero.
        log_sigma: mean and standard deviation of ln sigma (EDM training distribution).
        ema: longest decay of the ramped exponential moving average of the weights.
        weights: share of each modality, and factors for single files by name.
        phantoms: number of random phantoms made for this training.
        seed: of weights, crops and noise.
        save_every_s: seconds between saved states.
        validate_every_s: seconds between validations, which are not counted in ``minutes``; 0 for none but the last.
        reference: crops in the reference batch of the stable target field; 0 for the plain EDM target.
        precision: of the convolutions: float32, bfloat16, or auto for bfloat16 where the processor has it.
        classes: modalities that the network is told apart as ("CT", "image", "phantom"); none for no labels.
        class_dropout: share of labelled crops that are shown without their label.
        measured: learn from images of which only some pixels were measured; None for whole images.
        network: its shape; ``classes`` and ``masked`` of it follow from the above.
        start: prior whose weights a new training starts from, a name or a folder of this format; "" for random ones.

    Raises:
        UsageError: values out of range.
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
    steps: int = 0
    validate_every_s: float = 600.0
    reference: int = 0
    precision: str = "float32"
    classes: tuple[str, ...] = ()
    class_dropout: float = 0.1
    measured: Measured | None = None
    start: str = ""

    def __post_init__(self):
        network = replace(self.network, classes=len(self.classes), masked=self.measured is not None)
        object.__setattr__(self, "network", network)
        choose(self.precision, PRECISIONS, "precision")
        wrong = _misfits(self)
        if wrong:
            raise UsageError(f"training options: {'; '.join(wrong)}")
        wrong = [
            *(f"{name} is {getattr(self, name)}" for name in ("minutes", "rate") if not getattr(self, name) > 0),
            *(
                f"{name} is {getattr(self, name)}"
                for name in ("steps", "phantoms", "reference", "validate_every_s")
                if getattr(self, name) < 0
            ),
            *(["class_dropout is outside [0, 1]"] if not 0 <= self.class_dropout <= 1 else []),
            *(["stages do not start at 0"] if not self.stages or self.stages[0][0] != 0 else []),
            *(f"crops of {n} do not fit the stride {network.stride}" for _, n, _ in self.stages if n % network.stride),
            *(["stages do not start one after another before 1"] if _unordered(self.stages) else []),
            *(["two classes of one name"] if len(set(self.classes)) < len(self.classes) else []),
            *(["reference and measured exclude each other"] if self.measured and self.reference else []),
        ]
        if wrong:
            raise UsageError(f"training options: {'; '.join(wrong)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Build from a JSON object; with ``start``, network and classes are those of that prior unless given.

        Raises:
            UsageError: unknown names, or values of another type or out of range.
            PriorError: the prior to start from cannot be read.
        """
        if unknown := set(values) - set(cls.__dataclass_fields__):
            known = ", ".join(cls.__dataclass_fields__) + nearest(sorted(unknown)[0], cls.__dataclass_fields__)
            raise UsageError(f"unknown training options {sorted(unknown)}: known are {known}")
        values = dict(values)
        begun = None
        if isinstance(values.get("start"), str) and values["start"]:
            begun = started(values["start"])
            own = values.get("network", {})
            values["network"] = begun.net.config.as_dict() | own if isinstance(own, dict) else own
            values = {"classes": begun.info.classes} | values
        try:
            if "network" in values:
                net: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["network"].items()}
                values["network"] = UNetConfig(**net)
            if values.get("measured") is not None:
                values["measured"] = Measured(**values["measured"])
            if "stages" in values:
                values["stages"] = tuple(tuple(s) for s in values["stages"])
            if isinstance(values.get("classes"), str):
                values["classes"] = (values["classes"],)
            for name in ("log_sigma", "classes"):
                if name in values:
                    values[name] = tuple(values[name])
            config = cls(**values)
        except UsageError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"training options cannot be used ({str(error)[:160]}); see TrainConfig") from None
        if begun is not None:
            check_start(config, begun)
        return config

    def stage(self, progress: float) -> tuple[int, int]:
        """Crop side and batch at ``progress`` in [0, 1]."""
        return [(side, batch) for start, side, batch in self.stages if progress >= start][-1]

    def learning_rate(self, progress: float) -> float:
        """The rate at ``progress`` in [0, 1]."""
        warm = min(1.0, progress / 0.01)
        return self.rate * warm * (1.0 if progress < 0.4 else 0.5 * (1 + math.cos(math.pi * (progress - 0.4) / 0.6)))


class Start(NamedTuple):
    """A prior that a training starts from."""

    net: EDMDenoiser
    info: PriorInfo


def started(start: str) -> Start:
    """The prior that a training starts from.

    Raises:
        PriorError: it cannot be read, or was not made by this training.
    """
    try:
        folder = prior_folder(start)
    except (PriorError, OSError):
        raise PriorError(
            f"start '{start[:80]}': no prior; name a folder that 'priors train' made, or embedded"
        ) from None
    if "architecture" in read_card(folder):
        raise PriorError(f"start: {show(folder)} is an imported prior; only one made by 'priors train' goes on")
    prior = load_network(folder)
    assert isinstance(prior.net, EDMDenoiser)
    return Start(prior.net, prior.info)


def check_start(config: TrainConfig, begun: Start) -> None:
    """Raise :class:`UsageError` where the prior to start from is another network than that of the training."""
    if begun.net.config.masked and config.measured is None:
        raise UsageError(f"training options: start is {config.start}, which fills in pixels: give 'measured' too")
    if begun.net.config != config.network or begun.info.classes != config.classes:
        raise UsageError(
            f"training options: start is {config.start}, a prior of another network or other classes; leave out "
            "'network', 'classes' and 'measured', or start from another one"
        )


def check_memory(config: TrainConfig) -> None:
    """Refuse a network whose weights, averages, gradients and moments do not fit, before anything is allocated.

    Raises:
        ResourceError: see above.
    """
    with torch.device("meta"):
        count = sum(p.numel() for p in EDMDenoiser(config.network).parameters())
    needed, there = 5 * 4 * count, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ResourceError(
            f"training {count / 1e6:.0f} million weights takes {needed / 1e9:.0f} GB, this machine has "
            f"{there / 1e9:.0f} GB: give network.channels smaller numbers"
        )


def _misfits(config: TrainConfig) -> list[str]:
    """Options that are no numbers, or none of their kind."""
    whole = {name: getattr(config, name) for name in ("steps", "phantoms", "seed", "reference")}
    found = [
        f"{name} is {value}, no whole number from 0 to {_MOST[name]}"
        for name, value in whole.items()
        if not _is_whole(value, 0, _MOST[name])
    ]
    real = [(name, getattr(config, name)) for name in ("minutes", "rate", "save_every_s", "validate_every_s", "ema")]
    if isinstance(config.weights, dict):
        real += [(f"weights.{name}", share) for name, share in config.weights.items()]
    else:
        found.append("weights are no names and shares")
    found += [f"{name} is {value}, no number from 0" for name, value in real if not _is_real(value) or value < 0]
    found += ["start is no name of a prior"] if not isinstance(config.start, str) else []
    found += ["ema is 1 or more"] if _is_real(config.ema) and config.ema >= 1 else []
    mean_std = config.log_sigma
    if len(mean_std) != 2 or not all(map(_is_real, mean_std)) or mean_std[1] < 0:
        found.append(f"log_sigma is {mean_std}, no mean and standard deviation")
    for start, side, batch in config.stages:
        if not (_is_real(start) and _is_whole(side, 1, _MOST["side"]) and _is_whole(batch, 1, _MOST["batch"])):
            found.append(f"stage {start}, {side}, {batch} is no share, pixels (to {_MOST['side']}) and batch")
    if not all(isinstance(name, str) for name in config.classes):
        found.append(f"classes are {config.classes}, no names")
    return found


def _unordered(stages: tuple[tuple[float, int, int], ...]) -> bool:
    """Whether a stage would never be reached, or hide the one before it."""
    starts = [start for start, _, _ in stages]
    return any(not 0 <= start < 1 for start in starts) or starts != sorted(set(starts))


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def with_settings(options: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """``options`` with ``NAME=VALUE`` and ``NAME.PART=VALUE`` on top; values are JSON, ``A,B`` a list, else text.

    Raises:
        UsageError: no such form.
    """
    options = {k: dict(v) if isinstance(v, dict) else v for k, v in options.items()}
    for text in settings:
        key, equals, value = text.partition("=")
        name, dot, part = key.partition(".")
        if not equals or not name or (dot and not part):
            raise UsageError(f"--set '{text}': write NAME=VALUE or NAME.PART=VALUE, e.g. measured.keep=0.6")
        if not dot:
            options[name] = _value(value)
            continue
        inner = options.setdefault(name, TrainConfig().weights if name == "weights" else {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set '{text}': {name} has no parts")
        inner[part] = _value(value)
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return [_value(part) for part in text.split(",")] if "," in text else text
