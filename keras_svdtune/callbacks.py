"""Keras callbacks: AdaLoRA's rank schedule, a singular value monitor."""

import functools
from typing import Any

import keras
import numpy as np

from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.adalora import AdaLoRA
from keras_svdtune.methods.settings import (
    check_number,
    check_whole_number,
    is_number,
    plain,
)
from keras_svdtune.model.state import require_adapted
from keras_svdtune.reports.matrices import each_matrix, for_each
from keras_svdtune.reports.spectral_change import (
    Base,
    Measures,
    SpectralChange,
    base_of,
    change_of,
)
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Optimizer

Logs = dict[str, Any] | None


class RankAllocator(keras.callbacks.Callback):
    """Lowers the ranks of AdaLoRA to their budget during `fit`.

    With T steps in all, b₀ triplets at first and b_T at the end, the sums of
    the initial rank and of `rank` over all layers, the budget
    after step t is b₀ for the first `warmup`·T steps, b_T for the last
    `settle`·T, and between them

        b(t) = b_T + (b₀ - b_T)·(1 - progress)³.

    While it falls, the λ of the triplets beyond it are zeroed every `interval`
    steps; they may come back. Then the mask is fixed, and the model has
    exactly b_T triplets: rank · layers, if none is smaller than `rank`.

    The logs of each epoch, and so the history, get `orthogonality`, the
    regulariser as it stands in the loss, and `mean_rank`, the budget a layer.

    Args:
        warmup: float, the share of steps before the budget falls.
        settle: float, the share of steps after it has fallen.
        interval: int, steps between two allocations.
        total_steps: int or None, all steps of the training; None: as in `fit`.

    Raises:
        ValueError: an argument is out of range; in `fit`, if the model has no
            AdaLoRA adapter, the number of steps is unknown, or the optimizer
            has `gradient_accumulation_steps` or `ema_overwrite_frequency` (or,
            on TensorFlow, `use_ema`).

    Example:

    ```python
    gemma.backbone.enable_adalora(rank=8)
    gemma.fit(data, callbacks=[keras_svdtune.RankAllocator()])
    ```

    In the list of callbacks, put one that restores weights at the end
    (`EarlyStopping`) before this one.
    """

    def __init__(
        self,
        warmup: float = 0.1,
        settle: float = 0.3,
        interval: int = 10,
        total_steps: int | None = None,
    ):
        super().__init__()
        self.warmup = check_number("warmup", warmup, 0.0, 1.0)
        self.settle = check_number("settle", settle, 0.0, 1.0)
        if warmup + settle >= 1:
            raise ValueError(
                "`warmup` and `settle` must be shares of the steps that add "
                f"up to less than 1. Received: {warmup} and {settle}"
            )
        self.interval = check_whole_number("interval", interval, 1)
        if total_steps is not None:
            total_steps = check_whole_number("total_steps", total_steps, 1)
        self.total_steps = total_steps

    def on_train_begin(self, logs: Logs = None) -> None:
        adapters = self._adapters()
        if not all(isinstance(x.method, AdaLoRA) for x in adapters):
            raise ValueError(
                "RankAllocator is for AdaLoRA. The model is adapted by "
                f"{adapters[0].method}."
            )
        _check_optimizer(self.model.optimizer)
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

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        # After an interrupt, `fit` goes on where it stopped, not at step 0.
        steps = self.params.get("steps")
        self._start = epoch * steps if steps else self._step

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        # Not `+= 1`: `steps_per_execution` calls this after several steps.
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
            # Cut, not rounded, as in the authors' code and in PEFT.
            self._keep(
                adapters, int(end + (start - end) * (1.0 - progress) ** 3)
            )

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if logs is None:
            return
        adapters = self._adapters()
        logs["orthogonality"] = sum(
            float(to_numpy(loss)) for x in adapters for loss in x.losses
        )
        logs["mean_rank"] = self._budget / len(adapters)

    def on_train_end(self, logs: Logs = None) -> None:
        # Training may have stopped early, or restored an earlier epoch's
        # weights with the mask of that time.
        adapters = self._adapters()
        alive = sum(to_numpy(x.mask.value).sum() for x in adapters)
        if not self._fixed or alive > self._budgets(adapters)[1]:
            self._fix()

    def _adapters(self) -> list[Adapter]:
        # `self.model`, not a copy: on JAX it brings the weights up to date.
        return [x.adapted for x in require_adapted(self.model).values()]

    @staticmethod
    def _budgets(adapters: list[Adapter]) -> tuple[int, int]:
        start = sum(_adalora(x).first_rank for x in adapters)
        return start, sum(_adalora(x).rank for x in adapters)

    def _fix(self) -> None:
        adapters = self._adapters()
        kept = self._keep(adapters, self._budgets(adapters)[1])
        for adapter, keep in zip(adapters, kept, strict=True):
            adapter.mask.assign(keep.astype("float32"))
        self._fixed = True

    def _keep(self, adapters: list[Adapter], budget: int) -> list[np.ndarray]:
        """Zeroes λ of all but the `budget` most important triplets."""
        self._budget = budget
        scores = [_adalora(x).importance(x) for x in adapters]
        order = np.argsort(-np.concatenate(scores), kind="stable")
        keep = np.zeros(len(order), bool)
        keep[order[:budget]] = True
        parts = np.split(keep, np.cumsum([len(s) for s in scores])[:-1])
        for adapter, part in zip(adapters, parts, strict=True):
            adapter.singular_values.assign(_values(adapter) * part)
        return parts


def _check_optimizer(optimizer: Optimizer) -> None:
    """Raises a ValueError where the importance of triplets would be wrong."""
    # float16 models wrap the user's optimizer.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    steps = getattr(optimizer, "gradient_accumulation_steps", None)
    if steps:
        # The importance is |w · ∂L/∂w| of the whole batch. Keras keeps the
        # largest of the micro-batches for a variable that is overwritten by
        # its gradient, and shows the sum of the gradients to nobody.
        raise ValueError(
            "RankAllocator does not work with `gradient_accumulation_steps`: "
            "the importance of a triplet would be that of one micro-batch. "
            "Use a larger batch, or enable LoRA. Received: "
            f"gradient_accumulation_steps={steps}"
        )
    if not getattr(optimizer, "use_ema", False):
        return
    if keras.backend.backend() == "tensorflow":
        raise ValueError(
            "RankAllocator does not work with `use_ema` on TensorFlow, where "
            "Keras cannot average a model some of whose variables are "
            "overwritten by their gradient. Leave it out, or use JAX or torch."
        )
    if optimizer.ema_overwrite_frequency:
        # The averages give values back to triplets that were taken away.
        raise ValueError(
            "RankAllocator does not work with `ema_overwrite_frequency`: the "
            "averaged weights would bring back the triplets beyond the "
            "budget. Leave it out: `use_ema` alone averages at the end of "
            "`fit`. Received: ema_overwrite_frequency="
            f"{optimizer.ema_overwrite_frequency}"
        )


def _adalora(adapter: Adapter) -> AdaLoRA:
    assert isinstance(adapter.method, AdaLoRA)  # checked when `fit` begins
    return adapter.method


def _values(adapter: Adapter) -> np.ndarray:
    return to_numpy(adapter.singular_values.value)


class SpectralMonitor(keras.callbacks.Callback):
    """Adds to the logs of each epoch how training changes singular values.

    With W the kernel of a layer as a matrix (in, out), dW what its adapter
    adds, and W' = W + dW, averaged over the matrices:

    | key | what |
    |---|---|
    | `sigma_drift` | ‖s' - s‖ / ‖s‖, the singular values of W' and of W |
    | `update_effective_rank` | exp(-Σ p·log p), p = σ / Σσ, σ those of dW |
    | `update_top_energy` | Σσ² of the `rank` largest / Σσ² |
    | `intruder_dimensions` | of the `top` largest singular vectors of W' |

    An intruder dimension is a large singular vector of W' that is unlike
    any of W: |cos| is below `threshold` with every singular vector of W.
    Low-rank methods make some, and they go with forgetting; SVF cannot, since
    it only scales the components. (Only the smaller side of W is searched,
    whose vectors are a whole basis. Equal values leave theirs free to turn.)

    The keys are in the history and in all callbacks that come after this one
    in the list, such as `CSVLogger`.

    An epoch costs nearly nothing for SVF, and one eigendecomposition of n²
    numbers a matrix for the others, n = min(in, out): hence `matrices`. At the
    start of `fit` each is decomposed, or read from the cache. For methods
    other than SVF and SVFT the n² numbers of its basis are held in memory.

    Args:
        rank: int, the components of dW that `update_top_energy` counts.
        top: int, the singular vectors of W' that may be intruders.
        threshold: float, the cosine below which they are.
        matrices: int or None, how many matrices to look at, drawn once and
            always the same; None for all.

    Attributes:
        changes: tuple of `SpectralChange`, one for each matrix, as of the last
            epoch.

    Raises:
        ValueError: an argument is out of range; in `fit`, the model has no
            adapter, or the adapter holds NaN or infinity.

    Example:

    ```python
    gemma.backbone.enable_svf()
    history = gemma.fit(data, callbacks=[keras_svdtune.SpectralMonitor()])
    history.history["sigma_drift"]
    ```

    Reference: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion
    of Equivalence", https://arxiv.org/abs/2410.21228.
    """

    def __init__(
        self,
        rank: int = 8,
        top: int = 10,
        threshold: float = 0.5,
        matrices: int | None = 32,
    ):
        super().__init__()
        if not is_number(plain(threshold)) or not 0.0 < threshold <= 1.0:
            raise ValueError(
                "`threshold` must be a cosine in (0, 1]. "
                f"Received: threshold={threshold!r}"
            )
        self.measures = Measures(
            check_whole_number("rank", rank, 1),
            check_whole_number("top", top, 1),
            float(threshold),
        )
        if matrices is not None:
            matrices = check_whole_number("matrices", matrices, 1)
        self.matrices = matrices
        self.changes: tuple[SpectralChange, ...] = ()
        self._watched: dict[str, Target] = {}
        self._bases: dict[str, Base] = {}

    def on_train_begin(self, logs: Logs = None) -> None:
        self._watched = self._drawn(each_matrix(require_adapted(self.model)))
        self._bases = for_each(
            "SpectralMonitor: decomposing",
            {
                path: functools.partial(base_of, matrix)
                for path, matrix in self._watched.items()
            },
        )

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        # On JAX, reading `self.model` brings its weights up to date.
        require_adapted(self.model)
        jobs = {
            path: functools.partial(
                change_of, matrix, self._bases[path], self.measures
            )
            for path, matrix in self._watched.items()
        }
        found = for_each("SpectralMonitor", jobs, bar=False)
        self.changes = tuple(found.values())
        if logs is not None:
            logs.update(_means(self.changes))

    def on_train_end(self, logs: Logs = None) -> None:
        self._watched, self._bases = {}, {}  # the bases are large

    def _drawn(self, found: dict[str, Target]) -> dict[str, Target]:
        if self.matrices is None or self.matrices >= len(found):
            return found
        paths = list(found)
        # At random: kinds of layers alternate at equal distances, so every
        # k-th matrix might be of one kind.
        chosen = np.random.RandomState(0).choice(
            len(paths), self.matrices, replace=False
        )
        return {paths[i]: found[paths[i]] for i in sorted(chosen)}


def _means(changes: tuple[SpectralChange, ...]) -> dict[str, float]:
    """Averages the measures over the matrices, for the logs."""
    keys = {
        "sigma_drift": "drift",
        "update_effective_rank": "effective_rank",
        "update_top_energy": "top_energy",
        "intruder_dimensions": "intruders",
    }
    return {
        key: float(np.mean([getattr(x, name) for x in changes]))
        for key, name in keys.items()
    }
