"""Bad inputs for every reader of files: how many are refused by name, pass unseen, or crash (goal for both: 0).

    python benchmarks/robustness.py [--only NIfTI DICOM] [--flips 400] [--show]

The corpus is that of tests/corpus*.py. "harmless" counts inputs that were read although damaged: nothing of them is
lost (padding, the end of a file), or no reader can see it (a changed voxel without a checksum); finite and of the right
shape they are. Every reader runs in a process of its own, with limits of memory and time.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from corpus import Outcome, Reader, run

FILES = ("corpus_volumes", "corpus_dicom", "corpus_codestreams", "corpus_measurement", "corpus_raw", "corpus_models")
HEAD = ("reader", "inputs", "refused by name", "harmless", "silently accepted", "crashes", "seconds")


def readers(only: list[str]) -> list[Reader]:
    """All readers of the corpus, or those whose name holds a word of ``only``."""
    found = [reader for name in FILES for reader in import_module(name).READERS]
    return [reader for reader in found if not only or any(word.lower() in reader.name.lower() for word in only)]


def line(name: str, counts: Counter, seconds: float) -> str:
    """A row of the table."""
    numbers = (sum(counts.values()), *(counts[verdict] for verdict in ("refused", "read", "accepted", "crash")))
    return (
        f"{name:24}"
        + "".join(f"{n:>{len(head) + 2}}" for n, head in zip(numbers, HEAD[1:], strict=False))
        + (f"{seconds:>9.1f}")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of readers")
    parser.add_argument("--flips", type=int, help="flipped bits per reader, other than in the tests")
    parser.add_argument("--show", action="store_true", help="every input with what was said of it")
    options = parser.parse_args()
    print(f"{HEAD[0]:24}" + "".join(f"{head:>{len(head) + 2}}" for head in HEAD[1:]))
    total: Counter = Counter()
    wrong: list[Outcome] = []
    start = time.monotonic()
    for reader in readers(options.only):
        if missing := [package for package in reader.needs if find_spec(package) is None]:
            print(f"{reader.name:24}  not tried: {', '.join(missing)} is not installed")
            continue
        wanted = reader if options.flips is None else replace(reader, flips=options.flips)
        with tempfile.TemporaryDirectory(prefix="invdiff-robustness-") as folder:
            now = time.monotonic()
            outcomes = run(wanted, Path(folder) / "corpus")
        counts = Counter(outcome.verdict for outcome in outcomes)
        total += counts
        wrong += [outcome for outcome in outcomes if outcome.verdict in ("accepted", "crash")]
        print(line(reader.name, counts, time.monotonic() - now), flush=True)
        for outcome in outcomes if options.show else ():
            print(f"    {outcome.verdict:9} {outcome.case}: {outcome.text.replace(folder, '')}")
    print(line("all", total, time.monotonic() - start))
    for outcome in wrong:
        print(f"{outcome.verdict}: {outcome.reader}, {outcome.case}: {outcome.text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
