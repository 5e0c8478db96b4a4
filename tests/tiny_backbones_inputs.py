"""What the tiny backbones share: their sizes, and their inputs.

All inputs have a batch of two and are the same every time. One sequence of
the two ends in padding, so that masks count.
"""

import inspect
import re

import numpy as np

BATCH, LENGTH, VOCABULARY = 2, 8, 24

# For the arguments of these names that have no default.
SIZES = {
    "vocabulary_size": VOCABULARY,
    "vocab_size": VOCABULARY,
    "num_layers": 2,
    "num_hidden_layers": 2,
    "num_heads": 2,
    # With fewer heads for keys and values than for queries.
    "num_query_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "head_size": 8,
    "hidden_dim": 16,
    "hidden_size": 16,
    "embedding_dim": 16,
    "projection_dim": 16,
    "output_dim": 16,
    "intermediate_dim": 32,
    "mlp_dim": 32,
    "moe_intermediate_dim": 8,
    "num_experts": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "layer_norm_epsilon": 1e-6,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "dropout_rate": 0.0,
    "image_shape": (16, 16, 3),
    "image_size": 16,
    "patch_size": 4,
}
# For these also where the default is larger.
LIMITS = {
    "max_sequence_length": LENGTH,
    "sliding_window": 4,
    "sliding_window_size": 4,
    "pool_size": 2,
    "top_k": 2,
}


def sized(cls, **settings):
    """A tiny model or layer of this class, with other settings by keyword.

    The sizes are those for the names of its arguments: for the encoder and
    the decoder where it has both.
    """
    known = dict(settings)
    for name, parameter in inspect.signature(cls).parameters.items():
        size = re.sub("^(encoder|decoder)_|_(enc|dec)$", "", name)
        if name in settings or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if size in LIMITS:
            known[name] = LIMITS[size]
        elif parameter.default is parameter.empty and size in SIZES:
            known[name] = SIZES[size]
    return cls(**known)


def random(*shape, low=-1.0, high=1.0):
    """Numbers between two bounds, for everything that is not an index."""
    values = np.random.default_rng(0).uniform(low, high, (BATCH, *shape))
    return values.astype("float32")


def images(size=16):
    """Two square images."""
    return random(size, size, 3, low=0.0)


def ids(length=LENGTH, vocabulary=VOCABULARY):
    """Two sequences of tokens, none of the special ones: those are below 3."""
    tokens = np.random.default_rng(1).integers(3, vocabulary, (BATCH, length))
    return tokens.astype("int32")


def mask(length=LENGTH):
    """A padding mask: the second sequence ends two tokens earlier."""
    valid = np.ones((BATCH, length), "int32")
    valid[1, -2:] = 0
    return valid


def tokens(length=LENGTH, prefix=""):
    """Tokens and their padding mask."""
    return {
        f"{prefix}token_ids": ids(length) * mask(length),
        f"{prefix}padding_mask": mask(length),
    }


def segmented(length=LENGTH):
    """Tokens of two segments."""
    segments = np.tile(np.arange(length) >= length // 2, (BATCH, 1))
    return {**tokens(length), "segment_ids": segments.astype("int32")}


def pairs():
    """Tokens for an encoder and for a decoder."""
    return {**tokens(prefix="encoder_"), **tokens(6, prefix="decoder_")}


def indices(start, count):
    """Where the tokens of an image or a clip go, the same in both rows."""
    return np.tile(np.arange(start, start + count, dtype="int32"), (BATCH, 1))


def marked(start, count, length=LENGTH):
    """A mask of these places."""
    places = np.zeros((BATCH, length), "int32")
    places[:, start : start + count] = 1
    return places
