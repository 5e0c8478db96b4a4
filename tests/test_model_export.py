"""`model.export` of an adapted model computes what the model computes."""

import keras
import numpy as np
import pytest
from helpers import (
    all_methods,
    assert_close,
    eager,
    method_id,
    perturb,
    randomise,
)

import keras_svdtune

IDS = np.array([[0, 1, 2, 3], [5, 8, 8, 4], [1, 1, 2, 7]], "int32")
LAYERS = ["table", "tall", "einsum", "image", "square"]


def every_kind():
    """A model with a layer of every kind, one after the other."""
    x = inputs = keras.Input((4,), dtype="int32")
    for layer in (
        keras.layers.Embedding(9, 8, name="table"),
        keras.layers.Dense(6, activation="tanh", name="tall"),
        keras.layers.EinsumDense("btd,dhk->bthk", (None, 2, 5), name="einsum"),
        keras.layers.Conv2D(7, 2, name="image"),
        keras.layers.Dense(7, name="square"),
    ):
        x = layer(x)
    model = keras.Model(inputs, x)
    randomise(model)
    return model


def onnx(model, path):
    path = f"{path}.onnx"
    model.export(path, format="onnx", verbose=False)
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    (name,) = (x.name for x in session.get_inputs())
    return session.run(None, {name: IDS})[0]


def saved_model(model, path):
    import tensorflow as tf

    model.export(str(path), format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(str(path))
    return loaded.serve(IDS).numpy()


FORMATS = {"torch": onnx, "tensorflow": saved_model}


@pytest.mark.skipif(
    keras.backend.backend() not in FORMATS, reason="needs more packages"
)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=[pytest.mark.slow] * (m.name not in quick))
        for quick in [("svf", "svft", "dora")]
        for m in all_methods()
    ],
    ids=method_id,
)
def test_exported(method, tmp_path):
    if keras.backend.backend() == "torch":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model = every_kind()
    keras_svdtune.enable_adapter(
        model, method, LAYERS if method.embeddings else None
    )
    perturb(model)
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    model.fit(IDS, eager(model, IDS) + 1.0, verbose=0)
    export = FORMATS[keras.backend.backend()]
    expected = eager(model, IDS)
    assert_close(export(model, tmp_path / "model"), expected, 1e-5)
