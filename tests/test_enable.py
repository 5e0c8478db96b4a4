"""Which layers are adapted, what is refused, and that a refusal or an
interrupt leaves the model as it was."""

import subprocess
import sys
import threading
import warnings
from concurrent.futures import as_completed

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_same,
    default_methods,
    eager,
    must_stay,
    numpy,
    perturb,
    predict,
    small_data,
    small_model,
    tiny_albert,
    tiny_bert,
    tiny_gemma,
    tokens,
)
from keras import ops

import keras_svdtune
from keras_svdtune import SVF, LoRA, Method
from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.hosts import attach
from keras_svdtune.keras_hub_methods import ON_MODELS, add_to_keras_hub
from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.model import planning
from keras_svdtune.runtime import parallel
from keras_svdtune.runtime.keras_internals import unlocked

X, Y = small_data()


# Targets.


def names(model):
    return sorted({layer.name for layer in adapted(model).values()})


def test_none_is_every_matrix():
    gemma = tiny_gemma()
    gemma.enable_svf()
    assert names(gemma) == [
        "attention_output",
        "ffw_gating",
        "ffw_gating_2",
        "ffw_linear",
        "key",
        "query",
        "value",
    ]
    assert len(adapted(gemma)) == 14
    # Not the embedding, which is the output head too.
    assert type(gemma.token_embedding) is not keras.layers.Dense
    assert not hasattr(gemma.token_embedding, "adapter")


def test_names_and_regular_expressions():
    gemma = tiny_gemma()
    for targets, count in (
        (["query", "value"], 4),
        (("query",), 2),
        ([".*attention/(query|key)"], 4),
        (["decoder_block_1/.*"], 7),
        ([".*ffw.*", "query"], 8),
        (["query", ".*/query"], 2),
        (["decoder_block_0/attention/query"], 1),
    ):
        gemma.enable_adapter(LoRA(2), target_layer_names=targets)
        assert len(adapted(gemma)) == count, targets
        gemma.remove_adapter()


def test_targets_that_match_nothing():
    gemma = tiny_gemma(num_layers=1)
    for targets, nearest in (
        (["qery"], "'query'"),
        (["query", "valeu"], "'value'"),
        (["decoder_block_0/attention/querry"], "attention/query'"),
        (["attention/query"], "0/attention/query'"),  # not a whole path
        (["query", "("], "regular expression"),
        ([], "is empty"),
        ("query", "write ['query']"),
        (["embeddings_layer_norm"], "matches no layer"),
    ):
        refused(gemma, nearest, targets=targets, data=tokens())


def test_a_layer_called_twice_is_adapted_once():
    albert = tiny_albert()
    plain = albert.count_params()
    albert.enable_svf()
    layers = list(adapted(albert).values())
    assert len({id(x) for x in layers}) == len(layers)
    extra = sum(
        int(np.prod(v.shape)) for x in layers for v in x.adapter.weights
    )
    assert albert.count_params() == plain + extra
    data = tokens(segments=True)
    before = predict(albert, data)
    query = next(x for p, x in adapted(albert).items() if "query" in p)
    query.adapter.delta.assign(np.ones(query.adapter.delta.shape))
    assert not np.array_equal(
        predict(albert, data)["sequence_output"], before["sequence_output"]
    )


def test_nested_models():
    inner = small_model()
    x = keras.Input((6,))
    outer = keras.Model(x, keras.layers.Dense(2, name="head")(inner(x)))
    before = predict(outer, X)
    keras_svdtune.enable_svf(outer)
    assert names(outer) == ["first", "head", "second"]
    assert_same(predict(outer, X), before)
    keras_svdtune.remove_adapter(outer)
    assert not adapted(inner)


class WithUnbuilt(keras.Model):
    """Holds a Dense that its call never reaches."""

    def __init__(self):
        super().__init__()
        self.used = keras.layers.Dense(4, name="used")
        self.unused = keras.layers.Dense(3, name="unused")

    def call(self, x):
        return self.used(x)


def test_unbuilt_layers_are_skipped():
    model = WithUnbuilt()
    before = predict(model, X)
    keras_svdtune.enable_svf(model)
    assert names(model) == ["used"]
    assert_same(predict(model, X), before)
    keras_svdtune.remove_adapter(model)
    with pytest.raises(ValueError, match="'unused' matches no layer"):
        keras_svdtune.enable_svf(model, ["unused"])


def test_a_kernel_that_is_no_matrix_is_left_out():
    x = keras.Input((3, 4))
    y = keras.layers.EinsumDense("beh,ehd->bed", (3, 4), name="bank")(x)
    model = keras.Model(x, keras.layers.Dense(4, name="head")(y))
    with pytest.warns(UserWarning, match="'bank'"):
        keras_svdtune.enable_svf(model)
    assert names(model) == ["head"]
    keras_svdtune.remove_adapter(model)
    data = np.ones((2, 3, 4), "float32")
    with (
        must_stay(model, data),
        pytest.raises(ValueError, match="Layer 'bank'.*batch of matrices"),
    ):
        keras_svdtune.enable_svf(model, ["bank"])


def test_a_subclass_of_dense_is_left_alone():
    class Twice(keras.layers.Dense):
        def call(self, x, training=None):
            return 2.0 * super().call(x)

    x = keras.Input((6,))
    model = keras.Model(x, keras.layers.Dense(2)(Twice(3, name="twice")(x)))
    keras_svdtune.enable_svf(model)
    assert type(model.get_layer("twice")) is Twice


def test_every_way_to_say_it():
    results = []
    for say in (
        lambda m: m.enable_svf(),
        lambda m: m.enable_adapter(SVF()),
        lambda m: keras_svdtune.enable_svf(m),
        lambda m: keras_svdtune.enable_adapter(m, SVF()),
    ):
        keras.backend.clear_session(free_memory=False)
        gemma = tiny_gemma(num_layers=1)
        say(gemma)
        perturb(gemma)
        results.append(eager(gemma, tokens()))
    for other in results[1:]:
        assert_same(other, results[0])


def test_on_a_task():
    task = keras_hub.models.GemmaCausalLM(
        backbone=tiny_gemma(), preprocessor=None
    )
    task.enable_svf(["query"])
    assert names(task.backbone) == ["query"]
    with task.adapter_disabled():
        pass
    task.remove_adapter()
    assert not adapted(task)
    task.backbone.enable_svf(["query"])
    task.merge_adapter()
    assert not adapted(task)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_frozen_model_trains_its_adapter(trainable):
    model = small_model(compiled=True)
    model.trainable = trainable
    before = [v.path for v in model.trainable_weights]
    assert bool(before) is trainable
    keras_svdtune.enable_svf(model)
    assert len(model.trainable_weights) == 2
    losses = model.fit(X, Y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    keras_svdtune.remove_adapter(model)
    assert model.trainable is trainable
    assert [v.path for v in model.trainable_weights] == before


def test_one_view_of_each_matrix(monkeypatch, tmp_path):
    """A target is made once and handed down: nothing asks again."""
    made, init = [], MatrixView.__init__

    def counted(self, *args, **kwargs):
        made.append(args)
        init(self, *args, **kwargs)

    monkeypatch.setattr(MatrixView, "__init__", counted)
    model, file = small_model(), tmp_path / "adapter.safetensors"
    keras_svdtune.enable_svf(model)
    assert len(made) == 2  # it has two layers
    keras_svdtune.save_adapter(model, file)
    assert len(made) == 2
    keras_svdtune.load_adapter(model, file)
    assert len(made) == 2
    keras_svdtune.load_adapter(small_model(), file)
    assert len(made) == 4
    keras_svdtune.SVFDense(3).build((None, 4))
    assert len(made) == 5


# Bad input.


def refused(model, message, method=None, targets=None, data=X):
    with (
        must_stay(model, data, compiled=False),
        pytest.raises(ValueError) as caught,
    ):
        keras_svdtune.enable_adapter(model, method or SVF(), targets)
    for part in message if isinstance(message, tuple) else (message,):
        assert part in str(caught.value), str(caught.value)


def test_a_second_enable():
    model = small_model()
    keras_svdtune.enable_svf(model, ["first"])
    message = ("'small' already has an adapter (SVF())", "`merge_adapter()`")
    for method in default_methods():
        refused(model, message, method)


def test_an_unbuilt_model():
    model = keras.Sequential([keras.layers.Dense(3)], name="raw")
    with pytest.raises(ValueError, match="'raw' is not built yet.*Call it on"):
        keras_svdtune.enable_svf(model)
    assert not model.built and not model.weights


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad):
    model = small_model()
    kernel = numpy(model.get_layer("second").kernel)
    kernel[1, 2] = bad
    model.get_layer("second").kernel.assign(kernel)
    refused(model, ("second' holds NaN or infinity", "Load its weights"))


def test_a_kernel_constraint():
    model = keras.Sequential(
        [
            keras.layers.Input((6,)),
            keras.layers.Dense(3, kernel_constraint="non_neg", name="limited"),
        ]
    )
    refused(model, ("limited' has a constraint on its kernel", "build it"))


def test_a_constraint_on_a_kernel_that_is_read_directly():
    layer = keras.layers.SeparableConv1D(
        2, 3, pointwise_constraint="non_neg", name="separable"
    )
    model = keras.Sequential([keras.layers.Input((4, 3)), layer])
    message = "separable/pointwise_kernel' has a constraint on its kernel"
    refused(model, message, data=np.ones((2, 4, 3), "float32"))


class Reader(keras.layers.Layer):
    """Multiplies by the kernel of another layer, or holds it in a list."""

    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.held = [other.weights[0]]

    def call(self, x):
        return ops.matmul(x, self.held[0])


class Pair(keras.layers.Layer):
    """A layer of KerasHub's, by its name, whose kernels are one variable."""

    __module__ = "keras_hub.pair"

    def build(self, shape):
        self.gate_up_proj = self.add_weight((3, 4, 4), name="both")
        self.down_proj = self.gate_up_proj

    def call(self, x):
        return ops.einsum(
            "bi,eij,ejk->bk", x, self.gate_up_proj, self.down_proj
        )


def tied(first, second, shape, dtype="float32"):
    """A model in which `second` has the kernel of `first`."""
    x = keras.Input(shape, dtype=dtype)
    y = first(x)
    z = second(x if dtype == "int32" else y)
    name = "_embeddings" if dtype == "int32" else "_kernel"
    with unlocked(second):
        second._untrack_variable(getattr(second, name))
        setattr(second, name, getattr(first, name))
    return keras.Model(x, [y, z])


def tied_dense(cls=keras.layers.Dense):
    a, b = (cls(6, use_bias=False, name=name) for name in "ab")
    return tied(a, b, (6,))


@pytest.mark.parametrize("targets", [None, ["a"], ["b"]])
def test_two_layers_with_one_kernel(targets):
    """Also where the other one has no adapter, or cannot have one."""
    message = (
        "'a' and 'b' share one kernel"
        if targets != ["b"]
        else "'b' and 'a' share one kernel",
        "a kernel of its own",
    )
    refused(tied_dense(), message, targets=targets)

    class Other(keras.layers.Dense):
        """Of a class that is never adapted."""

    if targets != ["b"]:
        model = tied(
            keras.layers.Dense(6, use_bias=False, name="a"),
            Other(6, use_bias=False, name="b"),
            (6,),
        )
        refused(model, message, targets=targets)


def test_two_tables_that_are_one():
    a, b = (keras.layers.Embedding(5, 4, name=name) for name in "ab")
    model = tied(a, b, (3,), "int32")
    data = np.ones((2, 3), "int32")
    for targets in (["a", "b"], ["a"]):
        refused(model, "'a' and 'b' share one", targets=targets, data=data)


def test_a_kernel_that_another_layer_reads():
    x = keras.Input((6,))
    a = keras.layers.Dense(6, name="a")
    y = a(x)
    model = keras.Model(x, [y, Reader(a, name="reader")(x)])
    refused(model, "'a' and 'reader' share one kernel")
    inner = keras.Model(x, y)
    keras_svdtune.enable_svf(inner)  # which knows nothing of the other


def test_two_direct_kernels_that_are_one():
    x = keras.Input((4,))
    Pair.__name__ = "GptOssExperts"
    model = keras.Model(x, Pair(name="pair")(x))
    message = "'pair/gate_up_proj' and 'pair/down_proj' share one kernel"
    refused(model, message, data=X[:, :4])


def test_a_wrapper_that_writes_to_a_kernel():
    """Even to one that is no target: the base must stay what it is."""
    wrapped = keras.layers.SpectralNormalization(
        keras.layers.Dense(5, name="inner"), name="spectral"
    )
    model = keras.Sequential(
        [keras.layers.Input((6,)), keras.layers.Dense(4, name="first"), wrapped]
    )
    for targets in (None, ["first"], ["inner"]):
        message = ("spectral' writes to the kernel of", "inner'", "in place")
        refused(model, message, targets=targets)


def test_a_file_for_a_kernel_that_two_layers_have(tmp_path):
    path = tmp_path / "adapter.safetensors"
    x = keras.Input((6,))
    model = keras.Model(x, keras.layers.Dense(6, use_bias=False, name="a")(x))
    keras_svdtune.enable_svf(model)
    keras_svdtune.save_adapter(model, path)
    other = tied_dense()
    other.get_layer("a").kernel.assign(model.get_layer("a")._kernel)
    with (
        must_stay(other, X, compiled=False),
        pytest.raises(ValueError, match="does not fit. Layers 'a' and 'b' sh"),
    ):
        keras_svdtune.load_adapter(other, path)


def test_keras_lora():
    model = small_model()
    model.get_layer("first").enable_lora(2)
    refused(model, ("first' has Keras LoRA enabled", "load the model"))
    keras_svdtune.enable_svf(model, ["second"])  # beside it there is room


def test_keras_dora():
    """A stand-in for what Keras is about to have."""
    model = small_model()
    model.get_layer("first").dora_enabled = True
    refused(model, ("first' has Keras DoRA enabled", "load the model"))
    keras_svdtune.enable_svf(model, ["second"])  # beside it there is room


def test_an_unknown_quantization(monkeypatch):
    """Keras is about to have another mode; only "first" is quantized to it."""
    model = small_model()
    mode = property(lambda x: "ternary" if x.name == "first" else None)
    message = "first' is quantized to ternary, and adapters know int8 and int4"
    with must_stay(model, X), monkeypatch.context() as patch:
        patch.setattr(keras.layers.Dense, "quantization_mode", mode)
        with pytest.raises(ValueError, match=message):
            keras_svdtune.enable_svf(model)


def test_keras_hub_lora():
    gemma = tiny_gemma()
    gemma.enable_lora(2)
    refused(
        gemma,
        ("attention/query' has Keras LoRA enabled", "target_layer_names"),
        data=tokens(),
    )


@pytest.mark.filterwarnings("ignore")
def test_quantized():
    model = small_model()
    model.quantize("float8")
    refused(model, ("first' is quantized to float8", "leave it out"))


class SquareOnly(LoRA):
    """A method that cannot adapt every matrix."""

    def for_shape(self, shape):
        if shape[0] != shape[1]:
            raise ValueError("W must be square.")
        return super().for_shape(shape)


def test_a_method_that_does_not_fit():
    message = ("first', a matrix of 6 x 4: W must be square",)
    refused(small_model(), message, SquareOnly(2))


class OneWay(LoRA):
    """A method that does not say how to multiply backwards."""

    reverse = Method.reverse


def test_a_tied_embedding_needs_a_method_with_a_reverse():
    gemma = tiny_gemma(num_layers=1)
    message = ("token_embedding' multiplies by its table backwards", "reverse")
    refused(gemma, message, OneWay(2), ["token_embedding"], tokens())
    gemma.enable_adapter(OneWay(2), ["query"])


def test_no_method():
    """A class for an instance, or something else."""
    model = small_model()
    with must_stay(model, X, compiled=False):
        for method in default_methods():
            cls = type(method)
            with pytest.raises(ValueError) as caught:
                keras_svdtune.enable_adapter(model, cls)
            assert f"`{cls.__name__}(...)`" in str(caught.value)
        for method in ("svf", None, 8, {"rank": 8}):
            with pytest.raises(ValueError) as caught:
                keras_svdtune.enable_adapter(model, method)
            assert "`SVF()`" in str(caught.value)
            assert repr(method) in str(caught.value)


@pytest.mark.parametrize("model", [None, "gemma", keras.layers.Dense(3)])
def test_no_model(model):
    with pytest.raises(ValueError, match="Expected a keras.Model"):
        keras_svdtune.enable_svf(model)


def test_nothing_to_adapt():
    x = keras.Input((6,))
    model = keras.Model(x, keras.layers.LayerNormalization()(x), name="none")
    refused(model, "'none' has no Dense, EinsumDense or convolution")


def test_no_adapter():
    model = small_model()
    for call in (
        keras_svdtune.merge_adapter,
        keras_svdtune.remove_adapter,
        keras_svdtune.adapter_summary,
        lambda m: keras_svdtune.adapter_disabled(m).__enter__(),
        lambda m: keras_svdtune.save_adapter(m, "a.safetensors"),
    ):
        with (
            must_stay(model, X, compiled=False),
            pytest.raises(ValueError) as caught,
        ):
            call(model)
        assert "'small' has no adapter" in str(caught.value)
        assert "enable_svf()" in str(caught.value)


# Interrupted.


@pytest.mark.parametrize(
    "where, error, method",
    [
        ((planning, "first_values"), KeyboardInterrupt, SVF()),
        ((attach, "Adapter"), MemoryError, SVF()),
        ((attach, "Adapter"), KeyboardInterrupt, LoRA(2)),
    ],
    ids=["decomposing", "attaching", "attaching-lora"],
)
def test_interrupt_leaves_the_model_as_it_was(
    where, error, method, monkeypatch
):
    gemma, data = tiny_gemma(num_layers=1), tokens()
    gemma.get_layer("decoder_block_0").attention.trainable = False
    original, calls = getattr(*where), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 6:
            raise error
        return original(*args, **kwargs)

    with must_stay(gemma, data, compiled=False):
        monkeypatch.setattr(*where, interrupted)
        with pytest.raises(error):
            gemma.enable_adapter(method)
        assert len(calls) >= 6
        monkeypatch.undo()
    gemma.enable_adapter(method)  # and nothing hinders the next try
    assert len(adapted(gemma)) == 7


def test_interrupt_while_others_decompose(monkeypatch):
    """Ctrl-C reaches the main thread, which waits for the ones at work."""
    gemma, data, done = tiny_gemma(num_layers=1), tokens(), []

    def interrupted(futures):
        for future in as_completed(futures):
            done.append(future)
            if len(done) == 3:
                raise KeyboardInterrupt
            yield future

    threads = threading.active_count()
    with must_stay(gemma, data, compiled=False):
        monkeypatch.setattr(parallel, "as_completed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gemma.enable_svf()
        monkeypatch.undo()
    assert threading.active_count() == threads


def test_interrupt_at_any_weight(monkeypatch):
    """Also while a layer is half converted."""
    model, original = small_model(), Adapter.add_weight
    calls, stop_at = [], [1, 2, 3, 4]  # two layers of two weights

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if stop_at and len(calls) == stop_at[0]:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Adapter, "add_weight", interrupted)
    with must_stay(model, X):
        while stop_at:
            with pytest.raises(KeyboardInterrupt):
                keras_svdtune.enable_svf(model)
            del calls[:], stop_at[0]
        keras_svdtune.enable_svf(model)
        assert len(calls) == 4
        keras_svdtune.remove_adapter(model)


# What importing does.

SNAPSHOT = """
import sys
import keras, keras_hub

def pictures():
    found = {}
    for owner in (
        keras.Model, keras.layers.Layer, keras.layers.Dense,
        keras.layers.EinsumDense, keras_hub.models.Backbone,
        keras_hub.models.Task, keras_hub.models.CausalLM, keras, keras_hub,
        keras.ops, keras.layers, keras.saving, keras.config,
    ):
        for name, value in vars(owner).items():
            found[owner.__name__, name] = id(value)
    return found

before, modules = pictures(), set(sys.modules)
import keras_svdtune
after = pictures()
changed = [k for k in before if after.get(k) != before[k]]
changed = [k for k in changed if k[1] not in ("__doc__", "__abstractmethods__")]
# What would lose an adapter without a word: `model/hooks.py`.
wrapped = {
    ("Backbone", "enable_lora"), ("Backbone", "export_to_transformers"),
    ("Backbone", "load_lora_weights"), ("CausalLM", "export_to_transformers"),
    ("Model", "load_weights"), ("Model", "quantize"),
}
if keras.config.backend() == "torch":
    wrapped.add(("Model", "export"))
assert set(changed) == wrapped, changed
added = {k for k in after if k not in before}
assert ("Backbone", "enable_svf") in added
on_models = {name for owner, name in added if owner == "Model"}
watched = {"fit", "generate_function", "optimizer", "predict_function",
           "test_function", "train_function", "trainable"}
torch = {"load_state_dict", "named_parameters", "state_dict"}
if keras.config.backend() == "torch":
    watched |= torch
assert on_models == watched, on_models
assert {k[0] for k in added} <= {"Backbone", "Task", "Model"}, added
backends = {"jax", "jaxlib", "tensorflow", "torch"}
new = {m for m in set(sys.modules) - modules if m.split(".")[0] in backends}
print("new backend modules:", sorted(new))
assert not new, sorted(new)
"""


def test_import_wraps_what_would_lose_an_adapter_and_nothing_else():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SNAPSHOT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_method_of_keras_hub_is_left_alone(monkeypatch):
    """A later KerasHub may have an `enable_svf` of its own."""
    cls = keras_hub.models.Backbone

    def own(self):
        pass

    others = {k: v for k, v in vars(cls).items() if k != "enable_svf"}
    monkeypatch.setattr(cls, "enable_svf", own)
    with pytest.warns(UserWarning, match="`enable_svf` of its own") as caught:
        add_to_keras_hub("enable_svf", ON_MODELS["enable_svf"])
    assert len(caught) == 1
    assert cls.enable_svf is own
    assert others == {k: v for k, v in vars(cls).items() if k != "enable_svf"}


@pytest.mark.parametrize("owner", ["Backbone", "Task"])
def test_a_name_of_keras_hub_means_one_thing(monkeypatch, owner):
    """Stand-ins for a KerasHub where one of them has an `enable_dora`."""

    def own(self):
        pass

    plain = {name: type(name, (), {}) for name in ("Backbone", "Task")}
    plain[owner].enable_dora = own
    for name, cls in plain.items():
        monkeypatch.setattr(keras_hub.models, name, cls)
    with pytest.warns(UserWarning, match=f"{owner} has a method `enable_dora`"):
        add_to_keras_hub("enable_dora", ON_MODELS["enable_dora"])
    (other,) = set(plain) - {owner}
    assert plain[owner].enable_dora is own
    assert not hasattr(plain[other], "enable_dora")
    add_to_keras_hub("enable_svf", ON_MODELS["enable_svf"])
    assert all(hasattr(cls, "enable_svf") for cls in plain.values())


def test_every_method_has_its_functions():
    for name, cls in keras_svdtune.METHODS.items():
        if not cls.has_enable:
            continue
        for owner in (keras_hub.models.Backbone, keras_hub.models.Task):
            assert callable(getattr(owner, f"enable_{name}"))
        assert callable(getattr(keras_svdtune, f"enable_{name}"))
        assert getattr(keras_svdtune, cls.__name__) is cls


def test_nothing_is_said_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny_bert().enable_svf()
