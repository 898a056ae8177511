"""Make tiny-oss, the bundled model: data, tokenizer, training, export and evaluation.

Knows: how the files in `engine/assets/tiny_oss/` came to be, each step from a seed.
Refuses to know: how the engine serves them. Nothing in the product imports this package.
"""
