"""``invdiff simulate``: measure a volume and write a measurement file."""

from pathlib import Path

import click

from invdiff.cli.options import Range, gather_operator, hush, operator_options, split_settings
from invdiff.errors import UsageError


@click.command()
@click.argument("input", required=False, type=click.Path(path_type=Path))
@click.option("--op", required=True, help="Operator: ct-sparse, ct-limited, ct-lowdose.")
@operator_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Measurement file, .h5.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option("--slices", type=Range(), help="Only slices A to B - 1 along the slice axis of the file.")
@click.option("--slice-axis", type=click.Choice(["auto", "0", "1", "2"]), default="auto", show_default=True)
@click.option("--nan", type=click.Choice(["refuse", "fill"]), default="refuse", show_default=True)
@click.option("--volume-index", type=click.IntRange(0), help="Which 3D volume of a 4D file.")
@click.option("--allow-shear", is_flag=True, help="Accept array axes that are not orthogonal (gantry tilt).")
@click.option("--set", "settings", multiple=True, metavar="operator.NAME=VALUE", help="Any operator option.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--quiet", is_flag=True, help="Errors only.")
def simulate(
    input, op, output, seed, slices, slice_axis, nan, volume_index, allow_shear, settings, overwrite, quiet, **given
):
    """Measure INPUT, a volume in HU (without INPUT the built-in phantom), on a finer grid than any solver uses.

    \b
    invdiff simulate scan.nii.gz --op ct-sparse --views 30 -o scan30.h5
    invdiff reconstruct scan30.h5 --reference scan.nii.gz
    """
    from invdiff.case import in_file_order
    from invdiff.ct_case import simulated_case
    from invdiff.files import check_output, show
    from invdiff.measurement import save_measurement
    from invdiff.opening import MEASUREMENT_SUFFIXES

    if quiet:
        hush()
    solver_settings, operator_settings = split_settings(settings)
    if solver_settings:
        name = next(iter(solver_settings))
        raise UsageError(f"--set solver.{name}: nothing is solved here; give it to 'reconstruct'")
    operator = gather_operator(op, given, operator_settings)
    inputs = [] if input is None else [input]
    outputs = check_output(output, overwrite, inputs, suffixes=MEASUREMENT_SUFFIXES, beside=False)
    case = simulated_case(
        input,
        op,
        operator,
        seed=seed,
        axis=slice_axis,
        slices=slices,
        load={"nan": nan, "volume_index": volume_index},
        allow_shear=allow_shear,
    )
    save_measurement(outputs.volume, in_file_order(case.measurement, case.grid), overwrite)
    if not quiet:
        s, _, views, detectors = case.measurement.y.shape
        what = "detector rows" if case.measurement.is_cone else "slices"
        click.echo(show(f"{case.description}: {s} {what}, {views} views of {detectors} elements -> {outputs.volume}"))
