"""What ``--dry-run`` predicts against what the run then takes: seconds and megabytes, each in a process of its own.

    python benchmarks/prediction.py [--repeat 1]

Three cases of the built-in example: images, MRI with a baseline, CT with the network. Times hold for an idle machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

CASES = {
    "denoise, measured": ("--op", "denoise", "--solver", "measured"),
    "MRI, cgls and zero-filled": ("--op", "mri", "--solver", "cgls", "--compare", "zero-filled"),
    "CT, pnp, 4 slices": ("--op", "ct-sparse", "--solver", "pnp", "--slices", "4:8", "--compare", "fbp"),
    "CT, tv": ("--op", "ct-sparse", "--solver", "tv", "--compare", "fbp"),
}


def command(folder: str, *args: str) -> tuple[dict, float]:
    """What ``invdiff reconstruct --json`` says, and its seconds."""
    start = time.monotonic()
    line = [sys.executable, "-m", "invdiff", "reconstruct", *args, "--json"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1, help="runs of each case; the fastest counts")
    options = parser.parse_args()
    print(f"{'case':28}{'predicted s':>12}{'measured s':>12}{'ratio':>8}", end="")
    print(f"{'predicted MB':>14}{'measured MB':>13}{'ratio':>8}")
    for name, args in CASES.items():
        with tempfile.TemporaryDirectory(prefix="invdiff-prediction-") as folder:
            plan, _ = command(folder, *args, "--dry-run")
            runs = [command(folder, *args, "-o", f"r{n}.nii.gz")[0] for n in range(options.repeat)]
        seconds = min(sum(run["timings_s"].values()) for run in runs)
        memory = max(run["peak_memory_mb"] for run in runs)
        print(
            f"{name:28}{plan['seconds']:>12.1f}{seconds:>12.1f}{plan['seconds'] / seconds:>8.2f}"
            f"{plan['memory_mb']:>14.0f}{memory:>13.0f}{plan['memory_mb'] / memory:>8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
