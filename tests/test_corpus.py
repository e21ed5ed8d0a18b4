"""Every reader against the corpus of bad inputs and against random mutations: a refusal in one line or a valid value.

The first part is a fixed list, the second (hypothesis, always the same examples) changes, cuts and doubles bytes of a
valid file. Both run in processes of their own, within limits of time and memory.
"""

import importlib
import shutil

import pytest
from corpus import cases, mutated, run
from corpus_codestreams import READERS as CODESTREAMS
from corpus_dicom import READERS as DICOM
from corpus_measurement import READERS as MEASUREMENTS
from corpus_models import READERS as MODELS
from corpus_raw import READERS as RAW
from corpus_volumes import READERS as VOLUMES

from invdiff.cli import main

EXAMPLES = 12  # of hypothesis, for every reader
READERS = {reader.name: reader for reader in (*VOLUMES, *DICOM, *CODESTREAMS, *MEASUREMENTS, *RAW, *MODELS)}


def needed(name):
    for package in READERS[name].needs:
        pytest.importorskip(package, reason=f"{name} needs {package}")
    return READERS[name]


@pytest.mark.parametrize("name", READERS)
def test_no_bad_input_passes_or_crashes(name, tmp_path):
    outcomes = run(needed(name), tmp_path / "corpus")
    assert [(o.case, o.verdict, o.text) for o in outcomes if o.verdict not in ("refused", "read")] == []
    assert sum(o.verdict == "refused" for o in outcomes) > 20


def search(good, harmless):
    """Some mutations of the bytes ``good``, by hypothesis; raises AssertionError where one is neither."""
    import hypothesis
    from hypothesis import strategies as st

    place = st.integers(0, len(good) - 1)
    near = st.integers(0, min(len(good), 400) - 1)  # headers are what readers believe
    size = st.integers(1, 64)
    change = st.one_of(
        st.tuples(st.just("set"), st.one_of(near, place), st.binary(min_size=1, max_size=4)),
        *(st.tuples(st.just(kind), place, size) for kind in ("cut", "double", "zero")),
    )

    @hypothesis.settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
    @hypothesis.given(st.lists(change, min_size=1, max_size=4))
    def holds(changes):
        data = good
        for kind, at, what in changes:
            end = at + (len(what) if kind == "set" else what)
            put = {"set": what, "cut": b"", "double": data[at:end] * 2}.get(kind, bytes(end - at))
            data = data[:at] + put + data[end:]
        found = harmless(data)
        assert found.verdict in ("refused", "read"), found

    holds()


@pytest.mark.parametrize("name", READERS)
def test_random_mutations_are_refused_or_harmless(name, tmp_path):
    pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    assert mutated(needed(name), tmp_path, search) == ""


COMMANDS = {
    **{reader.name: ("--op", "denoise", "--solver", "measured") for reader in (*VOLUMES, *DICOM, *CODESTREAMS)},
    "measurement file, CT": ("--solver", "fbp"),
    "measurement file, MRI": ("--solver", "cgls"),
    "fastMRI": ("--solver", "cgls"),
    "ISMRMRD": ("--solver", "cgls"),
    "BART": ("--solver", "cgls"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_refuses_in_one_line(name, tmp_path, here, capfd):
    """Every eighth case that must be refused, through the command line."""
    reader = needed(name)
    (tmp_path / "good").mkdir()
    reader.make(tmp_path / "good")
    wanted = [(case, edit) for case, edit, outcome in cases(reader, tmp_path / "good") if outcome == "refuse"]
    for case, edit in wanted[:: max(1, len(wanted) // 6)]:
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(tmp_path / "good", work, symlinks=True)
        edit(work)
        given = work / (reader.given or reader.target)
        with pytest.raises(SystemExit) as ended:
            main(["reconstruct", str(given), *COMMANDS[name], "-o", "r.nii.gz", "--dry-run"])
        code, (out, err) = ended.value.code, capfd.readouterr()  # with what libraries in C print
        assert code in (2, 3) and out == "", (case, code, out)
        assert err.count("\n") == 1 and err.startswith("invdiff: error: ") and given.name in err, (case, err)


def test_the_corpus_has_a_reader_for_every_format():
    from invdiff.formats import FORMATS

    modules = {"nifti": "NIfTI", "nrrd": "NRRD", "metaimage": "MetaImage", "dicom": "DICOM", "pictures": "PNG"}
    assert {**modules, "arrays": "npy"}.keys() == FORMATS.keys()
    assert {*modules.values(), "npy", "npz", "TIFF"} < READERS.keys()
    assert importlib.import_module("corpus").MEMORY <= 2**30
