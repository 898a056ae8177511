// The persistent kernel's frame: one block a multiprocessor, its work, its shared memory, and how blocks meet.
//
// A block has two groups of eight warps that compute, and one warp for each group that brings the group's weights to shared
// memory through a ring, in the order of their use, as far ahead as the ring reaches: across stages and layers, while
// the group waits for other blocks. Blocks meet at counters in global memory, one for each stage of each layer.
#pragma once
#include "exchange.cuh"
#include "mxfp4.cuh"
#include "routing.cuh"

constexpr int GROUPS = 2, WARPS = 8, GROUP_THREADS = WARPS * 32, CONSUMERS = GROUPS * GROUP_THREADS;
constexpr int THREADS = CONSUMERS + GROUPS * 32;
constexpr int HALF = HEAD_DIM / 2;
constexpr int ROTARY_PAIRS = (HEADS + 2 * KV_HEADS) * HALF;  // rows i and i + D/2 of a head, projected together
constexpr int WIDTH = HEADS * HEAD_DIM;
constexpr int COLUMNS = PAIRS < 8 ? PAIRS : 8;  // activation columns of one pass
constexpr int SHARED_LIMIT = 232448;

typedef ExpertTile<H / 32, WARPS> GateUpTile;
typedef ExpertTile<I / 32, WARPS> DownTile;

__host__ __device__ constexpr int at_most(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int at_least(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int floor_power(int n) { return n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1; }

// Rows of a bf16 matrix in a stage: even rows first, then odd rows 64 bytes on, so that neighbours use different banks.
constexpr int STAGE_AIM = 24576;
constexpr int QKV_STEP = floor_power(STAGE_AIM / (4 * H));                       // rotary pairs of a stage
constexpr int OUT_STEP = at_least(1, at_most(16, STAGE_AIM / (2 * WIDTH)));      // rows of a stage
template <int K, int CAPACITY>
DEVICE int place(int row) {
  return row & 1 ? ((CAPACITY + 1) / 2 + row / 2) * (2 * K) + 64 : row / 2 * (2 * K);
}
// An expert's stage: up to 16 rows of blocks, then their scales from the multiple of 16 at or below their address.
constexpr int STAGE_BYTES = at_least(at_least(QKV_STEP * 4 * H, OUT_STEP * 2 * WIDTH) + 64,
                                     at_least(GateUpTile::BYTES, DownTile::BYTES) + 32);
static_assert(STAGE_BYTES % 16 == 0, "stages are aligned");

// Equal shares of a total, first over blocks, then over the groups of a block.
struct Range {
  int begin, end;
  DEVICE int count() const { return end - begin; }
};
DEVICE Range share_of(int total, int block, int group) {
  const u32 begin = (u32)total * block / GRID, end = (u32)total * (block + 1) / GRID;
  const u32 middle = begin + (end - begin + 1) / 2;
  return group == 0 ? Range{(int)begin, (int)middle} : Range{(int)middle, (int)end};
}
constexpr int GROUP_PAIRS = ((ROTARY_PAIRS + GRID - 1) / GRID + 1) / 2, GROUP_COLUMNS = ((H + GRID - 1) / GRID + 1) / 2;
static_assert(ROWS <= 8 && GROUP_PAIRS <= 16 && GROUP_COLUMNS <= 16, "a thread of a group for each of its outputs");

struct Layer {  // as layers.py writes it: 19 words of 8 bytes
  const u16 *qkv, *qkv_bias;
  const float* sinks;
  const u16 *out, *out_bias;
  const float* post_norm;
  const u16 *router, *router_bias;
  const u8 *gate_up_blocks, *gate_up_scales;
  const u16* gate_up_bias;
  const u8 *down_blocks, *down_scales;
  const u16* down_bias;
  const float* next_norm;
  u16* cache;
  const int* table;
  i64 table_stride, window;
};
constexpr int LAYER_WORDS = sizeof(Layer) / 8;

constexpr int HEADS_PER_KV = HEADS / KV_HEADS;
static_assert(HEADS_PER_KV <= 8 && HEAD_DIM % 32 == 0, "one product row per query head");
constexpr int VALUE_TILE = at_least(16 * HEAD_DIM * 2, HEADS_PER_KV * HEAD_DIM * 4);

struct Attention {
  u8 tiles[WARPS][VALUE_TILE];  // 16 values, and at the end the warp's share of the result, float32 [head, dim]
  float largest[WARPS][HEADS_PER_KV], sum[WARPS][HEADS_PER_KV];
};
constexpr int ROW_HEADS = ROWS * KV_HEADS;
constexpr int SPLITS = at_least(1, GROUPS * GRID / ROW_HEADS);  // at most so many ranges of keys
struct Ranges {
  float largest[SPLITS][HEADS_PER_KV], sum[SPLITS][HEADS_PER_KV];
};
typedef float Sums[WARPS][16][COLUMNS];
// A single row would fill a register with four useful lanes of 32: its activations wait in shared memory instead.
constexpr bool IS_SINGLE = ROWS == 1;
__host__ __device__ constexpr int steps_of(int k) { return ((k / 32 + 1) / 2 + WARPS - 1) / WARPS * 2; }  // of 32 k, of a warp
constexpr int HELD_UNITS = IS_SINGLE ? at_least(4 * at_least(steps_of(H), steps_of(WIDTH)), 16 * GateUpTile::STEPS) : 1;
struct Products {
  Sums sums[2];
  float parts[PAIRS][16];                            // of each pair, this group's columns of the down projection
  float columns[ROWS][GROUPS * 16];                  // group 0's copy: the block's columns of the normed stream
  float logits[CONSUMERS / 32][EXPERT_ROUNDS * 32];  // group 0's copy: sums over some blocks
  uint4 x[WARPS][HELD_UNITS];                        // a single row's activations, each warp's share of K
};
union alignas(16) Scratch {
  Attention attention;
  Ranges ranges;
  Products products;
};
struct Rest {
  Routing routing;
  float shares[PAIRS], inverse[ROWS];
  int chosen[PAIRS];
  Layer layer[2];
  float scale[GROUPS][ROWS];
  int is_last[GROUPS];
#if RANKS > 1
  u32 exchanges;  // before this launch
#endif
  u64 routed;
};
constexpr int STAGES = at_most(8, (SHARED_LIMIT - GROUPS * (int)sizeof(Scratch) - (int)sizeof(Rest) - 128) /
                                      (GROUPS * (STAGE_BYTES + 16)));
static_assert(STAGES >= 2, "a stage must fit twice");
struct Shared {
  u8 stages[GROUPS][STAGES][STAGE_BYTES];
  Scratch scratch[GROUPS];
  u64 full[GROUPS][STAGES], empty[GROUPS][STAGES];
  Rest rest;
};
static_assert(sizeof(Shared) <= SHARED_LIMIT, "too large for a multiprocessor");

// Counters: of each layer and stage, spread over SPREAD lines so that arrivals do not queue. Zero before and after.
enum Stage { QKV, ATTENDED, OUT, ROUTED, ACTIVATED, DOWN, NUM_STAGES };
constexpr int SPREAD = 4, LINE = 32;
// Some seconds: a block that never comes is a bug, not a reason to hang the GPU. Of several ranks one may be held up by its
// host, and with it the blocks of all others.
constexpr int MOST_SPINS = RANKS > 1 ? 1 << 30 : 1 << 24;
DEVICE int* counter(int* counters, int layer, int stage, int part) {
  return counters + ((layer * NUM_STAGES + stage) * SPREAD + part) * LINE;
}
// Not an acquire, which would empty L1 at every look: what blocks hand to each other is read past L1 (`load_fresh`), and a
// load after the look is sent after the look returned.
DEVICE int look(const int* p) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
// One thread, after a barrier of those whose writes it announces.
DEVICE void announce(int* counters, int layer, int stage, int part) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter(counters, layer, stage, part % SPREAD)) : "memory");
}
// One warp.
DEVICE void wait_for(int* counters, int layer, int stage, int target, int lane) {
  const int* mine = counter(counters, layer, stage, lane % SPREAD);
  for (int spins = 0;; spins++) {
    const int seen = lane < SPREAD ? look(mine) : 0;
    if ((int)__reduce_add_sync(FULL, seen) >= target) break;
    if (spins > MOST_SPINS) __trap();
  }
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void init_barrier(u64* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
DEVICE void await_barrier(u64* barrier, u32 parity) {
  u32 done = 0;
  for (int spins = 0; !done; spins++) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    if (spins > MOST_SPINS / 16) __trap();
  }
}
DEVICE void arrive_barrier(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// A computing thread's view of its block. Made anew for each stage from an index the compiler must read again: else it
// keeps every stage's addresses in registers over the whole loop, and spills.
struct Worker {
  Shared& shared;
  int* counters;
  u32& turn;  // stages of the ring used so far
  int index, block, group, thread, warp, lane;

  DEVICE Worker(Shared& shared, int* counters, u32& turn) : shared(shared), counters(counters), turn(turn) {
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    group = index / GROUP_THREADS;
    thread = index % GROUP_THREADS;
    warp = thread / 32;
    lane = index % 32;
  }
  DEVICE Range share(int total) const { return share_of(total, block, group); }

  DEVICE uint4* held() const { return shared.scratch[group].products.x[warp]; }
  DEVICE Scratch& scratch() const { return shared.scratch[group]; }
  DEVICE void group_barrier() const {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(GROUP_THREADS) : "memory");
  }
  DEVICE void block_barrier() const { asm volatile("bar.sync 3, %0;" ::"n"(CONSUMERS) : "memory"); }
  // Both groups: all writes so far are done in this block.
  DEVICE void arrive(int layer, int stage) const {
    block_barrier();
    if (index == 0) announce(counters, layer, stage, block);
  }
  DEVICE void wait(int layer, int stage, int target) const {
    if (warp == 0) wait_for(counters, layer, stage, target, lane);
    group_barrier();
  }
  DEVICE const u8* stage(int ahead = 0) const { return shared.stages[group][(turn + ahead) % STAGES]; }
  DEVICE const u8* await(int ahead = 0) const {
    await_barrier(&shared.full[group][(turn + ahead) % STAGES], (turn + ahead) / STAGES & 1);
    return stage(ahead);
  }
  DEVICE void release(int stages = 1) const {  // the warp has read them
    __syncwarp();
    for (; stages; stages--, turn++)
      if (lane == 0) arrive_barrier(&shared.empty[group][turn % STAGES]);
  }
};

DEVICE float total(const Sums& sums, int row, int column) {
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) sum += sums[warp][row][column];
  return sum;
}
// c as `mma` leaves it; EXPERT tiles and plain ones alike keep row g of the tile in c[0], c[1] and row g + 8 in c[2], c[3].
DEVICE void store_sums(Sums& sums, const Worker& worker, const float (&c)[4]) {
  const int g = worker.lane >> 2, t = worker.lane & 3;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (2 * t + (i & 1) < COLUMNS) sums[worker.warp][g + (i >> 1) * 8][2 * t + (i & 1)] = c[i];
}
