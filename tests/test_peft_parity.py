"""The same numbers as PEFT, given the same W, A, B and x, in float32.

PEFT holds W as (out, in), A as (r, in) and B as (out, r): everything is
transposed on the way, here and back. alpha is 8 at rank 4, a scale of 2.
"""

import gc
import types

import keras
import ml_dtypes
import numpy as np
import pytest
from helpers import adapted, assert_close, gradients, numpy
from test_methods_oracle import inner, one_program

import keras_svdtune

# In one process, which compiles what it repeats once.
pytestmark = pytest.mark.xdist_group("peft_parity")

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
# Hundreds of thousands of objects for the collector: see conftest.py.
gc.collect()
gc.freeze()

RANK, ALPHA = 4, 8.0
SCALE = ALPHA / RANK
TOLERANCE = 1e-5

SHAPES = [(12, 7), (6, 11), (8, 8)]
every_shape = pytest.mark.parametrize(
    "shape",
    [*SHAPES[:2], pytest.param(SHAPES[2], marks=pytest.mark.slow)],
    ids=["tall", "wide", "square"],
)


@pytest.fixture(autouse=True)
def on_cpu():
    with torch.device("cpu"), torch.enable_grad():
        yield


class Case:
    """W, bias, x and a cotangent of the output, all float32."""

    def __init__(self, shape):
        rng = np.random.default_rng(7)

        def normal(*size):
            return rng.standard_normal(size).astype("float32")

        rows, columns = self.shape = shape
        self.w = normal(rows, columns) / np.float32(np.sqrt(rows))
        self.bias = normal(columns)
        self.x = normal(5, rows)
        self.cotangent = normal(5, columns)
        self.a = normal(rows, RANK) / 2
        self.b = normal(RANK, columns) / 2
        self.normal = normal

    def ours(self, method):
        """A Dense layer that is adapted by `method`."""
        model = keras.Sequential(
            [keras.Input(self.shape[:1]), keras.layers.Dense(self.shape[1])]
        )
        model.layers[0].set_weights([self.w, self.bias])
        keras_svdtune.enable_adapter(model, method)
        (layer,) = adapted(model).values()
        return layer

    def linear(self):
        """The same layer in torch."""
        found = torch.nn.Linear(*self.shape)
        found.weight.data = torch.from_numpy(self.w.T.copy())
        found.bias.data = torch.from_numpy(self.bias.copy())
        return found

    def lora(self, **settings):
        """The same layer, adapted by PEFT's LoRA."""
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["0"], **settings
        )
        model = peft.get_peft_model(torch.nn.Sequential(self.linear()), config)
        layer = model.base_model.model[0]
        assert layer.scaling["default"] == SCALE
        return layer

    def compare(self, layer, theirs, pairs):
        """Outputs, and the gradients of `pairs`.

        Args:
            layer: ours.
            theirs: PEFT's.
            pairs: name -> (our variable, their parameter). What is a matrix
                there is ours transposed.
        """
        cotangent = self.cotangent
        y = theirs(torch.from_numpy(self.x))
        (y * torch.from_numpy(cotangent)).sum().backward()
        assert_close(layer(self.x), y.detach().numpy(), TOLERANCE, "y")
        found = gradients(
            lambda: one_program(lambda: inner(layer(self.x), cotangent)),
            [ours for ours, _ in pairs.values()],
        )
        for (name, (_, parameter)), gradient in zip(
            pairs.items(), found, strict=True
        ):
            expected = parameter.grad.numpy().T
            assert np.abs(expected).max() > 1e-2, name
            assert_close(
                gradient.reshape(expected.shape), expected, TOLERANCE, name
            )


def _factors(theirs):
    return theirs.lora_A["default"].weight, theirs.lora_B["default"].weight


def _set(parameter, value):
    with torch.no_grad():
        assert parameter.shape == value.shape
        parameter.copy_(torch.from_numpy(value.copy()))


@every_shape
def test_lora(shape):
    case = Case(shape)
    layer = case.ours(keras_svdtune.LoRA(rank=RANK, alpha=ALPHA))
    layer.adapter.a.assign(case.a)
    layer.adapter.b.assign(case.b)
    theirs = case.lora()
    a, b = _factors(theirs)
    _set(a, case.a.T)
    _set(b, case.b.T)
    pairs = {"a": (layer.adapter.a, a), "b": (layer.adapter.b, b)}
    case.compare(layer, theirs, pairs)
    theirs.merge()
    merged = theirs.weight.detach().numpy().T
    assert_close(layer.merged_kernel(), merged, TOLERANCE)


@every_shape
def test_dora(shape):
    case = Case(shape)
    layer = case.ours(keras_svdtune.DoRA(rank=RANK, alpha=ALPHA))
    theirs = case.lora(use_dora=True)
    a, b = _factors(theirs)
    magnitude = theirs.lora_magnitude_vector["default"].weight
    # Both start from the norms of the output units.
    start = magnitude.detach().numpy().copy()
    assert_close(np.sqrt(numpy(layer.adapter.squared_norms)), start, TOLERANCE)

    change = 0.3 * case.normal(shape[1])
    layer.adapter.a.assign(case.a)
    layer.adapter.b.assign(case.b)
    layer.adapter.magnitude_change.assign(change)
    _set(a, case.a.T)
    _set(b, case.b.T)
    _set(magnitude, start + change)
    pairs = {
        "a": (layer.adapter.a, a),
        "b": (layer.adapter.b, b),
        "magnitude": (layer.adapter.magnitude_change, magnitude),
    }
    case.compare(layer, theirs, pairs)
    theirs.merge()
    merged = theirs.weight.detach().numpy().T
    assert_close(layer.merged_kernel(), merged, TOLERANCE)


@every_shape
def test_pissa(shape):
    case = Case(shape)
    layer = case.ours(keras_svdtune.PiSSA(rank=RANK, alpha=ALPHA))
    theirs = case.lora(init_lora_weights="pissa")
    a, b = _factors(theirs)

    # The same start: their A·B is ours, up to a sign in each component.
    a0, b0 = numpy(layer.adapter.a0), numpy(layer.adapter.b0)
    their_a0, their_b0 = a.detach().numpy().T, b.detach().numpy().T
    assert_close(a0 @ b0, their_a0 @ their_b0, TOLERANCE)
    signs = np.sign(np.sum(a0 * their_a0, axis=0))
    assert_close(a0 * signs, their_a0, TOLERANCE)
    assert_close(b0 * signs[:, None], their_b0, TOLERANCE)
    # Their base is the residual of ours, which is W itself.
    residual = theirs.base_layer.weight.detach().numpy().T
    assert_close(residual + SCALE * a0 @ b0, case.w, TOLERANCE)
    assert np.abs(residual - case.w).max() > 0.1
    assert np.array_equal(numpy(layer._kernel), case.w)

    layer.adapter.delta_a.assign(case.a)
    layer.adapter.delta_b.assign(case.b)
    _set(a, (a0 + case.a).T)
    _set(b, (b0 + case.b).T)
    pairs = {"a": (layer.adapter.delta_a, a), "b": (layer.adapter.delta_b, b)}
    case.compare(layer, theirs, pairs)
    theirs.merge()
    merged = theirs.weight.detach().numpy().T
    assert_close(layer.merged_kernel(), merged, TOLERANCE)


def _in_bfloat16(case):
    """Gives the case a kernel that bfloat16 holds: ours rounds it to that
    before it is decomposed."""
    case.w = np.asarray(case.w.astype(ml_dtypes.bfloat16), "float32")


def _signs(ours, theirs):
    """Of singular vectors in columns, which are the same up to these."""
    found = np.sign(np.sum(ours * theirs, axis=0))
    assert_close(ours * found, theirs, TOLERANCE)
    return found


@every_shape
def test_mica(shape):
    case = Case(shape)
    _in_bfloat16(case)
    layer = case.ours(keras_svdtune.MiCA(rank=RANK, alpha=ALPHA))
    try:
        theirs = case.lora(init_lora_weights="mica")
    except ValueError:
        pytest.skip("this PEFT has no MiCA")
    a, b = _factors(theirs)
    assert not a.any() and not b.requires_grad  # what trains and what does not
    signs = _signs(numpy(layer.adapter.v), b.detach().numpy())
    layer.adapter.a.assign(case.a * signs)
    _set(a, case.a.T)
    case.compare(layer, theirs, {})
    (y,) = gradients(
        lambda: one_program(lambda: inner(layer(case.x), case.cotangent)),
        [layer.adapter.a],
    )
    assert_close(y * signs, a.grad.numpy().T, TOLERANCE)
    theirs.merge()
    merged = theirs.weight.detach().numpy().T
    assert_close(layer.merged_kernel(), merged, TOLERANCE)


@every_shape
def test_psoft(shape):
    if not hasattr(peft, "PsoftConfig"):
        pytest.skip("this PEFT has no PSOFT")
    case = Case(shape)
    _in_bfloat16(case)
    layer = case.ours(keras_svdtune.PSOFT(rank=RANK))
    # Its `alpha` has no say: B is divided by the scale.
    config = peft.PsoftConfig(
        r=RANK, psoft_alpha=3 * RANK, target_modules=["0"]
    )
    model = peft.get_peft_model(torch.nn.Sequential(case.linear()), config)
    theirs = model.base_model.model[0]
    their_a, their_b = theirs._get_psoft_ab_cache_buffers("default")
    signs = _signs(numpy(layer.adapter.a), their_a.numpy().T)
    assert_close(
        numpy(layer.adapter.b) * signs[:, None], 3 * their_b.numpy().T, 1e-5
    )
    # R multiplies columns there, so Q is the transpose of ours.
    turn = theirs.psoft_R["default"]
    above = np.triu_indices(RANK, 1)
    assert np.array_equal(turn.rows, above[0])
    assert np.array_equal(turn.cols, above[1])
    skew = 0.4 * case.normal(len(above[0]))
    flips = signs[above[0]] * signs[above[1]]
    alpha, beta = 0.3 * case.normal(RANK), 0.3 * case.normal(RANK)
    layer.adapter.skew.assign(-skew * flips)
    layer.adapter.alpha_change.assign(alpha)
    layer.adapter.beta_change.assign(beta)
    _set(turn.weight, skew)
    _set(turn.vector_a, 1 + alpha)
    _set(turn.vector_b, 1 + beta)
    pairs = {
        "alpha": (layer.adapter.alpha_change, turn.vector_a),
        "beta": (layer.adapter.beta_change, turn.vector_b),
    }
    case.compare(layer, theirs, pairs)
    (found,) = gradients(
        lambda: one_program(lambda: inner(layer(case.x), case.cotangent)),
        [layer.adapter.skew],
    )
    assert_close(-found * flips, turn.weight.grad.numpy(), TOLERANCE)
    theirs.merge()
    merged = theirs.base_layer.weight.detach().numpy().T
    assert_close(layer.merged_kernel(), merged, TOLERANCE)


@every_shape
def test_adalora(shape):
    """PEFT's layer, which has no rank allocation of its own."""
    case = Case(shape)
    layer = case.ours(
        keras_svdtune.AdaLoRA(rank=RANK - 1, initial_rank=RANK, alpha=ALPHA)
    )
    linear = case.linear()
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=RANK - 1, lora_alpha=ALPHA, total_step=10
    )
    theirs = peft.tuners.adalora.SVDLinear(
        linear, "default", config, r=RANK, lora_alpha=ALPHA
    )
    a, b, e = (
        x["default"] for x in (theirs.lora_A, theirs.lora_B, theirs.lora_E)
    )
    # It divides by the rank plus 1e-5.
    assert abs(float(theirs.ranknum["default"]) - RANK) == 0
    values = np.array([0.7, -0.4, 0.0, 1.1], "float32")
    mask = np.array([1.0, 1.0, 0.0, 1.0], "float32")
    layer.adapter.p.assign(case.a)
    layer.adapter.q.assign(case.b)
    layer.adapter.singular_values.assign(values)
    _set(a, case.a.T)
    _set(b, case.b.T)
    _set(e, values[:, None])
    pairs = {
        "p": (layer.adapter.p, a),
        "q": (layer.adapter.q, b),
        "singular_values": (layer.adapter.singular_values, e),
    }
    case.compare(layer, theirs, pairs)

    # What is masked here is an E of zero there, whatever it was.
    layer.adapter.mask.assign(mask)
    layer.adapter.singular_values.assign(values + (mask == 0.0))
    assert_close(
        layer(case.x),
        theirs(torch.from_numpy(case.x)).detach().numpy(),
        TOLERANCE,
    )
    theirs.merge()
    merged = theirs.weight.detach().numpy().T
    assert_close(layer.merged_kernel(), merged, TOLERANCE)


def test_the_penalty_of_adalora():
    """PEFT adds the same number to the loss of the data."""

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(9, 7, bias=False)
            self.second = torch.nn.Linear(7, 6, bias=False)

        def forward(self, x):
            y = self.second(self.first(x))
            return types.SimpleNamespace(loss=torch.zeros(()), y=y)

    config = peft.AdaLoraConfig(
        target_modules=["first", "second"],
        init_r=RANK,
        target_r=RANK - 1,
        total_step=100,
        orth_reg_weight=0.1,
    )
    theirs = peft.tuners.adalora.AdaLoraModel(
        Theirs(), {"default": config}, "default"
    )
    first, second = keras.layers.Dense(7), keras.layers.Dense(6)
    x = keras.Input((9,))
    model = keras.Model(x, second(first(x)))
    keras_svdtune.enable_adalora(model, RANK - 1, initial_rank=RANK)
    layers = (theirs.model.first, first), (theirs.model.second, second)
    for torch_layer, layer in layers:
        b, a = torch_layer.lora_B["default"], torch_layer.lora_A["default"]
        # PEFT keeps P (out, r) and Q (r, in): those of the transpose.
        layer.adapter.q.assign(b.detach().numpy().T)
        layer.adapter.p.assign(a.detach().numpy().T)
    expected = float(theirs(torch.zeros(1, 9)).loss)
    assert expected > 0.1
    found = sum(float(numpy(loss)) for loss in model.losses)
    assert found == pytest.approx(expected, rel=1e-6)
