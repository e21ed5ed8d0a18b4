"""From a request to a case: the example, a volume, a degraded image, or a measurement file."""

import os
from pathlib import Path

from invdiff.case import Case
from invdiff.ct_case import measured_ct, simulated_case
from invdiff.errors import InputError, UsageError, choose
from invdiff.files import label, show
from invdiff.measurement_file import load_measurement
from invdiff.mri_case import measured_mri, simulated_mri
from invdiff.operators import OPERATORS
from invdiff.raw import is_raw, load_raw
from invdiff.restoration import load_options, measured_image, restoration_case
from invdiff.volume import Volume

MEASUREMENT_SUFFIXES = (".h5", ".hdf5", ".cfl")


def open_case(request) -> Case:
    """The example, a volume to measure, or a measurement file; ``request`` is a ``runner.Request``.

    Raises:
        UsageError: an image volume with a CT operator and without ``simulate``.
    """
    source = request.input
    if source is not None and not isinstance(source, Volume):
        source = Path(source)
        if not os.path.exists(source):  # Path.exists raises for names that are too long
            raise InputError(f"{show(source)}: no such file; check the path")
        if source.suffix.lower() in MEASUREMENT_SUFFIXES:
            return _open_measurement(request, source)
    if request.op is None:
        raise UsageError(f"say how the volume is measured: --op {', '.join(OPERATORS)}")
    family = choose(request.op, OPERATORS, "operator").family
    if family == "image":
        return restoration_case(request, source)
    if request.noise is not None:
        source_of_noise = "--photons" if family == "ct" else "--noise-level"
        raise UsageError(
            f"--noise {request.noise}: is for images, the noise of {request.op} comes from {source_of_noise}; drop it"
        )
    if family == "ct" and request.noise_level is not None:
        raise UsageError(f"--noise-level: the noise of {request.op} comes from --photons; drop the option")
    if source is not None and not request.simulate and not isinstance(source, Volume):
        raise UsageError(
            f"{label(source)}: an image volume is no {request.op} measurement; add --simulate to measure it first, "
            "or give a measurement file (.h5, see 'invdiff simulate')"
        )
    if request.reference is not None:
        raise UsageError("--reference: a simulated measurement is scored against its own volume; drop the option")
    options = {"axis": request.slice_axis, "slices": request.slices, "allow_shear": request.allow_shear}
    options |= {"seed": request.seed, "load": load_options(request)}
    if family == "mri":
        options |= {"noise_level": request.noise_level}
        return simulated_mri(source, request.op, request.operator, **options)
    return simulated_case(source, request.op, request.operator, **options)


def _open_measurement(request, source: Path) -> Case:
    """A measurement file, with the options that it leaves open."""
    for name in ("noise", "noise_level"):
        if getattr(request, name) is not None:
            raise UsageError(f"{source.name}: the file holds the noise; drop --{name.replace('_', '-')}")
    if request.operator:
        raise UsageError(f"{source.name}: the file fixes the operator; drop {', '.join(sorted(request.operator))}")
    if request.simulate:
        raise UsageError(
            f"{source.name}: is a measurement already, give a volume to measure, or reconstruct it without --simulate"
        )
    if request.slice_axis != "auto" or load_options(request) != load_options(type(request)()):
        raise UsageError(
            f"{source.name}: --slice-axis, --nan, --volume-index, --series and --accept are for volumes; drop them"
        )
    slices = request.slices
    if is_raw(source):
        measurement, slices = load_raw(source, slices), None  # other slices are not even read
    else:
        measurement = load_measurement(source)
    measured_with = measurement.operator["name"]
    if measured_with not in OPERATORS:
        name = show(measured_with)[:40]
        raise InputError(f"{source.name}: holds operator '{name}'; only {', '.join(OPERATORS)} can be read")
    if request.op not in (None, measured_with):
        raise UsageError(
            f"{source.name}: was measured with --op {measured_with}, not {request.op}; drop --op or correct it"
        )
    options = {"slices": slices, "reference": request.reference, "allow_shear": request.allow_shear}
    read = {"ct": measured_ct, "mri": measured_mri, "image": measured_image}[OPERATORS[measured_with].family]
    return read(source, measurement, **options)
