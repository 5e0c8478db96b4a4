"""Writes an adapter as a folder that Hugging Face's PEFT loads.

The folder is for the model in `transformers` that has the same weights as the
KerasHub model under other names. Two things differ:

- KerasHub's kernels, read as matrices (`matrix/view.py`), are (in, out), heads
  before the numbers of a head; `torch.nn.Linear` has the transpose of that.
  Both turn the first half of a head against the second in their rotary
  embeddings, so nothing is permuted.
- GPT-2 in transformers holds query, key and value side by side in one matrix,
  (in, 3·in), not transposed. Three products side by side are one:
  [A₁·B₁ A₂·B₂ A₃·B₃] = [A₁ A₂ A₃]·diag(B₁, B₂, B₃).

PEFT keeps A (in, r) as `lora_A` (r, in) and B (r, out) as `lora_B` (out, r).
Neither `peft` nor `transformers` is imported.
"""

import dataclasses
import functools
import json
import os
import pathlib
import warnings

import numpy as np
import safetensors.numpy
from keras import ops

from keras_svdtune.convert.hf_names import (
    Family,
    family_of,
    module_of,
    paths_in,
)
from keras_svdtune.convert.low_rank_change import (
    LayerConversion,
    low_rank_products,
    measure,
    weight_and_change,
)
from keras_svdtune.convert.to_lora import Conversion
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.dora import DoRA
from keras_svdtune.model.beside import kept_beside
from keras_svdtune.model.state import (
    adapted_part,
    check_no_block,
    enabled_method,
    require_adapted,
)
from keras_svdtune.model.targets import matrices_in
from keras_svdtune.runtime.parallel import run_all
from keras_svdtune.runtime.storage import write_atomically
from keras_svdtune.runtime.types import Json, Model


@dataclasses.dataclass(frozen=True)
class _Part:
    """Factors of one layer: a (in, k), b (k, out); for DoRA m (out,) too."""

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None = None


def export_peft(
    model: Model,
    folder: str | os.PathLike[str],
    base_model_name_or_path: str | None = None,
    rank: int | None = None,
) -> Conversion:
    """Writes the enabled adapter as a folder that PEFT loads.

    It is written as a LoRA by the rules of `to_lora`: exact for LoRA, PiSSA,
    MiLoRA, LoRA-XS, AdaLoRA, MiCA, PSOFT, OPLoRA, EVA, CorDA and LoRA-GA; the
    best approximation at `rank` for SVF and SVFT. DoRA is written as DoRA,
    exactly, unless `rank` is given. The model is not changed. The backbones of
    Gemma 1 to 3, Llama, Mistral, Qwen 2 to 3 (the dense ones) and GPT-2 are
    known.

    Args:
        model: a KerasHub Backbone or Task of one of these, with an adapter.
        folder: where to write; made if it is not there. What it holds of an
            earlier export is replaced.
        base_model_name_or_path: str or None. The base model in the config: its
            name on the Hugging Face hub, or a path.
        rank: as for `to_lora`.

    Returns:
        `Conversion`: the relative error of each layer and in all.

    Raises:
        ValueError: as `to_lora`; or the backbone, or a layer of it that is
            adapted, has no known counterpart in transformers.

    Example:

    ```python
    gemma.backbone.export_peft("pirate", "google/gemma-3-1b-it", rank=16)
    # elsewhere
    model = AutoModelForCausalLM.from_pretrained("google/gemma-3-1b-it")
    model = peft.PeftModel.from_pretrained(model, "pirate")
    ```
    """
    folder = pathlib.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"`folder` must be a folder. Received the file: folder='{folder}'"
        )
    root = adapted_part(model)
    method = enabled_method(root)
    targets = require_adapted(root)
    check_no_block(root)
    if beside := kept_beside(model):
        warnings.warn(
            "The folder holds the adapter alone. What trains besides is not "
            f"exported: {', '.join(beside)}",
            stacklevel=2,
        )
    family = family_of(root)
    modules: dict[str, dict[str, str]] = {}
    for path in targets:
        module, name = module_of(path, family)
        modules.setdefault(module, {})[name] = path
    parts, measured = _parts(targets, rank)

    matrices = matrices_in(root, adapted=True).targets
    tensors, ranks, dora = {}, {}, False
    for module, paths in modules.items():
        whole = _side_by_side(
            [
                parts.get(path) or _nothing(matrices[path], parts)
                for path in paths_in(module, paths, family)
            ]
        )
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(whole.a.T)
        tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(whole.b.T)
        if whole.m is not None:
            tensors[f"{key}.lora_magnitude_vector"] = whole.m
            dora = True
        ranks[module] = whole.a.shape[1]
    config = _config(ranks, family, dora, base_model_name_or_path)

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / "adapter_model.safetensors",
        safetensors.numpy.save(tensors, {"format": "pt"}),
    )
    write_atomically(
        folder / "adapter_config.json",
        (json.dumps(config, indent=2) + "\n").encode(),
    )
    return Conversion(method, measured)


def _parts(
    targets: dict[str, Target], rank: int | None
) -> tuple[dict[str, _Part], tuple[LayerConversion, ...]]:
    """Returns the factors of each layer, and how near they come to dW."""
    if rank is None and all(_dora_factors(x) for x in targets.values()):
        jobs = {p: functools.partial(_dora, p, x) for p, x in targets.items()}
        found = run_all("DoRA: exporting", jobs)
        return (
            {path: part for path, (part, _) in found.items()},
            tuple(measured for _, measured in found.values()),
        )
    products = low_rank_products(targets, rank)
    return (
        {path: _Part(x.a, x.b) for path, x in products.items()},
        tuple(x.measured for x in products.values()),
    )


def _dora_factors(target: Target) -> tuple[np.ndarray, ...] | None:
    """Returns DoRA's a, b, m; None for other methods or zero columns in W."""
    method = target.adapted.method
    if not isinstance(method, DoRA):
        return None
    factors = method.magnitude_factors(target.adapted.current)
    return factors and tuple(ops.convert_to_numpy(x) for x in factors)


def _dora(path: str, target: Target) -> tuple[_Part, LayerConversion]:
    matrix, change = weight_and_change(path, target)
    factors = _dora_factors(target)
    assert factors is not None
    a, b, m = factors
    w = ops.convert_to_numpy(matrix).astype("float64")
    directions = w + a.astype("float64") @ b
    found = directions * (m / np.linalg.norm(directions, axis=0)) - w
    return _Part(a, b, m), measure(path, change, found, a.shape[1])


def _nothing(target: Target, others: dict[str, _Part]) -> _Part:
    """Returns factors of a change of zero, with m if `others` have one."""
    rows, columns = target.view.shape
    a, b = np.zeros((rows, 0), "float32"), np.zeros((0, columns), "float32")
    if next(iter(others.values())).m is None:
        return _Part(a, b)
    w = ops.convert_to_numpy(target.matrix())
    return _Part(a, b, np.linalg.norm(w, axis=0))


def _side_by_side(parts: list[_Part]) -> _Part:
    """Joins the parts of a module: [A₁ A₂ ..], diag(B₁, B₂, ..), [m₁ m₂ ..]."""
    a = np.concatenate([x.a for x in parts], axis=1)
    b = np.zeros((a.shape[1], sum(x.b.shape[1] for x in parts)), "float32")
    row = column = 0
    for part in parts:
        rows, columns = part.b.shape
        b[row : row + rows, column : column + columns] = part.b
        row, column = row + rows, column + columns
    m = [x.m for x in parts if x.m is not None]
    return _Part(a, b, np.concatenate(m) if m else None)


def _config(
    ranks: dict[str, int], family: Family, dora: bool, base: str | None
) -> Json:
    """Makes `adapter_config.json`, with alpha = rank for a scale of 1."""
    largest = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not family.transposed,
        "use_dora": dora,
        "use_rslora": False,
        "target_modules": list(ranks),
    }
