"""What several test files share: a small world to run the command line in."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes: tests are small, and two processes share the cores

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from training_cases import volume

from invdiff.cli import main
from invdiff.phantom import thorax
from invdiff.priors.unet import EDMDenoiser, UNetConfig

AFFINE = np.array([[-9.0, 0, 0, 100], [0, -9, 0, 120], [0, 0, 3, -30], [0, 0, 0, 1]])


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a CT of 40 x 36 x 5 voxels, its measurement and a small random prior."""
    folder = tmp_path_factory.mktemp("world")
    hu = thorax((5, 40, 40), (3.0, 9.0, 9.0)).hu.transpose(2, 1, 0)[:, 2:38]
    nib.save(nib.Nifti1Image(np.ascontiguousarray(hu), AFFINE), folder / "ct.nii.gz")
    config = UNetConfig(channels=(8, 8), blocks=(1, 1), patch=2, embedding=16)
    torch.manual_seed(0)
    weights = {k: v + 0.05 * torch.randn_like(v) for k, v in EDMDenoiser(config).state_dict().items()}
    (folder / "prior").mkdir()
    save_file(weights, folder / "prior" / "model.safetensors", {"format": "invdiff-unet-edm"})
    info = {"name": "tiny", "sigma_min": 0.005, "sigma_max": 20.0, "voxel_mm": [0.7, 10.0]}
    (folder / "prior" / "config.json").write_text(json.dumps({"network": config.as_dict(), "info": info}))
    with pytest.raises(SystemExit) as ended:
        names = [str(folder / name) for name in ("ct.nii.gz", "m.h5")]
        main(["simulate", names[0], "--op", "ct-sparse", "--views", "12", "-o", names[1], "--quiet"])
    assert ended.value.code == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder; pictures, tested elsewhere and slow, are a few bytes."""
    from invdiff.files import atomic_write

    def sketch(path, *args, **options):
        with atomic_write(path) as part:
            part.write_bytes(b"picture")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("invdiff.output.mosaic", sketch)
    return tmp_path


@pytest.fixture
def run(world, here, capsys):
    """``run(*args)`` gives exit code, stdout and stderr; ``$`` stands for the world's folder."""

    def call(*args):
        with pytest.raises(SystemExit) as ended:
            main([str(a).replace("$", str(world)) for a in args])
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(run, here):
    """``refused(code, words, *args)``: one line on stderr that holds all words, nothing else, nothing written."""

    def call(code, words, *args):
        before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
        found, out, err = run(*args)
        err = err.strip()  # click adds an empty line for the ^C of a terminal
        assert (found, out, err.count("\n")) == (code, "", 0), (found, out, err)
        assert err.startswith("invdiff: error: ")
        assert [w for w in words.split("|") if w not in err] == [], err
        assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before

    return call


@pytest.fixture
def loud(caplog):
    """Warnings are caught, though commands that ran before may have asked for quiet."""
    caplog.set_level("WARNING", "invdiff")


@pytest.fixture
def two_subjects(tmp_path, monkeypatch):
    """A folder of two subjects to train on; reports are left out."""
    monkeypatch.setattr("invdiff.training_report.write_report", lambda *args, **options: None)
    (tmp_path / "data").mkdir()
    for k in range(2):
        volume(tmp_path / "data" / f"s{k}.npz", k)
    return tmp_path / "data"
