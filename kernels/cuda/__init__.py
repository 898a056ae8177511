"""CUDA C++ kernels of the decode step at 1 to 16 rows. Importing this loads no GPU library."""
