"""``invdiff simulate``: measure a volume and write a measurement file."""

from dataclasses import replace
from pathlib import Path

import click

from invdiff.cli.options import Range, gather_operator, hush, input_options, operator_options, split_settings
from invdiff.errors import UsageError


@click.command()
@click.argument("input", required=False, type=click.Path(path_type=Path))
@click.option("--op", required=True, help="Operator, e.g. ct-sparse, mri, blur (see 'invdiff operators').")
@operator_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Measurement file, .h5.")
@click.option("--noise", type=click.Choice(["gaussian", "rician", "poisson"]), help="Images.  [default: gaussian]")
@click.option(
    "--noise-level",
    type=click.FloatRange(0, 1, min_open=True),
    help="MRI, images: noise, share of the contrast.  [default: 0.01]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option("--slices", type=Range(), help="Only slices A to B - 1 along the slice axis of the file.")
@click.option("--slice-axis", type=click.Choice(["auto", "0", "1", "2"]), default="auto", show_default=True)
@click.option("--nan", type=click.Choice(["refuse", "fill"]), default="refuse", show_default=True)
@click.option("--volume-index", type=click.IntRange(0), help="Which 3D volume of a 4D file.")
@input_options
@click.option("--allow-shear", is_flag=True, help="Accept array axes that are not orthogonal (gantry tilt).")
@click.option("--set", "settings", multiple=True, metavar="operator.NAME=VALUE", help="Any operator option.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--quiet", is_flag=True, help="Errors only.")
def simulate(
    input,
    op,
    output,
    noise,
    noise_level,
    seed,
    slices,
    slice_axis,
    nan,
    volume_index,
    series,
    accept,
    allow_shear,
    settings,
    overwrite,
    quiet,
    **given,
):
    """Measure INPUT (without INPUT the built-in phantom): CT of a volume in HU on a finer grid than any solver uses.

    \b
    invdiff simulate scan.nii.gz --op ct-sparse --views 30 -o scan30.h5
    invdiff reconstruct scan30.h5 --reference scan.nii.gz
    """
    from invdiff.case import in_file_order
    from invdiff.destination import check_output
    from invdiff.files import show
    from invdiff.measurement_file import save_measurement
    from invdiff.opening import open_case
    from invdiff.runner import Request

    if quiet:
        hush()
    solver_settings, operator_settings = split_settings(settings)
    if solver_settings:
        name = next(iter(solver_settings))
        raise UsageError(f"--set solver.{name}: nothing is solved here; give it to 'reconstruct'")
    operator = gather_operator(op, given, operator_settings)
    inputs = [] if input is None else [input]
    outputs = check_output(output, overwrite, inputs, suffixes=(".h5", ".hdf5"), beside=False)
    request = Request(input, op, operator, simulate=True, seed=seed, slices=slices)
    request = replace(request, noise=noise, noise_level=noise_level, series=series, accept=accept)
    case = open_case(
        replace(request, slice_axis=slice_axis, nan=nan, volume_index=volume_index, allow_shear=allow_shear)
    )
    save_measurement(outputs.volume, in_file_order(case.measurement, case.grid), overwrite)
    if not quiet:
        size = " x ".join(map(str, case.measurement.y.shape))
        click.echo(show(f"{case.description}: {op}, data of {size} -> {outputs.volume}"))
