"""Mixtures found from examples, prompts that choose, training by reward."""

import contextlib

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    assert_close,
    assert_differ,
    assert_same,
    compiles,
    numpy,
    perturb,
    tiny_gemma,
    tiny_gpt2,
    values,
)
from keras import ops
from test_interrupts import Raises

import keras_svdtune
from keras_svdtune import SVF, SVFT, LoRA, LoRAXS
from keras_svdtune.experts import dispatch, language, mixture, policy
from keras_svdtune.experts.language import a_third
from keras_svdtune.experts.mixture import Experts
from keras_svdtune.methods.svf import SVF as SVFMethod
from keras_svdtune.model.named_adapters import named_adapters
from keras_svdtune.model.names import adapter_set
from keras_svdtune.model.state import open_blocks, record_of
from keras_svdtune.model.targets import adapted_targets

NAMES = ("a", "b", "c")
RANDOM = np.random.default_rng(0)
# Prompts of two lengths, and what is to be said to them.
EXAMPLES = [
    tuple(RANDOM.integers(1, 32, n).tolist() for n in (3 + i % 2, 3))
    for i in range(6)
]


class Letters:
    """A preprocessor of 26 letters and a space, one token each."""

    LETTERS = "abcdefghijklmnopqrstuvwxyz "
    end_token_id, start_token_id = 1, 2

    def __init__(self):
        self.tokenizer = self

    def __call__(self, text):
        # Other signs are left out.
        text = text.lower().replace("\n", " ")
        return np.array([self.LETTERS.find(x) + 3 for x in text], "int32")[
            [x in self.LETTERS for x in text]
        ]

    def generate_preprocess(self, texts):
        rows = [[self.start_token_id, *self(x)] for x in texts]
        ids = np.zeros((len(rows), max(map(len, rows))), "int32")
        for row, found in zip(ids, rows, strict=True):
            row[: len(found)] = found
        return {"token_ids": ids, "padding_mask": ids > 0}

    def generate_postprocess(self, found):
        return [
            "".join(self.LETTERS[x - 3] for x in row if x > 2)
            for row in found["token_ids"]
        ]


def language_model(
    method=None, names=NAMES, text=False, targets=None, size=1.0
):
    """A small Gemma with adapters, the last of which is set."""
    lm = keras_hub.models.GemmaCausalLM(
        backbone=tiny_gemma(num_layers=1), preprocessor=None
    )
    if text:
        lm.preprocessor = Letters()
    lm.compile(keras.optimizers.Adam(0.01), sampler="top_k")
    for seed, name in enumerate(names):
        lm.backbone.enable_adapter(method or SVF(), targets, name=name)
        perturb(lm.backbone, seed, size)
    return lm


def everything(lm):
    """What a call must leave as it was."""
    return {
        "values": values(lm),
        "names": lm.backbone.adapter_names(),
        "chosen": str(record_of(lm.backbone).chosen),
        "within": str(open_blocks(lm.backbone)),
        "compiled": [str(id(lm.sampler)), str(id(lm.optimizer))],
        "functions": [
            str(id(lm.generate_function)),
            str(id(lm.train_function)),
        ],
        "weights": [v.path for v in lm.weights],
    }


def near(found, expected, tolerance):
    """Two numbers are equal within `tolerance`."""
    assert abs(float(found) - float(expected)) <= tolerance, (found, expected)


def mean_log_likelihood(lm, examples):
    """Of a token of the answers, through the model and NumPy's float64."""
    total, count = 0.0, 0
    for prompt, answer in examples:
        ids = np.array([[*prompt, *answer]])
        logits = numpy(
            lm({"token_ids": ids, "padding_mask": np.ones_like(ids)})
        ).astype("float64")[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for t in range(len(prompt), ids.shape[1]):
            total += log_p[t - 1, ids[0, t]]
            count += 1
    return total / count


# By gradient.


@pytest.mark.parametrize(
    "method", [SVF(), SVFT(off_diagonals=1), LoRAXS(rank=3)], ids=str
)
@pytest.mark.parametrize("per_layer", [False, True])
def test_gradient_of_the_weights(method, per_layer, monkeypatch):
    """Against differences of what the model computes with merged kernels."""
    lm = language_model(method, ("a", "b"), size=0.1)
    count = len(adapted_targets(lm.backbone)) if per_layer else 1
    experts = Experts.of(named_adapters(lm), ["a", "b"])
    seen = {}
    before = Experts.gradient

    def gradient(self, gradients, count):
        seen.setdefault("found", before(self, gradients, count))
        return seen["found"]

    monkeypatch.setattr(Experts, "gradient", gradient)
    searched = [x for i, x in enumerate(EXAMPLES) if i % 3 != 1]
    keras_svdtune.search_mixture(
        *(lm, ["a", "b"], searched),
        held_out=EXAMPLES[1::3],
        per_layer=per_layer,
        iterations=1,
    )
    found = seen["found"]
    assert found.shape == (2, count)

    def loss(alpha):
        experts.put(alpha)
        with keras_svdtune.adapter_merged(lm):
            return -mean_log_likelihood(lm, searched)

    def slope(k, c, h):
        alpha, step = np.full((2, count), 0.5), np.zeros((2, count))
        step[k, c] = h
        return (loss(alpha + step) - loss(alpha - step)) / (2 * h)

    for k, c in [(0, 0), (1, 0), (1, count - 1)]:
        # Without the error of second order.
        difference = (4 * slope(k, c, 0.02) - slope(k, c, 0.04)) / 3
        scale = np.abs(found).max()
        assert abs(found[k, c] - difference) < 1e-3 * scale, (k, c)


def test_the_best_of_the_held_out_examples_is_kept():
    lm = language_model()
    searched, held = EXAMPLES[:3], EXAMPLES[3:]
    before = everything(lm)
    found = keras_svdtune.search_mixture(
        lm, list(NAMES), searched, held_out=held, learning_rate=0.2
    )
    assert_same(everything(lm), before)
    held_out = [x.held_out for x in found.curve]
    assert found.best == int(np.argmax(held_out))
    assert len(found.curve) == min(50, found.best + 11)
    scores = [x.score for x in found.curve]
    assert max(scores) > scores[0]
    lm.backbone.set_adapter(found.weights)
    step = found.curve[found.best]
    near(mean_log_likelihood(lm, held), step.held_out, 1e-4)
    near(mean_log_likelihood(lm, searched), step.score, 1e-4)
    lm.backbone.set_adapter(dict.fromkeys(NAMES, 1 / 3))
    near(mean_log_likelihood(lm, held), held_out[0], 1e-4)


def test_the_mixture_that_made_the_answers_is_found():
    """A model of a known mixture says what is likely."""
    lm = language_model()
    truth = {"a": 0.9, "b": 0.1, "c": 0.4}
    lm.backbone.set_adapter(truth)
    answers = language.Answers(lm, keras_hub.samplers.RandomSampler(seed=1), 12)
    prompts = [RANDOM.integers(1, 32, 4).tolist() for _ in range(96)]
    examples = list(zip(prompts, answers(prompts, 16), strict=True))
    lm.backbone.set_adapter("c")
    found = keras_svdtune.search_mixture(
        lm, list(NAMES), examples, iterations=80, learning_rate=0.1
    )
    for name, weight in truth.items():
        assert abs(found.weights[name] - weight) < 0.2, found.weights


def test_a_mixture_is_an_adapter_like_any_other(tmp_path):
    lm = language_model()
    found = keras_svdtune.search_mixture(
        lm, list(NAMES), EXAMPLES, per_layer=True, iterations=4
    )
    paths = list(adapted_targets(lm.backbone))
    assert list(found.weights["a"]) == paths
    deltas = {
        name: {
            path: x["delta"]
            for path, x in named_adapters(lm)
            .stored(named_adapters(lm).now())[name]
            .weights.items()
        }
        for name in NAMES
    }
    with pytest.raises(ValueError, match="Mixture.add_to"):
        lm.backbone.set_adapter(found.weights)
    found.add_to(lm, "mix")
    assert lm.backbone.adapter_names() == [*NAMES, "mix"]
    for path, target in adapted_targets(lm.backbone).items():
        expected = sum(
            found.weights[name][path] * deltas[name][path].astype("float64")
            for name in NAMES
        )
        assert_close(numpy(target.adapted.delta), expected, 1e-6, path)
    tokens = {
        "token_ids": np.array([[3, 4, 5]]),
        "padding_mask": np.ones((1, 3)),
    }
    mixed = numpy(lm(tokens))
    lm.backbone.save_adapter(tmp_path / "mix.safetensors", name="mix")
    other = language_model(names=())
    other.backbone.load_adapter(tmp_path / "mix.safetensors")
    assert_same(numpy(other(tokens)), mixed)
    with pytest.raises(ValueError, match="has an adapter 'mix' already"):
        found.add_to(lm, "mix")
    pytest.importorskip("matplotlib")
    (image,) = found.plot().axes[1].images
    expected = [[*found.weights[name].values()] for name in NAMES]
    assert_close(np.asarray(image.get_array()), np.array(expected), 1e-6)
    assert "to" in str(found)


# By scores.


def answered_by(lm, weights):
    """The examples' prompts, with the answers of a mixture."""
    lm.backbone.set_adapter(weights)
    answers = language.Answers(lm, keras_hub.samplers.GreedySampler(), 4)
    prompts = [x for x, _ in EXAMPLES]
    right = [answers([x], 8)[0] for x in prompts]
    lm.backbone.set_adapter("c")
    return list(zip(prompts, right, strict=True))


def same_tokens(answer, right):
    return float(np.mean([a == b for a, b in zip(answer, right, strict=False)]))


def test_cross_entropy_finds_a_known_mixture():
    lm = language_model(size=0.2)
    truth = {"a": 1.0, "b": 0.2, "c": 0.0}
    examples = answered_by(lm, truth)
    before = everything(lm)
    searched = [x for i, x in enumerate(examples) if i % 3 != 1]
    found = keras_svdtune.search_mixture(
        *(lm, list(NAMES), searched, same_tokens),
        held_out=examples[1::3],
        max_new_tokens=4,
        iterations=8,
    )
    assert_same(everything(lm), before)
    for name, weight in truth.items():
        assert 0.0 <= found.weights[name] <= 1.0
        near(found.weights[name], weight, 0.2)
    best = found.curve[found.best]
    assert best.held_out == max(x.held_out for x in found.curve)
    assert best.score == 1.0 and best.held_out == 1.0, found.curve


def test_a_candidate_in_a_row_equals_it_alone():
    lm = language_model(names=("a", "b"))
    examples = EXAMPLES[:3]
    seen = []

    def score(answer, right):
        seen.append(answer)
        return 0.0

    candidates = []
    mixed = Experts.mixed

    def remember(self, alpha):
        candidates.append(alpha)
        return mixed(self, alpha)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts, "mixed", remember)
        keras_svdtune.search_mixture(
            *(lm, ["a", "b"], examples, score),
            population=4,
            max_new_tokens=3,
            iterations=1,
            per_layer=True,
        )
    (alpha,) = (x for x in candidates if x.any())
    assert alpha.shape == (4, 2, len(adapted_targets(lm.backbone)))
    assert np.array_equal(alpha[0], np.full(alpha.shape[1:], 0.5))
    answers = language.Answers(lm, keras_hub.samplers.GreedySampler(), 3)
    experts = Experts.of(named_adapters(lm), ["a", "b"])
    held = a_third(len(examples), seed=0)
    order = [examples[i] for i in np.argsort(held, kind="stable")]
    expected = []
    for prompt, _ in order:
        for each in alpha:
            experts.put(each)
            expected += answers([prompt], 7)
    assert seen == expected


def test_ties_are_broken_by_likelihood():
    lm = language_model()
    found = keras_svdtune.search_mixture(
        *(lm, list(NAMES), EXAMPLES, lambda answer, right: 0.0),
        population=16,
        max_new_tokens=2,
        iterations=6,
    )
    assert {x.score for x in found.curve} == {0.0}
    held = a_third(len(EXAMPLES), seed=0)
    searched = [x for x, out in zip(EXAMPLES, held, strict=True) if not out]
    lm.backbone.set_adapter(found.weights)
    better = mean_log_likelihood(lm, searched)
    lm.backbone.set_adapter(dict.fromkeys(NAMES, 1 / 3))
    assert better > mean_log_likelihood(lm, searched)


@pytest.mark.parametrize("score", [None, same_tokens])
def test_a_mixture_has_the_biases_of_the_base(score, monkeypatch):
    """And not those of the adapter that is set."""
    backbone = tiny_gpt2()
    lm = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    for name in NAMES:
        backbone.enable_adapter(SVF(), name=name, train_bias=True)
    beside = record_of(backbone).beside
    for bias, _ in beside.values():  # of "c", which is set
        bias.assign(bias + 0.3)
    seen = []
    before = Experts.mixed

    def mixed(self, alpha):
        seen.append({k: numpy(bias) for k, (bias, _) in beside.items()})
        return before(self, alpha)

    monkeypatch.setattr(Experts, "mixed", mixed)
    was = everything(lm)
    keras_svdtune.search_mixture(
        lm,
        ["a", "b"],
        EXAMPLES,
        score,
        iterations=1,
        population=4,
        max_new_tokens=3,
    )
    assert beside
    assert_same(seen[-1], {k: base for k, (_, base) in beside.items()})
    assert_same(everything(lm), was)


@pytest.mark.skipif(not compiles(), reason="torch compiles nothing")
@pytest.mark.parametrize("score", [None, same_tokens])
def test_nothing_is_compiled_anew_in_an_iteration(score, monkeypatch):
    lm = language_model(names=("a", "b"))
    calls = []
    call = SVFMethod.call

    def counted(self, weights, base):
        calls.append(1)
        return call(self, weights, base)

    monkeypatch.setattr(SVFMethod, "call", counted)

    def search(iterations):
        calls.clear()
        keras_svdtune.search_mixture(
            *(lm, ["a", "b"], EXAMPLES, score),
            population=4,
            max_new_tokens=2,
            iterations=iterations,
        )
        return len(calls)

    assert search(1) == search(4) > 0


def test_files_are_loaded_and_after_an_error_gone(tmp_path, monkeypatch):
    lm = language_model()
    files = {}
    for name in NAMES:
        files[name] = tmp_path / f"{name}.safetensors"
        lm.backbone.save_adapter(files[name], name=name)
    expected = keras_svdtune.search_mixture(
        lm, list(NAMES), EXAMPLES, iterations=3
    )
    # Beside another one, and in a plain model.
    beside, plain = language_model(names=("mine",)), language_model(names=())
    before = everything(beside)
    with monkeypatch.context() as patch:
        patch.setattr(Experts, "of", _interrupt)
        for model in (beside, plain):
            with pytest.raises(KeyboardInterrupt):
                keras_svdtune.search_mixture(model, files, EXAMPLES)
    assert_same(everything(beside), before)
    assert plain.backbone.adapter_names() == []
    for model in (beside, plain):
        found = keras_svdtune.search_mixture(
            model, files, EXAMPLES, iterations=3
        )
        for name in NAMES:
            near(found.weights[name], expected.weights[name], 1e-4)
    assert beside.backbone.adapter_names() == ["mine", *NAMES]
    assert str(record_of(beside.backbone).chosen) == before["chosen"]
    assert record_of(plain.backbone).chosen == {}


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("score", [None, same_tokens])
@pytest.mark.parametrize("where", ["mixed", "put", "MixtureStep"])
def test_an_interrupted_search_leaves_the_model(score, where, monkeypatch):
    lm = language_model(names=("a", "b"))
    lm.generate(_prompts(), stop_token_ids=None)
    before = everything(lm)
    if where == "MixtureStep":
        monkeypatch.setattr(mixture, "MixtureStep", _interrupt)
    else:
        monkeypatch.setattr(Experts, where, _interrupt)
    raises = (
        contextlib.nullcontext()
        if where == "put" and score is not None
        else pytest.raises(KeyboardInterrupt)
    )
    with raises:
        keras_svdtune.search_mixture(
            *(lm, ["a", "b"], EXAMPLES, score),
            population=4,
            max_new_tokens=2,
            iterations=1,
        )
    assert_same(everything(lm), before)


def test_an_interrupt_on_any_line_leaves_the_model(monkeypatch):
    """Of this file and of what it calls, one new line after another."""
    lm = language_model(names=("a", "b"), targets=[".*query"])
    before = everything(lm)
    monkeypatch.setattr(
        "test_interrupts.FILES",
        {mixture.__file__, language.__file__},
    )
    lines = 0
    for number in range(1, 400, 23):
        with contextlib.suppress(KeyboardInterrupt), Raises(number) as raises:
            keras_svdtune.search_mixture(
                *(lm, ["a", "b"], EXAMPLES[:3], same_tokens),
                population=4,
                max_new_tokens=2,
                iterations=1,
            )
        assert_same(everything(lm), before, str(number))
        lines = max(lines, len(raises.lines))
        if len(raises.lines) < number:
            break
    assert lines > 100


def _prompts():
    ids = np.array([[3, 4, 5, 0, 0], [6, 7, 0, 0, 0]])
    return {"token_ids": ids, "padding_mask": ids > 0}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: (m.backbone, ["a"], EXAMPLES), "keras_hub.models.CausalLM"),
        (lambda m: (m, ["x"], EXAMPLES), "no adapter 'x'"),
        (lambda m: (m, "ab", EXAMPLES), "must be a list of names"),
        (lambda m: (m, [], EXAMPLES), "must be a list of names"),
        (lambda m: (m, {"a": "a.safetensors"}, EXAMPLES), "'a' already"),
        (lambda m: (m, ["a"], EXAMPLES[:1]), "Received: 1 and 0"),
    ],
)
def test_what_is_refused(call, message):
    lm = language_model(names=("a", "b"), targets=[".*query"])
    before = everything(lm)
    with pytest.raises(ValueError, match=message):
        keras_svdtune.search_mixture(*call(lm))
    assert_same(everything(lm), before)


def test_methods_whose_sum_is_not_exact_are_refused():
    lm = language_model(LoRA(rank=2), ("a", "b"), targets=[".*query"])
    with pytest.raises(ValueError, match="not linear in what it trains"):
        keras_svdtune.search_mixture(lm, ["a", "b"], EXAMPLES)


# Prompts that choose.


def dispatcher(**kwargs):
    lm = language_model(names=("sea", "law"), text=True)
    return keras_svdtune.Dispatcher(
        lm,
        {"sea": "ships", "law": "courts"},
        template="about {experts} {prompt} is",
        **kwargs,
    )


def test_scores_are_those_of_the_base():
    ours = dispatcher()
    lm = ours.model
    before = everything(lm)
    prompts = ["a ship", "judges", "hi all"]
    found = ours.scores(prompts)
    assert_same(everything(lm), before)
    assert found.shape == (3, 3)
    lm.backbone.set_adapter(None)
    letters = Letters()
    listed = "sea: ships\nlaw: courts\nother: none of these"

    def likelihood(prompt, name):
        start = [2, *letters(f"about {listed} {prompt} is")]
        label = letters(f" {name}").tolist()
        mean = mean_log_likelihood(lm, [(start, label)])
        return mean * len(label)

    for row, prompt in zip(found, prompts, strict=True):
        for value, name in zip(row, ("sea", "law", "other"), strict=True):
            expected = likelihood(prompt, name) - likelihood("N/A", name)
            assert abs(value - expected) < 1e-3
    names = [["sea", "law", None][i] for i in found.argmax(-1)]
    assert ours.choose(prompts) == names


def test_each_prompt_is_answered_by_the_one_it_chose(monkeypatch):
    ours = dispatcher()
    lm = ours.model
    lm.compile(sampler="greedy")
    lm.preprocessor = None
    prompts = _prompts()
    alone = {}
    for name in ("law", None):
        lm.backbone.set_adapter(name)
        alone[name] = lm.generate(_prompts(), stop_token_ids=None)["token_ids"]
    assert_differ(alone["law"], alone[None])
    monkeypatch.setattr(ours, "choose", lambda prompts: [None, "law"])
    monkeypatch.setattr(dispatch, "_checked", lambda prompts: prompts)
    found = ours.generate(prompts, stop_token_ids=None)["token_ids"]
    assert np.array_equal(found[0], alone[None][0])
    assert np.array_equal(found[1], alone["law"][1])


def test_a_classifier_learns_to_choose():
    ours = dispatcher()
    lm = ours.model
    before = everything(lm)
    random = np.random.default_rng(0)

    def words(letters):
        return "".join(random.choice(list(letters), 6))

    kinds = {"sea": "abc", "law": "xyz", None: "mno"}
    names = [n for _ in range(24) for n in kinds]
    random.shuffle(names)
    history = ours.fit(
        [words(kinds[x]) for x in names], names, 40, learning_rate=0.05
    )
    assert max(history.history["val_accuracy"]) > 0.9
    after = everything(lm)
    assert lm.backbone.adapter_names() == ["sea", "law", "dispatcher"]
    assert_same(after | {"names": before["names"]}, before)
    new = [words(kinds[x]) for x in names]
    chosen = ours.choose(new)
    right = [a == b for a, b in zip(chosen, names, strict=True)]
    assert np.mean(right) > 0.85
    assert_same(everything(lm), after)
    # Again, and interrupted.
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
    ):
        patch.setattr(dispatch, "_classifier", _interrupt)
        ours.fit(new, names)
    assert_same(everything(lm), after)
    assert ours.choose(new) == chosen
    # Again, to the end.
    ours.fit(new, names, 1)
    assert lm.backbone.adapter_names() == ["sea", "law", "dispatcher_2"]


def test_dispatchers_keep_what_is_not_theirs():
    lm = language_model(names=("sea", "dispatcher"), text=True)
    prompts, names = ["abc", "xyz", "cba", "zyx"], ["sea", None] * 2
    experts = [
        keras_svdtune.Dispatcher(lm, {"sea": "waves", "dispatcher": "trains"})
        for _ in range(2)
    ]
    theirs = adapter_values(lm, "dispatcher")
    experts[0].fit(prompts, names, 2, learning_rate=0.05)
    first = adapter_values(lm, "dispatcher_2")
    chosen = experts[0].choose(prompts)
    experts[1].fit(prompts, names[::-1], 2, learning_rate=0.05)
    assert_same(adapter_values(lm, "dispatcher"), theirs)
    assert_same(adapter_values(lm, "dispatcher_2"), first)
    assert experts[0].choose(prompts) == chosen
    lm.backbone.delete_adapter("dispatcher_2")
    with pytest.raises(ValueError, match="'dispatcher_2'.* was deleted"):
        experts[0].choose(prompts)


def adapter_values(lm, name):
    """The own weights of one adapter, by path and name."""
    with adapter_set(lm, name):
        return named_adapters(lm).now().weights


def test_what_a_dispatcher_refuses():
    lm = language_model(names=("a", "b"), targets=[".*query"])
    with pytest.raises(ValueError, match="no preprocessor"):
        keras_svdtune.Dispatcher(lm, {"a": "x"})
    lm.preprocessor = Letters()
    for kwargs, message in (
        ({"experts": {"x": "y"}}, "no adapter 'x'"),
        ({"experts": {"a": "y"}, "none": "a"}, "no expert's name"),
        ({"experts": {"a": "y"}, "template": "{prompt}"}, "must have"),
    ):
        with pytest.raises(ValueError, match=message):
            keras_svdtune.Dispatcher(lm, **kwargs)
    ours = keras_svdtune.Dispatcher(lm, {"a": "y"})
    for call, message in (
        (lambda: ours.choose("text"), "must be a list of texts"),
        (lambda: ours.fit(["x", "y"], ["a", "z"]), "no expert 'z'"),
        (lambda: ours.fit(["x", "y"], ["a"]), "a name for each"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# By reward.


def test_advantages_leave_one_out():
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    found = policy.leave_one_out(rewards)
    for i, row in enumerate(rewards):
        for j, reward in enumerate(row):
            others = np.delete(row, j).mean()
            assert abs(found[i, j] - (reward - others)) < 1e-12
    assert not policy.leave_one_out(np.ones((2, 3))).any()


def test_the_loss_against_numpy():
    random = np.random.default_rng(0)
    log_pi, log_base = -random.exponential(size=(2, 4, 6))
    answer = (random.random((4, 6)) < 0.6).astype("float32")
    advantages = random.normal(size=4)
    loss, distance = policy.policy_loss(
        *(ops.cast(x, "float32") for x in (log_pi, log_base)),
        *(ops.cast(x, "float32") for x in (answer, advantages)),
        kl=0.3,
    )
    total = expected = 0.0
    for row in range(4):
        for t in range(6):
            if answer[row, t]:
                total -= advantages[row] * log_pi[row, t] / 4
                d = log_base[row, t] - log_pi[row, t]
                expected += (np.exp(d) - 1 - d) / answer.sum()
    near(numpy(distance), expected, 1e-5)
    near(numpy(loss), total + 0.3 * expected, 1e-5)


def test_the_distance_estimates_the_divergence():
    """The mean of exp(d) - 1 - d over samples of π is KL(π, π₀)."""
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(8), size=2)
    p, q = 0.5 * p + 0.0625, 0.5 * q + 0.0625
    drawn = random.choice(8, 200_000, p=p)
    answer = np.ones((1, len(drawn)), "float32")
    _, found = policy.policy_loss(
        *(ops.cast(np.log(x)[drawn][None], "float32") for x in (p, q)),
        *(ops.cast(answer, "float32"), ops.zeros((1,))),
        kl=1.0,
    )
    exact = float(np.sum(p * np.log(p / q)))
    assert abs(float(numpy(found)) - exact) < 0.02 * exact


def wanted(prompt, answer):
    """The share of even tokens."""
    return float(np.mean([x % 2 == 0 for x in answer]))


PROMPTS = [x for x, _ in EXAMPLES]


def expected_reward(lm):
    """Of answers of one token, by the likelihoods of all of them."""
    found = []
    for prompt in PROMPTS:
        ids = np.array([prompt])
        logits = numpy(
            lm({"token_ids": ids, "padding_mask": np.ones_like(ids)})
        ).astype("float64")[0, -1]
        p = np.exp(logits) / np.exp(logits).sum()
        found.append(p[::2].sum())
    return float(np.mean(found))


@pytest.mark.parametrize("method", [SVF(), LoRA(rank=2)], ids=str)
def test_a_reward_rises(method):
    lm = language_model(method, names=("a",), size=0.0)
    lm.compile(keras.optimizers.Adam(0.1), sampler="top_k")
    lm.generate(_prompts(), stop_token_ids=None)
    sampler, function = lm.sampler, lm.generate_function
    base = [numpy(v) for v in lm.non_trainable_variables]
    before, seen = expected_reward(lm), []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs)

    history = keras_svdtune.train_policy(
        lm,
        PROMPTS,
        wanted,
        validation=PROMPTS[:2],
        epochs=16,
        batch_size=6,
        answers=8,
        kl=0.01,
        max_new_tokens=1,
        callbacks=[Watch()],
    ).history
    assert set(history) == {"loss", "reward", "kl", "val_reward"}
    assert len(seen) == 16
    assert expected_reward(lm) > before + 0.06
    # At the first step π is the base.
    assert abs(history["kl"][0]) < 1e-6 < history["kl"][-1]
    assert lm.sampler is sampler and lm.generate_function is function
    assert_same([numpy(v) for v in lm.non_trainable_variables], base)
    assert int(lm.optimizer.iterations.value) == 16


def test_a_step_is_down_the_gradient():
    """Of the samples that it drew, by differences, with SGD of rate 1."""
    lm = language_model(names=("a",), targets=[".*query"], size=0.05)
    rate = 0.01
    lm.compile(keras.optimizers.SGD(rate))
    (target,) = adapted_targets(lm.backbone).values()
    delta = target.adapted.delta
    before = numpy(delta.variable).copy()
    seen = []

    def reward(prompt, answer):
        seen.append((prompt, answer))
        return wanted(prompt, answer)

    keras_svdtune.train_policy(
        lm, PROMPTS[:2], reward, answers=3, kl=0.5, max_new_tokens=3
    )
    moved = (before - numpy(delta.variable)) / rate
    rewards = np.array([wanted(*x) for x in seen]).reshape(2, 3)
    advantages = policy.leave_one_out(rewards).ravel()

    def logs():
        rows = []
        for prompt, answer in seen:
            ids = np.array([[*prompt, *answer]])
            logits = numpy(
                lm({"token_ids": ids, "padding_mask": np.ones_like(ids)})
            ).astype("float64")[0]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            steps = range(len(prompt), ids.shape[1])
            rows.append([log_p[t - 1, ids[0, t]] for t in steps])
        return np.array(rows)

    delta.variable.assign(np.zeros_like(before))
    base = logs()

    def loss(value):
        delta.variable.assign(value)
        found = logs()
        d = base - found
        distance = np.mean(np.exp(d) - 1 - d)
        return 0.5 * distance - np.mean(advantages * found.sum(-1))

    def slope(i, h):
        step = h * np.eye(len(before), dtype="float32")[i]
        return (loss(before + step) - loss(before - step)) / (2 * h)

    for i in range(len(before)):
        expected = (4 * slope(i, 5e-4) - slope(i, 1e-3)) / 3
        near(moved[i], expected, 5e-3 * np.abs(moved).max())


def test_callbacks_stop_it():
    lm = language_model(names=("a",), targets=[".*query"])
    before = values(lm)
    stop = keras.callbacks.EarlyStopping(
        "val_reward", mode="max", patience=1, restore_best_weights=True
    )
    history = keras_svdtune.train_policy(
        *(lm, PROMPTS[:2], lambda prompt, answer: 0.1),
        validation=PROMPTS[:1],
        epochs=9,
        answers=2,
        max_new_tokens=2,
        callbacks=[stop],
    ).history
    assert history["val_reward"] == [0.1, 0.1]
    # No answer was better than another one, so there was nothing to learn.
    assert_same(values(lm), before)
    assert int(lm.optimizer.iterations.value) == 0


@pytest.mark.skipif(not compiles(), reason="torch compiles nothing")
def test_a_step_compiles_nothing_anew(monkeypatch):
    lm = language_model(names=("a",))
    calls = []
    call = SVFMethod.call

    def counted(self, weights, base):
        calls.append(1)
        return call(self, weights, base)

    monkeypatch.setattr(SVFMethod, "call", counted)

    def train(epochs):
        calls.clear()
        keras_svdtune.train_policy(
            *(lm, PROMPTS, wanted),
            epochs=epochs,
            answers=2,
            max_new_tokens=2,
            batch_size=3,
        )
        return len(calls)

    assert train(1) == train(3) > 0


def test_what_training_by_reward_refuses():
    lm = language_model(names=())
    with pytest.raises(ValueError, match="has no adapter"):
        keras_svdtune.train_policy(lm, PROMPTS, wanted)
    lm.backbone.enable_svf([".*query"])
    adam = keras.optimizers.Adam()
    lm.compile(keras.optimizers.LossScaleOptimizer(adam))
    for kwargs, message in (
        ({"answers": 1}, "answers"),
        ({"kl": -1.0}, "kl"),
        ({"prompts": []}, "a prompt to train on"),
        ({}, "LossScaleOptimizer"),
    ):
        with pytest.raises(ValueError, match=message):
            keras_svdtune.train_policy(
                **({"model": lm, "prompts": PROMPTS, "reward": wanted} | kwargs)
            )
