"""Training and evaluating on tokens, with Keras' `fit` and `evaluate`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import keras
import numpy as np
from keras_hub.models import CausalLM

from keras_svdtune.callbacks import RankAllocator
from keras_svdtune.demo import show
from keras_svdtune.demo.chat import Arrays
from keras_svdtune.methods.adalora import AdaLoRA
from keras_svdtune.model.targets import adapted_targets

BATCH = 4


def prepare(task: CausalLM, learning_rate: float, steps: int) -> None:
    """Compiles for training and for greedy answers."""
    warm_up = max(1, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=learning_rate,
        warmup_steps=warm_up,
        decay_steps=max(1, steps - warm_up),
        alpha=0.05,
    )
    task.compile(
        optimizer=keras.optimizers.AdamW(
            schedule, weight_decay=0.0, global_clipnorm=1.0
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
        sampler="greedy",
    )


def evaluate(task: CausalLM, data: Arrays) -> float:
    """The mean loss of a token of an answer."""
    with raw_tokens(task):
        loss = task.evaluate(
            data.x,
            data.y,
            sample_weight=data.weight,
            batch_size=BATCH,
            verbose=0,
        )
    return float(loss) - penalty(task)


def penalty(task: CausalLM) -> float:
    """What regularisers (AdaLoRA's) add to every loss."""
    return sum(float(keras.ops.convert_to_numpy(x)) for x in task.losses)


def rank_allocators(task: CausalLM) -> list[RankAllocator]:
    """The callback that AdaLoRA needs, if it is enabled."""
    adapters = adapted_targets(task.backbone).values()
    if any(isinstance(x.adapted.method, AdaLoRA) for x in adapters):
        return [RankAllocator()]
    return []


def train(
    task: CausalLM, data: Arrays, steps: int, seed: int
) -> tuple[list[float], float]:
    """Runs `fit`.

    Returns:
        The loss of every step, and the seconds that a step took (the first
        one, which compiles, aside).
    """
    generator = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < steps * BATCH:
        order += generator.permutation(len(data)).tolist()
    chosen = data.rows(np.array(order[: steps * BATCH]))
    watch = Watch(steps)
    with raw_tokens(task):
        task.fit(
            chosen.x,
            chosen.y,
            sample_weight=chosen.weight,
            batch_size=BATCH,
            shuffle=False,
            verbose=0,
            callbacks=[watch, *rank_allocators(task)],
        )
    return watch.losses, watch.seconds_per_step


class Watch(keras.callbacks.Callback):
    """Shows a progress bar, and keeps the loss and the time of each step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.losses: list[float] = []
        self.times: list[float] = []
        self._mean = 0.0

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._bar = show.training_bar(self.steps)

    def on_train_batch_end(
        self, batch: int, logs: dict[str, float] | None = None
    ) -> None:
        mean = float((logs or {})["loss"])
        # Keras reports the mean of all steps so far; take this step out of it.
        loss = mean + batch * (mean - self._mean)
        self._mean = mean
        self.losses.append(loss)
        self.times.append(time.perf_counter())
        self._bar.advance(loss)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self._bar.stop()

    @property
    def seconds_per_step(self) -> float:
        return float(np.median(np.diff(self.times))) if self.steps > 1 else 0.0


@contextmanager
def raw_tokens(task: CausalLM) -> Iterator[None]:
    """Lets `fit` and `evaluate` take token ids instead of strings."""
    preprocessor = task.preprocessor
    # While a layer is not built, Keras traces the model anew in every `fit` and
    # `evaluate`; and a preprocessor is only built where it is called.
    if preprocessor is not None and not preprocessor.built:
        preprocessor.build(None)
        for layer in preprocessor._flatten_layers():
            layer.built = True
    task.preprocessor = None
    try:
        yield
    finally:
        task.preprocessor = preprocessor
