"""Model families: one file per family over shared layers, and the readers of their checkpoints."""
