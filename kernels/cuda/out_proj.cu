// Step C: output projection of attention with bias, added to the residual stream; prepares the router's norm.
#include "exchange.cuh"
#include "projection.cuh"
#include "residual.cuh"

constexpr int WARPS = warps_for(HEADS * HEAD_DIM);
typedef Projection<HEADS * HEAD_DIM, WARPS, 1, OUT_DEPTH, OUT_ASKED> Product;
extern "C" __device__ int out_proj_threads = WARPS * 32;

KERNEL(WARPS * 32, OUT_BLOCKS)
out_proj_add(const u16* weights, const u16* bias, const u16* attended, const float* norm, float* residual, u16* scaled,
             float* squares EXCHANGES) {
  __shared__ Product::Sums sums;
  Product product;
  const int upper = blockIdx.x * 16 + (lane_id() >> 2);
  product.set_rows(0, weights, upper, upper + 8);
  product.prefetch();
  wait_for_previous();
  release_next();
  product.run(attended);
  product.store(sums);
  __syncthreads();
  for (int item = threadIdx.x; item < 16 * ROWS; item += WARPS * 32) {
    const int row = item >> 4, i = item & 15, column = blockIdx.x * 16 + i;
    float delta = Product::total(sums, i, row);
#if RANKS > 1
    delta = exchange_sum(exchange, load_fresh(exchange.number) - 1, row, column, delta);
#endif
    add_to_residual<true>(row, column, delta + widen(bias[column]), norm, residual, scaled, squares);
  }
}
