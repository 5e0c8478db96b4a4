"""Lets the prompt choose which adapter answers it."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_svdtune.experts.language import (
    a_third,
    check_language_model,
    log_likelihoods,
    padded,
    prompt_ids,
)
from keras_svdtune.methods.settings import check_number, check_whole_number
from keras_svdtune.model.for_a_while import (
    adapter_disabled,
    adapter_per_example,
)
from keras_svdtune.model.named_adapters import named_adapters
from keras_svdtune.model.names import (
    adapter_names,
    adapter_set,
    add_untrained,
    delete_adapter,
    set_adapter,
)
from keras_svdtune.runtime.interrupts import run_to_the_end
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.programs import compiled
from keras_svdtune.runtime.types import Model

# The adapter that `Dispatcher.fit` trains, if no other has this name.
CLASSIFIER = "dispatcher"
TEMPLATE = """Which of these topics is the text about?
{experts}
Text: {prompt}
Topic:"""
# The prompt of which all topics count as equally likely.
_EMPTY = "N/A"
# Lengths are multiples of this, so that few of them are compiled.
_BUCKET = 32


class Dispatcher:
    """Chooses one of a model's adapters for each prompt, or the base model.

    At first by asking the base model, without an adapter: with q(x) the
    question that `template` makes of a prompt x and of the descriptions of the
    experts, the choice is the name with the largest

        log π₀(name | q(x)) - log π₀(name | q("N/A")),

    each the sum over the tokens of " name". The second term takes away what a
    name has ahead whatever the prompt, by its length for one thing. `fit`
    trains a classifier, which chooses from then on.

    Args:
        model: a `keras_hub.models.CausalLM` with named adapters, and a
            preprocessor.
        experts: a description of each adapter, by its name.
        none: by which name the model is asked for the base model.
        template: the question, with fields `{experts}`, a line of name and
            description for each, and `{prompt}`. A chat model wants its marks
            around it.

    Raises:
        ValueError: the model is no language model, or lacks an adapter; the
            template lacks a field.

    Example:

    ```python
    dispatcher = keras_svdtune.Dispatcher(
        gemma, {"math": "numbers and sums", "code": "programs in Python"}
    )
    dispatcher.choose(["What is 2 + 3?", "Hello!"])  # ["math", None]
    dispatcher.generate(["What is 2 + 3?", "Hello!"], max_length=32)
    ```

    References:
        Sun, Cetin, Tang 2025 (Transformers²),
        https://arxiv.org/abs/2501.06252, which also asks the model, and keeps
        an expert where the answer is none of them;
        Zhao et al. 2021, https://arxiv.org/abs/2102.09690, for the prompt
        without content.
    """

    def __init__(
        self,
        model: Model,
        experts: Mapping[str, str],
        none: str = "other",
        template: str = TEMPLATE,
    ) -> None:
        check_language_model(model)
        if model.preprocessor is None:
            raise ValueError(
                f"'{model.name}' has no preprocessor, so that it cannot be "
                "asked by text."
            )
        named = named_adapters(model)
        for name in experts:
            named.checked(name)
        if none in experts:
            raise ValueError(
                f"`none` must be no expert's name. Received: none={none!r}"
            )
        for field in ("{experts}", "{prompt}"):
            if field not in template:
                raise ValueError(
                    f"`template` must have {field} in it. Received: "
                    f"template={template!r}"
                )
        self.model = model
        self.experts = dict(experts)
        self._none = none
        self._template = template
        self._names: list[str | None] = [*experts, None]
        self._likelihoods = compiled(
            model, lambda *tokens: log_likelihoods(model, *tokens)
        )
        # The classifier and the name of its adapter, once there is one.
        self._trained: tuple[Model, str] | None = None

    def choose(self, prompts: Sequence[str]) -> list[str | None]:
        """Returns the name of the adapter for each prompt; None for the base.

        Raises:
            ValueError: the adapter of the classifier was deleted since.
        """
        prompts = _checked(prompts)
        scores = (
            self.scores(prompts)
            if self._trained is None
            else self._logits(*self._trained, prompts)
        )
        return [self._names[i] for i in scores.argmax(axis=-1)]

    def generate(self, prompts: Sequence[str], **kwargs: Any) -> list[str]:
        """Generates an answer to each prompt with the adapter chosen for it.

        All of them are one batch, in which each row has its own adapter.

        Args:
            prompts: texts.
            kwargs: as for the model's own `generate`.
        """
        prompts = _checked(prompts)
        with adapter_per_example(self.model, self.choose(prompts)):
            found: list[str] = self.model.generate(prompts, **kwargs)
        return found

    def scores(self, prompts: Sequence[str]) -> np.ndarray:
        """Computes how much more likely a prompt makes each name, by the base.

        Returns:
            float64 (prompts, experts + 1), see the class; the last column is
            that of the base model.
        """
        asked = [self._question(x) for x in [*_checked(prompts), _EMPTY]]
        questions = prompt_ids(self.model, asked)
        labels = self._labels()
        length = _length([max(map(len, questions)) + max(map(len, labels))])
        found = []
        with adapter_disabled(self.model):
            for question in questions:
                tokens = padded([question] * len(labels), labels, length)
                found.append(to_numpy(self._likelihoods(*tokens.arrays)))
        of_all = np.array(found, "float64")
        return np.asarray(of_all[:-1] - of_all[-1])

    def _question(self, prompt: str) -> str:
        lines = [f"{name}: {text}" for name, text in self.experts.items()]
        lines.append(f"{self._none}: none of these")
        # Not by `format`: the prompt may have braces.
        listed = self._template.replace("{experts}", "\n".join(lines))
        return listed.replace("{prompt}", prompt)

    def _labels(self) -> list[list[int]]:
        tokenizer = self.model.preprocessor.tokenizer
        return [
            [int(x) for x in np.asarray(tokenizer(f" {name}"))]
            for name in [*self.experts, self._none]
        ]

    def fit(
        self,
        prompts: Sequence[str],
        names: Sequence[str | None],
        epochs: int = 20,
        learning_rate: float | None = None,
        batch_size: int = 8,
    ) -> keras.callbacks.History:
        """Trains a classifier of prompts, which chooses from then on.

        It is a Dense layer on the mean of the last hidden states of a prompt's
        tokens, and trains together with an adapter of its own beside the
        experts, named `"dispatcher"`, of their method; where the model has an
        adapter of that name, `"dispatcher_2"`, and so on. A third of the
        prompts, drawn at random, is held out; the weights of the epoch with
        the least loss on those are kept, and five without a lesser one end it.

        What is set, and what the user has compiled, stays; if this is
        interrupted, the model and an earlier classifier are as before. At the
        end an earlier classifier of this Dispatcher is deleted.

        Args:
            prompts: texts.
            names: the adapter for each; None for the base model.
            epochs: int, how many at most.
            learning_rate: float or None, of Adam. None: what the method
                suggests.
            batch_size: int.

        Returns:
            What Keras' `fit` returns, with `val_accuracy`.

        Raises:
            ValueError: there is no prompt to hold out, or a name is none of
                the experts'; or the model cannot have another adapter now.
        """
        prompts = _checked(prompts)
        epochs = check_whole_number("epochs", epochs, 1)
        batch_size = check_whole_number("batch_size", batch_size, 1)
        for name in names:
            if name not in self._names:
                raise ValueError(
                    f"There is no expert {name!r} among {list(self.experts)}."
                )
        if len(prompts) != len(names) or len(prompts) < 2:
            raise ValueError(
                "There must be a name for each prompt, and two of them at "
                f"least. Received: {len(prompts)} and {len(names)}"
            )
        method = named_adapters(self.model).record.method
        if learning_rate is None:
            learning_rate = method.suggested_learning_rate
        check_number("learning_rate", learning_rate, 0.0)
        inputs = self._inputs(prompts)
        labels = np.array([self._names.index(x) for x in names], "int32")
        held = a_third(len(prompts), seed=0)
        own = _free_name(adapter_names(self.model))
        earlier = self._trained
        named = named_adapters(self.model)
        methods = {k: x.adapted.method for k, x in named.targets.items()}
        chosen = dict(named.record.chosen) or None

        def forget() -> None:
            self._trained = earlier
            if own in adapter_names(self.model):
                delete_adapter(self.model, own)
            set_adapter(self.model, chosen)

        with contextlib.ExitStack() as undo:
            undo.callback(run_to_the_end, [forget])
            add_untrained(self.model, own, method, methods)
            classifier = _classifier(self.model.backbone, len(self._names))
            classifier.compile(
                keras.optimizers.Adam(learning_rate),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
            )
            history = classifier.fit(
                _rows(inputs, ~held),
                labels[~held],
                validation_data=(_rows(inputs, held), labels[held]),
                batch_size=batch_size,
                epochs=epochs,
                verbose="auto"
                if keras.config.is_interactive_logging_enabled()
                else 0,
                callbacks=[
                    keras.callbacks.EarlyStopping(
                        patience=5, restore_best_weights=True
                    )
                ],
            )
            set_adapter(self.model, chosen)
            self._trained = classifier, own
            undo.pop_all()
        if earlier is not None and earlier[1] in adapter_names(self.model):
            delete_adapter(self.model, earlier[1])
        return history

    def _logits(
        self, classifier: Model, name: str, prompts: Sequence[str]
    ) -> np.ndarray:
        """Computes the logits of the trained classifier."""
        if name not in adapter_names(self.model):
            raise ValueError(
                f"The adapter '{name}', which chooses, was deleted. Call `fit` "
                "again, or make another Dispatcher."
            )
        with adapter_set(self.model, name):
            found: np.ndarray = classifier.predict(
                self._inputs(prompts), verbose=0
            )
        return found

    def _inputs(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        ids = prompt_ids(self.model, prompts)
        found = padded(ids, [[]] * len(ids), _length(map(len, ids)))
        return {"token_ids": found.ids, "padding_mask": found.mask}


def _checked(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(
            "`prompts` must be a list of texts, not empty. Received: "
            f"{prompts!r}"
        )
    return [str(x) for x in prompts]


def _free_name(taken: Sequence[str]) -> str:
    """Returns a name for the classifier's adapter that no other has."""
    name, count = CLASSIFIER, 1
    while name in taken:
        count += 1
        name = f"{CLASSIFIER}_{count}"
    return name


def _length(lengths: Any) -> int:
    """Returns the length to which all are padded."""
    return -(-max(lengths) // _BUCKET) * _BUCKET


def _rows(inputs: dict[str, np.ndarray], which: np.ndarray) -> Any:
    return {name: x[which] for name, x in inputs.items()}


def _classifier(backbone: Model, count: int) -> Model:
    """Returns a model from a prompt to `count` logits, on a backbone."""
    inputs = backbone.input
    mean = keras.layers.GlobalAveragePooling1D(dtype="float32")(
        backbone.output, mask=inputs["padding_mask"]
    )
    logits = keras.layers.Dense(count, dtype="float32")(mean)
    return keras.Model(inputs, logits, name="dispatcher")
