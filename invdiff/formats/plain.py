"""Arrays without a place: kernels, masks and trajectories, from the same careful readers as volumes."""

import math
import os
from pathlib import Path

import numpy as np

from invdiff.errors import InputError
from invdiff.files import show
from invdiff.formats import arrays, nifti
from invdiff.formats.base import Wanted, check_count
from invdiff.formats.stream import check_file

FILES = (".npy", ".png", ".nii", ".nii.gz")
_MOST = Wanted(max_voxels=2**27)  # 1 GiB as float64


def read_array(path: str | Path, what: str) -> np.ndarray:
    """A real array from a file, as float64.

    ``.npy`` (never pickled objects) as it is; ``.png``, grayscale, as (rows, columns) in [0, 1]; ``.nii`` and
    ``.nii.gz``, stored (x, y, z), as (z, y, x) without singleton axes at the front. Orientations in the file are not
    looked at: whoever knows the geometry of the image passes an array instead.

    Args:
        path: the file.
        what: "kernel" or "mask", for messages.

    Raises:
        InputError: missing, damaged, of another type, too large, coloured, complex or empty.
    """
    path = Path(path)
    name = f"{what} file {show(path)}"
    suffix = next((s for s in sorted(FILES, key=len, reverse=True) if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise InputError(f"{name}: its type is unknown; use one of {', '.join(FILES)}")
    if not os.path.isfile(path):
        raise InputError(f"{name}: does not exist or is not a file; check the path")
    try:
        check_file(path)
        data = {".npy": _npy, ".png": _png}.get(suffix, _nifti)(path)
    except InputError as error:
        raise InputError(f"{what} file {error}" if show(path) in str(error) else f"{name}: {error}") from None
    except Exception as error:  # what damage raises differs between libraries and versions
        reason = show(" ".join(str(error).split()))[:80] or type(error).__name__
        raise InputError(f"{name}: cannot be read ({reason}); save it again as one of {', '.join(FILES)}") from None
    if data.dtype.kind not in "buif" or data.size == 0:
        raise InputError(f"{name}: holds {data.dtype} of shape {data.shape}; save a non-empty array of real numbers")
    return data.astype(np.float64)


def _npy(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        return arrays.read_array(file, os.fstat(file.fileno()).st_size, _MOST)


def _png(path: Path) -> np.ndarray:
    from matplotlib.image import imread
    from PIL import Image as Pictures

    with Pictures.open(path, formats=("PNG",)) as file:
        check_count("it", math.prod(file.size), _MOST.max_voxels)
        file.verify()  # checksums
    image = imread(path, format="png")
    if image.ndim == 3:
        colours = image[..., :3] if image.shape[-1] > 2 else image[..., :1]
        if (colours != colours[..., :1]).any():
            raise InputError("is in colour, not grayscale; convert it to grey first")
        image = colours[..., 0]
    return image


def _nifti(path: Path) -> np.ndarray:
    data = nifti.read(path, _MOST).data.T
    while data.ndim > 2 and data.shape[0] == 1:
        data = data[0]
    return data
