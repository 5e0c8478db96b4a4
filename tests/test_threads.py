"""Several threads, or processes, that do the same at the same time."""

import contextlib
import pathlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import threadpoolctl
from helpers import adapted, perturb, small_model
from rich import errors, progress

import keras_svdtune
from keras_svdtune.files.format import SavedAdapter, read_adapter
from keras_svdtune.runtime import parallel, storage
from keras_svdtune.runtime.precision import full_precision
from keras_svdtune.runtime.together import Together

THREADS = 8


def at_once(*jobs):
    """Runs each in a thread; all begin together. Returns their results."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait(timeout=60)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [x.result() for x in [pool.submit(run, j) for j in jobs]]


def test_threads_save_to_one_path(tmp_path, monkeypatch):
    """Whoever reads meanwhile finds a whole file of one of them."""
    monkeypatch.setattr(storage.os, "fsync", lambda file: None)
    path = tmp_path / "a.safetensors"
    about = {"format_version": 1, "method": "svf", "settings": {}, "layers": {}}
    done = threading.Event()

    def write(i):
        arrays = {"x": np.full(20_000, i, "float32")}
        for _ in range(20):
            SavedAdapter(about, arrays, "").save(path)

    def read():
        found = set()
        while not done.is_set():
            x = read_adapter(path).arrays["x"]
            assert x.shape == (20_000,) and np.ptp(x) == 0
            found.add(float(x[0]))
        return found

    write(-1)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        at_once(*(lambda i=i: write(i) for i in range(THREADS)))
        done.set()
        assert reader.result()
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import pathlib, sys, types
sys.modules["keras_svdtune"] = package = types.ModuleType("keras_svdtune")
package.__path__ = [sys.argv[1]]
from keras_svdtune.runtime.storage import write_atomically
for i in range(200):
    data = bytes([int(sys.argv[3])]) * 100_000
    write_atomically(pathlib.Path(sys.argv[2]), data, durable=False)
"""


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="writing knows no backend"
)
def test_processes_write_to_one_path(tmp_path):
    path = tmp_path / "a"
    package = str(pathlib.Path(keras_svdtune.__file__).parent)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, package, path, str(i)])
        for i in range(4)
    ]
    while any(writer.poll() is None for writer in writers):
        with contextlib.suppress(FileNotFoundError):  # before the first one
            data = path.read_bytes()
            assert len(data) == 100_000 and len(set(data)) == 1
    assert [writer.returncode for writer in writers] == [0] * len(writers)
    assert list(tmp_path.iterdir()) == [path]


def test_models_are_enabled_and_saved_at_once(tmp_path):
    keras.config.enable_interactive_logging()
    models = [small_model() for _ in range(3)]
    path = tmp_path / "a.safetensors"

    def work(model):
        keras_svdtune.enable_svf(model)
        perturb(model)
        keras_svdtune.save_adapter(model, path)

    at_once(*(lambda m=m: work(m) for m in models))
    assert all(len(adapted(model)) == 2 for model in models)
    keras_svdtune.load_adapter(small_model(), path)


def test_one_bar_at_a_time(capsys):
    """The second shows none, and the first one stays."""
    keras.config.enable_interactive_logging()
    both = threading.Barrier(2)

    def job():
        both.wait(timeout=60)

    at_once(
        *(
            lambda x=x: parallel.run_all(f"thread {x}", {"layer": job})
            for x in "ab"
        )
    )
    out = capsys.readouterr().out
    assert ("thread a" in out) != ("thread b" in out)
    parallel.run_all("afterwards", {"layer": lambda: None})
    assert "afterwards" in capsys.readouterr().out


def test_no_bar_where_nothing_is_to_be_done(tmp_path, capsys):
    """An adapter that is assigned decomposes nothing."""
    keras.config.enable_interactive_logging()
    assert parallel.run_all("nothing", {}) == {}
    model = small_model()
    keras_svdtune.enable_svf(model, name="a")
    path = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, path)
    assert "SVF" in capsys.readouterr().out
    keras_svdtune.load_adapter(model, path, name="a")
    keras_svdtune.load_adapter(model, path, name="b")
    assert capsys.readouterr().out == ""


def test_a_bar_inside_one_of_the_user(monkeypatch):
    """Old releases of rich refuse to show two."""
    keras.config.enable_interactive_logging()

    def refuse(self):
        raise errors.LiveError("Only one live display may be active at once")

    monkeypatch.setattr(progress.Progress, "start", refuse)
    assert parallel.run_all("x", {"layer": lambda: 1}) == {"layer": 1}


def blas_threads():
    return [
        x["num_threads"]
        for x in threadpoolctl.threadpool_info()
        if x["user_api"] == "blas"
    ]


BLAS_THREADS = blas_threads()


def test_blas_has_its_threads_back():
    """Also if who came first leaves first."""
    began, entered, left = (threading.Event() for _ in range(3))
    during = []

    def first():
        began.set()
        assert entered.wait(timeout=60)

    def second():
        entered.set()
        assert left.wait(timeout=60)
        during.extend(blas_threads())

    def run_first():
        parallel.run_all("first", {"layer": first}, bar=False)
        left.set()

    if set(BLAS_THREADS) == {1}:
        pytest.skip("BLAS has one thread here")
    assert blas_threads() == BLAS_THREADS
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run_first)
        assert began.wait(timeout=60)
        two = pool.submit(parallel.run_all, "second", {"layer": second}, False)
        one.result()
        two.result()
    assert set(during) == {1}
    assert blas_threads() == BLAS_THREADS


def test_the_last_to_leave_undoes():
    calls = []

    @contextlib.contextmanager
    def setting():
        calls.append("set")
        yield
        calls.append("undone")

    together = Together(setting)
    for _ in range(2):
        with together, contextlib.suppress(KeyError), together:
            raise KeyError
        assert calls == ["set", "undone"]
        calls.clear()


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="a setting of torch"
)
def test_the_precision_of_products_is_given_back():
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        first, second = full_precision(), full_precision()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
