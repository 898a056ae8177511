// Step B: paged decode attention with sinks and a sliding window, split over keys.
//
// A block takes one row, one KV head with all its query heads, and a range of keys; its warps take 16 keys at a time.
// Query heads are the rows of the tensor-core products. The last block of a row and head merges the ranges.
#include "common.cuh"

constexpr int GROUP = HEADS / KV_HEADS;  // query heads of a KV head
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int MIN_RANGE = WARPS * 16;
constexpr int CHUNKS = HEAD_DIM / 32;
constexpr int UNITS = HEAD_DIM / 8;  // 16-byte units of a key or value
static_assert(GROUP <= 8 && HEAD_DIM % 32 == 0, "one product row per query head");

struct Part {  // what a range leaves: unnormalised values, their largest exponent and the sum of weights
  float values[GROUP][HEAD_DIM];
  float largest[GROUP];
  float sum[GROUP];
};
extern "C" __device__ int attention_part_bytes = sizeof(Part);

DEVICE void transpose_load(u32 (&v)[4], const u8* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"((u32)__cvta_generic_to_shared(p))
               : "memory");
}
DEVICE int swizzled(int key, int unit) { return (key * UNITS + (unit ^ (key & (UNITS - 1)))) * 16; }

KERNEL(THREADS, 4)
paged_decode_attention(const u16* query, const u16* cache, const float* sinks, const int* lengths, const int* table,
                       int table_stride, int window, float scale, Part* parts, int* tickets, u16* out) {
  __shared__ __align__(16) u8 value_tiles[WARPS][16 * HEAD_DIM * 2];
  __shared__ Part warp_parts[WARPS];
  __shared__ int is_last;
  const int head = blockIdx.x, split = blockIdx.y, row = blockIdx.z, splits = gridDim.y;
  const int warp = warp_id(), lane = lane_id(), g = lane >> 2, t = lane & 3;
  const float to_exponent = scale * 1.4426950408889634f;

  // Lengths, tables and the keys of earlier steps are nothing that the kernel before this one writes.
  const int length = lengths[row];
  const int start = window > 0 ? max(0, length - window) : 0, visible = length - start;
  const int range = max(MIN_RANGE, ((visible + splits - 1) / splits + 15) / 16 * 16);
  const int used = (visible + range - 1) / range;
  if (split >= used) {
    wait_for_previous();
    release_next();
    return;
  }
  const int begin = start + split * range, end = min(begin + range, length), first = begin + warp * 16;
  uint4 k[2][CHUNKS], v[2][CHUNKS];  // this lane's share of two keys, base + g and base + 8 + g
  auto fetch = [&](int base) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int key = min(base + half * 8 + g, end - 1);
      const size_t slot = (size_t)table[row * table_stride + key / BLOCK_SIZE] * BLOCK_SIZE + key % BLOCK_SIZE;
      const u16* at = cache + (slot * 2 * KV_HEADS + head) * HEAD_DIM + t * 8;
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) {
        k[half][i] = load_fresh((const uint4*)(at + i * 32));
        v[half][i] = load_fresh((const uint4*)(at + KV_HEADS * HEAD_DIM + i * 32));
      }
    }
  };
  const bool is_early = first < end && min(first + 16, end) < length;
  if (is_early) fetch(first);
  wait_for_previous();
  release_next();

  uint4 q[CHUNKS];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++)
    q[i] = g < GROUP ? load_fresh((const uint4*)(query + (row * HEADS + head * GROUP + g) * HEAD_DIM + i * 32 + t * 8))
                     : make_uint4(0, 0, 0, 0);

  float largest = MINUS_INFINITY, sum = 0.f, acc[UNITS][4];
#pragma unroll
  for (int i = 0; i < UNITS; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) acc[i][j] = 0.f;

  u8* values = value_tiles[warp];
  for (int base = first; base < end; base += WARPS * 16) {
    if (base != first || !is_early) fetch(base);
    __syncwarp();  // the last turn's values have been read
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) *(uint4*)(values + swizzled(half * 8 + g, i * 4 + t)) = v[half][i];

    float score[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int j = 0; j < 4; j++) score[half][j] = 0.f;
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) {
        mma(score[half], q[i].x, 0, q[i].y, 0, k[half][i].x, k[half][i].y);
        mma(score[half], q[i].z, 0, q[i].w, 0, k[half][i].z, k[half][i].w);
      }
    }
    float most = largest;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const bool seen = base + half * 8 + 2 * t + j < end;
        score[half][j] = seen ? score[half][j] * to_exponent : MINUS_INFINITY;
        most = fmaxf(most, score[half][j]);
      }
    most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
    most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
    const float shrink = exp2f(largest - most);
    largest = most;
    sum *= shrink;
    u32 weights[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float a = exp2f(score[half][0] - most), b = exp2f(score[half][1] - most);
      sum += a + b;
      weights[half] = narrow_pair(a, b);
    }
    __syncwarp();
#pragma unroll
    for (int unit = 0; unit < UNITS; unit += 2) {
      u32 pair[4];
      transpose_load(pair, values + swizzled((lane >> 3 & 1) * 8 + (lane & 7), unit + (lane >> 4)));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        acc[unit + i][0] *= shrink;
        acc[unit + i][1] *= shrink;
        mma(acc[unit + i], weights[0], 0, weights[1], 0, pair[2 * i], pair[2 * i + 1]);
      }
    }
  }
  sum += __shfl_xor_sync(FULL, sum, 1);
  sum += __shfl_xor_sync(FULL, sum, 2);
  if (g < GROUP) {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++)
      *(float2*)&warp_parts[warp].values[g][unit * 8 + 2 * t] = make_float2(acc[unit][0], acc[unit][1]);
    if (t == 0) {
      warp_parts[warp].largest[g] = largest;
      warp_parts[warp].sum[g] = sum;
    }
  }
  __syncthreads();

  Part* mine = parts + ((size_t)row * KV_HEADS + head) * splits;
  for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
    const int q_head = i / HEAD_DIM, dim = i % HEAD_DIM;
    float most = warp_parts[0].largest[q_head], value = 0.f, weight = 0.f;
#pragma unroll
    for (int w = 1; w < WARPS; w++) most = fmaxf(most, warp_parts[w].largest[q_head]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float factor = exp2f(warp_parts[w].largest[q_head] - most);
      value += warp_parts[w].values[q_head][dim] * factor;
      weight += warp_parts[w].sum[q_head] * factor;
    }
    if (used == 1) {
      const float sink = sinks[head * GROUP + q_head] * 1.4426950408889634f, top = fmaxf(most, sink);
      value = value * exp2f(most - top) / (weight * exp2f(most - top) + exp2f(sink - top));
      out[(row * HEADS + head * GROUP + q_head) * HEAD_DIM + dim] = narrow(value);
    } else {
      mine[split].values[q_head][dim] = value;
      if (dim == 0) {
        mine[split].largest[q_head] = most;
        mine[split].sum[q_head] = weight;
      }
    }
  }
  if (used == 1) return;

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* ticket = tickets + row * KV_HEADS + head;
    is_last = atomicAdd(ticket, 1) == used - 1;
    if (is_last) *ticket = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
    const int q_head = i / HEAD_DIM, dim = i % HEAD_DIM;
    const float sink = sinks[head * GROUP + q_head] * 1.4426950408889634f;
    float most = sink;
#pragma unroll 8
    for (int s = 0; s < used; s++) most = fmaxf(most, load_fresh(&mine[s].largest[q_head]));
    float value = 0.f, weight = exp2f(sink - most);
#pragma unroll 8
    for (int s = 0; s < used; s++) {
      const float factor = exp2f(load_fresh(&mine[s].largest[q_head]) - most);
      value += load_fresh(&mine[s].values[q_head][dim]) * factor;
      weight += load_fresh(&mine[s].sum[q_head]) * factor;
    }
    out[(row * HEADS + head * GROUP + q_head) * HEAD_DIM + dim] = narrow(value / weight);
  }
}
