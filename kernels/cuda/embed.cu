// The step's first kernel: the residual stream as embedding rows or as the stage before left it, and what the first norm needs.
#include "residual.cuh"

KERNEL(256, 1)
embed(const int* ids, const u16* table, const float* norm, float* residual, u16* scaled, float* squares) {
  wait_for_previous();
  release_next();
  const int row = blockIdx.y;
  const int column = blockIdx.x * 256 + threadIdx.x;
  if (column >= H) return;
  residual[row * H + column] = 0.f;
  __syncwarp(__activemask());
  add_to_residual<false>(row, column, widen(table[(size_t)ids[row] * H + column]), norm, residual, scaled, squares);
}

KERNEL(256, 1)
take_over(const float* from, const float* norm, float* residual, u16* scaled, float* squares) {
  wait_for_previous();
  release_next();
  const int row = blockIdx.y;
  const int column = blockIdx.x * 256 + threadIdx.x;
  if (column >= H) return;
  residual[row * H + column] = 0.f;
  __syncwarp(__activemask());
  add_to_residual<false>(row, column, from[row * H + column], norm, residual, scaled, squares);
}
