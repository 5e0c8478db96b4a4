"""The cache of decompositions: the same bits, or as if it were not there."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
from keras import ops

import keras_svdtune
from keras_svdtune.matrix import cache
from keras_svdtune.matrix import decompose as decomposition
from keras_svdtune.matrix.cache import set_decomposition_cache
from keras_svdtune.matrix.decompose import decompose
from keras_svdtune.matrix.factors import Needs
from keras_svdtune.reports import cost

# In one process, which compiles what it repeats once.
pytestmark = pytest.mark.xdist_group("cache")

SMALL = Needs("small_side")
PARTS = [
    SMALL,
    Needs("top", 3),
    Needs("bottom", 3),
    Needs("top", 3, n_iter=2),
    Needs("top", 0.5),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own, of matrices of any size."""
    monkeypatch.setattr(cache, "SMALLEST", 1)
    set_decomposition_cache(tmp_path / "cache")
    yield tmp_path / "cache"
    set_decomposition_cache(False)


@pytest.fixture
def computed(monkeypatch):
    """The `Needs` of every decomposition that is computed."""
    found = []
    compute = decomposition.computed

    def counted(matrix, needs, name="matrix"):
        found.append(needs)
        return compute(matrix, needs, name)

    for module in (decomposition, cost):
        monkeypatch.setattr(module, "computed", counted)
    return found


def matrix(seed=0, shape=(12, 8)):
    w = np.random.default_rng(seed).standard_normal(shape)
    return ops.convert_to_tensor(w.astype("float32"))


def entries(folder):
    return sorted(folder.glob("*.safetensors"))


def check_same(a, b):
    for x, y in zip((a.u, a.s, a.v, b.u), (b.u, b.s, b.v, b.u), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype and np.array_equal(x, y)
            assert x.flags.c_contiguous and y.flags.c_contiguous


@pytest.mark.parametrize("needs", PARTS, ids=str)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_a_hit_is_the_same_to_the_bit(needs, shape, folder, computed):
    first = decompose(matrix(shape=shape), needs)
    again = decompose(matrix(shape=shape), needs)
    assert len(computed) == 1 and len(entries(folder)) == 1
    check_same(first, again)
    set_decomposition_cache(False)
    check_same(first, decompose(matrix(shape=shape), needs))
    assert len(computed) == 2


@pytest.mark.fast
def test_what_differs_misses(folder, computed, monkeypatch):
    needs = Needs("top", 3, 2, 0)
    decompose(matrix(), needs)
    w = ops.convert_to_numpy(matrix()).copy()
    w[5, 5] = np.nextafter(w[5, 5], np.float32(9))
    others = [
        (w, needs),
        (matrix(1), needs),
        (w.reshape(8, 12), needs),
        (matrix(), Needs("top", 2, 2, 0)),
        (matrix(), Needs("top", 3, 1, 0)),
        (matrix(), Needs("top", 3, 2, 1)),
        (matrix(), Needs("top", 3)),
        (matrix(), Needs("bottom", 3)),
        (matrix(), Needs("top", 0.3)),
        (matrix(), SMALL),
    ]
    for i, (w, other) in enumerate(others):
        decompose(ops.convert_to_tensor(w), other)
        assert len(computed) == i + 2, other
    n = len(computed)
    monkeypatch.setattr(decomposition, "_VERSION", -1)
    decompose(matrix(), needs)
    monkeypatch.setattr(decomposition, "on_host", lambda: False)
    decompose(matrix(), needs)
    assert len(computed) == n + 2 == len(entries(folder))


def flip_each(data, other):
    """One byte in turn, all through the file."""
    for i in range(0, len(data), max(len(data) // 60, 1)):
        yield data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]


def truncate(data, other):
    yield from (data[:n] for n in (0, 4, 20, len(data) // 2, len(data) - 1))


def swap(data, other):
    yield other


def forge(data, other):
    """Valid, under this name, but of another shape or dtype."""
    arrays = safetensors.numpy.load(data)
    key = forge.key
    for change in (
        {"s": arrays["s"][:-1]},
        {"v": arrays["v"][:, :-1].copy()},
        {"v": arrays["v"].astype("float64")},
        {"u": arrays["v"]},
    ):
        forged = arrays | change
        about = {"key": key, "sha256": cache.digest_of(key, forged)}
        yield safetensors.numpy.save(forged, about)
    forged = {"s": arrays["s"]}
    about = {"key": key, "sha256": cache.digest_of(key, forged)}
    yield safetensors.numpy.save(forged, about)


@pytest.mark.parametrize("damage", [flip_each, truncate, swap, forge])
def test_a_damaged_entry_is_rebuilt(damage, folder, computed):
    decompose(matrix(1), SMALL)
    other = entries(folder)[0].read_bytes()
    entries(folder)[0].unlink()
    expected = decompose(matrix(), SMALL)
    (path,) = entries(folder)
    data = path.read_bytes()
    forge.key = path.stem
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for i, damaged in enumerate(damage(data, other)):
            path.write_bytes(damaged)
            check_same(decompose(matrix(), SMALL), expected)
            assert len(computed) == i + 3, "the damage was not noticed"
            check_same(decompose(matrix(), SMALL), expected)
            assert len(computed) == i + 3, "it was not rebuilt"


def test_a_folder_in_place_of_an_entry(folder):
    expected = decompose(matrix(), SMALL)
    (path,) = entries(folder)
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="cannot be kept"):
        check_same(decompose(matrix(), SMALL), expected)
    assert not list(folder.glob(".*"))  # nothing temporary is left


# Without Keras, which takes seconds to import and is not needed.
WRITER = """
import sys, types, unittest.mock
import numpy as np
sys.modules["keras"] = unittest.mock.MagicMock()
sys.modules["keras_svdtune"] = package = types.ModuleType("keras_svdtune")
package.__path__ = [sys.argv[2]]
from keras_svdtune.matrix import cache
cache.SMALLEST = 1
cache.set_decomposition_cache(sys.argv[1])
for i in range(300):
    w = np.full((4, 4), i % 3, "float32")
    def compute():
        return {"s": np.full(20_000, i % 3, "float32")}
    def fits(arrays):
        return arrays["s"].shape == (20_000,)
    if i % 2:
        for path in cache._store.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)
    found = cache.recalled(w, "x", compute, fits)
    assert (found["s"] == i % 3).all()
"""


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="knows no backend: on JAX"
)
def test_processes_that_write_at_once(folder):
    """They remove each other's entries too; none reads anything else."""
    package = Path(keras_svdtune.__file__).parent
    command = [sys.executable, "-W", "error::UserWarning", "-c", WRITER]
    processes = [
        subprocess.Popen(
            [*command, folder, package], stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert len(entries(folder)) <= 3 and not list(folder.glob(".*"))


def test_what_was_not_used_for_longest_is_removed(folder, computed):
    for i in range(4):
        before = set(entries(folder))
        decompose(matrix(i), SMALL)
        (newest,) = set(entries(folder)) - before
        os.utime(newest, (i, i))
    each = newest.stat().st_size
    decompose(matrix(0), SMALL)  # used again
    # Another process counts what is there.
    set_decomposition_cache(folder, max_bytes=4 * each)
    decompose(matrix(4), SMALL)
    total = sum(p.stat().st_size for p in folder.iterdir())
    assert total <= 4 * each
    n = len(computed)
    decompose(matrix(0), SMALL)
    decompose(matrix(4), SMALL)
    assert len(computed) == n
    decompose(matrix(1), SMALL)
    assert len(computed) == n + 1
    for i in range(5, 20):
        decompose(matrix(i), SMALL)
        assert sum(p.stat().st_size for p in folder.iterdir()) <= 4 * each


def test_larger_than_the_bound(folder):
    set_decomposition_cache(folder, max_bytes=100)
    decompose(matrix(), SMALL)
    assert not folder.exists()


@pytest.mark.parametrize("size", [-1, 1e9, True, float("nan"), None, "4"])
def test_bounds_out_of_range(size):
    with pytest.raises(ValueError, match="`max_bytes` must be an integer, 0"):
        set_decomposition_cache(max_bytes=size)


def test_files_of_others_are_left_alone(folder):
    folder.mkdir()
    mine, new, old = (folder / x for x in ("notes.txt", ".b.tmp", ".a.tmp"))
    for path in (mine, new, old):
        path.write_text("x" * 10_000)
    os.utime(old, (0, 0))  # left by a process that was killed
    set_decomposition_cache(folder, max_bytes=2000)
    for i in range(5):
        decompose(matrix(i), SMALL)
    assert mine.exists() and new.exists() and not old.exists()


def test_off_writes_nothing(folder, computed):
    set_decomposition_cache(False)
    for _ in range(2):
        decompose(matrix(), SMALL)
    assert len(computed) == 2 and not folder.exists()


def test_small_matrices_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(cache, "SMALLEST", 9)
    decompose(matrix(), SMALL)
    assert not folder.exists()
    decompose(matrix(shape=(9, 12)), SMALL)
    assert len(entries(folder)) == 1


def test_a_folder_that_cannot_be_written_warns_once(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    set_decomposition_cache(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning) as caught:
        first = decompose(matrix(), SMALL)
        check_same(decompose(matrix(), SMALL), first)
        decompose(matrix(1), SMALL)
    said = [str(x.message) for x in caught if x.category is UserWarning]
    assert len(said) == 1 and "cannot be kept in" in said[0]


def test_nan_is_refused(folder):
    w = ops.convert_to_numpy(matrix()).copy()
    w[0, 0] = np.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN or infinity"):
            decompose(ops.convert_to_tensor(w), SMALL)
    assert not folder.exists()


def test_the_environment_variable_and_the_default(tmp_path, monkeypatch):
    """Off in these tests, so they write nothing to the user's home."""
    assert os.environ["KERAS_SVDTUNE_CACHE"] == "0"
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    default = tmp_path / "keras_svdtune" / "decompositions"
    other = tmp_path / "other"
    for value, expected in (
        ("0", None),
        (str(other), other),
        ("", default),
        (None, default),
    ):
        if value is None:
            monkeypatch.delenv("KERAS_SVDTUNE_CACHE")
        else:
            monkeypatch.setenv("KERAS_SVDTUNE_CACHE", value)
        set_decomposition_cache(cache._initial())
        assert (cache._store and cache._store.folder) == expected
    set_decomposition_cache("~/somewhere")
    assert cache._store.folder == Path.home() / "somewhere"
    assert not list(tmp_path.iterdir())  # nothing is made before it is needed


def test_estimate_times_a_decomposition_and_no_file(folder, computed):
    """A read from disk would be taken for the speed of the machine."""
    cost._seconds_per_operation.cache_clear()
    assert cost._seconds_per_operation(64) > 0
    assert len(computed) == 2 and not entries(folder)
    cost._seconds_per_operation.cache_clear()
