"""A prior on the images of a problem: adapted to their channels and size, or refused; what differs is said."""

from typing import TYPE_CHECKING

import numpy as np

from invdiff.errors import PriorError, UsageError
from invdiff.linalg import gaussian_blur, to_complex
from invdiff.priors.complex import PhaseCorrected, RealImaginary, slow_phase
from invdiff.priors.gray import Gray
from invdiff.priors.latent import LatentPrior
from invdiff.priors.network import NetworkPrior
from invdiff.priors.options import PriorOptions
from invdiff.priors.planes import Planes
from invdiff.priors.precision import has_bfloat16
from invdiff.priors.tiled import Tiled
from invdiff.priors.unet import EDMDenoiser
from invdiff.solvers.pnp import warm_start

if TYPE_CHECKING:
    from invdiff.case import Case
    from invdiff.priors.base import Prior
    from invdiff.problem import Problem
    from invdiff.solvers.base import Solver

BEYOND = 0.05, 0.01  # of the width of a prior's range, and of the voxels: what may lie outside without a word
VOLUME = 16  # slices and more have planes across them that are images too
COARSE = 3.0  # pixels of blur, after which slices and rows are compared
ALIKE = 12.0  # most that mean square differences of slices may be over those of rows
FARTHEST = 3.0  # pixels between slices


def fit_prior(prior: "Prior", problem: "Problem", options: PriorOptions, volumes: bool = False) -> "Prior":
    """The prior for slices of this problem, in tiles where it is made for smaller ones; in all planes where slices are
    what the data lack, and with ``volumes`` where :func:`is_volume`.

    What a scanner leaves out of all slices alike looks otherwise in the planes across them. On neighbouring slices of
    validation and training subjects, 128 x 128, planes gain 0.5 to 0.7 dB on CT (30 and 60 views, low dose) and 0.3 to
    1.8 dB on MRI. They lose 1.4 dB where pixels are missing and 0.5 dB where these are too large.

    Args:
        prior: as loaded.
        problem: whitened problem.
        options: what the user chose.
        volumes: the data are a scanner's, and a solver of the run takes the planes in turn (``Solver.turning``).

    Raises:
        PriorError: it has other channels, and no adaptor makes them fit; bfloat16 for what is no network in float32.
        UsageError: tiles that the prior cannot take; options for a prior of latents, which has none.
        ShapeError: slices that do not fit the autoencoder of a prior of latents.
    """
    if isinstance(prior, LatentPrior):
        return _fit_latents(prior, problem, options)
    prior = in_precision(prior, options.precision)
    (slices, channels, *sides), whole = problem.image_shape, prior.info
    across = options.planes == "all" or (options.planes == "auto" and problem.base.through_plane)
    volume = volumes and options.planes == "auto" and not across and is_volume(problem)
    tile = whole.size if options.tile == "auto" else None if options.tile == "none" else int(options.tile)
    if tile is not None and max(*sides, slices if across or volume else 0) > tile:
        prior = Tiled(prior, tile, None if options.overlap == "auto" else int(options.overlap))

    def planes(inner: "Prior") -> "Prior":
        return Planes(inner, turned=volume) if across or volume else inner

    if whole.channels == 3 and channels in (1, 2):
        prior = Gray(prior)
    if prior.info.channels == 1 and problem.operator.complex_image:
        if options.complex == "parts":
            return planes(RealImaginary(prior))
        return PhaseCorrected(planes(prior), slow_phase(warm_start(problem)[0]))
    if prior.info.channels != channels:
        kind = "complex images" if problem.operator.complex_image else "images"
        raise PriorError(
            f"prior {whole.name} is one of {whole.channels} channels, the data are {kind} of {channels}: use another "
            "prior"
        )
    return planes(prior)


def in_precision(prior: "Prior", wanted: str) -> "Prior":
    """The prior in the precision of :class:`PriorOptions`.

    Raises:
        PriorError: bfloat16 for what is no network in float32.
    """
    network = prior if isinstance(prior, NetworkPrior) else None
    if wanted == "float32" or (wanted == "auto" and not (network and _bears_bfloat16(network))):
        return prior
    if network is None:
        raise PriorError(f"prior {prior.info.name} is no network: drop prior.precision")
    return network.in_bfloat16()


def _bears_bfloat16(prior: NetworkPrior) -> bool:
    """Whether it loses nothing and is faster: a network of this package's own, in float32, where bfloat16 is fast."""
    own = isinstance(prior.net, EDMDenoiser) and prior.info.precision == "float32"
    return own and has_bfloat16(prior.device)


def is_volume(problem: "Problem") -> bool:
    """Whether the planes across the slices look like slices: these lie at most 3 pixels apart, and in a first estimate
    without a prior, of which only coarse structure counts, neighbours are as alike as slices of one body.

    On 128 x 128 pixels of training and validation subjects planes gain 0.3 to 1.8 dB where slices of MRI are up to 2.3
    pixels apart, and 0.6 to 0.9 dB with one coil at 3; 0.1 dB on CT (30 views) at 2.9. They lose 0.4 to 0.8 dB with
    eight coils at 3.3 and 4.2, and with 30 views at 3.6. The mean square difference of neighbouring slices over that
    of neighbouring rows, after a blur of 3 pixels, which aliasing and streaks do not outlive, is 0.3 to 8 for slices of
    one body up to 3 pixels apart (28 once, CT of 90 degrees), and 52 to 290 for slices of other patients or in no
    order, whatever a header says; 16 and more with 64 x 64 pixels.
    """
    z, row, column = problem.spacing
    if problem.image_shape[0] < VOLUME or not z <= FARTHEST * (row * column) ** 0.5:
        return False
    u = warm_start(problem)
    u = to_complex(u).abs() if problem.operator.complex_image else u  # slices may differ in phase
    u = gaussian_blur(u, COARSE)
    across, within = ((u.diff(dim=axis) ** 2).mean() for axis in (-4, -2))
    return bool(across <= ALIKE * within)


def _fit_latents(prior: LatentPrior, problem: "Problem", options: PriorOptions) -> LatentPrior:
    if options != PriorOptions():
        raise UsageError(f"prior {prior.info.name} is one of latents, which takes no options: drop --set prior.NAME")
    channels = problem.image_shape[1]
    if channels != prior.channels and (channels, prior.channels) != (1, 3):
        kind = "complex images" if problem.operator.complex_image else "images"
        raise PriorError(
            f"prior {prior.info.name}: its autoencoder takes images of {prior.channels} channels, the data are {kind} "
            f"of {channels}: use another prior"
        )
    fit = prior.gray() if channels < prior.channels else prior
    fit.latent_shape(problem.image_shape)
    return fit


def check_solver(prior: "Prior", name: str, solver: "Solver") -> None:
    """Raise :class:`UsageError` where a prior is one of latents and a solver needs one of images."""
    if isinstance(prior, LatentPrior) and solver.needs_prior:
        if not solver.nonlinear:
            raise UsageError(
                f"solver '{name}' needs a linear operator, and prior {prior.info.name} is one of latents, with a "
                "decoder that is not linear: use --solver dps or reddiff"
            )
        if getattr(solver, "coupling", None) is not None:
            raise UsageError(f"prior {prior.info.name} is one of latents, which are not coupled: drop --coupling")


def mismatches(prior: "Prior", problem: "Problem", case: "Case") -> list[str]:
    """One line for everything in which the data differ from what the (fitted) prior was made for."""
    info, found = prior.info, []
    if info.modality not in ("any", case.modality):
        found.append(f"the prior was made for {info.modality}, the data are {case.modality}")
    if info.voxel_mm:
        low, high = info.voxel_mm
        pixel = min(problem.spacing[1:]), max(problem.spacing[1:])
        if pixel[0] < low or pixel[1] > high:
            found.append(f"pixel size {pixel[0]:.2f} to {pixel[1]:.2f} mm: the prior saw {low:g} to {high:g} mm")
    rows, columns = problem.image_shape[-2:]
    said = [how for how in info.adapted if how.startswith(("tiles", "colour"))]
    tiled = any(how.startswith("tiles") for how in said)
    if info.size and not tiled and not info.size / 2 < max(rows, columns) <= info.size:
        found.append(f"slices of {rows} x {columns} pixels: the prior was trained on {info.size} x {info.size}")
    return [*found, *(f"prior {info.name}, for slices of {rows} x {columns} pixels: {how}" for how in said)]


def out_of_range(prior: "Prior", case: "Case", stack: np.ndarray) -> list[str]:
    """A warning where more than 1 % of a result ``(S, H, W)``, in the units of the grid, are values no prior saw."""
    low, high = prior.info.value_range
    slack, shares = BEYOND[0] * (high - low), BEYOND[1]
    u = case.image.invert(stack)
    share = float(np.mean((u < low - slack) | (u > high + slack)))
    if share <= shares:
        return []
    units = "" if case.grid.source.units == "1" else f" {case.grid.source.units}"
    ends = [case.image.apply(v) for v in ((0.0 if case.operator.complex_image else low), high)]
    return [
        f"{100 * share:.1f} % of the result lie outside {ends[0]:.4g} to {ends[1]:.4g}{units}, the range that the "
        "prior saw: use another prior, or import it with the right --prior-range"
    ]
