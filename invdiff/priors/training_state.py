"""Files of a training: the prior as it is loaded, and everything that a resume needs, each replaced as a whole."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from invdiff.errors import InputError, UsageError
from invdiff.files import atomic_write, read_text, save_tensors, show
from invdiff.priors.train_config import TrainConfig
from invdiff.priors.training_data import Source
from invdiff.priors.unet import EDMDenoiser, UNetConfig

STATE, TENSORS, VALIDATION = "state.json", "last.safetensors", "validation.json"
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)  # RecursionError is the last
_COUNTERS = ("steps", "crops", "elapsed_s", "cpu_s", "curve")
_LATER: dict[str, Any] = {"validation": [], "begun": {}, "learnt": []}  # what older trainings lack


def save_prior(
    net: EDMDenoiser, folder: Path, info: dict, training: dict | None = None, learnt: Collection[str] = ()
) -> None:
    """Write ``model.safetensors`` (fp16; the embedding's frequencies stay fp32) and ``config.json``, as loaded by
    :func:`invdiff.priors.load_prior`; ``info`` holds fields of :class:`invdiff.priors.base.PriorInfo`, ``training``
    what is worth knowing of its training, ``learnt`` digests of its sources."""
    state = {k: (v if k.endswith("frequencies") else v.half()).contiguous() for k, v in net.state_dict().items()}
    with atomic_write(folder / "model.safetensors", overwrite=True) as part:
        save_tensors(state, part, {"format": "invdiff-unet-edm"})
    config = {"network": net.config.as_dict(), "info": info} | ({"training": training} if training else {})
    write_json(folder / "config.json", config | ({"learnt": sorted(learnt)} if learnt else {}))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, atomically, over an older one."""
    with atomic_write(path, overwrite=True) as part:
        part.write_text(json.dumps(content, indent=1))


def save_state(
    folder: Path, config: TrainConfig, counters: dict[str, Any], net, ema, optimizer: torch.optim.Optimizer
) -> None:
    """Write ``last.safetensors``: weights, EMA, Adam moments, and in its metadata the counters that belong to them, so
    that a kill at any moment leaves one or the other whole. ``state.json`` has the counters to read."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v for k, v in moments.items()}
    tensors = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
    state = json.dumps(counters | {"config": asdict(config)})
    with atomic_write(folder / TENSORS, overwrite=True) as part:
        save_tensors(tensors, part, {"state": state})
    with atomic_write(folder / STATE, overwrite=True) as part:
        part.write_text(state)


def load_state(
    folder: Path, config: TrainConfig, net, ema, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any] | None:
    """Restore what :func:`save_state` wrote and return its counters; None for a folder without a training.

    Raises:
        InputError: the files are damaged, or of a training of another network.
    """
    if not (folder / TENSORS).exists():
        return None
    try:
        with safe_open(folder / TENSORS, "pt", device=str(device)) as archive:
            written = (archive.metadata() or {}).get("state")
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
        state = json.loads(written if written else (folder / STATE).read_text())  # in older trainings only there
        old: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state["config"]["network"].items()}
        same = UNetConfig(**old) == config.network
        if not same or tuple(state["config"].get("classes", ())) != config.classes:
            raise InputError(f"{show(folder)}: holds a training of another network; choose another folder with -o")
        net.load_state_dict(_part(tensors, "net."))
        ema.load_state_dict(_part(tensors, "ema."))
        saved = optimizer.state_dict()
        count = len(saved["param_groups"][0]["params"])
        saved["state"] = {i: moments for i in range(count) if (moments := _part(tensors, f"adam.{i}."))}
        optimizer.load_state_dict(saved)
        found = {name: state[name] for name in _COUNTERS} | {k: state.get(k) or v for k, v in _LATER.items()}
        _check_counters(found)
        _check_moments(optimizer, found["steps"])
        return found | {"config": state["config"]}
    except InputError:
        raise
    except (*UNREADABLE, SafetensorError) as error:
        why = " ".join(str(error).split())[:160]
        raise InputError(
            f"{show(folder / TENSORS)}: cannot be read as a training ({why}); choose another folder with -o"
        ) from None


def _check_counters(found: dict[str, Any]) -> None:
    """Raise ValueError for counters that no training has."""
    for name in ("steps", "crops", "elapsed_s", "cpu_s"):
        if isinstance(found[name], bool) or not isinstance(found[name], int | float) or not found[name] >= 0:
            raise ValueError(f"{name} is {str(found[name])[:20]}")
    for name, kind in (("curve", list), ("validation", list), ("learnt", list), ("begun", dict)):
        if not isinstance(found[name], kind):
            raise ValueError(f"{name} is {str(found[name])[:20]}")
    digests(found)


def _check_moments(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Raise ValueError where moments of a weight are missing, though steps were made, or of another shape."""
    for weight in (p for group in optimizer.param_groups for p in group["params"]) if steps else ():
        moments = optimizer.state.get(weight, {})
        if any(name not in moments or moments[name].shape != weight.shape for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError("moments of Adam are missing, or of another shape than the weights")


def digests(state: dict[str, Any]) -> set[str]:
    """Digests of the sources that a state or card tells of, its own and those of the prior that it started from.

    Raises:
        ValueError: they are none.
    """
    found = [digest for part in (state, state.get("begun") or {}) for digest in part.get("learnt") or []]
    if not all(isinstance(digest, str) for digest in found):
        raise ValueError("learnt is no list of digests")
    return set(found)


def learnt_by(folder: Path) -> set[str]:
    """Digests of the sources that a prior has learnt from, itself or by what it started from, as far as it says."""
    found: set[str] = set()
    for name in ("config.json", STATE):
        try:
            found |= digests(json.loads(read_text(folder / name)))
        except UNREADABLE:  # there is none, or those who load it say what is wrong
            continue
    return found


def check_apart(train: Sequence[Source], held_out: Sequence[Source]) -> None:
    """Refuse the same slices under two names, one to train on and one to validate on.

    Raises:
        InputError: there are such.
    """
    names = {source.digest: source.name for source in train}
    for source in held_out:
        if other := names.get(source.digest):
            raise InputError(
                f"{source.name}: is held out, but shows the same slices as {other}, which is to train on; remove one"
            )


def check_held_out(learnt: Collection[str], held_out: Sequence[Source], folder: Path) -> None:
    """Refuse to validate on what was learnt from.

    Args:
        learnt: digests of sources.
        held_out: sources to validate on.
        folder: of the training, for the message.

    Raises:
        InputError: one of them was learnt from.
    """
    for source in held_out:
        if source.digest in learnt:
            raise InputError(
                f"{source.name}: {show(folder)} has learnt from it, so that it cannot be held out; give the same data, "
                "--hold-out and splits as then, data that are new to it, or --hold-out 0 (in a manifest, a "
                "--validation-split that is none) to validate on nothing"
            )


def resumed(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Training options for a folder: a training in it that started from a prior needs that prior no more.

    Raises:
        UsageError: the options name another prior than it started from, or it started from none.
    """
    try:
        with safe_open(folder / TENSORS, "pt") as archive:
            state = json.loads((archive.metadata() or {}).get("state", "{}"))
        begun = (state.get("begun") or {}).get("start", "")
        saved = {name: state["config"][name] for name in ("network", "classes") if begun}
    except (*UNREADABLE, SafetensorError):  # there is none, or :func:`load_state` says what is wrong with it
        return options
    wanted = options.get("start", "")
    if wanted and wanted != begun:
        raise UsageError(
            f"{show(folder)}: holds a training that started from {begun or 'random weights'}, not from {wanted}; "
            "choose another folder with -o"
        )
    if not begun:
        return options
    rest, own = {k: v for k, v in options.items() if k != "start"}, options.get("network", {})
    return saved | rest | {"network": saved["network"] | own if isinstance(own, dict) else own}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
