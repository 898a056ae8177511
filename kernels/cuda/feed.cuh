// The persistent kernel's suppliers: one thread for each group asks for the group's weights, in the order of their use.
#pragma once
#include "whole.cuh"

// One thread: bring the last of a group's pairs of a layer's qkv weights to L2, those that the ring has no room for.
DEVICE void prefetch_qkv(const Layer& layer, Range pairs, int count) {
  for (int pair = max(pairs.begin, pairs.end - count); pair < pairs.end; pair++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u16* from = layer.qkv + (size_t)(pair / HALF * HEAD_DIM + pair % HALF + half * HALF) * H;
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(2 * H) : "memory");
    }
}

struct Supplier {
  Shared& shared;
  int group;
  u32 turn = 0;
  u64 policy = 0;

  DEVICE u8* next(u32 bytes) {
    const int stage = turn % STAGES;
    if (turn >= STAGES) await_barrier(&shared.empty[group][stage], (turn / STAGES - 1) & 1);
    // What is asked for at once delays everyone's small reads by its own transfer time: keep it to what fills the memory.
    if (turn >= IN_FLIGHT) await_barrier(&shared.full[group][(turn - IN_FLIGHT) % STAGES], (turn - IN_FLIGHT) / STAGES & 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(&shared.full[group][stage])),
                 "r"(bytes)
                 : "memory");
    return shared.stages[group][stage];
  }
  // Into the stage that `next` gave. Sizes and addresses are multiples of 16.
  DEVICE void copy(void* to, const void* from, u32 bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(&shared.full[group][turn % STAGES])), "l"(policy)
        : "memory");
  }
  template <typename Tile>
  DEVICE void copy_expert(const u8* blocks, const u8* scales, size_t first, int rows) {
    const u8* begin = scales + first * (Tile::ROW_BYTES / 16);
    const u32 offset = (u32)((u64)begin & 15), bytes = (rows * (Tile::ROW_BYTES / 16) + offset + 15) / 16 * 16;
    u8* to = next(rows * Tile::ROW_BYTES + bytes);
    copy(to, blocks + first * Tile::ROW_BYTES, rows * Tile::ROW_BYTES);
    copy(to + Tile::WEIGHT_BYTES, begin - offset, bytes);
    turn++;
  }

  DEVICE void run(const Layer* layers, int num_layers) {
    // Weights are read once a step: they leave L2 first, so that keys, activations and prefetched weights stay.
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const Range pairs = share_of(ROTARY_PAIRS, blockIdx.x, group), columns = share_of(H, blockIdx.x, group);
    for (int layer = 0; layer < num_layers; layer++) {
      const Layer& at = layers[layer];
      for (int first = pairs.begin; first < pairs.end; first += QKV_STEP) {
        const int count = min(QKV_STEP, pairs.end - first);
        u8* to = next(count * 4 * H);
        for (int i = 0; i < count; i++) {
          const u16* from = at.qkv + (size_t)((first + i) / HALF * HEAD_DIM + (first + i) % HALF) * H;
          copy(to + place<H, 2 * QKV_STEP>(i), from, 2 * H);
          copy(to + place<H, 2 * QKV_STEP>(count + i), from + (size_t)HALF * H, 2 * H);
        }
        turn++;
      }
      for (int first = columns.begin; first < columns.end; first += OUT_STEP) {
        const int count = min(OUT_STEP, columns.end - first);
        u8* to = next(count * 2 * WIDTH);
        for (int i = 0; i < count; i++)
          copy(to + place<WIDTH, OUT_STEP>(i), at.out + (size_t)(first + i) * WIDTH, 2 * WIDTH);
        turn++;
      }
      if (layer + 1 < num_layers && QKV_PREFETCHED && turn) {  // the memory is idle from here to the routing
        await_barrier(&shared.full[group][(turn - 1) % STAGES], (turn - 1) / STAGES & 1);
        prefetch_qkv(layers[layer + 1], pairs, QKV_PREFETCHED);
      }
      await_barrier(&shared.rest.routed, layer & 1);
      const Routing& list = shared.rest.routing;
      const Range tiles = share_of(list.active * (2 * I / 16), blockIdx.x, group);
      for (int tile = tiles.begin; tile < tiles.end; tile++)
        copy_expert<GateUpTile>(at.gate_up_blocks, at.gate_up_scales,
                                (size_t)list.expert[tile / (2 * I / 16)] * 2 * I + tile % (2 * I / 16) * 16, 16);
      if (columns.count())
        for (int index = 0; index < list.active; index++)
          copy_expert<DownTile>(at.down_blocks, at.down_scales, (size_t)list.expert[index] * H + columns.begin,
                                columns.count());
    }
  }
};
