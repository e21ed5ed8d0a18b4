"""What a prior is: a minimum mean-squared-error denoiser at every noise level."""

import abc
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PriorInfo:
    """What is known of a prior, recorded in manifests.

    Args:
        name: short name or path.
        channels: image channels.
        modality: "CT", "any", ...
        value_range: range of x the prior saw, in its own units.
        sigma_min, sigma_max: noise levels it was made for.
        voxel_mm: in-plane pixel sizes it saw, smallest and largest, or None.
        sha256: of the weights, or None.
        size: side, in pixels, of the images it saw, where it depends on that (attention); None else, or not known.
        format: architecture, or "invdiff" for one of our own.
        precision: of its network.
        file: name of the file of its weights, or None.
        settings_sha256: of its architecture and conversion, or None.
        adapted: what was done to make it fit the data, a line each.
        classes: names of what ``denoise`` can be told as ``context``; empty for none.
        label: the one of them that it is told where ``context`` is None; None for none.
    """

    name: str
    channels: int = 1
    modality: str = "any"
    value_range: tuple[float, float] = (-1.0, 1.0)
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    voxel_mm: tuple[float, float] | None = None
    sha256: str | None = None
    size: int | None = None
    format: str = "invdiff"
    precision: str = "float32"
    file: str | None = None
    settings_sha256: str | None = None
    adapted: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    label: str | None = None


class Prior(abc.ABC):
    """``denoise`` in the convention ``x = x0 + sigma n``; counts its calls per slice in ``calls`` (NFE)."""

    kind = "mean"  # "endpoint" for distilled models whose output is no posterior mean, "latents" for no images
    info: PriorInfo
    calls: int = 0
    chunk: int = 1  # slices per network call
    together: int = 1  # slices that are differentiated together, network calls by network call, where more than a chunk
    stride: int = 1  # sides that are multiples of it need no padding
    slicewise: bool = True  # sees each slice by itself; False: images are whole stacks, (..., slices, channels, H, W)
    passes: int = 1  # of the network over a stack in one ``denoise``; ``denoise_turned`` takes one

    @abc.abstractmethod
    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        """E[x0 | x0 + sigma n = x].

        Args:
            x: ``(..., channels, H, W)`` in the prior's own range.
            sigma: noise standard deviation in the same units.
            context: what some priors take besides: a name in ``info.classes``; None for none.

        Returns:
            Same shape as x; differentiable in x.
        """

    def denoise_turned(self, x: Tensor, sigma: float, turn: int) -> Tensor:
        """T^-1 D(T x; sigma) with T one of the 8 flips and turns of a slice, numbered by ``turn`` modulo 8."""
        if turn & 4:
            x = x.transpose(-1, -2)
        axes = [axis for bit, axis in ((1, -1), (2, -2)) if turn & bit]
        x = self.denoise(x.flip(axes).contiguous(), sigma).flip(axes)
        return (x.transpose(-1, -2) if turn & 4 else x).contiguous()

    def restrict(self, slices: slice) -> "Prior":
        """The prior of those slices only; identical unless it holds something per slice."""
        return self
