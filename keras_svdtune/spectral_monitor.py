"""A callback that watches the singular values during `fit`."""

import functools
from typing import Any

import keras
import numpy as np

from keras_svdtune.model.enable import require_adapted
from keras_svdtune.reports.model_matrix import (
    ModelMatrix,
    for_each,
    matrices_of,
)
from keras_svdtune.reports.spectral_change import (
    Base,
    Measures,
    SpectralChange,
    base_of,
    change_of,
)


class SpectralMonitor(keras.callbacks.Callback):
    """Adds to the logs of each epoch what training does to singular values.

    With W the kernel of a layer as a matrix (in, out), dW what its adapter
    adds, and W' = W + dW, averaged over the matrices:

    | key | what |
    |---|---|
    | `sigma_drift` | ‖s' - s‖ / ‖s‖, the singular values of W' and of W |
    | `update_effective_rank` | exp(-Σ p·log p), p = σ / Σσ, σ those of dW |
    | `update_top_energy` | Σσ² of the `rank` largest / Σσ² |
    | `intruder_dimensions` | of the `top` largest singular vectors of W' |

    An intruder dimension is a large singular vector of W' that W has nothing
    like: |cos| is below `threshold` with every singular vector of W. Low-rank
    methods make some, and they go with forgetting; SVF cannot, it scales the
    vectors that are there. (They are looked for on the smaller side of W, whose
    vectors are a whole basis. Values of W that are equal leave their vectors
    free to turn.)

    The keys are in the history, and in `CSVLogger`, `TensorBoard` and all
    callbacks that come after this one in the list. `changes` has the numbers
    of each matrix.

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
        counts = {"rank": rank, "top": top, "matrices": matrices}
        for name, value in counts.items():
            if value is None and name == "matrices":
                continue
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"`{name}` must be an integer, 1 or more. "
                    f"Received: {name}={value!r}"
                )
        if not 0.0 < threshold <= 1.0:
            raise ValueError(
                "`threshold` must be a cosine in (0, 1]. "
                f"Received: threshold={threshold!r}"
            )
        self.measures = Measures(rank, top, threshold)
        self.matrices = matrices
        self.changes: tuple[SpectralChange, ...] = ()
        self._watched: dict[str, ModelMatrix] = {}
        self._bases: dict[str, Base] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        self._watched = self._drawn(matrices_of(require_adapted(self.model)))
        self._bases = for_each(
            "SpectralMonitor: decomposing",
            {
                path: functools.partial(base_of, matrix)
                for path, matrix in self._watched.items()
            },
        )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        # On JAX, to ask for the model brings its weights up to date.
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

    def on_train_end(self, logs: Any = None) -> None:
        self._watched, self._bases = {}, {}  # the bases are large

    def _drawn(self, found: dict[str, ModelMatrix]) -> dict[str, ModelMatrix]:
        if self.matrices is None or self.matrices >= len(found):
            return found
        paths = list(found)
        # At random, for all kinds of layers come in turn at equal distances.
        chosen = np.random.RandomState(0).choice(
            len(paths), self.matrices, replace=False
        )
        return {paths[i]: found[paths[i]] for i in sorted(chosen)}


def _means(changes: tuple[SpectralChange, ...]) -> dict[str, float]:
    """What goes into the logs."""
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
