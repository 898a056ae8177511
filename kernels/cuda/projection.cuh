// Rows of a bf16 matrix times up to 16 activation rows: tiles of 16 weight rows, K split over the warps of a block.
//
// A warp's step is 64 k: one 128-byte line of each of its 16 weight rows. The first steps' loads leave before the
// dependency wait. Weights go from memory to the tensor cores through registers alone.
#pragma once
#include "common.cuh"

constexpr int N_TILES = (ROWS + 7) / 8;

// TILES tiles of 16 rows; DEPTH chunks of 32 k in flight per warp and tile; activations asked for ASKED chunks at a time.
template <int K, int WARPS, int TILES, int DEPTH, int ASKED>
struct Projection {
  static constexpr int CHUNKS = K / 32;
  static constexpr int STEPS = ((CHUNKS + 1) / 2 + WARPS - 1) / WARPS * 2;
  static constexpr int FLIGHT = DEPTH < STEPS ? DEPTH : STEPS;
  static_assert(K % 32 == 0, "K comes in chunks of 32");

  uint4 upper[FLIGHT][TILES], lower[FLIGHT][TILES];
  const u8* row_upper[TILES];
  const u8* row_lower[TILES];
  float c[TILES][N_TILES][4];

  DEVICE static int chunk(int step) { return 2 * (warp_id() + WARPS * (step >> 1)) + (step & 1); }

  // The rows of a tile that this lane reads: its g-th row of the upper and of the lower half.
  DEVICE void set_rows(int tile, const u16* weights, int upper_row, int lower_row) {
    row_upper[tile] = (const u8*)(weights + (size_t)upper_row * K) + (lane_id() & 3) * 16;
    row_lower[tile] = (const u8*)(weights + (size_t)lower_row * K) + (lane_id() & 3) * 16;
  }

  DEVICE void fetch(int slot, int step) {
    int at = chunk(step);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if (at < CHUNKS) {
        upper[slot][tile] = load_weights(row_upper[tile] + at * 64);
        lower[slot][tile] = load_weights(row_lower[tile] + at * 64);
      }
    }
  }

  DEVICE void prefetch() {
#pragma unroll
    for (int step = 0; step < FLIGHT; step++) fetch(step, step);
  }

  // Multiply with activations bf16 [ROWS, K]; `arrange` reorders a lane's 8 weights to match the activations' order.
  template <typename Arrange>
  DEVICE void run(const u16* activations, Arrange arrange) {
    constexpr int GROUP = N_TILES == 1 ? ASKED : (ASKED + 1) / 2;
    const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int n = 0; n < N_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[tile][n][i] = 0.f;
#pragma unroll
    for (int first = 0; first < STEPS; first += GROUP) {
      uint4 x[GROUP][N_TILES];
#pragma unroll
      for (int i = 0; i < GROUP; i++)
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
          int at = chunk(first + i);
          bool wanted = first + i < STEPS && at < CHUNKS && n * 8 + g < ROWS;
          x[i][n] = wanted ? load_fresh((const uint4*)(activations + (n * 8 + g) * K + at * 32 + t * 8))
                           : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
      for (int i = 0; i < GROUP; i++) {
        int step = first + i;
        if (step < STEPS && chunk(step) < CHUNKS) {
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            uint4 a = arrange(upper[step % FLIGHT][tile]), b = arrange(lower[step % FLIGHT][tile]);
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
              mma(c[tile][n], a.x, b.x, a.y, b.y, x[i][n].x, x[i][n].y);
              mma(c[tile][n], a.z, b.z, a.w, b.w, x[i][n].z, x[i][n].w);
            }
          }
        }
        if (step + FLIGHT < STEPS) fetch(step % FLIGHT, step + FLIGHT);
      }
    }
  }

  DEVICE void run(const u16* activations) {
    run(activations, [](uint4 weights) { return weights; });
  }

  // Leave the warps' partial sums in shared memory; `total` adds them up after a barrier.
  typedef float Sums[WARPS][TILES * 16][ROWS];
  DEVICE void store(Sums& sums) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int n = 0; n < N_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int row = n * 8 + 2 * t + (i & 1);
          if (row < ROWS) sums[warp_id()][tile * 16 + g + (i >> 1) * 8][row] = c[tile][n][i];
        }
  }
  DEVICE static float total(const Sums& sums, int out, int row) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += sums[warp][out][row];
    return sum;
  }
};

// How many warps share K: few leftovers, and a block of at most 16 warps.
__host__ __device__ constexpr int warps_for(int k) {
  int pairs = (k / 32 + 1) / 2, best = 1, best_cost = 1 << 30;
  for (int warps = 1; warps <= 16; warps++) {
    int steps = (pairs + warps - 1) / warps;
    int cost = steps * warps * 16 + (steps > 5 ? (steps - 5) * 64 : 0) + warps;
    if (cost < best_cost) {
      best_cost = cost;
      best = warps;
    }
  }
  return best;
}
