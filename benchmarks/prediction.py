"""What ``--dry-run`` predicts against what the run then takes: seconds and megabytes, each in a process of its own.

    python benchmarks/prediction.py [--repeat 1] [--only dps] [--cpu]

Cases of the built-in example: images, MRI with a baseline, CT with and without the network. Times hold for an idle
machine; ``--cpu`` compares processor seconds of a single thread instead, which hold for a busy one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

_TWO = ("--op", "ct-sparse", "--slices", "4:6", "--compare", "fbp")
CASES = {
    "denoise, measured": ("--op", "denoise", "--solver", "measured"),
    "MRI, cgls and zero-filled": ("--op", "mri", "--solver", "cgls", "--compare", "zero-filled"),
    "CT, pnp, 4 slices": ("--op", "ct-sparse", "--solver", "pnp", "--slices", "4:8", "--compare", "fbp"),
    "CT, tv": ("--op", "ct-sparse", "--solver", "tv", "--compare", "fbp"),
    "CT, dds, 2 slices": (*_TWO, "--solver", "dds"),
    "CT, dps, 2 slices": (*_TWO, "--solver", "dps", "--steps", "25"),
    "CT, dps with heun": (*_TWO, "--solver", "dps", "--steps", "25", "--set", "solver.sampler=heun"),
}
WALL = "from invdiff.cli import main; main()"
CPU = "import time; time.perf_counter = time.process_time; " + WALL


def command(folder: str, cpu: bool, *args: str) -> dict:
    """What ``invdiff reconstruct --json`` says."""
    line = [sys.executable, "-c", CPU if cpu else WALL, "reconstruct", *args, "--json"]
    threads = {"OMP_NUM_THREADS": "1"} if cpu else {}
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True, env=os.environ | threads)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1, help="runs of each case; the fastest counts")
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of cases")
    parser.add_argument("--cpu", action="store_true", help="processor seconds of one thread")
    options = parser.parse_args()
    print(f"{'case':28}{'predicted s':>12}{'measured s':>12}{'ratio':>8}", end="")
    print(f"{'predicted MB':>14}{'measured MB':>13}{'ratio':>8}")
    for name, args in CASES.items():
        if options.only and not any(word in name for word in options.only):
            continue
        with tempfile.TemporaryDirectory(prefix="invdiff-prediction-") as folder:
            plan = command(folder, options.cpu, *args, "--dry-run")
            runs = [command(folder, options.cpu, *args, "-o", f"r{n}.nii.gz") for n in range(options.repeat)]
        seconds = min(sum(run["timings_s"].values()) for run in runs)
        memory = max(run["peak_memory_mb"] for run in runs)
        print(
            f"{name:28}{plan['seconds']:>12.1f}{seconds:>12.1f}{plan['seconds'] / seconds:>8.2f}"
            f"{plan['memory_mb']:>14.0f}{memory:>13.0f}{plan['memory_mb'] / memory:>8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
