// Step A: rms norm, qkv projection with bias, RoPE; queries to a buffer, keys and values to the paged cache.
//
// The norm's scale is linear, so it multiplies the products; its weight is in `scaled` already (see residual.cuh).
// A tile's upper and lower halves are 8 dimensions of a head and their RoPE partners half a head later.
#include "exchange.cuh"
#include "projection.cuh"

constexpr int HALF = HEAD_DIM / 2;
constexpr int TILES_PER_HEAD = HALF / 8;
constexpr int WARPS = warps_for(H);
typedef Projection<H, WARPS, 1, QKV_DEPTH, QKV_ASKED> Product;
extern "C" __device__ int qkv_threads = WARPS * 32;
static_assert(HALF % 8 == 0, "RoPE partners share a tile");

KERNEL(WARPS * 32, QKV_BLOCKS)
norm_qkv_rope(const u16* weights, const u16* bias, const u16* scaled, const float* squares, float epsilon,
              const float2* rotations, const int* positions, const int* lengths, const int* table, int table_stride,
              u16* query, u16* cache EXCHANGES) {
  __shared__ Product::Sums sums;
  __shared__ float scale[ROWS];
  const int head = blockIdx.x / TILES_PER_HEAD, first = blockIdx.x % TILES_PER_HEAD * 8;
  Product product;
  const int upper = head * HEAD_DIM + first + (lane_id() >> 2);
  product.set_rows(0, weights, upper, upper + HALF);
  product.prefetch();
  wait_for_previous();
  release_next();
#if RANKS > 1
  if (blockIdx.x == 0 && threadIdx.x == 0) *exchange.number += 2;  // this layer's two
#endif
  InverseRms<WARPS> rms;
  rms.load(squares);
  product.run(scaled);
  product.store(sums);
  rms.reduce(scale, epsilon);
  __syncthreads();
  for (int item = threadIdx.x; item < 8 * ROWS; item += WARPS * 32) {
    const int row = item >> 3, i = item & 7, dim = first + i;
    if (lengths[row] == 0) continue;
    const int position = positions[row];
    float a = Product::total(sums, i, row) * scale[row] + widen(bias[head * HEAD_DIM + dim]);
    float b = Product::total(sums, i + 8, row) * scale[row] + widen(bias[head * HEAD_DIM + dim + HALF]);
    if (head < HEADS + KV_HEADS) {
      float2 turn = rotations[(size_t)position * HALF + dim];
      float rotated = a * turn.x - b * turn.y;
      b = b * turn.x + a * turn.y;
      a = rotated;
    }
    u16* out;
    if (head < HEADS) {
      out = query + (row * HEADS + head) * HEAD_DIM;
    } else {
      size_t slot = (size_t)table[row * table_stride + position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE;
      out = cache + (slot * (2 * KV_HEADS) + (head - HEADS)) * HEAD_DIM;  // all keys, then all values
    }
    out[dim] = narrow(a);
    out[dim + HALF] = narrow(b);
  }
}
