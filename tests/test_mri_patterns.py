"""Sampling patterns of Cartesian MRI: acceleration, centre, names, refusals."""

import numpy as np
import pytest

from invdiff.errors import UsageError
from invdiff.operators.kmask import PATTERNS, make_mask


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(48, 64), (33, 49), (64, 40)])
def test_masks_achieve_the_acceleration_around_a_full_centre(pattern, shape):
    for acceleration, fraction in ((1, 0.1), (1.5, 0.1), (2.5, 0.08), (4, 0.12)):
        mask, achieved = make_mask(shape, pattern, acceleration, fraction, seed=2)
        assert mask.shape == shape and mask.dtype == bool
        assert achieved == pytest.approx(mask.size / mask.sum())
        step = 0.05 if pattern == "poisson" else acceleration / (2 * shape[1]) + 1e-9  # half a column
        assert abs(acceleration / achieved - 1) <= step, (acceleration, achieved)
        sides = [round(fraction * n) if pattern == "poisson" or n == shape[1] else n for n in shape]
        box = tuple(slice(n // 2 - s // 2, n // 2 - s // 2 + s) for n, s in zip(shape, sides, strict=True))
        assert mask[box].all() and mask[shape[0] // 2, shape[1] // 2]
        if pattern != "poisson":
            assert (mask == mask[0]).all()
        assert np.array_equal(mask, make_mask(shape, pattern, acceleration, fraction, seed=2)[0])
    seeds = {make_mask(shape, pattern, 3.5, 0.08, seed=s)[0].tobytes() for s in range(6)}
    assert len(seeds) >= (2 if pattern == "equispaced" else 6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_partial_fourier_omits_the_far_side(pattern):
    for partial in (0.5, 0.625, 0.8):
        mask, achieved = make_mask((40, 60), pattern, 2, 0.1, partial, 1)
        kept = np.arange(60) < np.ceil(partial * 60) + np.zeros((40, 1))
        kept[18 if pattern == "poisson" else 0 : 22 if pattern == "poisson" else 40, 27:33] = (
            True  # the centre is kept in any case
        )
        assert not mask[~kept].any() and mask[18:22, 27:33].all()
        assert achieved == pytest.approx(2 * kept.size / kept.sum(), rel=0.05)
    assert make_mask((40, 60), pattern, 1, 0.1, 0.8)[1] == pytest.approx(60 / 48)


def test_patterns_are_what_their_names_say():
    lines = np.flatnonzero(make_mask((4, 240), "equispaced", 4, 0.05)[0][0])
    gaps = np.diff(lines[lines < 100])
    assert gaps.max() - gaps.min() <= 1
    middle = slice(80, 160)
    share = {
        p: np.mean([make_mask((4, 240), p, 4, 0.02, seed=s)[0][0, middle].mean() for s in range(10)])
        for p in ("random", "gaussian")
    }
    assert abs(share["random"] - 0.25) < 0.05 and share["gaussian"] > 0.4
    mask = make_mask((96, 96), "poisson", 6, 0.05)[0]
    assert mask[32:64, 32:64].mean() > 3 * mask[:16].mean()
    rim = np.concatenate([mask[:24].ravel(), [False], mask[-24:].ravel()])
    beside = (rim[1:] & rim[:-1]).sum() / rim.sum()
    assert beside < 0.5 * rim.mean()  # the share of neighbours that chance would give


def test_impossible_masks_are_refused_with_a_remedy():
    bad = {
        "acceleration must be at least 1": {"acceleration": 0.5},
        "acceleration must be": {"acceleration": np.nan},
        "lower center_fraction": {"acceleration": 8, "center_fraction": 0.3},
        "a share from 0 to 1": {"center_fraction": 1.2},
        "from 0.5 to 1": {"partial_fourier": 0.4},
        "unknown sampling pattern 'spiral': choose one of equispaced": {"pattern": "spiral"},
        "seed": {"seed": -1},
        "shape must be": {"shape": (0, 8)},
    }
    for words, options in bad.items():
        with pytest.raises(UsageError, match=words) as refusal:
            make_mask(**{"shape": (64, 64), **options})
        assert "\n" not in str(refusal.value)
    with pytest.raises(UsageError, match="lower center_fraction"):
        make_mask((64, 64), "poisson", 20, 0.3)
