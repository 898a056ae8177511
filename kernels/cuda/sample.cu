// Step H: the next token of each row, greedy or by Gumbel-max, and the step's state moved on by one.
// A row whose best score is not finite reports token -1; the state goes on with a valid id.
//
// The noise depends on (seed, position, token) alone; its twin is gumbel_noise in the torch reference of sampling.
#include "exchange.cuh"

constexpr int THREADS = 512;
#if RANKS > 1  // logits are of tokens from `first_token` on
#define EXCHANGES_FIRST EXCHANGES, int first_token
#else
#define EXCHANGES_FIRST
#endif

DEVICE u32 mix(u32 h) {
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  return h ^ (h >> 16);
}
DEVICE float gumbel(u32 key, u32 token) {
  const u32 h = mix(mix(token * 0x9E3779B1u + key) ^ (key * 0x27D4EB2Fu + 0x165667B1u));
  const float v = fminf(((float)h + 0.5f) * 2.3283064365386963e-10f, 0.99999994f);
  return -logf(v < 1e-3f ? v + 0.5f * v * v : -logf(1.f - v));
}
// Larger score first, then lower token: one integer order.
DEVICE u64 ranked(float score, u32 token) {
  const u32 bits = __float_as_uint(score);
  const u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (u64)ordered << 32 | (u32)~token;
}
DEVICE u64 block_max(u64 best, u64 (&scratch)[THREADS / 32]) {
#pragma unroll
  for (int step = 16; step; step >>= 1) best = max(best, __shfl_xor_sync(FULL, best, step));
  if (lane_id() == 0) scratch[warp_id()] = best;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < THREADS / 32; warp++) best = max(best, scratch[warp]);
  return best;
}

KERNEL(THREADS, 1)
sample_advance(const float* logits, const float* temperatures, const i64* seeds, u64* best_of, int* tickets, int* tokens,
               int* ids, int* positions, int* lengths EXCHANGES_FIRST) {
  __shared__ u64 scratch[THREADS / 32];
  __shared__ int is_last;
  const int row = blockIdx.y;
  wait_for_previous();
  release_next();
  if (load_fresh(lengths + row) == 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) tokens[row] = 0;
    return;
  }
  const float temperature = temperatures[row];
  const u64 seed = (u64)seeds[row];
  const u32 position = load_fresh(positions + row);
  const u32 key = mix(mix((u32)seed ^ 0x9E3779B9u) + mix((u32)(seed >> 32) ^ 0x7F4A7C15u) * 3 + position * 0x85EBCA77u);
  u64 best = 0;
#pragma unroll 4
  for (int token = blockIdx.x * THREADS + threadIdx.x; token < VOCAB; token += gridDim.x * THREADS) {
    float score = load_fresh(logits + (size_t)row * VOCAB + token);
    if (score != score) score = MINUS_INFINITY;
#if RANKS > 1
    const u32 named = first_token + token;
#else
    const u32 named = token;
#endif
    if (temperature > 0.f) score = score / temperature + gumbel(key, named);
    best = max(best, ranked(score, named));
  }
  best = block_max(best, scratch);
  if (threadIdx.x == 0) {
    best_of[row * gridDim.x + blockIdx.x] = best;
    __threadfence();
    is_last = atomicAdd(tickets + row, 1) == (int)gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  best = threadIdx.x < gridDim.x ? __ldcg(best_of + row * gridDim.x + threadIdx.x) : 0;
  best = block_max(best, scratch);
  if (threadIdx.x == 0) {
#if RANKS > 1
    best = exchange_best(exchange, row, best);
#endif
    const int token = (int)~(u32)best;
    const u32 score = (u32)(best >> 32);  // as ranked: -inf is 0x007FFFFF, +inf 0xFF800000
    tickets[row] = 0;
    tokens[row] = score > 0x007FFFFFu && score < 0xFF800000u ? token : -1;
    ids[row] = token;
    positions[row] = position + 1;
    lengths[row] += 1;
  }
}
