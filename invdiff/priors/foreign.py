"""Foreign checkpoints: what a file or folder is, as a card and weights, and its import as a folder of our own."""

import json
import logging
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError, PriorError, UsageError
from invdiff.files import atomic_write, save_tensors, show
from invdiff.priors import unet2d_files
from invdiff.priors.architectures import ARCHITECTURES, architecture
from invdiff.priors.build import build_prior, describe_convention
from invdiff.priors.checkpoint import Checkpoint, read_checkpoint
from invdiff.priors.flags import betas_of, numbers, read_flags
from invdiff.priors.network import NetworkPrior
from invdiff.priors.parametrization import Convention
from invdiff.priors.pickled import read_pickled
from invdiff.priors.unet2d import UNet2DConfig

log = logging.getLogger("invdiff")
FORMAT = "invdiff-prior"
SIDECARS = (".json", ".yaml", ".yml", ".py")
ATTENTION = ("qkv", "attn", "attention", "to_q", "NIN_")  # in names of weights
# Fields of a convention that are the name of no other option of a training.
PLAIN = (
    *("predicts", "process", "label", "label_scale", "label_offset", "beta_first", "beta_last"),
    *("network_range", "prior_range"),
)
SIZES = ("image_size", "sample_size", "img_resolution", "resolution")  # names of the side of images in options


@dataclass(frozen=True)
class ImportOptions:
    """What a user knows of a checkpoint that its file does not say.

    Args:
        config: files with the options of its training, or with fields of :class:`Convention`; none for a file of the
            same name beside the checkpoint, where there is one.
        architecture: name in ``ARCHITECTURES``; None to find out.
        part: where in the file the weights are; None for the usual names.
        allow: types besides tensors that may be in it, see ``checkpoint.ALLOWED``.
        trust_pickle: take the weights out of a file that holds more than tensors, in a process of its own, see
            ``pickled``; never done unasked.
        label: class of a network that is conditioned on classes.
        network_range: smallest and largest value of the images it was trained on.
        prior_range: what these are in the range of solvers, where -1 and 1 are -1000 and 1000 HU, or 0 and the 99.5th
            percentile.
        modality: what it was trained on, "CT", "MR" or "any".
        size: side in pixels of the images it was trained on; None for what ``config`` says, where it has attention.
        precision: name in ``build.PRECISIONS`` in which the network runs.
        check: refuse a network that does not denoise.
    """

    config: tuple[Path, ...] = ()
    architecture: str | None = None
    part: str | None = None
    allow: tuple[str, ...] = ()
    trust_pickle: bool = False
    label: int | None = None
    network_range: tuple[float, float] | None = None
    prior_range: tuple[float, float] | None = None
    modality: str = "any"
    size: int | None = None
    precision: str = "float32"
    check: bool = True


@dataclass(frozen=True)
class Foreign:
    """A foreign prior: its card (see ``build``) and its weights."""

    card: dict[str, Any]
    checkpoint: Checkpoint

    def load(self, device="cpu", chunk: int | None = None) -> NetworkPrior:
        """The prior; see :func:`build_prior`."""
        c = self.checkpoint
        return build_prior(self.card, c.tensors, show(c.path), c.sha256, device, chunk, c.ordered)


def open_foreign(path: str | Path, options: ImportOptions | None = None) -> Foreign:
    """Recognise a file or a folder, without building the network.

    Raises:
        PriorError: unreadable, unsafe, or of no known architecture.
    """
    path, options = Path(path), options or ImportOptions()
    try:
        return _open(path, options)
    except InvdiffError:
        raise
    except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:160]
        raise PriorError(f"{show(path)}: its configuration cannot be used ({why}); correct it") from None


def _open(path: Path, options: ImportOptions) -> Foreign:
    """See :func:`open_foreign`."""
    flags: dict[str, Any] = {}
    for file in options.config or sidecars(path):
        flags |= read_flags(file)
    if options.label is not None:
        flags["class"] = options.label
    try:
        betas = betas_of(flags)
    except PriorError as error:
        raise PriorError(f"{show(path)}: {error}") from None
    flags = {key: value for key, value in flags.items() if key != "betas"} | ({"betas": betas} if betas else {})
    if path.is_dir():
        name, network, convention, checkpoint = _from_folder(path, options, flags)
    else:
        name, network, convention, checkpoint = _from_file(path, options, flags)
    if double := [key for key, tensor in checkpoint.tensors.items() if tensor.dtype == torch.float64]:
        log.warning("%s: %d weights in float64, first %s, are used in float32", show(path), len(double), double[0])
    known = set(Convention.__dataclass_fields__) - set(convention)
    convention |= {key: flags[key] for key in (*PLAIN, *sorted(known)) if key in flags}
    convention |= _with_betas(convention, betas, path)
    ranges = {"network_range": options.network_range, "prior_range": options.prior_range}
    convention |= {key: value for key, value in ranges.items() if value is not None}
    try:
        whole = Convention.from_dict(convention)
    except PriorError as error:
        raise PriorError(f"{show(path)}: {error}") from None
    title = path.name if path.is_dir() else path.stem
    channels = architecture(name).configure(network).channels
    size = options.size or _size_of(_sizes(network) | flags | network.get("settings", {}), checkpoint)
    info = {"name": title, "channels": channels, "modality": options.modality, "size": size}
    card = {
        "architecture": name,
        "network": network,
        "convention": convention,
        "info": info | describe_convention(whole),
        "precision": options.precision,
        "check": options.check,
        "source": {"file": checkpoint.path.name, "part": checkpoint.part, "sha256": checkpoint.sha256},
    }
    if checkpoint.types:
        card["source"]["left_out"] = list(checkpoint.types)
    return Foreign(card, checkpoint)


def _with_betas(convention: dict[str, Any], betas, path: Path) -> dict[str, Any]:
    """Fields that betas of a configuration fix, whatever the weights' own file says."""
    if betas is None:
        return {}
    if (process := convention.get("process", "vp-table")) != "vp-table":
        raise PriorError(
            f"{show(path)}: the configuration gives betas, which a network of process '{process}' does not have: "
            "remove them, or say 'process: vp-table'"
        )
    return {"betas": betas} | ({"steps": len(betas)} if isinstance(betas, tuple) else {})


def _sizes(network: dict[str, Any]) -> dict[str, Any]:
    """The side that is part of the names of an EDM network's weights, as an option."""
    return {"img_resolution": network["size"]} if network.get("size") else {}


def _size_of(settings: dict[str, Any], checkpoint: Checkpoint) -> int | None:
    """Side of the images of the training as its options give it, for a network with attention; else None."""
    if not any(part in key for key in checkpoint.tensors for part in ATTENTION):
        return None
    size = next((settings[name] for name in SIZES if settings.get(name)), None)
    sides = numbers(size) if size is not None else []
    return int(max(sides)) if sides and 1 <= max(sides) <= 65536 else None


def sidecars(path: Path) -> tuple[Path, ...]:
    """The configuration of the same name beside a file, if there is one."""
    found = [path.with_suffix(suffix) for suffix in SIDECARS if path.is_file() and path.with_suffix(suffix).is_file()]
    return tuple(found[:1])


def _from_file(path: Path, options: ImportOptions, flags: dict[str, Any]):
    """Architecture, network, convention and weights of a checkpoint file; what a pickle tells joins ``flags``."""
    if path.name == "model.safetensors" and {"architecture", "convention", "info"} <= read_card(path.parent).keys():
        raise PriorError(
            f"{show(path)}: is the weights of an imported prior, which its config.json describes; name the folder"
        )
    if options.trust_pickle and path.suffix.lower() != ".safetensors":
        checkpoint, told = read_pickled(path, options.part)
        flags |= told | flags
    else:
        checkpoint = read_checkpoint(path, options.part, options.allow)
    chosen = "betas" in flags
    if "betas" in checkpoint.tables:
        flags = {key: tuple(table.tolist()) for key, table in checkpoint.tables.items()} | flags
    names = [options.architecture] if options.architecture else list(ARCHITECTURES)
    for name in names:
        module = import_module(architecture(name).files)
        try:
            config = module.network(checkpoint.shapes, flags)
            if config is not None:
                convention = module.convention(config, flags)
                convention = convention if chosen else _with_table(convention, checkpoint)
                return name, vars(config).copy(), convention, checkpoint
        except PriorError as error:
            raise PriorError(f"{show(path)}: {error}") from None
    first = ", ".join(sorted(checkpoint.tensors)[:5])
    raise PriorError(f"{show(path)}: weights such as {first} fit no known architecture ({', '.join(names)})")


def _with_table(convention: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The convention with the file's own betas, where it goes by a table of which only the name was known.

    The same name is not the same table everywhere: "linear" is linear in sqrt(beta) in latent diffusion.
    """
    betas, named = checkpoint.tables.get("betas"), isinstance(convention.get("betas", "linear"), str)
    if betas is None or not named or convention.get("process", "vp-table") != "vp-table":
        return convention
    return convention | {"betas": tuple(betas.tolist()), "steps": len(betas)}


def _from_folder(folder: Path, options: ImportOptions, flags: dict[str, Any]):
    """The same of a folder of diffusers."""
    if not unet2d_files.is_folder(folder):
        raise PriorError(f"{show(folder)}: is no folder of diffusers; 'invdiff priors show' describes our own")
    if unet2d_files.is_latent(folder):
        raise PriorError(
            f"{show(folder)}: is latent diffusion: give the folder to --prior as it is, with solver dps or reddiff"
        )
    weights, settings, scheduler = unet2d_files.read_folder(folder)
    checkpoint = read_checkpoint(weights, None, options.allow)
    try:
        config = UNet2DConfig(settings, options.label)
        convention = unet2d_files.convention(config, scheduler | flags)
    except PriorError as error:
        raise PriorError(f"{show(folder)}: {error}") from None
    return "unet2d", vars(config).copy(), convention, checkpoint


def import_prior(
    path: str | Path, folder: Path, options: ImportOptions | None = None, overwrite: bool = False
) -> Foreign:
    """Write the safe form of a foreign prior, ``model.safetensors`` and ``config.json``; it is loaded once to check it.

    Raises:
        PriorError: it cannot be loaded.
        UsageError: the folder holds a prior already and ``overwrite`` is false, or is a file.
        ResourceError: the disk is full, or the folder cannot be written to.
    """
    files = [folder / name for name in ("model.safetensors", "config.json")]
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{show(folder)}: is a file; name a folder")
    if not overwrite and any(file.exists() for file in files):
        raise UsageError(f"{show(folder)}: holds a prior already; name another folder or pass --overwrite")
    foreign = open_foreign(path, options)
    prior = foreign.load()
    tensors = {key: _own(tensor) for key, tensor in prior.net.net.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{show(folder)}: cannot be made ({error.strerror}); name another folder") from None
    with atomic_write(files[0], overwrite) as part:
        save_tensors(tensors, part, {"format": FORMAT})
    with atomic_write(files[1], overwrite) as part:
        part.write_text(json.dumps(foreign.card, indent=1))
    return foreign


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, in the usual order."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def load_imported(folder: Path, device="cpu", chunk: int | None = None) -> NetworkPrior:
    """A folder that :func:`import_prior` wrote.

    Raises:
        PriorError: a file is missing or damaged, or as for :func:`build_prior`.
    """
    card = read_card(folder)
    c = read_checkpoint(folder / "model.safetensors")
    return build_prior(card, c.tensors, show(c.path), c.sha256, device, chunk)


def read_card(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder, or an empty dictionary where it is none of a prior."""
    try:
        card = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}
