"""Random programs of calls end in the right W', whatever came before.

A program enables, trains, saves, loads, adds up, merges, removes, disables,
copies and exports, in any order, on one of five small models. Beside it runs a
shadow in float64 that knows nothing of this package's state: the kernels W, and
the change of each by the equations of the methods. After every call the model
must compute what a plain model with the shadow's kernels computes.

Twenty programs always run; `-m slow` runs three hundred.
"""

import copy
import dataclasses
import pathlib
import tempfile
import warnings

import keras
import numpy as np
import pytest
from helpers import adapted, numpy
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import keras_svdtune
from keras_svdtune.files.format import read_adapter
from keras_svdtune.model.targets import adapted_targets, matrices_in

METHODS = {
    "svf": keras_svdtune.SVF(),
    "folded": keras_svdtune.SVF(replace_kernel=True),
    "lora": keras_svdtune.LoRA(rank=2, alpha=3.0),
    "pissa": keras_svdtune.PiSSA(rank=2),
    "milora": keras_svdtune.MiLoRA(rank=1),
    "dora": keras_svdtune.DoRA(rank=2),
}


def mlp():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(4),
        ]
    )


def convolutions():
    return keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            keras.layers.Conv2D(6, 2, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


def attention():
    inputs = keras.Input((4, 6))
    query = keras.layers.EinsumDense("btd,ndh->btnh", (None, 2, 3))(inputs)
    output = keras.layers.EinsumDense("btnh,nhd->btd", (None, 5))(query)
    return keras.Model(inputs, keras.layers.LayerNormalization()(output))


def words():
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(7, 5)(inputs)
    shared = keras.layers.Dense(5, "tanh")
    return keras.Model(inputs, keras.layers.Dense(3)(shared(shared(x))))


def nested():
    inner = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(6, "tanh", use_bias=False)]
    )
    inputs = keras.Input((6,))
    frozen = keras.layers.Dense(5, trainable=False)
    return keras.Model(inputs, keras.layers.Dense(3)(frozen(inner(inputs))))


MODELS = [mlp, convolutions, attention, words, nested]
SHAPES = {mlp: (6,), convolutions: (5, 5, 2), attention: (4, 6), nested: (6,)}


def change_of(target):
    """W' - W by the equations, from the trained numbers, in float64."""
    adapter = target.adapted
    value = {
        name.partition("_")[2]: numpy(v).astype("float64")
        for name, v in adapter.weights_by_name().items()
    }
    name = adapter.method.name
    if name == "svf":
        basis, delta = value["basis"], value["delta"]
        return lambda w: (
            w @ (basis * delta) @ basis.T
            if w.shape[1] <= w.shape[0]
            else (basis * delta) @ basis.T @ w
        )
    if name in ("pissa", "milora"):
        a, b = value["a0"] + value["delta_a"], value["b0"] + value["delta_b"]
        return lambda w: a @ b - value["a0"] @ value["b0"]
    product = adapter.method.scale * value["a"] @ value["b"]
    if name == "lora":
        return lambda w: product
    assert name == "dora"
    magnitude = value["magnitude_change"]

    def of_dora(w):
        moved = w + product
        norms = np.linalg.norm(w, axis=0) + magnitude
        return moved * (norms / np.linalg.norm(moved, axis=0)) - w

    return of_dora


@dataclasses.dataclass
class File:
    path: pathlib.Path
    method: str
    base: dict
    change: dict


class Programs(RuleBasedStateMachine):
    @initialize(kind=st.sampled_from(MODELS), seed=st.integers(0, 99))
    def start(self, kind, seed):
        keras.utils.clear_session()
        keras.utils.set_random_seed(seed)
        self.random = np.random.RandomState(seed)
        self.make, self.model, self.twin = kind, kind(), kind()
        for ours, twins in zip(
            self.model.weights, self.twin.weights, strict=True
        ):
            if ours.trainable:
                ours.assign(self.random.normal(size=ours.shape))
            twins.assign(numpy(ours))
        self.model.compile(keras.optimizers.Adam(0.01), "mse")
        self.x = (
            self.random.randint(0, 7, (3, 4))
            if kind is words
            else self.random.normal(size=(3, *SHAPES[kind])).astype("float32")
        )
        self.y = np.zeros(self.model(self.x).shape)
        self.folder = tempfile.TemporaryDirectory()
        self.files, self.method, self.change = [], None, {}
        found = matrices_in(self.model).targets
        self.base = {
            p: numpy(x.matrix()).astype("f8") for p, x in found.items()
        }
        twins = matrices_in(self.twin).targets
        self.twins = dict(zip(found, twins.values(), strict=True))

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # The shadow.

    def expected(self, changes=None):
        changes = self.change if changes is None else changes
        for path, twin in self.twins.items():
            w = self.base[path] + changes.get(path, 0.0)
            kernel = twin.view.to_kernel(w.astype("float32"))
            twin.kernel.assign(kernel)
        return numpy(self.twin(self.x))

    def same(self, found, changes=None):
        expected = self.expected(changes)
        error = np.abs(numpy(found) - expected).max()
        assert error < 3e-5 * max(np.abs(expected).max(), 1.0), error

    def look_again(self):
        """Computes the changes anew, after something was trained."""
        for path, target in adapted_targets(self.model).items():
            self.change[path] = change_of(target)(self.base[path])

    def fits(self, file):
        if self.method is not None and self.method != file.method:
            return False
        if self.method is not None and set(file.change) != set(self.change):
            return False
        return all(
            np.allclose(self.base[path], file.base[path], 1e-5, 1e-5)
            for path in file.change
        )

    # The calls.

    @precondition(lambda self: self.method is None)
    @rule(name=st.sampled_from(sorted(METHODS)))
    def enable(self, name):
        if name == "folded" and self.make is convolutions:
            name = "svf"
        before = numpy(self.model(self.x))
        keras_svdtune.enable_adapter(self.model, METHODS[name])
        self.method = METHODS[name].name
        if name != "folded":  # whose product is another
            assert np.array_equal(numpy(self.model(self.x)), before)
        self.change = dict.fromkeys(adapted_targets(self.model), 0.0)

    @precondition(lambda self: self.method is not None)
    @rule()
    def enable_another(self):
        with pytest.raises(ValueError, match="already has an adapter"):
            keras_svdtune.enable_svf(self.model)

    @precondition(lambda self: self.method is not None)
    @rule(size=st.sampled_from([0.1, 0.5]))
    def assign(self, size):
        for target in adapted_targets(self.model).values():
            for weight in target.adapted.weights_by_name(True).values():
                noise = self.random.normal(size=weight.shape)
                weight.assign(weight.value + size * noise)
        self.look_again()

    @precondition(lambda self: self.method is not None)
    @rule()
    def train(self):
        self.model.train_on_batch(self.x, self.y)
        self.look_again()

    @precondition(lambda self: self.method is not None)
    @rule()
    def save(self):
        path = pathlib.Path(self.folder.name) / f"{len(self.files)}.safetensors"
        keras_svdtune.save_adapter(self.model, path)
        file = File(path, self.method, dict(self.base), dict(self.change))
        self.files.append(file)

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def load(self, data):
        file = data.draw(st.sampled_from(range(len(self.files))))
        file = self.files[file]
        if self.fits(file):
            keras_svdtune.load_adapter(self.model, file.path)
            self.method, self.change = file.method, dict(file.change)
        else:
            with pytest.raises(ValueError):
                keras_svdtune.load_adapter(self.model, file.path)

    @precondition(lambda self: self.method is None and len(self.files) > 1)
    @rule(data=st.data(), weight=st.sampled_from([1.0, 0.5, -0.25]))
    def add_up(self, data, weight):
        numbers = st.sampled_from(range(len(self.files)))
        one, other = (self.files[data.draw(numbers)] for _ in range(2))
        low_rank = {"lora", "pissa", "milora"}
        together = one.method == other.method == "svf" or (
            {one.method, other.method} <= low_rank
        )
        if one is other or not together:
            return
        if not (self.fits(one) and self.fits(other)):
            return
        parts = {one.path: weight, other.path: 1.0 - weight}
        total = keras_svdtune.compose(parts)
        keras_svdtune.load_adapter(self.model, total)
        self.method = total.about["method"]
        self.change = {
            path: weight * one.change[path] + (1 - weight) * other.change[path]
            for path in one.change
        }

    @precondition(lambda self: self.method is not None)
    @rule()
    def merge(self):
        keras_svdtune.merge_adapter(self.model)
        for path, change in self.change.items():
            self.base[path] = self.base[path] + change
        self.method, self.change = None, {}

    @precondition(lambda self: self.method is not None)
    @rule()
    def remove(self):
        keras_svdtune.remove_adapter(self.model)
        self.method, self.change = None, {}

    @precondition(lambda self: self.method is not None)
    @rule()
    def disable(self):
        with keras_svdtune.adapter_disabled(self.model):
            self.same(self.model(self.x), {})

    @precondition(lambda self: self.method is not None)
    @rule()
    def merge_for_a_while(self):
        with keras_svdtune.adapter_merged(self.model):
            assert not adapted(self.model)
            self.same(self.model(self.x))

    @precondition(lambda self: self.method is not None)
    @rule()
    def convert(self):
        if any(x.replaced for x in adapted_targets(self.model).values()):
            with pytest.raises(ValueError, match="made for its adapter"):
                keras_svdtune.to_lora(self.model, rank=8)
            return
        keras_svdtune.to_lora(self.model, rank=8)
        self.method = "lora"

    @precondition(lambda self: self.method is not None)
    @rule()
    def refused(self):
        with pytest.raises(ValueError, match="quantize before"):
            self.model.quantize("int8")
        with pytest.raises(ValueError, match="has an adapter already"):
            next(iter(adapted(self.model).values())).enable_lora(1)

    @rule(ending=st.sampled_from(["keras", "h5"]))
    def save_and_load_the_whole(self, ending):
        path = pathlib.Path(self.folder.name) / f"whole.{ending}"
        self.model.save(path)
        other = keras.models.load_model(path, compile=False)
        assert not adapted(other)
        self.same(other(self.x))

    @rule()
    def copy(self):
        self.same(copy.deepcopy(self.model)(self.x))
        clone = keras.models.clone_model(self.model)
        assert not adapted(clone)

    @rule()
    def predict(self):
        self.same(self.model.predict(self.x, verbose=0))

    @precondition(lambda self: self.files)
    @rule()
    def a_damaged_file(self):
        path = self.files[-1].path
        damaged = path.with_name("damaged.safetensors")
        damaged.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(ValueError):
            keras_svdtune.load_adapter(self.model, damaged)
        assert read_adapter(path).about["method"] == self.files[-1].method

    # What always holds.

    @invariant()
    def computes_what_the_shadow_does(self):
        if not hasattr(self, "model"):
            return
        self.same(self.model(self.x))
        assert (self.method is not None) == bool(adapted(self.model))
        trains = self.model.trainable_variables
        assert trains
        in_adapters = ["adapter" in v.path for v in trains]
        assert all(in_adapters) == any(in_adapters) == bool(self.method)


@pytest.mark.parametrize(
    "programs", [20, pytest.param(300, marks=pytest.mark.slow)]
)
def test_programs(programs):
    keras.config.disable_interactive_logging()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            Programs,
            settings=settings(
                max_examples=programs,
                stateful_step_count=12,
                derandomize=True,
                phases=[Phase.generate],  # a program is short as it is
                report_multiple_bugs=False,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
