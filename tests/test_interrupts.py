"""A call that is interrupted anywhere leaves a model whole.

In a notebook people stop cells all day. Here a KeyboardInterrupt is raised at
one line after the other of what changes a model: afterwards the model is as it
was, or as the call would have left it, and the same call again ends well.

A real Ctrl-C waits for the end of a change (`runtime/interrupts.py`), so what
is raised here stands for the errors that no signal handler holds back.
"""

import os
import pathlib
import signal
import sys
import threading

import keras
import numpy as np
import pytest
from helpers import adapted, assert_same, numpy, values

import keras_svdtune
from keras_svdtune.runtime.interrupts import interrupts_held

PACKAGE = pathlib.Path(keras_svdtune.__file__).parent
# What changes a model. `interrupts.py` itself cannot be interrupted.
CHANGES = [
    *(PACKAGE / "model").glob("*.py"),
    *(PACKAGE / "hosts").glob("*.py"),
    PACKAGE / "adapter" / "adapter.py",
    PACKAGE / "files" / "save_load.py",
    PACKAGE / "files" / "beside.py",
    PACKAGE / "runtime" / "keras_internals.py",
]
FILES = {str(path) for path in CHANGES}
X = np.random.RandomState(0).normal(size=(4, 6)).astype("float32")
Y = np.random.RandomState(1).normal(size=(4, 3)).astype("float32")


class Raises:
    """Raises a KeyboardInterrupt at the `number`-th new line that is run."""

    def __init__(self, number):
        self.number = number
        self.lines = set()

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename in FILES else None

    def _line(self, frame, event, arg):
        where = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and where not in self.lines:
            self.lines.add(where)
            if len(self.lines) == self.number:
                sys.settrace(None)
                raise KeyboardInterrupt(f"{where[0]}:{where[1]}")
        return self._line


def make():
    """A model with a BatchNormalization, a frozen layer and a head."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, name="a"),
            keras.layers.BatchNormalization(name="n"),
            keras.layers.Dense(4, name="b", trainable=False),
            keras.layers.Dense(3, name="c"),
        ],
        name="m",
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def trained(method):
    model = make()
    keras_svdtune.enable_adapter(model, method)
    for number, variable in enumerate(model.trainable_variables):
        random = np.random.RandomState(number)
        variable.assign(0.1 * random.normal(size=variable.shape))
    return model


def state(model):
    """All that a user can see of a model, without its values of outputs."""
    return {
        "classes": [type(x) for x in model.layers],
        "adapted": list(adapted(model)),
        "weights": [v.path for v in model.weights],
        "trainable": [v.path for v in model.trainable_variables],
        "flags": [x.trainable for x in model.layers],
        "sublayers": [[y.name for y in x._layers] for x in model.layers],
        "attributes": [sorted(x.__dict__) for x in model.layers],
    }


def saved(tmp_path, method, name):
    model = trained(method)
    for variable in model.trainable_variables:
        variable.assign(variable.value * 2.0)
    keras_svdtune.save_adapter(model, tmp_path / name)
    return tmp_path / name


SVF, LORA = keras_svdtune.SVF(), keras_svdtune.LoRA(rank=2)
QPISSA = keras_svdtune.PiSSA(rank=2, quantize="int8")


def merged_once(model):
    with keras_svdtune.adapter_merged(model):
        pass


def disabled_once(model):
    with keras_svdtune.adapter_disabled(model):
        pass


VERBS = {
    "enable": (make, lambda m, _: keras_svdtune.enable_adapter(m, SVF)),
    "enable_replaced": (
        make,
        lambda m, _: keras_svdtune.enable_svf(
            m, ["a", "c"], replace_kernel=True
        ),
    ),
    "enable_quantized": (
        make,
        lambda m, _: keras_svdtune.enable_adapter(m, QPISSA, ["a", "c"]),
    ),
    "start_from_inputs": (
        make,
        lambda m, _: keras_svdtune.enable_eva(m, 2, data=X),
    ),
    "start_from_gradients": (
        make,
        lambda m, _: keras_svdtune.enable_lora_ga(m, 2, data=(X, Y)),
    ),
    "load": (make, lambda m, f: keras_svdtune.load_adapter(m, f)),
    "swap": (
        lambda: trained(SVF),
        lambda m, f: keras_svdtune.load_adapter(m, f),
    ),
    "remove": (
        lambda: trained(SVF),
        lambda m, _: keras_svdtune.remove_adapter(m),
    ),
    "merge": (
        lambda: trained(SVF),
        lambda m, _: keras_svdtune.merge_adapter(m),
    ),
    "convert": (
        lambda: trained(SVF),
        lambda m, _: keras_svdtune.to_lora(m, rank=2),
    ),
    "merged_for_a_while": (lambda: trained(SVF), lambda m, _: merged_once(m)),
    "disabled": (lambda: trained(SVF), lambda m, _: disabled_once(m)),
}


def same(one, other):
    """Whether two are equal; else what differs is printed, for a failure."""
    first, second = one[0], other[0]
    different = [key for key in first if first[key] != second[key]]
    for key in different:
        print(key, first[key], second[key])
    return not different and all(map(np.array_equal, one[1:], other[1:]))


def seen(model):
    numbers = [numpy(v) for v in model.weights]
    return [state(model), *numbers]


# Every line is a matter of minutes; every eleventh is always tried.
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_at_any_line(verb, every, tmp_path):
    start, run = VERBS[verb]
    file = saved(tmp_path, SVF, "other.safetensors")
    before, model = seen(start()), start()
    with Raises(None) as counted:
        run(model, file)
    after = seen(model)
    kept = 0
    for number in range(1, len(counted.lines) + 1, every):
        model, where = start(), "nowhere"
        try:
            with Raises(number):
                run(model, file)
        except KeyboardInterrupt as error:
            where = str(error)
        now = seen(model)
        if same(now, before):
            kept += 1
            run(model, file)  # ends well the second time
            assert same(seen(model), after), where
        else:
            assert same(now, after), where
        assert np.isfinite(numpy(model(X))).all()
        if number % 10 == 0:
            model.fit(X, np.zeros((4, 3)), verbose=0)
    assert kept > 1, "hardly anything was interrupted"


@pytest.fixture
def ctrl_c():
    """Python's handler, which a process in the background starts without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end(ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            done.append(1)
    assert len(done) == 1000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_ctrl_c_while_a_model_changes(monkeypatch, ctrl_c):
    """The real signal, in the middle of attaching: the call completes."""
    from keras_svdtune.hosts import attach

    model, attach_plan = make(), attach.attach_plan

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return attach_plan(*args)

    monkeypatch.setattr(attach, "attach_plan", stopped)
    with pytest.raises(KeyboardInterrupt):
        keras_svdtune.enable_svf(model)
    assert len(adapted(model)) == 3
    keras_svdtune.remove_adapter(model)
    assert_same(values(model), values(make()))


def test_another_thread_is_not_concerned():
    raised = []

    def work():
        try:
            with interrupts_held():
                pass
        except ValueError as error:  # signal works in the main thread only
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not raised
