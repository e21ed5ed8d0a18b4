"""Medical volumes from too few measurements, with pretrained 2D diffusion priors.

Top-level names resolve on first use, so that ``import invdiff`` loads neither torch nor deepinv.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_here = Path(__file__).resolve().parent
if not (_here / "operators").is_dir():  # a source checkout: operators/ and cli/ lie beside this folder
    __path__.append(str(_here.parent))

try:
    __version__ = version("invdiff")
except PackageNotFoundError:  # a bare checkout on the path, never installed
    __version__ = "0+checkout"

_EXPORTS = {
    "CTFan": "invdiff.operators.ct",
    "CTParallel": "invdiff.operators.ct",
    "GaussianPrior": "invdiff.priors.gaussian",
    "InvdiffError": "invdiff.errors",
    "LinearOperator": "invdiff.operator",
    "Measurement": "invdiff.measurement",
    "Problem": "invdiff.problem",
    "Volume": "invdiff.volume",
    "iterate": "invdiff.solvers",
    "load_prior": "invdiff.priors",
    "reconstruct": "invdiff.runner",
    "simulate_ct": "invdiff.simulate",
    "make_solver": "invdiff.solvers",
    "solve": "invdiff.solvers",
    "whiten": "invdiff.problem",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'invdiff' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
