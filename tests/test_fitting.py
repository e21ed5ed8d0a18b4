"""Priors on images that they were not made for: tiles, colours, complex images, refusals and warnings."""

import json
import logging
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_networks import OPTIONS, normaliser
from test_solver_cost import Live

from invdiff.errors import Interrupted, PriorError, UsageError
from invdiff.files import sha256_file
from invdiff.fitting import fit_prior, mismatches, out_of_range
from invdiff.linalg import to_complex
from invdiff.opening import open_case
from invdiff.operators import build
from invdiff.priors import load_prior
from invdiff.priors.base import Prior, PriorInfo
from invdiff.priors.complex import PhaseCorrected, RealImaginary
from invdiff.priors.foreign import ImportOptions, open_foreign
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.gray import Gray
from invdiff.priors.network import NetworkPrior
from invdiff.priors.options import PriorOptions
from invdiff.priors.tiled import Tiled, cuts
from invdiff.problem import whiten
from invdiff.runner import Request, reconstruct
from invdiff.stopping import Stop

SCAN = ("--op", "ct-sparse", "--simulate", "--views", "12", "--steps", "2", "--slices", "0:2")


class Local(Prior):
    """Means of squares of 2 r + 1 pixels, zeros beyond the edge; sees exactly r pixels far. Notes what it was given."""

    def __init__(self, radius: int, chunk: int = 3, **info):
        self.info, self.chunk, self.radius = PriorInfo("local", **info), chunk, radius
        self.shapes: list[tuple[int, ...]] = []

    def denoise(self, x, sigma, context=None):
        self.shapes.append(tuple(x.shape))
        self.calls += x[..., 0, 0, 0].numel()
        flat, side = x.reshape(-1, 1, *x.shape[-2:]), 2 * self.radius + 1
        kernel = torch.arange(1.0, side * side + 1, dtype=x.dtype).reshape(1, 1, side, side) / side**4
        return (sigma * F.conv2d(flat, kernel, padding=self.radius)).reshape(x.shape)


def images(*sides: int, slices: int = 2, channels: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(1, slices, channels, *sides, generator=g, dtype=torch.float64)


def problem(*shape: int, op: str = "denoise", slices: int = 2):
    operator = build(op, shape, (1.0, 1.0))
    return whiten(torch.zeros(slices, *operator.out_shape) + 0.1, operator, 1.0)


@pytest.mark.parametrize("sides", [(64, 64), (33, 70), (32, 71), (80, 32), (24, 47)])
@pytest.mark.parametrize(("tile", "overlap"), [(32, 16), (32, 13), (24, 8)])
def test_tiles_of_a_local_denoiser_leave_no_trace(sides, tile, overlap):
    """What sees no further than the quarter of the overlap that has no weight gives the whole slice, to the corners."""
    local, x = Local(overlap // 4), images(*sides)
    whole = local.denoise(x, 0.7)
    tiled = Tiled(local, tile, overlap)
    got = tiled.denoise(x, 0.7)
    assert got.dtype == x.dtype and float((got - whole).abs().max()) < 1e-12
    if max(sides) > tile:
        further = Local(overlap // 4 + 2)
        assert float((Tiled(further, tile, overlap).denoise(x, 0.7) - further.denoise(x, 0.7)).abs().max()) > 1e-3


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("length", [64, 65, 95, 96, 97, 150, 512])
def test_weights_are_a_smooth_partition_of_one(length, stride):
    tile, overlap = 64, 20
    found, total = cuts(length, tile, overlap, stride), torch.zeros(length, dtype=torch.float64)
    for place, weight in found:
        total[place] += weight
        steps = (weight[1:] - weight[:-1]).abs()
        assert len(weight) == min(tile, length) and steps.max() < 0.5 * math.pi / (overlap / 2)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-12)
    starts = [place.start for place, _ in found]
    assert all(start % stride == 0 for start in starts[:-1]) and found[-1].place.stop == length
    assert all(a + tile - b >= overlap for a, b in pairwise(starts))
    for k, (_, weight) in enumerate(found):
        quarter = overlap // 4
        assert k == 0 or not weight[:quarter].any()
        assert k == len(found) - 1 or not weight[-quarter:].any()
    assert found[0].weight[0] == 1 and found[-1].weight[-1] == 1


def test_tiles_go_through_the_network_in_its_chunks_and_slices_alone_give_the_same_bits():
    local, x = Local(1, chunk=3), images(64, 40, slices=3)
    tiled = Tiled(local, 32, 8)
    got = tiled.denoise(x, 0.5)
    count = len(cuts(64, 32, 8)) * len(cuts(40, 32, 8))
    assert {shape[2:] for shape in local.shapes} == {(1, 32, 32)} and max(shape[1] for shape in local.shapes) == 3
    assert len(local.shapes) == math.ceil(3 * count / 3) and tiled.calls == 3 * count
    alone = torch.cat([tiled.restrict(slice(i, i + 1)).denoise(x[:, i : i + 1], 0.5) for i in range(3)], 1)
    assert torch.equal(alone, got)
    tiled.chunk = 2
    assert local.chunk == 2 and torch.allclose(tiled.denoise(x, 0.5), got)
    small = images(32, 20)
    assert torch.equal(tiled.denoise(small, 0.5), local.denoise(small, 0.5))


def test_tiles_hold_no_more_than_the_result_and_one_chunk():
    """Beside the result, of a chunk of tiles at most: tiles, what the denoiser makes of them, a weighted one."""
    tiled, x = Tiled(Local(1, chunk=2), 32, 8), images(80, 80)
    tile = 8 * 32 * 32
    with Live() as live:
        tiled.denoise(x, 0.5)
    assert live.peak < 8 * x.numel() + 2 * 4 * tile + 4 * tile


def test_tiles_are_differentiable():
    """The gradient of a tiled linear denoiser is its transpose, as of the untiled one."""
    local, x, v = Local(2), images(50, 40).requires_grad_(), images(50, 40, slices=2).flip(-1)
    (whole,) = torch.autograd.grad(local.denoise(x, 0.7), x, v)
    (tiled,) = torch.autograd.grad(Tiled(local, 32, 8).denoise(x, 0.7), x, v)
    assert torch.allclose(tiled, whole, atol=1e-12)


@pytest.mark.parametrize(("tile", "overlap"), [(30, 8), (8, 4), (32, 17), (32, 3), (0, None)])
def test_sides_that_make_no_tiles_are_refused(tile, overlap):
    local = Local(1)
    local.stride = 8
    with pytest.raises(UsageError, match=r"tiles of .* multiple of 8, at least 16"):
        Tiled(local, tile, overlap)


def test_a_grey_image_under_a_colour_prior_is_the_exact_grey_prior():
    """Channels exchangeable: covariance (a 1 + b 11') x K has grey values of covariance (a / 3 + b) K."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=g, dtype=torch.float64)
    kernel, mean = root @ root.T / 6, torch.randn(1, 2, 3, generator=g, dtype=torch.float64)
    mixing = 0.3 * torch.eye(3, dtype=torch.float64) + 0.8
    colour = GaussianPrior(mean.expand(3, 2, 3), torch.kron(mixing, kernel))
    grey, exact = Gray(colour), GaussianPrior(mean, (0.3 / 3 + 0.8) * kernel)
    x = images(2, 3, slices=4)
    for sigma in (0.05, 0.6, 4.0):
        assert torch.allclose(grey.denoise(x, sigma), exact.denoise(x, sigma), atol=1e-10)
    assert grey.info.channels == 1 and grey.restrict(slice(0, 1)).info.channels == 1


def test_noise_levels_of_a_colour_prior_are_a_root_of_three_smaller_on_grey_images():
    info = Gray(Local(1, channels=3, sigma_min=0.3, sigma_max=30.0)).info
    assert (info.sigma_min, info.sigma_max) == pytest.approx((0.3 / 3**0.5, 30 / 3**0.5))


def test_parts_of_a_complex_image_meet_the_prior_in_its_range():
    """2 D(x / 2; sigma / 2) of a Gaussian N(m, v) is that of N(2 m, 4 v), real and imaginary part alike."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 2, 2, generator=g, dtype=torch.float64)
    covariance = torch.diag(torch.tensor([0.1, 0.4, 0.9, 2.0], dtype=torch.float64))
    within = GaussianPrior(mean, covariance)
    within.info = replace(within.info, sigma_min=0.01, sigma_max=10.0)
    prior, exact = RealImaginary(within), GaussianPrior(2 * mean, 4 * covariance)
    x = images(2, 2, slices=3, channels=2)
    expected = torch.cat([exact.denoise(x[..., :1, :, :], 0.7), exact.denoise(x[..., 1:, :, :], 0.7)], -3)
    assert torch.allclose(prior.denoise(x, 0.7), expected, atol=1e-12)
    assert (prior.info.channels, prior.info.value_range, prior.info.sigma_max) == (2, (-2, 2), 20.0)
    assert within.calls == 6


def test_priors_are_fitted_to_channels_and_size():
    auto, whole = PriorOptions(), PriorOptions(tile="none")
    grey = problem(40, 36)
    assert type(fit_prior(Local(1), grey, auto)) is Local
    assert type(fit_prior(Local(1, size=40), grey, auto)) is Local
    tiled = fit_prior(Local(1, size=32), grey, auto)
    assert isinstance(fit_prior(Local(1, size=38), grey, auto), Tiled)
    assert isinstance(tiled, Tiled) and (tiled.tile, tiled.overlap) == (32, 8)
    assert type(fit_prior(Local(1, size=32), grey, whole)) is Local
    chosen = fit_prior(Local(1, size=32), grey, PriorOptions.of({"tile": "24", "overlap": "6"}))
    assert (chosen.tile, chosen.overlap) == (24, 6)
    assert isinstance(fit_prior(Local(1, channels=3), grey, auto), Gray)
    mri = problem(40, 36, op="mri")
    assert isinstance(fit_prior(Local(1), mri, auto), PhaseCorrected)
    assert isinstance(fit_prior(Local(1), mri, PriorOptions(complex="parts")), RealImaginary)
    assert type(fit_prior(Local(1, channels=2), mri, auto)) is Local
    everything = fit_prior(Local(1, channels=3, size=32), mri, auto)
    assert isinstance(everything, PhaseCorrected) and len(everything.info.adapted) == 3
    assert isinstance(everything.prior, Gray) and isinstance(everything.prior.prior, Tiled)
    for channels, wanted, what in ((2, grey, "images of 1"), (4, grey, "images of 1"), (4, mri, "complex images of 2")):
        with pytest.raises(PriorError, match=f"one of {channels} channels, the data are {what}: use another prior"):
            fit_prior(Local(1, channels=channels), wanted, auto)


def test_a_network_of_our_own_is_in_bfloat16_where_the_processor_has_it(monkeypatch):
    """The error is a part of sigma, whatever the image; weights and results stay in float32."""
    prior, grey = load_prior("embedded"), problem(32, 32)
    for flags, precision in (({"avx2"}, "float32"), ({"avx512_bf16"}, "bfloat16")):
        monkeypatch.setattr("invdiff.priors.precision._cpu_flags", lambda flags=flags: flags)
        assert fit_prior(prior, grey, PriorOptions()).info.precision == precision
    assert fit_prior(prior, grey, PriorOptions(precision="float32")) is prior
    low = fit_prior(prior, grey, PriorOptions(precision="bfloat16"))
    assert low.info == replace(prior.info, precision="bfloat16") and low.net is prior.net
    x = images(32, 32).float().requires_grad_()
    for sigma in (0.01, 0.1, 1.0):
        exact, near = prior.denoise(x, sigma), low.denoise(x, sigma)
        assert near.dtype == torch.float32 and 0 < (near - exact).square().mean().sqrt() < 0.01 * sigma
    (gradient,) = torch.autograd.grad(near.sum(), x)
    assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all()
    assert low.calls == 6 and prior.calls == 6


class Foreign(torch.nn.Module):
    """A network that is none of our own."""

    stride = 16

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, sigma):
        return self.net(x, sigma)


def test_bfloat16_is_for_networks_in_float32(monkeypatch):
    """Foreign ones only when asked: what theirs predict may be multiplied by more than sigma."""
    monkeypatch.setattr("invdiff.priors.precision._cpu_flags", lambda: {"avx512_bf16"})
    grey, asked = problem(32, 32), PriorOptions(precision="bfloat16")
    with pytest.raises(PriorError, match=r"local is no network: drop prior.precision"):
        fit_prior(Local(1), grey, asked)
    prior = load_prior("embedded")
    half = NetworkPrior(prior.net, replace(prior.info, precision="float16"))
    assert fit_prior(half, grey, PriorOptions()) is half
    with pytest.raises(PriorError, match=r"embedded runs in float16: drop prior.precision"):
        fit_prior(half, grey, asked)
    foreign = NetworkPrior(Foreign(prior.net), prior.info)
    assert fit_prior(foreign, grey, PriorOptions()) is foreign
    assert fit_prior(foreign, grey, asked).info.precision == "bfloat16"


def test_phase_correction_serves_an_image_of_constant_phase_as_its_magnitude():
    """Both adaptors leave a clean image as it is where the prior does; only the first knows where the middle is."""
    mri = problem(16, 16, op="mri")

    class Idle(Local):
        def denoise(self, x, sigma, context=None):
            return x

    x = images(16, 16, channels=2)
    for way in ("phase", "parts"):
        got = fit_prior(Idle(1), mri, PriorOptions(complex=way)).denoise(x, 0.3)
        assert torch.allclose(to_complex(got), to_complex(x), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"tiles": "3"},
            r"unknown prior\.tiles: choose one of tile, .*, precision \(did you mean 'tile'\?\)",
        ),
        ({"tile": "some"}, "prior.tile takes auto or none or a positive number of pixels, got some"),
        ({"tile": "0"}, "got 0"),
        ({"overlap": "none"}, "prior.overlap takes auto or"),
        ({"complex": "polar"}, "unknown value of prior.complex 'polar'"),
        ({"planes": "coronal"}, "unknown value of prior.planes 'coronal': choose one of all, auto, slices"),
        ({"precision": "half"}, "unknown value of prior.precision 'half': choose one of auto, bfloat16, float32"),
    ],
)
def test_other_options_are_refused(given, words):
    with pytest.raises(UsageError, match=words):
        PriorOptions.of(given)


def network(path, **flags):
    torch.save(normaliser(), path)
    path.with_suffix(".json").write_text(json.dumps(OPTIONS | flags))
    return path


def test_the_size_of_a_network_with_attention_is_read_or_said(run, tmp_path):
    file = network(tmp_path / "net.pt", image_size=256)
    assert load_prior(file).info.size == 256
    assert open_foreign(file, ImportOptions(size=320)).card["info"]["size"] == 320
    shown = run("priors", "info", file, "--modality", "CT")[1].splitlines()
    lines = {name: rest.strip() for name, _, rest in (line.partition(" ") for line in shown)}
    assert (lines["info.size"], lines["info.modality"], lines["info.value_range"]) == ("256", "CT", "(-1.0, 1.0)")
    assert lines["convention.network_range"] == "(-1.0, 1.0)"
    from deepinv.models import DRUNet

    torch.save(DRUNet(1, 1, nc=(8, 8, 8, 8), nb=1, pretrained=None).state_dict(), tmp_path / "drunet.pth")
    (tmp_path / "drunet.yaml").write_text("image_size: 128\n")
    assert open_foreign(tmp_path / "drunet.pth").card["info"]["size"] is None


def test_a_run_says_what_does_not_fit_before_it_starts_and_records_it(run, here):
    """A prior of MR of 32 pixels with a narrow range, on CT of 36 x 40 pixels of 9 mm."""
    logging.getLogger("invdiff").setLevel(logging.WARNING)  # an earlier --quiet hushed this process
    file = network(here / "net.pt", image_size=32)
    options = ("--modality", "MR", "--prior-range=-0.2,-0.1", "--no-check")
    assert run("priors", "import", file, "-o", "safe", *options)[0] == 0
    code, out, err = run("reconstruct", "$/ct.nii.gz", *SCAN, "--prior", "safe", "-o", "r.nii.gz")
    assert code == 0, err
    said = ["the prior was made for MR, the data are CT", "prior net, for slices of 36 x 40 pixels: tiles of 32"]
    start = out.index("pnp")
    for words in said:
        assert out.count(words) == 1 and 0 <= out.index(words) < start, words
    assert "% of the result lie outside -200 to -100 HU" in out
    record = json.loads((here / "r.json").read_text())
    assert sum(any(words in line for line in record["warnings"]) for words in said) == 2
    found = record["prior"]
    assert (found["name"], found["format"], found["precision"], found["file"], found["size"]) == (
        *("net", "adm", "float32", "model.safetensors", 32),
    )
    assert found["adapted"] == ["tiles of 32 pixels, overlapping by 8"] and len(found["settings_sha256"]) == 64
    code, out, err = run("reconstruct", "$/ct.nii.gz", *SCAN, "--prior", "safe", "-o", "d.nii.gz", "--dry-run")
    assert code == 0 and err.count("\n") == 2 and "tiles of 32 pixels" in err and "warning" not in out


def test_a_run_goes_on_with_the_same_prior_in_the_same_way_only(world, tmp_path):
    file = network(tmp_path / "net.pt")
    case = {"input": world / "ct.nii.gz", "simulate": True, "operator": {"views": 12}, "slices": (0, 1), "steps": 2}
    request = Request(prior=file, checkpoint=tmp_path / "c", compare=(), **case)
    stop = Stop()
    stop.asked = "SIGTERM"
    with pytest.raises(Interrupted):
        reconstruct(request, stop=stop)
    again = replace(request, resume=True)
    with pytest.raises(UsageError, match=r"another run \(prior adapted \['tiles of .* -> \[\]\)"):
        reconstruct(replace(again, prior_options={"tile": "none"}))
    with pytest.raises(
        UsageError, match=r"another run \(prior settings_sha256 [0-9a-f]{12}\.\.\. -> [0-9a-f]{12}\.\.\.\)"
    ):
        reconstruct(replace(again, prior=network(file, rescale_timesteps=True, steps=1000)))
    network(file)
    record = reconstruct(again).record["prior"]
    assert (record["file"], record["name"], record["sha256"]) == ("net.pt", "net", sha256_file(file))


def test_sizes_and_ranges_that_differ_are_named(world):
    """Slices of 36 x 40 pixels for priors of 32 (not tiled), 64 and 81; a result with 2 % beyond."""
    problem_, case = problem(36, 40), open_case(Request(world / "ct.nii.gz", simulate=True, operator={"views": 3}))
    said = {size: mismatches(Local(1, size=size), problem_, case) for size in (32, 64, 81)}
    assert said[64] == [] and said[81] == ["slices of 36 x 40 pixels: the prior was trained on 81 x 81"]
    assert said[32] == ["slices of 36 x 40 pixels: the prior was trained on 32 x 32"]
    stack, prior = np.zeros((1, 10, 10)), Local(1, value_range=(-0.5, 0.5))
    stack[0, 0, :3], stack[0, 1, :3] = 549.0, -549.0
    assert out_of_range(prior, case, stack) == []
    stack[0, 0, 0] = stack[0, 1, 0] = 551.0
    (text,) = out_of_range(prior, case, stack)
    assert text.startswith("2.0 % of the result lie outside -500 to 500 HU, the range that the prior saw")
