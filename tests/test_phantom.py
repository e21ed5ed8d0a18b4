"""The chest phantom: ranges, truth, one anatomy on every grid, errors."""
import numpy as np
import pytest

from invdiff.phantom import thorax


@pytest.fixture(scope="module")
def chest():
    return thorax((16, 128, 128), (3.0, 2.85, 2.85))


def test_densities_are_those_of_the_labelled_tissue(chest):
    hu, labels = chest.hu, chest.labels
    assert hu.dtype == np.float32 and hu.min() == -1000 and hu.max() <= 1300
    assert -900 < np.median(hu[labels["lung"]]) < -780
    assert 150 < np.median(hu[labels["bone"]]) < 1100
    assert not labels["body"][:, [0, -1]].any() and not labels["body"][:, :, [0, -1]].any()
    assert (hu[:, :20] == -1000).all()  # in front of the body there is air


def test_nodules_sit_where_the_table_says(chest):
    axes = [(np.arange(n) - (n - 1) / 2) * v for n, v in zip(chest.hu.shape, chest.voxel_mm)]
    for nodule in chest.nodules:
        index = tuple(int(np.abs(a - c).argmin()) for a, c in zip(axes, nodule["center_mm"]))
        offset = np.linalg.norm([a[i] - c for a, i, c in zip(axes, index, nodule["center_mm"])])
        if offset < nodule["diameter_mm"] / 2:
            assert chest.labels["nodules"][index]


def test_finer_grid_samples_the_same_anatomy(chest):
    fine = thorax((16, 256, 256), (3.0, 1.425, 1.425))
    for name in ("body", "lung", "bone"):  # centres of 2 x 2 fine voxels are the coarse centres
        pooled = fine.labels[name].reshape(16, 128, 2, 128, 2).mean((2, 4))
        sure = (pooled == 0) | (pooled == 1)
        assert (chest.labels[name][sure] == (pooled[sure] == 1)).mean() > 0.999
    assert fine.nodules == chest.nodules


def test_same_seed_same_volume_other_seed_other_volume():
    grid = (2, 96, 96), (3.0, 3.8, 3.8)
    assert np.array_equal(thorax(*grid, seed=1).hu, thorax(*grid, seed=1).hu)
    assert not np.array_equal(thorax(*grid, seed=1).hu, thorax(*grid, seed=2).hu)


@pytest.mark.parametrize("shape, voxel", [((24, 192), (3, 2, 2)), ((0, 96, 96), (3, 4, 4)), ((8, 96, 96), (3, -4, 4)),
                                          ((8, 64, 64), (3, 2, 2)), ((99, 96, 96), (3, 4, 4))])
def test_bad_grids_are_refused_by_value(shape, voxel):
    with pytest.raises(ValueError, match="thorax"):
        thorax(shape, voxel)
