"""Every op the engine computes with. Import `kernels.ops`, the only door; this package imports nothing of ours."""
