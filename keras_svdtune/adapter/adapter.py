"""The sublayer that holds the weights which a method adds to one layer."""

from collections.abc import Callable
from typing import Protocol

import keras
import numpy as np
from keras import ops

from keras_svdtune.adapter.bank import over_bank
from keras_svdtune.adapter.examples import Product, over_examples
from keras_svdtune.adapter.fingerprint import (
    effect,
    matches,
    same_effect,
)
from keras_svdtune.adapter.plan import AdapterPlan, ReplacedBase
from keras_svdtune.adapter.stepped import (
    Current,
    Stepped,
    stepped,
    variable_of,
)
from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.methods.base import (
    Method,
    Weight,
    Weights,
    WeightValues,
)
from keras_svdtune.methods.dropout import dropout_of
from keras_svdtune.runtime.keras_internals import (
    in_training,
    recomputed,
    unlocked,
)
from keras_svdtune.runtime.placement import (
    place_variable,
    placement_of,
    undistributed,
)
from keras_svdtune.runtime.types import (
    Layer,
    Shape,
    Store,
    Tensor,
    Variable,
)

# Maps the name of a weight to its first value; None for zeros.
FirstValue = Callable[[str], Tensor | None]
# In full saves of declared layers: the basis is that of W rounded.
_ROUNDED = "rounded_basis"
# In full saves of layers with dropout: where the masks go on.
_SEEDS = "dropout_seeds"


class Holder(Protocol):
    """What an adapter uses of its layer's `Target`."""

    owner: Layer

    @property
    def is_embedding(self) -> bool:
        """Whether the layer looks rows up, and has no x to drop."""

    def matrix(self) -> Tensor:
        """Returns W (in, out) in float32, or a bank (count, in, out)."""

    def planned(self, rounds: bool) -> AdapterPlan:
        """Plans the adapter anew, with the basis of W rounded or as it is."""

    def finish_loading(self, has_adapter: bool) -> None:
        """Restores the kernel or rebuilds the adapter, after loading a file.

        Keras reads the layer's own variables before those of its adapter.
        """


class Adapter(keras.layers.Layer):
    """Holds the weights of one method for one matrix, as a sublayer.

    A sublayer has a group of its own in Keras' weights files, which a plain
    layer ignores. So a plain model loads the file of an adapted one.

    Args:
        method: `Method`. Its weights become attributes: `adapter.delta`, with
            `value` and `assign`.
        view: `MatrixView` of the layer's kernel.
        holder: the layer's `Target`.
        first_value: function from a weight's name to its first value, or None
            for zeros; called when the variable is initialised.
        dtype: the layer's dtype policy.
        self_contained: bool. Whether a weights file holds the frozen weights
            too. If not, the layer saves its merged kernel, and the file holds
            the trainables and a fingerprint of the base.
        shardings: how each weight is split over devices, by name.
    """

    def __init__(
        self,
        method: Method,
        view: MatrixView,
        holder: Holder,
        first_value: FirstValue,
        dtype: str | None = None,
        self_contained: bool = False,
        shardings: dict[str, object] | None = None,
        name: str = "adapter",
    ):
        super().__init__(name=name, dtype=dtype)
        self.method = method
        self.view = view
        self.shape: Shape = view.shape
        self.target = holder
        self.self_contained = self_contained
        # 1 / (adapters in the model): regularisers are averaged.
        self.share = 1.0
        # Identifies the base kernel; None in a declared layer.
        self.base_fingerprint: np.ndarray | None = None
        # Set if the layer got another kernel than W for this adapter.
        self.replaced: ReplacedBase | None = None
        # Whether the basis is that of W rounded to bfloat16.
        self.rounds = False
        # How many examples have weights of their own; None if none have.
        self.examples: int | None = None
        # Of the masks of dropout; None without.
        self.seeds: keras.random.SeedGenerator | None = None
        self._first_value: FirstValue | None = first_value
        self._shardings = shardings or {}

    def build(self, input_shape: object = None) -> None:
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
            # Known by this to what saves an optimizer's state for it.
            variable.of_converted_layer = not self.self_contained
            place_variable(variable, self._shardings.get(weight.name))
            setattr(self, weight.name, stepped(variable, weight))
        if dropout_of(self.method) and not self.target.is_embedding:
            with undistributed():
                self.seeds = keras.random.SeedGenerator(name="dropout")
            # On all devices, if the weights are on several.
            placement = placement_of(variable)
            if placement is not None:
                place_variable(self.seeds.state, placement.sharding(((),)))
        self._first_value = None

    def _initializer(self, weight: Weight) -> Callable[..., Tensor]:
        first_value = self._first_value
        assert first_value is not None

        def initialize(
            shape: tuple[int, ...], dtype: str | None = None
        ) -> Tensor:
            value = first_value(weight.name)
            if value is None:
                return ops.zeros(shape, dtype)
            first = ops.cast(ops.convert_to_tensor(value), dtype)
            return first if weight.step == 1.0 else first / weight.step

        return initialize

    def _regularizer(self, weight: Weight) -> Callable[[Tensor], Tensor] | None:
        penalty = weight.regularizer
        if penalty is None:
            return None
        # TensorFlow adds no float32 to the loss of a float64 model.
        double = keras.config.floatx() == "float64"
        dtype = "float64" if double else "float32"
        step = weight.step
        # `share` is read when called: once all layers are adapted.
        return lambda variable: ops.cast(
            penalty(variable if step == 1.0 else variable * step) * self.share,
            dtype,
        )

    def dropped(
        self, inputs: Tensor, training: bool | Tensor | None
    ) -> Tensor | None:
        """Returns what the branch sees of `inputs` instead of all of them.

        Args:
            inputs: the inputs of the layer.
            training: what the layer was called with; None if it was not told,
                and a tensor where JAX computes a model twice to save memory.

        Returns:
            A tensor like `inputs`; None if the branch sees all: without
            dropout, and not in training.
        """
        if self.seeds is None:
            return None
        if training is None:  # a convolution of Keras is not told
            training = in_training()
        known = not ops.is_tensor(training)
        if known and not training:
            return None
        rate, seed = dropout_of(self.method), self._seed_for(inputs)
        dropped = keras.random.dropout(inputs, rate, seed=seed)
        return dropped if known else ops.where(training, dropped, inputs)

    def _seed_for(self, inputs: Tensor) -> Tensor | keras.random.SeedGenerator:
        """Returns the seed of the next mask.

        Where JAX computes a layer twice to save memory, its `call` must assign
        to no variable. So there the seed follows from the numbers at hand, of
        which the weights change with each step.
        """
        assert self.seeds is not None
        if keras.backend.backend() != "jax" or not recomputed(
            self.target.owner
        ):
            return self.seeds
        trained = self.variables_by_name(trainable=True).values()
        total = sum(ops.sum(v.value) for v in trained)
        numbers = ops.stack([total, ops.sum(ops.cast(inputs, "float32"))])
        state = self.seeds.state.value
        return state ^ ops.view(ops.stop_gradient(numbers), state.dtype)

    def for_each_example(self, product: Product, inputs: Tensor) -> Tensor:
        """Returns `product(weights, inputs)`.

        The weights are the adapter's; or, after `give_each_example`, those of
        each example, along the first axis of `inputs`.
        """
        if self.examples is None:
            return product(self.current, inputs)
        rows = inputs.shape[0]
        if rows is not None and rows != self.examples:
            raise ValueError(
                f"`adapter_per_example` was given {self.examples} adapters, "
                f"and '{self.path}' in a layer with {rows} rows of input. "
                "There must be one adapter for each example of a batch, and "
                "all batches must be of this size: "
                f"`predict(x, batch_size={self.examples})`."
            )
        frozen, tables = {}, {}
        for weight in self.method.weights(self.shape):
            table = getattr(self, f"{weight.name}_of_each", None)
            if table is None:
                frozen[weight.name] = getattr(self.current, weight.name)
            else:
                tables[weight.name] = ops.convert_to_tensor(table)
        return over_examples(product, self.shape, frozen, tables, inputs)

    def give_each_example(self, values: dict[str, np.ndarray]) -> None:
        """Gives each example of a batch weights of its own, until it is undone.

        They are frozen variables, which compiled functions get as inputs. What
        saves an adapter knows nothing of them.

        Args:
            values: some of the adapter's weights by name, all trainable ones
                among them: an array (examples, ...) each.
        """
        autocasts = {
            w.name: w.dtype is None for w in self.method.weights(self.shape)
        }
        with unlocked(self), undistributed():
            for name, value in values.items():
                weight = getattr(self, name)
                table = self.add_weight(
                    name=f"{self.method.name}_{name}_of_each",
                    shape=value.shape,
                    initializer="zeros",
                    trainable=False,
                    dtype=weight.dtype,
                    autocast=autocasts[name],
                )
                placement = placement_of(variable_of(weight))
                if placement is not None:
                    spec = ((), *placement.spec)
                    place_variable(table, placement.sharding(spec))
                setattr(self, f"{name}_of_each", table)
                self.examples = len(value)
        self.assign_each_example(values)

    def assign_each_example(self, values: dict[str, np.ndarray]) -> None:
        """Assigns other values to what `give_each_example` has made."""
        for name, value in values.items():
            getattr(self, f"{name}_of_each").assign(value)

    def quantize(self, *args: object, **kwargs: object) -> None:
        """Raises a ValueError: Keras would leave the layer around it as it is.

        A model that was made before this package was imported comes here.
        """
        raise ValueError(
            f"'{self.path}' is an adapter. Quantize the model before you "
            "enable one, or call `merge_adapter()` first."
        )

    def merged(self, matrix: Tensor) -> Tensor:
        """Returns W' for W (in, out) or a bank (count, in, out).

        It is float32, or float64 if W is: then what is added to W is computed
        in float64 from the weights, and an untrained adapter adds exactly 0.
        """
        weights = self.current
        if keras.backend.standardize_dtype(matrix.dtype) == "float64":
            weights = self._in_float64()
        else:
            matrix = ops.cast(matrix, "float32")
        if self.view.count is None:
            return self.method.merged(weights, matrix)
        return over_bank(self.method.merged, self.method, weights, matrix)

    def _in_float64(self) -> Weights:
        found = WeightValues(self.shape)
        for weight in self.method.weights(self.shape):
            value = ops.convert_to_tensor(getattr(self.current, weight.name))
            if weight.dtype != "int32":
                value = ops.cast(value, "float64")
            setattr(found, weight.name, value)
        return found

    def reset(self) -> None:
        """Sets the trainables so that the layer computes x·W again."""
        for name, value in self.method.neutral(self.current).items():
            weight = getattr(self, name)
            weight.assign(ops.broadcast_to(value, weight.shape))

    def save_own_variables(self, store: Store) -> None:
        for name, variable in self._stored().items():
            store[name] = variable.value
        if not self.self_contained:
            store["base_fingerprint"] = self.base_fingerprint
            store["effect"] = self._effect()
        elif self.rounds:
            store[_ROUNDED] = np.ones(1, "int32")
        if self.seeds is not None:
            store[_SEEDS] = self.seeds.state.value

    def load_own_variables(self, store: Store) -> None:
        names = list(store.keys())
        self.target.finish_loading(bool(names))
        if not names:  # the file of a plain model
            self.reset()
            return
        wanted = self._stored()
        checks = (
            set() if self.self_contained else {"base_fingerprint", "effect"}
        )
        missing = sorted({*wanted, *checks} - set(names))
        if missing:
            raise ValueError(
                f"The weights file holds no {', '.join(missing)} for layer "
                f"'{self.path}', which is adapted by {self.method}. It holds "
                f"{', '.join(sorted(names))}: enable the method it was saved "
                "with."
            )
        if self.self_contained:
            for name, variable in wanted.items():
                variable.assign(store[name])
            self.rounds = _ROUNDED in names
            self._load_seeds(store)
            return
        ours = self.base_fingerprint
        assert ours is not None
        theirs = np.array(store["base_fingerprint"])
        if not matches(ours, theirs, self.variable_dtype):
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
        expected = np.array(store["effect"])
        if not self._does(expected) and not self._does_otherwise(expected):
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
        self._load_seeds(store)

    def _load_seeds(self, store: Store) -> None:
        """Lets dropout go on where a file was saved, if it was with dropout."""
        if self.seeds is not None and _SEEDS in store.keys():  # noqa: SIM118
            state = self.seeds.state
            state.assign(np.array(store[_SEEDS]).astype(state.dtype))

    def _effect(self) -> np.ndarray:
        matrix = self.target.matrix()
        return effect(self.method, self.current, matrix, self.rounds)

    def _does(self, expected: np.ndarray) -> bool:
        """Says whether the weights have the effect that a file holds."""
        assert self.base_fingerprint is not None
        size = float(self.base_fingerprint[0])
        return same_effect(self._effect(), expected, size, self.variable_dtype)

    def _does_otherwise(self, expected: np.ndarray) -> bool:
        """Takes the basis by the other rule, if that has the effect of a file.

        A full save does not say by which rule the basis was made: that of W
        rounded to bfloat16, or, as in release 0.1, of W as it is.
        """
        if not self.method.rebuilds_basis or self.replaced is not None:
            return False
        plan = self.target.planned(not self.rounds)
        stored, before = self._stored(), {}
        self.rounds = plan.rounds
        for name, value in plan.values.items():
            if f"{self.method.name}_{name}" not in stored:
                variable = getattr(self, name)
                before[name] = ops.copy(variable.value)
                variable.assign(value)
        if self._does(expected):
            return True
        self.rounds = not self.rounds
        for name, value in before.items():
            getattr(self, name).assign(value)
        return False

    @property
    def current(self) -> Weights:
        """The weights as the methods take them."""
        return Current(self, self.shape)

    def _stored(self) -> dict[str, Variable | Stepped]:
        """Returns the weights that a full save holds, by name."""
        return {
            f"{self.method.name}_{w.name}": getattr(self, w.name)
            for w in self.method.weights(self.shape)
            if self.self_contained or w.saved or w.overwritten or w.drawn
        }

    def weights_by_name(
        self, trainable: bool | None = None
    ) -> dict[str, Variable | Stepped]:
        """Returns the weights by full name (`svf_delta`)."""
        return {
            f"{self.method.name}_{w.name}": getattr(self, w.name)
            for w in self.method.weights(self.shape)
            if trainable is None or w.trainable == trainable
        }

    def variables_by_name(
        self, trainable: bool | None = None
    ) -> dict[str, Variable]:
        """Returns their variables, which hold them divided by their steps."""
        found = self.weights_by_name(trainable)
        return {name: variable_of(x) for name, x in found.items()}
