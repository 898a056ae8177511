"""Synthetic checkpoints: random weights of a model's true shape, the same bytes on every machine.

| module | holds |
|---|---|
| `values` | rules to bytes: a counter-based stream per tensor, readable from any place |
| `writer` | a folder in Hugging Face layout: shards, index, marker; streamed, resumable, finished at once |
| `stand_in` | a tokenizer of the right size for models whose own is not at hand |
| `__main__` | `python -m engine.synthesis`: one job as JSON in, progress as JSON lines out |

No torch: the distribution is `engine.models.synthetic`, the numbers come from NumPy's Philox.
"""
