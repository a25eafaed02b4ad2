"""Files of statistics are untrusted when read, and written in the exchange format."""

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_sets import digits_fixture as digits_fixture
from feature_sets import stretched
from torch.testing import assert_close

from sde_diffusion.files import npz
from sde_diffusion.files.storage import BadFile
from sde_diffusion.metrics.quality import Statistics, frechet_distance


def test_statistics_survive_a_file_and_are_in_the_exchange_format(tmp_path):
    made = Statistics.of(stretched(100, 8))
    made.save(tmp_path / "a.npz")
    found = Statistics.load(tmp_path / "a.npz")
    assert torch.equal(found.mean, made.mean)
    assert torch.equal(found.covariance, made.covariance)
    assert found.count == 100
    with np.load(tmp_path / "a.npz", allow_pickle=False) as theirs:  # as other programs do
        assert_close(theirs["mu"], made.mean.numpy())
        assert_close(theirs["sigma"], made.covariance.numpy())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_other_programs_write_is_read(tmp_path, save):
    """mu and sigma alone, in float32, column-major too: then no count is known."""
    made = Statistics.of(stretched(100, 8))
    sigma = np.asfortranarray(made.covariance.numpy().astype(np.float32))
    save(tmp_path / "a.npz", mu=made.mean.numpy().astype(np.float32), sigma=sigma)
    found = Statistics.load(tmp_path / "a.npz")
    assert found.count is None
    assert_close(found.covariance, made.covariance, rtol=1e-6, atol=1e-5)
    assert "unknown" in str(frechet_distance(found, made))


def npy(array=None, header=None, data=b"", version=1):
    """A .npy file; or one with a header of our own."""
    if array is not None:
        file = io.BytesIO()
        np.lib.format.write_array(file, array, allow_pickle=True)
        return file.getvalue()
    text = (header + "\n").encode("latin1")
    size = struct.pack("<H", len(text)) if version == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def header(shape, descr="<f8", more=""):
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, {more}}}"


class Bomb:
    """Content of a malicious pickle: leaves a mark if it is run."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/never-made-by-a-test",)


MU, SIGMA = np.zeros(3), np.eye(3)
NAN, SKEW = np.eye(3) * np.nan, np.eye(3) + np.triu(np.ones((3, 3)), 1)
GOOD = {"mu": npy(MU), "sigma": npy(SIGMA)}
HOSTILE = {
    "no sigma": ({"mu": npy(MU)}, "no array 'sigma'"),
    "another name": (GOOD | {"sigma2": npy(SIGMA)}, "unknown or repeated arrays"),
    "near misses": ({"Mu": npy(MU), "sigma": npy(SIGMA)}, "no array 'mu'"),
    "nothing": ({}, "no array 'mu' nor 1 others"),
    "nan": ({"mu": npy(MU), "sigma": npy(NAN)}, "finite"),
    "infinite": ({"mu": npy(MU + np.inf), "sigma": npy(SIGMA)}, "finite"),
    "not symmetric": ({"mu": npy(MU), "sigma": npy(SKEW)}, "symmetric"),
    "negative": ({"mu": npy(MU), "sigma": npy(-SIGMA)}, "negative"),
    "sizes apart": ({"mu": npy(np.zeros(4)), "sigma": npy(SIGMA)}, r"\(4,\) and \(3, 3\)"),
    "a matrix for mu": ({"mu": npy(SIGMA), "sigma": npy(SIGMA)}, "must be"),
    "no features": ({"mu": npy(MU[:0]), "sigma": npy(SIGMA[:0, :0])}, "must be"),
    "three sizes": ({"mu": npy(MU), "sigma": npy(np.zeros((3, 3, 1)))}, "must be"),
    "integers": ({"mu": npy(MU.astype(int)), "sigma": npy(SIGMA)}, "dtype of mu"),
    "complex": ({"mu": npy(MU + 0j), "sigma": npy(SIGMA)}, "real numbers"),
    "half": ({"mu": npy(MU.astype(np.float16)), "sigma": npy(SIGMA)}, "dtype of mu"),
    "text": ({"mu": npy(np.array("x")), "sigma": npy(SIGMA)}, "real numbers"),
    "a pickle": ({"mu": npy(np.array([Bomb()] * 3)), "sigma": npy(SIGMA)}, "damaged"),
    "fields": ({"mu": npy(np.zeros(3, "f8,f8")), "sigma": npy(SIGMA)}, "real numbers"),
    "a count of two": (GOOD | {"count": npy(np.array([5, 5]))}, "one integer"),
    "a real count": (GOOD | {"count": npy(np.array(5.0))}, "one integer"),
    "a count below 2": (GOOD | {"count": npy(np.array(1))}, "at least 2"),
    "an oversized header": (GOOD | {"mu": npy(header=header("(3,)") + " " * 60_000)}, "damaged"),
    "a huge shape": (GOOD | {"sigma": npy(header=header("(4000000, 4000000)"))}, "damaged"),
    "more than is there": (GOOD | {"sigma": npy(header=header("(4000, 4000)"))}, "damaged"),
    "less than is there": (
        GOOD | {"mu": npy(header=header("(2,)"), data=b"\0" * 24)},
        "real numbers",
    ),
    "a negative size": (GOOD | {"mu": npy(header=header("(-3,)"))}, "damaged"),
    "code in the header": (GOOD | {"mu": npy(header="__import__('os').abort()")}, "damaged"),
    "nested brackets": (GOOD | {"mu": npy(header="(" * 9000)}, "damaged"),
    "an odd version": (GOOD | {"mu": npy(header=header("(3,)"), version=7)}, "damaged"),
    "not an array": (GOOD | {"mu": b"hello"}, "damaged"),
    "an empty member": (GOOD | {"mu": b""}, "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name_and_reason(tmp_path, name):
    members, reason = HOSTILE[name]
    path = tmp_path / "stats.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member + ".npy", data)
    with pytest.raises(BadFile, match=reason) as refused:
        Statistics.load(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)
    assert not Path("/tmp/never-made-by-a-test").exists()


def test_what_is_no_npz_is_refused(tmp_path):
    """Truncated at any of its bytes, a member twice, packed in a rare way, a folder, a pipe."""
    path = tmp_path / "stats.npz"
    Statistics.of(stretched(100, 8)).save(path)
    whole = path.read_bytes()
    for end in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(BadFile, match=str(path)):
            Statistics.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in GOOD.items():
            archive.writestr(member + ".npy", data)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("mu.npy", npy(MU + 1))
    with pytest.raises(BadFile, match="unknown or repeated"):
        Statistics.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for member, data in GOOD.items():
            archive.writestr(member + ".npy", data)
    with pytest.raises(BadFile, match="must be stored or deflated"):
        Statistics.load(path)
    os.mkfifo(tmp_path / "pipe.npz")
    for other, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe.npz", "not a file"),
        (tmp_path / "absent.npz", "No such file"),
    ):
        with pytest.raises(BadFile, match=reason):
            Statistics.load(other)


def test_what_would_unpack_to_more_than_an_array_is_not_unpacked(tmp_path, monkeypatch):
    """A header of 2^28 bytes that compress well; and 10,000 members."""
    path = tmp_path / "stats.npz"
    monkeypatch.setattr(npz, "LIMIT", 64)  # so that the bomb can be a small one
    bomb = b"\x93NUMPY\2\0" + struct.pack("<I", 2**28) + b" " * 200_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", bomb)
        archive.writestr("sigma.npy", GOOD["sigma"])
    with pytest.raises(BadFile, match=r"mu\.npy has 200012 bytes"):
        Statistics.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(10_000):
            archive.writestr(f"{k}.npy", b"")
    with pytest.raises(BadFile, match="not a zip archive of a few arrays"):
        Statistics.load(path)


def test_no_flipped_bit_of_the_numbers_is_silent(tmp_path):
    """The zip's checksum sees it. A few bytes of a zip's own fields mean nothing (times, flags):
    what is read then is what was written."""
    path = tmp_path / "stats.npz"
    made = Statistics.of(stretched(100, 4))
    made.save(path)
    whole = path.read_bytes()
    numbers = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        at, bit = int(numbers.integers(len(whole))), int(numbers.integers(8))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        try:
            found = Statistics.load(path)
        except BadFile:
            refused += 1
        else:
            assert torch.equal(found.mean, made.mean)
            assert torch.equal(found.covariance, made.covariance)
    assert refused > 150
