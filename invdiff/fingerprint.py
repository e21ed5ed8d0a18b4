"""What makes two runs the same run: options as resolved, inputs, prior and versions."""

import hashlib
from typing import Any

import torch

from invdiff.files import show
from invdiff.provenance import package_versions, plain

#: Fields of a request that do not change its result, or that stand elsewhere in resolved form.
_NOT_OPTIONS: tuple[str, ...] = ("input", "reference", "prior", "operator", "solver_options", "steps", "device")
_NOT_OPTIONS += ("checkpoint", "checkpoint_minutes", "resume")


def fingerprint(request, device: torch.device, solvers, steps: dict[str, int], prior, problem, inputs) -> dict:
    """Names as on the command line to values that JSON holds; equal for two runs that end in the same bits.

    Args:
        request: a ``runner.Request``.
        device: where it runs.
        solvers: by name, with their options.
        steps: of each solver.
        prior: or None.
        problem: whose measured data are hashed.
        inputs: role to description with ``sha256``, see :func:`invdiff.provenance.describe_file`.
    """
    options = {name: getattr(request, name) for name in request.__dataclass_fields__ if name not in _NOT_OPTIONS}
    found = {"--" + name.replace("_", "-"): value for name, value in options.items()}
    found |= {f"operator.{name}": value for name, value in request.operator.items()}
    found |= {f"steps of {name}": count for name, count in steps.items()}
    for name, solver in solvers.items():
        found |= {f"{name}.{option}": value for option, value in vars(solver).items()}
    found |= {"--device": str(device)}
    found |= {f"{role} sha256": described["sha256"] for role, described in inputs.items()}
    found |= {"prior sha256": None if prior is None else prior.info.sha256}
    found |= {"prior class": prior.info.label} if prior is not None and prior.info.label else {}
    found |= {f"{name} version": number for name, number in package_versions(("torch",)).items()}
    data = problem.measured.detach().cpu().contiguous().numpy()
    return plain(found | {"measured data sha256": hashlib.sha256(data).hexdigest()})


def differences(old: dict[str, Any], new: dict[str, Any], most: int = 3) -> str:
    """``--seed 1 -> 2, prior sha256 3fa2... -> 91bc...``: what differs, the first few; empty where nothing does."""
    missing = object()
    found = [k for k in dict.fromkeys((*new, *old)) if old.get(k, missing) != new.get(k, missing)]
    parts = [f"{k} {_short(old.get(k, 'absent'))} -> {_short(new.get(k, 'absent'))}" for k in found[:most]]
    return ", ".join(parts) + (f" and {len(found) - most} more" if len(found) > most else "")


def _short(value: Any) -> str:
    text = show(str(value))
    return text if len(text) <= 24 else f"{text[:12]}..."
