"""Checkpoints: how far a run has come, in one file that is replaced as a whole and holds no code."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from invdiff.errors import InputError, UsageError
from invdiff.files import atomic_write, save_tensors, show
from invdiff.fingerprint import differences
from invdiff.position import Done, Position, Samples
from invdiff.solvers.base import State

FORMAT, VERSION = "invdiff-checkpoint", "1"
ANEW = "remove it, or pass --overwrite without --resume to start anew"


def save(path: Path, position: Position, fingerprint: dict[str, Any]) -> None:
    """Write ``position`` of the run that ``fingerprint`` names: for the owner only, atomically, over an older one.

    Raises:
        ResourceError: the disk is full or the folder cannot be written to; an older checkpoint stays.
    """
    tensors: dict[str, Tensor] = {}
    layout: dict[str, dict[str, Any]] = {}
    seen: dict[tuple, str] = {}
    for name, array in position.arrays():
        t = torch.from_numpy(array) if isinstance(array, np.ndarray) else array.detach()
        same = seen.setdefault((t.data_ptr() or name, t.shape, t.stride(), t.dtype), name)
        layout[name] = {"same": same, "device": t.device.type}
        if same == name:
            tensors[name], layout[name]["order"] = _dense(t, {v.untyped_storage().data_ptr() for v in tensors.values()})
            layout[name]["complex"] = t.is_complex()
    content = {"fingerprint": fingerprint, "position": position.numbers(), "layout": layout}
    metadata = {"format": FORMAT, "version": VERSION, "run": json.dumps(content)}
    with atomic_write(path, overwrite=True, mode=0o600) as part:
        save_tensors(tensors, part, metadata)
        part.chmod(0o600)


def _dense(t: Tensor, taken: set[int]) -> tuple[Tensor, list[int]]:
    """``t`` as it lies in memory, in storage of its own, and the order of its axes there."""
    order = sorted(range(t.ndim), key=lambda axis: -t.stride()[axis])
    if not t.permute(order).is_contiguous():
        order = list(range(t.ndim))
    t = t.permute(order).contiguous().cpu()
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.clone() if t.untyped_storage().data_ptr() in taken else t, order


def load(
    path: Path,
    fingerprint: dict[str, Any],
    image_shape: tuple[int, ...],
    device: torch.device,
    state_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Position:
    """The position saved in ``path``, its tensors where they were.

    Args:
        path: the checkpoint.
        fingerprint: of the run that is to go on.
        image_shape: ``(S, C, H, W)`` of that run.
        device: of its problem; what lay on the CPU returns there.
        state_shapes: of the states of a solver, by its name, where that is not ``image_shape`` (latents).

    Raises:
        InputError: the file is damaged, or no checkpoint of this version of the format.
        UsageError: it belongs to another run; names the first differences.
    """
    try:
        with safe_open(path, "pt") as archive:
            metadata = archive.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"not in the format {FORMAT} {VERSION}")
            content = json.loads(metadata["run"])
            if found := differences(content["fingerprint"], fingerprint):
                raise UsageError(
                    f"{show(path)}: belongs to another run ({found}); give its options and files, or {ANEW}"
                )
            layout = content["layout"]
            arrays: dict[str, Tensor] = {}
            for name, entry in layout.items():  # a tensor with two names stays one
                own = entry["same"] == name
                arrays[name] = _restored(archive.get_tensor(name), entry, device) if own else arrays[entry["same"]]
        return _position(content["position"], arrays, image_shape, state_shapes)
    except UsageError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:120]
        raise InputError(f"{show(path)}: cannot be read as a checkpoint ({why}); {ANEW}") from None


def _restored(stored: Tensor, entry: dict[str, Any], device: torch.device) -> Tensor:
    """A tensor in memory of its own, with the axes in the old order."""
    stored = torch.view_as_complex(stored) if entry["complex"] else stored
    t = torch.empty_like(stored).copy_(stored)  # not where it lies in the file, which is aligned to 8 bytes only
    t = t if entry["device"] == "cpu" else t.to(device)
    order = entry["order"]
    if sorted(order) != list(range(t.ndim)):
        raise ValueError(f"an order of {len(order)} axes for {t.ndim}")
    return t.permute([order.index(axis) for axis in range(t.ndim)])


def _check_numbers(numbers: dict[str, Any]) -> None:
    """Raise ValueError where a number, text or list is none that :meth:`Position.numbers` gives."""

    def whole(key: str, least: int, absent: bool = False) -> bool:
        value = numbers[key]
        return (absent and value is None) or (type(value) is int and least <= value < 2**53)

    found = {key: whole(key, 0) for key in ("samples", "calls")} | {"block": whole("block", 1)}
    found |= {key: whole(key, 1, absent=True) for key in ("step", "chunk")}
    found["seconds"] = isinstance(numbers["seconds"], int | float) and 0 <= numbers["seconds"] < math.inf
    found["solver"] = isinstance(numbers["solver"], str)
    found["notes"] = isinstance(numbers["notes"], list) and all(isinstance(note, str) for note in numbers["notes"])
    used = numbers["finished"]
    found["finished"] = isinstance(used, dict) and all(isinstance(value, dict) for value in used.values())
    if wrong := [key for key, right in found.items() if not right]:
        raise ValueError(f"{wrong[0]} is {str(numbers[wrong[0]])[:40]}")


def _position(
    numbers: dict[str, Any],
    arrays: dict[str, Tensor],
    shape: tuple[int, ...],
    state_shapes: Mapping[str, tuple[int, ...]],
) -> Position:
    """The position of what was read, its numbers, shapes and values checked."""
    _check_numbers(numbers)
    picture, inner = (shape[0], *shape[2:]), state_shapes.get(numbers["solver"], shape)
    expected = {"x": (1, *inner), "x0": (1, *inner)}
    if numbers["samples"]:
        expected |= {"mean": shape}
    expected |= {name: picture for name in arrays if name.startswith(("finished.", "spread."))}
    for name, size in expected.items():
        if name in arrays and tuple(arrays[name].shape) != size:
            raise ValueError(f"{name} is {tuple(arrays[name].shape)}, expected {size}")
    for name, array in arrays.items():  # a lone number, such as a gap, may be infinite
        if array.ndim > 1 and not bool(torch.isfinite(array).all()):
            raise ValueError(f"{name} is not finite")
    finished = {}
    for name, used in numbers["finished"].items():
        spread = arrays.get(f"spread.{name}")
        finished[name] = Done(arrays[f"finished.{name}"].numpy(), None if spread is None else spread.numpy(), used)
    samples = Samples(int(numbers["samples"]), arrays["mean"], arrays["shown"].numpy(), arrays["scatter"].numpy())
    state = None
    if numbers["step"] is not None:
        memory = {k.removeprefix("memory."): v for k, v in arrays.items() if k.startswith("memory.")}
        state = State(arrays["x"], arrays["x0"], int(numbers["step"]), memory)
    rest = {k: numbers[k] for k in ("solver", "seconds", "calls", "chunk", "block")}
    return Position(finished, samples=samples, state=state, notes=tuple(numbers["notes"]), **rest)
