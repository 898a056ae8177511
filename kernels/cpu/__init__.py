"""Faster specs for CPUs, in plain torch: no compiler is needed on the user's machine.

What they gain comes from three things, each measured on a 2-core x86 VM with tiny-oss shapes:
- one token: a matrix-vector product through MKL takes 7 µs and a torch call about 1 µs, so buffers and their views are
  made once and written through `out=`;
- several tokens: oneDNN on weights packed once multiplies at 2 to 3 times MKL's speed on AMD;
- attention: torch's fused CPU kernel, with the sink applied through the log-sum-exp.
"""
