"""Shared by the benchmarks: where the data lie, and which subject belongs to which split."""

import json
import os
import sys
from pathlib import Path

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"))


def subjects(split: str, prefix: str = "ct_") -> list[Path]:
    """Volumes of a split, CT or (``mr_``) MR, or a clear word and exit status 0 where there are no data."""
    manifest = DATA / "manifest.json"
    if not manifest.exists():
        print(f"no data at {DATA}: set INVDIFF_DATA to a folder with manifest.json and volumes; nothing measured")
        sys.exit(0)
    entries = json.loads(manifest.read_text())
    return [
        DATA / e["file"]
        for e in entries
        if e.get("split") == split and e["file"].startswith(prefix) and e["file"].endswith((".nii.gz", ".nrrd"))
    ]
