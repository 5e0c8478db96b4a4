"""Prompts and answers of a causal language model: their tokens, their
likelihoods, and answers of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Array, Model, Tensor

# A text; or the ids of its tokens, if the model has no preprocessor.
Text = str | Sequence[int]


def check_language_model(model: Model) -> None:
    """Raises a ValueError unless a model generates text from text alone."""
    causal = isinstance(model, keras_hub.models.CausalLM)
    takes = set(model.input) if causal else set()
    if takes != {"token_ids", "padding_mask"}:
        raise ValueError(
            "Expected a keras_hub.models.CausalLM that takes text and nothing "
            f"else. Received: {type(model).__name__}"
            + (f" that takes {sorted(takes)}" if takes else "")
        )


def prompt_ids(model: Model, prompts: Sequence[Text]) -> list[list[int]]:
    """Returns the tokens of prompts, as `generate` makes them."""
    if model.preprocessor is None:
        return [[int(x) for x in prompt] for prompt in prompts]
    found = model.preprocessor.generate_preprocess([str(x) for x in prompts])
    tokens, mask = (
        np.asarray(ops.convert_to_numpy(found[x]))
        for x in ("token_ids", "padding_mask")
    )
    return [
        row[: int(seen.sum())].tolist()
        for row, seen in zip(tokens, mask, strict=True)
    ]


def answer_ids(model: Model, answers: Sequence[Text]) -> list[list[int]]:
    """Returns the tokens of answers, each with the token that ends it."""
    if model.preprocessor is None:
        return [[int(x) for x in answer] for answer in answers]
    tokenizer = model.preprocessor.tokenizer
    return [
        [*map(int, np.asarray(tokenizer(str(x)))), int(tokenizer.end_token_id)]
        for x in answers
    ]


def end_ids(model: Model) -> list[int]:
    """Returns the tokens that end an answer; none without a preprocessor."""
    if model.preprocessor is None:
        return []
    tokenizer = model.preprocessor.tokenizer
    found = [tokenizer.end_token_id, getattr(tokenizer, "end_token2_id", None)]
    return [int(x) for x in found if x is not None]


def as_texts(model: Model, answers: Sequence[Sequence[int]]) -> list[Any]:
    """Returns answers as text, without special tokens.

    Without a preprocessor they stay lists of tokens.
    """
    if model.preprocessor is None:
        return [list(x) for x in answers]
    length = max(map(len, answers), default=0)
    tokens = np.zeros((len(answers), max(length, 1)), "int32")
    mask = np.zeros(tokens.shape, bool)
    for i, answer in enumerate(answers):
        tokens[i, : len(answer)] = answer
        mask[i, : len(answer)] = True
    return list(
        model.preprocessor.generate_postprocess(
            {"token_ids": tokens, "padding_mask": mask}
        )
    )


def a_third(count: int, seed: int) -> np.ndarray:
    """Returns which of some examples to hold out, bool (count,).

    They are drawn, since examples come in orders: where tasks take turns, every
    third would be of one task.
    """
    held = np.zeros(count, bool)
    drawn = np.random.default_rng(seed).permutation(count)
    held[drawn[: (count + 1) // 3]] = True
    return held


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Prompts with their answers, padded to one length.

    Attributes:
        ids: int32 (rows, length).
        mask: int32 (rows, length), 0 where a row has ended.
        answer: float32 (rows, length - 1), 1 where the next token belongs to
            an answer.
    """

    ids: np.ndarray
    mask: np.ndarray
    answer: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.ids, self.mask, self.answer


def padded(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], length: int
) -> Tokens:
    """Returns prompts with their answers as arrays of a given length."""
    ids = np.zeros((len(prompts), length), "int32")
    mask = np.zeros((len(prompts), length), "int32")
    answer = np.zeros((len(prompts), length - 1), "float32")
    for i, (start, end) in enumerate(zip(prompts, answers, strict=True)):
        row = [*start, *end]
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
        answer[i, len(start) - 1 : len(row) - 1] = 1
    return Tokens(ids, mask, answer)


def token_log_likelihoods(model: Model, ids: Tensor, mask: Tensor) -> Tensor:
    """Computes log π(yₜ | y₁ ... yₜ₋₁) of all tokens but the first.

    Args:
        ids: (rows, length).
        mask: (rows, length), 0 where a row has ended.

    Returns:
        float32 (rows, length - 1).
    """
    inputs = {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}
    logits = ops.cast(model(inputs, training=False), "float32")
    of_next = ops.take_along_axis(logits, ids[:, 1:, None], axis=-1)
    return ops.squeeze(of_next, -1) - ops.logsumexp(logits, axis=-1)


def log_likelihoods(
    model: Model, ids: Tensor, mask: Tensor, answer: Tensor
) -> Tensor:
    """Computes Σₜ log π(yₜ | ...) over each row's answer, (rows,)."""
    found = token_log_likelihoods(model, ids, mask)
    return ops.sum(ops.where(answer > 0, found, 0.0), axis=-1)


class Answers:
    """Lets a model answer with a sampler of its own.

    What the user has compiled, sampler and function, stays; this keeps the
    function that it has compiled itself.

    Args:
        model: a `keras_hub.models.CausalLM`.
        sampler: a `keras_hub.samplers.Sampler`.
        new_tokens: int, after how many tokens an answer ends at the latest.
    """

    def __init__(self, model: Model, sampler: Any, new_tokens: int) -> None:
        self._model = model
        self._sampler = sampler
        self._new = new_tokens
        self._function: Any = None
        self._ends = end_ids(model)

    def __call__(
        self, prompts: Sequence[list[int]], length: int
    ) -> list[list[int]]:
        """Returns the tokens of the answers, the one that ends them included.

        Args:
            prompts: their tokens.
            length: of a row with prompt and answer. Other lengths, and other
                numbers of prompts, compile again.
        """
        found = padded(prompts, [[]] * len(prompts), length)
        inputs = {"token_ids": found.ids, "padding_mask": found.mask > 0}
        rows = to_numpy(self._generated(inputs)["token_ids"])
        return [
            self._cut(row[len(prompt) :].tolist())
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def _generated(self, inputs: dict[str, Array]) -> dict[str, Tensor]:
        model = self._model
        function = model.generate_function
        sampler = getattr(model, "sampler", None)
        inputs = {k: ops.convert_to_tensor(x) for k, x in inputs.items()}
        try:
            model.sampler = self._sampler
            model.generate_function = self._function
            generate = model.make_generate_function()
            self._function = generate
            found: dict[str, Tensor] = generate(
                inputs, stop_token_ids=self._ends or None
            )
            return found
        finally:
            model.sampler = sampler
            model.generate_function = function

    def _cut(self, answer: list[int]) -> list[int]:
        answer = answer[: self._new]
        for i, token in enumerate(answer):
            if token in self._ends:
                return answer[: i + 1]
        return answer
