"""Trains an adapter by a reward: answers are sampled, and the better ones made
likelier."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_svdtune.experts.language import (
    Answers,
    Text,
    Tokens,
    as_texts,
    check_language_model,
    padded,
    prompt_ids,
    token_log_likelihoods,
)
from keras_svdtune.methods.settings import check_number, check_whole_number
from keras_svdtune.model.for_a_while import adapter_disabled
from keras_svdtune.model.state import require_adapted
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.programs import compiled, with_gradients
from keras_svdtune.runtime.types import Model, Tensor

# Says how good an answer to a prompt is: the more the better.
Reward = Callable[[Any, Any], float]


def train_policy(
    model: Model,
    prompts: Sequence[Text],
    reward: Reward,
    *,
    validation: Sequence[Text] = (),
    answers: int = 4,
    kl: float = 0.05,
    epochs: int = 1,
    batch_size: int = 4,
    max_new_tokens: int = 32,
    callbacks: Iterable[keras.callbacks.Callback] = (),
    seed: int = 0,
) -> keras.callbacks.History:
    """Trains a language model's adapter by the reward of its own answers.

    In each step the model π samples G `answers` yⱼ to each of `batch_size`
    prompts, at temperature 1. With rⱼ their rewards,

        Aⱼ = rⱼ - mean of the other G - 1 rewards for the same prompt
        dₜ = log π₀(yₜ | ...) - log π(yₜ | ...)
        L = -mean Aⱼ·Σₜ log π(yₜ | ...) + kl·mean(exp(dₜ) - 1 - dₜ)

    where t goes over the tokens of an answer, the first mean over the answers
    and the second over all their tokens. It is never negative, and estimates
    how far π is from π₀, the base: the same model with its adapter switched
    off. The optimizer that the model was compiled with takes one step down the
    gradient of L; a regulariser of the method (AdaLoRA's) is added to L. If no
    answer of a batch is better than another to its prompt, it takes none.

    What trains is what `fit` trains: the adapter that is set, and what else is
    trainable in the model. Sampler, loss and compiled functions of the user
    stay as they are. A method's dropout is not used, so that π is what samples.
    An interrupt leaves what was trained up to there.

    Args:
        model: a `keras_hub.models.CausalLM` that takes text, compiled with an
            optimizer, with an adapter of any method.
        prompts: texts; or lists of tokens, without a preprocessor.
        reward: function from (prompt, answer) to a number. An answer comes
            without its prompt and without special tokens.
        validation: prompts; after each epoch the mean reward of the greedy
            answers to these is `val_reward` in the logs.
        answers: int, G, 2 at least.
        kl: float, λ, 0 or more.
        epochs: int, passes through the prompts, which are shuffled. The last
            batch of each is filled up with prompts of the same epoch.
        batch_size: int, prompts a step.
        max_new_tokens: int, after how many tokens an answer ends at the latest.
        callbacks: Keras callbacks, such as
            `EarlyStopping("val_reward", mode="max")`. The logs have `loss`,
            `reward` and `kl`, of a batch, and of an epoch their means.
        seed: int, of the samples and the order of the prompts.

    Returns:
        A `keras.callbacks.History`.

    Raises:
        ValueError: the model is no language model, has no adapter or no
            optimizer, or one that scales the loss (float16); or a number is
            out of range.

    Example:

    ```python
    gemma.backbone.enable_svf()
    gemma.compile(keras.optimizers.Adam(1e-3))
    keras_svdtune.train_policy(
        gemma,
        ["Where is the treasure?", "Who are you?"],
        reward=lambda prompt, answer: float("arr" in answer.lower()),
    )
    ```

    References:
        Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free";
        Sun, Cetin, Tang 2025 (Transformers²),
        https://arxiv.org/abs/2501.06252, which trains SVF by reward.
    """
    check_language_model(model)
    require_adapted(model)
    answers = check_whole_number("answers", answers, 2)
    epochs = check_whole_number("epochs", epochs, 1)
    batch_size = check_whole_number("batch_size", batch_size, 1)
    new_tokens = check_whole_number("max_new_tokens", max_new_tokens, 1)
    seed = check_whole_number("seed", seed, 0)
    kl = check_number("kl", kl, 0.0)
    if not len(prompts):
        raise ValueError("There must be a prompt to train on. Received: none")
    if model.optimizer is None:
        raise ValueError(
            f"'{model.name}' has no optimizer. Call `compile` with one first."
        )
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "Training by reward does not scale the loss, as float16 needs it. "
            "Use bfloat16 or float32. Received: a LossScaleOptimizer"
        )
    all_prompts = prompt_ids(model, [*prompts, *validation])
    length = max(map(len, all_prompts)) + new_tokens
    trainer = _Trainer(model, reward, answers, kl, new_tokens, length, seed)
    batch_size = min(batch_size, len(prompts))
    steps = -(-len(prompts) // batch_size)
    shown = keras.config.is_interactive_logging_enabled()
    history = keras.callbacks.History()
    watching = keras.callbacks.CallbackList(
        [*callbacks, history],
        add_progbar=shown,
        verbose=int(shown),
        epochs=epochs,
        steps=steps,
        model=model,
    )
    random = np.random.default_rng(seed)
    model.stop_training = False
    watching.on_train_begin()
    logs: dict[str, float] = {}
    for epoch in range(epochs):
        watching.on_epoch_begin(epoch)
        order = random.permutation(len(prompts))
        rows = np.resize(order, (steps, batch_size))
        found = []
        for step, row in enumerate(rows):
            watching.on_train_batch_begin(step)
            found.append(trainer.step([prompts[i] for i in row]))
            watching.on_train_batch_end(step, found[-1])
        logs = {k: float(np.mean([x[k] for x in found])) for k in found[0]}
        if len(validation):
            logs["val_reward"] = trainer.evaluate(validation)
        watching.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    watching.on_train_end(logs)
    return history


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Returns each reward less the mean of the others in its row."""
    count = rewards.shape[-1]
    others = rewards.sum(axis=-1, keepdims=True) - rewards
    return np.asarray(rewards - others / (count - 1))


def policy_loss(
    log_pi: Tensor,
    log_base: Tensor,
    answer: Tensor,
    advantages: Tensor,
    kl: float,
) -> tuple[Tensor, Tensor]:
    """Computes the loss of `train_policy`, and its mean of exp(d) - 1 - d.

    Args:
        log_pi: log π(yₜ | ...), (answers, length).
        log_base: log π₀(yₜ | ...), the same shape.
        answer: 1 where a token belongs to an answer, the same shape.
        advantages: A, (answers,).
        kl: λ.
    """
    of_answer = ops.sum(ops.where(answer > 0, log_pi, 0.0), axis=-1)
    d = ops.where(answer > 0, log_base - log_pi, 0.0)
    distance = ops.sum(ops.exp(d) - 1.0 - d) / ops.sum(answer)
    return kl * distance - ops.mean(advantages * of_answer), distance


class _Trainer:
    """Takes the steps of `train_policy`."""

    def __init__(
        self,
        model: Model,
        reward: Reward,
        answers: int,
        kl: float,
        new_tokens: int,
        length: int,
        seed: int,
    ) -> None:
        self._model = model
        self._reward = reward
        self._count = answers
        self._length = length  # of all rows, or each step would compile anew
        samplers = keras_hub.samplers
        self._sample = Answers(
            model, samplers.RandomSampler(seed=seed), new_tokens
        )
        self._greedy = Answers(model, samplers.GreedySampler(), new_tokens)
        self._likelihoods = compiled(
            model,
            lambda ids, mask: token_log_likelihoods(model, ids, mask),
        )

        def loss(
            ids: Tensor,
            mask: Tensor,
            answer: Tensor,
            advantages: Tensor,
            log_base: Tensor,
        ) -> tuple[Tensor, Tensor]:
            log_pi = token_log_likelihoods(model, ids, mask)
            total, distance = policy_loss(
                log_pi, log_base, answer, advantages, kl
            )
            return total + sum(model.losses), distance

        self._gradients = with_gradients(model, loss)

    def step(self, prompts: Sequence[Text]) -> dict[str, float]:
        """Samples answers, and takes one step."""
        model = self._model
        repeated = [x for x in prompts for _ in range(self._count)]
        tokens, rewards = self._answered(self._sample, repeated)
        by_prompt = rewards.reshape(-1, self._count)
        advantages = leave_one_out(by_prompt).ravel()
        with adapter_disabled(model):
            log_base = self._likelihoods(tokens.ids, tokens.mask)
        loss, distance, gradients = self._gradients(
            *tokens.arrays, advantages.astype("float32"), log_base
        )
        # Without advantages there are rounding errors left, at first, which
        # Adam would make as large as any step.
        if np.ptp(by_prompt, axis=-1).any():
            model.optimizer.apply(gradients, model.trainable_variables)
        return {
            "loss": float(to_numpy(loss)),
            "reward": float(rewards.mean()),
            "kl": float(to_numpy(distance)),
        }

    def evaluate(self, prompts: Sequence[Text]) -> float:
        """Returns the mean reward of the greedy answers."""
        _, rewards = self._answered(self._greedy, prompts)
        return float(rewards.mean())

    def _answered(
        self, answers: Answers, prompts: Sequence[Text]
    ) -> tuple[Tokens, np.ndarray]:
        """Lets the model answer; returns the tokens and the rewards."""
        model = self._model
        ids = prompt_ids(model, prompts)
        said = answers(ids, self._length)
        rewards = [
            float(self._reward(prompt, answer))
            for prompt, answer in zip(
                prompts, as_texts(model, said), strict=True
            )
        ]
        return padded(ids, said, self._length), np.array(rewards)
