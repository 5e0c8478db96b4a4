"""The named adapters of one model: those in the variables and those stored.

The variables of the model, which compute and train, hold the adapter that is
set, or a weighted sum. The values of the others are on the host, and those of
the one that is set go there when another one is set.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
from keras import ops

from keras_svdtune.adapter.adapter import Adapter
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import nearest
from keras_svdtune.methods.settings import is_number, plain
from keras_svdtune.model.beside import trained_beside
from keras_svdtune.model.commit import commit
from keras_svdtune.model.state import (
    Enabled,
    StoredAdapter,
    adapted_part,
    enabled_models,
    keep_record,
    record_of,
    require_adapted,
)
from keras_svdtune.runtime.processes import to_numpy
from keras_svdtune.runtime.types import Array, Model, Variable

# What can be set: a name, the weight of each name in a sum, None for the base.
Choice = str | Mapping[str, float] | None


def check_name(name: object) -> None:
    """Raises a ValueError unless `name` is one for an adapter."""
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"`name` must be a string, not empty. Received: name={name!r}"
        )


def named_adapters(model: Model) -> "NamedAdapters":
    """Returns the adapters of a model, to change them.

    Raises:
        ValueError: the model has none, or none that have names; or a `with`
            block is open in which the variables hold no adapter's values.
    """
    root = adapted_part(model)
    owners = enabled_models(root, require_adapted(root))
    if len(owners) != 1:
        raise ValueError(
            f"The adapters of '{root.name}' have no names: its layers were "
            "declared with them, or several parts of it were adapted one by "
            "one. Enable or load an adapter on a plain model as a whole."
        )
    (owner,) = owners
    return NamedAdapters(owner, record_of(owner), require_adapted(owner))


@dataclasses.dataclass(frozen=True)
class NamedAdapters:
    """The adapters of one model.

    Attributes:
        owner: the model that they were enabled on.
        record: what is known of them.
        targets: the adapted matrices by path.
    """

    owner: Model
    record: Enabled
    targets: dict[str, Target]

    def checked(self, choice: Choice) -> dict[str, float]:
        """Returns the weight of each name in `choice`, which can be set."""
        if choice is None:
            return {}
        if isinstance(choice, str):
            choice = {choice: 1.0}
        if not isinstance(choice, Mapping) or not choice:
            raise ValueError(
                "`adapter` must be a name, a dict from names to weights, or "
                f"None for the base model. Received: {choice!r}"
            )
        chosen: dict[str, float] = {}
        for name, weight in choice.items():
            weight = plain(weight)
            if name not in self.record.names:
                raise ValueError(
                    f"Model '{self.owner.name}' has no adapter {name!r}. "
                    f"{nearest(str(name), self.record.names)}"
                )
            if isinstance(weight, Mapping):
                raise ValueError(
                    f"'{name}' has a weight for each layer here, and "
                    "`set_adapter` takes one for all. `Mixture.add_to(model, "
                    "name)` makes an adapter of such a mixture, and sets it."
                )
            if not is_number(weight):
                raise ValueError(
                    "Each weight must be a finite number. Received: "
                    f"{weight!r} for '{name}'"
                )
            chosen[name] = float(weight)
        method = self.record.method
        if list(chosen.values()) != [1.0] and not method.linear:
            raise ValueError(
                f"Adapters of {method.title} cannot be added up or scaled "
                "here: what it adds to W is not linear in what it trains. Set "
                "one of them; or save each with `save_adapter(path, name=...)` "
                "and try `compose`, whose sum of low-rank adapters is a LoRA. "
                f"Received: {dict(choice)}"
            )
        return chosen

    def now(self) -> StoredAdapter:
        """Returns the values that the variables of the model have."""
        return StoredAdapter(
            {
                path: {
                    name: host_array(x)
                    for name, x in own_weights(target.adapted)
                }
                for path, target in self.targets.items()
            },
            {k: host_array(x) for k, (x, _) in self.record.beside.items()},
            {path: base_of(x.adapted) for path, x in self.targets.items()},
        )

    def all_stored(self, now: StoredAdapter) -> dict[str, StoredAdapter]:
        """Returns the values of all adapters, given those in the variables.

        Raises:
            ValueError: the variables hold what was trained and has no name.
        """
        before = self.record.as_set
        if before is not None and not (
            _same(now.weights, before.weights)
            and _same(now.beside, before.beside)
        ):
            raise ValueError(
                f"{chosen_as_text(self.record.chosen)} was trained or loaded "
                "since it was set, and has no name to be kept under. Write it "
                "to a file by `save_adapter(path)`, or it would be lost; "
                "`load_adapter(path, name=...)` makes an adapter of it."
            )
        return self.stored(now)

    def stored(self, now: StoredAdapter) -> dict[str, StoredAdapter]:
        """Returns the values of all adapters, given those in the variables."""
        names = self.record.names
        return {k: now if x is None else x for k, x in names.items()}

    def tables(
        self, rows: list[dict[str, float]]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Returns the weights of each row of a batch, by path and name.

        Args:
            rows: what is to be set for each row.

        Returns:
            An array (rows, ...) for each weight; none for frozen ones that are
            the same in all rows.
        """
        now = self.now()
        stored = self.stored(now)
        found = {str(x): self.values_of(x, stored) for x in rows}
        for values in found.values():
            for key, value in self._whole(values).beside.items():
                if not np.array_equal(value, now.beside[key]):
                    raise ValueError(
                        f"These adapters have also trained '{key}', of which "
                        "there is one for all rows. Load their files with "
                        "`adapter_only=True`, or set them one by one."
                    )
        each = [found[str(x)].weights for x in rows]
        names = {
            weight.name
            for path, target in self.targets.items()
            for weight in target.adapted.method.weights(target.view.shape)
            if weight.trainable
            or weight.saved
            and not all(
                np.array_equal(
                    x[path][weight.name], now.weights[path][weight.name]
                )
                for x in each
            )
        }
        return {
            path: {
                name: np.stack([x[path][name] for x in each])
                for name in sorted(names & set(now.weights[path]))
            }
            for path in self.targets
        }

    def values_of(
        self, chosen: dict[str, float], stored: dict[str, StoredAdapter]
    ) -> StoredAdapter:
        """Returns the values that the variables have if `chosen` is set."""
        for name in chosen:
            self._check_base(name, stored[name])
        if list(chosen.values()) == [1.0]:
            return stored[next(iter(chosen))]
        parts = [(weight, stored[name]) for name, weight in chosen.items()]
        for name in chosen:
            for key, value in stored[name].beside.items():
                _, base = self.record.beside[key]
                if not np.array_equal(value, base):
                    raise ValueError(
                        f"'{name}' has also trained '{key}' besides its "
                        "adapter, which cannot be added up or scaled. Set it "
                        "alone, or load its file with `adapter_only=True`."
                    )
        return StoredAdapter(
            {
                path: self._sum(path, [(w, x.weights[path]) for w, x in parts])
                for path in self.targets
            },
            {},
            {path: base_of(x.adapted) for path, x in self.targets.items()},
        )

    def _check_base(self, name: str, adapter: StoredAdapter) -> None:
        for path, target in self.targets.items():
            if not np.array_equal(adapter.bases[path], base_of(target.adapted)):
                raise ValueError(
                    f"Another kernel was loaded into layer '{path}' since "
                    f"'{name}' was trained or loaded, so it fits no more. "
                    f"Call `delete_adapter({name!r})`."
                )

    def _sum(
        self, path: str, parts: list[tuple[float, dict[str, np.ndarray]]]
    ) -> dict[str, np.ndarray]:
        """Returns the weights of one layer for a weighted sum of adapters."""
        adapter = self.targets[path].adapted
        found: dict[str, np.ndarray] = {}
        for weight in adapter.method.weights(adapter.shape):
            name = weight.name
            if weight.trainable and parts:
                total = sum(w * x[name].astype("float64") for w, x in parts)
                found[name] = np.asarray(total, "float32")
            elif weight.saved or weight.overwritten:
                found[name] = host_array(getattr(adapter, name))
                if any(
                    not np.array_equal(x[name], found[name]) for _, x in parts
                ):
                    raise ValueError(
                        f"'{name}' of layer '{path}' differs between these "
                        "adapters, so they do not add up."
                    )
        if not parts:
            found |= neutral_values(adapter)
        return found

    def choose(
        self,
        chosen: dict[str, float],
        stored: dict[str, StoredAdapter],
        before: StoredAdapter,
    ) -> None:
        """Sets `chosen` among the adapters `stored`, or changes nothing.

        `before` are the values that the variables have.
        """
        values = self.values_of(chosen, stored)
        single = list(chosen.values()) == [1.0]
        names = {
            name: None if single and name in chosen else x
            for name, x in stored.items()
        }
        record = dataclasses.replace(
            self.record,
            names=names,
            chosen=chosen,
            as_set=None if single else self._whole(values),
        )
        with commit(self.owner) as undo:
            undo.callback(self.put, before)
            self.put(values)
            keep_record(self.owner, record)

    def _whole(self, values: StoredAdapter) -> StoredAdapter:
        """Returns the same with a value for all of `Enabled.beside`."""
        bases = {k: _float(base) for k, (_, base) in self.record.beside.items()}
        return dataclasses.replace(values, beside=bases | values.beside)

    def put(self, values: StoredAdapter) -> None:
        """Assigns values to the variables of the model."""
        for path, target in self.targets.items():
            for name, variable in own_weights(target.adapted):
                variable.assign(values.weights[path][name])
        for key, (variable, base) in self.record.beside.items():
            variable.assign(values.beside.get(key, base))

    def add(
        self,
        name: str,
        weights: dict[str, dict[str, np.ndarray]],
        beside: dict[str, tuple[Variable, np.ndarray]],
        model: Model | None,
    ) -> None:
        """Adds an adapter, or gives one other values, and sets it.

        Args:
            weights: its own weights by path and name; those that are left out
                are zero.
            beside: what it has set besides, by key: the variable and its value.
            model: the model that the user gave, if what trains in it besides
                the adapters is the adapter's from now on.
        """
        stored = self.all_stored(self.now())
        whole: dict[str, dict[str, np.ndarray]] = {}
        for path, target in self.targets.items():
            whole[path] = {
                key: np.asarray(weights[path][key])
                if key in weights[path]
                else np.zeros(tuple(x.shape), "float32")
                for key, x in own_weights(target.adapted)
            }
        with commit(self.owner) as undo:
            if model is not None:
                join(self.record, trained_beside(model), undo)
            variables = {k: x for k, (x, _) in beside.items()}
            keys = join(self.record, variables, undo)
            stored[name] = StoredAdapter(
                whole,
                {keys[id(x)]: _float(value) for x, value in beside.values()},
                {path: base_of(x.adapted) for path, x in self.targets.items()},
            )
            self.choose({name: 1.0}, stored, self.now())


def join(
    record: Enabled,
    variables: Mapping[str, Variable],
    undo: contextlib.ExitStack,
) -> dict[int, str]:
    """Lets variables besides the layers belong to the adapters from now on.

    The values that they have are those of the base. Returns the key of each
    variable of the record, by its id.
    """
    kept = record.beside
    keys = {id(x): key for key, (x, _) in kept.items()}
    for wanted, variable in variables.items():
        if id(variable) in keys:
            continue
        key, count = wanted, 0
        while key in kept:
            count += 1
            key = f"{wanted}#{count}"
        undo.callback(kept.pop, key, None)
        kept[key] = (variable, to_numpy(variable.value).copy())
        keys[id(variable)] = key
    return keys


def own_weights(adapter: Adapter) -> list[tuple[str, Variable]]:
    """Returns the weights of an adapter that another one has otherwise."""
    return [
        (weight.name, getattr(adapter, weight.name))
        for weight in adapter.method.weights(adapter.shape)
        if weight.saved or weight.overwritten
    ]


def base_of(adapter: Adapter) -> np.ndarray:
    """Returns what identifies the kernel and the basis of an adapter."""
    base = adapter.base_fingerprint
    assert base is not None  # a declared layer has no names
    return np.append(base, adapter.rounds)


def neutral_values(adapter: Adapter) -> dict[str, np.ndarray]:
    """Returns values of trainables with which the layer computes x·W."""
    return {
        name: to_numpy(
            ops.broadcast_to(value, tuple(getattr(adapter, name).shape))
        )
        for name, value in adapter.method.neutral(adapter.current).items()
    }


def host_array(variable: Variable) -> np.ndarray:
    """Returns the value of a variable on the host, never in half precision."""
    return _float(to_numpy(variable.value)).copy()


def _float(value: Array) -> np.ndarray:
    """Returns an array, in float32 if it is in half precision."""
    array = np.asarray(value)
    half = array.dtype.itemsize == 2 and array.dtype.name.endswith("float16")
    return array.astype("float32") if half else array


def _same(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Says whether two dicts of arrays, or of such dicts, are equal."""
    if one.keys() != other.keys():
        return False
    for key, a in one.items():
        b = other[key]
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if not _same(a, b):
                return False
        elif not np.array_equal(np.asarray(a), np.asarray(b)):
            return False
    return True


def chosen_as_text(chosen: Mapping[str, float]) -> str:
    """Returns what is set, in words."""
    if not chosen:
        return "The base model"
    if list(chosen.values()) == [1.0]:
        return f"'{next(iter(chosen))}'"
    return f"The sum {dict(chosen)}"


def listed(names: Iterable[str]) -> str:
    """Returns the first names of a list, in quotes."""
    found = [f"'{x}'" for x in names]
    return ", ".join(found[:4]) + (" ..." if len(found) > 4 else "")
