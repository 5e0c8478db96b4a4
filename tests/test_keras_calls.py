"""What Keras and KerasHub do with an adapted model loses nothing in silence.

Each of their calls works with the adapter, or is an error that says what to do.
"""

import copy
import pickle
import warnings

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    adapted,
    all_methods,
    assert_same,
    method_id,
    numpy,
    perturb,
    small_data,
    small_model,
    tiny_gemma,
    values,
)

import keras_svdtune
from keras_svdtune.adapter.adapter import Adapter

X, Y = small_data()
ON_TORCH = keras.backend.backend() == "torch"


def trained(method=None, model=None):
    model = model or small_model()
    keras_svdtune.enable_adapter(model, method or keras_svdtune.SVF())
    perturb(model)
    model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
    model.fit(X, Y, verbose=0)
    return model


def plain_layers(model):
    found = [x for x in model._flatten_layers() if isinstance(x, Adapter)]
    return not found and not adapted(model)


def outputs(model):
    return model.predict(X, verbose=0)


def close(found, expected):
    return np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


# Whole files.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_a_checkpoint_as_keras_users_make_it(method, bias, tmp_path):
    """LoRA has two variables a layer, as kernel and bias are two: a plain
    model must not take the optimizer's state of the adapter for its own."""
    model = keras.Sequential(
        [
            keras.Input(X.shape[1:]),
            keras.layers.Dense(8, use_bias=bias),
            keras.layers.Dense(Y.shape[1], use_bias=bias),
        ]
    )
    file = tmp_path / "best.keras"
    keras_svdtune.enable_adapter(model, method)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    checkpoint = keras.callbacks.ModelCheckpoint(file)
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[checkpoint])
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        loaded = keras.models.load_model(file)
    assert plain_layers(loaded)
    assert close(outputs(loaded), outputs(model))
    loaded.fit(X, Y, verbose=0)  # trains on, all of it


def test_h5(tmp_path):
    model = trained()
    before = outputs(model)
    model.save(tmp_path / "m.h5")
    assert_same(outputs(model), before)
    loaded = keras.models.load_model(tmp_path / "m.h5", compile=False)
    assert close(outputs(loaded), before)
    # In mid-training, where the compiled step and the moments must stay.
    moments = [numpy(x) for x in model.optimizer.variables]
    step = model.train_function
    model.save(tmp_path / "again.h5")
    assert model.train_function is step
    for now, then in zip(model.optimizer.variables, moments, strict=True):
        assert_same(numpy(now), then)
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "c.h5")
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[checkpoint])
    loaded = keras.models.load_model(tmp_path / "c.h5", compile=False)
    assert close(outputs(loaded), outputs(model))


def test_an_adapted_model_reads_its_optimizer_back(tmp_path):
    model = trained()
    file = tmp_path / "m.weights.h5"
    model.save_weights(file)
    moments = [numpy(x) for x in model.optimizer.variables]
    model.fit(X, Y, epochs=2, verbose=0)
    model.load_weights(file)
    for now, then in zip(model.optimizer.variables, moments, strict=True):
        assert_same(numpy(now), then)
    other = trained(keras_svdtune.LoRA(rank=2))
    file = tmp_path / "lora.weights.h5"
    other.save_weights(file)
    with pytest.raises(ValueError):
        model.load_weights(file)


# Copies.


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_is_the_plain_merged_model(copied):
    model = trained()
    with pytest.warns(UserWarning):
        other = copied(model)
    assert plain_layers(other)
    assert close(outputs(other), outputs(model))
    assert adapted(model)


def test_a_clone_is_plain():
    model = trained()
    clone = keras.models.clone_model(model)
    assert plain_layers(clone)
    clone.set_weights(small_model().get_weights())
    assert_same(outputs(clone), outputs(small_model()))
    layer = next(iter(adapted(model).values()))
    plain = type(layer).from_config(layer.get_config())
    assert type(plain) is layer.plain


# Calls that know nothing of an adapter.


def test_quantize_is_refused():
    model = trained()
    before = values(model)
    for call in (model.quantize, model.layers[-1].quantize):
        with pytest.raises((ValueError, NotImplementedError)):
            call("int8")
    with pytest.raises(ValueError, match="quantize before you enable"):
        model.quantize("int8")
    assert_same(values(model), before)
    # A model that was made before the package was imported has its own.
    with pytest.raises(ValueError, match="is an adapter"):
        keras.Model.quantize.__wrapped__(model, "int8")
    keras_svdtune.merge_adapter(model)
    model.quantize("int8")
    keras_svdtune.enable_svf(model)
    assert model.layers[-1].quantization_mode == "int8"


@pytest.mark.parametrize("name", ["enable_lora", "enable_dora"])
def test_another_adapter_of_keras_is_refused(name, monkeypatch):
    """`enable_dora` is Keras' name for what it is about to have."""
    model = trained()
    before = values(model)
    layer = next(iter(adapted(model).values()))
    with pytest.raises(ValueError, match="has an adapter already"):
        getattr(layer, name)(2)
    assert_same(values(model), before)


def test_keras_hubs_enable_lora_is_refused():
    task = keras_hub.models.GemmaCausalLM(tiny_gemma(), None)
    task.backbone.enable_svf()
    trains = [v.path for v in task.backbone.trainable_variables]
    with pytest.raises(ValueError, match="`enable_lora` knows nothing"):
        task.backbone.enable_lora(2)
    assert [v.path for v in task.backbone.trainable_variables] == trains
    task.remove_adapter()
    task.backbone.enable_lora(2)


def test_where_a_layer_has_only_its_weights():
    """As KerasHub's exporters read them: `layer.weights[0]`."""
    model = trained()
    before = outputs(model)
    base = [numpy(x.weights[0]) for x in adapted(model).values()]
    layers = list(adapted(model).values())
    merged = [numpy(x.merged_kernel()) for x in layers]
    with keras_svdtune.adapter_merged(model):
        assert plain_layers(model)
        for layer, kernel in zip(layers, merged, strict=True):
            assert_same(numpy(layer.weights[0]), kernel)
    for layer, kernel in zip(layers, base, strict=True):
        assert_same(numpy(layer.weights[0]), kernel)
    assert_same(outputs(model), before)


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_merged_for_a_while(method):
    model = trained(method)
    before, state = outputs(model), values(model)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        keras_svdtune.adapter_merged(model),
    ):
        assert plain_layers(model)
        assert close(outputs(model), before)
        raise RuntimeError("in the middle")
    assert_same(values(model), state)
    assert_same(outputs(model), before)
    model.fit(X, Y, verbose=0)


def test_merged_again_compiles_nothing():
    model = trained()
    outputs(model)
    with keras_svdtune.adapter_merged(model):
        outputs(model)
        first = model.predict_function
    inside = model.predict_function
    with keras_svdtune.adapter_merged(model):
        assert model.predict_function is first
    assert model.predict_function is inside is not first
    keras_svdtune.remove_adapter(model)
    assert model.predict_function is None


def test_declared_layers_merged_in_mid_training():
    """Their compiled step is there again, as `fit` wants it."""
    model = keras.Sequential(
        [keras.Input(X.shape[1:]), keras_svdtune.SVFDense(Y.shape[1])]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")

    def look(epoch, logs):
        with keras_svdtune.adapter_merged(model):
            assert type(model.layers[-1]) is keras.layers.Dense

    callback = keras.callbacks.LambdaCallback(on_epoch_end=look)
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[callback])
    step = model.train_function
    look(0, None)
    assert model.train_function is step is not None


# torch's own view of a model.


@pytest.mark.skipif(not ON_TORCH, reason="torch's own methods")
class TestTorch:
    def agree(self, model):
        trains = {id(v.value) for v in model.trainable_variables}
        found = {id(p) for p in model.parameters() if p.requires_grad}
        assert found == trains
        names = [k for k in model.state_dict() if "adapter" in k]
        assert bool(names) == bool(adapted(model))

    def test_parameters_after_every_call(self, tmp_path):
        model, outer = small_model(), None
        outer = keras.Sequential([model, keras.layers.Dense(2)])
        outer.build((None, X.shape[1]))
        self.agree(model)
        keras_svdtune.enable_svf(model)
        self.agree(model)
        self.agree(outer)
        file = tmp_path / "a.safetensors"
        keras_svdtune.save_adapter(model, file)
        for end in (keras_svdtune.remove_adapter, keras_svdtune.merge_adapter):
            end(model)
            self.agree(model)
            self.agree(outer)
            keras_svdtune.load_adapter(model, file)
            self.agree(model)
            self.agree(outer)
        with keras_svdtune.adapter_merged(model):
            self.agree(model)
        self.agree(model)

    def test_zero_grad(self):
        import torch

        def run(clear):
            keras.utils.set_random_seed(0)
            model = small_model()
            keras_svdtune.enable_svf(model)
            optimizer = keras.optimizers.SGD(0.1)
            for _ in range(4):
                clear(model)
                loss = ((model(torch.tensor(X)) - torch.tensor(Y)) ** 2).mean()
                loss.backward()
                gradients = [v.value.grad for v in model.trainable_weights]
                with torch.no_grad():
                    optimizer.apply(gradients, model.trainable_weights)
            return outputs(model)

        def by_hand(model):
            for variable in model.trainable_weights:
                variable.value.grad = None

        assert_same(run(lambda model: model.zero_grad()), run(by_hand))

    def test_a_torch_optimizer_trains_it(self):
        import torch

        model = small_model()
        keras_svdtune.enable_svf(model)
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], 0.1
        )
        before = outputs(model)
        loss = ((model(torch.tensor(X)) - torch.tensor(Y)) ** 2).mean()
        loss.backward()
        optimizer.step()
        assert np.abs(outputs(model) - before).max() > 0

    def test_state_dict_round_trip(self):
        model = trained()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        before = outputs(model)
        model.fit(X, Y, verbose=0)
        model.load_state_dict(state)
        assert_same(outputs(model), before)


# Learning rates.


def rate_warnings(optimizer, model=None):
    """The warnings of two calls of `fit` that speak of a learning rate."""
    model = model or small_model()
    if not adapted(model):
        keras_svdtune.enable_svf(model)
    model.compile(optimizer, "mse")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.fit(X, Y, verbose=0)
        model.fit(X, Y, verbose=0)
    return [x for x in found if "learning rate" in str(x.message)]


def test_a_rate_that_teaches_nothing_is_said_once():
    (warning,) = rate_warnings(keras.optimizers.Adam(2e-5))
    assert "2e-05" in str(warning.message)
    assert warning.filename == __file__
    (warning,) = rate_warnings(keras.optimizers.AdamW(2e-5))


def test_other_rates_are_left_alone():
    adam, sgd = keras.optimizers.Adam, keras.optimizers.SGD
    schedule = keras.optimizers.schedules.CosineDecay(1e-6, 10)
    for optimizer in (adam(1e-3), adam(schedule), sgd(1e-6)):
        assert not rate_warnings(optimizer)
    plain = small_model()
    plain.compile(adam(1e-6), "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.fit(X, Y, verbose=0)
