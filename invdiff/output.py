"""Writing a result: volume, spread, manifest and picture, all of them or none that was there before."""

import warnings
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.destination import Outputs, next_free_name
from invdiff.errors import ResourceError, UsageError
from invdiff.files import private_folder, publish, show
from invdiff.intensity import HU_MAX
from invdiff.provenance import describe_volume, manifest, write_json
from invdiff.report import mosaic
from invdiff.volume import Volume, save_volume

if TYPE_CHECKING:
    from invdiff.runner import Request, Result

TITLES = {"fbp": "FBP", "tv": "TV, converged", "sirt": "SIRT", "pnp": "PnP", "dds": "DDS", "dps": "DPS"}
TITLES |= {"wiener": "Wiener", "bicubic": "Bicubic", "fill": "Filled", "measured": "Measured"}
TITLES |= {"cgls": "CGLS", "sense-cg": "SENSE-CG", "os-sart": "OS-SART", "wavelet": "Wavelet"}
TITLES |= {"biharmonic": "Biharmonic", "zero-filled": "Zero-filled"}
TITLES |= {
    "diffpir": "DiffPIR",
    "pigdm": "ΠGDM",
    "mm": "moment matching",
    "reddiff": "RED-diff",
    "mbir": "DiffusionMBIR",
    "daps": "DAPS",
}
TITLES |= {"ddnm": "DDNM+", "ddrm": "DDRM"}
WINDOW_HU = (-1000.0, 500.0)
_FILES = ("volume", "manifest", "picture", "spread")


def build_manifest(result: "Result", request: "Request", outputs: Outputs, sha256: dict[str, str]) -> dict[str, Any]:
    """The record of the run: resolved options, seeds, hashes, geometry, intensity mapping, timings, figures."""
    record, case = dict(result.record), result.case
    options = {k: v for k, v in asdict_shallow(request).items() if k not in ("input", "reference", "checkpoint")}
    inputs, solvers = record.pop("inputs"), record.pop("solver_options")
    if record["prior"] is not None:
        inputs |= {"prior": {"name": record["prior"]["file"], "sha256": record["prior"]["sha256"]}}
    options |= {"solver_options": {name: _plain_options(values) for name, values in solvers.items()}}
    options |= {"steps": record["runs"][request.solver]["steps"]}
    made = manifest(
        options,
        device=record.pop("device"),
        timings=record.pop("timings"),
        warnings=[*outputs.notes, *record.pop("warnings")],
        operator=case.measurement.operator,
        noise=case.measurement.noise,
        geometry=describe_volume(result.volume),
        intensity={
            "units": result.volume.units,
            "prior_range": f"u = (value - {case.image.shift:g}) / {case.image.scale:g}",
            "clipped": False,
        },
        output={path: digest for path, digest in sha256.items()},
        **record,
    )
    return {**made, "inputs": inputs}


def _plain_options(values: dict[str, Any]) -> dict[str, Any]:
    return {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in values.items()}


def asdict_shallow(request: "Request") -> dict[str, Any]:
    """Fields of the request without copying what they hold."""
    return {name: getattr(request, name) for name in request.__dataclass_fields__}


def save_result(result: "Result", request: "Request", outputs: Outputs, overwrite: bool) -> dict[str, Any]:
    """Write volume (HU), ``_std`` volume, ``.png`` and ``.json``, and return the manifest.

    All are written in a hidden folder beside the output and moved to their names together, so that a failure or an
    interruption leaves a complete old set. An old ``_std`` that the new run does not replace is removed with it, and so
    is the checkpoint of the run.

    Raises:
        UsageError: a file exists and ``overwrite`` is false.
        ResourceError: the folder cannot be written to.
    """
    folder = outputs.volume.parent
    try:
        with private_folder(outputs.volume) as hidden:
            part = replace(outputs, **{k: hidden / getattr(outputs, k).name for k in _FILES})
            written = {part.volume.name: save_volume(result.volume, part.volume)}
            if result.spread is not None:
                written[part.spread.name] = save_volume(result.spread, part.spread)
            picture(result, part)
            record = build_manifest(result, request, outputs, written)
            write_json(part.manifest, record)
            publish(part.all, outputs.all, overwrite)
        outputs.checkpoint.unlink(missing_ok=True)
    except ResourceError as error:  # names a file of the private folder
        cause = getattr(error.__cause__, "strerror", None) or error
        raise ResourceError(f"{show(outputs.volume)}: cannot be written ({cause}); nothing was changed") from None
    except OSError as error:
        raise ResourceError(f"{show(folder)}: cannot be written ({error.strerror}); nothing was changed") from None
    return record


def save_last(volume: Volume, outputs: Outputs) -> Path:
    """Write what a failed run last had, beside OUTPUT, as ``NAME-last-good.nii.gz`` or the next free name."""
    folder, stem = outputs.volume.parent, outputs.manifest.name.removesuffix(".json")
    path = next_free_name(folder, f"{stem}-last-good")
    save_volume(volume, path)
    return path


def picture(result: "Result", outputs: Outputs) -> None:
    """The mosaic: baselines, result, reference and difference where the truth is known."""
    columns = []
    for name, stack in result.stacks.items():
        figures = result.metrics.get(name)
        chi2 = result.record["runs"][name]["chi2_per_datum"]
        caption = f"chi² {chi2:.2f}"
        if figures:
            caption = f"{figures['psnr_db']:.1f} dB   SSIM {figures['ssim'] or 0:.3f}"
        title = TITLES.get(name, name)
        if result.record["runs"][name].get("converged") is False:
            title = f"{name.upper()}, not converged"
        columns.append((title, stack, caption))
    measured = result.case.measurement
    name = measured.operator["name"]
    what = f"{name}, {measured.y.shape[2]} views" if measured.is_ct else name
    if "acceleration_achieved" in measured.operator:
        what = f"{name}, {measured.operator['acceleration_achieved']:.2g} times accelerated"
    heading = f"{what}: {result.case.description}"
    grid = result.case.grid
    window, difference = WINDOW_HU, 200.0
    if grid.source.modality != "CT":
        low, high = np.percentile(result.stacks[next(reversed(result.stacks))], (0.5, 99.5))
        window = (float(low), float(max(high, low + 1e-6)))
        difference = 0.2 * (window[1] - window[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # file names in scripts the font does not have
        mosaic(
            outputs.picture,
            columns,
            result.case.truth,
            grid.pixel_mm,
            grid.spacing_mm,
            grid.source.units,
            window,
            difference_limit=difference,
            title=show(heading).replace("$", r"\$"),  # matplotlib would read formulas
            plane=grid.plane,
        )


def compare_volumes(reconstruction: Volume, reference: Volume) -> dict[str, Any]:
    """Figures of one volume against another on the same grid (``invdiff evaluate``).

    Raises:
        UsageError: shapes or affines differ.
    """
    from invdiff.metrics import evaluate
    from invdiff.volume import in_order_of, to_slices

    reconstruction = in_order_of(reconstruction, reference)
    if reconstruction.data.shape != reference.data.shape:
        raise UsageError(
            f"the reconstruction is {reconstruction.data.shape}, the reference {reference.data.shape}: "
            "cut or resample one"
        )
    if not np.allclose(reconstruction.affine, reference.affine, atol=1e-3):
        raise UsageError("reconstruction and reference lie at different places (affines differ): resample one")
    modality = reference.modality
    axis = to_slices(reference, allow_shear=True).axes[0]
    mine, truth = (to_slices(v, axis=axis, allow_shear=True).data for v in (reconstruction, reference))
    if modality == "CT":  # as in `reconstruct`: the truth is what can be measured
        truth = np.clip(truth, -1000, HU_MAX)
    return evaluate(mine, truth, modality)
