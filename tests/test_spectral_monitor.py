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
from keras_svdtune.model.targets import find_matrices
from keras_svdtune.reports.model_matrix import matrices_of

KEYS = {
    "sigma_drift": "drift",
    "update_effective_rank": "effective_rank",
    "update_top_energy": "top_energy",
    "intruder_dimensions": "intruders",
}
WHAT = {"rank": 2, "top": 3, "threshold": 0.9}
X, Y = small_data()


def kernels(model):
    """Path -> kernel as a matrix, in float64."""
    return {
        path: numpy(x.merged()).astype("float64")
        for path, x in matrices_of(find_matrices(model)).items()
    }


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


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_is_what_the_definitions_say(method):
    model = hosts_model()
    old = kernels(model)
    keras_svdtune.enable_adapter(model, method)
    monitor = SpectralMonitor(**WHAT)
    logs = watched(model, monitor, lambda: perturb(model))
    keras_svdtune.merge_adapter(model)
    new = kernels(model)
    assert [x.path for x in monitor.changes] == list(old)
    truth = {path: expected(old[path], new[path], **WHAT) for path in old}
    for change in monitor.changes:
        drift, rank, energy, intruders = truth[change.path]
        assert change.drift == pytest.approx(drift, rel=1e-4, abs=1e-6)
        assert change.effective_rank == pytest.approx(rank, rel=1e-3)
        assert change.top_energy == pytest.approx(energy, rel=1e-4)
        assert change.intruders == intruders, change.path
    assert list(logs) == ["loss", *KEYS]
    for i, key in enumerate(KEYS):
        mean = np.mean([x[i] for x in truth.values()])
        assert logs[key] == pytest.approx(mean, rel=1e-3)
        assert type(logs[key]) is float
    assert logs["sigma_drift"] > 1e-3


@pytest.mark.parametrize("method", all_methods(), ids=method_id)
def test_nothing_has_changed_at_first(method):
    model = small_model()
    settings = method.settings()
    if type(settings.get("rank")) is int:
        method = type(method)(**(settings | {"rank": 2}))
    keras_svdtune.enable_adapter(model, method)
    logs = watched(model, SpectralMonitor(), lambda: None)
    assert logs["sigma_drift"] < 1e-7
    for key in list(KEYS)[1:]:
        assert logs[key] == 0.0


def test_svf_makes_no_intruders_and_lora_does():
    model = hosts_model()
    keras_svdtune.enable_svf(model)
    assert not watched(
        model, SpectralMonitor(threshold=0.999), lambda: perturb(model, size=2)
    )["intruder_dimensions"]
    keras_svdtune.remove_adapter(model)
    keras_svdtune.enable_adapter(model, LoRA(2))
    logs = watched(
        model, SpectralMonitor(threshold=0.7), lambda: perturb(model, size=2)
    )
    assert logs["intruder_dimensions"] > 0.5
    assert logs["update_effective_rank"] <= 2.0


@pytest.mark.parametrize(
    "method",
    [SVF(replace_kernel=True), PiSSA(2, quantize="int8")],
    ids=method_id,
)
def test_base_that_was_replaced(method):
    model = small_model()
    keras_svdtune.enable_adapter(model, method)
    old = kernels(model)
    monitor = SpectralMonitor(**WHAT)
    watched(model, monitor, lambda: perturb(model))
    new = kernels(model)
    for change in monitor.changes:
        drift, rank, energy, _ = expected(
            old[change.path], new[change.path], **WHAT
        )
        assert change.drift == pytest.approx(drift, rel=1e-3)
        assert change.effective_rank == pytest.approx(rank, rel=1e-3)
        assert change.top_energy == pytest.approx(energy, rel=1e-3)


def test_components_that_cannot_train():
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4, name="d")], name="m"
    )
    randomise(model)
    kernel = numpy(model.layers[0].kernel)
    kernel[:, 3] = kernel[:, 2]  # of rank 3
    model.layers[0].kernel.assign(kernel)
    for pattern in ("plain", "banded", "random"):
        old = kernels(model)
        keras_svdtune.enable_adapter(model, SVFT(pattern, 1))
        monitor = SpectralMonitor(**WHAT)
        watched(model, monitor, lambda: perturb(model))
        new = kernels(model)
        keras_svdtune.remove_adapter(model)
        drift, rank, energy, _ = expected(old["m/d"], new["m/d"], **WHAT)
        (change,) = monitor.changes
        assert change.drift == pytest.approx(drift, rel=1e-4)
        assert change.effective_rank == pytest.approx(rank, rel=1e-3)
        assert change.top_energy == pytest.approx(energy, rel=1e-4)


@pytest.mark.parametrize("method", [SVF(), LoRA(2)], ids=method_id)
def test_bank_of_experts(method):
    bank = MixtralMoeExperts(3, 6, 8, name="experts")
    x = keras.Input((6,), batch_size=5)
    model = keras.Model(x, ops.mean(bank(x), axis=0), name="moe")
    randomise(model)
    old = kernels(model)
    keras_svdtune.enable_adapter(model, method)
    monitor = SpectralMonitor(**WHAT)
    watched(model, monitor, lambda: perturb(model))
    new = kernels(model)
    assert len(monitor.changes) == len(old) == 9
    for change in monitor.changes:
        drift, rank, *_ = expected(old[change.path], new[change.path], **WHAT)
        assert change.drift == pytest.approx(drift, rel=1e-4)
        assert change.effective_rank == pytest.approx(rank, rel=1e-3)


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


def test_a_part_of_the_matrices():
    model = hosts_model()
    keras_svdtune.enable_svf(model)
    paths = []
    for count in (4, 4, None, 99):
        monitor = SpectralMonitor(matrices=count)
        watched(model, monitor, lambda: None)
        paths.append([x.path for x in monitor.changes])
    assert paths[0] == paths[1] and len(set(paths[0])) == 4
    assert paths[2] == paths[3] and len(paths[2]) == 9
    assert set(paths[0]) < set(paths[2])


def test_it_holds_no_bases_after_training():
    model = small_model()
    keras_svdtune.enable_adapter(model, LoRA(2))
    monitor = SpectralMonitor()
    watched(model, monitor, lambda: None)
    assert monitor._bases
    monitor.on_train_end()
    assert not monitor._bases and len(monitor.changes) == 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "`rank` must be an integer"),
        ({"top": 1.5}, "`top` must be an integer"),
        ({"matrices": 0}, "`matrices` must be an integer"),
        ({"rank": None}, "`rank` must be an integer"),
        ({"threshold": 1.2}, "`threshold` must be a cosine"),
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
