"""Ranks as a share of the energy, decompositions, bad settings, bad kernels."""

import dataclasses
import functools

import keras
import numpy as np
import pytest
import rich.console
import tiny_backbones_vision
from helpers import (
    AnyData,
    adapted,
    assert_close,
    assert_same,
    eager,
    gradient_function,
    method_id,
    must_stay,
    numpy,
    perturb,
    program,
    trainables,
    values,
)
from keras import ops

import keras_svdtune
from keras_svdtune import (
    EVA,
    SVF,
    SVFT,
    AdaLoRA,
    CorDA,
    DoRA,
    LoRA,
    LoRAGA,
    LoRAXS,
    MiLoRA,
    PiSSA,
)
from keras_svdtune.matrix import decompose
from keras_svdtune.model.state import enabled_method
from keras_svdtune.reports import cost as cost_report

ENERGY = [
    PiSSA(rank=0.9),
    PiSSA(rank=0.5, alpha=3.0),
    MiLoRA(rank=0.05),
    LoRAXS(rank=0.9),
    LoRAXS(rank=0.7, n_iter=2),
]


def matrix(rows, columns, spectrum, seed=0):
    """A matrix (in, out) in float32 with these singular values."""
    rng = np.random.default_rng(seed)
    n = min(rows, columns)
    u = np.linalg.qr(rng.standard_normal((rows, n)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, n)))[0]
    return ((u * spectrum(np.arange(n))) @ v.T).astype("float32")


def model_of(**kernels):
    """A layer for each kernel (in, out), side by side; `heads` is a query
    projection of two heads."""
    inputs, outputs = [], []
    for name, kernel in kernels.items():
        x = keras.Input((3, kernel.shape[0]))
        if name == "heads":
            layer = keras.layers.EinsumDense(
                "btd,ndh->btnh",
                (None, 2, kernel.shape[1] // 2),
                bias_axes="nh",
                name=name,
            )
        else:
            layer = keras.layers.Dense(kernel.shape[1], name=name)
        outputs.append(layer(x))
        inputs.append(x)
        if name == "heads":
            kernel = kernel.reshape(len(kernel), 2, -1).transpose(1, 0, 2)
        layer._kernel.assign(kernel)
    return keras.Model(inputs, outputs, name="side_by_side")


def data_for(kernels, rows=4):
    rng = np.random.default_rng(3)
    return [
        rng.standard_normal((rows, 3, len(k))).astype("float32")
        for k in kernels.values()
    ]


KERNELS = {
    "steep": matrix(24, 16, lambda i: 0.6**i),
    "slow": matrix(16, 24, lambda i: 1 / (1 + i), seed=1),
    "flat": matrix(20, 20, lambda i: 2.0 - 0.05 * i, seed=2),
    "heads": matrix(18, 12, lambda i: 0.8**i, seed=3),
}


def expected_ranks(method):
    """By NumPy: the smallest r with that share of the squares."""
    ranks = {}
    for name, kernel in KERNELS.items():
        s = np.linalg.svd(kernel.astype("float64"), compute_uv=False)
        squares = np.sort(s**2) if method.name == "milora" else s**2
        shares = np.cumsum(squares) / np.sum(squares)
        wanted = method.rank * (1 - 1e-9)
        ranks[name] = next(
            r for r in range(1, len(s) + 1) if shares[r - 1] >= wanted
        )
    return ranks


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    """What takes longest and is not tested here: `estimate` decomposes a
    matrix to time it."""
    monkeypatch.setattr(cost_report, "_seconds_per_operation", lambda: 1e-9)


# Energy.


@pytest.mark.parametrize("method", ENERGY, ids=method_id)
def test_energy_rank(method, tmp_path):
    model = model_of(**KERNELS)
    expected = expected_ranks(method)
    before = values(model)
    estimated = keras_svdtune.estimate(model, method)
    assert not adapted(model)
    assert_same(values(model), before)
    keras_svdtune.enable_adapter(model, method)
    summary = keras_svdtune.adapter_summary(model)

    layers = {x.name: x.adapter for x in adapted(model).values()}
    assert {name: x.method.rank for name, x in layers.items()} == expected
    for name, adapter in layers.items():
        rows, columns = KERNELS[name].shape
        r = expected[name]
        shapes = {
            w.name: tuple(getattr(adapter, w.name).shape)
            for w in adapter.method.weights(adapter.shape)
        }
        if method.name == "lora_xs":
            assert shapes == {"v": (columns, r), "r": (r, r)}
        else:
            assert shapes == {
                **dict.fromkeys(("delta_a", "a0"), (rows, r)),
                **dict.fromkeys(("delta_b", "b0"), (r, columns)),
            }
    # Both reports say the same, and what was built.
    for cost in (estimated, summary):
        assert {x.path: x.rank for x in cost.layers} == expected
        assert cost.method == method
        if method == ENERGY[0]:
            check_table(cost, expected)
    assert estimated.layers == summary.layers
    built = sum(x.size for x in trainables(model).values())
    assert estimated.trainable == summary.trainable == built
    assert enabled_method(model) == method  # as the user wrote it

    # A file brings the ranks to a plain model, and to one that has them.
    perturb(model)
    trained = values(model)  # equal weights, frozen ones too: equal outputs
    path = tmp_path / "adapter.safetensors"
    keras_svdtune.save_adapter(model, path)
    for ready in (False, True):
        keras.backend.clear_session(free_memory=False)
        fresh = model_of(**KERNELS)
        if ready:
            keras_svdtune.enable_adapter(fresh, method)
        keras_svdtune.load_adapter(fresh, path)
        ranks = {x.name: x.adapter.method.rank for x in adapted(fresh).values()}
        assert ranks == expected
        assert_same(values(fresh), trained)
        assert enabled_method(fresh) == method


def check_table(cost, expected):
    """To a user, who sees the printed table only."""
    assert len(set(expected.values())) == len(expected)
    console = rich.console.Console(width=200, record=True, quiet=False)
    with console.capture() as captured:
        cost.print(console)
    rows = {
        name: [word for word in line.replace("│", " ").split()]
        for line in captured.get().splitlines()
        for name in KERNELS
        if f" {name} " in line
    }
    assert set(rows) == set(KERNELS)
    for name, words in rows.items():
        sizes = [str(x) for x in KERNELS[name].shape]
        rest = [w for w in words if w not in (*sizes, "x", name)]
        assert str(expected[name]) in rest, (name, expected[name], words)


def test_energy_ranks_of_equal_singular_values():
    """Where rounding decides, the dry run must decide like the enabling."""
    kernels = {}
    for seed in range(10):  # as keras.initializers.Orthogonal(0.3) makes them
        normal = np.random.default_rng(seed).standard_normal((16, 16))
        kernel = np.linalg.qr(normal)[0].astype("float32") * np.float32(0.3)
        kernels[f"layer_{seed}"] = kernel
    for method in (MiLoRA(rank=0.25), MiLoRA(rank=0.5), LoRAXS(rank=0.75)):
        keras.backend.clear_session(free_memory=False)
        model = model_of(**kernels)
        estimated = keras_svdtune.estimate(model, method)
        keras_svdtune.enable_adapter(model, method)
        found = [x.adapter.method.rank for x in adapted(model).values()]
        assert found == [x.rank for x in estimated.layers]
        assert set(found) <= {16 * method.rank, 16 * method.rank + 1}


def test_declared_layers_by_energy():
    """A layer that is built for a kernel takes the rank that it needs."""
    plain = keras.layers.Dense(16)
    plain.build((None, 24))
    plain.kernel.assign(KERNELS["steep"])
    x = np.random.default_rng(0).standard_normal((3, 24)).astype("float32")
    for name, cls in (
        ("PiSSADense", PiSSA),
        ("MiLoRADense", MiLoRA),
        ("LoRAXSDense", LoRAXS),
    ):
        method = cls(rank=0.6)
        layer = getattr(keras_svdtune, name).from_layer(plain, rank=0.6)
        weights = layer.adapter.method.weights(layer.adapter.shape)
        rank = expected_ranks(method)["steep"]
        assert layer.adapter.method.rank == rank
        for w in weights:
            value = getattr(layer.adapter, w.name)
            assert tuple(value.shape) == w.shape and rank in w.shape
        assert_same(layer(x), plain(x), name)
        again = type(layer).from_config(layer.get_config())
        again.build((None, 24))
        again.set_weights([numpy(v) for v in layer.weights])
        assert_same(again(x), layer(x), name)


# Decompositions.


def sines(a, b):
    """Sines of the principal angles between two column spaces."""
    a, b = (np.linalg.qr(x.astype("float64"))[0] for x in (a, b))
    return np.linalg.svd(a - b @ (b.T @ a), compute_uv=False)


def test_randomised_pissa():
    kernel = matrix(120, 80, lambda i: 0.9**i)

    def start(**settings):
        np.random.seed(len(settings))  # the global generator has no say
        keras.backend.clear_session(free_memory=False)
        model = model_of(layer=kernel)
        keras_svdtune.enable_pissa(model, 8, **settings)
        (layer,) = adapted(model).values()
        return numpy(layer.adapter.a0), numpy(layer.adapter.b0)

    found = start(n_iter=4)
    assert_same(start(n_iter=4, seed=0), found)
    assert not np.array_equal(start(n_iter=4, seed=1)[0], found[0])
    # Signs are the same rule's, so the factors themselves agree.
    for close, exact in zip(found, start(), strict=True):
        np.testing.assert_allclose(close, exact, atol=2e-4)


@pytest.mark.parametrize(
    "shape, condition", [((60, 40), 1e7), ((40, 60), 1e5), ((48, 48), 1e3)]
)
def test_bottom_components_are_the_true_ones(shape, condition):
    """A rounded Gram matrix loses what lies below 1e-4 of the largest."""
    rank, n = 6, min(shape)
    kernel = matrix(*shape, lambda i: condition ** (-i / (n - 1)))
    w = kernel.astype("float64")
    found = decompose.decompose(
        ops.convert_to_tensor(kernel), MiLoRA(rank=rank).needs(shape)
    )
    u, s, v = found.u, found.s, found.v
    assert u.shape == (shape[0], rank) and v.shape == (shape[1], rank)
    true_u, true_s, true_vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(s, true_s[-rank:], rtol=1e-4)
    assert max(sines(u, true_u[:, -rank:])) < 1e-5
    assert max(sines(v, true_vt[-rank:].T)) < 1e-5
    u, s, v = (x.astype("float64") for x in (u, s, v))
    # The vectors are float32: each product may be off by its rounding.
    eps = 3e-7 * true_s[0]
    assert np.linalg.norm(w @ v - u * s, axis=0).max() < eps
    assert np.linalg.norm(w.T @ u - v * s, axis=0).max() < eps
    for basis in (u, v):
        assert np.abs(basis.T @ basis - np.eye(rank)).max() < 1e-6
    # What is taken away of W is what it is small in: s₋ᵣ, not more.
    rest = w - (u * s) @ v.T
    kept = np.linalg.svd(rest, compute_uv=False)
    np.testing.assert_allclose(kept[: n - rank], true_s[:-rank], atol=eps)
    assert kept[n - rank] < eps


# Settings that are too large for a small layer: the largest that fit.

# By method: what a matrix of 5 x 12 gets.
LARGE = [
    *((cls(rank=6), {"rank": 5}) for cls in (PiSSA, MiLoRA, LoRAXS, LoRA)),
    (DoRA(rank=80, alpha=160.0), {"rank": 5}),
    (PiSSA(rank=9, alpha=18.0, n_iter=2), {"rank": 5}),
    (AdaLoRA(rank=4), {"rank": 4, "initial_rank": 5}),
    (AdaLoRA(rank=6, alpha=3.0), {"rank": 5, "initial_rank": 5}),
    *(
        (SVFT(pattern, width), {"off_diagonals": 4})
        for pattern in ("banded", "random", "top_k")
        for width in (5, 80)
    ),
]
# Those that fit nothing.
WRONG = [
    *(
        (cls, {"rank": rank}, r"1 or more, or a float in \(0, 1\]")
        for cls in (PiSSA, MiLoRA, LoRAXS)
        for rank in (0, -1, True, 0.0, -0.5, 1.5, float("nan"), None, "4")
    ),
    *(  # no float is offered that is then refused
        (cls, {"rank": rank}, r"`rank` must be an integer, 1 or more\. Rec")
        for cls in (LoRA, DoRA, AdaLoRA)
        for rank in (0, -1, True, 0.5, 1.0, 2.0, float("nan"), None, "4")
    ),
    *(
        (cls, {"rank": 2, "seed": seed}, "`seed` must be an integer, 0 to 4294")
        for cls in (PiSSA, LoRAXS, LoRA, DoRA, AdaLoRA)
        for seed in (-1, 1.5, None, "0", True, 2**32)
    ),
    (SVFT, {"seed": -1}, "`seed` must be an integer, 0 to"),
    *(
        (AdaLoRA, {"rank": 2, name: value}, f"`{name}` must be a number, 0 or")
        for name, wrong in (("regularization", 1e31), ("smoothing", 1.0))
        for value in (wrong, -0.1, float("nan"), float("inf"), True, "0", None)
    ),
    *(
        (AdaLoRA, {"rank": 2, "initial_rank": rank}, "`initial_rank` must")
        for rank in (0, 1, 2.5, True, "3", float("nan"))
    ),
    *(
        (PiSSA, {"rank": 2, "iterations": count}, "`iterations` must be an in")
        for count in (0, 2.5, True, None, "3")
    ),
    *(
        (keras_svdtune.SVF, {"replace_kernel": x}, "`replace_kernel` must be")
        for x in (1, "no", None)
    ),
    *(
        (cls, {"rank": 2, "alpha": alpha}, "`alpha` must be a positive")
        for cls in (PiSSA, MiLoRA, LoRAXS, LoRA, DoRA, AdaLoRA)
        for alpha in (0, -1, float("nan"), float("inf"), True, "8", 1e-40)
    ),
    *(
        (cls, {"rank": 2, "n_iter": n_iter}, "`n_iter` must be")
        for cls in (PiSSA, LoRAXS)
        for n_iter in (-1, 2.5, True, 101)
    ),
    *(
        (SVFT, {"off_diagonals": width}, "`off_diagonals` must be an integer")
        for width in (-1, True, 1.5, None, "2")
    ),
    (SVFT, {"pattern": "band"}, "Did you mean 'banded'"),
    (SVFT, {"pattern": "topk"}, "Did you mean 'top_k'"),
    (SVFT, {"pattern": "Plain"}, "Did you mean 'plain'"),
    (SVFT, {"pattern": "zigzag"}, "There are: 'banded', 'plain'"),
    (SVFT, {"pattern": None}, "`pattern` must be one of"),
]


@pytest.fixture(scope="module")
def wide_and_narrow():
    """Some settings fit the second layer and not the first."""
    keras.backend.clear_session(free_memory=False)
    kernels = {
        "narrow": matrix(5, 12, lambda i: 1.0 / (1 + i)),
        "wide": matrix(14, 13, lambda i: 1.0 / (1 + i)),
    }
    model = model_of(**kernels)
    model.get_layer("wide").trainable = False
    return model, data_for(kernels)


@pytest.mark.parametrize("method, fitting", LARGE, ids=lambda x: str(x)[:20])
def test_a_small_layer_gets_the_largest_that_fits(
    wide_and_narrow, method, fitting, tmp_path
):
    """Not an error for the whole model; it is in every report and file."""
    model, data = wide_and_narrow
    base = eager(model, data)
    resolved = dataclasses.replace(method, **fitting)
    wide = method.for_shape((14, 13))
    estimated = keras_svdtune.estimate(model, method)
    keras_svdtune.enable_adapter(model, method)
    try:
        assert_same(eager(model, data), base)
        methods = {x.name: x.adapter.method for x in adapted(model).values()}
        assert methods == {"narrow": resolved, "wide": wide}
        assert enabled_method(model) == method  # as the user wrote it
        summary = keras_svdtune.adapter_summary(model)
        assert estimated.layers == summary.layers
        built = sum(x.size for x in trainables(model).values())
        assert summary.trainable == built
        ranks = {x.path: x.rank for x in summary.layers}
        expected = fitting.get("initial_rank", fitting.get("rank"))
        assert ranks["narrow"] == expected
        # The branch is scaled by alpha over the layer's own rank.
        if getattr(method, "alpha", None) is not None:
            scale = model.get_layer("narrow").adapter.method.scale
            assert scale == method.alpha / expected

        perturb(model)
        trained, path = values(model), tmp_path / "adapter.safetensors"
        keras_svdtune.save_adapter(model, path)
        for ready in (False, True):
            keras_svdtune.remove_adapter(model)
            if ready:
                keras_svdtune.enable_adapter(model, method)
            keras_svdtune.load_adapter(model, path)
            assert_same(values(model), trained)
            assert enabled_method(model) == method
        if not method.linear and method.name != "dora":
            half = keras_svdtune.compose({path: 0.5}, rank=80)
            assert rank_in(half, "narrow") <= 5
        conversion = keras_svdtune.to_lora(model, rank=80)
        assert {x.path: x.rank for x in conversion.layers} == {
            "narrow": 5,
            "wide": 13,
        }
        assert conversion.error < 1e-5
    finally:
        keras_svdtune.remove_adapter(model)
    assert_same(eager(model, data), base)


def test_what_fits_nothing(wide_and_narrow):
    model, data = wide_and_narrow
    functions = {
        cls: getattr(keras_svdtune, f"enable_{cls.name}", None)
        for cls, *_ in WRONG
    }
    with must_stay(model, data):
        for cls, settings, message in WRONG:
            with pytest.raises(ValueError, match=message):
                cls(**settings)
            if functions[cls] is not None:
                with pytest.raises(ValueError, match=message):
                    functions[cls](model, **settings)


def test_the_widest_that_fit(wide_and_narrow):
    """One less than what is refused, for each setting."""
    model, _ = wide_and_narrow
    kernels = {x.name: numpy(x._kernel) for x in model.layers if x.weights}
    methods = [cls(rank=5) for cls in (PiSSA, MiLoRA, LoRAXS, LoRA, DoRA)]
    methods += [SVFT(p, 4) for p in ("banded", "random", "top_k")]
    methods += [PiSSA(rank=5, n_iter=0), AdaLoRA(rank=5, initial_rank=5)]
    for method in methods:
        keras_svdtune.enable_adapter(model, method, ["narrow"])
        (layer,) = adapted(model).values()
        perturb(model)
        merged = numpy(program(layer.merged_kernel, ())())
        assert np.isfinite(merged).all()
        assert np.abs(merged - kernels["narrow"]).max() > 1e-3
        keras_svdtune.remove_adapter(model)


def test_a_backbone_with_small_matrices():
    """EfficientNet's squeezes have a few filters."""
    model, _ = tiny_backbones_vision.efficientnet()
    for method in (LoRA(8), SVFT(off_diagonals=8)):
        keras_svdtune.enable_adapter(model, method)
        ours = [x.adapter.method for x in adapted(model).values()]
        assert len(set(ours)) > 1 and method in ours
        keras_svdtune.remove_adapter(model)
    head = keras.layers.Dense(2, name="head")
    x = keras.Input((16,))
    model = keras.Model(x, head(keras.layers.Dense(32)(x)))
    keras_svdtune.enable_svft(model)
    assert head.adapter.method == SVFT(off_diagonals=1)


@pytest.mark.parametrize(
    "name, settings, fitting",
    [
        ("LoRADense", {"rank": 8, "alpha": 4.0}, {"rank": 2}),
        ("PiSSADense", {"rank": 8}, {"rank": 2}),
        ("SVFTDense", {}, {"off_diagonals": 1}),
        ("AdaLoRADense", {"rank": 8}, {"rank": 2, "initial_rank": 2}),
    ],
)
def test_declared_layers_get_what_fits(name, settings, fitting):
    cls = getattr(keras_svdtune, name)
    layer = cls(2, name="narrow", **settings)
    x = np.ones((3, 5), "float32")
    y = numpy(layer(x))
    config = layer.get_config()
    assert {key: config[key] for key in fitting} == fitting
    again = cls.from_config(config)
    again.build((None, 5))
    again.set_weights([numpy(v) for v in layer.weights])
    assert_same(again(x), y)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numbers_of_numpy_count_as_pythons(integer, tmp_path):
    """Also in files, whose settings are JSON."""
    model = model_of(layer=KERNELS["flat"])
    alpha = np.float32(0.5)
    method = LoRA(rank=integer(3), alpha=alpha, seed=integer(7))
    assert method == LoRA(rank=3, alpha=0.5, seed=7)
    assert [type(x) for x in method.settings().values()] == [int, float, int]
    assert SVFT(off_diagonals=integer(1)) == SVFT(off_diagonals=1)
    assert PiSSA(rank=np.float64(0.5)) == PiSSA(rank=0.5)
    with pytest.raises(ValueError, match="`rank` must be"):
        LoRA(rank=np.True_)
    keras_svdtune.enable_adapter(model, method)
    path = tmp_path / "a.safetensors"
    keras_svdtune.save_adapter(model, path)
    keras_svdtune.load_adapter(model, path)
    both = keras_svdtune.compose({path: np.float32(0.5)}, rank=integer(2))
    assert rank_in(both, "layer") == 2
    keras_svdtune.to_lora(model, rank=integer(2))
    with pytest.raises(ValueError, match="must be a finite number.*True"):
        keras_svdtune.compose({path: True})
    for rank in (0, True, 2.0, "2", float("nan")):
        for function in (
            functools.partial(keras_svdtune.compose, {path: 0.5}),
            functools.partial(keras_svdtune.to_lora, model),
        ):
            with pytest.raises(ValueError, match="`rank` must be an integer"):
                function(rank=rank)


def rank_in(saved, path):
    entry = saved.about["layers"][path]
    return entry.get("settings", saved.about["settings"])["rank"]


@pytest.mark.parametrize("cls", [SVF, PiSSA, MiLoRA, LoRAXS])
def test_a_share_of_one_is_no_rank_of_one(cls, tmp_path):
    kernels = {
        "narrow": matrix(6, 1, lambda i: 1.0 + i),
        "steep": KERNELS["steep"],
    }
    model, data = model_of(**kernels), data_for(kernels)
    keras_svdtune.enable_adapter(model, cls(rank=1.0))
    perturb(model)
    y = eager(model, data)
    keras_svdtune.save_adapter(model, tmp_path / "a.safetensors")
    keras_svdtune.remove_adapter(model)
    keras_svdtune.load_adapter(model, tmp_path / "a.safetensors")
    assert_same(eager(model, data), y)
    keras_svdtune.remove_adapter(model)
    whole = keras_svdtune.compose({tmp_path / "a.safetensors": 1.0})
    keras_svdtune.load_adapter(model, whole)
    for found, expected in zip(eager(model, data), y, strict=True):
        assert_close(found, expected, 1e-5)
    for ranks in ((1, 1.0), (1.0, 1)):
        keras_svdtune.remove_adapter(model)
        keras_svdtune.enable_adapter(model, cls(rank=ranks[0]), name="a")
        with pytest.raises(ValueError, match="same settings"):
            keras_svdtune.enable_adapter(model, cls(rank=ranks[1]), name="b")
    assert not cls(rank=1).trains_like(cls(rank=1.0))
    assert cls(rank=2).trains_like(cls(rank=2))


# Bad kernels.

POOR = {
    "zero": np.zeros((8, 8), "float32"),
    "tiny": matrix(8, 8, lambda i: 1e-18 / (1.0 + i), seed=2),
    "one": np.outer(np.arange(1, 7), np.ones(8)).astype("float32") / 6,
    "heads": matrix(8, 8, lambda i: np.where(i < 2, 1.0 - 0.5 * i, 0.0)),
}
POOR["heads"][:, 3] = 0.0  # a column of zeros in a matrix that has others
POOR_METHODS = [
    keras_svdtune.SVF(),
    SVFT("plain"),
    SVFT("banded", 2),
    SVFT("random", 4),
    SVFT("top_k", 1),
    PiSSA(rank=4, alpha=8.0),
    PiSSA(rank=4, n_iter=4),
    PiSSA(rank=1.0),
    MiLoRA(rank=4, alpha=2.0),
    MiLoRA(rank=0.5),
    LoRAXS(rank=3, n_iter=4),
    LoRAXS(rank=1.0),
    LoRA(rank=4, alpha=8.0),
    DoRA(rank=4, alpha=8.0),
    AdaLoRA(rank=2, initial_rank=4),
    keras_svdtune.MiCA(rank=4, alpha=8.0),
    keras_svdtune.MiCA(rank=3, part="top"),
    keras_svdtune.PSOFT(rank=4),
    keras_svdtune.OPLoRA(rank=2, keep=3, alpha=4.0),
    EVA(rank=4, data=AnyData()),
    CorDA(rank=4, alpha=8.0, data=AnyData()),
    CorDA(rank=3, goal="keep", data=AnyData()),
    LoRAGA(rank=3, data=AnyData()),
]


def test_every_method_meets_bad_kernels():
    names = {x.name for x in POOR_METHODS}
    assert names == set(keras_svdtune.METHODS)


@pytest.fixture(scope="module")
def poor():
    keras.backend.clear_session(free_memory=False)
    model = model_of(**POOR)
    rng = np.random.default_rng(5)
    for name in POOR:
        layer = model.get_layer(name)
        bias = rng.standard_normal(tuple(layer.bias.shape))
        layer.bias.assign(bias.astype("float32"))
    return model, data_for(POOR)


@pytest.mark.parametrize("method", POOR_METHODS, ids=method_id)
def test_kernels_of_zeros_and_of_low_rank(method, poor):
    """Nothing is NaN, not at the start and not when it has trained."""
    model, data = poor
    base = eager(model, data)
    rng = np.random.default_rng(6)
    targets = [rng.standard_normal(y.shape).astype("float32") for y in base]
    keras_svdtune.enable_adapter(model, method)
    try:
        variables = [
            v
            for layer in adapted(model).values()
            for v in layer.adapter.variables_by_name(trainable=True).values()
        ]

        def computed():
            layers = [model.get_layer(name) for name in POOR]
            return model(data), [x.merged_kernel() for x in layers]

        def loss():
            pairs = zip(model(data), targets, strict=True)
            return sum(
                ops.mean(ops.square(ops.subtract(y, t))) for y, t in pairs
            )

        computed = program(computed, variables)
        gradients = gradient_function(loss, variables)
        for found, expected in zip(computed()[0], base, strict=True):
            np.testing.assert_allclose(numpy(found), expected, atol=1e-6)
        optimizer = keras.optimizers.Adam(method.suggested_learning_rate)
        for _ in range(2):
            found = gradients()
            assert all(np.isfinite(g).all() for g in found)
            assert any(g.any() for g in found)
            optimizer.apply(
                [ops.convert_to_tensor(g) for g in found], variables
            )
        outputs, kernels = computed()
        assert all(np.isfinite(numpy(x)).all() for x in [*outputs, *kernels])

        def total(outputs):
            pairs = zip(outputs, targets, strict=True)
            return sum(np.mean((numpy(y) - t) ** 2) for y, t in pairs)

        if method != MiLoRA(rank=4, alpha=2.0):  # all its components are zero
            assert total(outputs) < total(base)
        perturb(model)
        _check_merged(model, data, *computed())
        keras_svdtune.adapter_summary(model)
    finally:
        keras_svdtune.remove_adapter(model)
    assert_same(eager(model, data), base)


def _check_merged(model, data, outputs, kernels):
    """Far from the start too, each layer computes what its merged kernel
    computes."""
    for name, x, y, kernel in zip(POOR, data, outputs, kernels, strict=True):
        layer, y = model.get_layer(name), numpy(y)
        assert np.isfinite(y).all(), name
        equation = getattr(layer, "equation", "btd,de->bte")
        expected = np.einsum(
            equation, x.astype("float64"), numpy(kernel).astype("float64")
        )
        expected = expected + numpy(layer.bias).astype("float64")
        off = np.abs(y - expected).max()
        assert off < 2e-5 * max(np.abs(expected).max(), 1.0), (name, off)


def test_what_zeros_mean_for_each_method(poor):
    """The components that do not train, as the docstrings say."""
    model, _ = poor

    def merged(method):
        keras_svdtune.enable_adapter(model, method, ["zero", "one"])
        try:
            perturb(model)
            return [
                numpy(model.get_layer(name).merged_kernel()).astype("float64")
                for name in ("zero", "one")
            ]
        finally:
            keras_svdtune.remove_adapter(model)

    # These only mix what is there: zero stays zero, and rank 1 stays rank 1.
    for method in (
        keras_svdtune.SVF(),
        SVFT("banded", 2),
        SVFT("random", 1),
        LoRAXS(rank=4),
    ):
        zero, one = merged(method)
        assert not zero.any(), method
        if method.name == "svf":
            # A single number times W, but for the rounding to bfloat16, which
            # makes small singular values of those that are zero.
            w = POOR["one"].astype("float64")
            ratio = np.sum(one * w) / np.sum(w * w)
            limit = 2.0**-8 * np.abs(w).max()
            np.testing.assert_allclose(one, ratio * w, atol=limit)
        s = np.linalg.svd(one, compute_uv=False)
        assert s[1] < 1e-5 * s[0], method
    # LoRA and its like have directions of their own.
    for method in (LoRA(rank=2), PiSSA(rank=2), MiLoRA(rank=2)):
        assert merged(method)[0].any(), method
