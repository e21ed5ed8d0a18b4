"""The corpus for what is no volume and no measurement: priors, checkpoints of runs, kernels, masks, trajectories."""

import json
import pickle
import struct
import zipfile

import numpy as np
import torch
from corpus import REFUSE, Reader
from corpus_volumes import NAN, NIFTI, NIFTI_GZ, NPY, PNG, Canary
from foreign_networks import OPTIONS, SMALL, normaliser
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from invdiff import checkpoint
from invdiff.operators.kernels import load_kernel
from invdiff.operators.mask import inpaint
from invdiff.operators.trajectories import read_trajectory
from invdiff.position import Done, Position, Samples
from invdiff.priors import load_prior
from invdiff.priors.unet import EDMDenoiser, UNetConfig
from invdiff.solvers.base import State

# safetensors ----------------------------------------------------------------------------------------------------


def rewritten(name, change):
    """The JSON header of a safetensors file, changed; the tensors stay."""

    def edit(folder):
        data = (folder / name).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = change(json.loads(data[8 : 8 + length]))
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])

    return edit


def tensors(name, change):
    """The tensors of a safetensors file, changed; its notes stay."""

    def edit(folder):
        with safe_open(folder / name, "pt") as archive:
            notes = archive.metadata()
        save_file(change(load_file(folder / name)), folder / name, notes)

    return edit


def first(header, **change):
    key = next(k for k in header if k != "__metadata__")
    return header | {key: header[key] | change}


def scaled(factor):
    return lambda found: {k: v * factor if v.is_floating_point() else v for k, v in found.items()}


def archives(name):
    return {
        "header of 2^60 bytes": (lambda f: (f / name).write_bytes(struct.pack("<Q", 2**60) + b"{}") and None, REFUSE),
        "header nested": (rewritten(name, lambda h: b"[" * 10**5), REFUSE),
        "a tensor of terabytes": (rewritten(name, lambda h: first(h, shape=[10**6, 10**6])), REFUSE),
        "a shape that overflows": (rewritten(name, lambda h: first(h, shape=[2**62, 2**62])), REFUSE),
        "a negative shape": (rewritten(name, lambda h: first(h, shape=[-1])), REFUSE),
        "offsets behind the end": (rewritten(name, lambda h: first(h, data_offsets=[0, 10**9])), REFUSE),
        "offsets backwards": (rewritten(name, lambda h: first(h, data_offsets=[8, 0])), REFUSE),
        "an unknown type": (rewritten(name, lambda h: first(h, dtype="X99")), REFUSE),
        "another type": (rewritten(name, lambda h: first(h, dtype="I32")), REFUSE),
        "no notes": (rewritten(name, lambda h: {k: v for k, v in h.items() if k != "__metadata__"}), REFUSE),
        "NaN": (tensors(name, scaled(NAN)), REFUSE),
        "infinity": (tensors(name, scaled(float("inf"))), REFUSE),
        "a tensor less": (tensors(name, lambda t: dict(list(t.items())[1:])), REFUSE),
        "double the size": (
            tensors(name, lambda t: {k: torch.cat([v, v]) if v.ndim else v for k, v in t.items()}),
            REFUSE,
        ),
    }


# Our priors ------------------------------------------------------------------------------------------------------

CONFIG = UNetConfig(channels=(8, 8), blocks=(1, 1), patch=2, embedding=16)
INFO = {"name": "tiny", "sigma_min": 0.005, "sigma_max": 20.0, "voxel_mm": [0.7, 10.0]}
X = torch.linspace(-1, 1, 64).reshape(1, 1, 1, 8, 8)


def make_prior(folder):
    torch.manual_seed(0)
    (folder / "prior").mkdir()
    save_file(EDMDenoiser(CONFIG).state_dict(), folder / "prior" / "model.safetensors", {"format": "invdiff-unet-edm"})
    (folder / "prior" / "config.json").write_text(json.dumps({"network": CONFIG.as_dict(), "info": INFO}))


def denoised(prior):
    return (prior.denoise(X, 0.5).detach().numpy(),)


def card(change):
    """``config.json`` with parts changed, or replaced by text."""

    def edit(folder):
        path = folder / "prior" / "config.json"
        found = change(json.loads(path.read_text())) if callable(change) else change
        path.write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())

    return edit


def network(**change):
    return card(lambda c: c | {"network": c["network"] | change})


def info(**change):
    return card(lambda c: c | {"info": c["info"] | change})


CARDS = {
    "no card": (lambda f: (f / "prior" / "config.json").unlink(), REFUSE),
    "card empty": (card(b""), REFUSE),
    "card nested": (card(b"[" * 10**5), REFUSE),
    "card not UTF-8": (card(b'{"network": "\xff"}'), REFUSE),
    "card a list": (card(b"[]"), REFUSE),
    "card of unknown options": (network(danger=1), REFUSE),
    "a billion blocks": (network(blocks=[10**9, 1]), REFUSE),
    "a billion channels": (network(channels=[10**9, 8]), REFUSE),
    "a thousand levels": (network(channels=[8] * 1000, blocks=[1] * 1000), REFUSE),
    "channels of words": (network(channels=["a", "b"]), REFUSE),
    "channels infinite": (card(b'{"network": {"channels": [Infinity, 8]}, "info": {"name": "x"}}'), REFUSE),
    "patch 0": (network(patch=0), REFUSE),
    "patch 10^9": (network(patch=10**9), REFUSE),
    "patch 2.5": (network(patch=2.5), REFUSE),
    "embedding -1": (network(embedding=-1), REFUSE),
    "embedding 10^12": (network(embedding=10**12), REFUSE),
    "sigma_data NaN": (network(sigma_data=NAN), REFUSE),
    "sigma_min 0": (info(sigma_min=0), REFUSE),
    "sigma_max 1e999": (card(lambda c: json.dumps(c).replace("20.0", "1e999").encode()), REFUSE),
    "voxel_mm of one": (info(voxel_mm=[1]), REFUSE),
    "3 channels": (info(channels=3), REFUSE),
}

# Foreign priors ---------------------------------------------------------------------------------------------------


def make_foreign(folder):
    torch.save(normaliser(SMALL), folder / "a.pt")
    (folder / "a.json").write_text(json.dumps(OPTIONS))


def torch_saved(content, **options):
    return lambda folder: torch.save(content() if callable(content) else content, folder / "a.pt", **options)


def deflated(folder):
    """An archive as ``torch.save`` writes it, but packed."""
    with zipfile.ZipFile(folder / "a.pt") as old:
        parts = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    with zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in parts:
            new.writestr(name, data)


def options(content):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / "a.json").write_bytes(data) and None


def yaml(text):
    def edit(folder):
        (folder / "a.json").unlink()
        (folder / "a.yaml").write_text(text)

    return edit


FOREIGN = {
    "code": (torch_saved({"a.weight": Canary()}), REFUSE),
    "code, old format": (torch_saved({"a.weight": Canary()}, _use_new_zipfile_serialization=False), REFUSE),
    "a bare pickle of code": (lambda f: (f / "a.pt").write_bytes(pickle.dumps(Canary())) and None, REFUSE),
    "a packed archive": (deflated, REFUSE),
    "a list": (torch_saved([1, 2]), REFUSE),
    "nothing": (torch_saved({}), REFUSE),
    "expanded": (torch_saved({"a.weight": torch.zeros(1).expand(10**9)}), REFUSE),
    "sparse": (torch_saved({"a.weight": torch.sparse_coo_tensor(size=(10**6, 10**6))}), REFUSE),
    "NaN": (torch_saved(lambda: {k: v * NAN for k, v in normaliser(SMALL).items()}), REFUSE),
    "whole numbers": (torch_saved(lambda: {k: v.long() for k, v in normaliser(SMALL).items()}), REFUSE),
    "a weight less": (torch_saved(lambda: dict(list(normaliser(SMALL).items())[1:])), REFUSE),
    "options nested": (options(b'{"a":' * 10**5), REFUSE),
    "options of 2 MB": (options(b" " * 2 * 10**6), REFUSE),
    "options of objects": (yaml("a: !!python/object:os.system x"), REFUSE),
    "options of aliases": (yaml("a: &a [1]\nb: *a"), REFUSE),
    "an absurd width": (options(OPTIONS | {"num_channels": 10**9}), REFUSE),
    "an absurd depth": (options(OPTIONS | {"num_res_blocks": 10**9}), REFUSE),
    "an absurd number of steps": (options(OPTIONS | {"diffusion_steps": 10**12}), REFUSE),
    "steps NaN": (options(json.dumps(OPTIONS | {"diffusion_steps": NAN}).encode()), REFUSE),
}

# Checkpoints of runs ------------------------------------------------------------------------------------------------

OWN = {"seed": 1}
RUN = (2, 1, 4, 5)


def make_checkpoint(folder):
    x = torch.linspace(0, 1, 40).reshape(1, *RUN)
    done = Done(np.ones((2, 4, 5), np.float32), None, {"steps": 3})
    samples = Samples(1, x[0].clone(), np.ones((2, 4, 5)), np.ones((2, 4, 5)))
    position = Position({"tv": done}, "dds", samples, State(x, x + 1, 5, {"dual": x - 1}), 1.5, 9, 2, 16, ("a note",))
    checkpoint.save(folder / "r.checkpoint.safetensors", position, OWN)


def resumed(folder):
    return checkpoint.load(folder / "r.checkpoint.safetensors", OWN, RUN, torch.device("cpu"))


def position_arrays(position):
    return tuple(np.asarray(value) for _, value in position.arrays())


def said(**change):
    """The numbers of a checkpoint, changed; a callable gets the old part."""

    def notes(header):
        run = json.loads(header["__metadata__"]["run"])
        for key, value in change.items():
            run[key] = value(run[key]) if callable(value) else value
        return header | {"__metadata__": header["__metadata__"] | {"run": json.dumps(run)}}

    return rewritten("r.checkpoint.safetensors", notes)


def at_position(**change):
    return said(position=lambda old: old | change)


SAVED = {
    "step -1": (at_position(step=-1), REFUSE),
    "step infinite": (at_position(step=float("inf")), REFUSE),
    "step a word": (at_position(step="many"), REFUSE),
    "samples infinite": (at_position(samples=float("inf")), REFUSE),
    "samples -1": (at_position(samples=-1), REFUSE),
    "samples NaN": (at_position(samples=NAN), REFUSE),
    "chunk 0": (at_position(chunk=0), REFUSE),
    "chunk a word": (at_position(chunk="x"), REFUSE),
    "block 0": (at_position(block=0), REFUSE),
    "block null": (at_position(block=None), REFUSE),
    "seconds a word": (at_position(seconds="x"), REFUSE),
    "calls a list": (at_position(calls=[1]), REFUSE),
    "solver a list": (at_position(solver=["x"]), REFUSE),
    "notes a number": (at_position(notes=3), REFUSE),
    "notes of lists": (at_position(notes=[[1]]), REFUSE),
    "finished a list": (at_position(finished=[1]), REFUSE),
    "finished of numbers": (at_position(finished={"tv": 3}), REFUSE),
    "finished of others": (at_position(finished={"../../x": {}}), REFUSE),
    "another run": (said(fingerprint={"seed": 2}), REFUSE),
    "layout empty": (said(layout={}), REFUSE),
    "layout of words": (said(layout="x"), REFUSE),
    "order twice": (said(layout=lambda old: old | {"x": old["x"] | {"order": [0, 0, 1, 2, 3]}}), REFUSE),
    "order too long": (said(layout=lambda old: old | {"x": old["x"] | {"order": list(range(10**5))}}), REFUSE),
    "a name of itself": (said(layout=lambda old: old | {"x": old["x"] | {"same": "none"}}), REFUSE),
    "numbers nested": (
        rewritten("r.checkpoint.safetensors", lambda h: h | {"__metadata__": h["__metadata__"] | {"run": "[" * 10**5}}),
        REFUSE,
    ),
}

# Kernels, masks, trajectories -------------------------------------------------------------------------------------

KERNEL = np.outer([1, 2, 3, 2, 1], [1, 3, 1.0])


def kernel_in(name):
    def make(folder):
        import nibabel as nib
        from PIL import Image

        if name.endswith(".npy"):
            np.save(folder / name, KERNEL)
        elif name.endswith(".png"):
            Image.fromarray(KERNEL.astype(np.uint8)).save(folder / name)
        else:
            nib.save(nib.Nifti1Image(KERNEL.astype(np.float32)[..., None], np.eye(4)), folder / name)

    return make


def array_in(name, values):
    return lambda folder: np.save(folder / name, values)


KERNELS = {name: case for name, case in NPY.items() if name not in ("5 axes",)} | {
    "even": (array_in("a.npy", np.ones((4, 3))), REFUSE),
    "zero": (array_in("a.npy", np.zeros((3, 3))), REFUSE),
    "negative": (array_in("a.npy", -np.ones((3, 3))), REFUSE),
    "infinite": (array_in("a.npy", np.full((3, 3), np.inf)), REFUSE),
}
NO_VOLUME = {"affine NaN", "affine 0", "affine huge", "two equal columns", "codes"}  # a kernel lies nowhere
KERNELS_NIFTI = {name: case for name, case in NIFTI.items() if name not in NO_VOLUME}
KERNELS_PNG = {name: case for name, case in PNG.items() if case[1] == REFUSE and not name.startswith(("sl", "aff"))}
MASK = np.random.default_rng(0).random((8, 9)) < 0.5
MASKS = {name: case for name, case in NPY.items()} | {
    "of 2": (array_in("a.npy", np.full((8, 9), 2)), REFUSE),
    "NaN": (array_in("a.npy", np.full((8, 9), NAN)), REFUSE),
    "of another size": (array_in("a.npy", MASK.T), REFUSE),
    "of nothing": (array_in("a.npy", np.zeros((8, 9))), REFUSE),
}
LINE = np.linspace(-0.4, 0.4, 12).reshape(2, 3, 2)
TRAJECTORIES = dict(NPY) | {
    "in other units": (array_in("a.npy", LINE * 100), REFUSE),
    "NaN": (array_in("a.npy", LINE * NAN), REFUSE),
    "3D": (array_in("a.npy", np.zeros((2, 3, 3))), REFUSE),
    "empty": (array_in("a.npy", np.zeros((0, 3, 2))), REFUSE),
}


def masked(folder):
    return inpaint((8, 9), 1.0, mask=str(folder / "a.npy"))


def single(value):
    return (np.asarray(value),)


READERS = (
    Reader(
        "prior, weights",
        "prior/model.safetensors",
        make_prior,
        lambda f: load_prior(f / "prior"),
        denoised,
        archives("prior/model.safetensors"),
        "prior",
    ),
    Reader("prior, card", "prior/config.json", make_prior, lambda f: load_prior(f / "prior"), denoised, CARDS, "prior"),
    Reader("foreign prior", "a.pt", make_foreign, lambda f: load_prior(f / "a.pt"), denoised, FOREIGN, flips=10),
    Reader(
        "checkpoint of a run",
        "r.checkpoint.safetensors",
        make_checkpoint,
        resumed,
        position_arrays,
        archives("r.checkpoint.safetensors") | SAVED,
    ),
    Reader("kernel, npy", "a.npy", kernel_in("a.npy"), lambda f: load_kernel(f / "a.npy"), single, KERNELS),
    Reader("kernel, NIfTI", "a.nii", kernel_in("a.nii"), lambda f: load_kernel(f / "a.nii"), single, KERNELS_NIFTI),
    Reader(
        "kernel, zipped",
        "a.nii.gz",
        kernel_in("a.nii.gz"),
        lambda f: load_kernel(f / "a.nii.gz"),
        single,
        NIFTI_GZ,
        checked=True,
    ),
    Reader(
        "kernel, PNG",
        "a.png",
        kernel_in("a.png"),
        lambda f: load_kernel(f / "a.png"),
        single,
        KERNELS_PNG,
        checked=True,
    ),
    Reader("mask, npy", "a.npy", array_in("a.npy", MASK), masked, lambda op: (op.mask.numpy(),), MASKS),
    Reader(
        "trajectory, npy",
        "a.npy",
        array_in("a.npy", LINE),
        lambda f: read_trajectory(f / "a.npy", (8, 9)),
        single,
        TRAJECTORIES,
    ),
)
