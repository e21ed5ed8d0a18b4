"""What a training minimises: objectives by hand, classes, measured pixels, bfloat16; tiny networks."""

import json
import math

import numpy as np
import pytest
import torch
from training_cases import FAST, QUIET, SMALL, flat, noise_source, random_net

from invdiff.errors import PriorError
from invdiff.priors import load_prior
from invdiff.priors.masking import Measured, mask_slice, shown
from invdiff.priors.objective import Objective, edm_loss, measured_loss, stable_target
from invdiff.priors.precision import has_bfloat16
from invdiff.priors.train import TrainConfig, Trainer
from invdiff.priors.training_data import CropSampler, Source
from invdiff.priors.unet import EDMDenoiser, UNetConfig


class Constant(torch.nn.Module):
    """A network that returns 3 everywhere, whatever it is given."""

    def forward(self, x, *args):
        return torch.full_like(x[:, :1], 3.0)


# --- objectives ---


def test_stable_target_of_two_references_is_the_one_worked_out_by_hand():
    """z = 0.3, references 0 and 1, one pixel: weights 1 / (1 + e^(-0.2/sigma^2)) and the rest."""
    z, sigma = torch.full((2, 1, 1, 1), 0.3), torch.tensor([0.5, 2.0])
    reference = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    share = [1 / (1 + math.exp(0.2 / s**2)) for s in (0.5, 2.0)]  # (0.7^2 - 0.3^2) / 2 = 0.2
    assert stable_target(z, sigma, reference).flatten().tolist() == pytest.approx(share, abs=1e-6)
    four = stable_target(z.expand(2, 1, 2, 2), sigma, reference.expand(2, 1, 2, 2))  # distances add over pixels
    assert four[0].flatten().tolist() == pytest.approx([1 / (1 + math.exp(0.8 / 0.25))] * 4, abs=1e-6)
    only = torch.tensor([[True, False], [False, True]])
    assert stable_target(z, sigma, reference, only).flatten().tolist() == [0.0, 1.0]


def test_one_reference_is_the_objective_of_edm():
    net, g = random_net(), torch.Generator().manual_seed(0)
    x, noise = torch.randn(1, 1, 8, 8, generator=g), torch.randn(1, 1, 8, 8, generator=g)
    sigma = torch.tensor([0.7])
    plain = edm_loss(net, x, sigma, noise)
    assert torch.equal(Objective(net)(x, sigma, noise, reference=x), plain)
    other = torch.cat([x, x + 0.1])
    assert not torch.allclose(Objective(net)(x, sigma, noise, reference=other), plain, rtol=1e-4)


def test_the_trainer_hands_on_references_of_the_same_class_only(tmp_path):
    config = TrainConfig(**FAST, reference=6, classes=("CT", "image"), class_dropout=0.5)
    trainer = Trainer(config, [noise_source(0), noise_source(1, "b", "image")], tmp_path)
    x, classes = next(trainer._batches(16, 4))
    assert x.shape == (6, 1, 16, 16) and set(classes.tolist()) == {1, 2}
    seen = []
    for _ in range(60):
        told = trainer._conditions(x, classes, 4)
        for k in range(4):
            number = int(told["kind"][k])
            assert number in (0, int(classes[k]))
            assert told["allowed"][k].tolist() == [number in (0, int(c)) for c in classes]
            seen.append(number == 0)
    assert 0.4 < np.mean(seen) < 0.6 and torch.equal(told["reference"], x)


def test_measured_pixels_weigh_as_published_and_hidden_ones_not_at_all():
    """D of the constant network, pixel by pixel: shown, measured but not shown, and never measured."""
    config = UNetConfig(channels=(8, 8), blocks=(1, 1), patch=2, embedding=16, masked=True)
    net = EDMDenoiser(config)
    net.net = Constant()
    net.net.config = config
    x = torch.tensor([0.2, -0.4, float("nan"), 0.6]).view(1, 1, 2, 2)
    given = torch.tensor([True, False, False, True]).view(1, 1, 2, 2)
    noise, s, sd = torch.tensor([1.0, 2.0, 3.0, -1.0]).view(1, 1, 2, 2), 0.3, 0.5
    skip, out = sd**2 / (s**2 + sd**2), s * sd / math.hypot(s, sd)
    first = skip * (0.2 + s) + out * 3 - 0.2
    last = skip * (0.6 - s) + out * 3 - 0.6
    hidden = sd * 3 + 0.4
    wanted = (first**2 / out**2 + last**2 / out**2 + hidden**2 / sd**2) / 3
    assert measured_loss(net, x, given, torch.tensor([s]), noise).item() == pytest.approx(wanted, rel=1e-5)


def test_with_everything_measured_and_shown_it_is_the_objective_of_edm():
    net = random_net(UNetConfig(channels=(8, 8), blocks=(1, 1), patch=2, embedding=16, masked=True))
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(3, 1, 8, 8, generator=g), torch.randn(3, 1, 8, 8, generator=g)
    sigma = torch.tensor([0.1, 1.0, 5.0])
    whole = measured_loss(net, x, torch.ones_like(x, dtype=torch.bool), sigma, noise)
    assert torch.allclose(whole, edm_loss(net, x, sigma, noise), rtol=1e-5)


def test_what_is_not_shown_does_not_reach_a_masked_network():
    net = random_net(UNetConfig(channels=(8, 8), blocks=(1, 1), patch=2, embedding=16, masked=True))
    x, sigma = torch.randn(1, 1, 8, 8), torch.tensor([0.2])
    given = torch.rand(1, 1, 8, 8) < 0.5
    changed = torch.where(given, x, x + 1)
    assert torch.equal(net(x, sigma, None, given), net(changed, sigma, None, given))
    assert not torch.equal(net(x, sigma), net(changed, sigma))
    assert not torch.equal(net(x, sigma, None, given), net(torch.where(given, x, 0.0), sigma))  # it is told which


@pytest.mark.parametrize("block", [1, 3])
def test_masks_keep_their_share_in_blocks_and_nothing_else(block):
    measured = Measured(0.6, 0.7, block)
    image = np.arange(90 * 120, dtype=np.float32).reshape(90, 120)
    masked = mask_slice(image, measured, np.random.default_rng(0))
    kept = np.isfinite(masked)
    assert np.array_equal(masked[kept], image[kept]) and abs(kept.mean() - 0.6) < 0.06
    x = torch.from_numpy(masked)[None, None].repeat(60, 1, 1, 1)
    given = shown(x, measured, torch.Generator().manual_seed(0))
    assert not (given & ~x.isfinite()).any() and not torch.equal(given[0], given[1])
    shares = given.sum((1, 2, 3)) / x[0].isfinite().sum()
    assert shares.min() > 0.7 - 0.04 and shares.max() > 0.97 and abs(shares.mean() - 0.85) < 0.03
    inside = kept[:, 1:] == kept[:, :-1]
    assert abs(inside.mean() - (1 - 2 * 0.6 * 0.4 / block)) < 0.05  # pixels of one block agree


def test_a_slice_is_measured_once_and_crops_keep_what_was_not():
    sampler = CropSampler([noise_source()], {}, 0, 3, Measured(0.5))
    known = [np.isfinite(s) for s in sampler.sources[0].slices]
    again = CropSampler([noise_source()], {}, 0, 7, Measured(0.5))  # as after a resume, or in another process
    assert all(np.array_equal(a, np.isfinite(b)) for a, b in zip(known, again.sources[0].slices, strict=True))
    batch = next(sampler.batches(24, 8))
    turned = [
        torch.from_numpy(np.ascontiguousarray(np.rot90(m, k)[:, ::s])) for m in known for k in range(4) for s in (1, -1)
    ]
    assert all(any(torch.equal(x[0].isfinite(), m) for m in turned) for x in batch)


def test_masked_phantoms_teach_nearly_what_whole_ones_do(tmp_path):
    """40 % of the pixels of every training slice are never seen: missing pixels are filled in far better than by the
    mean, and denoising of whole images comes near to a network that was trained on them."""
    rng = np.random.default_rng(0)

    def smooth(count):
        from scipy.ndimage import gaussian_filter

        return tuple(
            (6 * gaussian_filter(rng.normal(0, 0.35, (32, 32)), 3, mode="wrap")).astype(np.float32)
            for _ in range(count)
        )

    options = FAST | {"network": SMALL, "stages": ((0.0, 16, 8),), "steps": 160, "rate": 1e-2, "ema": 0.97}
    train, unseen = Source("s", "CT", smooth(60), "s"), torch.from_numpy(np.stack(smooth(8)))[:, None]
    nets = {}
    for name, measured in (("whole", None), ("masked", Measured(0.6))):
        trainer = Trainer(TrainConfig(**options, measured=measured), [train], tmp_path / name)
        assert trainer.run(QUIET)
        nets[name] = trainer.ema
    g = torch.Generator().manual_seed(1)
    given, sigma = torch.rand(unseen.shape, generator=g) < 0.5, torch.full((8,), 0.05)
    noisy = unseen + 0.05 * torch.randn(unseen.shape, generator=g)

    def error(estimate, where):
        return ((estimate - unseen)[where] ** 2).mean().sqrt().item()

    with torch.no_grad():
        filled = error(nets["masked"](torch.where(given, noisy, 0.0), sigma, None, given), ~given)
        assert filled < 0.5 * error(noisy[given].mean(), ~given)
        noisy, sigma = unseen + 0.3 * torch.randn(unseen.shape, generator=g), torch.full((8,), 0.3)
        everywhere = torch.ones_like(given)
        whole, masked = (error(nets[name](noisy, sigma), everywhere) for name in ("whole", "masked"))
    assert whole < 0.3 * 0.3 and masked < 1.4 * whole, (whole, masked)
    prior = load_prior(tmp_path / "masked")
    assert torch.allclose(prior.denoise(noisy[None, :1], 0.3)[0], nets["masked"](noisy[:1], sigma[:1]), atol=2e-2)


def test_bfloat16_leaves_weights_and_loss_in_float32():
    net, g = random_net(), torch.Generator().manual_seed(0)
    x, noise, sigma = (
        torch.randn(4, 1, 16, 16, generator=g),
        torch.randn(4, 1, 16, 16, generator=g),
        torch.full((4,), 0.5),
    )
    exact, low = (Objective(net, name)(x, sigma, noise) for name in ("float32", "bfloat16"))
    assert low.dtype == torch.float32 and low != exact and low.item() == pytest.approx(exact.item(), rel=0.02)
    low.backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in net.parameters())


def test_auto_asks_the_processor(monkeypatch):
    cpu, net = torch.device("cpu"), random_net()
    x, noise, sigma = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.ones(1)
    for flags, able in (({"avx2"}, False), ({"avx2", "avx512_bf16"}, True), (set(), False)):
        monkeypatch.setattr("invdiff.priors.precision._cpu_flags", lambda flags=flags: flags)
        assert has_bfloat16(cpu) is able
        name = "bfloat16" if able else "float32"
        assert torch.equal(Objective(net, "auto")(x, sigma, noise), Objective(net, name)(x, sigma, noise))


# --- classes ---


def test_classes_are_learnt_loaded_and_told_apart(tmp_path):
    """Two modalities of one grey each: with almost nothing to see, the answer is the grey of the class that is told."""
    options = FAST | {"network": SMALL, "steps": 120, "rate": 1e-2, "ema": 0.9, "log_sigma": (2.3, 0.3), "weights": {}}
    config = TrainConfig(**options, classes=("CT", "image"), class_dropout=0.3)
    trainer = Trainer(config, [flat(0.6, "a"), flat(-0.6, "b", "image")], tmp_path / "mix")
    trainer.run(QUIET)
    card = json.loads((tmp_path / "mix" / "config.json").read_text())
    assert card["info"]["classes"] == ["CT", "image"] and card["network"]["classes"] == 2
    prior = load_prior(tmp_path / "mix")
    noise = 10 * torch.randn(1, 6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    unknown, ct, image = (prior.denoise(noise, 10.0, name).mean().item() for name in (None, "CT", "image"))
    assert ct > 0.4 and image < -0.4 and image + 0.2 < unknown < ct - 0.1, (ct, unknown, image)
    chosen = load_prior(f"{tmp_path / 'mix'}:CT")
    assert chosen.info.label == "CT" and chosen.info.name == "mix:CT"
    assert torch.equal(chosen.denoise(noise, 10.0), prior.denoise(noise, 10.0, "CT"))
    for name in (f"{tmp_path / 'mix'}:PET", f"{tmp_path / 'nothing'}:CT"):
        with pytest.raises(PriorError, match=r"its classes are CT, image|unknown prior"):
            load_prior(name)


def test_a_prior_without_classes_takes_none(tmp_path):
    Trainer(TrainConfig(**FAST, steps=1), [flat(0, "a")], tmp_path).run(QUIET)
    with pytest.raises(PriorError, match="has no class 'CT': it has none"):
        load_prior(tmp_path).denoise(torch.zeros(1, 1, 1, 16, 16), 0.1, "CT")
    card = json.loads((tmp_path / "config.json").read_text())
    card["info"]["classes"] = ["CT"]
    (tmp_path / "config.json").write_text(json.dumps(card))
    with pytest.raises(PriorError, match="0 classes, 1 are named"):
        load_prior(tmp_path)


def test_sampler_labels_follow_the_modality():
    sampler = CropSampler([flat(0.5, "a"), flat(-0.5, "b", "image"), flat(0.0, "c", "phantom")], {}, 0, 0)
    x, labels = next(sampler.labelled(16, 40, ("image", "CT")))
    values = {0.5: 2, 0.0: 0}
    for image, label in zip(x, labels.tolist(), strict=True):
        assert label == values.get(round(image.mean().item(), 2), 1)
