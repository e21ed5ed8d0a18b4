"""The opponents of the quality benchmark get what is theirs: noise levels, ranges, measurements and a resume."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
_classical = pytest.importorskip("_classical")
opponents = pytest.importorskip("opponents")

from invdiff.errors import InputError  # noqa: E402
from invdiff.intensity import MU_WATER_PER_MM  # noqa: E402
from invdiff.operators import build  # noqa: E402
from invdiff.priors.train_config import TrainConfig  # noqa: E402
from invdiff.priors.training_data import Source  # noqa: E402
from invdiff.priors.unet import UNetConfig  # noqa: E402
from invdiff.problem import whiten  # noqa: E402
from invdiff.simulate import as_tensors, simulate_ct  # noqa: E402
from invdiff.solvers.pnp import pseudo_inverse  # noqa: E402

TINY = UNetConfig(channels=(8, 8), blocks=(1, 1), patch=2, embedding=16)


def test_a_classical_denoiser_sees_slices_in_0_to_1_and_its_share_of_the_noise():
    seen = []

    def denoise(x, sigma):
        seen.append((tuple(x.shape), sigma))
        return x + 0.25

    prior = _classical.Classical("it", denoise, 0.8)
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(1, 2, 1, 12, 5)
    out = prior.denoise(x, 0.5)
    assert seen == [((1, 1, 12, 5), 0.2)] * 2 and prior.calls == 2
    assert torch.allclose(out, x + 0.5, atol=1e-6)


def test_tv_is_that_of_the_noise_level_it_is_told():
    """Two halves of 6 x 8 pixels at -0.5 and 0.5: each moves by sigma * 8 edges / 48 pixels, whatever ran before."""
    prior = _classical.Classical("tv", _classical.tv(), 1.0)
    x = torch.full((1, 1, 1, 12, 8), -0.5)
    x[..., 6:, :] = 0.5
    prior.denoise(torch.randn(1, 1, 1, 12, 8, generator=torch.Generator().manual_seed(0)), 0.3)
    assert torch.allclose(prior.denoise(x, 0.6), x * (1 - 2 * 0.6 * 8 / 48), atol=2e-3)


def test_bm3d_leaves_less_noise():
    if (prior := _classical.classical("pnp-bm3d")) is None:
        pytest.skip("bm3d is not installed")
    x = torch.zeros(1, 1, 1, 32, 32)
    x[..., 10:20, 12:] = 0.8
    noise = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert float((prior.denoise(x + noise, 0.1) - x).std()) < 0.03


def test_fbp_of_the_training_is_that_of_the_benchmark():
    """Pixels of p mm are attenuations p times as large on pixels of 1 mm: line integrals and noise are the same."""
    image = np.full((1, 32, 32), -1.0, np.float32)
    image[0, 8:20, 10:24] = 0.1
    found = opponents.Scanner(20).fbp(image, 32 * 1.7, 5)
    operator = build("ct-sparse", (32, 32), (1.7, 1.7), views=20)
    y, variance = as_tensors(simulate_ct(1000 * image, operator, seed=5))
    problem = whiten(y, operator, variance, scale=MU_WATER_PER_MM, shift=MU_WATER_PER_MM)
    assert torch.allclose(found, pseudo_inverse(problem)[0], atol=1e-4)


def test_training_slices_are_whole_and_of_ct_alone():
    ramp = np.linspace(-1, 0.5, 24, dtype=np.float32)
    sources = [
        Source("a", "CT", (np.tile(ramp, (20, 1)),), "a"),
        Source("b", "image", (np.full((20, 24), 5, np.float32),), "b"),
    ]
    slices = opponents.Slices(sources, 0)
    drawn = [slices.draw(16) for _ in range(30)]
    assert {d.shape for d in drawn} == {(16, 16)} and max(d.max() for d in drawn) < 0.7
    assert min(d.min() for d in drawn) == -1 and len({float(d.mean()) for d in drawn}) > 3
    assert opponents.square(np.zeros((2, 5))).shape == (5, 5)


def damaged(folder):
    """Each file of a training in turn, which is named in one line."""
    for name, content, words in (
        (opponents.TASK, "{", "is no JSON"),
        (opponents.TASK, "[" * 10**5, "is no JSON"),
        (opponents.TASK, "[1]", "is no object of JSON"),
        (opponents.TASK, "{}", r"is damaged \('op'\)"),
        (opponents.STATE, "{}", r"is damaged \('config'\)"),
        (opponents.STATE, '{"config": {"minutes": "long"}}', "is damaged"),
        (opponents.STATE, '{"config": 3}', "is damaged"),
        (opponents.TENSORS, "{}", "cannot be read as a training"),
    ):
        whole = (folder / name).read_bytes()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=f"^{folder}.*{words}") as found:
            opponents.load_trained(folder)
        assert "\n" not in str(found.value)
        (folder / name).write_bytes(whole)


def test_a_training_learns_stops_and_goes_on(tmp_path, monkeypatch, capsys):
    """Starts as the identity; the loss of one batch falls; what was saved is loaded, and fits its own scan alone."""
    monkeypatch.setattr(opponents, "NOTE_S", 0.0)
    config = TrainConfig(minutes=1.0, stages=((0.0, 16, 4),), network=TINY, rate=1e-2)
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    training = opponents.Training(config, tmp_path)
    with torch.no_grad():
        assert float((training.net(x) - x).abs().max()) < 0.25 * 8**-0.5  # the last bias, of 8 channels
    training.count["cpu_s"] = 1.0  # past the warm-up, where the rate is 0
    losses = [training.step(x, 0.5 * x) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    training.save()
    again = opponents.Training(config, tmp_path)
    assert again.count["steps"] == 40 and all(map(torch.equal, again.net.parameters(), training.net.parameters()))
    sources = [Source("a", "CT", (np.full((20, 20), 0.2, np.float32),), "a")]
    part = opponents.Slices(sources, 0), opponents.Scanner(6), lambda net: 1.0
    assert not again.run(*part, lambda: again.count["steps"] == 42)
    again = opponents.Training(config, tmp_path)
    again.count["cpu_s"] = 59.8  # near the end
    assert again.count["steps"] == 42 and again.run(*part)
    assert again.progress == 1 and "core-minutes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no training"):
        opponents.load_trained(tmp_path)
    opponents.write_json(tmp_path / opponents.TASK, {"op": "ct-sparse", "views": 6})
    trained = opponents.load_trained(tmp_path)
    assert trained.steps == again.count["steps"] > 40 and trained.core_minutes == again.count["cpu_s"] / 60
    damaged(tmp_path)
    assert trained.fits("ct-sparse", {"views": 6}) and not trained.fits("ct-sparse", {"views": 7})
    operator = build("ct-sparse", (18, 20), (2.0, 2.0), views=6)
    problem = whiten(torch.rand(2, *operator.out_shape), operator, 1.0, scale=MU_WATER_PER_MM, shift=MU_WATER_PER_MM)
    image = trained.image(problem)
    padded = torch.nn.functional.pad(pseudo_inverse(problem)[0], (0, 0, 0, 2), value=-1.0)
    with torch.no_grad():
        assert torch.allclose(image[0], again.ema(padded)[..., :18, :], atol=1e-5)
