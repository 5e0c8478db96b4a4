"""PEFT's methods on the same real weights, in transformers: eager torch.

PEFT wraps a model's layers in place, and its PiSSA changes their weights; so
each candidate has a model of its own. What a step is, is the same: forward and
backward of the model without its head, on the mean square of its output.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREFIX = "PEFT"
FLOOR = f"{PREFIX}: frozen floor"


class PeftStep:
    """An eager step of a transformers model."""

    def __init__(self, model: Any, tokens: Any):
        self._model, self._tokens = model, tokens
        self._values = [p for p in model.parameters() if p.requires_grad]

    def __call__(self) -> None:
        for value in self._values:
            value.grad = None
        output = self._model(input_ids=self._tokens).last_hidden_state
        output.square().mean().backward()

    def figures(self) -> dict[str, float]:
        return {}


def candidates(name: str, inputs: Any, rank: int) -> list[Any]:
    """A candidate of `step_time.py` for each method that PEFT has too.

    Args:
        name: one of the demo's models, whose converted weights are there.
        inputs: what the step is called with; its `"token_ids"` are used.
        rank: of all methods.
    """
    import peft
    import torch
    from step_time import Candidate

    tokens = torch.from_numpy(inputs["token_ids"].astype("int64"))
    settings: dict[str, dict[str, Any]] = {
        f"LoRA (rank {rank})": {},
        f"DoRA (rank {rank})": {"use_dora": True},
        f"PiSSA (rank {rank})": {"init_lora_weights": "pissa"},
        f"PiSSA (rank {rank}) niter 16": {
            "init_lora_weights": "pissa_niter_16"
        },
    }
    configs: dict[str, Any] = {
        label: peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", **extra
        )
        for label, extra in settings.items()
    }
    configs[f"AdaLoRA (rank {rank})"] = peft.AdaLoraConfig(
        init_r=-(-3 * rank // 2),  # as ours starts
        target_r=rank,
        total_step=100,
        lora_alpha=rank,
        target_modules="all-linear",
    )
    found = []
    load = _loader(name)
    floor = load()
    for parameter in floor.parameters():
        parameter.requires_grad = False
    first = next(p for p in floor.layers.parameters() if p.dim() == 1)
    first.requires_grad = True
    found.append(Candidate(FLOOR, lambda: PeftStep(floor, tokens)))
    for label, config in configs.items():
        model = load()
        model.embed_tokens = floor.embed_tokens  # most of the memory
        start = time.perf_counter()
        model = peft.get_peft_model(model, config)
        seconds = time.perf_counter() - start
        found.append(
            Candidate(
                f"{PREFIX}: {label}",
                lambda: PeftStep(model, tokens),  # noqa: B023
                enable_seconds=seconds,
                parameters=model.get_nb_trainable_parameters()[0],
                file_bytes=_saved_bytes(model),
            )
        )
    return found


def _loader(name: str) -> Callable[[], Any]:
    """What loads the model from its GGUF file, by way of one folder."""
    import torch
    import transformers

    from keras_svdtune.demo.weights import gguf_to_hf, weights

    weights.load_model(name)  # fetches what is missing
    folder = tempfile.TemporaryDirectory()
    gguf = weights.cache_folder() / name / "model.gguf"
    gguf_to_hf.write_hf_folder(gguf, Path(folder.name))

    def load() -> Any:
        assert folder  # it lives as long as what reads it
        return transformers.AutoModel.from_pretrained(
            folder.name, dtype=torch.float32, attn_implementation="eager"
        ).train()

    return load


def _saved_bytes(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(
            p.stat().st_size for p in Path(folder).rglob("*.safetensors")
        )
