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
    of_rank,
    small_data,
    small_model,
    trainables,
)

import keras_svdtune
from keras_svdtune import RankAllocator

EPOCHS, STEPS = 5, 4
X, Y = small_data(rows=8 * STEPS)

interrupted = pytest.mark.parametrize("name", ["pissa", "adalora"])
not_on_torch = pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="asked for on JAX and TensorFlow; two runs of torch may differ",
)


def compiled_model(name):
    keras.utils.set_random_seed(0)
    keras.backend.clear_session(free_memory=False)
    model = small_model()
    keras_svdtune.enable_adapter(model, of_rank(default_method(name), 2))
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


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class StopAt(keras.callbacks.Callback):
    """Ends a run in mid-epoch: raises, or as a machine that goes away."""

    def __init__(self, epoch, batch, stop):
        super().__init__()
        self.at, self.stop = (epoch, batch), stop

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            self.stop()


def end_state(model):
    """The trainables, and the optimizer's variables."""
    optimizer = [numpy(v) for v in model.optimizer.variables]
    return [*trainables(model).values(), *optimizer]


def run(name, folder, stop=None):
    """A run that is stopped; or, without `stop`, what starts it again."""
    model = compiled_model(name)
    backup = keras.callbacks.BackupAndRestore(os.path.join(folder, "backup"))
    callbacks = [backup, StopAt(epoch=2, batch=1, stop=stop)]
    losses = fit(model, name, callbacks if stop else [backup])
    assert len(losses) == EPOCHS - 2  # two epochs were done before
    return end_state(model)


@not_on_torch
@interrupted
def test_interrupted_in_mid_epoch(name, tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(name, tmp_path, stop)
    found = run(name, tmp_path)
    model = compiled_model(name)
    fit(model, name)
    assert_same(found, end_state(model))


@pytest.mark.slow
@not_on_torch
@interrupted
def test_killed_in_mid_epoch(name, tmp_path):
    script = [sys.executable, __file__, name, str(tmp_path)]
    killed = subprocess.run([*script, "kill"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "end.npz").exists()
    subprocess.run(script, check=True)
    with np.load(tmp_path / "end.npz") as file:
        found = [file[key] for key in file]
    model = compiled_model(name)
    fit(model, name)
    assert_same(found, end_state(model))


@pytest.mark.parametrize(
    "name, ending",
    [("svf", "weights.h5"), ("adalora", "weights.h5"), ("pissa", "keras")],
)
def test_model_checkpoint(name, ending, tmp_path):
    """The weights of an epoch, adapter and optimizer, come back."""
    path = tmp_path / f"epoch.{ending}"
    model = compiled_model(name)
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, save_weights_only=ending == "weights.h5"
    )
    model.fit(X, Y, 8, 2, verbose=0, shuffle=False, callbacks=[checkpoint])
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
    expected = end_state(model)
    base = [numpy(x._kernel) for x in adapted(model).values()]
    again = compiled_model(name)
    again.optimizer.build(again.trainable_variables)
    again.load_weights(path)
    assert_same(end_state(again), expected)
    assert_same([numpy(x._kernel) for x in adapted(again).values()], base)
    for x in (again, model):
        x.fit(X, Y, 8, 1, verbose=0, shuffle=False)
    assert_same(end_state(again), end_state(model))


if __name__ == "__main__":
    name, folder, *how = sys.argv[1:]
    state = run(name, folder, kill if how else None)
    np.savez(os.path.join(folder, "end.npz"), *state)
