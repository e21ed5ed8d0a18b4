"""What a training reads and what it leaves: files, subjects, validation, the check for copies, pictures."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from invdiff.errors import InputError
from invdiff.priors.memorisation import Memorisation, check_memorisation, nearest
from invdiff.priors.network import NetworkPrior, load_network
from invdiff.priors.train import TrainConfig, Trainer
from invdiff.priors.training_data import Source, load_source
from invdiff.priors.training_files import find_files, find_volumes, load_sources, split_files
from invdiff.priors.unet import UNetConfig
from invdiff.priors.validate import denoising_table, subject_psnr
from invdiff.training_report import write_report
from invdiff.volume import Volume, save_volume

TINY = UNetConfig(channels=(8, 8), blocks=(1, 1), patch=2, embedding=16)
FAST = {"stages": ((0.0, 16, 4),), "phantoms": 0, "network": TINY, "validate_every_s": 0.0}
SPACING = np.diag([-2.0, -2.0, 3.0, 1.0])


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(0, 0.4, shape).astype(np.float32)


def ct(seed=0):
    """HU ``(24, 20, 3)`` with air and tissue, so that it is told from magnitudes."""
    data = np.where(np.arange(24)[:, None, None] < 6, -1000, 100 * noise(seed, 24, 20, 3))
    return np.ascontiguousarray(data, dtype=np.float32)


# --- files ---


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".dcm", ".npz"])
def test_every_format_gives_the_same_slices(tmp_path, suffix):
    if suffix == ".dcm":
        pytest.importorskip("pydicom", reason="DICOM needs pydicom")
    hu, top = ct(), tmp_path / "data"
    top.mkdir()
    if suffix == ".npz":
        np.savez(top / "a.npz", hu=hu.transpose(2, 1, 0))
    else:
        save_volume(Volume(hu, SPACING, "HU", "CT"), top / f"a{suffix}")
    (source,) = load_sources(find_files([top]))
    assert source.modality == "CT" and len(source.slices) == 3
    wanted = hu.transpose(2, 1, 0) / 1000
    assert np.abs(np.stack(source.slices) - wanted).max() < (1e-3 if suffix == ".dcm" else 1e-6)


def test_pictures_of_several_sizes_share_one_scale(tmp_path):
    grey = np.zeros((30, 40), np.uint8)
    grey[5:20, 5:30] = 100
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(np.tile(2 * grey, (1, 2))).save(tmp_path / "b.png")
    source = load_source(tmp_path, name="series 1")
    assert [s.shape for s in source.slices] == [(30, 40), (30, 80)] and source.modality == "image"
    assert source.slices[1].max() == pytest.approx(1.0, abs=1e-6) and source.slices[0].max() == pytest.approx(
        0, abs=1e-6
    )
    assert (source.name, source.subject) == ("series 1", "series 1")


def test_what_shows_nothing_is_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(InputError, match=r"black\.png: is constant \(0\)"):
        load_source(tmp_path / "black.png")
    air = np.full((20, 20, 2), -1000.0)
    air[0] = -950
    save_volume(Volume(air, SPACING, "HU", "CT"), tmp_path / "air.mha")
    with pytest.raises(InputError, match=r"air.mha: no slice shows more than air"):
        load_source(tmp_path / "air.mha")


@pytest.fixture
def tree(tmp_path):
    """Two patients with folders of their own, files of two subjects, and what is no image."""
    for name in ("p1/t1", "p1/t2", "p2", "empty", "notes"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("p1/t1/1.png", "p1/t1/2.png", "p1/t2/1.png", "p2/1.png"):
        Image.fromarray((100 + 50 * noise(0, 20, 20)).astype(np.uint8)).save(tmp_path / name)
    for name in ("sub-07_ses-1_T1w.nii.gz", "sub-07_ses-2_T1w.nii.gz", "chest.nii"):
        nib.save(nib.Nifti1Image(ct(), SPACING), tmp_path / name)
    (tmp_path / "notes" / "readme.txt").write_text("nothing")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_folders_are_searched_and_subjects_found_without_their_names(tree):
    found = {str(f.path.relative_to(tree)): (f.subject, f.name) for f in find_files([tree])}
    assert {k: v[0] for k, v in found.items()} == {
        "chest.nii": "chest",
        "sub-07_ses-1_T1w.nii.gz": "sub-07",
        "sub-07_ses-2_T1w.nii.gz": "sub-07",
        "p1/t1": "folder 1",
        "p1/t2": "folder 1",
        "p2": "folder 2",
    }
    assert len({name for _, name in found.values()}) == 6 and not any("p1" in name for _, name in found.values())
    again = find_files([tree / "p1", tree / "p2"])
    assert len({f.subject for f in again}) == 3


def test_whole_subjects_are_held_out(tree):
    train, held = split_files([tree], "train", "validation")
    assert len({f.subject for f in held}) == 1 and not {f.subject for f in held} & {f.subject for f in train}
    assert len(train) + len(held) == 6
    train, held = split_files([tree], "train", "validation", 3)
    assert len({f.subject for f in held}) == 3 and len({f.subject for f in train}) == 1
    assert split_files([tree], "train", "validation", 0)[1] == []
    assert split_files([tree / "chest.nii"], "train", "validation")[1] == []
    with pytest.raises(InputError, match="4 subjects cannot be held out of 4"):
        split_files([tree], "train", "validation", 4)


def test_a_manifest_says_who_is_held_out_and_no_subject_is_in_both(tmp_path):
    rows = [("a.nii", "x", "train"), ("b.nii", "y", "validation"), ("c.nii", "z", "test"), ("d.raw", "w", "train")]
    entries = [dict(zip(("file", "subject", "split"), row, strict=True)) for row in rows]
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    train, held = split_files([tmp_path], "train", "validation")
    assert [f.path.name for f in train] == ["a.nii"] and [f.subject for f in held] == ["y"]
    assert find_volumes([tmp_path], "test") == [tmp_path / "c.nii"]
    entries[1]["subject"] = "x"
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match="subject x is both to train and to validate on"):
        split_files([tmp_path], "train", "validation")
    with pytest.raises(InputError, match="no volumes of split 'other'"):
        split_files([tmp_path], "other", "validation")
    (tmp_path / "manifest.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="no list of objects with file"):
        find_files([tmp_path])


# --- validation ---


def subject(name, seeds, who):
    return Source(name, "CT", tuple(noise(seed, 32, 48) for seed in seeds), who)


def test_validation_is_the_mean_over_what_there_is_of_a_subject():
    class Idle(torch.nn.Linear):
        """Returns what it is given, plus 0.1."""

        stride = 1

        def forward(self, x, sigma):
            return x + 0.1

    net = Idle(1, 1)
    sources = [subject("a", (1, 2), "x"), subject("b", (3,), "x"), subject("c", (4,), "y")]
    found = subject_psnr(net, sources)
    assert list(found) == ["x", "y"] and list(found["x"]) == ["0.03", "0.05", "0.1", "0.3"]
    rows = denoising_table(lambda x, s: x + 0.1, sources, slices=2, classical=False).rows
    wanted = np.mean([r["network"] for r in rows if r["subject"] == "x" and r["sigma"] == 0.1])
    assert found["x"]["0.1"] == pytest.approx(wanted, abs=1e-3) and 22.5 < wanted < 23.5


def test_the_table_has_a_column_of_the_network_that_is_told_the_modality():
    table = denoising_table(
        lambda x, s: x, [subject("a", (1,), "x")], 1, False, lambda x, s, modality: 0 * x + (modality == "CT")
    )
    assert "labelled" in table.lines()[0] and table.rows[0]["labelled"] < table.rows[0]["network"]


def test_validation_is_kept_over_a_resume_and_written_while_training(tmp_path):
    held = [subject("h", (9,), "held")]
    options = FAST | {"validate_every_s": 1e-9}
    first = Trainer(TrainConfig(**options, steps=3), [subject("a", (1,), "x")], tmp_path, held_out=held)
    first.run(lambda text: None)
    again = Trainer(TrainConfig(**options, steps=5), [subject("a", (1,), "x")], tmp_path, held_out=held)
    lines = []
    again.run(lines.append)
    history = json.loads((tmp_path / "validation.json").read_text())["history"]
    assert [h["step"] for h in history] == [1, 2, 3, 4, 5] and "held" in history[0]["psnr_db"]
    assert any("validation, held" in line for line in lines)
    plain = Trainer(TrainConfig(**FAST, steps=5), [subject("a", (1,), "x")], tmp_path / "plain")
    plain.run(lambda text: None)
    fresh = Trainer(TrainConfig(**options, steps=5), [subject("a", (1,), "x")], tmp_path / "f", held_out=held)
    fresh.run(lambda text: None)  # validation draws nothing from the training
    assert all(map(torch.equal, plain.net.parameters(), fresh.net.parameters()))


# --- copies ---


def brute(image, field):
    """Over all positions and turns, one by one."""
    best, n = np.inf, len(image)
    for turned in (np.rot90(f, k) for f in (image, image[:, ::-1]) for k in range(4)):
        for i in range(field.shape[0] - n + 1):
            for j in range(field.shape[1] - n + 1):
                best = min(best, ((turned - field[i : i + n, j : j + n]) ** 2).sum())
    return np.sqrt(best / ((image - image.mean()) ** 2).sum())


def test_the_nearest_crop_is_that_of_a_search_by_hand():
    fields = [noise(1, 14, 17) - 0.5, noise(2, 12, 9) - 0.5]
    images = np.stack([noise(3, 8, 8), fields[1][2:10, 1:9] + 0.05 * noise(4, 8, 8)])
    wanted = [min(brute(image, field) for field in fields) for image in images]
    assert nearest(images, fields) == pytest.approx(wanted, rel=1e-4)
    assert wanted[1] < 0.2 < wanted[0]


def test_a_turned_copy_is_found_and_a_small_slice_is_padded():
    field = noise(1, 200, 150)
    copy = np.ascontiguousarray(np.rot90(field[30:158, 10:138][:, ::-1]))
    assert nearest(copy[None], [noise(2, 140, 130), field])[0] < 0.01  # sides of 128 are averaged by 2
    assert nearest(noise(3, 20, 20)[None], [noise(4, 10, 30)])[0] > 0.5


def test_copies_are_counted_against_held_out_crops():
    train, other = [subject("a", (1, 2), "x")], [subject("b", (3,), "y")]
    samples = np.stack([train[0].slices[1][5:21, 3:19], noise(7, 16, 16)])
    found = check_memorisation(samples, train, other, crops=6)
    assert (
        found.slices == 2 and len(found.held_out) == 6 and found.nearer == 1 + (found.samples[1] < min(found.held_out))
    )
    assert (
        found.samples[0] < 1e-2
        and "1.6 would be" not in found.sentence()
        and "0.3 would be by chance" in found.sentence()
    )
    alone = check_memorisation(samples, train, [])
    assert alone.nearer == 0 and "nothing to compare" in alone.sentence()
    assert Memorisation((0.1, 0.15, 0.5), (0.2, 0.3), 9).nearer == 2
    assert json.loads(json.dumps(found.as_dict()))["nearer"] == found.nearer


# --- what is left ---


def test_validate_writes_figures_samples_and_curve(tmp_path, run, monkeypatch):
    monkeypatch.setattr("invdiff.priors.validate.classical_denoisers", dict)  # slow, and installed or not
    data, folder = tmp_path / "data", tmp_path / "net"
    data.mkdir()
    for k in range(2):
        np.savez(data / f"s{k}.npz", hu=(1000 * noise(k, 2, 32, 32)).clip(-900))
    options = FAST | {"classes": ("CT", "image"), "steps": 101, "stages": ((0.0, 16, 1), (0.5, 32, 1))}
    learnt, _ = split_files([data], "train", "validation")
    Trainer(TrainConfig(**options), load_sources(learnt), folder).run(lambda text: None)
    code, out, err = run("priors", "validate", folder, data, "-o", tmp_path / "seen", "--count", "3")
    assert (code, err) == (0, ""), err
    found = json.loads((tmp_path / "seen" / "validation.json").read_text())
    assert {"network", "labelled", "noisy", "subject"} <= set(found["denoising"][0]) and len(found["denoising"]) == 4
    assert len(found["memorisation"]["samples"]) == 3 and "memorisation: the nearest of 2" in out
    for name in ("samples.png", "curve.png"):
        with Image.open(tmp_path / "seen" / name) as picture:
            assert picture.info["Software"] == "invdiff" and min(picture.size) > 300
    assert run("priors", "validate", "embedded", data)[0] == 2


def test_samples_are_shared_out_among_classes(tmp_path, monkeypatch):
    Trainer(TrainConfig(**FAST, classes=("CT", "image"), steps=1), [subject("a", (1,), "x")], tmp_path).run(print)
    told = []
    denoise = NetworkPrior.denoise

    def spy(self, x, sigma, context=None):
        told.append((self.info.label, x.shape[0]))
        return denoise(self, x, sigma, context)

    monkeypatch.setattr(NetworkPrior, "denoise", spy)
    write_report(tmp_path, [], [], count=5)
    assert set(told) == {("CT", 2), ("image", 3)}
    assert load_network(tmp_path).info.label is None
    assert not json.loads((tmp_path / "validation.json").read_text())["history"]
