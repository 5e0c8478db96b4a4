"""The quick signal: the whole life of an adapter, once for each method."""

import keras
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_close,
    assert_differ,
    assert_same,
    default_methods,
    method_id,
    predict,
    tiny_gemma,
    tokens,
    trainables,
)

import keras_svdtune


def base():
    return tiny_gemma(num_layers=1, head_dim=8)


@pytest.mark.fast
@pytest.mark.parametrize("method", default_methods(), ids=method_id)
def test_enable_fit_save_load_merge(method, tmp_path):
    gemma, data = base(), tokens(batch=4)
    before = predict(gemma, data)
    noise = np.random.default_rng(0).standard_normal(before.shape)
    targets = before + 0.5 * noise.astype("float32")

    gemma.enable_adapter(method)
    assert len(adapted(gemma)) == 7
    assert_same(predict(gemma, data), before, "enabled")
    gemma.compile(keras.optimizers.Adam(1e-3), "mse")
    losses = gemma.fit(
        data, targets, epochs=6, batch_size=4, verbose=0
    ).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[-2] < losses[0], losses
    learned = predict(gemma, data)
    assert_differ(learned, before, "trained")

    file = tmp_path / "adapter.safetensors"
    gemma.save_adapter(file)
    again = base()
    again.load_adapter(file)
    assert_same(trainables(again), trainables(gemma))
    assert_same(predict(again, data), learned, "loaded")
    gemma.merge_adapter()
    assert not adapted(gemma)
    assert_close(predict(gemma, data), learned, 1e-5, "merged")
    keras_svdtune.remove_adapter(again)
    assert_same(predict(again, data), before, "removed")
