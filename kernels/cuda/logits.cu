// Step G: final norm and lm_head, float32 logits.
#include "projection.cuh"

constexpr int WARPS = warps_for(H);
constexpr int TILES = LOGITS_TILES;
typedef Projection<H, WARPS, TILES, LOGITS_DEPTH, LOGITS_ASKED> Product;
extern "C" __device__ int logits_threads = WARPS * 32, logits_rows = TILES * 16;

KERNEL(WARPS * 32, LOGITS_BLOCKS)
norm_logits(const u16* weights, const u16* scaled, const float* squares, int parts, float epsilon,
            float* logits) {
  __shared__ Product::Sums sums;
  __shared__ float scale[ROWS];
  Product product;
  const int first = blockIdx.x * TILES * 16;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    int upper = first + tile * 16 + (lane_id() >> 2);
    product.set_rows(tile, weights, min(upper, VOCAB - 1), min(upper + 8, VOCAB - 1));
  }
  product.prefetch();
  wait_for_previous();
  release_next();
  InverseRms<WARPS, MOST_SQUARES> rms;
  rms.load(squares, parts);
  product.run(scaled);
  product.store(sums);
  rms.reduce(scale, epsilon);
  __syncthreads();
  for (int item = threadIdx.x; item < TILES * 16 * ROWS; item += WARPS * 32) {
    const int row = item / (TILES * 16), i = item % (TILES * 16);
    if (first + i < VOCAB) logits[(size_t)row * VOCAB + first + i] = Product::total(sums, i, row) * scale[row];
  }
}
