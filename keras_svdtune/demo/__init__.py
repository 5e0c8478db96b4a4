"""A small model learns to talk like a pirate: `python -m keras_svdtune.demo`.

Read it in this order: `train` (one run) and `result` (what comes out of it),
`pirate` (the data and the dialect score), `chat` (what the model is fed), `fit`
(training), `weights` (where the models come from, and how their files are
converted), `show` (tables and plots), `results` (a comparison of all methods),
`__main__` (the command line).
"""
