"""A prior of the latents of an autoencoder."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from invdiff.errors import ShapeError
from invdiff.priors.base import Prior
from invdiff.priors.wrapper import Wrapper

Coder = Callable[[Tensor], Tensor]


class LatentPrior(Wrapper):
    """A prior ``p(z)`` of latents, and the autoencoder between them and images: x = decode(z), z = encode(x).

    ``denoise`` acts on latents, whose noise is that of solvers: z = z0 + sigma n. Solvers that need the gradient of the
    data term only run on the problem that :func:`invdiff.latent.latent_problem` makes of one of images.

    Args:
        prior: of latents ``(..., c, h, w)`` as the denoiser saw them, times ``scale``.
        encoder, decoder: ``(batch, C, H, W)`` in the range of solvers to ``(batch, c, h, w)``, and back.
        channels: C.
        factor: H / h, also for columns.
        scale, shift: z = scale (encoder(x) - shift); latent diffusion calls them scaling and shift factor.
        sha256: of the autoencoder's weights, for manifests, or None.

    ``info.size`` is in pixels of the images.
    """

    def __init__(
        self,
        prior: Prior,
        encoder: Coder,
        decoder: Coder,
        channels: int,
        factor: int,
        scale: float = 1.0,
        shift: float = 0.0,
        sha256: str | None = None,
    ):
        how = "prior of the latents of an autoencoder" + (f", sha256 {sha256}" if sha256 else "")
        size = None if prior.info.size is None else factor * prior.info.size
        super().__init__(prior, how, size=size)
        self.sha256 = sha256
        self.kind = "latents" if prior.kind == "mean" else prior.kind
        self.encoder, self.decoder = encoder, decoder
        self.channels, self.factor, self.scale, self.shift = channels, factor, float(scale), float(shift)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(..., c, h, w)`` of images ``(..., C, H, W)``.

        Raises:
            ShapeError: other channels, or sides that are no multiples of the factor.
        """
        *batch, channels, rows, columns = shape
        if channels != self.channels or rows % self.factor or columns % self.factor:
            raise ShapeError(
                f"prior {self.info.name}: its autoencoder takes {self.channels} channels and sides of a multiple of "
                f"{self.factor} pixels, the images are {channels} x {rows} x {columns}; crop or pad them"
            )
        return (*batch, self.info.channels, rows // self.factor, columns // self.factor)

    def encode(self, x: Tensor) -> Tensor:
        """Latents of images; differentiable."""
        return self.scale * (self._in_chunks(self.encoder, x, self.latent_shape(tuple(x.shape))) - self.shift)

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents; differentiable, with the activations of ``chunk`` slices at a time."""
        *batch, _, rows, columns = z.shape
        shape = (*batch, self.channels, self.factor * rows, self.factor * columns)
        return self._in_chunks(self.decoder, z / self.scale + self.shift, shape)

    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        """See :class:`Prior`; of latents."""
        return self.prior.denoise(x, sigma, context)

    def denoise_image(self, x: Tensor, sigma: float) -> Tensor:
        """decode(denoise(encode(x); scale sigma)) of images x = x0 + sigma n.

        This is E[x0 | x] where the encoder is linear with orthonormal rows and the decoder its transpose, since then
        the noise of encode(x) has the standard deviation scale sigma. Other encoders have not learned to see noise.
        """
        return self.decode(self.denoise(self.encode(x), self.scale * sigma))

    def restrict(self, slices: slice) -> "LatentPrior":
        """The prior of those slices."""
        rest = (self.encoder, self.decoder, self.channels, self.factor, self.scale, self.shift, self.sha256)
        return LatentPrior(self.prior.restrict(slices), *rest)

    def gray(self) -> "LatentPrior":
        """The same for grey images, which the autoencoder sees in equal channels and gives back as their mean."""
        count, encoder, decoder = self.channels, self.encoder, self.decoder
        found = LatentPrior(
            self.prior,
            lambda x: encoder(x.expand(-1, count, -1, -1)),
            lambda z: decoder(z).mean(1, keepdim=True),
            1,
            *(self.factor, self.scale, self.shift, self.sha256),
        )
        how = f"colour autoencoder: {count} equal channels in, their mean out"
        found.info = replace(found.info, adapted=(*found.info.adapted, how))
        return found

    def _in_chunks(self, f: Coder, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        flat = x.reshape(-1, *x.shape[-3:]).split(self.chunk)
        graph = torch.is_grad_enabled() and x.requires_grad
        return torch.cat([checkpoint(f, part, use_reentrant=False) if graph else f(part) for part in flat]).reshape(
            shape
        )
