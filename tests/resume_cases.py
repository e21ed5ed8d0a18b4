"""What the tests of resuming share: small runs, stopped again and again, and what makes two results the same."""

from dataclasses import replace

import numpy as np

from invdiff.errors import Interrupted
from invdiff.runner import Request, reconstruct
from invdiff.stopping import Stop

SCAN = ("--op", "ct-sparse", "--views", "12", "--simulate")
OFTEN = ("--checkpoint-minutes", "1e-9")
SAVED = "r.checkpoint.safetensors"


def request(world, **options):
    """A run on two slices of the small CT with the random prior."""
    source = {"input": world / "ct.nii.gz", "op": "ct-sparse", "operator": {"views": 12}, "simulate": True}
    return Request(**{**source, "prior": world / "prior", "slices": (1, 3), "steps": 3, **options})


def same(one, other):
    """Whether two results are equal bit for bit, with all that the manifest says of them but the time they took."""
    for name, stack in one.stacks.items():
        np.testing.assert_array_equal(stack, other.stacks[name])
    if one.spread is not None:
        np.testing.assert_array_equal(one.spread.data, other.spread.data)
    told = [{n: {**used, "seconds": 0} for n, used in r.record["runs"].items()} for r in (one, other)]
    assert told[0] == told[1] and list(one.stacks) == list(other.stacks)


def in_pieces(wanted, path, every=1):
    """The result of a run that was stopped again and again, after ``every`` steps, and how often."""
    for count in range(999):
        stop, left = Stop(), iter(range(every - 1))

        def ask(*_, stop=stop, left=left):
            if next(left, None) is None:
                stop.asked = "SIGTERM"

        try:
            return reconstruct(replace(wanted, checkpoint=path, resume=count > 0), ask, stop), count
        except Interrupted as error:
            assert SAVED in str(error) and "--resume" in str(error) and path.stat().st_mode & 0o777 == 0o600
    raise AssertionError("no end")
