"""The file of a checkpoint: arrays that share or turn memory, devices, sizes that do not fit, saving over."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from invdiff import checkpoint
from invdiff.errors import InputError, ResourceError, UsageError
from invdiff.position import Done, Position, Samples
from invdiff.solvers.base import State

CPU, OWN, SHAPE = torch.device("cpu"), {"a": 1}, (3, 1, 4, 5)


def position():
    """x and x0 that differ, a turn that is not its own inverse, parts of x at its own address."""
    x, x0 = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    memory = {"turned": x.clone().permute(3, 4, 0, 1, 2), "part": x[:, :2], "bits": x.view(torch.int32)}
    picture = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    finished = {"dds": Done(picture, picture + 1, {"steps": 2})}
    return Position(finished, "pnp", Samples(1, x0[0], picture + 2, picture + 3), State(x, x0, 2, memory))


def saved(path):
    """The tensors and the metadata of a saved :func:`position`."""
    checkpoint.save(path, position(), OWN)
    with safe_open(path, "pt") as archive:
        return {key: archive.get_tensor(key).clone() for key in archive.keys()}, archive.metadata()  # noqa: SIM118


def test_arrays_return_where_their_names_say(tmp_path):
    checkpoint.save(tmp_path / "c", Position(), OWN)
    assert checkpoint.load(tmp_path / "c", OWN, SHAPE, CPU).state is None
    checkpoint.save(tmp_path / "c", position(), OWN)  # over the older one
    new, old = checkpoint.load(tmp_path / "c", OWN, SHAPE, CPU), position()
    assert new.numbers() == old.numbers()
    for (name, a), (other, b) in zip(new.arrays(), old.arrays(), strict=True):
        assert name == other and a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)), name
    assert new.state.memory["turned"].stride() == old.state.memory["turned"].stride()


@pytest.mark.parametrize("name", ["x", "x0", "mean", "finished.dds", "spread.dds"])
def test_an_array_of_another_size_is_named(tmp_path, name):
    tensors, metadata = saved(tmp_path / "c")
    save_file(tensors | {name: tensors[name][..., :-1].contiguous()}, tmp_path / "c", metadata)
    with pytest.raises(InputError, match=rf"{name} is \(.*, 4\), expected \(.*, 5\)"):
        checkpoint.load(tmp_path / "c", OWN, SHAPE, CPU)


def test_other_formats_and_other_runs_are_refused(tmp_path):
    tensors, metadata = saved(tmp_path / "c")
    with pytest.raises(UsageError, match=r"another run \(a 1 -> 2\)"):
        checkpoint.load(tmp_path / "c", {"a": 2}, SHAPE, CPU)
    save_file(tensors, tmp_path / "c", metadata | {"format": "another"})
    with pytest.raises(InputError, match="not in the format"):
        checkpoint.load(tmp_path / "c", OWN, SHAPE, CPU)


def test_only_what_lay_on_the_device_returns_there():
    for device in ("cpu", "meta"):
        entry = {"complex": False, "order": [0], "device": device}
        assert checkpoint._restored(torch.ones(3), entry, torch.device("meta")).device.type == device


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path / "c")

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ResourceError):
        checkpoint.save(tmp_path / "c", replace(position(), calls=9), OWN)
    assert checkpoint.load(tmp_path / "c", OWN, SHAPE, CPU).calls == 0 and len([*tmp_path.iterdir()]) == 1


def test_running_sums_are_mean_and_variance_of_the_samples():
    g = np.random.default_rng(0)
    images, pictures = g.normal(3, 1, (5, 2, 1, 3, 4)), g.normal(-7, 2, (5, 2, 3, 4))
    sums = Samples()
    for k in range(5):
        sums = sums.add(torch.from_numpy(images[k]), pictures[k])
        assert np.allclose(sums.mean, images[: k + 1].mean(0)) and np.allclose(sums.shown, pictures[: k + 1].mean(0))
        assert np.allclose(sums.scatter, (k + 1) * pictures[: k + 1].var(0)) and sums.count == k + 1
    alone = Samples().add(torch.ones(1), None)
    assert alone.mean == 1 and alone.scatter == 0
