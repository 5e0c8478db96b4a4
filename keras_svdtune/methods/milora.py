"""MiLoRA: a low-rank adapter that starts from the smallest components."""

import dataclasses

from keras_svdtune.methods.base import register
from keras_svdtune.methods.dropout import DropsInput
from keras_svdtune.methods.pissa import SpectralLoRA, components_picture


@register
@dataclasses.dataclass(frozen=True)
class MiLoRA(DropsInput, SpectralLoRA):
    """Minor singular components adaptation: PiSSA's other end.

    A and B start from the r smallest components of W = U diag(s) Vᵀ:

        y = x·W + (alpha / rank)·(x·A·B - x·A₀·B₀),
        A₀ = U₋ᵣ·√s₋ᵣ (in, r),  B₀ = √s₋ᵣ·V₋ᵣᵀ (r, out)

    At first this leaves alone the large components, which hold what the model
    has learned, and less is forgotten. The components are the smallest ones of
    the economy SVD, not those of a rounded Gram matrix.

    Trainable: r·(in + out) a matrix, and as many frozen. A component with
    s = 0 has A₀ = B₀ = 0, no gradient, and stays as it is.

    Its best learning rates were LoRA's in `tests/benchmarks/study.py`; the
    authors used 3e-4 (7B, batch 16), and the sweep
    https://arxiv.org/abs/2602.04998 found optima 1 to 3 times below LoRA's.

    Args:
        rank: int, 1 or more; at most min(in, out) in each layer. Or float
            in (0, 1], for each layer the smallest rank that holds this share
            of the squared singular values, counted from the smallest.
        alpha: float or None. The scale is alpha / rank; None means rank,
            a scale of 1, as the authors use.
        dropout: by keyword only, float, 0 or more and below 1: as for `LoRA`,
            for x·(A·B - A₀·B₀); the authors use 0.05. They drop x·A·B, of which
            A₀·B₀ is a part, and so disturb the start; here it is exactly x·W
            in training too, and the mean over x̃ is the same.

    Example:

    ```python
    gemma.backbone.enable_milora(rank=16)
    ```

    Reference: Wang et al. 2024, https://arxiv.org/abs/2406.09044.
    """

    name = "milora"
    title = "MiLoRA"
    example = ", rank=8"
    part = "bottom"
    formula = (
        r"W' = W + \frac{\alpha}{r} (A B - A_0 B_0), \qquad"
        r" A_0 = U_{-r} \sqrt{s_{-r}}, \quad B_0 = \sqrt{s_{-r}} V_{-r}^\top,"
        r" \qquad A, B \text{ train}"
    )
    picture = components_picture("last")
