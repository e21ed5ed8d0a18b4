"""Measurement files: exact round trip, and a reason for every refusal."""

import json
import os

import h5py
import numpy as np
import pytest

from invdiff.errors import InputError, UsageError
from invdiff.measurement import Measurement
from invdiff.measurement_file import load_measurement, save_measurement

VIEWS, DETECTORS, SLICES = 20, 31, 3


def parts(**changes):
    rng = np.random.default_rng(0)
    whole = {
        "y": rng.uniform(0, 5, (SLICES, 1, VIEWS, DETECTORS)).astype(np.float32),
        "operator": {"name": "ct-sparse", "views_deg": np.linspace(0, 171, VIEWS), "detector_pitch_mm": 1.5},
        "volume": {"shape": [24, 24, SLICES], "affine": np.diag([1.5, 1.5, 3, 1]), "units": "HU", "modality": "CT"},
        "noise": {"model": "poisson", "photons": 1e5},
    }
    return whole | changes


def write(path, edit=None, **changes):
    save_measurement(path, Measurement(**parts(**changes)), overwrite=True)
    if edit:
        with h5py.File(path, "r+") as file:
            edit(file)
    return path


def replace(name, value, **options):
    def edit(file):
        del file[name]
        file.create_dataset(name, data=value, **options)

    return edit


def refuse(path, words, **options):
    with pytest.raises(InputError, match=words) as caught:
        load_measurement(path, **options)
    assert "\n" not in str(caught.value) and path.name in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize("weighted", [False, True])
def test_round_trip(tmp_path, weighted):
    weights = np.full((SLICES, 1, VIEWS, DETECTORS), 2.5, np.float32) if weighted else None
    measurement = Measurement(**parts(weights=weights))
    path = tmp_path / "m.h5"
    digest = save_measurement(path, measurement)
    again = load_measurement(path)
    np.testing.assert_array_equal(again.y, measurement.y)
    assert again.y.dtype == np.float32 and (again.weights is not None) == weighted
    assert again.operator["views_deg"] == list(measurement.operator["views_deg"])
    assert again.noise == measurement.noise and again.volume["shape"] == [24, 24, SLICES]
    np.testing.assert_array_equal(again.volume["affine"], measurement.volume["affine"])
    assert save_measurement(tmp_path / "other.h5", measurement) == digest
    with h5py.File(path) as file:  # and in another second too: no dates inside
        assert not any(found.id.get_create_plist().get_obj_track_times() for found in file.values())
    with pytest.raises(UsageError, match="--overwrite"):
        save_measurement(path, measurement)


Y = parts()["y"]
NAN = Y.copy()
NAN[0, 0, 1, 2] = np.nan
RADIANS = {"name": "ct-sparse", "views_deg": np.linspace(0, 3.1, VIEWS)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y": NAN}, "1 NaN or infinite"),
        ({"y": Y[:, 0]}, "slices, channels, views, detectors"),
        ({"y": Y[:, :, :19]}, "20 angles but 19 projections"),
        ({"y": Y + 60}, r"-log\(counts"),
        ({"y": (Y * 1000).astype(np.uint16)}, r"-log\(counts"),
        ({"y": Y.astype(np.complex64)}, "dtype complex64"),
        ({"y": Y.repeat(2, axis=1)}, "one channel"),
        ({"y": Y[:2]}, "2 slices"),
        ({"operator": RADIANS}, "like radians"),
        ({"operator": {"name": "ct-sparse", "angles_rad": [0.0]}}, "angles_rad"),
        ({"operator": {"name": "ct-sparse", "views_deg": ["a"] * VIEWS}}, "not a list of numbers"),
        ({"operator": {"name": "ct-sparse", "detector_count": 30}}, "30 detector bins but 31"),
        ({"operator": {}}, "no 'name'"),
        ({"noise": {}}, "no 'model'"),
        ({"volume": {"shape": [24, 24, 3]}}, "no affine, units, modality"),
        ({"volume": parts()["volume"] | {"shape": [24, 24]}}, "three positive integers"),
        ({"volume": parts()["volume"] | {"affine": np.zeros((4, 4))}}, "invertible"),
        ({"volume": parts()["volume"] | {"affine": [[1, "x"]]}}, "invertible"),
        ({"volume": parts()["volume"] | {"slice_axis": 0}}, "3 slices"),
        ({"volume": parts()["volume"] | {"slice_axis": 7}}, "give 0, 1 or 2"),
        ({"volume": parts()["volume"] | {"units": 5}}, "units is 5; give a text"),
        ({"volume": parts()["volume"] | {"modality": None}}, "modality is None; give a text"),
        (
            {"noise": {"model": "gaussian", "std": 1e300}},
            "std is 1e[+]300; give a finite number, positive, at most 1e[+]15",
        ),
        ({"operator": {"name": "ct-sparse", "mu_water_per_mm": 1e300}}, "mu_water_per_mm is 1e[+]300; give a finite"),
        ({"weights": Y[:1]}, "shaped like y"),
        ({"weights": -Y - 1}, ">= 0"),
    ],
)
def test_measurements_that_make_no_sense(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        Measurement(**parts(**changes))
    assert "\n" not in str(caught.value)


def test_other_operators_may_hold_large_values():
    Measurement(**parts(y=Y + 60, operator={"name": "blur"}))


def test_limited_angles_in_degrees_pass():
    Measurement(**parts(operator={"name": "ct-limited", "views_deg": np.linspace(0, 90, VIEWS)}))


def test_parameters_that_json_cannot_hold(tmp_path):
    for value, words in ((np.nan, "finite"), (object(), "object is not")):
        with pytest.raises(InputError, match=words):
            save_measurement(tmp_path / "m.h5", Measurement(**parts(noise={"model": "x", "level": value})))
    assert os.listdir(tmp_path) == []


def test_links_and_foreign_storage_are_refused(tmp_path):
    secret = write(tmp_path / "secret.h5")
    layout = h5py.VirtualLayout(Y.shape, np.float32)
    layout[:] = h5py.VirtualSource(secret, "y", Y.shape)
    (tmp_path / "raw").write_bytes(Y.tobytes())

    def link(target):
        def edit(file):
            del file["y"]
            file["y"] = target

        return edit

    def virtual(file):
        del file["y"]
        file.create_virtual_dataset("y", layout)

    for edit, words in (
        (link(h5py.ExternalLink(str(secret), "/y")), "link to elsewhere"),
        (link(h5py.SoftLink("/operator")), "link to elsewhere"),
        (virtual, "another file"),
        (replace("y", Y, external=str(tmp_path / "raw")), "another file"),
        (lambda file: file.create_group("more"), "not a dataset"),
    ):
        refuse(write(tmp_path / "m.h5", edit), words)


def test_declared_sizes_are_checked_first(tmp_path):
    def huge(file):
        del file["y"]
        file.create_dataset("y", (10**4, 1, 10**4, 2000), np.float32, chunks=(1, 1, 10, 2000))

    def unwritten(file):
        del file["y"]
        file.create_dataset("y", Y.shape, np.float32, chunks=(1, *Y.shape[1:]))[0] = Y[0]

    refuse(write(tmp_path / "m.h5", huge), "declares 800 GB")
    refuse(write(tmp_path / "m.h5", unwritten), "never written")
    refuse(write(tmp_path / "m.h5"), "the limit is", max_bytes=1000)
    refuse(write(tmp_path / "m.h5", replace("operator", np.bytes_(b" " * (2**24 + 1)))), "larger than 16 MiB")
    refuse(write(tmp_path / "m.h5", replace("operator", " " * (2**24 + 1))), "larger than 16 MiB")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("operator", np.bytes_(b"{not json"), "not JSON"),
        ("operator", np.bytes_(b'{"name": NaN}'), "NaN is not JSON"),
        ("operator", np.bytes_(b"[1, 2]"), "not an object"),
        ("operator", np.bytes_(b"[" * 100000), "not JSON"),
        ("operator", np.bytes_(b'{"a": "\xff"}'), "not JSON"),
        ("operator", np.zeros(4), "not one JSON text"),
        ("y", Y.astype(np.complex64), "dtype complex64"),
        ("y", np.zeros(3, "S4"), "dtype"),
        ("y", h5py.Empty("f4"), "dtype"),
        ("y", (Y * 1000).astype(np.int32), r"-log\(counts"),
        ("y", NAN, "NaN or infinite"),
    ],
)
def test_bad_content(tmp_path, name, value, words):
    refuse(write(tmp_path / "m.h5", replace(name, value)), words)


def test_other_versions_and_missing_parts(tmp_path):
    refuse(write(tmp_path / "m.h5", lambda file: file.attrs.modify("format_version", 2)), "format version .*2")
    refuse(write(tmp_path / "m.h5", lambda file: file.attrs.create("format_version", "1")), "format version '1'")
    refuse(write(tmp_path / "m.h5", lambda file: file.attrs.pop("format")), "no invdiff measurement")
    for name in ("y", "operator", "volume", "noise"):
        refuse(write(tmp_path / "m.h5", lambda file, name=name: file.pop(name)), f"has no /{name}")


def test_variable_length_json_is_read(tmp_path):
    path = write(tmp_path / "m.h5", replace("noise", json.dumps({"model": "none"})))
    assert load_measurement(path).noise == {"model": "none"}


def test_damaged_files(tmp_path):
    good = write(tmp_path / "m.h5").read_bytes()
    bad = tmp_path / "bad.h5"
    for content, words in ((b"", "not HDF5"), (os.urandom(3000), "not HDF5"), (good[: len(good) // 2], "truncated")):
        bad.write_bytes(content)
        refuse(bad, words)
    place = good.index(Y[1].tobytes()[:64]) + 40
    bad.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    refuse(bad, "damaged")
    with pytest.raises(InputError, match="does not exist"):
        load_measurement(tmp_path / "none.h5")


def test_flipped_bits_never_change_the_data(tmp_path):
    good = write(tmp_path / "m.h5").read_bytes()
    bad = tmp_path / "bad.h5"
    for place in range(0, len(good), 37):
        bad.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        try:
            again = load_measurement(bad)
        except InputError as error:
            assert "\n" not in str(error)
        else:  # padding between the parts
            np.testing.assert_array_equal(again.y, Y)
            assert again.noise == parts()["noise"]
