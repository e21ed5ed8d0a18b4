"""Every family of operators on subjects that no prior was trained on: the default solver against classical baselines.

    python benchmarks/families.py                       the test split, two slices of each subject
    python benchmarks/families.py --split validation --only mri sr --slices 4

CT subjects (HU) are measured by the fan beam and the image operators, MR subjects (magnitude) by k-space and the image
operators, with the noise of `invdiff reconstruct --simulate`. Classical solvers run with their default options.
"""

import argparse
import dataclasses
from collections import defaultdict

import numpy as np
from _data import subjects

from invdiff.opening import open_case
from invdiff.operators import OPERATORS
from invdiff.runner import Request, reconstruct
from invdiff.volume import Volume, load_volume

FAMILIES = {  # operator and options, modality, classical baselines
    "ct fan, 60 views": ("ct-sparse", {"geometry": "fan"}, "ct", ("fbp", "sirt", "tv", "wavelet")),
    "mri 4x": ("mri", {}, "mr", ("zero-filled", "tv", "wavelet")),
    "mri-multicoil 4x": ("mri-multicoil", {}, "mr", ("zero-filled", "sense-cg", "tv", "wavelet")),
    "mri-radial, 64 spokes": ("mri-radial", {}, "mr", ("zero-filled", "cgls", "tv", "wavelet")),
    "blur gaussian:2": ("blur", {}, "ct mr", ("wiener", "tv", "wavelet")),
    "inpaint 50 %": ("inpaint", {}, "ct mr", ("fill", "biharmonic", "tv", "wavelet")),
    "sr 2x": ("sr", {}, "ct mr", ("bicubic", "tv", "wavelet")),
    "sr 4x": ("sr", {"factor": 4}, "ct mr", ("bicubic", "tv", "wavelet")),
    "sr 4x of averages": ("sr", {"factor": 4, "filter": "average"}, "ct mr", ("bicubic", "tv", "wavelet")),
    "sr 2x through-plane": ("sr", {"axis": "through-plane"}, "ct mr", ("bicubic", "tv")),
    "denoise": ("denoise", {}, "ct mr", ("measured", "tv", "wavelet")),
}


def divisible(path, factor: int) -> Volume:
    """A volume with a multiple of ``factor`` voxels along every axis, less than that many left out."""
    volume = load_volume(path)
    return dataclasses.replace(volume, data=volume.data[tuple(slice(n // factor * factor) for n in volume.data.shape)])


def middle(request: Request, count: int) -> Request:
    """The request for ``count`` neighbouring slices (8 through the plane) in the middle of the volume."""
    total = open_case(dataclasses.replace(request, op="denoise", operator={})).grid.data.shape[0]
    if request.operator.get("axis") == "through-plane":
        count = max(count, 8) // 2 * 2
    count = min(total // 2 * 2, count)
    first = (total - count) // 2
    return dataclasses.replace(request, slices=(first, first + count))


def measure(name: str, path, count: int) -> dict[str, float]:
    """PSNR in dB of every solver."""
    op, options, _, baselines = FAMILIES[name]
    volume = divisible(path, options.get("factor", 2))
    request = middle(Request(volume, op, options, simulate=True, compare=baselines), count)
    result = reconstruct(request)
    print(f"{path.name.split('.')[0]:28} {name:22}", end="")
    for solver, figures in result.metrics.items():
        late = "" if result.record["runs"][solver].get("converged", True) else "!"
        print(f"  {solver} {figures['psnr_db']:.2f}{late}", end="")
    print(flush=True)
    return {solver: figures["psnr_db"] for solver, figures in result.metrics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test")
    parser.add_argument("--slices", type=int, default=2, help="per subject")
    parser.add_argument("--only", nargs="*", help="families whose name begins so")
    args = parser.parse_args()
    paths = {"ct": subjects(args.split), "mr": subjects(args.split, "mr_")}
    found = defaultdict(list)
    for name, (op, _, modalities, _) in FAMILIES.items():
        if args.only and not any(name.startswith(word) for word in args.only):
            continue
        assert op in OPERATORS
        for modality in modalities.split():
            found[name] += [measure(name, path, args.slices) for path in paths[modality]]
    print(f"\n{'mean over subjects':24} {'pnp':>7}  best classical      gain (worst subject)")
    for name, rows in found.items():
        mean = {solver: np.mean([row[solver] for row in rows]) for solver in rows[0]}
        best = max((s for s in mean if s != "pnp"), key=mean.__getitem__)
        gains = [row["pnp"] - max(v for s, v in row.items() if s != "pnp") for row in rows]
        print(f"{name:24} {mean['pnp']:7.2f}  {best:12} {mean[best]:6.2f}  {np.mean(gains):+5.2f} ({min(gains):+.2f})")


if __name__ == "__main__":
    main()
