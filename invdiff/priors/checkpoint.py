"""Tensors from a checkpoint file, safely: nothing in it is executed, inflated or guessed.

``.safetensors``, and what ``torch.save`` wrote (``.pt``, ``.pth``, ``.ckpt``, ``.bin``), read with ``weights_only``.
"""

import argparse
import math
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from invdiff.errors import PriorError, choose
from invdiff.files import AGAIN, sha256_file, show

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
# Where trainers keep weights, averaged ones first.
NESTED = (
    *("ema", "ema_state_dict", "params_ema", "model_ema", "ema_model", "model_ema_state_dict", "ema_net", "net_ema"),
    *("unet_ema", "state_dict", "model_state", "model_state_dict", "unet_state_dict", "net_state_dict"),
    *("model", "net", "unet", "params", "network", "denoiser", "denoise_fn"),
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "unet.", "diffusion_model.", "denoise_fn.", "ema_model.")
# Tables of noise levels at the top of a file: of score_sde, and of EDM's iDDPMPrecond.
NO_WEIGHTS = ("sigmas", "u")
# Tables of the noise process that trainers keep beside the network (LDM, denoising-diffusion-pytorch, deepinv).
TABLES = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("loss_weight", "p2_loss_weight", "logvar", "lvlb_weights", "sqrt_1m_alphas_cumprod"),
)
# Names of attention in diffusers before 0.12, and since.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# Where the network is, averaged weights first, when other parts of a training lie beside it.
SUBSETS = (
    *("model.diffusion_model.", "ema_model.", "net_ema.", "unet_ema.", "ema.", "denoise_fn.", "diffusion_model."),
    *("unet.", "net.", "model."),
)
# Types that hold data only, allowed by name and never by default.
ALLOWED = {
    "argparse.Namespace": lambda: [argparse.Namespace],
    "pathlib.Path": lambda: [type(pathlib.Path()), pathlib.PurePosixPath, pathlib.PureWindowsPath],
    "numpy.scalar": lambda: [
        type(np.float64(0)).__reduce__(np.float64(0))[0],  # what numpy scalars are rebuilt by
        *(np.dtype, *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?"))),
    ],
}


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file.

    Attributes:
        path: the file.
        tensors: by name, without the prefixes of wrappers.
        part: where in the file they were, e.g. ``"ema"``; empty for the whole.
        ordered: averaged parameters without names, in the order of the network's parameters, or None (score_sde).
        sha256: of the file.
        types: names of what else was in the file, where it was left out on the user's word (see ``pickled``).
        tables: what it holds of the noise process, by name, see ``TABLES``.
    """

    path: Path
    tensors: dict[str, Tensor]
    part: str
    sha256: str
    ordered: tuple[Tensor, ...] | None = field(default=None)
    types: tuple[str, ...] = ()
    tables: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def read_checkpoint(path: str | Path, part: str | None = None, allow: Iterable[str] = ()) -> Checkpoint:
    """The weights of a file, averaged ones where there are both.

    Args:
        path: see ``SUFFIXES``.
        part: name inside the file, e.g. ``model``; None for the first of ``NESTED``.
        allow: names in ``ALLOWED``.

    Raises:
        PriorError: no such file, damaged, compressed, with code or objects in it, or without weights.
        UsageError: an unknown name in ``allow``.
    """
    path = Path(path)
    if not path.is_file():
        raise PriorError(f"{show(path)}: no such file; check the path")
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise PriorError(
            f"{show(path)}: is a pickle, which can run code when it is read, and is not read: where you trust its "
            "source, 'invdiff priors import' with --trust-pickle takes the weights out in a process of its own"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise PriorError(f"{show(path)}: is no checkpoint by its name; end it in {', '.join(SUFFIXES)}")
    content = _safetensors(path) if path.suffix.lower() == ".safetensors" else _torch(path, allow)
    if not isinstance(content, Mapping):
        raise PriorError(f"{show(path)}: holds a {type(content).__name__}, no dictionary of weights; save state_dict()")
    tensors, name, ordered = _weights(content, part, show(path))
    size = path.stat().st_size
    for key, tensor in tensors.items():
        check_tensor(tensor, size, f"{show(path)}: {key[:80]}")
    tensors, tables = _plain(tensors, show(path))
    return Checkpoint(path, tensors, name, sha256_file(path), ordered, tables=tables)


def check_tensor(tensor: Tensor, most_bytes: int, name: str) -> None:
    """Refuse a tensor that claims more numbers than its file holds, or is no plain array.

    Raises:
        PriorError: see above.
    """
    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    if not plain or math.prod(tensor.shape) * tensor.element_size() > most_bytes:
        raise PriorError(f"{name}: {tuple(tensor.shape)} is no plain array, or more than the file holds; do not use it")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as archive:
            return {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PriorError(f"{show(path)}: is damaged ({str(error)[:120]}); {AGAIN}") from None


def _torch(path: Path, allow: Iterable[str]) -> Any:
    names = [choose(name, ALLOWED, "type to allow") for name in allow]
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(torch.serialization.safe_globals([t for types in names for t in types()]))
            return torch.load(path, map_location="cpu", weights_only=True)
    except PriorError:
        raise
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from None
    except MemoryError:
        raise PriorError(f"{show(path)}: claims more than fits into memory; do not use it") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise PriorError(f"{show(path)}: cannot be read ({why}); {AGAIN}") from None


def _check_archive(path: Path) -> None:
    """A file of ``torch.save`` is an archive without compression: what it holds is no larger than itself."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    inflated = sum(entry.file_size for entry in entries)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or inflated > size:
        raise PriorError(
            f"{show(path)}: {size} bytes would inflate to {inflated}, which torch.save never writes; get it from its "
            "source again"
        )


def _refusal(path: Path, text: str) -> PriorError:
    """One line that names what a pickle wanted to build."""
    found = re.search(r"GLOBAL\s+`?([A-Za-z_][\w.]*)", text)
    what = found[1] if found else ""
    if not what:
        return PriorError(f"{show(path)}: is damaged, or holds more than tensors, which is never run or built; {AGAIN}")
    short = [name for name in ALLOWED if what.split(".")[0] == name.split(".")[0]]
    remedy = f"--allow {short[0]}, or " if short else ""
    return PriorError(
        f"{show(path)}: holds more than tensors ({what[:80]}), which is never run or built; {remedy}where you trust "
        "its source, 'invdiff priors import' with --trust-pickle, or save its state_dict() alone"
    )


def _weights(content: Mapping, part: str | None, name: str) -> tuple[dict[str, Tensor], str, tuple[Tensor, ...] | None]:
    """The dictionary of tensors, where it was, and a list of averaged parameters."""
    if part is None and _is_state(content):
        return _tensors(content), "", None
    for key in (part,) if part is not None else NESTED:
        inner = content.get(key)
        if not isinstance(inner, Mapping):
            continue
        if isinstance(shadow := inner.get("shadow_params"), list | tuple) and shadow:
            model = content.get("model")
            if isinstance(model, Mapping) and _is_state(model) and all(isinstance(t, Tensor) for t in shadow):
                return _tensors(model), f"{key}.shadow_params", tuple(shadow)
            continue
        if _is_state(inner):
            return _tensors(inner), str(key), None
        for deeper in NESTED:
            if isinstance(inner.get(deeper), Mapping) and _is_state(inner[deeper]):
                return _tensors(inner[deeper]), f"{key}.{deeper}", None
    held = ", ".join(str(key)[:30] for key in list(content)[:8])
    raise PriorError(
        f"{name}: no weights under {part or 'any usual name'} of {held or 'nothing'}: choose one with --part"
    )


def _is_state(content: Mapping) -> bool:
    """Tensors by name, and at most some counters of a trainer among them."""
    plain = all(isinstance(k, str) and isinstance(v, Tensor | int | float | None) for k, v in content.items())
    return plain and any(isinstance(v, Tensor) and v.ndim for v in content.values())


def _tensors(content: Mapping) -> dict[str, Tensor]:
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}


def _plain(tensors: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Without the prefixes of wrappers and without what lies beside the network; and the tables of its noise.

    Raises:
        PriorError: a latent-diffusion model, whose network is no prior of images.
    """
    while prefix := next((p for p in PREFIXES[:2] if all(k.startswith(p) for k in tensors)), ""):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    tensors = {k: v for k, v in tensors.items() if k not in NO_WEIGHTS}
    if any(k.startswith(("first_stage_model.", "cond_stage_model.")) for k in tensors):
        raise PriorError(
            f"{name}: is a latent-diffusion model, whose network sees no images; use a pixel-space one, or save "
            "autoencoder and network as folders vae and unet of diffusers"
        )
    averaged = {k: "model_ema." + k.removeprefix("model.").replace(".", "") for k in tensors if k.startswith("model.")}
    if averaged and all(a in tensors for a in averaged.values()):
        tensors = {k: tensors[a] for k, a in averaged.items()}
    tables = [k for k in tensors if k.rpartition(".")[2] in TABLES]
    found = {k.rpartition(".")[2]: tensors[k] for k in tables}
    if "betas" in found and (found["betas"].ndim != 1 or not found["betas"].is_floating_point()):
        raise PriorError(f"{name}: its betas are no list of numbers; get it from its source again")
    tensors = {k: v for k, v in tensors.items() if k not in tables}
    if subset := next((s for s in SUBSETS if any(k.startswith(s) for k in tensors)), ""):
        tensors = {k.removeprefix(subset): v for k, v in tensors.items() if k.startswith(subset)}
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), ""):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return {_renamed(k): v for k, v in tensors.items()}, found


def _renamed(key: str) -> str:
    for old, new in RENAMED.items() if ".attentions." in key else ():
        key = key.replace(old, new)
    return key
