"""Kernels that a layer reads directly: banks of experts, and others.

That they keep every promise is in `test_hosts.py`.
"""

import pytest
from helpers import assert_close, numpy, perturb, scaled
from test_hosts import experts, images

import keras_svdtune
from keras_svdtune.model.targets import adapted_targets


@pytest.mark.fast
def test_each_expert_has_its_own_singular_values():
    """Against float64 NumPy, expert by expert."""
    model = experts()
    keras_svdtune.enable_svf(model)
    perturb(model)
    targets = adapted_targets(model).values()
    assert [x.kernel.shape for x in targets] == [(3, 6, 8)] * 2 + [(3, 8, 6)]
    for target in targets:
        w = numpy(target.kernel).astype("float64")
        delta = numpy(target.adapter.delta).astype("float64")
        assert delta.shape == (3, min(w.shape[1:]))
        merged = numpy(target.merged_kernel())
        for expert in range(3):
            expected = scaled(w[expert], delta[expert])
            assert_close(merged[expert], expected, 1e-5)


def test_convolutions_that_are_found():
    model = images()
    keras_svdtune.enable_svf(model)
    found = [target.name for target in adapted_targets(model).values()]
    assert found == ["kernel", "pointwise_kernel", "groups"]


def test_adalora_leaves_banks_out():
    with pytest.raises(ValueError, match="takes no bank of matrices"):
        keras_svdtune.enable_adalora(experts(), rank=2)
