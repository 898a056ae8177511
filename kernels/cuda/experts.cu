// Steps E and F: the experts, straight from MXFP4 in checkpoint layout.
//
// Work is cut into items: 16 weight rows of one active expert. Each block takes a contiguous range of items and streams
// their weights through a ring of bulk copies; its warps share K. A touched expert is read once, whatever rows it has.
#include "exchange.cuh"
#include "mxfp4.cuh"
#include "residual.cuh"
#include "ring.cuh"
#include "routing.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int COLUMNS = ROWS < 8 ? ROWS : 8;  // activation rows of one pass
constexpr int NONE = -1, ANY = -2;            // whose activations are held: nobody's, or the same for every expert

template <int BLOCKS>
struct Pipeline {
  typedef ExpertTile<BLOCKS, WARPS> Tile;
  static constexpr int STAGES = STAGE_BYTES_BUDGET / Tile::BYTES < 8 ? STAGE_BYTES_BUDGET / Tile::BYTES : 8;
  static_assert(STAGES >= 2, "a stage must fit twice");

  struct Shared {
    u8 stages[STAGES][Tile::BYTES];
    float sums[2][WARPS][16][COLUMNS];
    Routing routing;
    Ring<STAGES> ring;
    float factor[PAIRS];       // what a pair's products are multiplied with
    float parts[PAIRS][16];    // step F: the tile's outputs so far
    int is_last;
  };

  Shared& shared;
  const u8* blocks;
  const u8* scales;
  int tiles;   // per expert
  bool tile_major;

  // A place in the work: the index of an active expert and one of its tiles. Steps without divisions.
  struct Item {
    int index, tile;
  };
  DEVICE Item at(int number) const {
    const int width = tile_major ? shared.routing.active : tiles;
    return tile_major ? Item{number % width, number / width} : Item{number / width, number % width};
  }
  DEVICE Item after(Item item) const {
    if (tile_major) return item.index + 1 < shared.routing.active ? Item{item.index + 1, item.tile} : Item{0, item.tile + 1};
    return item.tile + 1 < tiles ? Item{item.index, item.tile + 1} : Item{item.index + 1, 0};
  }
  DEVICE size_t weight_tile(Item item) const { return (size_t)shared.routing.expert[item.index] * tiles + item.tile; }
  // One thread.
  DEVICE void request(int stage, Item item) {
    const size_t at = weight_tile(item);
    shared.ring.expect(stage, Tile::BYTES);
    shared.ring.copy(stage, shared.stages[stage], blocks + at * Tile::WEIGHT_BYTES, Tile::WEIGHT_BYTES);
    shared.ring.copy(stage, shared.stages[stage] + Tile::WEIGHT_BYTES, scales + at * Tile::SCALE_BYTES,
                     Tile::SCALE_BYTES);
  }
  // All threads. Waits for stage `turn % STAGES`; before sm_90, fills it.
  DEVICE const u8* await(int turn, Item item) {
    const int stage = turn % STAGES;
#if __CUDA_ARCH__ >= 900
    shared.ring.await(stage, turn / STAGES);
#else
    const size_t at = weight_tile(item);
    uint4* to = (uint4*)shared.stages[stage];
    for (int i = threadIdx.x; i < Tile::BYTES / 16; i += THREADS)
      to[i] = i < Tile::WEIGHT_BYTES / 16
                  ? load_weights(blocks + at * Tile::WEIGHT_BYTES + i * 16)
                  : load_weights(scales + at * Tile::SCALE_BYTES + (i - Tile::WEIGHT_BYTES / 16) * 16);
    __syncthreads();
#endif
    return shared.stages[stage];
  }
  // `factors` has one value for every `per` pairs.
  DEVICE void read_routing(const Routing* routing, const float* factors, int per) {
    if (threadIdx.x == 0) shared.ring.init();
    for (int pair = threadIdx.x; pair < PAIRS; pair += THREADS) shared.factor[pair] = load_fresh(factors + pair / per);
    for (int i = threadIdx.x; i < (int)(sizeof(Routing) / 4); i += THREADS)
      ((int*)&shared.routing)[i] = load_fresh((const int*)routing + i);
    __syncthreads();
  }

  // Run all items of this block, in passes of up to 8 pairs. `column(pair)` gives a pair's activations; `ready()` is called
  // once the first copies are under way. `prepare(item, first, count)` loads what `finish(item, first, count, sums,
  // prepared, is_final)` needs beside the products of pairs [first, first + count); it is called a pass ahead, as the
  // activations are loaded a pass ahead, so that their latency passes behind the barrier and the last pass's finish.
  template <typename Column, typename Ready, typename Prepare, typename Finish>
  DEVICE void run(Tile& work, int held, Column column, Ready ready, Prepare prepare, Finish finish) {
    const Routing& list = shared.routing;
    const int items = list.active * tiles;
    const int first = (int)((i64)items * blockIdx.x / gridDim.x), end = (int)((i64)items * (blockIdx.x + 1) / gridDim.x);
    const bool requests = threadIdx.x == THREADS - 32;  // in the last warp, which has the least to multiply
    Item wanted = first < end ? at(first) : Item{0, 0};
    Item item = wanted;
    if (requests)
      for (int i = 0; i < STAGES && first + i < end; i++, wanted = after(wanted)) request(i, wanted);
    ready();
    if (first >= end) return;
    const int g = lane_id() >> 2, t = lane_id() & 3;
    int number = first, base = 0, count = list.begin[item.index + 1] - list.begin[item.index];
    auto load = [&] {
      if (held == ANY || (held == item.index && count <= 8)) return;
      work.load(base + g < count ? column(list.pair[list.begin[item.index] + base + g]) : nullptr);
      held = item.index;
    };
    load();
    auto prepared = prepare(item, list.begin[item.index], min(count, 8));
    for (int buffer = 0; number < end; buffer ^= 1) {
      float c[4];
      const u8* stage = await(number - first, item);
      work.multiply(stage, stage + Tile::WEIGHT_BYTES, c);
      const Item current = item;
      const auto extra = prepared;
      const int turn = number - first, begin = list.begin[item.index] + base, here = min(count - base, 8);
      const bool tile_done = base + 8 >= count;
      base += 8;
      if (tile_done) {
        number++;
        base = 0;
        if (number < end) {
          item = after(item);
          count = list.begin[item.index + 1] - list.begin[item.index];
        }
      }
      if (number < end) {
        load();
        prepared = prepare(item, list.begin[item.index] + base, min(count - base, 8));
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (2 * t + (i & 1) < COLUMNS) shared.sums[buffer][warp_id()][g + (i >> 1) * 8][2 * t + (i & 1)] = c[i];
      __syncthreads();
      if (requests && tile_done && first + turn + STAGES < end) {
        request(turn % STAGES, wanted);
        wanted = after(wanted);
      }
      finish(current, begin, here, shared.sums[buffer], extra, number == end);
    }
  }
  DEVICE static float total(const float (&sums)[WARPS][16][COLUMNS], int row, int column) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += sums[warp][row][column];
    return sum;
  }
};

extern __shared__ __align__(128) u8 dynamic[];

typedef Pipeline<H / 32> GateUp;
typedef Pipeline<I / 32> Down;
extern "C" __device__ int moe_gate_up_shared = sizeof(GateUp::Shared);
extern "C" __device__ int moe_down_add_shared = sizeof(Down::Shared);

// act bf16 [ROWS * TOP_K, I], in expert order.
KERNEL(THREADS, BLOCKS_PER_SM)
moe_gate_up(const u8* blocks, const u8* scales, const u16* bias, const u16* scaled, const float* inverse,
            const Routing* routing, float limit, u16* act) {
  GateUp pipeline{*(GateUp::Shared*)dynamic, blocks, scales, 2 * I / 16, false};
  GateUp::Tile work;
  // A single row's activations are every expert's, and two launches old: see wait_for_previous.
  if (ROWS == 1) work.load(lane_id() < 4 ? scaled : nullptr);
  wait_for_previous();
  release_next();
  pipeline.read_routing(routing, inverse, TOP_K);
  auto& shared = pipeline.shared;
  auto& list = shared.routing;
  const int i = threadIdx.x & 7, n = threadIdx.x >> 3;
  pipeline.run(work, ROWS == 1 ? ANY : NONE, [&](int pair) { return scaled + (pair / TOP_K) * H; }, [] {},
               [&](GateUp::Item item, int, int count) {
                 const size_t at = (size_t)list.expert[item.index] * 2 * I + item.tile * 16;
                 return n < count ? *(const u32*)(bias + at + 2 * i) : 0u;
               },
               [&](GateUp::Item item, int first, int count, const float (&sums)[WARPS][16][COLUMNS], u32 biases, bool) {
                 if (n >= count) return;
                 const int pair = list.pair[first + n];
                 const float scale = shared.factor[pair];
                 float gate = fminf(GateUp::total(sums, i, n) * scale + low_half(biases), limit);
                 float up = fminf(fmaxf(GateUp::total(sums, i + 8, n) * scale + high_half(biases), -limit), limit);
                 float value = gate / (1.f + __expf(-1.702f * gate)) * (up + 1.f);
                 act[(size_t)pair * I + expert_order(item.tile * 8 + i)] = narrow(value);
               });
}

// Items come tile by tile, so a block sums most tiles by itself; a tile that two blocks share is summed by the later one
// from `partial` float32 [ROWS * TOP_K, H]. Always in slot order, so the result does not depend on who comes when.
// tickets int [H / 16] count a tile's finished items: zero before and after.
KERNEL(THREADS, BLOCKS_PER_SM)
moe_down_add(const u8* blocks, const u8* scales, const u16* bias, const u16* act, const float* shares,
             const Routing* routing, float* partial, int* tickets, const int* lengths, const float* norm,
             float* residual, u16* scaled, float* squares EXCHANGES) {
  Down pipeline{*(Down::Shared*)dynamic, blocks, scales, H / 16, true};
  pipeline.read_routing(routing, shares, 1);  // two launches old: see wait_for_previous
  auto& shared = pipeline.shared;
  auto& list = shared.routing;
  Down::Tile work;
  const int i = threadIdx.x & 15, n = threadIdx.x >> 4;
  int done = 0, first_pair = 0;  // this block's items of the current tile, and the first one's first pair
  pipeline.run(work, NONE, [&](int pair) { return act + (size_t)pair * I; },
               [] {
                 wait_for_previous();
                 release_next();
               },
               [&](Down::Item item, int, int count) {
                 const size_t at = (size_t)list.expert[item.index] * H + item.tile * 16;
                 return n < count ? widen(bias[at + i]) : 0.f;
               },
               [&](Down::Item item, int first, int count, const float (&sums)[WARPS][16][COLUMNS], float offset, bool is_final) {
                 const int index = item.index, tile = item.tile, column = tile * 16 + i;
                 if (done == 0 && first == list.begin[index]) first_pair = first;
                 if (n < count) {
                   const int pair = list.pair[first + n];
                   shared.parts[pair][i] = (Down::total(sums, (i >> 1) + (i & 1) * 8, n) + offset) * shared.factor[pair];
                 }
                 if (first + count < list.begin[index + 1]) return;  // more rows of this expert follow
                 done++;
                 if (index < list.active - 1 && !is_final) return;  // more of this tile follows
                 const bool alone = done == list.active;
                 __syncthreads();
                 if (!alone) {
                   const int last_pair = list.begin[index + 1];
                   for (int part = threadIdx.x; part < (last_pair - first_pair) * 16; part += THREADS) {
                     const int pair = list.pair[first_pair + (part >> 4)];
                     partial[(size_t)pair * H + column] = shared.parts[pair][i];
                   }
                   __threadfence();
                   __syncthreads();
                   if (threadIdx.x == 0) {
                     shared.is_last = atomicAdd(tickets + tile, done) + done == list.active;
                     if (shared.is_last) tickets[tile] = 0;
                   }
                   __syncthreads();
                   if (shared.is_last) __threadfence();
                 }
                 if (alone || shared.is_last)
                   for (int part = threadIdx.x; part < 16 * ROWS; part += THREADS) {
                     const int row = part >> 4;
                     float delta = 0.f;
                     if (load_fresh(lengths + row) != 0)
#pragma unroll
                       for (int slot = 0; slot < TOP_K; slot++) {
                         const int pair = row * TOP_K + slot;
                         delta += alone ? shared.parts[pair][i] : load_fresh(partial + (size_t)pair * H + column);
                       }
#if RANKS > 1
                     delta = exchange_sum(exchange, load_fresh(exchange.number), row, column, delta);
#endif
                     add_to_residual<false>(row, column, delta, norm, residual, scaled, squares);
                   }
                 __syncthreads();  // `parts` and `is_last` may change again
                 done = 0;
               });
}
