"""Finds from a few examples how much of each adapter a task wants.

The adapters of a mixture are fixed, and only their weights α are looked for:
by the gradient of the likelihood of right answers, or, for a score that has no
gradient, by the cross-entropy method.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import keras_hub
import numpy as np
from keras import ops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from keras_svdtune.adapter.stepped import Stepped, variable_of
from keras_svdtune.experts.language import (
    Answers,
    Text,
    Tokens,
    a_third,
    answer_ids,
    as_texts,
    check_language_model,
    log_likelihoods,
    padded,
    prompt_ids,
)
from keras_svdtune.files.format import SavedAdapter
from keras_svdtune.files.save_load import load_adapter
from keras_svdtune.methods.settings import check_number, check_whole_number
from keras_svdtune.model.enable import remove_adapter
from keras_svdtune.model.for_a_while import (
    Tables,
    check_by_example,
    values_back,
    weights_by_row,
)
from keras_svdtune.model.named_adapters import (
    NamedAdapters,
    check_name,
    named_adapters,
)
from keras_svdtune.model.names import (
    adapter_names,
    delete_adapter,
    set_adapter,
)
from keras_svdtune.model.state import StoredAdapter
from keras_svdtune.reports.plot_spectrum import matplotlib_module
from keras_svdtune.runtime.interrupts import run_to_the_end
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.programs import compiled, with_gradients
from keras_svdtune.runtime.types import Model, Tensor

# A prompt and its right answer.
Example = tuple[Text, Text]
# Says how good an answer is, given the right one: the more the better.
Score = Callable[[Any, Any], float]
Weights = dict[str, float] | dict[str, dict[str, float]]

# Iterations without a better held-out score, after which a search stops.
_PATIENCE = 10
# The standard deviation of the first candidates.
_SIGMA = 0.5
# The share of the candidates that the next ones are drawn around: 6 of 32.
_ELITE = 6 / 32

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MixtureStep:
    """One iteration of `search_mixture`.

    Attributes:
        score: on the examples that are searched by, the more the better: the
            mean log-likelihood of a token of a right answer, or the mean of
            the user's score.
        held_out: the same on the held-out examples, which decide.
    """

    score: float
    held_out: float


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What `search_mixture` found.

    Attributes:
        weights: the weight of each adapter by name; or, if there is one for
            each layer, a dict by layer path for each name.
        curve: `MixtureStep` of each iteration.
        best: int, the index of the iteration whose weights these are: the one
            with the best held-out score.
    """

    weights: Weights
    curve: tuple[MixtureStep, ...]
    best: int

    def __str__(self) -> str:
        shares = []
        for name, weight in self.weights.items():
            if isinstance(weight, dict):
                low, high = min(weight.values()), max(weight.values())
                shares.append(f"{low:.2f} to {high:.2f} {name}")
            else:
                shares.append(f"{weight:.2f} {name}")
        return (
            f"{' + '.join(shares)}: held-out score "
            f"{self.curve[self.best].held_out:.4g} in iteration "
            f"{self.best + 1} of {len(self.curve)}"
        )

    def add_to(self, model: Model, name: str) -> None:
        """Makes the mixture an adapter of a model, and sets it.

        ΔW = Σ α · ΔW of each; it trains, and is saved, like any other.

        Args:
            model: a model that has the adapters of the mixture.
            name: the name of the new adapter.

        Raises:
            ValueError: the model lacks one of the adapters, or has one of
                this name. It stays as it was.
        """
        check_name(name)
        named = named_adapters(model)
        if name in named.record.names:
            raise ValueError(
                f"Model '{named.owner.name}' has an adapter '{name}' already."
            )
        experts = Experts.of(named, self.weights)
        weights = np.array(
            [
                [x[path] for path in named.targets]
                if isinstance(x, dict)
                else [x]
                for x in self.weights.values()
            ]
        )
        named.add(name, experts.whole(weights), {}, None)

    def plot(self) -> "Figure":
        """Plots the scores by iteration, and the weights.

        Returns:
            A `matplotlib.figure.Figure`, which is not shown.

        Raises:
            ImportError: matplotlib is not installed; it is an extra of this
                package, `pip install "keras_svdtune[plot]"`.
        """
        plt = matplotlib_module("pyplot", "Mixture.plot")
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, 3.4), layout="constrained"
        )
        iterations = range(len(self.curve))
        left.plot(iterations, [x.score for x in self.curve], label="searched")
        held_out = [x.held_out for x in self.curve]
        left.plot(iterations, held_out, label="held out")
        left.plot(self.best, held_out[self.best], "o", color="C1")
        left.set(xlabel="iteration", ylabel="score")
        left.legend(frameon=False)
        by_layer = [
            [*x.values()] for x in self.weights.values() if isinstance(x, dict)
        ]
        if by_layer:
            # Colours: the weights of neighbours differ too much for lines.
            largest = float(np.abs(by_layer).max()) or 1.0
            image = right.imshow(
                by_layer,
                aspect="auto",
                interpolation="nearest",
                cmap="RdBu_r",
                vmin=-largest,
                vmax=largest,
            )
            right.set_yticks(range(len(by_layer)), [*self.weights])
            right.set_xlabel("layer")
            figure.colorbar(image, ax=right, label="weight")
        else:
            right.bar([*self.weights], [*self.weights.values()])
            right.set_ylabel("weight")
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
        plt.close(figure)  # or a notebook would show it twice
        return figure


def search_mixture(
    model: Model,
    adapters: Mapping[str, str | os.PathLike[str] | SavedAdapter]
    | Sequence[str],
    examples: Sequence[Example],
    score: Score | None = None,
    *,
    held_out: Sequence[Example] | None = None,
    per_layer: bool = False,
    iterations: int = 50,
    learning_rate: float = 0.05,
    population: int = 32,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> Mixture:
    """Searches the weights α of a sum of adapters that suits a few examples.

    With ΔW_k what the k-th of K adapters adds to W,

        W' = W + Σ_k α_k·ΔW_k,        α (K,), or (K, layers) by `per_layer`.

    Without a `score` it is searched by gradient. With y the tokens of the
    right answers, N of them in all,

        L = -1/N · Σ log π(y),        ∂L/∂α_k = Σ ⟨∂L/∂δ, δ_k⟩

    where δ = Σ α_k·δ_k is what the method trains, and Adam starts at α = 1/K;
    a weight may become negative, or larger than 1. Every token counts the same,
    so that long answers count more than short ones.

    A `score` may be any Python function of an answer, such as whether it is
    the right one to the letter. Then it is searched by the cross-entropy
    method, as in Transformers²: `population` candidates α in [0, 1] are drawn
    around a mean that starts at 1/K, with a standard deviation that starts at
    0.5; both become those of the best 6 of 32, by the mean score of the greedy
    answers, and among equal scores by the likelihood of the right ones. The
    first candidate is the mean itself. All candidates answer together, each a
    row of one batch.

    A third of the examples, drawn by `seed`, or `held_out`, is not searched by.
    Of all iterations the one with the best held-out score is kept, and after
    10 without a better one the search stops. So that score is too good:
    measure on other examples what you report.

    At the end, also after an error or an interrupt, the model is as before:
    what is set, its optimizer, its sampler and its compiled functions. Only
    files that a search to its end has loaded are there.

    Args:
        model: a `keras_hub.models.CausalLM` that takes text.
        adapters: names of adapters that the model has, or a dict from name to
            file. Files are loaded beside the adapters that there are, and stay
            loaded if the search comes to its end.
        examples: pairs of a prompt and its right answer, as `generate` takes
            and returns them: texts; or lists of tokens, without a preprocessor.
        score: function from (answer, right answer) to a number, the more the
            better. None: the log-likelihood of the right answer.
        held_out: examples to choose by. None: a third of `examples`.
        per_layer: whether each adapter has a weight for each layer.
        iterations: int, how many at most.
        learning_rate: float, of the search by gradient.
        population: int, candidates of the cross-entropy method; at least 4.
        max_new_tokens: int, after how many tokens an answer that is scored
            ends at the latest.
        seed: int, of the candidates and of what is held out.

    Returns:
        `Mixture`: the weights, the scores of all iterations, a plot.

    Raises:
        ValueError: the model is no language model, or has no such adapter; the
            method cannot add up, as for `set_adapter`; there are fewer than
            two examples, or a number is out of range.

    Example:

    ```python
    files = {"math": "math.safetensors", "code": "code.safetensors"}
    mixture = keras_svdtune.search_mixture(
        gemma,
        files,
        [("What is 2 + 3?", "5"), ("What is 4 + 4?", "8")],
        score=lambda answer, right: float(answer.strip() == right),
    )
    mixture.add_to(gemma, "both")
    gemma.save_adapter("both.safetensors", name="both")
    ```

    Reference: Sun, Cetin, Tang 2025 (Transformers²),
    https://arxiv.org/abs/2501.06252.
    """
    check_language_model(model)
    iterations = check_whole_number("iterations", iterations, 1)
    population = check_whole_number("population", population, 4)
    new_tokens = check_whole_number("max_new_tokens", max_new_tokens, 1)
    seed = check_whole_number("seed", seed, 0)
    check_number("learning_rate", learning_rate, 0.0)
    searched, held = _split(examples, held_out, seed)
    with _loaded(model, adapters) as names:
        named = named_adapters(model)
        experts = Experts.of(named, names)
        count = len(named.targets) if per_layer else 1
        # Without a score the model does not answer itself.
        own = 0 if score is None else new_tokens
        shots = Shots.of(model, searched, held, own)
        if score is None:
            found = _by_gradient(
                model, experts, shots, count, iterations, learning_rate
            )
        else:
            check_by_example(named)
            found = _by_cross_entropy(
                *(model, experts, shots, count, iterations),
                *(population, score, new_tokens, seed),
            )
        _log.info("%s", found)
        return found


def _split(
    examples: Sequence[Example],
    held_out: Sequence[Example] | None,
    seed: int,
) -> tuple[list[Example], list[Example]]:
    """Returns the examples to search by, and those to choose by."""
    searched = list(examples)
    if held_out is None:
        apart = a_third(len(searched), seed)
        held = [x for x, out in zip(searched, apart, strict=True) if out]
        searched = [
            x for x, out in zip(searched, apart, strict=True) if not out
        ]
    else:
        held = list(held_out)
    if not searched or not held:
        raise ValueError(
            "A search needs an example to search by and another one to choose "
            f"by. Received: {len(searched)} and {len(held)}"
        )
    return searched, held


@contextlib.contextmanager
def _loaded(
    model: Model,
    adapters: Mapping[str, str | os.PathLike[str] | SavedAdapter]
    | Sequence[str],
) -> Iterator[list[str]]:
    """Loads files beside the model's adapters; an error within undoes that.

    What was set before is set again in any case.
    """
    if isinstance(adapters, str) or not len(adapters):
        raise ValueError(
            "`adapters` must be a list of names, or a dict from names to "
            f"files, not empty. Received: {adapters!r}"
        )
    if not isinstance(adapters, Mapping):
        yield list(adapters)
        return
    before = adapter_names(model)
    chosen = dict(named_adapters(model).record.chosen) if before else {}
    taken = sorted(set(before) & set(adapters))
    if taken:
        raise ValueError(
            f"The model has an adapter '{taken[0]}' already. Load the files "
            "first, and give the names of all as a list."
        )

    def forget() -> None:
        for name in adapter_names(model):
            if name not in before and len(adapter_names(model)) > 1:
                delete_adapter(model, name)
            elif name not in before:
                remove_adapter(model)
        if before:
            set_adapter(model, chosen or None)

    with contextlib.ExitStack() as undo:
        undo.callback(run_to_the_end, [forget])
        for name, file in adapters.items():
            load_adapter(model, file, name=name)
        set_adapter(model, chosen or None)
        yield list(adapters)
        undo.pop_all()


@dataclasses.dataclass(frozen=True)
class Experts:
    """What the adapters of a mixture train, ready to be added up.

    Attributes:
        named: the adapters of the model.
        names: of those in the mixture.
        values: (K, ...) for each trained weight, by path and name.
        half: what the model has where the weight of each is 0.5.
    """

    named: NamedAdapters
    names: list[str]
    values: Tables
    half: StoredAdapter

    @staticmethod
    def of(named: NamedAdapters, names: Iterable[str]) -> "Experts":
        """Returns the experts of these names, if they add up.

        Raises:
            ValueError: as for `set_adapter` with the weights of a sum.
        """
        names = list(dict.fromkeys(names))
        # Not 1: that would be an adapter by itself, which need not add up.
        weights = named.checked(dict.fromkeys(names, 0.5))
        stored = named.stored(named.now())
        half = named.values_of(weights, stored)
        values: Tables = {}
        for path, target in named.targets.items():
            adapter = target.adapted
            values[path] = {
                weight.name: np.stack(
                    [stored[x].weights[path][weight.name] for x in names]
                )
                for weight in adapter.method.weights(adapter.shape)
                if weight.trainable
            }
        return Experts(named, names, values, half)

    def mixed(self, alpha: np.ndarray) -> Tables:
        """Returns Σ_k α_k·δ_k by path and name.

        Args:
            alpha: (..., K, 1), or (..., K, layers).
        """
        found: Tables = {}
        for i, (path, own) in enumerate(self.values.items()):
            weights = alpha[..., i % alpha.shape[-1]]
            found[path] = {
                name: np.tensordot(weights, x.astype("float64"), 1).astype(
                    "float32"
                )
                for name, x in own.items()
            }
        return found

    def whole(self, alpha: np.ndarray) -> Tables:
        """Returns all weights of the mixture as those of an adapter."""
        mixed = self.mixed(alpha)
        return {path: self.half.weights[path] | x for path, x in mixed.items()}

    @contextlib.contextmanager
    def searching(self) -> Iterator[None]:
        """Temporarily sets a mixture, so that `put` changes only its weights.

        What is set before may have biases or a head of its own, and a mixture
        has those of the base.
        """
        with values_back(self.named):
            self.named.put(self.half)
            yield

    def put(self, alpha: np.ndarray) -> None:
        """Assigns a mixture to the variables of the model."""
        for path, own in self.mixed(alpha).items():
            for name, value in own.items():
                getattr(self.named.targets[path].adapted, name).assign(value)

    def gradient(
        self, gradients: Mapping[int, Tensor], count: int
    ) -> np.ndarray:
        """Returns ∂L/∂α (K, count), given ∂L/∂v by the id of the variable."""
        found = np.zeros((len(self.names), count))
        for i, (path, own) in enumerate(self.values.items()):
            for name, values in own.items():
                weight = getattr(self.named.targets[path].adapted, name)
                step = weight.step if isinstance(weight, Stepped) else 1.0
                of_variable = to_numpy(gradients[id(variable_of(weight))])
                of_weight = of_variable.astype("float64") / step
                axes = of_weight.ndim
                found[:, i % count] += np.tensordot(values, of_weight, axes)
        return found

    def found(
        self, alpha: np.ndarray, curve: list[MixtureStep], best: int
    ) -> Mixture:
        """Returns the result of a search."""
        paths = list(self.named.targets)
        weights: Weights = {
            name: dict(zip(paths, map(float, own), strict=True))
            if len(own) > 1
            else float(own[0])
            for name, own in zip(self.names, alpha, strict=True)
        }  # type: ignore[assignment]
        return Mixture(weights, tuple(curve), best)


@dataclasses.dataclass(frozen=True)
class Shots:
    """The examples of a search, as tokens.

    Attributes:
        prompts: their tokens.
        answers: the tokens of the right answers.
        right: the right answers, as they came.
        searched: how many of them, the first ones, are searched by.
        length: of a row with a prompt and any answer.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    right: list[Text]
    searched: int
    length: int

    @staticmethod
    def of(
        model: Model,
        searched: list[Example],
        held: list[Example],
        new_tokens: int,
    ) -> "Shots":
        right = [answer for _, answer in [*searched, *held]]
        prompts = prompt_ids(model, [x for x, _ in [*searched, *held]])
        answers = answer_ids(model, right)
        longest = max(new_tokens, *map(len, answers))
        length = max(map(len, prompts)) + longest
        return Shots(prompts, answers, right, len(searched), length)

    def tokens(self) -> Tokens:
        """Returns all of them with their right answers."""
        return padded(self.prompts, self.answers, self.length)


class _Progress:
    """The scores of a search so far, behind a progress bar."""

    def __init__(self, iterations: int) -> None:
        self.curve: list[MixtureStep] = []
        self.best = 0
        self._keys: list[tuple[float, ...]] = []
        self._bar = keras.utils.Progbar(
            iterations,
            verbose=int(keras.config.is_interactive_logging_enabled()),
            stateful_metrics=("score", "held_out"),
            unit_name="iteration",
        )

    def is_best(self, step: MixtureStep, likelihood: float = 0.0) -> bool:
        """Notes an iteration; says whether it is the best so far."""
        self.curve.append(step)
        self._keys.append((step.held_out, likelihood))
        new = len(self._keys) == 1 or self._keys[-1] > self._keys[self.best]
        if new:
            self.best = len(self._keys) - 1
        self._bar.update(
            len(self.curve),
            values=[("score", step.score), ("held_out", step.held_out)],
            finalize=self.stopped or None,
        )
        return new

    @property
    def stopped(self) -> bool:
        """Whether the held-out score has not become better for long."""
        return len(self.curve) - 1 - self.best >= _PATIENCE


def _by_gradient(
    model: Model,
    experts: Experts,
    shots: Shots,
    count: int,
    iterations: int,
    learning_rate: float,
) -> Mixture:
    """Searches by the gradient of the likelihood of the right answers."""
    tokens = shots.tokens()
    is_searched = np.arange(len(shots.right)) < shots.searched
    size = tokens.answer.sum(axis=-1)

    def function(
        ids: Tensor, mask: Tensor, answer: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = log_likelihoods(model, ids, mask, answer)
        return -ops.sum(found * weight), found

    step = with_gradients(model, function)
    weight = (is_searched / size[is_searched].sum()).astype("float32")
    names = len(experts.names)
    optimizer = keras.optimizers.Adam(learning_rate)
    alpha = keras.Variable(
        np.full((names, count), 1.0 / names), dtype="float32", name="alpha"
    )
    progress = _Progress(iterations)
    best = to_numpy(alpha.value)
    with experts.searching():
        for _ in range(iterations):
            now = to_numpy(alpha.value).copy()
            experts.put(now)
            _, found, gradients = step(*tokens.arrays, weight)
            found = to_numpy(found)
            score, held = (
                float(found[x].sum() / size[x].sum())
                for x in (is_searched, ~is_searched)
            )
            if progress.is_best(MixtureStep(score, held)):
                best = now
            if progress.stopped:
                break
            by_id = {
                id(v): g
                for v, g in zip(
                    model.trainable_variables, gradients, strict=True
                )
            }
            gradient = experts.gradient(by_id, count).astype("float32")
            optimizer.apply([ops.convert_to_tensor(gradient)], [alpha])
    return experts.found(best, progress.curve, progress.best)


def _by_cross_entropy(
    model: Model,
    experts: Experts,
    shots: Shots,
    count: int,
    iterations: int,
    population: int,
    score: Score,
    new_tokens: int,
    seed: int,
) -> Mixture:
    """Searches by the scores of answers, with the cross-entropy method."""
    answers = Answers(model, keras_hub.samplers.GreedySampler(), new_tokens)
    likelihood = compiled(
        model, lambda *tokens: log_likelihoods(model, *tokens)
    )
    random = np.random.default_rng(seed)
    names, elite = len(experts.names), max(2, round(_ELITE * population))
    mean = np.full((names, count), 1.0 / names)
    sigma = np.full((names, count), _SIGMA)
    progress = _Progress(iterations)
    best = mean
    zeros = experts.mixed(np.zeros((population, names, 1)))
    with (
        experts.searching(),
        weights_by_row(experts.named, zeros) as assign,
    ):
        for _ in range(iterations):
            drawn = random.standard_normal((population, names, count))
            candidates = np.clip(mean + sigma * drawn, 0.0, 1.0)
            candidates[0] = mean
            assign(experts.mixed(candidates))
            scores, likely = _of_rows(
                shots, population, model, score, answers, likelihood
            )
            searched = scores[:, : shots.searched].mean(axis=-1)
            by_likelihood = likely[:, : shots.searched].mean(axis=-1)
            order = np.lexsort((-by_likelihood, -searched))
            top = order[0]
            found = MixtureStep(
                float(searched[top]),
                float(scores[top, shots.searched :].mean()),
            )
            held = float(likely[top, shots.searched :].mean())
            if progress.is_best(found, held):
                best = candidates[top]
            if progress.stopped:
                break
            chosen = candidates[order[:elite]]
            mean, sigma = chosen.mean(axis=0), chosen.std(axis=0)
    return experts.found(best, progress.curve, progress.best)


def _of_rows(
    shots: Shots,
    population: int,
    model: Model,
    score: Score,
    answers: Answers,
    likelihood: Callable[..., Tensor],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and likelihoods of candidates, each a row of a batch.

    Both are (population, examples); a likelihood is that of a token of the
    right answer, its log's mean.
    """
    scores = np.zeros((population, len(shots.right)))
    likely = np.zeros(scores.shape)
    for i, (prompt, right, expected) in enumerate(
        zip(shots.prompts, shots.answers, shots.right, strict=True)
    ):
        prompts = [prompt] * population
        said = as_texts(model, answers(prompts, shots.length))
        scores[:, i] = [float(score(x, expected)) for x in said]
        tokens = padded(prompts, [right] * population, shots.length)
        likely[:, i] = to_numpy(likelihood(*tokens.arrays)) / len(right)
    return scores, likely
