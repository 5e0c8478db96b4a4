"""Keras callbacks of this package."""

from typing import Any

import keras
import numpy as np

from keras_svdtune.methods.adalora import AdaLoRA
from keras_svdtune.model.enable import require_adapted
from keras_svdtune.runtime.processes import to_numpy


class RankAllocator(keras.callbacks.Callback):
    """Brings the ranks of AdaLoRA down to their budget during `fit`.

    With T steps in all, b₀ triplets at first and b_T at the end, the budget
    after step t is b₀ for the first `warmup`·T steps, b_T for the last
    `settle`·T, and between them

        b(t) = b_T + (b₀ - b_T)·(1 - progress)³.

    While it falls, λ of the triplets beyond it is set to zero every
    `interval` steps; they may come back. Then the mask is fixed, and the
    model has b_T = rank · layers triplets exactly.

    Adds to the logs of each epoch, and so to the history: `orthogonality`,
    the regulariser as it stands in the loss; `mean_rank`, the budget a
    layer.

    Args:
        warmup: float, the share of steps before the budget falls.
        settle: float, the share of steps after it has.
        interval: int, steps between two allocations.
        total_steps: int or None. All steps of the training; None takes them
            from `fit`.

    Raises:
        ValueError: in `fit`, if the model has no AdaLoRA adapter, or the
            number of steps is unknown.

    Example:

    ```python
    gemma.backbone.enable_adalora(rank=8)
    gemma.fit(data, callbacks=[keras_svdtune.RankAllocator()])
    ```

    A callback that restores weights at the end (`EarlyStopping`) stands before
    it in the list.
    """

    def __init__(
        self,
        warmup: float = 0.1,
        settle: float = 0.3,
        interval: int = 10,
        total_steps: int | None = None,
    ):
        super().__init__()
        if warmup < 0 or settle < 0 or warmup + settle >= 1:
            raise ValueError(
                "`warmup` and `settle` must be shares of the steps that add "
                f"up to less than 1. Received: {warmup} and {settle}"
            )
        self.warmup = warmup
        self.settle = settle
        self.interval = interval
        self.total_steps = total_steps

    def on_train_begin(self, logs: Any = None) -> None:
        adapters = self._adapters()
        if not all(isinstance(x.method, AdaLoRA) for x in adapters):
            raise ValueError(
                "RankAllocator is for AdaLoRA. The model is adapted by "
                f"{adapters[0].method}."
            )
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        self._total = self.total_steps or (steps and steps * epochs)
        if not self._total:
            raise ValueError(
                "The number of steps of this data is unknown. Pass "
                "`RankAllocator(total_steps=...)`, or `steps_per_epoch` to fit."
            )
        self._step = self._start = 0
        self._fixed = False
        self._budget = self._budgets(adapters)[0]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # A run that was interrupted goes on where it stopped, not at 0.
        steps = self.params.get("steps")
        self._start = epoch * steps if steps else self._step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Not one more: with `steps_per_execution` this comes after several.
        before, self._step = self._step, self._start + batch + 1
        if self._fixed:
            return
        first = self.warmup * self._total
        last = (1.0 - self.settle) * self._total
        if self._step >= last:
            self._fix()
        elif (
            self._step > first
            and self._step // self.interval > before // self.interval
        ):
            progress = (self._step - first) / (last - first)
            adapters = self._adapters()
            start, end = self._budgets(adapters)
            self._keep(
                adapters, round(end + (start - end) * (1.0 - progress) ** 3)
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is None:
            return
        adapters = self._adapters()
        logs["orthogonality"] = sum(
            float(to_numpy(loss)) for x in adapters for loss in x.losses
        )
        logs["mean_rank"] = self._budget / len(adapters)

    def on_train_end(self, logs: Any = None) -> None:
        # Stopped early; or an earlier epoch's weights were restored, with the
        # mask of that time.
        adapters = self._adapters()
        alive = sum(to_numpy(x.mask.value).sum() for x in adapters)
        if not self._fixed or alive > self._budgets(adapters)[1]:
            self._fix()

    def _adapters(self) -> list[Any]:
        # `self.model`, not a copy: on JAX it brings the weights up to date.
        return [x.adapter for x in require_adapted(self.model).values()]

    @staticmethod
    def _budgets(adapters: list[Any]) -> tuple[int, int]:
        start = sum(x.method.first_rank for x in adapters)
        return start, sum(x.method.rank for x in adapters)

    def _fix(self) -> None:
        adapters = self._adapters()
        kept = self._keep(adapters, self._budgets(adapters)[1])
        for adapter, keep in zip(adapters, kept, strict=True):
            adapter.mask.assign(keep.astype("float32"))
        self._fixed = True

    def _keep(self, adapters: list[Any], budget: int) -> list[np.ndarray]:
        """Zeroes λ of all but the `budget` most important triplets."""
        self._budget = budget
        scores = [x.method.importance(x) for x in adapters]
        order = np.argsort(-np.concatenate(scores), kind="stable")
        keep = np.zeros(len(order), bool)
        keep[order[:budget]] = True
        parts = np.split(keep, np.cumsum([len(s) for s in scores])[:-1])
        for adapter, part in zip(adapters, parts, strict=True):
            adapter.singular_values.assign(_values(adapter) * part)
        return parts


def _values(adapter: Any) -> np.ndarray:
    return to_numpy(adapter.singular_values.value)
