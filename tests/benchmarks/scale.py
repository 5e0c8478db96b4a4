"""What each method costs on large models, from their configs alone.

    python tests/benchmarks/scale.py

No weights are made or fetched. The matrices of a model follow from its config
(checked against a tiny backbone of the same KerasHub class, and the sum of all
parameters against the number that KerasHub publishes). What a method adds to a
matrix is what its own `weights(shape)` says. FLOPs are counted by XLA in the
method's own `call` on abstract arrays, forward and backward, matrix by matrix;
attention and the logits are added by formula. The whole is checked against
what XLA counted in the other benchmarks, on whole real models.

Memory is an estimate, by the formula that the page gives; its activations are
compared with XLA's temporary bytes there too.
"""

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import keras
import keras_hub
import numpy as np
from rich.progress import track

from keras_svdtune.attach import view_of
from keras_svdtune.matrix import DENSE_EQUATION, MatrixView
from keras_svdtune.methods.base import Method
from keras_svdtune.targets import find_targets

FLOOR = "frozen floor"
LORA = "Keras enable_lora"
FULL = "full fine-tuning"
QUERY_VALUE = f"{LORA}, query and value"
# Nominal memory in GB; a model fits if it needs 95 % of it or less.
DEVICES = {
    "v5e": 16,
    "T4": 16,
    "A100-40": 40,
    "A100-80": 80,
    "H100-80": 80,
}
USABLE = 0.95


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of a published config that decide its cost.

    Attributes:
        family: "gemma", "gemma3" or "llama", the equations of its layers.
        norms: int, RMS norms of the model's width in one layer.
        head_norms: int, RMS norms of a head's width in one layer.
        inner: int, width of either half of the gated feed-forward block.
        tied: bool, whether the logits come from the embedding's table.
        preset: KerasHub preset, to compare the number of parameters with.
    """

    family: str
    layers: int
    width: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    norms: int = 2
    head_norms: int = 0
    tied: bool = True
    preset: str | None = None

    def matrices(self) -> dict[str, MatrixView]:
        """The linear layers of one block, by name."""
        d, f = self.width, self.inner
        n, k, h = self.heads, self.key_heads, self.head_dim
        if self.family == "llama":
            query, key, output = (
                "bqm,muh->bquh",
                "bkm,mvh->bkvh",
                "bquh,uhm->bqm",
            )
            kernels = ((d, n, h), (d, k, h), (n, h, d))
            up, down, names = DENSE_EQUATION, DENSE_EQUATION, _LLAMA
        else:
            query, key, output = (
                "btd,ndh->btnh",
                "bsd,kdh->bskh",
                "btnh,nhd->btd",
            )
            kernels = ((n, d, h), (k, d, h), (n, h, d))
            up, down, names = "btd,df->btf", "btf,fd->btd", _GEMMA
        views = (
            MatrixView(query, kernels[0]),
            MatrixView(key, kernels[1]),
            MatrixView(key, kernels[1]),
            MatrixView(output, kernels[2]),
            MatrixView(up, (d, f)),
            MatrixView(up, (d, f)),
            MatrixView(down, (f, d)),
        )
        return dict(zip(names, views, strict=True))

    @property
    def parameters(self) -> int:
        """All parameters of the backbone, and of a head that is not tied."""
        block = sum(math.prod(v.shape) for v in self.matrices().values())
        block += self.norms * self.width + self.head_norms * self.head_dim
        tables = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * block + tables + self.width

    def attention_flops(self, batch: int, length: int) -> float:
        """Scores and sums of one layer, forward and backward."""
        return 12.0 * batch * self.heads * length**2 * self.head_dim

    def head_flops(self, tokens: int) -> float:
        """Logits, and the gradient of what they are computed from."""
        return 4.0 * tokens * self.vocabulary * self.width


_GEMMA = (
    *("query", "key", "value", "attention_output"),
    *("ffw_gating", "ffw_gating_2", "ffw_linear"),
)
_LLAMA = (
    *("query", "key", "value", "attention_output"),
    *("feedforward_intermediate_dense", "feedforward_gate_dense"),
    "feedforward_output_dense",
)
# Layers that read the same tensor keep it once.
_SHARED_INPUTS = ((0, 1, 2), (3,), (4, 5), (6,))

MODELS = {
    "Gemma 2B": Config(
        *("gemma", 18, 2048, 8, 1, 256, 16384, 256000),
        preset="gemma_2b_en",
    ),
    "Gemma 7B": Config(
        *("gemma", 28, 3072, 16, 16, 256, 24576, 256000),
        preset="gemma_7b_en",
    ),
    "Gemma 2 9B": Config(
        *("gemma", 42, 3584, 16, 8, 256, 14336, 256000),
        norms=4,
        preset="gemma2_9b_en",
    ),
    "Gemma 3 27B, text": Config(
        *("gemma3", 62, 5376, 32, 16, 128, 21504, 262144),
        norms=4,
        head_norms=2,
        preset="gemma3_27b_text",
    ),
    "Llama 3 8B": Config(
        *("llama", 32, 4096, 32, 8, 128, 14336, 128256),
        tied=False,
        preset="llama3_8b_en",
    ),
    "Llama 3 70B": Config(
        *("llama", 80, 8192, 64, 8, 128, 28672, 128256), tied=False
    ),
}
# Of the other benchmarks, to check the count with.
GEMMA3_270M = Config(
    *("gemma3", 18, 640, 4, 1, 256, 2048, 262144),
    norms=4,
    head_norms=2,
    preset="gemma3_270m",
)
BACKBONES = {
    "gemma": keras_hub.models.GemmaBackbone,
    "gemma3": keras_hub.models.Gemma3Backbone,
    "llama": keras_hub.models.Llama3Backbone,
}


class _Product:
    """x·W on abstract arrays, as a method's `call` wants it."""

    def __init__(self, x: Any, matrix: Any):
        self._x, self._matrix, self.dtype = x, matrix, str(x.dtype)

    def __call__(self) -> Any:
        return self.rows(self._x)

    def times(self, a: Any) -> Any:
        return keras.ops.matmul(self._x, a)

    def moved(self, change: Any) -> Any:
        return self.rows(self._x + change)

    def rows(self, r: Any) -> Any:
        return keras.ops.matmul(r, self._matrix)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What autodiff does and keeps for one matrix.

    Attributes:
        flops: float, forward and backward, the input's gradient included.
        keeps_input: bool, whether the backward pass needs x.
        kept: int, bytes of other activations that it needs.
        fixed: int, bytes that do not grow with the tokens: merged kernels.
    """

    flops: float
    keeps_input: bool
    kept: int
    fixed: int


@functools.cache
def block_bytes(config: Config, length: int, dtype: str) -> float:
    """Bytes for a token that autodiff keeps in one frozen block.

    Of KerasHub's own block at its real size, traced and never made.
    """
    batch = 3  # no other axis has this size

    def pull(x: Any) -> Any:
        block = _decoder_block(config, dtype)
        block.build((None, None, config.width))
        return jax.vjp(block, x)[1]

    x = jax.ShapeDtypeStruct((batch, length, config.width), dtype)
    kept = _sizes(jax.make_jaxpr(pull)(x).jaxpr)
    return sum(n for shape, n in kept if shape[:1] == (batch,)) / batch / length


def _decoder_block(config: Config, dtype: str) -> Any:
    # By their full names: KerasHub exports no layer of one model only.
    from keras_hub.src.models.gemma import gemma_decoder_block
    from keras_hub.src.models.gemma3 import gemma3_decoder_block
    from keras_hub.src.models.llama import llama_decoder

    settings: dict[str, Any] = {
        "num_query_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "intermediate_dim": config.inner,
        "dtype": dtype,
    }
    if config.family == "llama":
        return llama_decoder.LlamaTransformerDecoder(**settings)
    settings |= {
        "hidden_dim": config.width,
        "head_dim": config.head_dim,
        "use_post_ffw_norm": config.norms == 4,
        "use_post_attention_norm": config.norms == 4,
    }
    if config.family == "gemma3":
        return gemma3_decoder_block.Gemma3DecoderBlock(
            use_query_key_norm=True, gate_dim_reduction=1, **settings
        )
    settings["intermediate_dim"] *= 2  # it counts both halves
    return gemma_decoder_block.GemmaDecoderBlock(**settings)


def _sizes(jaxpr: Any) -> list[tuple[tuple[int, ...], int]]:
    """Shape and bytes of each output that is computed, once."""
    given = set(jaxpr.invars)
    found = {
        v: v.aval for v in jaxpr.outvars if isinstance(v, type(jaxpr.invars[0]))
    }
    return [
        (a.shape, math.prod(a.shape) * a.dtype.itemsize)
        for v, a in found.items()
        if v not in given
    ]


# What a candidate trains in one matrix: trainables and the others as name ->
# (shape, dtype), and the product.
Call = Callable[[Any, _Product], Any]


@functools.cache
def trace_floor(shape: tuple[int, int], tokens: int, dtype: str) -> Trace:
    """The frozen product."""
    return _trace({}, {}, lambda weights, base: base(), shape, tokens, dtype)


@functools.cache
def trace_full(shape: tuple[int, int], tokens: int, dtype: str) -> Trace:
    """The product with a kernel that trains."""
    kernel = {"kernel": (shape, dtype)}

    def call(weights: Any, base: _Product) -> Any:
        return keras.ops.matmul(base._x, weights.kernel)

    return _trace(kernel, {}, call, shape, tokens, dtype)


@functools.cache
def trace_keras_lora(
    kernel_shape: tuple[int, ...],
    shape: tuple[int, int],
    rank: int,
    tokens: int,
    dtype: str,
) -> Trace:
    """Keras' LoRA: the kernel W + A·B, formed on every step."""
    ab = {
        "a": ((*kernel_shape[:-1], rank), "float32"),
        "b": ((rank, kernel_shape[-1]), "float32"),
    }

    def call(weights: Any, base: _Product) -> Any:
        a, b = (keras.ops.cast(x, dtype) for x in (weights.a, weights.b))
        change = keras.ops.reshape(keras.ops.matmul(a, b), shape)
        return keras.ops.matmul(base._x, base._matrix + change)

    return _trace(ab, {}, call, shape, tokens, dtype)


@functools.cache
def trace_method(
    method: Method, shape: tuple[int, int], tokens: int, dtype: str
) -> Trace:
    """A method's own `call`, and what its weights add to the loss."""
    weights = method.weights(shape)
    trained = {
        w.name: (w.shape, w.dtype)
        for w in weights
        if w.trainable or w.overwritten
    }
    frozen = {
        w.name: (w.shape, w.dtype or dtype)
        for w in weights
        if w.name not in trained
    }
    penalties = [(w.name, w.regularizer) for w in weights if w.regularizer]
    return _trace(
        trained,
        frozen,
        method.call,
        shape,
        tokens,
        dtype,
        penalties,
    )


def _trace(
    trained: dict[str, Any],
    frozen: dict[str, Any],
    call: Call,
    shape: tuple[int, int],
    tokens: int,
    dtype: str,
    penalties: Any = (),
) -> Trace:
    x = jax.ShapeDtypeStruct((tokens, shape[0]), dtype)
    matrix = jax.ShapeDtypeStruct(shape, dtype)
    dy = jax.ShapeDtypeStruct((tokens, shape[1]), dtype)
    train = {k: jax.ShapeDtypeStruct(*v) for k, v in trained.items()}
    still = {k: jax.ShapeDtypeStruct(*v) for k, v in frozen.items()}

    def pull_of(x: Any, train: Any, matrix: Any, still: Any) -> Any:
        def forward(train: Any, x: Any) -> Any:
            weights = types.SimpleNamespace(**train, **still, shape=shape)
            penalty = sum(
                (p(train[name]) for name, p in penalties), jax.numpy.zeros(())
            )
            return call(weights, _Product(x, matrix)), penalty

        return jax.vjp(forward, train, x)

    def step(x: Any, train: Any, matrix: Any, still: Any, dy: Any) -> Any:
        y, pull = pull_of(x, train, matrix, still)
        return y[0], pull((dy, jax.numpy.ones(())))

    lowered = jax.jit(step).lower(x, train, matrix, still, dy)
    jaxpr = jax.make_jaxpr(lambda *a: pull_of(*a)[1])(x, train, matrix, still)
    sizes = _sizes(jaxpr.jaxpr)
    kept = sum(n for shape, n in sizes if shape[:1] == (tokens,))
    return Trace(
        lowered.cost_analysis()["flops"],
        any(v is jaxpr.jaxpr.invars[0] for v in jaxpr.jaxpr.outvars),
        kept,
        sum(n for _, n in sizes) - kept,
    )


@dataclasses.dataclass
class Candidate:
    """A way to train a model.

    Attributes:
        name: str.
        traces: one for each matrix of a block, in order.
        trainable: int, trainables of the model; `trainable_bytes` of each.
        frozen: int, extra frozen numbers; `frozen_bytes` of all.
        saved_bytes: int, of the adapter file.
        enable_flops: float, of all decompositions.
    """

    name: str
    traces: list[Trace]
    trainable: int = 0
    trainable_bytes: int = 4
    frozen: int = 0
    frozen_bytes: int = 0
    saved_bytes: int = 0
    enable_flops: float = 0.0


def candidates(
    config: Config,
    methods: dict[str, Method],
    rank: int,
    tokens: int,
    dtype: str = "bfloat16",
) -> list[Candidate]:
    """All ways to train a model."""
    views = config.matrices()
    shapes = [v.shape for v in views.values()]
    floor = [trace_floor(s, tokens, dtype) for s in shapes]
    found = [Candidate(FLOOR, floor)]
    for name, targets in (
        (QUERY_VALUE, ("query", "value")),
        (f"{LORA}({rank})", tuple(views)),
    ):
        traces, trainable = [], 0
        for (target, view), frozen in zip(views.items(), floor, strict=True):
            if target not in targets:
                traces.append(frozen)
                continue
            kernel = view.kernel_shape
            traces.append(
                trace_keras_lora(kernel, view.shape, rank, tokens, dtype)
            )
            trainable += rank * (math.prod(kernel[:-1]) + kernel[-1])
        trainable *= config.layers
        found.append(
            Candidate(name, traces, trainable, saved_bytes=4 * trainable)
        )
    for name, method in methods.items():
        title = common.label_of(name, method)
        found.append(_of_method(title, config, method, tokens, dtype))
    full = [trace_full(s, tokens, dtype) for s in shapes]
    size = 2 if dtype == "bfloat16" else 4
    found.append(
        Candidate(
            FULL,
            full,
            config.parameters,
            size,
            saved_bytes=config.parameters * size,
        )
    )
    return found


def _of_method(
    title: str, config: Config, method: Method, tokens: int, dtype: str
) -> Candidate:
    found = Candidate(title, [])
    for name, view in config.matrices().items():
        shape = view.shape
        method.check(shape)
        found.traces.append(trace_method(method, shape, tokens, dtype))
        found.enable_flops += config.layers * enable_flops(method, shape)
        for w in method.weights(shape):
            count = config.layers * math.prod(w.shape)
            if w.trainable:
                found.trainable += count
            else:
                found.frozen += count
                size = _size(w.dtype or dtype)
                found.frozen_bytes += count * size
            if w.saved:
                # In the file: the array in float32, its key and its shape.
                found.saved_bytes += 4 * count
                found.saved_bytes += config.layers * (100 + len(name))
        # Fingerprint and effect; the layer's row of the metadata.
        found.saved_bytes += config.layers * (4 * 13 + 100 + len(name))
    return found


def enable_flops(method: Method, shape: tuple[int, int]) -> float:
    """About how many operations enabling takes for W (in, out).

    The Gram matrix, of which half is computed: n²·m. Its eigenvectors: 9·n³.
    The other side of k components, 2·m·n·k. A randomised range finder: 2·n_iter
    + 2 products with n_iter·k and more columns. DoRA: norms.
    """
    n, m = min(shape), max(shape)
    needs = method.needs(shape)
    if needs is None:
        norms = any(w.name == "squared_norms" for w in method.weights(shape))
        return 2.0 * n * m if norms else 0.0
    if needs.n_iter is not None and isinstance(needs.rank, int):
        k = needs.rank + 10
        return (2 * needs.n_iter + 2) * (2.0 * m * n * k + 4.0 * m * k * k)
    k = needs.rank if isinstance(needs.rank, int) else 0
    return 1.0 * n * n * m + 9.0 * n**3 + 2.0 * m * n * k


def _size(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def step_flops(
    config: Config, found: Candidate, batch: int, length: int, head: bool
) -> float:
    """FLOPs of one step, forward and backward."""
    block = sum(t.flops for t in found.traces)
    block += config.attention_flops(batch, length)
    total = config.layers * block
    return total + (config.head_flops(batch * length) if head else 0.0)


def activation_bytes(
    config: Config, found: Candidate, batch: int, length: int, dtype: str
) -> tuple[int, int]:
    """What one block keeps for the backward pass.

    Returns:
        Bytes that grow with the tokens, and bytes that do not.
    """
    size, tokens = _size(dtype), batch * length
    kept = round(tokens * block_bytes(config, length, dtype))
    shapes = [v.shape for v in config.matrices().values()]
    for group in _SHARED_INPUTS:
        if any(found.traces[i].keeps_input for i in group):
            kept += tokens * shapes[group[0]][0] * size
    kept += sum(t.kept for t in found.traces)
    return kept, sum(t.fixed for t in found.traces)


def memory(
    config: Config, found: Candidate, batch: int, length: int, remat: bool
) -> dict[str, int]:
    """Bytes of one training step in bfloat16, by what they are for."""
    kept, fixed = activation_bytes(config, found, batch, length, "bfloat16")
    tokens, layers = batch * length, config.layers
    activations = layers * (kept + fixed)
    if remat:
        activations = 2 * layers * tokens * config.width + kept + fixed
    return {
        "weights": 2 * config.parameters,
        "adapter": found.frozen_bytes
        + (found.trainable * 4 if found.name != FULL else 0),
        "gradients": found.trainable * found.trainable_bytes,
        "optimizer": 2 * found.trainable * found.trainable_bytes,
        "activations": activations,
        "logits": 6 * tokens * config.vocabulary,
    }


def check_matrices(config: Config) -> None:
    """Compares the matrices with those of a tiny backbone of the class."""
    tiny = dataclasses.replace(
        config,
        layers=2,
        width=48,
        heads=4,
        key_heads=2,
        head_dim=12 if config.family == "llama" else 16,
        inner=40,
        vocabulary=32,
    )
    settings: dict[str, Any] = {
        "vocabulary_size": tiny.vocabulary,
        "num_layers": tiny.layers,
        "num_query_heads": tiny.heads,
        "num_key_value_heads": tiny.key_heads,
        "hidden_dim": tiny.width,
        "intermediate_dim": tiny.inner,
    }
    if tiny.family != "llama":
        settings["head_dim"] = tiny.head_dim
        settings["use_post_ffw_norm"] = tiny.norms == 4
        settings["use_post_attention_norm"] = tiny.norms == 4
    if tiny.family == "gemma":
        settings["intermediate_dim"] *= 2  # it counts both halves
    if tiny.family == "gemma3":
        settings["image_size"] = 16
    if tiny.family == "llama":
        settings["tie_word_embeddings"] = tiny.tied
    backbone = BACKBONES[tiny.family](**settings)
    theirs = {}
    for layer in find_targets(backbone).values():
        view = view_of(layer)
        theirs[layer.name] = (view.equation, view.kernel_shape)
    ours = {k: (v.equation, v.kernel_shape) for k, v in tiny.matrices().items()}
    if ours != theirs:
        raise AssertionError(f"Other matrices: {ours} and {theirs}")
    if tiny.parameters != backbone.count_params():
        raise AssertionError(
            f"{tiny.parameters:,} parameters, of {backbone.count_params():,}"
        )


def published_parameters(config: Config) -> int | None:
    """What KerasHub's list of presets says."""
    if config.preset is None:
        return None
    presets = BACKBONES[config.family].presets
    return presets[config.preset]["metadata"]["params"]


def check_flops(
    folder: Path, methods: dict[str, Method], rank: int
) -> list[dict[str, Any]]:
    """Compares FLOPs and activations with XLA's in other benchmarks."""
    rows: list[dict[str, Any]] = []

    def compare(
        where: str,
        config: Config,
        theirs: dict[str, Any],
        batch: int,
        length: int,
        dtype: str,
    ) -> None:
        for ours in candidates(config, methods, rank, batch * length, dtype):
            if ours.name not in theirs:
                continue
            row = theirs[ours.name]
            flops = step_flops(config, ours, batch, length, head=False)
            kept, fixed = activation_bytes(config, ours, batch, length, dtype)
            temp = config.layers * (kept + fixed)
            rows.append(
                {
                    "where": where,
                    "name": ours.name,
                    "flops": flops,
                    "xla_flops": row["flops"],
                    "flops_ratio": flops / row["flops"],
                    "kept_bytes": temp,
                    "xla_temp_bytes": row["temp_bytes"],
                    "bytes_ratio": temp / max(row["temp_bytes"], 1),
                }
            )

    path = folder / "step_time_gemma3_270m_jax.json"
    if path.exists():
        read = json.loads(path.read_text())
        compare(
            "Gemma 3 270M, CPU, float32",
            GEMMA3_270M,
            read["results"],
            *(read["batch"], read["length"], "float32"),
        )
    for file, title in (
        ("gemma_2b", "Gemma 2B"),
        ("gemma2_9b", "Gemma 2 9B"),
    ):
        path = folder / f"tpu_compile_{file}.json"
        if not path.exists():
            continue
        read = json.loads(path.read_text())
        one = dataclasses.replace(MODELS[title], layers=1)
        for tokens, results in read["results"].items():
            length = min(read["length"], int(tokens))
            compare(
                f"one block of {title}, v5e, {int(tokens):,} tokens",
                *(one, results, int(tokens) // length, length, "bfloat16"),
            )
    return rows


def figures(
    config: Config,
    methods: dict[str, Method],
    rank: int,
    batch: int,
    length: int,
) -> dict[str, dict[str, Any]]:
    """The row of every candidate."""
    found = candidates(config, methods, rank, batch * length)
    flops = {
        c.name: step_flops(config, c, batch, length, head=True) for c in found
    }
    rows = {}
    for c in found:
        need = {
            remat: memory(config, c, batch, length, remat)
            for remat in (False, True)
        }
        total = {remat: sum(x.values()) for remat, x in need.items()}
        rows[c.name] = {
            "trainable": c.trainable,
            "frozen_bytes": c.frozen_bytes,
            "optimizer_bytes": need[False]["optimizer"],
            "file_bytes": c.saved_bytes,
            "enable_flops": c.enable_flops,
            "step_flops": flops[c.name],
            "step_to_floor": flops[c.name] / flops[FLOOR],
            "step_to_lora": flops[c.name] / flops[f"{LORA}({rank})"],
            "step_to_lora_query_value": flops[c.name] / flops[QUERY_VALUE],
            "bytes": need[False],
            "bytes_with_remat": need[True],
            "total_bytes": total[False],
            "total_bytes_with_remat": total[True],
            "fits": {
                device: "yes"
                if total[False] <= USABLE * 1e9 * gb
                else "with remat"
                if total[True] <= USABLE * 1e9 * gb
                else "no"
                for device, gb in DEVICES.items()
            },
        }
    return rows


_SIGNS = {"yes": "yes", "with remat": "remat", "no": "-"}


def markdown(result: dict[str, Any]) -> str:
    """The tables, as a page."""
    batch, length = result["batch"], result["length"]
    lines = [
        "# Scale, on paper",
        "",
        f"By `tests/benchmarks/scale.py`, {result['machine']['date'][:10]}: "
        "counted from configs, no weights made, nothing run. "
        f"{batch} x {length:,} tokens, bfloat16, Adam, rank "
        f"{result['rank']}, every linear layer of every block.",
        "",
        "- *step*: FLOPs forward and backward, logits included, as a ratio to "
        "the frozen model (gradients to all activations, none to weights), to "
        f"Keras' `enable_lora({result['rank']})` on the same layers, and to it "
        "on query and value alone, KerasHub's default.",
        "- *enable*: operations of the decompositions on the host in float64: "
        "n²m for the Gram matrix and 9n³ for its eigenvectors of W (m, n), "
        "n <= m. PiSSA, MiLoRA and LoRA-XS decompose exactly here; "
        "PiSSA and LoRA-XS with `n_iter` need far less.",
        "- *GB* = weights (2 bytes) + adapter + gradients of trainables + two "
        "slots of Adam + activations + logits (6 bytes each), without and "
        "with rematerialisation. Activations are what autodiff keeps for the "
        "backward pass in KerasHub's block (without a fused attention kernel), "
        "the inputs that the adapters need, and what they keep "
        "themselves, merged kernels too: of all blocks without remat; with "
        "it of one, and the input of each. XLA keeps less (see the check), as "
        "it computes some again; so this is on the safe side.",
        "- *fits*, on one device: yes; remat: only with it; -: no. It may take "
        "95 % of the nominal memory. A T4 has no bfloat16 arithmetic in "
        "hardware; only its memory is meant.",
        "",
    ]
    for title, model in result["models"].items():
        published = model["published_parameters"]
        lines += [
            f"## {title}",
            "",
            f"{model['parameters']:,} parameters"
            + (
                f" (KerasHub publishes {published:,})."
                if published
                else " (no KerasHub preset to compare with)."
            ),
            "",
            "| | trainable | extra frozen, MB | Adam, MB | file, MB | enable, "
            "TFLOP | step, to floor | to enable_lora | to its default | GB | "
            "GB, remat | " + " | ".join(DEVICES) + " |",
            "|---|" + "---|" * (10 + len(DEVICES)),
        ]
        for name, r in model["results"].items():
            cells = (
                name,
                f"{r['trainable']:,}",
                _mb(r["frozen_bytes"]),
                _mb(r["optimizer_bytes"]),
                _mb(r["file_bytes"]),
                f"{r['enable_flops'] / 1e12:.3g}",
                f"{r['step_to_floor']:.2f}",
                f"{r['step_to_lora']:.2f}",
                f"{r['step_to_lora_query_value']:.2f}",
                f"{r['total_bytes'] / 1e9:.1f}",
                f"{r['total_bytes_with_remat'] / 1e9:.1f}",
                *(_SIGNS[x] for x in r["fits"].values()),
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += _check_lines(result["check"])
    return "\n".join(lines) + "\n"


def _check_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## The check",
        "",
        "FLOPs by this count over XLA's own for the compiled step, and the "
        "activations of the formula over XLA's temporary bytes (which hold "
        "passing intermediates too).",
        "",
        "| | | GFLOP | XLA's | ratio | MB kept | XLA's temporary MB | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['where']} | {r['name']} | {r['flops'] / 1e9:.4g} | "
        f"{r['xla_flops'] / 1e9:.4g} | {r['flops_ratio']:.3f} | "
        f"{r['kept_bytes'] / 1e6:.4g} | {r['xla_temp_bytes'] / 1e6:.4g} | "
        f"{r['bytes_ratio']:.2f} |"
        for r in rows
    ]
    return lines


def _mb(size: int) -> str:
    return f"{size / 1e6:,.3g}" if size < 1e8 else f"{size / 1e6:,.0f}"


def main() -> None:
    """Runs the command."""
    parser = common.parser(__doc__.splitlines()[0], list(MODELS))
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens each")
    parser.add_argument(
        "--check-against",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder with results of the other benchmarks",
    )
    options = parser.parse_args()
    common.require_jax()
    keras.config.disable_interactive_logging()
    machine = common.machine()
    methods, left_out = common.methods_for(options.methods, options.rank)
    for config in {c.family: c for c in MODELS.values()}.values():
        check_matrices(config)
    result: dict[str, Any] = {
        "batch": options.batch,
        "length": options.length,
        "rank": options.rank,
        "machine": machine,
        "left_out": left_out,
        "devices_gb": DEVICES,
        "models": {},
    }
    models = dict(MODELS)
    if common.TINY in options.model:
        models[common.TINY] = dataclasses.replace(
            GEMMA3_270M, layers=2, width=64, inner=128, preset=None
        )
    for name in track(options.model, "Counting"):
        config = models[name]
        published = published_parameters(config)
        if published not in (None, config.parameters):
            raise AssertionError(
                f"{name}: {config.parameters:,} parameters by its config; "
                f"KerasHub publishes {published:,}."
            )
        result["models"][name] = {
            "config": dataclasses.asdict(config),
            "parameters": config.parameters,
            "published_parameters": published,
            "results": figures(
                config, methods, options.rank, options.batch, options.length
            ),
        }
    result["check"] = check_flops(options.check_against, methods, options.rank)
    page = markdown(result)
    print(page)
    common.write_json(options.results, "scale", result)
    path = options.results / "scale.md"
    path.write_text(page, encoding="utf-8")
    print(f"Written: {path}")
    worst = max((abs(r["flops_ratio"] - 1) for r in result["check"]), default=0)
    print(f"FLOPs differ from XLA's by {worst:.1%} at most.")


if __name__ == "__main__":
    main()
