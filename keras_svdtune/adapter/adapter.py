"""The weights that a method adds to one layer."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_svdtune.adapter.bank import over_bank
from keras_svdtune.adapter.fingerprint import effect, matches, same_effect
from keras_svdtune.adapter.plan import ReplacedBase
from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.methods.base import LinearMap, Method, ReverseMap, Weight
from keras_svdtune.runtime.placement import place_variable, undistributed


class Adapter(keras.layers.Layer):
    """Holds the weights of one method for one matrix, as a sublayer.

    A sublayer has a group of its own in Keras' weights files, which a plain
    layer ignores: so a plain model loads the file of an adapted one.

    Args:
        method: `Method`. Its weights become attributes: `adapter.delta`.
        view: `MatrixView` of the host's kernel.
        initial_value: function from a weight's name to its first value, or
            None for zeros. It is called when the variable is initialised.
        dtype: the host's dtype policy.
        self_contained: bool. Whether a weights file holds the frozen weights
            too. Where the host saves its merged kernel, it holds the
            trainables and a fingerprint of the base.
        shardings: what `attach.shardings_of` says of the weights, by name.
    """

    def __init__(
        self,
        method: Method,
        view: MatrixView,
        initial_value: Callable[[str], Any],
        dtype: Any = None,
        self_contained: bool = False,
        shardings: dict[str, Any] | None = None,
        name: str = "adapter",
    ):
        super().__init__(name=name, dtype=dtype)
        self.method = method
        self.view = view
        self.shape = view.shape
        self._initial_value: Callable[[str], Any] | None = initial_value
        self._shardings = shardings or {}
        self.self_contained = self_contained
        # One part in how many adapters of the model, for regularisers.
        self.share = 1.0
        # The model's moving statistics, which are the base's; None if declared.
        self.statistics: Any = None
        # Of an adapter that was put into a plain layer: what recognises its
        # base, and a function that gives the matrix.
        self.base_fingerprint: np.ndarray | None = None
        self.matrix: Callable[[], Any] | None = None
        # Where another base than W was put into the layer for this adapter.
        self.replaced: ReplacedBase | None = None
        # Set while a weights file is read: tells the host what was in it.
        self.settle: Callable[[bool], None] | None = None

    def build(self, input_shape: Any = None) -> None:
        for weight in self.method.weights(self.shape):
            # A user's rule for kernels may match these paths too.
            with undistributed():
                variable = self.add_weight(
                    name=f"{self.method.name}_{weight.name}",
                    shape=self.view.batch + weight.shape,
                    initializer=self._initializer(weight),
                    trainable=weight.trainable or weight.overwritten,
                    overwrite_with_gradient=weight.overwritten,
                    regularizer=self._regularizer(weight),
                    # A trainable stays float32 in a bfloat16 model: neither
                    # stored nor cast on access, or small updates are lost.
                    dtype=weight.dtype,
                    autocast=weight.dtype is None,
                )
            place_variable(variable, self._shardings.get(weight.name))
            setattr(self, weight.name, variable)
        self._initial_value = None

    def _initializer(self, weight: Weight) -> Callable[..., Any]:
        initial_value = self._initial_value
        assert initial_value is not None

        def initialize(shape: Any, dtype: Any = None) -> Any:
            value = initial_value(weight.name)
            if value is None:
                return ops.zeros(shape, dtype)
            return ops.cast(ops.convert_to_tensor(value), dtype)

        return initialize

    def _regularizer(self, weight: Weight) -> Callable[[Any], Any] | None:
        penalty = weight.regularizer
        if penalty is None:
            return None
        # `share` is known when all layers are adapted.
        return lambda variable: penalty(variable) * self.share

    def call(self, base: LinearMap) -> Any:
        """The adapted product (tokens, out), by the method."""
        return self.method.call(self, base)

    def reverse(self, base: ReverseMap) -> Any:
        """x·W'ᵀ (tokens, in) where a layer multiplies by Wᵀ too."""
        return self.method.reverse(self, base)

    def merged(self, matrix: Any) -> Any:
        """W' (in, out) in float32 for W (in, out); or for each of a bank."""
        matrix = ops.cast(matrix, "float32")
        if self.view.count is None:
            return self.method.merged(self, matrix)
        return over_bank(self.method.merged, self.method, self, matrix)

    def reset(self) -> None:
        """Sets the trainables so that the layer computes x·W again."""
        for name, value in self.method.neutral(self).items():
            variable = getattr(self, name)
            variable.assign(ops.broadcast_to(value, variable.shape))

    def save_own_variables(self, store: Any) -> None:
        for name, variable in self._stored().items():
            store[name] = variable
        if self.matrix is not None:
            store["base_fingerprint"] = self.base_fingerprint
            store["effect"] = effect(self.method, self, self.matrix())

    def load_own_variables(self, store: Any) -> None:
        settle, self.settle = self.settle, None
        names = list(store.keys())
        if settle is not None:
            settle(bool(names))
        if not names:  # the file of a plain model
            self.reset()
            if self.statistics is not None:
                self.statistics.forget()
            return
        wanted = self._stored()
        checks = {"base_fingerprint", "effect"} if self.matrix else set()
        missing = sorted({*wanted, *checks} - set(names))
        if missing:
            raise ValueError(
                f"The weights file holds no {', '.join(missing)} for layer "
                f"'{self.path}', which is adapted by {self.method}. It holds "
                f"{', '.join(sorted(names))}: enable the method it was saved "
                "with."
            )
        ours: Any = self.base_fingerprint
        if self.matrix is not None and not matches(
            ours,
            np.array(store["base_fingerprint"]),
            self.variable_dtype,
        ):
            raise ValueError(
                f"The weights file was saved from an adapted layer "
                f"'{self.path}' with another base kernel than this model's, "
                "and it holds the two merged. Load the base model that it was "
                "trained from first; or `remove_adapter()` and load the file "
                "into the plain model, which then is the merged one."
            )
        before = {name: ops.copy(v.value) for name, v in wanted.items()}
        for name, variable in wanted.items():
            variable.assign(store[name])
        if self.matrix is not None and not same_effect(
            effect(self.method, self, self.matrix()),
            np.array(store["effect"]),
            float(ours[0]),
            self.variable_dtype,
        ):
            for name, variable in wanted.items():
                variable.assign(before[name])
            raise ValueError(
                f"The weights file would not do in layer '{self.path}' what it "
                f"did where it was saved: {self.method} has other settings "
                "there, or the singular vectors come out otherwise here. "
                "Enable the method with the same settings; or "
                "`remove_adapter()` and load the file into the plain model, "
                "which then is the merged one."
            )

    def _stored(self) -> dict[str, Any]:
        """The variables that a full save holds."""
        return {
            f"{self.method.name}_{w.name}": getattr(self, w.name)
            for w in self.method.weights(self.shape)
            if self.self_contained or w.saved or w.overwritten or w.drawn
        }

    def variables_by_name(
        self, trainable: bool | None = None
    ) -> dict[str, Any]:
        """The variables, by their full names (`svf_delta`)."""
        return {
            f"{self.method.name}_{w.name}": getattr(self, w.name)
            for w in self.method.weights(self.shape)
            if trainable is None or w.trainable == trainable
        }
