"""Every einsum equation of KerasHub is one matrix, against np.einsum."""

import numpy as np
import pytest
from helpers import numpy
from keras import ops

from keras_svdtune.matrix.view import DENSE_EQUATION, MatrixView

pytestmark = pytest.mark.fast

SIZES = dict(zip("abcdefhijklmnopqrstuvwxyz", range(2, 27), strict=True))
SIZES |= {"x": 7, "y": 4, "z": 3}

# The equations of all EinsumDense layers of KerasHub's backbones.
KERAS_HUB = [
    "abc,cd->abd",
    "abc,cde->abde",
    "abc,cdef->abdef",
    "abcd,cde->abe",
    "bkm,mnh->bknh",
    "bkm,mvh->bkvh",
    "bqm,mnh->bqnh",
    "bqm,muh->bquh",
    "bquh,uhm->bqm",
    "bsd,dkh->bskh",
    "bsd,kdh->bskh",
    "bsd,qdh->bsqh",
    "bsm,mnh->bsnh",
    "btd,df->btf",
    "btd,dnh->btnh",
    "btd,ndh->btnh",
    "btf,fd->btd",
    "btm,mnh->btnh",
    "btnh,nhd->btd",
    "ibnd,hnd->ibh",
]
# Others that are matrices: contracted axes apart, or in another order in
# the kernel; batch axes behind or between; a vector; outputs reordered.
OTHERS = [
    "ab,bc->ac",
    "xaby,bca->xyc",
    "nhb,hdn->bd",
    "abc,dc->adb",
    "ab,b->a",
    "ab,cbd->dac",
]
ELLIPSIS = [
    ("...x,xy->...y", (2, 3, 5, 7)),
    ("...x,xy->...y", (5, 7)),
    ("...xz,yxz->...y", (2, 5, 7, 3)),
    ("x...,xy->y...", (7, 2, 3)),
    ("x...,yx->...y", (7, 2, 3)),
    ("a...x,xyz->az...y", (2, 3, 5, 7)),
    (DENSE_EQUATION, (2, 3, SIZES["i"])),
]


def shapes(equation):
    """Distinct sizes, so that no two axes can be confused."""
    inputs, kernel = equation.split("->")[0].split(",")
    return tuple(SIZES[c] for c in inputs), tuple(SIZES[c] for c in kernel)


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype("float32") for s in shapes]


def check(equation, x, kernel):
    view = MatrixView(equation, kernel.shape)
    expected = np.einsum(equation, x, kernel)
    matrix = numpy(view.to_matrix(ops.convert_to_tensor(kernel)))
    assert matrix.shape == view.shape
    flat = view.flatten_inputs(ops.convert_to_tensor(x))
    product = ops.matmul(flat, matrix)
    found = view.unflatten_outputs(product, view.batch_dims(x))
    assert tuple(found.shape) == expected.shape
    np.testing.assert_allclose(numpy(found), expected, rtol=1e-4, atol=1e-4)
    # And back: each step has an exact inverse.
    dims = view.batch_dims(x)
    assert np.array_equal(numpy(view.to_kernel(matrix)), kernel)
    assert np.array_equal(numpy(view.unflatten_inputs(flat, dims)), x)
    back = view.flatten_outputs(found)
    assert np.array_equal(numpy(back), numpy(product))


@pytest.mark.parametrize("equation", KERAS_HUB + OTHERS)
def test_equals_einsum(equation):
    check(equation, *arrays(*shapes(equation)))


@pytest.mark.parametrize("equation, shape", ELLIPSIS)
def test_ellipsis(equation, shape):
    labels = equation.split("->")[0].split(",")[1]
    check(equation, *arrays(shape, tuple(SIZES[c] for c in labels)))


def test_ellipsis_has_the_width_of_each_input():
    view = MatrixView("...x,xy->...y", (7, 4))
    for shape in [(7,), (2, 7), (2, 3, 5, 7)]:
        x, kernel = arrays(shape, (7, 4))
        y = view.flatten_inputs(ops.convert_to_tensor(x)) @ kernel
        y = view.unflatten_outputs(y, view.batch_dims(x))
        np.testing.assert_allclose(numpy(y), x @ kernel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "equation, kernel_shape, shape",
    [
        ("btd,ndh->btnh", (4, 640, 256), (640, 1024)),
        ("btnh,nhd->btd", (4, 256, 640), (1024, 640)),
        ("ibnd,hnd->ibh", (32, 2, 8), (16, 32)),
        (DENSE_EQUATION, (640, 2048), (640, 2048)),
    ],
)
def test_shape(equation, kernel_shape, shape):
    assert MatrixView(equation, kernel_shape).shape == shape
    assert MatrixView(equation.replace(",", ", "), kernel_shape).shape == shape


@pytest.mark.parametrize(
    "equation, rank, message",
    [
        ("beh,ehd->bed", 3, "one for each e, not one matrix"),
        ("bn,nn->bn", 2, "occurs twice"),
        ("bnn,nd->bd", 2, "occurs twice"),
        ("btd,df->bf", 2, "'t' of 'btd,df->bf' occurs in one operand"),
        ("bt,tdf->bf", 3, "'d' of 'bt,tdf->bf' occurs in one operand"),
        ("bd,df->bfo", 2, "'o' of 'bd,df->bfo' occurs in one operand"),
        ("btd,df", 2, "'input,kernel->output'"),
        ("btd->btf", 2, "'input,kernel->output'"),
        ("a,ab,bc->c", 2, "'input,kernel->output'"),
        ("btd,df->btf", 3, "wants a kernel of rank 2"),
    ],
)
def test_refuses_what_is_no_matrix(equation, rank, message):
    with pytest.raises(ValueError) as caught:
        MatrixView(equation, (2,) * rank)
    assert message in str(caught.value)
    assert equation in str(caught.value)
