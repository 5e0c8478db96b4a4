"""The same numbers as PEFT, given the same W, A, B and x, in float32.

PEFT holds W as (out, in), A as (r, in) and B as (out, r): everything is
transposed on the way, here and back. alpha is 8 at rank 4, a scale of 2.
"""

import functools
import gc
import types

import keras
import ml_dtypes
import numpy as np
import pytest
from helpers import adapted, assert_close, gradients, numpy
from keras import ops
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


class Started:
    """A layer of PEFT's that starts from the data of a case, and ours."""

    def __init__(self, shape, method, prepare, **settings):
        self.case = case = Case(shape)
        # As many rows as PEFT's incremental components want.
        case.x = case.normal(32, shape[0]) * 0.7 ** np.arange(shape[0])
        case.x = (case.x + 0.5).astype("float32")
        case.cotangent = case.normal(32, shape[1])
        model = torch.nn.Sequential(case.linear())
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["0"], **settings
        )
        prepare(case, model, config)
        model = peft.get_peft_model(model, config)
        self.model, self.theirs = model, model.base_model.model[0]
        self.method = method

    def loss(self):
        """Σ y·cotangent, as the loss of a model."""
        cotangent = self.case.cotangent

        def loss(y_true, y_pred):
            return ops.sum(ops.multiply(y_pred, ops.cast(y_true, y_pred.dtype)))

        return loss, cotangent

    def ours(self):
        case = self.case
        model = keras.Sequential(
            [keras.Input(case.shape[:1]), keras.layers.Dense(case.shape[1])]
        )
        model.layers[0].set_weights([case.w, case.bias])
        loss, cotangent = self.loss()
        model.compile(loss=loss)
        data = [(case.x, cotangent)]  # one batch
        keras_svdtune.enable_adapter(
            model, self.method(rank=RANK, alpha=ALPHA, data=iter(data))
        )
        (layer,) = adapted(model).values()
        return layer

    def compare_trained(self, layer, factor=1.0):
        """Both, moved by the same ΔA and ΔB from a start that is the same but
        for a factor of A and 1 / factor of B."""
        case = self.case
        a, b = _factors(self.theirs)
        with torch.no_grad():
            their_a0, their_b0 = a.numpy().T.copy(), b.numpy().T.copy()
        a0, b0 = numpy(layer.adapter.a0), numpy(layer.adapter.b0)
        signs = np.sign(np.sum(a0 * their_a0, axis=0)) * factor
        assert_close(a0 * signs, their_a0, 1e-4)
        assert_close(b0 / signs[:, None], their_b0, 1e-4)
        layer.adapter.delta_a.assign(case.a / signs)
        layer.adapter.delta_b.assign(case.b * signs[:, None])
        _set(a, (their_a0 + case.a).T)
        _set(b, (their_b0 + case.b).T)
        y = self.theirs(torch.from_numpy(case.x)).detach().numpy()
        assert_close(layer(case.x), y, 1e-4)


@every_shape
def test_eva(shape):
    """PEFT's components are those of what it has seen, the same batch twice."""

    def prepare(case, model, config):
        pass

    both = Started(
        shape,
        keras_svdtune.EVA,
        prepare,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
    )
    case = both.case
    batches = torch.utils.data.DataLoader([case.x[i] for i in range(32)], 32)
    peft.initialize_lora_eva_weights(
        both.model,
        batches,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    layer = both.ours()
    a, b = _factors(both.theirs)
    assert not b.any() and not numpy(layer.adapter.b).any()
    signs = _signs(numpy(layer.adapter.a), a.detach().numpy().T)
    layer.adapter.b.assign(case.b * signs[:, None])
    _set(b, case.b.T)
    y = both.theirs(torch.from_numpy(case.x)).detach().numpy()
    assert_close(layer(case.x), y, TOLERANCE)


@pytest.mark.parametrize("goal, mode", [("learn", "ipm"), ("keep", "kpm")])
@every_shape
def test_corda(shape, goal, mode):
    corda = pytest.importorskip("peft.tuners.lora.corda")
    lora_config = pytest.importorskip("peft.tuners.lora.config")

    def prepare(case, model, config):
        corda.preprocess_corda(
            model, config, lambda: model(torch.from_numpy(case.x))
        )

    both = Started(
        shape,
        functools.partial(keras_svdtune.CorDA, goal=goal),
        prepare,
        init_lora_weights="corda",
        corda_config=lora_config.CordaConfig(corda_method=mode),
    )
    layer = both.ours()
    # C has another size: that moves a factor from A to B.
    x = both.case.x
    c = x.T @ x / np.max(x) ** 2
    both.compare_trained(layer, 1 / np.sqrt(np.mean(np.diag(c))))


# PEFT wants 2r components.
@pytest.mark.parametrize("shape", [(12, 9), (8, 11)], ids=["tall", "wide"])
def test_lora_ga(shape):
    """PEFT's A has the r largest, its B the next ones, with other factors."""
    loraga = pytest.importorskip("peft.tuners.lora.loraga")

    def prepare(case, model, config):
        def step():
            y = model(torch.from_numpy(case.x))
            (y * torch.from_numpy(case.cotangent)).sum().backward()

        loraga.preprocess_loraga(model, config, step)

    both = Started(
        shape,
        keras_svdtune.LoRAGA,
        prepare,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    case = both.case
    layer = both.ours()
    their_a, their_b = (x.detach().numpy().T for x in _factors(both.theirs))
    g = case.x.T @ case.cotangent
    s = np.linalg.svd(g, compute_uv=False)[RANK : 2 * RANK]
    c = shape[1] ** 0.25 / 4
    _signs(numpy(layer.adapter.a0) / c, their_a)
    _signs(numpy(layer.adapter.b0).T / c, their_b.T / (s * c))


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
