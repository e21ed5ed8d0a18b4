"""``invdiff operators show``: what an operator measures on a grid, in words and as a picture."""

import json
from pathlib import Path

import click

from invdiff.cli.options import gather_operator, heard, numbers, operator_options, split_settings
from invdiff.errors import UsageError

SUFFIXES = (".h5", ".hdf5")
EXAMPLE = (16, 192, 192), (3.0, 1.9, 1.9)  # the grid of the built-in phantom


@click.command()
@click.argument("name", metavar="NAME|FILE.h5")
@operator_options
@click.option("--shape", metavar="[S,]H,W", help="Slices, rows and columns of the image.  [default: 16,192,192]")
@click.option("--pixel-mm", metavar="MM|[S,]R,C", help="Distance of slices, rows and columns.  [default: 3,1.9,1.9]")
@click.option("--like", type=click.Path(path_type=Path), help="Take the grid of this volume instead.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Draw it: a PNG.")
@click.option("--set", "settings", multiple=True, metavar="operator.NAME=VALUE", help="Any operator option.")
@click.option("--overwrite", is_flag=True, help="Replace an existing picture.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name, shape, pixel_mm, like, output, settings, overwrite, as_json, **given):
    """Show the operator NAME with its options, or that of a measurement file: sizes, what it misses, with -o a picture.

    \b
    invdiff operators show scan.h5 -o scan.png
    invdiff operators show ct-limited --geometry fan --arc 120 -o scan.png
    invdiff operators show blur --kernel gaussian3d:3 --set operator.unit=mm --like scan.nii.gz
    """
    solver_settings, operator_settings = split_settings(settings)
    if solver_settings:
        raise UsageError(f"--set solver.{next(iter(solver_settings))}: nothing is solved here; drop the option")
    stored = Path(name) if name.lower().endswith(SUFFIXES) else None
    if stored is not None:
        refuse_with_file(stored, shape, pixel_mm, like, {**given, **operator_settings})
    else:
        options = named(name, given, operator_settings)
        grid, spacing = pick_grid(shape, pixel_mm, like)
    if output is not None:
        from invdiff.destination import check_output

        inputs = [path for path in (like, stored) if path is not None]
        output = check_output(output, overwrite, inputs, suffixes=(".png",), beside=False).volume
    from invdiff.overview import overview

    with heard() as warnings:
        seen = overview(name, grid, spacing, **options) if stored is None else overview_of_file(stored)
    for text in warnings:
        if text not in seen.operator.notes:
            click.echo(f"warning: {text}", err=True)
    if output is not None:
        from invdiff.drawing import draw

        draw(seen, output, overwrite)
    click.echo(json.dumps(seen.as_dict(), indent=2) if as_json else "\n".join(seen.lines()))


def named(name: str, given: dict, settings: dict[str, str]) -> dict:
    """The options of an operator of the table; an unknown name is refused before anything heavy is imported."""
    from invdiff.errors import choose
    from invdiff.operators import OPERATORS

    choose(name, OPERATORS, "operator")
    return gather_operator(name, given, settings)


def refuse_with_file(path: Path, shape, pixel_mm, like, options: dict) -> None:
    """A measurement file fixes grid and operator."""
    given = {"shape": shape, "pixel-mm": pixel_mm, "like": like, **options}
    if wrong := sorted(key.replace("_", "-") for key, value in given.items() if value is not None):
        raise UsageError(f"{path.name}: the file fixes operator and grid; drop {', '.join(wrong)}")


def overview_of_file(path: Path):
    """The operator and grid that a measurement file stores."""
    from invdiff.files import show as printable
    from invdiff.opening import open_case
    from invdiff.operators import OPERATORS
    from invdiff.overview import Overview
    from invdiff.runner import Request

    case = open_case(Request(input=path, op=None))
    described = case.measurement.operator
    name = described["name"]
    options = {key: described[key] for key in OPERATORS[name].options if key in described}
    spacing = (case.grid.spacing_mm, *case.grid.pixel_mm)
    return Overview(name, case.operator, case.grid.data.shape, spacing, options, printable(path.name))


def pick_grid(shape: str | None, pixel_mm: str | None, like: Path | None):
    """(slices, H, W) and (slice, row, column) spacing in mm."""
    if like is not None:
        if shape or pixel_mm:
            raise UsageError("--like gives the grid; drop --shape and --pixel-mm")
        from invdiff.volume import load_volume, to_slices

        grid = to_slices(load_volume(like, nan="fill"))
        return grid.data.shape, (grid.spacing_mm, *grid.pixel_mm)
    sizes = numbers("--shape", shape, int, "H,W or S,H,W, e.g. 256,256", (2, 3))
    steps = numbers("--pixel-mm", pixel_mm, float, "MM, ROW,COLUMN or SLICE,ROW,COLUMN, e.g. 0.8", (1, 2, 3))
    if steps is not None and len(steps) == 1:
        steps = steps * 3
    return _filled(sizes, EXAMPLE[0], 1), _filled(steps, EXAMPLE[1], EXAMPLE[1][0])


def _filled(values, default, first):
    """``default`` for None; two values get the slices' one in front."""
    if values is None:
        return default
    return values if len(values) == 3 else (first, *values)
