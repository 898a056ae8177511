"""Triton and Gluon kernels for one Hopper GPU: 16 to 256 decode rows, and prefill.

Triton is imported by the modules below and nowhere else; import them only where a CUDA device is at hand. All functions
run on the current stream, never wait for the device, and may be captured in a CUDA graph unless they say otherwise.
"""
