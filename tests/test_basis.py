"""The same adapter on another backend, and with another basis."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_close,
    assert_same,
    default_methods,
    eager,
    method_id,
    must_stay,
    of_rank,
    perturb,
    slow_elsewhere,
    small_data,
    small_model,
)

import keras_svdtune
from keras_svdtune import SVF, SVFT, LoRAXS, PiSSA
from keras_svdtune.adapter import plan
from keras_svdtune.matrix import factors

X, _ = small_data()


def methods_for_small():
    """Rank 2: the matrices of the small model are 6 x 4 and 4 x 5."""
    return [of_rank(m, 2) for m in default_methods()]


SETTINGS = [*methods_for_small(), SVFT("random", 1), PiSSA(rank=0.5)]


def saved(path, method, include_basis=False):
    keras.backend.clear_session(free_memory=False)
    model = small_model()
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    keras_svdtune.save_adapter(model, path, include_basis)
    return eager(model, X)


def write_all(folder):
    """An adapter file and its outputs for every method."""
    for i, method in enumerate(methods_for_small()):
        y = saved(os.path.join(folder, f"{i}.safetensors"), method)
        np.save(os.path.join(folder, f"{i}.npy"), y)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What another backend wrote: JAX, or TensorFlow where this is JAX."""
    folder = tmp_path_factory.mktemp("other_backend")
    other = "tensorflow" if keras.backend.backend() == "jax" else "jax"
    subprocess.run(
        [sys.executable, __file__, folder],
        env=os.environ | {"KERAS_BACKEND": other},
        check=True,
    )
    return folder


@slow_elsewhere
@pytest.mark.xdist_group("other backend")
@pytest.mark.parametrize("i", range(len(methods_for_small())))
def test_trained_on_another_backend(i, written):
    keras.backend.clear_session(free_memory=False)
    model = small_model()
    keras_svdtune.load_adapter(model, written / f"{i}.safetensors")
    found = {x.adapter.method.name for x in adapted(model).values()}
    assert found == {methods_for_small()[i].name}
    assert_close(eager(model, X), np.load(written / f"{i}.npy"), 1e-5)


def flip_a_sign(found):
    def flip(x):
        return (
            None if x is None else x * np.array([1, -1] + [1] * 9)[: len(x.T)]
        )

    return factors.Factors(flip(found.u), found.s, flip(found.v))


def turn(found):
    """The second and third component, turned by half a radian."""

    def turned(x):
        if x is None:
            return None
        rotation = np.eye(x.shape[1])
        c, s = np.cos(0.5), np.sin(0.5)
        if len(rotation) > 2:
            rotation[1:3, 1:3] = [[c, -s], [s, c]]
        return (x @ rotation).astype("float32")

    return factors.Factors(turned(found.u), found.s, turned(found.v))


OFF_DIAGONAL = [SVFT(off_diagonals=1), LoRAXS(rank=3)]


@pytest.mark.parametrize(
    "method, change",
    [
        *((m, c) for m in OFF_DIAGONAL for c in (flip_a_sign, turn)),
        (SVF(), turn),
        (SVFT("plain"), turn),
    ],
)
def test_another_basis_is_an_error(method, change, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    saved(path, method)
    other_basis(monkeypatch, change)
    model = small_model()
    for enabled in (False, True):
        if enabled:
            keras_svdtune.enable_adapter(model, method)
        with (
            must_stay(model, X, compiled=False),
            pytest.raises(ValueError, match="otherwise.*include_basis"),
        ):
            keras_svdtune.load_adapter(model, path)


@pytest.mark.parametrize("method", [SVF(), SVFT("plain"), PiSSA(rank=3)])
def test_signs_do_not_matter_to_these(method, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    expected = saved(path, method)
    other_basis(monkeypatch, flip_a_sign)
    model = small_model()
    keras_svdtune.load_adapter(model, path)
    assert_close(eager(model, X), expected, 1e-6)


@pytest.mark.parametrize("method", SETTINGS, ids=method_id)
def test_with_its_basis_it_loads_anywhere(method, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    expected = saved(path, method, include_basis=True)
    other_basis(monkeypatch, turn if method.name != "svft" else flip_a_sign)
    keras.backend.clear_session(free_memory=False)
    model = small_model()
    keras_svdtune.load_adapter(model, path)
    assert_same(eager(model, X), expected)
    if isinstance(getattr(method, "rank", 1), float):
        return  # ranks by energy are decided on loading
    keras_svdtune.remove_adapter(model)
    keras_svdtune.enable_adapter(model, method)
    keras_svdtune.load_adapter(model, path)
    assert_same(eager(model, X), expected)


def other_basis(monkeypatch, change):
    decompose = plan.decompose
    monkeypatch.setattr(
        plan, "decompose", lambda *args: change(decompose(*args))
    )


if __name__ == "__main__":
    write_all(sys.argv[1])
