"""A prior of colour images on grey ones."""

import math

from torch import Tensor

from invdiff.errors import PriorError
from invdiff.priors.base import Prior
from invdiff.priors.wrapper import Wrapper


class Gray(Wrapper):
    """A 3-channel prior on images ``(..., 1, H, W)``: the grey value u is the mean of the three channels.

    D_grey(x; sigma) = mean over channels of D((x, x, x); sqrt(3) sigma),    x = u + sigma n.

    The noise of x is one image, the same in the three channels. A colour network told sigma' expects three independent
    ones, whose mean has the standard deviation sigma' / sqrt(3); hence sigma' = sqrt(3) sigma, and not sigma, at which
    it would leave two thirds of the noise variance in. This is exactly E[u | x] wherever grey value and colour
    (differences between channels) are independent under the prior, as for exchangeable Gaussian channels; no colour
    noise is drawn, so that the result is deterministic.

    Raises:
        PriorError: the prior has another number of channels.
    """

    def __init__(self, prior: Prior):
        if prior.info.channels != 3:
            raise PriorError(f"prior {prior.info.name} has {prior.info.channels} channels, no colours: use another")
        low, high = (level / math.sqrt(3) for level in (prior.info.sigma_min, prior.info.sigma_max))
        how = "colour prior on grey images: equal channels, sqrt(3) times the noise level, mean of the output"
        super().__init__(prior, how, channels=1, sigma_min=low, sigma_max=high)

    def denoise(self, x: Tensor, sigma: float, context=None) -> Tensor:
        """See :class:`Prior`; ``x`` is ``(..., 1, H, W)``."""
        colours = x.expand(*x.shape[:-3], 3, *x.shape[-2:])
        return self.prior.denoise(colours, math.sqrt(3) * sigma, context).mean(-3, keepdim=True)

    def restrict(self, slices: slice) -> "Gray":
        """The prior of those slices."""
        return Gray(self.prior.restrict(slices))
