// The persistent kernel's attention: a group takes one row, one KV head and a range of keys; see attention.cu.
#pragma once
#include "whole.cuh"

static_assert(ROW_HEADS * SPLITS <= GROUPS * GRID, "at most one range a group");
constexpr int MIN_RANGE = WARPS * 16;
constexpr int CHUNKS = HEAD_DIM / 32, UNITS = HEAD_DIM / 8;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr int OUTPUTS = HEADS_PER_KV * HEAD_DIM / 2;  // pairs of a KV head's outputs

struct Part {  // what a range leaves: unnormalised values, their largest exponent and the sum of weights
  float values[HEADS_PER_KV][HEAD_DIM];
  float largest[HEADS_PER_KV];
  float sum[HEADS_PER_KV];
};
extern "C" __device__ int layers_parts_bytes = sizeof(Part) * ROW_HEADS * SPLITS;

DEVICE void transpose_load(u32 (&v)[4], const u8* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared_address(p))
               : "memory");
}
DEVICE int swizzled(int key, int unit) { return (key * UNITS + (unit ^ (key & (UNITS - 1)))) * 16; }
DEVICE float2 load_fresh_pair(const float* p) { return __ldcg((const float2*)p); }

// The row, KV head and keys of a group.
struct Keys {
  int item, split, row, head, length, used, begin, end;

  DEVICE Keys(const Worker& worker, const Layer& layer, int known_length, const int* lengths) {
    item = worker.group * GRID + worker.block;  // low ranges first, each on a multiprocessor of its own
    split = item / ROW_HEADS;
    row = item % ROW_HEADS / KV_HEADS;
    head = item % KV_HEADS;
    length = lengths ? lengths[row] : known_length;
    const int window = (int)layer.window, start = window > 0 ? max(0, length - window) : 0, visible = length - start;
    const int range = max(MIN_RANGE, ((visible + SPLITS - 1) / SPLITS + 15) / 16 * 16);
    used = (visible + range - 1) / range;
    begin = start + split * range;
    end = min(begin + range, length);
  }
  DEVICE bool has_any() const { return split < used; }  // `used` is at most SPLITS
  DEVICE size_t slot(const Layer& layer, int key) const {
    return (size_t)layer.table[row * layer.table_stride + key / BLOCK_SIZE] * BLOCK_SIZE + key % BLOCK_SIZE;
  }
};

// Where a lane finds its first two keys, looked up a stage ahead: lengths and tables never change during a step.
struct KeyPlace {
  int length, slot[2];
};
// Also bring a group's first keys and values to L2, before weights that are about to be asked for stand in their way.
DEVICE KeyPlace place_keys(const Worker& worker, const Layer& layer, const int* lengths) {
  const Keys keys(worker, layer, 0, lengths);
  KeyPlace place{keys.length, {0, 0}};
  if (!keys.has_any()) return place;
  const int key = keys.begin + worker.thread / 2;
  if (key < keys.end) {
    const u16* at = layer.cache + ((keys.slot(layer, key) * 2 + worker.thread % 2) * KV_HEADS + keys.head) * HEAD_DIM;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
  }
#pragma unroll
  for (int half = 0; half < 2; half++)
    place.slot[half] =
        (int)keys.slot(layer, min(keys.begin + worker.warp * 16 + half * 8 + (worker.lane >> 2), keys.end - 1));
  return place;
}

DEVICE void attend(const Worker& worker, const Layer& layer, int number, KeyPlace place, float scale, const u16* query,
                   Part* parts, int* tickets, u16* attended) {
  const int warp = worker.warp, lane = worker.lane, g = lane >> 2, t = lane & 3;
  const Keys keys(worker, layer, place.length, nullptr);
  const int split = keys.split, row = keys.row, head = keys.head, used = keys.used, length = keys.length;
  if (!keys.has_any()) {
    if (keys.item < ROW_HEADS && worker.thread == 0) announce(worker.counters, number, ATTENDED, keys.item);  // padding
    return;
  }
  const int begin = keys.begin, end = keys.end, first = begin + warp * 16;
  Attention& shared = worker.scratch().attention;
  u8* values = shared.tiles[warp];
  uint4 k[2][CHUNKS];  // this lane's share of two keys, base + g and base + 8 + g
  auto fetch = [&](int base) {
    uint4 v[2][CHUNKS];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const size_t slot =
          base == first ? (size_t)place.slot[half] : keys.slot(layer, min(base + half * 8 + g, end - 1));
      const u16* at = layer.cache + (slot * 2 * KV_HEADS + head) * HEAD_DIM + t * 8;
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) {
        k[half][i] = load_fresh((const uint4*)(at + i * 32));
        v[half][i] = load_fresh((const uint4*)(at + KV_HEADS * HEAD_DIM + i * 32));
      }
    }
    __syncwarp();  // the last turn's values have been read
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) *(uint4*)(values + swizzled(half * 8 + g, i * 4 + t)) = v[half][i];
  };
  const bool is_early = first < end && min(first + 16, end) < length;  // all keys of earlier steps
  if (is_early) fetch(first);
  const int q_head = worker.thread / (HEAD_DIM / 2), dim = worker.thread % (HEAD_DIM / 2) * 2;
  const bool has_output = worker.thread < OUTPUTS;
  const float sink = has_output ? layer.sinks[head * HEADS_PER_KV + q_head] * LOG2_E : 0.f;
  worker.wait(number, QKV, GRID);

  uint4 q[CHUNKS];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++)
    q[i] = g < HEADS_PER_KV
               ? load_fresh((const uint4*)(query + (row * HEADS + head * HEADS_PER_KV + g) * HEAD_DIM + i * 32 + t * 8))
               : make_uint4(0, 0, 0, 0);
  float largest = MINUS_INFINITY, sum = 0.f, acc[UNITS][4];
#pragma unroll
  for (int i = 0; i < UNITS; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) acc[i][j] = 0.f;

  for (int base = first; base < end; base += WARPS * 16) {
    if (base != first || !is_early) fetch(base);
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
        score[half][j] = seen ? score[half][j] * (scale * LOG2_E) : MINUS_INFINITY;
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
  __syncwarp();  // the tile makes room for the result
  if (g < HEADS_PER_KV) {
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++)
      *(float2*)(values + (g * HEAD_DIM + unit * 8 + 2 * t) * 4) = make_float2(acc[unit][0], acc[unit][1]);
    if (t == 0) {
      shared.largest[warp][g] = largest;
      shared.sum[warp][g] = sum;
    }
  }
  worker.group_barrier();

  u32* out = (u32*)(attended + (row * HEADS + head * HEADS_PER_KV + q_head) * HEAD_DIM + dim);
  Part* mine = parts + (size_t)(row * KV_HEADS + head) * SPLITS;
  if (has_output) {
    float most = shared.largest[0][q_head], weight = 0.f;
    float2 value = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 1; w < WARPS; w++) most = fmaxf(most, shared.largest[w][q_head]);
    if (used == 1) most = fmaxf(most, sink);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float factor = exp2f(shared.largest[w][q_head] - most);
      const float2 part = *(const float2*)(shared.tiles[w] + (q_head * HEAD_DIM + dim) * 4);
      value.x += part.x * factor;
      value.y += part.y * factor;
      weight += shared.sum[w][q_head] * factor;
    }
    if (used == 1) {
      const float inverse = 1.f / (weight + exp2f(sink - most));
      *out = narrow_pair(value.x * inverse, value.y * inverse);
    } else {
      *(float2*)&mine[split].values[q_head][dim] = value;
      if (dim == 0) {
        mine[split].largest[q_head] = most;
        mine[split].sum[q_head] = weight;
      }
    }
  }
  worker.group_barrier();
  if (used > 1) {
    int& is_last = worker.shared.rest.is_last[worker.group];
    if (worker.thread == 0) {
      int* ticket = tickets + row * KV_HEADS + head;
      int before;
      asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
      is_last = before == used - 1;
      if (is_last) *ticket = 0;
    }
    worker.group_barrier();
    if (!is_last) return;
    constexpr int ROUND = 12;  // ranges whose values travel together
    float2 part[ROUND];
    auto load = [&](int base) {
#pragma unroll
      for (int i = 0; i < ROUND; i++)
        part[i] = has_output && base + i < used ? load_fresh_pair(&mine[base + i].values[q_head][dim]) : make_float2(0.f, 0.f);
    };
    load(0);
    Ranges& ranges = worker.scratch().ranges;
    for (int i = worker.thread; i < used * HEADS_PER_KV; i += GROUP_THREADS) {
      ranges.largest[i / HEADS_PER_KV][i % HEADS_PER_KV] = load_fresh(&mine[i / HEADS_PER_KV].largest[i % HEADS_PER_KV]);
      ranges.sum[i / HEADS_PER_KV][i % HEADS_PER_KV] = load_fresh(&mine[i / HEADS_PER_KV].sum[i % HEADS_PER_KV]);
    }
    worker.group_barrier();
    if (has_output) {
      float most = sink;
      for (int s = 0; s < used; s++) most = fmaxf(most, ranges.largest[s][q_head]);
      float weight = exp2f(sink - most);
      float2 value = make_float2(0.f, 0.f);
      for (int base = 0;;) {
#pragma unroll
        for (int i = 0; i < ROUND; i++)
          if (base + i < used) {
            const float factor = exp2f(ranges.largest[base + i][q_head] - most);
            value.x += part[i].x * factor;
            value.y += part[i].y * factor;
            weight += ranges.sum[base + i][q_head] * factor;
          }
        base += ROUND;
        if (base >= used) break;
        load(base);
      }
      *out = narrow_pair(value.x / weight, value.y / weight);
    }
    worker.group_barrier();
  }
  if (worker.thread == 0) announce(worker.counters, number, ATTENDED, keys.item);
}
