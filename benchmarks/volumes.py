"""What the third dimension gives: neighbouring slices reconstructed one by one and as a volume, in one run.

    python benchmarks/volumes.py                          20 neighbouring slices of each subject of the test split
    python benchmarks/volumes.py --split validation --only "ct 30" --slices 24 --oracle

``pnp`` is the default: its prior sees the slices and the planes across them by turns where the slices make a volume.
``pnp, slices`` sees slices alone; ``tv-z`` couples these. TV is 2D and 3D, with its default weight; with --oracle also
with 0.4 and 2 times that weight, the best of which counts. Beside PSNR and SSIM stands the RMS error of the difference
between neighbouring slices, in HU or percent of the largest value, which is what flicker in other planes is.
"""

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _data import subjects

from invdiff.runner import Request, Result, reconstruct
from invdiff.volume import Volume, load_volume, to_slices

CASES: dict[str, tuple[str, dict[str, Any], str]] = {  # operator, options, modality
    "ct 30 views": ("ct-sparse", {"views": 30}, "ct_"),
    "ct 60 views": ("ct-sparse", {"views": 60}, "ct_"),
    "ct 90 degrees": ("ct-limited", {"arc": 90.0, "views": 90}, "ct_"),
    "mri 4x": ("mri", {}, "mr_"),
}
SLICES = {"prior_options": {"planes": "slices"}}
PLANS: dict[str, dict[str, Any]] = {
    "tv": {"solver": "tv"},
    "tv 3D": {"solver": "tv", "solver_options": {"volumetric": True}},
    "pnp, slices": SLICES,
    "pnp, slices, tv-z": SLICES | {"coupling": "tv-z"},
    "pnp": {},
}
FACTORS = (0.4, 2.0)


def middle(path: Path, count: int) -> Volume:
    """The ``count`` slices in the middle of a subject."""
    volume = load_volume(path)
    stack = to_slices(volume, allow_shear=True)
    first = max(0, (len(stack.data) - count) // 2)
    data = stack.data[first : first + count]
    affine = np.diag([stack.pixel_mm[1], stack.pixel_mm[0], stack.spacing_mm, 1.0])
    return replace(volume, data=np.ascontiguousarray(data.transpose(2, 1, 0)), affine=affine, header=None, path=None)


def measure(path: Path, case: str, args: argparse.Namespace) -> dict[str, float]:
    """PSNR of every plan on one subject."""
    op, options, _ = CASES[case]
    volume = middle(path, args.slices)
    voxel = " x ".join(f"{mm:.2f}" for mm in volume.voxel_mm[::-1])
    print(f"{path.name.split('.')[0]}, {case}: {volume.data.shape[::-1]}, voxels of {voxel} mm")
    common = Request(volume, op, options, simulate=True, slice_axis="2", allow_shear=True)
    found = {}
    for title, plan in PLANS.items():
        result = reconstruct(replace(common, **plan))
        found[title] = report(title, result)
        if args.oracle and title.startswith("tv"):
            weight = result.record["runs"]["tv"]["weight"]
            given = plan.get("solver_options", {})
            for factor in FACTORS:
                own = plan | {"solver_options": given | {"weight": factor * weight}}
                value = report(f"{title}, weight x {factor:g}", reconstruct(replace(common, **own)))
                found[title] = max(found[title], value)
    return found


def report(title: str, result: Result) -> float:
    """Print one line; the PSNR."""
    figures = result.metrics[(name := next(reversed(result.metrics)))]
    truth, estimate = result.case.truth, result.stacks[name]
    unit = 1.0 if result.case.modality == "CT" else 100 / float(truth.max())
    error = unit * np.sqrt(np.mean((np.diff(estimate, axis=0) - np.diff(truth, axis=0)) ** 2))
    print(
        f"  {title:22} {figures['psnr_db']:6.2f} dB {figures['ssim']:6.3f}   between slices {error:6.1f}"
        f"   {result.record['runs'][name]['seconds']:6.0f} s",
        flush=True,
    )
    return float(figures["psnr_db"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test")
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="cases whose name begins so")
    parser.add_argument("--oracle", action="store_true", help="TV with other weights, the best of which counts")
    args = parser.parse_args()
    rows = defaultdict(list)
    for case, (_, _, prefix) in CASES.items():
        if not args.only or any(case.startswith(word) for word in args.only):
            rows[case] = [measure(path, case, args) for path in subjects(args.split, prefix)]
    print("\nPSNR of pnp over the others, mean over subjects (worst subject)")
    for case, found in rows.items():
        gains = {t: [row["pnp"] - row[t] for row in found] for t in PLANS if t != "pnp"}
        print(f"  {case:14}" + "   ".join(f"{t}: {np.mean(g):+.2f} ({min(g):+.2f})" for t, g in gains.items()))


if __name__ == "__main__":
    main()
