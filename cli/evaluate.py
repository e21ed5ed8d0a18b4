"""``invdiff evaluate``: figures of a reconstruction against a reference."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("reconstruction", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(reconstruction, reference, as_json):
    """PSNR, SSIM, NRMSE and HU error of RECONSTRUCTION against REFERENCE, each with its convention."""
    from invdiff.output import compare_volumes
    from invdiff.provenance import plain
    from invdiff.volume import load_volume

    truth = load_volume(reference)
    result = compare_volumes(load_volume(reconstruction, modality=truth.modality), truth)
    if as_json:
        click.echo(json.dumps(plain(result), indent=2))
        return
    for name, sentence in result["convention"].items():
        value = result[name]
        click.echo(f"{name:13} {'-' if value is None else format(value, '10.4f')}   {sentence}")
