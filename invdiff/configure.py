"""What a ``runner.Request`` asks for: device, solvers with the options that suit the operator, steps."""

from typing import Any

import torch

from invdiff.case import Case
from invdiff.coupling import COUPLINGS
from invdiff.errors import UsageError, choose
from invdiff.operators import OPERATORS
from invdiff.solvers import SOLVERS, make_solver, solver_class
from invdiff.solvers.base import Solver


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one.

    Raises:
        UsageError: not a device, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}': choose auto, cpu or cuda[:N]") from None
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise UsageError(f"device '{name}': this machine has {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device '{name}': choose auto, cpu or cuda[:N]")
    return device


def tuned(described: dict[str, Any], name: str) -> tuple[dict[str, Any], int | None]:
    """Options of a solver, and steps, that suit the operator of a measurement better than its defaults."""
    table = OPERATORS[described["name"]].tuned
    suited = table.get(f"{name} {described.get('axis')}", table.get(name, {}))
    options = dict(suited(described) if callable(suited) else suited)
    return options, options.pop("steps", None)


def steps_of(request, name: str, solver: Solver, case: Case) -> int:
    """Steps asked for, else those that suit the operator, else the solver's own."""
    if request.steps and solver.needs_prior:
        return request.steps
    return tuned(case.measurement.operator, name)[1] or solver.default_steps


def configure(request, described: dict[str, Any] | None = None) -> Solver:
    """The solver with its options, those that suit the operator ``described`` where none are given, and coupling.

    Raises:
        UsageError: unknown solver or option, a coupling the solver does not take, samples of a deterministic one, steps
            or samples that are no positive whole number.
    """
    for name in ("steps", "samples"):
        value = getattr(request, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} must be a whole number of at least 1, got {value}")
    options = request.solver_options
    if described is not None:
        options = tuned(described, request.solver)[0] | options
    solver = make_solver(request.solver, **options)
    if request.steps and not solver.needs_prior:
        raise UsageError(
            f"--steps {request.steps}: solver '{request.solver}' has no schedule of steps; drop the option"
        )
    if request.samples > 1 and not solver.stochastic:
        raise UsageError(
            f"--samples {request.samples}: solver '{request.solver}' is deterministic; use {_those('stochastic')}"
        )
    if request.coupling not in ("auto", "none"):
        coupling = choose(request.coupling, COUPLINGS, "coupling")
        if "coupling" not in solver.__dataclass_fields__:  # type: ignore[attr-defined]
            raise UsageError(
                f"--coupling {request.coupling}: solver '{request.solver}' has no slice coupling; "
                f"use {_those('coupling')}"
            )
        return make_solver(request.solver, **options, coupling=coupling())
    return solver


def chosen_solvers(request, solver: Solver, case: Case) -> dict[str, Solver]:
    """Solvers by name in the order they run, the one asked for last; as a baseline TV is volumetric if that couples.

    Without a choice of baselines it is the operator's own (FBP for CT), and for the built-in example TV as well.
    """
    coupled, described = getattr(solver, "coupling", None) is not None, case.measurement.operator
    compare = request.compare
    if compare is None:
        own = OPERATORS[described["name"]].baseline
        compare = (own, "tv") if request.input is None else (own,)
    names = dict.fromkeys(n for n in compare if n != request.solver)
    found = {}
    for n in names:
        options = {"volumetric": True} if n == "tv" and coupled else {}
        found[n] = make_solver(n, **tuned(described, n)[0], **options)
    return {**found, request.solver: solver}


def _those(attribute: str) -> str:
    """Names of the solvers that have or are something."""
    found = [n for n in SOLVERS if (value := getattr(solver_class(n), attribute, False)) or value is None]
    return f"{', '.join(found[:-1])} or {found[-1]}"
