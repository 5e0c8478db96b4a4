"""A small model learns to talk like a pirate: `python -m keras_svdtune.demo`.

Read it in this order: `train` (one run), `pirate` (the data and the dialect
score), `chat` (what the model is fed), `fit` (training), `weights` (where the
models come from), `gguf_to_hf` and `gguf_tokenizers` (how their files are
converted), `show` (tables and plots), `__main__` (the command line).
"""
