"""Files that were damaged or forged, and processes that were killed."""

import copy
import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import safetensors.numpy
from helpers import (
    adapted,
    assert_same,
    numpy,
    perturb,
    small_model,
    trainables,
    values,
)

import keras_svdtune
from keras_svdtune import PiSSA, SavedAdapter
from keras_svdtune.files import format, renumbered
from keras_svdtune.files.format import read_adapter
from keras_svdtune.files.save_load import saved_adapter
from keras_svdtune.runtime import storage

# In one process, which compiles what it repeats once.
pytestmark = pytest.mark.xdist_group("hostile_files")

# How many files of each kind; it is the same code on every backend.
counts = pytest.mark.parametrize(
    "count",
    [
        500 if keras.backend.backend() == "jax" else 100,
        pytest.param(2500, marks=pytest.mark.slow),
    ],
)


@pytest.fixture(scope="module")
def model():
    model = small_model()
    keras_svdtune.enable_adapter(model, PiSSA(rank=2))
    perturb(model)
    return model


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where to write; thousands of files need not reach the disk."""
    monkeypatch.setattr(storage.os, "fsync", lambda file: None)
    return tmp_path / "a.safetensors"


def tried(model, path, start):
    """Loads what may be broken: 1 if it loaded, and then with its values."""
    try:
        keras_svdtune.load_adapter(model, path)
    except ValueError as error:
        assert str(path) in str(error)
        assert_same(trainables(model), start)
        return 0
    # It loaded: then what it says is what is there.
    arrays = read_adapter(path).arrays
    for layer_path, layer in adapted(model).items():
        for name, v in layer.adapter.weights_by_name(True).items():
            assert_same(numpy(v), arrays[f"{layer_path}/{name}"])
    for layer in adapted(model).values():
        layer.adapter.reset()
    return 1


def damage(data, rng):
    """The bytes of a file, with something wrong."""
    data = bytearray(data)
    header = struct.unpack("<Q", data[:8])[0]
    places = {
        "length": (0, 8),
        "header": (8, 8 + header),
        "data": (8 + header, len(data)),
    }
    first, last = places[rng.choice(list(places))]
    match rng.randrange(6):
        case 0:  # bits
            for _ in range(rng.choice([1, 1, 2, 8])):
                data[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
        case 1:  # cut off
            del data[rng.randrange(len(data)) :]
        case 2:  # cut out
            start = rng.randrange(first, last)
            del data[start : start + rng.randrange(1, 40)]
        case 3:  # put in
            start = rng.randrange(first, last)
            data[start:start] = rng.randbytes(rng.randrange(1, 40))
        case 4:  # a digit of the header: offsets, shapes, settings
            digits = [i for i in range(8, 8 + header) if 48 <= data[i] < 58]
            data[rng.choice(digits)] = rng.choice(b"0123456789-e")
        case 5:  # copied over
            start = rng.randrange(len(data) - 8)
            end = start + rng.randrange(1, 64)
            piece = data[start:end]
            to = rng.randrange(first, last)
            data[to : to + len(piece)] = piece
    return bytes(data)


@counts
def test_damaged_bytes(count, model, path):
    keras_svdtune.save_adapter(model, path)
    good, start, base = path.read_bytes(), trainables(model), values(model)
    rng = random.Random(0)
    loaded = 0
    for _ in range(count):
        bad = damage(good, rng)
        path.write_bytes(bad)
        loaded += tried(model, path, trainables(model)) and bad != good
    assert loaded == 0
    path.write_bytes(good)
    keras_svdtune.load_adapter(model, path)
    assert_same(trainables(model), start)
    assert_same(values(model), base)


STRANGE = [
    *(None, True, False, 0, -1, 3, 10**30, 1e308, float("nan"), 0.5),
    *("", "svf", "lora", "x" * 1000, [], [1], [[[]]], {}, {"rank": 10**9}),
    *([10**12, 10**12], [-4], [6.0, 4.0], ["6", "4"], {"seed": None}),
]
DTYPES = ["float16", "float64", "int8", "int32", "uint8", "bool"]


def forge(saved, rng):
    """An adapter with something wrong, and a digest that is right."""
    about, arrays = copy.deepcopy(saved.about), dict(saved.arrays)
    key = rng.choice(list(arrays))
    match rng.randrange(8):
        case 0 | 1:  # one value of the metadata
            node = about
            while True:
                name = rng.choice(list(node))
                if not isinstance(node[name], dict) or rng.random() < 0.4:
                    break
                if not node[name]:
                    break
                node = node[name]
            node[name] = rng.choice(STRANGE)
        case 2:
            node = rng.choice([about, about["settings"], about["layers"]])
            node[rng.choice(["rank", "method", "small/third", ""])] = (
                rng.choice(STRANGE)
            )
        case 3:
            del about[rng.choice(list(about))]
        case 4:  # arrays
            del arrays[key]
        case 5:
            arrays[key] = arrays[key].astype(rng.choice(DTYPES))
        case 6:
            other = rng.choice(list(arrays))
            arrays[key], arrays[other] = arrays[other], arrays[key]
        case 7:
            shape = rng.choice([(0,), (), (7, 3), (2**20,), (1, 1, 1, 1)])
            arrays[rng.choice([key, "extra", "small/first/pissa_m"])] = np.full(
                shape, rng.choice([0, 1, np.nan, np.inf]), "float32"
            )
    return SavedAdapter(about, arrays, "forged")


@counts
def test_forged_contents(count, model, path):
    good = saved_adapter(model)
    rng = random.Random(1)
    base = values(model)
    loaded = 0
    for _ in range(count):
        forged = forge(good, rng)
        forged.save(path)
        loaded += tried(model, path, trainables(model))
    # Some changes are harmless, such as other versions, or none at all.
    assert loaded < count / 4
    good.save(path)
    keras_svdtune.load_adapter(model, path)
    assert_same(values(model), base)


@pytest.mark.fast
def test_absurd_headers(model, path):
    """Lengths beyond the file, and nesting beyond the stack."""
    deep = json.dumps({"__metadata__": {"keras_svdtune": "[" * 100_000}})
    for length, header in (
        (2**63, b"{}"),
        (2**64 - 1, b""),
        (99_999_999, b"{}"),
        (len(deep), deep.encode()),
        (9, b'{"a": {}}'),
    ):
        path.write_bytes(struct.pack("<Q", length) + header)
        assert not tried(model, path, trainables(model))


def test_a_million_layers(model, path, monkeypatch):
    """The length of the header tells, and nobody looks further."""
    good = saved_adapter(model)
    entry = good.about["layers"]["small/first"]
    about = copy.deepcopy(good.about)
    about["layers"] |= {f"small/first_{i}": entry for i in range(10**6)}
    metadata = {"keras_svdtune": json.dumps(about)}
    path.write_bytes(safetensors.numpy.save(good.arrays, metadata))
    for name in ("safe_open", "numpy"):
        monkeypatch.setattr(format.safetensors, name, None)
    assert not tried(model, path, trainables(model))
    with pytest.raises(ValueError, match="bytes, or is damaged. An adapter's"):
        keras_svdtune.compose({path: 0.5})
    # Nor in memory, where there is no header.
    with pytest.raises(ValueError, match=r"of shape \(1000002, 5\). Found"):
        keras_svdtune.load_adapter(
            model, SavedAdapter(about, good.arrays, "forged")
        )


def test_more_than_can_be_read_is_not_written(model, path):
    good = saved_adapter(model)
    good.about["settings"]["x"] = "x" * 2**23
    with pytest.raises(ValueError, match="adapter of 'small' has a header of"):
        good.save(path)
    assert not path.exists()


def test_more_layers_than_the_model_has(model, monkeypatch):
    """Each might be one of the model's by its kernel, but not all of them: so
    no kernel is compared."""
    forged = with_layers(saved_adapter(model), 20_000)
    calls = []
    monkeypatch.setattr(renumbered, "which_match", lambda *x: calls.append(x))
    with pytest.raises(ValueError, match="'small/first_0' of a Sequential, wh"):
        keras_svdtune.load_adapter(model, forged)
    assert not calls


def test_more_layers_than_can_be_compared(model, path):
    forged = with_layers(saved_adapter(model), 10_000)
    other = path.with_name("b.safetensors")
    forged.save(path)
    forged.save(other)
    with pytest.raises(ValueError, match="10002 layers, too many to compare"):
        keras_svdtune.compose({path: 1, other: 1})


def with_layers(saved, count):
    """An adapter with so many layers more, like its first one."""
    about, arrays = copy.deepcopy(saved.about), dict(saved.arrays)
    entry = about["layers"]["small/first"]
    about["layers"] |= {f"small/first_{i}": entry for i in range(count)}
    for name in (format.FINGERPRINTS, format.EFFECTS):
        more = np.repeat(arrays[name][:1], count, axis=0)
        arrays[name] = np.concatenate([arrays[name], more])
    return SavedAdapter(about, arrays, "forged")


@pytest.mark.parametrize(
    "name", ["small/first/pissa_a0", "base_fingerprints", "effects"]
)
def test_arrays_that_are_missing(name, model, path):
    forged = saved_adapter(model)
    del forged.arrays[name]
    forged.save(path)
    assert not tried(model, path, trainables(model))
    with pytest.raises(ValueError, match=f"should hold '{name}'.*Found: noth"):
        keras_svdtune.compose({path: 0.5})


# Without Keras, which takes seconds to import and is not needed.
SAVER = """
import sys, types, unittest.mock
import numpy as np
sys.modules["keras"] = unittest.mock.MagicMock()
sys.modules["keras_svdtune"] = package = types.ModuleType("keras_svdtune")
package.__path__ = [sys.argv[1]]
from keras_svdtune.files.format import SavedAdapter
about = {"format_version": 1, "method": "svf", "settings": {}, "layers": {}}
print("ready", flush=True)
for i in range(10**6):
    arrays = {"x": np.full(20000, i % 7, "float32")}
    SavedAdapter(about, arrays, "").save(sys.argv[2])
"""


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="writing knows no backend"
)
def test_killed_while_saving(tmp_path, monkeypatch):
    """At any moment the file is a whole one."""
    path = tmp_path / "a.safetensors"
    package = pathlib.Path(keras_svdtune.__file__).parent
    rng = random.Random(0)
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVER, package, path], stdout=subprocess.PIPE
        )
        assert child.stdout.readline() == b"ready\n"
        for _ in range(10):  # stopped at some point, as if killed there
            time.sleep(rng.uniform(0.0, 0.05))
            os.kill(child.pid, signal.SIGSTOP)
            if path.exists():
                check_whole(path)
            os.kill(child.pid, signal.SIGCONT)
        time.sleep(rng.uniform(0.0, 0.05))
        child.kill()
        child.wait()
        check_whole(path)
    # What was left behind hinders nobody, not even a process of the same id.
    moved, replace = [], os.replace
    monkeypatch.setattr(
        storage.os, "replace", lambda *x: moved.append(x[0]) or replace(*x)
    )
    read_adapter(path).save(path)
    (left,) = moved
    left.write_bytes(b"half")
    read_adapter(path).save(path)
    assert moved == [left, left]
    check_whole(path)
    assert not left.exists()


def check_whole(path):
    x = read_adapter(path).arrays["x"]
    assert x.shape == (20000,) and np.ptp(x) == 0


def test_a_plain_reader_can_read_it(model, path):
    keras_svdtune.save_adapter(model, path)
    arrays = safetensors.numpy.load_file(path)
    assert_same(arrays, saved_adapter(model).arrays)
