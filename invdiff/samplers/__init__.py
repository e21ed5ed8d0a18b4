"""Samplers, by name: one explicit table."""

from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from invdiff.errors import UsageError, choose, from_text, nearest

if TYPE_CHECKING:
    from invdiff.samplers.base import Sampler


@dataclass(frozen=True)
class SamplerEntry:
    """One row: a line of text, where the class lies (``module:class``) and the options that the name stands for."""

    summary: str
    target: str
    options: dict[str, Any] = field(default_factory=dict)


_DPM, _ADAMS = "invdiff.samplers.dpm_solver:", "invdiff.samplers.adams:"
SAMPLERS: dict[str, SamplerEntry] = {
    "ddpm": SamplerEntry("ancestral, stochastic", "invdiff.samplers.ancestral:DDPM"),
    "ddim": SamplerEntry("DDIM; eta adds noise, up to that of ddpm", "invdiff.samplers.ancestral:DDIM"),
    "euler": SamplerEntry("Euler steps of probability flow; churn adds noise", "invdiff.samplers.edm:Euler"),
    "heun": SamplerEntry("EDM: Heun steps, second order, two calls each", "invdiff.samplers.edm:Heun"),
    "dpmpp-1": SamplerEntry("DPM-Solver++, first order: DDIM", _DPM + "DPMSolverPP", {"order": 1}),
    "dpmpp-2m": SamplerEntry("DPM-Solver++ 2M, second order (default)", _DPM + "DPMSolverPP", {"order": 2}),
    "dpmpp-3m": SamplerEntry("DPM-Solver++ 3M, third order", _DPM + "DPMSolverPP", {"order": 3}),
    "dpm-1": SamplerEntry("DPM-Solver, first order: DDIM", _DPM + "DPMSolver", {"order": 1}),
    "dpm-2": SamplerEntry("DPM-Solver, second order, two calls a step", _DPM + "DPMSolver", {"order": 2}),
    "dpm-3": SamplerEntry("DPM-Solver, third order, three calls a step", _DPM + "DPMSolver", {"order": 3}),
    "deis-tab1": SamplerEntry("DEIS, noise linear in time, second order", _ADAMS + "DEIS", {"degree": 1}),
    "deis-tab2": SamplerEntry("DEIS, noise quadratic in time, third order", _ADAMS + "DEIS", {"degree": 2}),
    "deis-tab3": SamplerEntry("DEIS, noise cubic in time, fourth order", _ADAMS + "DEIS", {"degree": 3}),
    "pndm": SamplerEntry("F-PNDM: three Runge-Kutta steps, then plms", _ADAMS + "PNDM"),
    "plms": SamplerEntry("pseudo linear multistep, for even steps in time", _ADAMS + "PLMS"),
}


def make_sampler(name: str, /, **options: Any) -> "Sampler":
    """A sampler with options set; text values are converted to the type of the default.

    Raises:
        UsageError: an unknown sampler or option (lists the known ones), or a value of another type or out of range.
    """
    entry = choose(name, SAMPLERS, "sampler")
    module, attribute = entry.target.split(":")
    sampler = getattr(import_module(module), attribute)(**entry.options)
    known = {f.name: getattr(sampler, f.name) for f in fields(sampler)}
    for key, value in options.items():
        if key not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise UsageError(f"sampler '{name}' has no option '{key}': {has}{nearest(key, known)}")
        if isinstance(value, str):
            options[key] = from_text(type(known[key]), key, value, "sampler")
    return replace(sampler, **options)


def parse_sampler(text: str) -> "Sampler":
    """A sampler from ``NAME`` or ``NAME:option=value,option=value``.

    Raises:
        UsageError: as :func:`make_sampler`; text after the colon that is no list of option=value.
    """
    name, _, rest = text.partition(":")
    pairs = [item.partition("=") for item in rest.split(",")] if rest else []
    if not all(key and equals and value for key, equals, value in pairs):
        raise UsageError(f"sampler '{text}': write options as {name}:option=value,option=value")
    return make_sampler(name, **{key: value for key, _, value in pairs})
