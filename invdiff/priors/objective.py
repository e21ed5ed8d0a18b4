"""What a training minimises: the loss of EDM, with stable targets, with classes, or from measured pixels alone."""

import torch
from torch import Tensor, nn

from invdiff.priors.precision import has_bfloat16
from invdiff.priors.unet import EDMDenoiser


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def edm_loss(
    net: EDMDenoiser,
    x: Tensor,
    sigma: Tensor,
    noise: Tensor,
    kind: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Weighted denoising loss of EDM, lambda(sigma) |D(x + sigma n; sigma) - x|^2 (Karras et al. 2022, equation 8).

    Args:
        net: D.
        x: clean images ``(batch, 1, H, W)``.
        sigma: ``(batch,)``.
        noise: standard normal, shaped like ``x``.
        kind: classes ``(batch,)``, see :class:`EDMDenoiser`.
        target: what D is to return, shaped like ``x``; None for ``x`` itself.
    """
    noisy = x + sigma.view(-1, 1, 1, 1) * noise
    error = net(noisy, sigma, kind) - (x if target is None else target)
    return (edm_weight(sigma, net.config.sigma_data) * error.square().mean((1, 2, 3))).mean()


def stable_target(noisy: Tensor, sigma: Tensor, reference: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The mean of the reference images given the noisy one: the target of the stable target field.

    sum_i w_i x_i with w_i proportional to exp(-|z - x_i|^2 / (2 sigma^2)): the weighted target of Xu, Tong and Jaakkola
    2023, "Stable target field for reduced variance score estimation in diffusion models", written for
    D = z + sigma^2 score. It varies less than x alone where several images could have become z, and its bias vanishes
    with a growing R. The clean image of each z must be among the references; with that one alone it is the target of
    EDM.

    Args:
        noisy: z ``(batch, 1, H, W)``.
        sigma: ``(batch,)``.
        reference: x_i ``(R, 1, H, W)``.
        allowed: which references each z may have come from, bool ``(batch, R)`` (those of its class); None for all.
    """
    flat = reference.flatten(1)
    distance = torch.stack([(flat - z.flatten()).square().sum(1) for z in noisy])
    logits = -distance / (2 * sigma[:, None] ** 2)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return (logits.softmax(1) @ flat).view_as(noisy)


def measured_loss(
    net: EDMDenoiser, x: Tensor, given: Tensor, sigma: Tensor, noise: Tensor, kind: Tensor | None = None
) -> Tensor:
    """The loss where only some pixels of ``x`` are known: the network is shown part of these, and has to find them all.

    With A the measured pixels and A' the shown ones, E |W A (D(A'(x + sigma n), A'; sigma) - x)|^2 (Daras et al. 2023,
    "Ambient diffusion: learning clean distributions from corrupted data"). Because every pixel that is not shown may
    have been measured, the minimiser is E[x | A'(x + sigma n), A'] at every pixel. W = 1 / c_out: the weight of EDM
    where a pixel is shown, 1 / sigma_data where it is not. With everything measured and shown it is :func:`edm_loss`.

    Args:
        net: a masked network.
        x: ``(batch, 1, H, W)``, NaN where not measured.
        given: where the network sees it, bool, shaped like ``x``; only measured pixels.
        sigma: ``(batch,)``.
        noise: standard normal, shaped like ``x``.
        kind: classes ``(batch,)``.
    """
    seen = x.isfinite()
    clean = torch.where(seen, x, 0.0)
    noisy = torch.where(given, clean + sigma.view(-1, 1, 1, 1) * noise, 0.0)
    error = net(noisy, sigma, kind, given) - clean
    sd = net.config.sigma_data
    weight = torch.where(given, edm_weight(sigma, sd).view(-1, 1, 1, 1), 1 / sd**2) * seen
    return ((weight * error.square()).sum((1, 2, 3)) / seen.sum((1, 2, 3)).clamp(min=1)).mean()


class Objective(nn.Module):
    """The loss of a batch as a module, so that its gradients can be averaged over processes.

    Args:
        net: what is trained.
        precision: name in ``PRECISIONS``; the network's convolutions run in it, the loss and the weights stay float32.
    """

    def __init__(self, net: EDMDenoiser, precision: str = "float32"):
        super().__init__()
        self.net = net
        self.precision = precision

    def forward(self, x: Tensor, sigma: Tensor, noise: Tensor, kind=None, reference=None, allowed=None, given=None):
        """:func:`measured_loss` where ``given`` says what the network sees, else :func:`edm_loss`."""
        target = None
        if reference is not None:
            target = stable_target(x + sigma.view(-1, 1, 1, 1) * noise, sigma, reference, allowed)
        low = self.precision == "bfloat16" or (self.precision == "auto" and has_bfloat16(x.device))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            if given is not None:
                return measured_loss(self.net, x, given, sigma, noise, kind)
            return edm_loss(self.net, x, sigma, noise, kind, target)
