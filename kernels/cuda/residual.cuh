// Writing the residual stream: the new value, and what the next norm needs of it.
//
// `scaled` bf16 [ROWS, H] = value * norm weight, not yet divided by the rms: that factor is linear and joins the products.
// `squares` float32 [ROWS, H / 16]: the sum of squares of each tile of 16 columns.
#pragma once
#include "common.cuh"

// Called by 16 neighbouring lanes, for the 16 columns of one tile of one row.
template <bool EXPERT_ORDER>
DEVICE void add_to_residual(int row, int column, float delta, const float* norm, float* residual, u16* scaled,
                            float* squares) {
  float value = load_fresh(residual + row * H + column) + delta;
  residual[row * H + column] = value;
  scaled[row * H + (EXPERT_ORDER ? expert_order(column) : column)] = narrow(value * norm[column]);
  float square = value * value;
  const u32 mask = 0xffffu << (lane_id() & 16);
#pragma unroll
  for (int step = 8; step; step >>= 1) square += __shfl_xor_sync(mask, square, step);
  if (column % 16 == 0) squares[row * HIDDEN_TILES + column / 16] = square;
}
