"""Every method against its published equation, in float64 NumPy.

The oracle of a method is its equation and nothing else: a function from the
trainables to W'. Outputs follow by one product, gradients by central
differences, so no derivative is written down twice. Singular vectors come
from `np.linalg.svd`, with the package's rule for signs: the entry of largest
magnitude of each singular vector of the smaller side is positive. SVF, SVFT,
LoRA-XS, MiCA, PSOFT and OPLoRA take the singular vectors of W rounded to
bfloat16.
"""

import keras
import numpy as np
import pytest
from helpers import (
    adapted,
    all_methods,
    assert_close,
    eager,
    gradients,
    hosts_data,
    hosts_model,
    method_id,
    numpy,
    perturb,
    small_model,
)
from keras import ops

import keras_svdtune
from keras_svdtune import SVF, DoRA, MiLoRA, PiSSA
from keras_svdtune.methods import svft as svft_file

NAMES = ("dense_tall", "dense_wide", "dense_square", "einsum_query")
ACTIVATIONS = {"dense_tall": np.tanh}

SETTINGS = [
    *all_methods(),
    keras_svdtune.AdaLoRA(rank=2, initial_rank=4, alpha=8.0),
]
every_method = pytest.mark.parametrize("method", SETTINGS, ids=method_id)


# The equations. Each takes W (in, out), the settings, and the adapter's
# weights before anything was trained; it gives a function from the trainables
# to W'.


def svd(w):
    """(u, s, v) of W, signs canonical."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    small = vt.T if w.shape[1] <= w.shape[0] else u
    sign = np.sign(small[np.argmax(np.abs(small), axis=0), np.arange(len(s))])
    return u * sign, s, vt.T * sign


def rounded(w):
    """W rounded to bfloat16, to even, by its bits."""
    bits = w.astype("float32").view("uint32")
    bits = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    return (bits & np.uint32(0xFFFF0000)).view("float32").astype("float64")


def factors(w):
    """(U, s, V) of which W is U diag(s) Vᵀ, and which W alone determines.

    The smaller side and s are those of W rounded to bfloat16; the other side is
    what makes the product W, W·V / s or Uᵀ·W / s. It is orthonormal but for the
    rounding.
    """
    u, s, v = svd(rounded(w))
    if w.shape[1] <= w.shape[0]:
        return w @ v / s, s, v
    return u, s, w.T @ u / s


def svf(w, settings, start):
    u, s, v = factors(w)

    def merged(t):
        change = t["delta"]
        rest = np.zeros(len(s) - len(change))  # the smallest are left alone
        return (u * (s * (1.0 + np.append(change, rest)))) @ v.T

    return merged


def svft(w, settings, start):
    u, s, v = factors(w)
    n, d = len(s), settings.off_diagonals
    if settings.pattern == "plain":
        d = 0

    def matrix(m):
        if "positions" in start:
            full = np.zeros(n * n)
            full[start["positions"]] = m
            return full.reshape(n, n)
        # The diagonals from the lowest to the highest.
        widths = [n - abs(k) for k in range(-d, d + 1)]
        parts = np.split(m, np.cumsum(widths)[:-1])
        return sum(
            np.diag(part, k)
            for k, part in zip(range(-d, d + 1), parts, strict=True)
        )

    return lambda t: u @ (np.diag(s) + matrix(t["m"])) @ v.T


def spectral(part):
    """PiSSA and MiLoRA: W_res + k·A·B."""

    def oracle(w, settings, start):
        u, s, v = svd(w)
        rank = start["a0"].shape[1]
        k = 1.0 if settings.alpha is None else settings.alpha / rank
        chosen = np.arange(len(s)) < rank
        if part == "bottom":
            chosen = chosen[::-1]
        residual = (u * np.where(chosen, 0.0, s)) @ v.T
        root = np.sqrt(s[chosen] / k)
        a0, b0 = u[:, chosen] * root, root[:, None] * v[:, chosen].T
        return lambda t: (
            residual + k * (a0 + t["delta_a"]) @ (b0 + t["delta_b"])
        )

    return oracle


def lora_xs(w, settings, start):
    v = svd(rounded(w))[2]
    rank = settings.rank
    k = 1.0 if settings.alpha is None else settings.alpha / rank
    a, b = w @ v[:, :rank], v[:, :rank].T
    return lambda t: w + k * a @ t["r"] @ b


def lora(w, settings, start):
    k = 1.0 if settings.alpha is None else settings.alpha / settings.rank
    return lambda t: w + k * t["a"] @ t["b"]


def dora(w, settings, start, detached=True):
    k = 1.0 if settings.alpha is None else settings.alpha / settings.rank
    magnitude = np.linalg.norm(w, axis=0)

    def norms(t):
        return np.linalg.norm(w + k * t["a"] @ t["b"], axis=0)

    def merged(t, at=None):
        """`at`: the trainables whose norms are the constant ones."""
        directions = (w + k * t["a"] @ t["b"]) / norms(at or t)
        return (magnitude + t["magnitude_change"]) * directions

    merged.detached = detached
    return merged


def adalora(w, settings, start):
    k = 1.0 if settings.alpha is None else settings.alpha / start["p"].shape[1]
    mask = start["mask"]
    return lambda t: w + k * (t["p"] * (t["singular_values"] * mask)) @ t["q"]


def mica(w, settings, start):
    v = svd(rounded(w))[2]
    rank = settings.rank
    v = v[:, -rank:] if settings.part == "bottom" else v[:, :rank]
    k = 1.0 if settings.alpha is None else settings.alpha / rank
    return lambda t: w + k * t["a"] @ v.T


def psoft(w, settings, start):
    u, s, v = svd(rounded(w))
    rank = settings.rank
    a, b = u[:, :rank], (v[:, :rank] * s[:rank]).T
    above = np.triu_indices(rank, 1)
    one = np.eye(rank)

    def merged(t):
        q = np.zeros((rank, rank))
        q[above] = t.get("skew", ())
        q = q - q.T
        r = (one + q) @ np.linalg.inv(one - q)
        assert np.allclose(r.T @ r, one, atol=1e-12)
        alpha, beta = 1 + t["alpha_change"], 1 + t["beta_change"]
        return w + a @ (np.diag(alpha) @ r @ np.diag(beta) - one) @ b

    return merged


def oplora(w, settings, start):
    u, _, v = svd(rounded(w))
    u, v = u[:, : settings.keep], v[:, : settings.keep]
    left = np.eye(w.shape[0]) - u @ u.T
    right = np.eye(w.shape[1]) - v @ v.T
    k = 1.0 if settings.alpha is None else settings.alpha / settings.rank
    return lambda t: w + k * left @ t["a"] @ t["b"] @ right


def started(w, settings, start):
    """CorDA, LoRA-GA: W + k·(A·B - A₀·B₀). Where they start from what data is
    tested in test_starts.py."""
    k = 1.0 if settings.alpha is None else settings.alpha / settings.rank
    a0, b0 = start["a0"], start["b0"]
    return lambda t: (
        w + k * ((a0 + t["delta_a"]) @ (b0 + t["delta_b"]) - a0 @ b0)
    )


ORACLES = {
    "adalora": adalora,
    "svf": svf,
    "svft": svft,
    "pissa": spectral("top"),
    "milora": spectral("bottom"),
    "lora_xs": lora_xs,
    "lora": lora,
    "dora": dora,
    "mica": mica,
    "psoft": psoft,
    "oplora": oplora,
    "eva": lora,
    "corda": started,
    "lora_ga": started,
}


def test_every_method_has_an_oracle():
    assert set(ORACLES) == set(keras_svdtune.METHODS)


# The comparison.


def weights_of(layer, trainable=None):
    """An adapter's weights in float64, by the method's own names."""
    adapter = layer.adapter
    return {
        w.name: numpy(getattr(adapter, w.name)).astype(
            "float64" if w.dtype != "int32" else "int64"
        )
        for w in adapter.method.weights(adapter.shape)
        if trainable is None or w.trainable == trainable
    }


def matrix_of(name, kernel):
    """The kernel of a host as W (in, out), written out for each."""
    if name == "einsum_query":  # ndh: heads, in, head_dim
        kernel = kernel.transpose(1, 0, 2).reshape(kernel.shape[1], -1)
    return kernel


def output_of(name, x, matrix, bias):
    """What the layer computes with W' = `matrix`."""
    if name == "einsum_query":
        heads, size = bias.shape
        kernel = matrix.reshape(-1, heads, size)
        y = np.einsum("btd,dnh->btnh", x, kernel)
    else:
        y = x @ matrix
    y = y if bias is None else y + bias
    return ACTIVATIONS.get(name, lambda y: y)(y)


def one_program(function):
    """function(), in JAX without compiling each small op on its own."""
    if keras.backend.backend() != "jax":
        return function()
    import jax

    # A new function each time: jit keeps what it knows.
    return jax.jit(lambda: function())()


def inner(y, cotangent):
    """The loss: the sum of y times a constant."""
    return ops.sum(ops.multiply(y, ops.convert_to_tensor(cotangent)))


def central_differences(loss, trainables, h=1e-6):
    found = {}
    for name, value in trainables.items():
        found[name] = grad = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            ends = []
            for step in (h, -h):
                moved = value.copy()
                moved[index] += step
                ends.append(loss({**trainables, name: moved}))
            grad[index] = (ends[0] - ends[1]) / (2 * h)
    return found


@pytest.fixture(scope="module")
def hosts():
    keras.backend.clear_session(free_memory=False)
    return hosts_model(names=NAMES)


@every_method
def test_equation(method, hosts):
    """Outputs, merged kernels and gradients, for each shape of W."""
    keras_svdtune.enable_adapter(hosts, method)
    try:
        layers = {x.name: x for x in adapted(hosts).values()}
        assert set(layers) == set(NAMES)
        if method.name == "adalora":
            for layer in layers.values():  # one triplet out
                layer.adapter.mask.assign(np.arange(method.first_rank) != 1)
        starts = {name: weights_of(x) for name, x in layers.items()}
        perturb(hosts)
        for name, x in zip(NAMES, hosts_data(NAMES), strict=True):
            _compare(name, layers[name], starts[name], x)
    finally:
        keras_svdtune.remove_adapter(hosts)


def _compare(name, layer, start, x):
    method = layer.adapter.method
    kernel = numpy(layer._kernel).astype("float64")
    w = matrix_of(name, kernel)
    bias = None if layer.bias is None else numpy(layer.bias).astype("float64")
    oracle = ORACLES[method.name](w, method, start)
    trainables = weights_of(layer, trainable=True)

    def forward():
        with keras.StatelessScope():  # a penalty is left behind in it
            return layer(x), layer.merged_kernel()

    found_y, found_kernel = one_program(forward)
    merged = oracle(trainables)
    assert np.abs(merged - w).max() > 1e-2 * np.abs(w).max(), name
    assert_close(matrix_of(name, numpy(found_kernel)), merged, 1e-5, name)
    y = output_of(name, x.astype("float64"), merged, bias)
    assert_close(found_y, y, 1e-5, name)

    cotangent = np.random.default_rng(5).standard_normal(y.shape)
    cotangent = cotangent.astype("float32")
    variables = {k: getattr(layer.adapter, k) for k in trainables}
    found = gradients(
        lambda: one_program(lambda: inner(layer(x), cotangent)),
        variables.values(),
    )
    constant = {"at": trainables} if method.name == "dora" else {}
    expected = central_differences(
        lambda t: np.sum(
            output_of(name, x.astype("float64"), oracle(t, **constant), bias)
            * cotangent
        ),
        trainables,
    )
    for key, gradient in zip(variables, found, strict=True):
        assert_close(gradient, expected[key], 2e-5, f"{name} {key}")


# SVF once more: a step of `fit`, and half precision.

TALL_WIDE_SQUARE = [(8, 5), (5, 8), (6, 6)]


def svf_case(shape, dtype="float32"):
    """A layer adapted by SVF, away from its start; x, a cotangent; the oracle
    and the gradient of sum(y·dy) by it: sᵢ·uᵢᵀ(xᵀdy)vᵢ."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype("float32")
    x = rng.standard_normal((7, shape[0])).astype("float32")
    dy = rng.standard_normal((7, shape[1])).astype("float32")
    model = _dense_model(w, dtype=dtype)
    keras_svdtune.enable_svf(model)
    perturb(model)
    (layer,) = adapted(model).values()
    w = numpy(layer._kernel).astype("float64")
    merged = svf(w, None, None)(weights_of(layer))
    u, s, v = factors(w)

    def gradient(dy):
        return s * np.einsum("ri,rc,ci->i", u, x.astype("float64").T @ dy, v)

    return model, layer, x, dy, x @ merged, gradient


@pytest.mark.parametrize("shape", TALL_WIDE_SQUARE)
def test_svf_steps_along_its_gradient(shape):
    model, layer, x, dy, y, gradient = svf_case(shape)
    delta = numpy(layer.adapter.delta)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    loss = model.fit([x], [dy], batch_size=7, verbose=0).history["loss"][0]
    np.testing.assert_allclose(loss, np.mean((y - dy) ** 2), rtol=1e-4)
    # The variable is δ / step: it moves by 0.01·step·dL/dδ, and δ by more.
    (weight,) = [x for x in SVF().weights(shape) if x.trainable]
    rate = 0.01 * weight.step**2
    expected = delta - rate * gradient(2 * (y - dy) / dy.size)
    np.testing.assert_allclose(numpy(layer.adapter.delta), expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("shape", TALL_WIDE_SQUARE)
def test_svf_in_half_precision_is_near(shape, policy):
    """Within a few roundings to bfloat16 (2**-8) of the exact result."""
    model, layer, x, dy, y, gradient = svf_case(shape, policy)
    assert_close(np.reshape(eager(model, [x]), y.shape), y, 0.03)

    def loss():
        return inner(ops.cast(layer(x), "float32"), dy)

    (found,) = gradients(lambda: one_program(loss), [layer.adapter.delta])
    assert_close(found, gradient(dy), 0.03)


# SVFT: where the entries of M stand.


def _square(n, seed=0):
    """W (n, n) whose u_i and v_j are nearly aligned, but not for i = j.

    V is U with its columns mixed up and a little turned, so some of the
    largest |u_i·v_j| are negative, and U·V says nothing about them.
    """
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((n, n)))[0]
    mixing = np.eye(n)[rng.permutation(n)] * rng.choice([-1.0, 1.0], n)
    mixing = np.linalg.qr(mixing + 0.15 * rng.standard_normal((n, n)))[0]
    s = np.linspace(3.0, 1.0, n)
    return ((u * s) @ (u @ mixing).T).astype("float32")


def _dense_model(*kernels, dtype="float32"):
    """One Dense layer for each kernel, side by side."""
    inputs, outputs = [], []
    for i, kernel in enumerate(kernels):
        x = keras.Input((kernel.shape[0],))
        layer = keras.layers.Dense(
            kernel.shape[1], name=f"layer_{i}", dtype=dtype
        )
        outputs.append(layer(x))
        inputs.append(x)
        layer.kernel.assign(kernel)
    return keras.Model(inputs, outputs)


def _positions(model):
    return [
        tuple(numpy(x.adapter.positions).tolist())
        for x in adapted(model).values()
    ]


def test_top_k_takes_the_best_aligned_pairs():
    n, d = 9, 1
    count = n * (2 * d + 1) - d * (d + 1)
    w = _square(n)
    u, _, v = svd(w.astype("float64"))
    alignment = np.abs(u.T @ v).ravel()
    order = np.argsort(-alignment)
    # The choice is not a matter of rounding.
    assert alignment[order[count - 1]] - alignment[order[count]] > 1e-3
    expected = set(order[:count].tolist())

    # Not what another rule would take.
    band = {i * n + j for i in range(n) for j in range(n) if abs(i - j) <= d}
    signed = set(np.argsort(-(u.T @ v).ravel())[:count].tolist())
    product = set(np.argsort(-np.abs(u @ v).ravel())[:count].tolist())
    for other in (band, signed, product):
        assert len(expected & other) < 0.8 * count

    model = _dense_model(w)
    keras_svdtune.enable_svft(model, "top_k", d)
    (found,) = _positions(model)
    assert len(found) == count
    assert set(found) == expected


def test_top_k_of_a_plain_diagonal():
    # Where u_i = v_i the best pairs are those with i = j.
    n = 6
    u = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    model = _dense_model((u * np.linspace(2, 1, n) @ u.T).astype("float32"))
    keras_svdtune.enable_svft(model, "top_k", 0)
    assert _positions(model) == [tuple(i * n + i for i in range(n))]


def test_random_positions():
    n, d = 12, 2
    count = n * (2 * d + 1) - d * (d + 1)
    kernels = [_square(n, seed) for seed in range(2)]
    found = {}
    for key, seed in {"first": 0, "again": 0, "other": 1}.items():
        keras.backend.clear_session(free_memory=False)
        np.random.seed(len(found))  # the global generator has no say
        model = _dense_model(*kernels, np.ones((n, n + 3), "float32"))
        keras_svdtune.enable_svft(model, "random", d, seed=seed)
        found[key] = _positions(model)
    for positions in [*found["first"], *found["other"]]:
        assert len(set(positions)) == len(positions) == count
        assert min(positions) >= 0 and max(positions) < n * n
        # Spread over the rows and columns, not only near the diagonal.
        rows, columns = np.divmod(positions, n)
        assert len(set(rows)) > n / 2 and len(set(columns)) > n / 2
        assert np.abs(rows - columns).max() > d
    assert found["first"] == found["again"]
    different = [*found["first"], *found["other"]]
    assert len(set(different)) == len(different)


def test_random_positions_of_a_full_matrix():
    """Every entry of M: the generator must not wait for the last ones."""

    class Counting(np.random.RandomState):
        draws = 0

        def randint(self, *args, **kwargs):
            self.draws += 1
            return super().randint(*args, **kwargs)

    for n, count in ((900, 900), (900, 895), (900, 451), (1, 1)):
        random = Counting(0)
        found = svft_file._distinct(n, count, random)
        assert found.tolist() == sorted(set(found.tolist()))
        assert len(found) == count and found[0] >= 0 and found[-1] < n
        assert random.draws <= 40, f"{random.draws} draws of {count} from {n}"


def test_top_k_of_other_shapes_is_banded():
    svft_file._say_once_that_top_k_is_banded.cache_clear()
    rng = np.random.default_rng(0)
    shapes = [(9, 6), (6, 9), (7, 5)]
    kernels = [rng.standard_normal(s).astype("float32") for s in shapes]
    data = [rng.standard_normal((3, s[0])).astype("float32") for s in shapes]
    outputs = {}
    with pytest.warns(UserWarning, match="square matrices only") as caught:
        for pattern in ("top_k", "banded"):
            model = _dense_model(*kernels)
            keras_svdtune.enable_svft(model, pattern, 1)
            for layer in adapted(model).values():
                assert not hasattr(layer.adapter, "positions")
                n = min(layer.adapter.shape)
                assert layer.adapter.m.shape == (3 * n - 2,)
            perturb(model)
            outputs[pattern] = eager(model, data)
    ours = [w for w in caught if "square matrices" in str(w.message)]
    assert len(ours) == 1  # three layers, one warning
    for found, expected in zip(*outputs.values(), strict=True):
        assert np.array_equal(found, expected)


# PiSSA, MiLoRA: A₀·B₀ is the part of W that it is said to be.


@pytest.mark.parametrize("alpha", [None, 2.0, 32.0])
@pytest.mark.parametrize("cls", [PiSSA, MiLoRA])
def test_spectral_parts(cls, alpha):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((10, 7)).astype("float32")
    model = _dense_model(w)
    keras_svdtune.enable_adapter(model, cls(rank=3, alpha=alpha))
    (layer,) = adapted(model).values()
    start = weights_of(layer)
    u, s, v = svd(w.astype("float64"))
    part = slice(0, 3) if cls is PiSSA else slice(-3, None)
    k = 1.0 if alpha is None else alpha / 3
    assert_close(
        k * start["a0"] @ start["b0"],
        (u[:, part] * s[part]) @ v[:, part].T,
        1e-6,
    )
    # The singular values are shared evenly: neither factor outgrows the other.
    for norms in (
        np.linalg.norm(start["a0"], axis=0),
        np.linalg.norm(start["b0"], axis=1),
    ):
        assert_close(norms, np.sqrt(s[part] / k), 1e-6)
    assert not start["delta_a"].any() and not start["delta_b"].any()


# DoRA: what is constant, and a column that has no direction.


def test_dora_holds_the_norms_constant():
    """Differentiated through, the norms would give other gradients of A, B."""
    model = _dense_model(np.random.default_rng(0).standard_normal((6, 4)))
    method = DoRA(rank=2, alpha=4.0)
    keras_svdtune.enable_adapter(model, method)
    perturb(model)
    (layer,) = adapted(model).values()
    t = weights_of(layer, trainable=True)
    oracle = dora(numpy(layer._kernel).astype("float64"), method, {})
    weight = np.random.default_rng(1).standard_normal((6, 4))
    weight = weight.astype("float32")
    x = np.eye(6, dtype="float32")
    names = list(t)
    found = gradients(
        lambda: inner(layer(x), weight),
        [getattr(layer.adapter, k) for k in names],
    )
    constant = central_differences(
        lambda t_: np.sum(oracle(t_, at=t) * weight), t
    )
    through = central_differences(lambda t_: np.sum(oracle(t_) * weight), t)
    for name, gradient in zip(names, found, strict=True):
        assert_close(gradient, constant[name], 2e-5, name)
        other = np.abs(gradient - through[name]).max()
        if name == "magnitude_change":
            assert other < 1e-4 * np.abs(gradient).max()
        else:
            assert other > 1e-2 * np.abs(gradient).max(), name


def test_dora_leaves_a_column_of_zeros_alone():
    w = np.random.default_rng(0).standard_normal((6, 4)).astype("float32")
    w[:, 2] = 0.0
    model = _dense_model(w)
    keras_svdtune.enable_dora(model, 2)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    rng = np.random.default_rng(1)
    x = rng.standard_normal((16, 6)).astype("float32")
    y = rng.standard_normal((16, 4)).astype("float32")
    losses = model.fit([x], [y], epochs=8, batch_size=16, verbose=0)
    losses = losses.history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    (layer,) = adapted(model).values()
    start = weights_of(layer)
    others = [0, 1, 3]
    assert (start["magnitude_change"][others] != 0.0).all()
    assert np.abs(start["b"][:, others]).min() > 0.0
    merged = numpy(layer.merged_kernel())
    assert np.isfinite(merged).all()
    assert not merged[:, 2].any()
    y = np.reshape(eager(model, [x]), (16, 4))
    assert y.any() and not y[:, 2].any()


def test_dora_of_a_column_that_turns_around():
    """A branch that cancels a column: no NaN, whatever it is multiplied by."""
    model = small_model()
    keras_svdtune.enable_dora(model, 4, target_layer_names=["first"])
    (layer,) = adapted(model).values()
    a = numpy(layer.adapter.a).astype("float64")
    w = numpy(layer._kernel).astype("float64")
    b = numpy(layer.adapter.b)
    b[:, 1] = -np.linalg.lstsq(a, w[:, 1], rcond=None)[0]
    layer.adapter.b.assign(b)
    # The part of the column outside A's range keeps the magnitude.
    rest = w[:, 1] + a @ b[:, 1].astype("float64")
    expected = rest / np.linalg.norm(rest) * np.linalg.norm(w[:, 1])
    assert_close(numpy(layer.merged_kernel())[:, 1], expected, 1e-4)
    x = np.random.default_rng(0).standard_normal((5, 6)).astype("float32")
    y = np.maximum(x @ numpy(layer.merged_kernel()) + numpy(layer.bias), 0.0)
    assert_close(layer(x), y, 1e-4)
