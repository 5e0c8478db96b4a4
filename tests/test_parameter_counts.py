"""Trainable parameters on real models: arithmetic on shapes, no weights.

The figures are those that the papers print, or that follow from the papers'
formulas, rounded to as many digits as they are written with here.
"""

import dataclasses
import math

import pytest
from helpers import method_id, tiny_gemma

import keras_svdtune
from keras_svdtune import (
    PSOFT,
    SVF,
    SVFT,
    AdaLoRA,
    DoRA,
    LoRA,
    LoRAXS,
    MiCA,
    MiLoRA,
    OPLoRA,
    PiSSA,
)

pytestmark = pytest.mark.fast


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A decoder: grouped attention and a gated feed-forward network."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int

    def matrices(self, names):
        """(in, out) of the matrices of one block, by the letters of SVFT's
        paper: query, key, value, output, gate, up, down."""
        query = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        shapes = {
            "Q": (self.hidden, query),
            "K": (self.hidden, kv),
            "V": (self.hidden, kv),
            "O": (query, self.hidden),
            "G": (self.hidden, self.intermediate),
            "U": (self.hidden, self.intermediate),
            "D": (self.intermediate, self.hidden),
        }
        return [shapes[name] for name in names]


MODELS = {
    "gemma_2b": Geometry(2048, 8, 1, 256, 16384, 18),
    "gemma_7b": Geometry(3072, 16, 16, 256, 24576, 28),
    "gemma2_9b": Geometry(3584, 16, 8, 256, 14336, 42),
    "gemma3_1b": Geometry(1152, 4, 1, 256, 6912, 26),
    "llama2_7b": Geometry(4096, 32, 32, 128, 11008, 32),
    "llama3_8b": Geometry(4096, 32, 8, 128, 14336, 32),
}
ALL, QKVUD, MLP, UDOG, QV = "QKVOGUD", "QKVUD", "GUD", "UDOG", "QV"

# (method, matrices): one figure for each of MODELS, in millions, or exact.
TABLE = {
    (SVF(), ALL): (
        *("193,536", "602,112", "924,672"),
        *("156,416", "917,504", "720,896"),
    ),
    (SVF(), QKVUD): (
        *("119,808", "430,080", "623,616"),
        *("99,840", "655,360", "458,752"),
    ),
    (SVF(), MLP): (
        *("110,592", "258,048", "451,584"),
        *("89,856", "393,216", "393,216"),
    ),
    (SVFT(off_diagonals=2), ALL): (
        *("0.967M", "3.01M", "4.62M"),
        *("0.781M", "4.59M", "3.60M"),
    ),
    (SVFT(off_diagonals=8), ALL): (
        *("3.281M", "10.2M", "15.7M"),
        *("2.65M", "15.6M", "12.2M"),
    ),
    (SVFT(off_diagonals=16), ALL): (
        *("6.352M", "19.8M", "30.4M"),
        *("5.11M", "30.2M", "23.7M"),
    ),
    (LoRA(rank=8), ALL): (
        *("9.81M", "25.0M", "27.0M"),
        *("6.52M", "20.0M", "21.0M"),
    ),
    (LoRA(rank=16), ALL): (
        *("19.6M", "50.0M", "54.0M"),
        *("13.0M", "40.0M", "41.9M"),
    ),
    (LoRA(rank=64), ALL): (
        *("78.4M", "200M", "216M"),
        *("52.2M", "159.9M", "167.8M"),
    ),
    (LoRA(rank=128), ALL): (
        *("156.9M", "400M", "432M"),
        *("104M", "319.8M", "335.5M"),
    ),
    (LoRA(rank=32), QKVUD): (
        *("26.25M", "68.81M", "73.6M"),
        *("17.6M", "56.1M", "56.6M"),
    ),
    (DoRA(rank=16), QKVUD): (
        *("13.50M", "35.52M", "37.9M"),
        *("9.04M", "28.9M", "29.1M"),
    ),
    (LoRAXS(rank=16), ALL): (
        *("32,256", "50,176", "75,264"),
        *("46,592", "57,344", "57,344"),
    ),
    (LoRAXS(rank=32), ALL): (
        *("129,024", "200,704", "301,056"),
        *("186,368", "229,376", "229,376"),
    ),
    (LoRAXS(rank=64), ALL): (
        *("516,096", "802,816", "1,204,224"),
        *("745,472", "917,504", "917,504"),
    ),
}
# What the papers themselves print for other choices of matrices.
PRINTED = [
    (SVFT(pattern="plain"), ALL, "gemma_2b", "0.19M"),
    (SVFT(pattern="plain"), QKVUD, "gemma_7b", "0.43M"),
    (SVFT(off_diagonals=12), UDOG, "llama3_8b", "13.1M"),
    # Printed as 17.2M.
    (SVFT(off_diagonals=16), UDOG, "llama3_8b", "17,266,688"),
    (SVF(), QV, "llama3_8b", "0.16M"),
    (LoRA(rank=16), QV, "llama3_8b", "6.82M"),
]
CASES = [
    (method, names, model, figure)
    for (method, names), figures in TABLE.items()
    for model, figure in zip(MODELS, figures, strict=True)
] + PRINTED


def trainable(method, shape):
    return sum(math.prod(w.shape) for w in method.weights(shape) if w.trainable)


def count(method, model, names):
    geometry = MODELS[model]
    for shape in geometry.matrices(names):
        assert method.for_shape(shape) == method
    block = sum(trainable(method, s) for s in geometry.matrices(names))
    return block * geometry.layers


def rounded(number, like):
    """`number` as text, with the digits and the unit of `like`."""
    if not like.endswith("M"):
        return f"{number:,}"
    digits = len(like[:-1].partition(".")[2])
    return f"{number / 1e6:.{digits}f}M"


@pytest.mark.parametrize(
    "method, names, model, figure",
    CASES,
    ids=[f"{m}-{method_id(x)}-{names}" for x, names, m, _ in CASES],
)
def test_published_counts(method, names, model, figure):
    found = count(method, model, names)
    assert rounded(found, figure) == figure, f"{found:,}"


@pytest.mark.parametrize("model", MODELS)
def test_patterns_count_as_many_as_banded(model):
    for d in (0, 2, 16):
        counts = {
            pattern: count(SVFT(pattern, d), model, ALL)
            for pattern in ("banded", "random", "top_k")
        }
        assert len(set(counts.values())) == 1, counts
        if d == 0:
            assert counts["banded"] == count(SVFT("plain"), model, ALL)
            assert counts["banded"] == count(SVF(), model, ALL)


@pytest.mark.parametrize("model", MODELS)
def test_low_rank_peers_count_alike(model):
    for rank in (8, 128):
        lora = count(LoRA(rank=rank), model, ALL)
        assert count(PiSSA(rank=rank), model, ALL) == lora
        assert count(MiLoRA(rank=rank), model, ALL) == lora
        triplets = len(ALL) * MODELS[model].layers * rank
        adalora = AdaLoRA(rank=rank // 2, initial_rank=rank)
        assert count(adalora, model, ALL) == lora + triplets
        inputs = sum(s[0] for s in MODELS[model].matrices(ALL))
        mica = rank * inputs * MODELS[model].layers
        assert count(MiCA(rank=rank), model, ALL) == mica
        assert count(OPLoRA(rank=rank), model, ALL) == lora
        turned = len(ALL) * MODELS[model].layers * rank * (rank + 3) // 2
        assert count(PSOFT(rank=rank), model, ALL) == turned
        outputs = sum(s[1] for s in MODELS[model].matrices(ALL))
        extra = count(DoRA(rank=rank), model, ALL) - lora
        assert extra == outputs * MODELS[model].layers


def test_svf_keeps_the_square_of_the_small_side():
    for geometry in MODELS.values():
        for shape in geometry.matrices(ALL):
            frozen = [w for w in SVF().weights(shape) if not w.trainable]
            count = sum(math.prod(w.shape) for w in frozen)
            assert count == min(shape) ** 2


def test_a_gemma_has_these_matrices():
    """So what is counted above is what is adapted in one that is built."""
    geometry = Geometry(24, 3, 1, 8, 20, 2)
    gemma = tiny_gemma(
        hidden_dim=24,
        num_query_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_dim=2 * 20,  # KerasHub counts gate and up together
        num_layers=2,
    )
    found = [x.matrix for x in keras_svdtune.estimate(gemma, LoRA(8)).layers]
    assert sorted(found) == sorted(2 * geometry.matrices(ALL))
