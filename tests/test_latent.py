"""Priors of latents: an orthonormal autoencoder, for which everything is known, a curved one, and AutoencoderKL."""

import json
import math

import pytest
import torch

from invdiff.draws import Draws
from invdiff.errors import PriorError, ShapeError, UsageError
from invdiff.latent import Decoded, latent_problem
from invdiff.operator import LinearOperator
from invdiff.priors import load_prior
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.latent import LatentPrior
from invdiff.priors.latent_files import check_autoencoder, load_latent
from invdiff.problem import Problem, whiten
from invdiff.solvers import SOLVERS, make_solver
from invdiff.solvers.base import State, solve

SIDE, SLICES, SCALE, SHIFT = 4, 3, 1.7, 0.2
DOUBLE = torch.float64
G = torch.Generator().manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(16, 4, generator=G, dtype=DOUBLE))[0].T  # 4 orthonormal rows: 4 x 4 pixels to 2 x 2
MEAN = torch.randn(1, 2, 2, generator=G, dtype=DOUBLE)
ROOT = torch.randn(4, 4, generator=G, dtype=DOUBLE)
COVARIANCE = ROOT @ ROOT.T / 4
MATRIX = torch.randn(5, 16, generator=G, dtype=DOUBLE)


class Dense(LinearOperator):
    """Any matrix, slice by slice."""

    def __init__(self, matrix: torch.Tensor, side: int):
        self.matrix, self.in_shape, self.out_shape = matrix, (1, side, side), (1, 1, len(matrix))

    def forward(self, x):
        return (x.flatten(-3) @ self.matrix.T)[..., None, None, :]

    def _adjoint(self, y):
        return (y[..., 0, 0, :] @ self.matrix).reshape(*y.shape[:-3], *self.in_shape)


def prior(decoder=None, chunk: int = 2) -> LatentPrior:
    latents = GaussianPrior(MEAN, COVARIANCE)
    latents.chunk = chunk
    encode = lambda x: (x.flatten(1) @ BASIS.T).reshape(-1, 1, 2, 2)  # noqa: E731
    decode = decoder or (lambda z: (z.flatten(1) @ BASIS).reshape(-1, 1, 4, 4))
    return LatentPrior(latents, encode, decode, 1, 2, SCALE, SHIFT)


def problem(matrix=MATRIX, side=SIDE, shift=None) -> Problem:
    g = torch.Generator().manual_seed(3)
    y = torch.randn(SLICES, 1, 1, len(MATRIX), generator=g, dtype=DOUBLE)
    y = y if shift is None else y - shift
    return Problem(y, Dense(matrix, side), y)


def test_an_orthonormal_autoencoder_denoises_images_exactly():
    """x0 = B' (z / s + c) of z ~ N(m, C) is Gaussian with mean B' (m / s + c) and covariance B' C B / s^2."""
    whole, x = prior(), torch.randn(1, SLICES, 1, SIDE, SIDE, generator=G, dtype=DOUBLE)
    mean = ((MEAN.flatten() / SCALE + SHIFT) @ BASIS).reshape(1, SIDE, SIDE)
    exact = GaussianPrior(mean, BASIS.T @ COVARIANCE @ BASIS / SCALE**2)
    for sigma in (0.05, 0.7, 5.0):
        assert torch.allclose(whole.denoise_image(x, sigma), exact.denoise(x, sigma), atol=1e-10)
    z = torch.randn(1, SLICES, 1, 2, 2, generator=G, dtype=DOUBLE)
    assert torch.allclose(whole.encode(whole.decode(z)), z, atol=1e-12)
    assert torch.equal(whole.restrict(slice(1, 2)).decode(z[:, 1:2]), whole.decode(z)[:, 1:2])


@pytest.mark.parametrize(
    ("name", "options"),
    [("dps", {}), ("dps", {"warm": True, "sampler": "heun"}), ("reddiff", {"warm": False}), ("reddiff", {})],
)
@pytest.mark.parametrize("scaling", ["rows", "norm"])
def test_solvers_of_latents_do_what_they_do_with_the_linear_map_of_latents(name, options, scaling):
    """y = A B' (z / s + c) + n is linear in z: matrix A B' / s, and what the shift measures taken off y."""
    whole = prior()
    inner = latent_problem(problem(), whole)
    offset = SHIFT * BASIS.sum(0) @ MATRIX.T
    linear = problem(MATRIX @ BASIS.T / SCALE, 2, offset)
    linear.operator.origin = inner.operator.origin
    options = options | ({"scaling": scaling} if name == "reddiff" else {})
    solver = make_solver(name, **options)
    sigmas = solver.sigmas(12, inner, whole)
    found = solve(solver, inner, whole, sigmas=sigmas, rng=Draws(4, (0, 1, 2)))
    expected = solve(solver, linear, GaussianPrior(MEAN, COVARIANCE), sigmas=sigmas, rng=Draws(4, (0, 1, 2)))
    assert torch.allclose(found, expected, atol=1e-6)
    assert inner.chi_squared(found) == pytest.approx(problem().chi_squared(whole.decode(found)))


class Silent(Draws):
    """Draws that are all 0."""

    def normal(self, step, like):
        return torch.zeros_like(like)


def test_reddiff_of_latents_ends_at_the_posterior_where_its_weight_fits():
    """Without draws (mu - D(mu)) / sigma = sigma / (v + sigma^2) (mu - m) of a prior N(m, v 1).

    The gradient A'(A mu - y) / a + lam / n times that, a = m |A|^2, is then 1 / a times that of the log posterior for
    lam = n (v + sigma^2) / (a v sigma).
    """
    variance, sigma = 0.5, 1.0
    within, rng = GaussianPrior(MEAN, variance * torch.eye(4, dtype=DOUBLE)), Silent(0, (0, 1, 2))
    whole = LatentPrior(within, prior().encoder, prior().decoder, 1, 2, SCALE, SHIFT)
    inner, sigmas, linear = latent_problem(problem(), whole), [sigma] * 400 + [0.0], MATRIX @ BASIS.T / SCALE
    scale = len(MATRIX) * float(torch.linalg.matrix_norm(linear, 2)) ** 2
    weight = 4 * (variance + sigma**2) / (scale * variance * sigma)
    solver = make_solver("reddiff", lam=weight, optimizer="sgd", lr=0.5, scaling="norm", weighting="const")
    found = solve(solver, inner, whole, sigmas=sigmas, rng=rng)[0]
    for k, y in enumerate(problem().y):
        mean, _ = within.posterior(linear, y.flatten() - SHIFT * BASIS.sum(0) @ MATRIX.T)
        assert torch.allclose(found[k], mean, atol=1e-3)


def curved(z):
    return torch.tanh(z.flatten(1) @ BASIS).reshape(-1, 1, 4, 4) + 0.3


def test_the_gradient_goes_through_a_decoder_that_is_not_linear():
    """A step of DPS by hand, all of it by automatic differentiation: zeta / |A J| grad_z |y - A decode(D(z))|."""
    whole, outer = prior(curved), problem()
    inner = latent_problem(outer, whole)
    solver, rng = make_solver("dps", zeta=0.7), Draws(5, (0, 1, 2))
    sigmas = [2.0, 1.0, 0.0]
    start = solver.init(inner, whole, sigmas, rng)
    z = start.x.clone().requires_grad_()
    x0 = whole.denoise(z, 2.0)
    residual = outer.y - outer.operator(curved((x0 / SCALE + SHIFT).flatten(0, 1)).reshape(1, SLICES, 1, 4, 4))
    (grad,) = torch.autograd.grad(residual.flatten(-3).norm(dim=-1).sum(), z)
    new = solver.step(inner, whole, start, 2.0, 1.0, rng)
    variance = 1.0 * (4 - 1) / 4  # eta^2 sigma'^2 (sigma^2 - sigma'^2) / sigma^2
    moved = x0 + math.sqrt(1 - variance) * (z - x0) / 2 + math.sqrt(variance) * rng.normal(1, x0)
    expected = moved - 0.7 * math.sqrt(5 * 2) / start.memory["norm"] * grad
    assert torch.allclose(new.x, expected.detach(), atol=1e-9)
    for k, norm in enumerate(start.memory["norm"].flatten()):
        measured = lambda z: outer.operator(whole.decode(z)).flatten()  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(measured, inner.operator.origin[k][None]).reshape(5, 4)
        assert float(norm) == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-3)


def test_slices_of_latents_alone_give_what_they_give_together():
    whole, inner = prior(curved), latent_problem(problem(), prior(curved))
    solver = make_solver("reddiff")
    sigmas = solver.sigmas(6, inner, whole)
    together = solve(solver, inner, whole, sigmas=sigmas)
    part = inner.restrict(slice(1, 2))
    alone = solve(solver, part, whole, sigmas=sigmas, rng=Draws(0, (1,)))
    assert torch.allclose(alone, together[:, 1:2], atol=1e-8)


@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in ("dps", "reddiff")])
def test_solvers_that_need_a_linear_operator_refuse_latents_by_name(name):
    solver = make_solver(name)
    with pytest.raises(
        UsageError, match=rf"solver {type(solver).__name__} needs a linear operator.*use dps or reddiff"
    ):
        solve(solver, latent_problem(problem(), prior()), prior())


def test_problems_of_images_refuse_a_prior_of_latents():
    whole = prior()
    for name in ("dps", "pnp"):
        with pytest.raises(PriorError, match=r"one of latents, the problem one of images.*latent_problem"):
            solve(make_solver(name), problem(), whole)
    whole.prior.kind = "endpoint"
    with pytest.raises(PriorError, match="no posterior mean"):
        solve(make_solver("dps"), latent_problem(problem(), whole), whole.restrict(slice(None)))


def test_images_that_do_not_fit_the_autoencoder_are_refused():
    operator = Dense(torch.ones(2, 25, dtype=DOUBLE), 5)
    with pytest.raises(ShapeError, match="1 channels and sides of a multiple of 2 pixels, the images are 1 x 5 x 5"):
        latent_problem(whiten(torch.ones(1, 1, 1, 2, dtype=DOUBLE), operator, 1.0), prior())


def test_a_state_of_latents_is_decoded_to_the_images_shape():
    inner = latent_problem(problem(), prior())
    assert isinstance(inner.operator, Decoded) and inner.image_shape == (SLICES, 1, 2, 2)
    state = State(torch.zeros(1, *inner.image_shape), torch.zeros(1, *inner.image_shape))
    assert prior().decode(state.x0.double()).shape == (1, *problem().image_shape)


VAE = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 2,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.6,
}
UNET = {
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": [16, 16],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "norm_num_groups": 4,
    "add_attention": False,
}


@pytest.fixture
def pipeline(tmp_path):
    """A folder of latent diffusion with random weights, and its autoencoder and network."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'invdiff[diffusers]'")
    torch.manual_seed(0)
    vae, unet = diffusers.AutoencoderKL(**VAE).eval(), diffusers.UNet2DModel(**UNET).eval()
    vae.save_pretrained(tmp_path / "vae")
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    return tmp_path, vae.requires_grad_(False), unet.requires_grad_(False)


def test_latent_diffusion_of_diffusers_is_read_with_its_scaling(pipeline):
    folder, vae, unet = pipeline
    found = load_latent(folder, chunk=2, check=False)
    x = torch.randn(1, 2, 1, 16, 8, generator=G)
    z = 0.6 * vae.encode(x[0]).latent_dist.mean
    assert (found.factor, found.channels, found.scale, found.info.channels) == (2, 1, 0.6, 2)
    assert found.info.name == found.gray().info.name == folder.name  # and not "unet"
    assert torch.allclose(found.encode(x)[0], z, atol=1e-5)
    assert torch.allclose(found.decode(z[None])[0], vae.decode(z / 0.6).sample, atol=1e-5)
    bar = float((1 - torch.linspace(1e-4, 0.02, 1000, dtype=DOUBLE)).cumprod(0)[300])
    sigma = (1 / bar - 1) ** 0.5
    assert torch.allclose(found.denoise(z[None], sigma)[0], z - sigma * unet(bar**0.5 * z, 300).sample, atol=1e-4)
    operator = Dense(torch.randn(9, 256, generator=G), 16)
    outer = whiten(torch.randn(2, 1, 1, 9, generator=G), operator, 0.01)
    for name, options in (("dps", {}), ("reddiff", {"scaling": "norm"})):
        inner, solver = latent_problem(outer, found), make_solver(name, **options)
        sigmas = solver.sigmas(3, inner, found)
        result = found.decode(solve(solver, inner, found, sigmas=sigmas))
        assert result.shape == (1, 2, 1, 16, 16) and bool(torch.isfinite(result).all())
    state = State(inner.operator.origin[None], inner.operator.origin[None])
    (wanted,) = torch.autograd.grad(
        (outer.operator(vae.decode((leaf := state.x[0].clone().requires_grad_()) / 0.6).sample) * outer.y).sum(), leaf
    )
    assert torch.allclose(inner.operator.vjp(state.x, outer.y[None])[0], wanted, rtol=1e-3, atol=1e-2)


def test_latent_diffusion_that_cannot_be_right_is_refused(pipeline, run):
    folder, vae, _ = pipeline
    with pytest.raises(PriorError, match="does not denoise"):
        load_prior(folder)
    with pytest.raises(PriorError, match=r"autoencoder gives an image back with an error of"):
        check_autoencoder(load_latent(folder, check=False), "it", torch.device("cpu"))
    code, _, err = run("priors", "info", folder)
    assert code == 4 and "is latent diffusion" in err
    vae.save_pretrained(folder / "vae", safe_serialization=True)
    config = json.loads((folder / "vae" / "config.json").read_text())
    for change, words in (
        ({"_class_name": "VQModel"}, "is a VQModel, or has means"),
        ({"latent_channels": 3}, r"do not fit AutoencoderKL.*of another shape"),
        ({"norm_num_groups": 3}, "makes no AutoencoderKL"),
    ):
        (folder / "vae" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(PriorError, match=words):
            load_latent(folder, check=False)
