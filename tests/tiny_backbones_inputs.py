"""Settings and inputs that the tiny backbones share.

All inputs have a batch of two and are the same every time. One sequence of
the two ends in padding, so that masks count.
"""

import numpy as np

BATCH, LENGTH, VOCABULARY = 2, 8, 24

# The settings that nearly every transformer has under these names.
LAYERS = {"num_layers": 2, "hidden_dim": 16, "intermediate_dim": 32}
ENCODER = {"vocabulary_size": VOCABULARY, "num_heads": 2, **LAYERS}
# With fewer heads for keys and values than for queries.
GROUPED = {
    "vocabulary_size": VOCABULARY,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    **LAYERS,
}
# Local and global layers, every norm that a Gemma may have.
GEMMA = {
    **GROUPED,
    "head_dim": 8,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4,
}
T5_GEMMA = {
    "vocabulary_size": VOCABULARY,
    **{
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "hidden_dim": 16,
            "intermediate_dim": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }.items()
    },
    "sliding_window": 4,
    "cross_attention_hidden_size": 16,
    "query_pre_attn_scalar": 8.0,
}
# Vision and text towers, and what goes with them.
VISION_TOWER = {
    "patch_size": 8,
    "num_heads": 2,
    "image_shape": (32, 32, 3),
    **LAYERS,
}
TEXT_TOWER = {"embedding_dim": 16, "max_sequence_length": LENGTH, **ENCODER}
GEMMA_VISION = {
    "image_size": 16,
    "patch_size": 4,
    "pool_size": 2,
    "num_heads": 2,
    "output_dim": 16,
    **LAYERS,
}


def random(*shape, low=-1.0, high=1.0):
    """Numbers between two bounds, for everything that is not an index."""
    values = np.random.default_rng(0).uniform(low, high, (BATCH, *shape))
    return values.astype("float32")


def images(size=32):
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


def tokens(length=LENGTH, prefix="", **settings):
    """Tokens and their padding mask."""
    return {
        f"{prefix}token_ids": ids(length, **settings) * mask(length),
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
