"""Compressed pixels of DICOM: every lossless syntax gives its pixels exactly, sizes are read, decoders may die."""

import os
import signal
import time

import numpy as np
import pytest
from corpus_codestreams import BASELINE, DEFLATED, J2K, KINDS, LS, RLE, SV1, encoded, image, make, store

from invdiff.errors import InputError
from invdiff.formats import codestream
from invdiff.volume import load_volume

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")


@pytest.mark.parametrize("name", KINDS)
def test_compressed_slices_have_their_pixels(tmp_path, name):
    uid, needs = KINDS[name]
    for package in needs:
        pytest.importorskip(package, reason=f"{name} needs {package}")
    make(uid)(tmp_path)
    data = load_volume(tmp_path / "a.dcm").data
    plain, compressed = data[:, :, 0].T, data[:, :, 1].T
    np.testing.assert_array_equal(plain, image(uid))
    if uid != BASELINE:
        np.testing.assert_array_equal(compressed, plain)
    else:  # 8 of 12 bits, lossy
        assert np.abs(compressed - plain // 16).max() <= 6 and compressed.std() > 20


@pytest.mark.parametrize(("uid", "bits"), [(LS, 12), (SV1, 16), (BASELINE, 8), (J2K, 12)])
def test_sizes_are_read_from_codestreams(uid, bits):
    if uid == J2K:
        pytest.importorskip("openjpeg", reason="pylibjpeg-openjpeg is not installed")
        assert codestream._size_2000(encoded(uid)) == (*image(uid).shape, bits, 1)
        assert codestream._size_2000(bytes(85) + encoded(uid)) == (*image(uid).shape, bits, 1)  # in a JP2 file
        return
    frames = codestream._FRAMES[uid.rpartition(".")[2]]
    assert codestream._size(encoded(uid), frames) == (*image(uid).shape, bits, 1)
    comment = b"\xff\xfe" + (2 + 13).to_bytes(2, "big") + b"\xff\xc0\xff\xc3\xff\xf7" + bytes(7)
    assert codestream._size(b"\xff\xd8\xff" + comment + encoded(uid)[2:], frames) == (*image(uid).shape, bits, 1)
    with pytest.raises(InputError, match="no frame header of its kind"):
        codestream._size(encoded(uid), (0xC9,))


def test_what_is_wrong_is_named(tmp_path):
    make(RLE)(tmp_path)
    good = encoded(RLE)
    for bad, words in (
        (b"\3" + good[1:], r"0002.dcm: is damaged or truncated \(its RLE header has 3 segments"),
        (good[:8] + b"\x20" + good[9:], "its RLE header has 2 segments at .64, 32., not 2 in order"),
    ):
        store(tmp_path, RLE, [bad])
        with pytest.raises(InputError, match=words):
            load_volume(tmp_path / "a.dcm")
    store(tmp_path, BASELINE, [encoded(BASELINE)[:-2]])
    with pytest.raises(InputError, match="its codestream has no end"):
        load_volume(tmp_path / "a.dcm")
    store(tmp_path, BASELINE, [encoded(BASELINE, image(BASELINE)[:6].T.copy())])
    words = "codestream has 6 x 6 pixels, 8 bits, 1 components; header says 8 x 6, 8, 1"
    with pytest.raises(InputError, match=words):
        load_volume(tmp_path / "a.dcm")
    store(tmp_path, DEFLATED, None)
    with pytest.raises(InputError, match=r"0002\.dcm"):
        load_volume(tmp_path / "a.dcm")


def endless():
    while True:
        pass


def test_a_decoder_may_die_or_never_end(monkeypatch, capfd):
    np.testing.assert_array_equal(codestream.apart(lambda: np.arange(6).reshape(2, 3)), [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(RuntimeError, match=r"^no such table$"):
        codestream.apart(lambda: (_ for _ in ()).throw(ValueError("no such table")))
    for work in (lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3), lambda: os._exit(0)):
        with pytest.raises(InputError, match="its decoder died of it"):
            codestream.apart(work)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="its decoder died of it"):
        patch.setattr(codestream, "_work", lambda work, pipe: os.write(pipe, (9).to_bytes(8, "big") + b"a" + bytes(5)))
        codestream.apart(lambda: np.zeros(1))  # while it spoke
    codestream.apart(lambda: np.zeros(os.system("echo noise; echo noise >&2") + 1))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(codestream, "_SECONDS", 1)
    with pytest.raises(InputError, match="its decoder died of it"):
        codestream.apart(endless)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="its decoder died of it"):
        patch.setattr(codestream, "_PATIENCE", 1)
        codestream.apart(lambda: time.sleep(60))  # as for a lock that nobody holds any more
    assert codestream.apart(lambda: np.zeros(10**6)).shape == (10**6,)  # more than a pipe holds


def test_a_decoder_is_not_left_behind_by_an_interrupt(monkeypatch):
    ends, wait = {}, os.waitpid
    monkeypatch.setattr(os, "waitpid", lambda child, how: ends.update([wait(child, how)]))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            codestream.apart(lambda: time.sleep(5))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    ((child, status),) = ends.items()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_parent_that_ignores_its_children_is_told_what_they_found():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert codestream.apart(lambda: np.arange(3)).tolist() == [0, 1, 2]
        with pytest.raises(RuntimeError, match=r"^no such table$"):
            codestream.apart(lambda: (_ for _ in ()).throw(ValueError("no such table")))
        for work in (lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(0)):
            with pytest.raises(InputError, match="its decoder died of it"):
                codestream.apart(work)
    finally:
        signal.signal(signal.SIGCHLD, before)
