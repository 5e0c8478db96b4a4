"""Runs that were interrupted go on as if they had not been."""

import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_same,
    default_method,
    numpy,
    small_data,
    small_model,
    trainables,
)

import keras_svdtune
from keras_svdtune import METHODS, RankAllocator

EPOCHS, STEPS = 5, 4
X, Y = small_data(rows=8 * STEPS)


def compiled_model(name):
    keras.utils.set_random_seed(0)
    keras.backend.clear_session(free_memory=False)
    model = small_model()
    method = default_method(name)
    if hasattr(method, "rank"):
        method = type(method)(rank=2)
    keras_svdtune.enable_adapter(model, method)
    model.compile(keras.optimizers.AdamW(0.01), "mse")
    return model


def fit(model, name, callbacks=(), epochs=EPOCHS):
    callbacks = list(callbacks)
    if name == "adalora":
        callbacks.append(RankAllocator(interval=1))
    return model.fit(
        X,
        Y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    ).history["loss"]


class KillAt(keras.callbacks.Callback):
    """Kills the process, as a machine that goes away does."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at = (epoch, batch)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def end_state(model):
    """The trainables, and the optimizer's variables."""
    optimizer = [numpy(v) for v in model.optimizer.variables]
    return [*trainables(model).values(), *optimizer]


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="asked for on JAX and TensorFlow; two runs of torch may differ",
)
@pytest.mark.parametrize("name", ["pissa", "adalora"])
def test_killed_in_mid_epoch(name, tmp_path):
    script = [sys.executable, __file__, name, str(tmp_path)]
    killed = subprocess.run(script, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "end.npz").exists()
    # Started again, with the same command; this time it is let live.
    subprocess.run([*script, "live"], check=True)
    with np.load(tmp_path / "end.npz") as file:
        found = [file[key] for key in file]
    model = compiled_model(name)
    fit(model, name)
    expected = end_state(model)
    assert_same(found, expected)


def run(name, folder, live=None):
    """What the process that is killed runs."""
    model = compiled_model(name)
    backup = keras.callbacks.BackupAndRestore(os.path.join(folder, "backup"))
    callbacks = [backup] if live else [backup, KillAt(epoch=2, batch=1)]
    losses = fit(model, name, callbacks)
    assert len(losses) == EPOCHS - 2  # two epochs were done before
    np.savez(os.path.join(folder, "end.npz"), *end_state(model))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ending", ["weights.h5", "keras"])
def test_model_checkpoint(name, ending, tmp_path):
    """The weights of an epoch, adapter and optimizer, come back."""
    path = tmp_path / f"epoch.{ending}"
    model = compiled_model(name)
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, save_weights_only=ending == "weights.h5"
    )
    model.fit(X, Y, 8, 2, verbose=0, shuffle=False, callbacks=[checkpoint])
    expected = end_state(model)
    base = [numpy(x._kernel) for x in adapted(model).values()]
    again = compiled_model(name)
    if ending == "keras":
        # A whole model: the plain one, with the merged kernels.
        plain = keras.saving.load_model(path, compile=False)
        np.testing.assert_allclose(
            plain.predict(X, verbose=0),
            model.predict(X, verbose=0),
            rtol=1e-4,
            atol=1e-5,
        )
        assert not adapted(plain)
        return
    again.optimizer.build(again.trainable_variables)
    again.load_weights(path)
    assert_same(end_state(again), expected)
    assert_same([numpy(x._kernel) for x in adapted(again).values()], base)
    for x in (again, model):
        x.fit(X, Y, 8, 1, verbose=0, shuffle=False)
    assert_same(end_state(again), end_state(model))


if __name__ == "__main__":
    run(*sys.argv[1:])
