"""Solvers, by name: one explicit table."""

import math
from dataclasses import dataclass, fields, replace
from importlib import import_module
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from invdiff.errors import UsageError, choose, from_text, nearest

if TYPE_CHECKING:
    from invdiff.solvers.base import Solver


@dataclass(frozen=True)
class SolverEntry:
    """One row: a line of text and where the class lies (``module:class``)."""

    summary: str
    target: str


SOLVERS: dict[str, SolverEntry] = {
    "pnp": SolverEntry("annealed plug-and-play, deterministic (default)", "invdiff.solvers.pnp:PnP"),
    "dds": SolverEntry("decomposed diffusion sampling, stochastic", "invdiff.solvers.dds:DDS"),
    "dps": SolverEntry("diffusion posterior sampling, stochastic", "invdiff.solvers.dps:DPS"),
    "diffpir": SolverEntry(
        "half-quadratic splitting in a diffusion chain, stochastic", "invdiff.solvers.diffpir:DiffPIR"
    ),
    "pigdm": SolverEntry("pseudo-inverse guidance, stochastic", "invdiff.solvers.pigdm:PiGDM"),
    "mm": SolverEntry(
        "moment matching: guidance with the covariance of the denoiser, stochastic", "invdiff.solvers.mm:MM"
    ),
    "reddiff": SolverEntry("variational fit regularised by the denoiser", "invdiff.solvers.reddiff:REDDiff"),
    "ddnm": SolverEntry("DDNM+, where singular values are known, stochastic", "invdiff.solvers.ddnm:DDNM"),
    "ddrm": SolverEntry(
        "diffusion restoration, where singular values are known, stochastic", "invdiff.solvers.ddrm:DDRM"
    ),
    "mbir": SolverEntry("DiffusionMBIR: predictor, corrector, TV across slices", "invdiff.solvers.mbir:MBIR"),
    "daps": SolverEntry("decoupled annealing with Langevin steps, stochastic", "invdiff.solvers.daps:DAPS"),
    "tv": SolverEntry("total variation, converged; no prior", "invdiff.solvers.tv:TV"),
    "wavelet": SolverEntry("sparse wavelet coefficients; no prior", "invdiff.solvers.wavelet:Wavelet"),
    "cgls": SolverEntry("least squares by conjugate gradients, stopped early; no prior", "invdiff.solvers.cgls:CGLS"),
    "sense-cg": SolverEntry("MRI: SENSE by conjugate gradients; no prior", "invdiff.solvers.cgls:SenseCG"),
    "sirt": SolverEntry("CT: simultaneous iterative reconstruction; no prior", "invdiff.solvers.analytic:SIRT"),
    "os-sart": SolverEntry("CT: SART with ordered subsets of views; no prior", "invdiff.solvers.sart:OSSART"),
    "fbp": SolverEntry("CT: filtered backprojection; no prior", "invdiff.solvers.analytic:FBP"),
    "wiener": SolverEntry("blur: Wiener filter; no prior", "invdiff.solvers.analytic:Wiener"),
    "bicubic": SolverEntry("super-resolution: bicubic interpolation; no prior", "invdiff.solvers.analytic:Bicubic"),
    "fill": SolverEntry("missing pixels: smooth filling; no prior", "invdiff.solvers.analytic:Fill"),
    "biharmonic": SolverEntry("missing pixels: a thin plate; no prior", "invdiff.solvers.biharmonic:Biharmonic"),
    "zero-filled": SolverEntry("MRI: zero-filled transform; no prior", "invdiff.solvers.analytic:ZeroFilled"),
    "measured": SolverEntry("denoising: the image as it was measured; no prior", "invdiff.solvers.analytic:Measured"),
}


def solver_class(name: str) -> "type[Solver]":
    """The class of a solver; an unknown name raises :class:`UsageError` that lists the choices."""
    module, attribute = choose(name, SOLVERS, "solver").target.split(":")
    return getattr(import_module(module), attribute)


def make_solver(name: str, /, **options: Any) -> "Solver":
    """A solver with options set; text values are converted to the type of the default.

    Raises:
        UsageError: an unknown solver or option (lists the known ones), or a value of another type.
    """
    solver = solver_class(name)()
    known = {f.name: getattr(solver, f.name) for f in fields(solver)}  # type: ignore[arg-type]
    hints = get_type_hints(type(solver))
    for key, value in options.items():
        if key not in known:
            able = [n for n in SOLVERS if key in {f.name for f in fields(solver_class(n))}]  # type: ignore[arg-type]
            others = f"; {', '.join(able)} {'have' if len(able) > 1 else 'has'} it" if able else nearest(key, known)
            raise UsageError(f"solver '{name}' has no option '{key}': its options are {', '.join(known)}{others}")
        if isinstance(value, str) and not isinstance(known[key], str):
            if known[key] is None:
                raise UsageError(f"solver option {key} cannot be set as text; use --{key}")
            options[key] = from_text(type(known[key]), key, value, "solver")
        if not _same_type(options[key], known[key], hints.get(key)):
            raise UsageError(f"solver option {key} takes {type(known[key]).__name__}, got {repr(options[key])[:80]}")
        if isinstance(options[key], float | int) and not 0 <= options[key] < math.inf:
            raise UsageError(f"solver option {key} must be finite and not negative, got {options[key]}")
    return replace(solver, **options)  # type: ignore[type-var]


def _same_type(value: Any, default: Any, hint: Any) -> bool:
    """Whether an option may have this value, its default being ``default``; whole numbers are numbers too."""
    if isinstance(default, str) and float in get_args(hint):  # a word or a number
        default = default if isinstance(value, str) else 0.0
    if default is None or isinstance(default, bool):
        return default is None or isinstance(value, bool)
    if isinstance(default, Real):
        return isinstance(value, Integral if isinstance(default, int) else Real) and not isinstance(value, bool)
    return isinstance(value, type(default))


def __getattr__(name: str) -> Any:
    if name in ("iterate", "solve", "Solver", "State"):
        return getattr(import_module("invdiff.solvers.base"), name)
    raise AttributeError(f"module 'invdiff.solvers' has no attribute '{name}'")
