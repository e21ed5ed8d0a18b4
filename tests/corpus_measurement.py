"""The corpus for measurement files, and what every reader of HDF5 must stand."""

import json

import h5py
import numpy as np
import torch
from corpus import REFUSE, VALID, Reader

from invdiff.measurement import Measurement
from invdiff.measurement_file import save_measurement
from invdiff.opening import open_case
from invdiff.runner import Request, make_problem

HUGE = (10**4, 1, 10**4, 2000)
NAN = float("nan")


def edited(name, change):
    """``change(file)`` of an HDF5 file opened for writing."""

    def edit(folder):
        with h5py.File(folder / name, "r+") as file:
            change(file, folder)

    return edit


def stored(name, key, data=None, **options):
    """A dataset replaced by another."""

    def change(file, folder):
        del file[key]
        file.create_dataset(key, data=data, **options)

    return edited(name, change)


def linked(name, key, link):
    """A dataset replaced by ``link(folder)``."""

    def change(file, folder):
        (folder / "other.h5").write_bytes((folder / name).read_bytes())
        del file[key]
        file[key] = link(folder)

    return edited(name, change)


def virtual(name, key):
    def change(file, folder):
        layout = h5py.VirtualLayout(file[key].shape, file[key].dtype)
        layout[:] = h5py.VirtualSource("other.h5", key, file[key].shape)
        del file[key]
        file.create_virtual_dataset(key, layout)

    return edited(name, change)


def outside(name, key):
    """Its numbers in a file that lies elsewhere."""

    def change(file, folder):
        data = file[key][()]
        del file[key]
        file.create_dataset(key, data=data, external=[("/etc/passwd", 0, data.nbytes)])

    return edited(name, change)


def large_chunk(name, key):
    """A small array in one packed chunk of 400 MB."""

    def change(file, folder):
        data = file[key][()]
        del file[key]
        size = (400 * 2**20) // data.itemsize // max(1, int(np.prod(data.shape[:-1])))
        chunks = (*data.shape[:-1], size)
        made = file.create_dataset(
            key, data.shape, data.dtype, maxshape=(None,) * data.ndim, chunks=chunks, compression=1
        )
        made[...] = data

    return edited(name, change)


def attacks(name, key, huge, values):
    """What every HDF5 reader must stand, for one dataset of real or complex ``values``."""
    broken = values.copy()
    broken.flat[0] = NAN
    infinite = values.copy()
    infinite.flat[-1] = np.inf
    return {
        f"/{key} is a link to another file": (linked(name, key, lambda f: h5py.ExternalLink("other.h5", key)), REFUSE),
        f"/{key} is a link to a system file": (
            linked(name, key, lambda f: h5py.ExternalLink("/etc/passwd", "x")),
            REFUSE,
        ),
        f"/{key} is a soft link": (linked(name, key, lambda f: h5py.SoftLink("/nothing")), REFUSE),
        f"/{key} is a link to itself": (linked(name, key, lambda f: h5py.SoftLink(f"/{key}")), REFUSE),
        f"/{key} is virtual": (virtual(name, key), REFUSE),
        f"/{key} lies outside": (outside(name, key), REFUSE),
        f"/{key} is a group": (edited(name, lambda file, _: (file.pop(key), file.create_group(key))), REFUSE),
        f"/{key} is missing": (edited(name, lambda file, _: file.pop(key)), REFUSE),
        f"/{key} declares terabytes": (
            stored(name, key, shape=huge, dtype=values.dtype, chunks=(1,) * len(huge)),
            REFUSE,
        ),
        f"/{key} was never written": (stored(name, key, shape=values.shape, dtype=values.dtype), REFUSE),
        f"/{key} has no chunks": (stored(name, key, shape=values.shape, dtype=values.dtype, chunks=True), REFUSE),
        f"/{key} is one large chunk": (large_chunk(name, key), REFUSE),
        f"/{key} is empty": (stored(name, key, h5py.Empty("f4")), REFUSE),
        f"/{key} is a scalar": (stored(name, key, np.float32(3)), REFUSE),
        f"/{key} is text": (stored(name, key, "hello"), REFUSE),
        f"/{key} is a record": (stored(name, key, np.zeros(3, [("a", "f4"), ("b", "i4")])), REFUSE),
        f"/{key} has one axis": (stored(name, key, values.ravel()), REFUSE),
        f"/{key} has 9 axes": (stored(name, key, values.reshape(values.shape + (1,) * 5)), REFUSE),
        f"/{key} has no slices": (stored(name, key, values[:0]), REFUSE),
        f"/{key} holds NaN": (stored(name, key, broken), REFUSE),
        f"/{key} holds infinity": (stored(name, key, infinite), REFUSE),
        f"/{key} holds references": (stored(name, key, shape=(3,), dtype=h5py.ref_dtype), REFUSE),
        f"/{key} holds lists": (stored(name, key, shape=(3,), dtype=h5py.vlen_dtype(np.float32)), REFUSE),
        f"/{key} is not float": (stored(name, key, np.zeros(values.shape, "S7")), REFUSE),
    }


# The measurement file -------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
CT = {
    "y": RNG.uniform(0, 5, (2, 1, 6, 15)).astype(np.float32),
    "operator": {
        "name": "ct-sparse",
        "views_deg": [0, 30, 60, 90, 120, 150],
        "geometry": "parallel",
        "rows": 8,
        "columns": 8,
        "pixel_mm": [1.5, 1.5],
        "detector_pitch_mm": 1.5,
        "detector_count": 15,
        "detector_offset_mm": 0.0,
        "axis_offset_mm": 0.0,
        "mu_water_per_mm": 0.0193,
    },
    "volume": {"shape": [8, 8, 2], "affine": np.diag([-1.5, -1.5, 3, 1]).tolist(), "units": "HU", "modality": "CT"},
    "noise": {"model": "poisson", "photons": 1e5},
}
MASK = np.ones((8, 9), bool)
MAPS = np.full((2, 8, 9), 0.7 + 0.1j, np.complex64)
MRI = {
    "y": RNG.normal(size=(3, 4, 8, 9)).astype(np.float32),
    "operator": {"name": "mri-multicoil", "shape": [3, 8, 9]},
    "volume": {
        "shape": [9, 8, 3],
        "affine": np.diag([-1, -1, 3.0, 1]).tolist(),
        "units": "1",
        "modality": "MR",
        "slice_axis": 2,
    },
    "noise": {"model": "complex-gaussian", "std": 1.0},
}


def text(name, key, change):
    """The JSON of a part, changed; ``change`` of a dictionary, or the bytes themselves."""

    def edit(file, folder):
        old = json.loads(file[key][()])
        del file[key]
        file[key] = np.bytes_(change if isinstance(change, bytes) else json.dumps(change(old)).encode())

    return edited(name, edit)


def parts(name):
    return {
        "operator nested": (text(name, "operator", b"[" * 10**5), REFUSE),
        "operator not UTF-8": (text(name, "operator", b'{"name": "\xff"}'), REFUSE),
        "operator NaN": (text(name, "operator", b'{"name": NaN}'), REFUSE),
        "operator unknown": (text(name, "operator", lambda d: d | {"name": "../../etc/passwd"}), REFUSE),
        "operator name a list": (text(name, "operator", lambda d: d | {"name": ["ct-sparse"]}), REFUSE),
        "operator a list": (text(name, "operator", b"[1]"), REFUSE),
        "operator of 17 MB": (text(name, "operator", b" " * (2**24 + 1)), REFUSE),
        "noise unknown": (text(name, "noise", lambda d: d | {"model": "../x"}), REFUSE),
        "noise without level": (text(name, "noise", lambda d: {"model": d["model"]}), REFUSE),
        "shape of a million million": (text(name, "volume", lambda d: d | {"shape": [10**6, 10**6, 2]}), REFUSE),
        "shape too long": (text(name, "volume", b'{"shape": [' + b"9" * 5000 + b", 8, 2]}"), REFUSE),
        "shape negative": (text(name, "volume", lambda d: d | {"shape": [-8, -8, 2]}), REFUSE),
        "shape true": (text(name, "volume", lambda d: d | {"shape": [True, 8, 2]}), REFUSE),
        "affine singular": (text(name, "volume", lambda d: d | {"affine": [[0] * 4] * 4}), REFUSE),
        "affine words": (text(name, "volume", lambda d: d | {"affine": "x"}), REFUSE),
        "affine huge": (
            text(name, "volume", lambda d: d | {"affine": np.diag([1e30, 1e30, 1e30, 1]).tolist()}),
            REFUSE,
        ),
        "units a number": (text(name, "volume", lambda d: d | {"units": 5}), REFUSE),
        "first slice": (text(name, "volume", lambda d: d | {"first_slice": 10**9}), REFUSE),
        "another version": (edited(name, lambda file, _: file.attrs.modify("format_version", 99)), REFUSE),
        "another format": (edited(name, lambda file, _: file.attrs.modify("format", "x")), REFUSE),
        "more datasets": (edited(name, lambda file, _: file.create_group("../../x")), REFUSE),
        "user block": (
            lambda folder: (folder / name).write_bytes(bytes(512) + (folder / name).read_bytes()) and None,
            VALID,
        ),
    }


CT_CASES = (
    attacks("m.h5", "y", HUGE, CT["y"])
    | parts("m.h5")
    | {
        "counts": (stored("m.h5", "y", CT["y"] + 1000), REFUSE),
        "whole numbers": (stored("m.h5", "y", (CT["y"] * 1000).astype("u2")), REFUSE),
        "a view less": (stored("m.h5", "y", CT["y"][:, :, :5]), REFUSE),
        "weights negative": (edited("m.h5", lambda f, _: f.create_dataset("weights", data=-CT["y"] - 1)), REFUSE),
        "weights NaN": (edited("m.h5", lambda f, _: f.create_dataset("weights", data=CT["y"] * NAN)), REFUSE),
        "weights of another shape": (
            edited("m.h5", lambda f, _: f.create_dataset("weights", data=CT["y"][:1])),
            REFUSE,
        ),
        "views words": (text("m.h5", "operator", lambda d: d | {"views_deg": ["a"] * 6}), REFUSE),
        "views infinite": (text("m.h5", "operator", b'{"name": "ct-sparse", "views_deg": [1e999,1,2,3,4,5]}'), REFUSE),
        "pitch 0": (text("m.h5", "operator", lambda d: d | {"detector_pitch_mm": 0}), REFUSE),
        "pitch negative": (text("m.h5", "operator", lambda d: d | {"detector_pitch_mm": -1}), REFUSE),
        "geometry unknown": (text("m.h5", "operator", lambda d: d | {"geometry": "helix"}), REFUSE),
        "photons 1e300": (text("m.h5", "noise", lambda d: d | {"photons": 1e300}), REFUSE),
    }
)
MRI_CASES = attacks("m.h5", "maps", (10**4, 10**4, 10**4, 2), np.stack([MAPS.real, MAPS.imag], -1)) | {
    "mask of 2": (stored("m.h5", "mask", np.full((8, 9), 2, "u1")), REFUSE),
    "mask NaN": (stored("m.h5", "mask", np.full((8, 9), NAN, "f4")), REFUSE),
    "mask of another size": (stored("m.h5", "mask", np.ones((9, 8), "u1")), REFUSE),
    "mask of one row": (stored("m.h5", "mask", np.ones((1, 9), "u1")), REFUSE),
    "mask of nothing": (stored("m.h5", "mask", np.zeros((8, 9), "u1")), REFUSE),
    "no mask": (edited("m.h5", lambda file, _: file.pop("mask")), REFUSE),
    "maps of 3 coils": (stored("m.h5", "maps", np.ones((3, 8, 9, 2), "f4")), REFUSE),
    "maps of zeros": (stored("m.h5", "maps", np.zeros((2, 8, 9, 2), "f4")), REFUSE),
    "maps of other slices": (stored("m.h5", "maps", np.ones((2, 2, 8, 9, 2), "f4")), REFUSE),
    "std 0": (text("m.h5", "noise", lambda d: d | {"std": 0}), REFUSE),
}


def measurement_arrays(case):
    m = case.measurement
    return m.y, np.asarray(m.volume["affine"]), *m.arrays.values()


def opened(folder):
    """As a run does: the file, its operator, its grid, its noise."""
    case = open_case(Request(input=folder / "m.h5", op=None))
    make_problem(case, torch.device("cpu"))
    return case


def save_as(content, **arrays):
    return lambda folder: save_measurement(folder / "m.h5", Measurement(**content, arrays=arrays)) and None


READERS = (
    Reader("measurement file, CT", "m.h5", save_as(CT), opened, measurement_arrays, CT_CASES, checked=True),
    Reader(
        "measurement file, MRI",
        "m.h5",
        save_as(MRI, mask=MASK, maps=MAPS),
        opened,
        measurement_arrays,
        MRI_CASES,
        checked=True,
    ),
)
