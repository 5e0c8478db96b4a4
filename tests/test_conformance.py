"""What every method promises, for every kind of layer it can live in.

A method that is added to `METHODS` is tested here without another line. Two
groups: what depends on a method's formulas is tested for all of its settings
and all hosts; what the machinery around it does, for one of each.
"""

import keras
import numpy as np
import pytest
from helpers import (
    HOSTS,
    POLICIES,
    all_methods,
    assert_close,
    assert_differ,
    assert_same,
    compiles,
    default_methods,
    dot,
    eager,
    flat,
    gradient_function,
    hosts_data,
    hosts_model,
    method_id,
    numpy,
    perturb,
    picture,
    predict,
    trainables,
    values,
)
from helpers import adapted as adapted_layers
from keras import ops

import keras_svdtune
from keras_svdtune.adapter.stepped import variable_of
from keras_svdtune.hosts.host import AdapterHost

FEW = ("dense_tall", "dense_wide", "einsum_query")


def merge_tolerance(method, policy):
    """For the largest difference, relative to the largest output.

    A bfloat16 rounds to 2**-9 = 0.002; the input, the kernel, the products
    and the bias each are. SVFT divides by s, here by 1/12 of the largest one,
    and magnifies as much of it.
    """
    if policy == "float32":
        return 1e-5
    return 8e-2 if method.name == "svft" else 1.5e-2


one_of_each = pytest.mark.parametrize(
    "method", default_methods(), ids=method_id
)
# Variables of the mixed policy are those of float32.
every_policy = pytest.mark.parametrize("policy", POLICIES[:2])


# The formulas: all settings, all hosts.


@pytest.fixture(scope="module")
def unfused():
    """TensorFlow computes a product and its bias as one op in a graph, with
    one rounding to bfloat16 where an eager model has two. Between the two of
    them the adapter has its place, so a graph is compared without that."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"remapping": False})
    yield
    before = {"remapping": True} | before
    tf.config.optimizer.set_experimental_options(before)


def hosts_for(method, policy):
    """All of them for each method in float32. Other policies differ in
    rounding and not in axes, other settings in the matrix and not in where it
    is: for them one of each shape."""
    if policy == "float32" and method in default_methods():
        return tuple(HOSTS)
    return (*FEW, "dense_square")


@pytest.fixture(scope="module")
def plain(unfused):
    """For hosts and a policy: two equal models without an adapter, a third
    that shares a few layers of the first, and what they compute."""
    made = {}

    def get(hosts, policy):
        if (hosts, policy) not in made:
            twins = []
            for _ in range(2):
                keras.backend.clear_session(free_memory=False)
                twins.append(hosts_model(policy, hosts))
            few = keras.Model(
                [twins[0].get_layer(f"{x}_input").output for x in FEW],
                [twins[0].get_layer(f"{x}_output").output for x in FEW],
            )
            base = predict(twins[0], hosts_data(hosts))
            assert_same(predict(twins[1], hosts_data(hosts)), base, "twins")
            base_eager = eager(few, hosts_data(FEW))
            made[hosts, policy] = *twins, few, base, base_eager
        return made[hosts, policy]

    return get


def each_policy(policies):
    """Every method, with all its settings in float32."""
    return pytest.mark.parametrize(
        "method, policy",
        [
            pytest.param(method, policy, id=f"{method_id(method)}-{policy}")
            for policy in policies
            for method in (
                all_methods() if policy == "float32" else default_methods()
            )
        ],
    )


@each_policy(POLICIES)
def test_first_step_is_bit_identical_and_merged_equals_unmerged(
    method, policy, plain
):
    hosts = hosts_for(method, policy)
    model, twin, few, base, base_eager = plain(hosts, policy)
    data = hosts_data(hosts)
    keras_svdtune.enable_adapter(model, method)
    try:
        assert {x.name for x in adapted_layers(model).values()} == set(hosts)
        assert_same(predict(model, data), base, "first predict")
        if method in default_methods() and policy == "float32":
            first = eager(few, hosts_data(FEW))
            assert_same(first, base_eager, "first eager call")
        # Away from its start the adapter computes something else.
        perturb(model)
        moved = predict(model, data)
        assert_differ(moved, base, "moved")
        kernels = {
            name: model.get_layer(name).merged_kernel() for name in hosts
        }
    finally:
        keras_svdtune.remove_adapter(model)
    # The plain twin with the merged kernels: it is compiled already.
    before = twin.get_weights()
    for name, kernel in kernels.items():
        twin.get_layer(name)._kernel.assign(kernel)
    merged = predict(twin, data)
    twin.set_weights(before)
    assert_close(merged, moved, merge_tolerance(method, policy), "merged")


@one_of_each
def test_gradients_equal_dense_autodiff(method):
    """Of every trainable, and of the input, against the merged kernel's. (Of
    all settings: in test_methods_oracle.py, by differences.)"""
    model = hosts_model(names=FEW)
    keras_svdtune.enable_adapter(model, method)
    layers = [model.get_layer(name) for name in FEW]
    inputs = [keras.Variable(x) for x in hosts_data(FEW)]
    rng = np.random.default_rng(3)
    cotangents = [
        rng.standard_normal(tuple(layer(x).shape)).astype("float32")
        for layer, x in zip(layers, inputs, strict=True)
    ]

    def loss(output):
        return lambda: sum(
            dot(output(*each), dy)
            for *each, dy in zip(layers, inputs, cotangents, strict=True)
        )

    variables = {
        f"{layer.name} {name}": variable
        for layer, x in zip(layers, inputs, strict=True)
        for name, variable in (
            *layer.adapter.variables_by_name(trainable=True).items(),
            ("input", x),
        )
    }
    branch = gradient_function(loss(_output), variables.values())
    dense = gradient_function(loss(_dense_output), variables.values())
    for moved in (False, True):
        if moved:
            perturb(model)
        found, expected = branch(), dense()
        for name, ours, theirs in zip(variables, found, expected, strict=True):
            assert_close(ours, theirs, 1e-4, f"{name} moved={moved}")
        for layer in layers:
            largest = max(
                np.abs(g).max()
                for name, g in zip(variables, found, strict=True)
                if name.startswith(layer.name) and "input" not in name
            )
            assert largest > 1e-3, layer.name


def _output(layer, x):
    return layer(x.value)


def _dense_output(layer, x):
    """The layer's output by its merged kernel, written out once more."""
    kernel = layer.adapter.view.to_kernel(
        layer.adapter.merged(layer.adapter.view.to_matrix(layer._kernel.value))
    )
    equation = getattr(layer, "equation", "...i,io->...o")
    y = ops.einsum(equation, ops.convert_to_tensor(x), kernel)
    if layer.bias is not None:
        y = y + layer.bias
    return layer.activation(y)


# The machinery: one of each method, three hosts.


@every_policy
@one_of_each
def test_only_its_variables_train(method, policy):
    model = hosts_model(policy, FEW)
    base = {id(v) for v in model.weights}
    keras_svdtune.enable_adapter(model, method)
    # Keras holds with the trainables what the backward pass overwrites.
    expected = [
        id(variable_of(getattr(layer.adapter, w.name)))
        for layer in adapted_layers(model).values()
        for w in method.weights(layer.adapter.shape)
        if w.trainable or w.overwritten
    ]
    assert len(expected) >= len(FEW)

    def check():
        weights = model.trainable_weights
        assert sorted(map(id, weights)) == sorted(expected)
        assert not base & {id(v) for v in weights}
        assert {v.dtype for v in weights} == {"float32"}
        assert all(f"/{method.name}_" in v.path for v in weights)
        assert all(v.trainable for v in weights)
        steps = [v for v in weights if not v.overwrite_with_gradient]
        assert sorted(v.path for v in steps) == sorted(trainables(model))

    check()
    for flag in (True, False, True):
        model.trainable = flag
    check()
    for layer in adapted_layers(model).values():
        layer.trainable = True
    check()
    # None of them is there twice, and none of the base's is missing.
    ids = [id(v) for v in model.weights]
    assert len(ids) == len(set(ids)) and base <= set(ids)


@one_of_each
def test_fit_trains_the_adapter_and_compiles_once(method, tmp_path):
    model, data = hosts_model(names=FEW), hosts_data(FEW, batch=8)
    targets = _targets(model, data)
    model.compile(keras.optimizers.Adam(2e-2), "mse")
    base = values(model)

    def traces(function, *args):
        before = _calls(model)
        result = function(*args)
        return _calls(model) - before, result

    def fit(epochs):
        return model.fit(
            data, targets, epochs=epochs, batch_size=8, verbose=0
        ).history["loss"]

    keras_svdtune.enable_adapter(model, method)
    before, basis = trainables(model), _frozen(model)
    first, losses = traces(fit, 2)
    again, more = traces(fit, 10)
    losses += more
    # It learns, in every one of its weights, and nothing else does.
    assert losses[-1] < 0.98 * losses[0], losses
    for path, value in trainables(model).items():
        assert not np.array_equal(value, before[path]), f"{path} stays"
    assert_same(_frozen(model), basis, "the frozen weights of the adapter")
    now = dict(values(model))
    for path, value in base:
        assert_same(now[path], value, path)

    # Steps, a load and a switch-off do not make Python run again.
    path = tmp_path / "adapter.safetensors"
    keras_svdtune.save_adapter(model, path)
    learned, outputs = traces(predict, model, data)
    perturb(model)
    moved, others = traces(predict, model, data)
    assert_differ(others, outputs)
    keras_svdtune.load_adapter(model, path)
    loaded, reloaded = traces(predict, model, data)
    assert_same(reloaded, outputs)
    with keras_svdtune.adapter_disabled(model):
        disabled, _ = traces(predict, model, data)
    if compiles():
        assert first > 0 and learned > 0
        assert again == moved == loaded == disabled == 0


@every_policy
@one_of_each
def test_remove_gives_the_base_back(method, policy):
    model, data = hosts_model(policy, FEW), hosts_data(FEW)
    # What was frozen before must be frozen after, and nothing else.
    model.get_layer("dense_wide").trainable = False
    model.get_layer("dense_tall").bias.trainable = False
    before = picture(model, data, compiled=False)
    classes = [type(x) for x in flat(model)]
    keras_svdtune.enable_adapter(model, method)
    assert [type(x) for x in flat(model)] != classes
    perturb(model)
    assert_differ(eager(model, data), before["eager"])
    keras_svdtune.remove_adapter(model)
    assert_same(picture(model, data, compiled=False), before)
    assert [type(x) for x in flat(model)] == classes
    assert type(model.get_layer("dense_tall")) is keras.layers.Dense
    assert type(model.get_layer("einsum_query")) is keras.layers.EinsumDense
    assert not any(hasattr(x, "adapter") for x in flat(model))
    # And it can be enabled again.
    keras_svdtune.enable_adapter(model, method)
    assert_same(eager(model, data), before["eager"])


@one_of_each
def test_disabled_is_the_base_and_merge_gives_plain_layers(method):
    model, data = hosts_model(names=FEW), hosts_data(FEW)
    model.get_layer("dense_wide").trainable = False
    before = picture(model, data, compiled=False)
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    adapted, learned = eager(model, data), trainables(model)
    assert_differ(adapted, before["eager"])
    with keras_svdtune.adapter_disabled(model):
        assert_same(eager(model, data), before["eager"])
    assert_same(trainables(model), learned)

    with pytest.raises(KeyError), keras_svdtune.adapter_disabled(model):
        raise KeyError  # whatever ends it, the adapter is back
    assert_same(trainables(model), learned)

    with (
        pytest.raises(RuntimeError, match="trained or loaded while"),
        keras_svdtune.adapter_disabled(model),
    ):
        perturb(model, seed=5)
    assert_same(trainables(model), learned)
    assert_same(eager(model, data), adapted)

    keras_svdtune.merge_adapter(model)
    after = picture(model, data, compiled=False)
    for same in ("classes", "paths", "trainable", "flags"):
        assert_same(after[same], before[same], same)
    changed = {
        v.path
        for v, old in zip(model.weights, before["weights"], strict=True)
        if not np.array_equal(numpy(v), old)
    }
    assert changed == {f"{name}/kernel" for name in FEW}


@each_policy(POLICIES[:2])
def test_file_gives_the_same_outputs(method, policy, tmp_path):
    data = hosts_data(FEW)
    model = hosts_model(policy, FEW)
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    path = tmp_path / "adapter.safetensors"
    keras_svdtune.save_adapter(model, path)
    expected = eager(model, data)
    keras.backend.clear_session(free_memory=False)
    fresh = hosts_model(policy, FEW)
    base = values(fresh)
    keras_svdtune.load_adapter(fresh, path)
    assert_same(trainables(fresh), trainables(model))
    assert_same(eager(fresh, data), expected)
    found = [type(x.adapter.method) for x in adapted_layers(fresh).values()]
    assert found == [type(method)] * len(FEW)
    keras_svdtune.remove_adapter(fresh)
    assert_same(values(fresh), base)


@one_of_each
def test_works_under_remat(method):
    if keras.backend.backend() == "tensorflow":
        pytest.skip("plain models of Keras 3.15 fail under it as well")
    names = ("dense_tall",)
    data = hosts_data(names, batch=8)
    losses = {}
    for mode in (None, "full"):
        keras.backend.clear_session(free_memory=False)
        with keras.RematScope(mode=mode):
            model = hosts_model(names=names)
        targets = _targets(model, data)
        keras_svdtune.enable_adapter(model, method)
        model.compile(keras.optimizers.SGD(2e-2), "mse")
        history = model.fit(data, targets, epochs=4, batch_size=8, verbose=0)
        losses[mode] = history.history["loss"]
        assert all(isinstance(model.get_layer(x), AdapterHost) for x in names)
    np.testing.assert_allclose(losses["full"], losses[None], rtol=1e-4)
    assert losses["full"][-1] < losses["full"][0]


def _targets(model, data):
    """What the model computes, with noise, for it to learn."""
    rng = np.random.default_rng(9)
    return {
        k: v + 0.5 * rng.standard_normal(v.shape).astype("float32")
        for k, v in eager(model, data).items()
    }


def _frozen(model):
    return {
        v.path: numpy(v)
        for layer in adapted_layers(model).values()
        for v in layer.adapter.non_trainable_variables
    }


def _calls(model):
    return sum(getattr(x, "calls", 0) for x in flat(model))
