"""SpectralMonitor, against NumPy's SVD of the merged kernels in float64."""

import csv

import keras
import numpy as np
import pytest
from helpers import (
    all_methods,
    hosts_model,
    method_id,
    numpy,
    perturb,
    randomise,
    small_data,
    small_model,
)
from keras import ops
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralMoeExperts

import keras_svdtune
from keras_svdtune import SVF, SVFT, LoRA, PiSSA, SpectralMonitor
from keras_svdtune.matrix.rounding import rounded
from keras_svdtune.model.targets import find_targets

KEYS = {
    "sigma_drift": "drift",
    "update_effective_rank": "effective_rank",
    "update_top_energy": "top_energy",
    "intruder_dimensions": "intruders",
}
WHAT = {"rank": 2, "top": 3, "threshold": 0.9}
X, Y = small_data()


def kernels(model):
    """Path -> kernel, merged, as a matrix in float64."""
    found = {}
    for path, x in find_targets(model, adapted=True).items():
        kernel = x.kernel.value if x.adapter is None else x.merged_kernel()
        matrix = numpy(x.view.to_matrix(kernel)).astype("float64")
        if x.view.count is None:
            found[path] = matrix
        else:
            found |= {f"{path}#{i}": one for i, one in enumerate(matrix)}
    return found


def expected(old, new, rank, top, threshold):
    """(drift, effective rank, energy, intruders) by their definitions."""
    u, s, vt = np.linalg.svd(old, full_matrices=False)
    u_new, s_new, vt_new = np.linalg.svd(new, full_matrices=False)
    update = np.linalg.svd(new - old, compute_uv=False)
    p = update[update > 1e-5 * update[0]] / update.sum()
    tall = old.shape[1] <= old.shape[0]
    cosines = np.abs(vt @ vt_new.T if tall else u.T @ u_new)
    return (
        np.linalg.norm(s_new - s) / np.linalg.norm(s),
        np.exp(-np.sum(p * np.log(p))),
        np.sum(update[:rank] ** 2) / np.sum(update**2),
        int(np.sum(cosines.max(axis=0)[:top] < threshold)),
    )


def watched(model, monitor, change):
    """The logs of an epoch in which `change` happens to the model."""
    monitor.set_model(model)
    monitor.on_train_begin()
    change()
    logs = {"loss": 1.0}
    monitor.on_epoch_end(0, logs)
    return logs


def check(model, method, rel=1e-4):
    """At the start nothing has changed; then all is as the definitions say.

    The kernels become bfloat16 numbers, of which SVF and SVFT change the
    singular values themselves."""
    for target in find_targets(model).values():
        target.kernel.assign(rounded(numpy(target.kernel)))
    old = kernels(model)
    keras_svdtune.enable_adapter(model, method)
    if getattr(method, "option", None):  # it replaces the base
        old = kernels(model)
    monitor = SpectralMonitor(**WHAT)
    logs = watched(model, monitor, lambda: None)
    assert logs["sigma_drift"] < 1e-7
    assert [logs[key] for key in list(KEYS)[1:]] == [0.0] * 3
    perturb(model)
    logs = {"loss": 1.0}
    monitor.on_epoch_end(1, logs)
    new = kernels(model)
    keras_svdtune.remove_adapter(model)
    assert [x.path for x in monitor.changes] == list(old)
    truth = {path: expected(old[path], new[path], **WHAT) for path in old}
    for change in monitor.changes:
        drift, rank, energy, intruders = truth[change.path]
        assert change.drift == pytest.approx(drift, rel=rel, abs=1e-6)
        assert change.effective_rank == pytest.approx(rank, rel=1e-3)
        assert change.top_energy == pytest.approx(energy, rel=rel)
        assert change.intruders == intruders, change.path
    assert list(logs) == ["loss", *KEYS]
    for i, key in enumerate(KEYS):
        mean = np.mean([x[i] for x in truth.values()])
        assert logs[key] == pytest.approx(mean, rel=1e-3)
        assert type(logs[key]) is float
    assert logs["sigma_drift"] > 1e-3


HOSTS = ("dense_tall", "dense_wide", "dense_square", "conv_tall")


@pytest.fixture(scope="module")
def hosts():
    keras.backend.clear_session(free_memory=False)
    return hosts_model(names=HOSTS)


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_is_what_the_definitions_say(method, hosts):
    check(hosts, method)


@pytest.mark.parametrize(
    "method",
    [SVF(replace_kernel=True), PiSSA(2, quantize="int8")],
    ids=method_id,
)
def test_base_that_was_replaced(method):
    check(small_model(), method, rel=1e-3)


def test_components_that_cannot_train():
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4, name="d")], name="m"
    )
    randomise(model)
    kernel = numpy(model.layers[0].kernel)
    kernel[:, 3] = kernel[:, 2]  # of rank 3
    model.layers[0].kernel.assign(kernel)
    for pattern in ("plain", "banded", "random"):
        check(model, SVFT(pattern, 1))


@pytest.mark.parametrize("method", [SVF(), LoRA(2)], ids=method_id)
def test_bank_of_experts(method):
    bank = MixtralMoeExperts(3, 6, 8, name="experts")
    x = keras.Input((6,), batch_size=5)
    model = keras.Model(x, ops.mean(bank(x), axis=0), name="moe")
    randomise(model)
    assert len(kernels(model)) == 9
    check(model, method)


@pytest.mark.parametrize("method", [SVF(), SVFT("banded", 1)], ids=method_id)
def test_kernels_that_bfloat16_does_not_hold(method):
    """What is measured is the change of their roundings, 0.2 % away."""
    model = small_model()
    old = kernels(model)
    keras_svdtune.enable_adapter(model, method)
    monitor = SpectralMonitor(**WHAT)
    watched(model, monitor, lambda: perturb(model))
    for change in monitor.changes:
        w, new = old[change.path], kernels(model)[change.path]
        assert np.any(rounded(w) != w)
        drift, rank, energy, _ = expected(w, new, **WHAT)
        assert change.drift == pytest.approx(drift, rel=1e-2)
        assert change.effective_rank == pytest.approx(rank, rel=1e-2)
        assert change.top_energy == pytest.approx(energy, rel=1e-2)


def test_svf_makes_no_intruders_and_lora_does(hosts):
    for method, threshold in ((SVF(), 0.999), (LoRA(2), 0.7)):
        keras_svdtune.enable_adapter(hosts, method)
        monitor = SpectralMonitor(threshold=threshold)
        logs = watched(hosts, monitor, lambda: perturb(hosts, size=2))
        keras_svdtune.remove_adapter(hosts)
        if method == SVF():
            assert not logs["intruder_dimensions"]
    assert logs["intruder_dimensions"] > 0.5
    assert logs["update_effective_rank"] <= 2.0


def test_fit_logs_it_everywhere(tmp_path):
    model = small_model()
    keras_svdtune.enable_adapter(model, LoRA(2))
    old = kernels(model)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    monitor = SpectralMonitor(rank=2, top=3)
    history = model.fit(
        X,
        Y,
        epochs=3,
        verbose=0,
        callbacks=[
            monitor,
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.TensorBoard(tmp_path / "board", write_graph=False),
        ],
    ).history
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    for key in KEYS:
        assert [float(x[key]) for x in rows] == pytest.approx(history[key])
    assert history["sigma_drift"][0] > 0.0
    assert len(set(history["sigma_drift"])) == 3
    # The last epoch's are those of the model as it is after training.
    new = kernels(model)
    drifts = [expected(old[p], new[p], 2, 3, 0.5)[0] for p in old]
    assert history["sigma_drift"][-1] == pytest.approx(
        np.mean(drifts), rel=1e-3
    )
    assert board(tmp_path / "board" / "train") >= {
        f"epoch_{key}" for key in KEYS
    }


def board(folder):
    """The tags that TensorBoard finds in a folder."""
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"]) | set(events.Tags()["tensors"])


def test_a_part_of_the_matrices(hosts):
    keras_svdtune.enable_svf(hosts)
    paths = []
    for count in (2, 2, None, 99):
        monitor = SpectralMonitor(matrices=count)
        watched(hosts, monitor, lambda: None)
        paths.append([x.path for x in monitor.changes])
        assert monitor._bases
        monitor.on_train_end()
        assert not monitor._bases  # they are large
    keras_svdtune.remove_adapter(hosts)
    assert paths[0] == paths[1] and len(set(paths[0])) == 2
    assert paths[2] == paths[3] and len(paths[2]) == 4
    assert set(paths[0]) < set(paths[2])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "`rank` must be an integer"),
        ({"top": 1.5}, "`top` must be an integer"),
        ({"matrices": 0}, "`matrices` must be an integer"),
        ({"rank": None}, "`rank` must be an integer"),
        ({"threshold": 1.2}, "`threshold` must be a cosine"),
        ({"threshold": True}, "`threshold` must be a cosine"),
        ({"threshold": "0.5"}, "`threshold` must be a cosine"),
        ({"threshold": float("nan")}, "`threshold` must be a cosine"),
    ],
)
def test_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SpectralMonitor(**settings)


def test_without_an_adapter():
    model = small_model(compiled=True)
    with pytest.raises(ValueError, match="has no adapter"):
        model.fit(X, Y, verbose=0, callbacks=[SpectralMonitor()])


@pytest.mark.parametrize(
    "method", [SVF(), SVFT(off_diagonals=1), LoRA(2)], ids=method_id
)
def test_trainables_that_are_not_finite(method):
    model = small_model()
    keras_svdtune.enable_adapter(model, method)
    adapter = model.layers[0].adapter

    def spoil():
        for v in adapter.variables_by_name(trainable=True).values():
            v.assign(numpy(v) * np.nan)

    with pytest.raises(ValueError, match="small/first' holds NaN"):
        watched(model, SpectralMonitor(), spoil)
