// What every kernel here shares: types, streaming loads, bf16 conversion, the tensor-core product, dependent launch.
//
// Needs no CUDA header, so NVRTC builds it anywhere. Compiled once per model shape: the shape arrives as macros
// (H, I, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, VOCAB, BLOCK_SIZE, ROWS, and GRID, the number of multiprocessors; see kernels/cuda/decode.py).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

constexpr int WARP = 32;
constexpr u32 FULL = 0xffffffffu;
#define MINUS_INFINITY __int_as_float(0xff800000)
constexpr int HIDDEN_TILES = H / 16;
constexpr int MOST_SQUARES = HIDDEN_TILES > 2 * GRID ? HIDDEN_TILES : 2 * GRID;  // of a row: see residual.cuh, layers.cu

DEVICE int lane_id() { return threadIdx.x & 31; }
DEVICE int warp_id() { return threadIdx.x >> 5; }

// Programmatic dependent launch. A kernel may read before `wait_for_previous` only what no kernel of the step writes, or
// what a kernel at least two launches back wrote: every kernel waits before it releases its successor, so the
// predecessor's predecessor is complete by then.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Weights: read once, kept out of L1.
DEVICE uint4 load_weights(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// Activations: written by other SMs moments ago, so L1 is never asked.
DEVICE uint4 load_fresh(const uint4* p) { return __ldcg(p); }
DEVICE float load_fresh(const float* p) { return __ldcg(p); }
DEVICE int load_fresh(const int* p) { return __ldcg(p); }

DEVICE float low_half(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_half(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float widen(u16 bf16) { return __uint_as_float((u32)bf16 << 16); }
DEVICE u32 narrow_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE u16 narrow(float value) { return (u16)narrow_pair(value, 0.f); }

DEVICE float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(FULL, value, step);
  return value;
}

// c[16 x 8] += a[16 x 16] b[16 x 8], bf16 in, float32 out. Lane (g, t) = (lane / 4, lane % 4) holds rows g and g + 8 of a,
// column g of b, and c[g][2t], c[g][2t+1], c[g+8][2t], c[g+8][2t+1]. Which k a register pair means is free, as long as
// a and b agree: callers choose it so that a lane's k lie side by side in memory.
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Expert order: eight neighbours 0..7 lie as 0 4 1 5 2 6 3 7, the order in which two shifts unpack eight nibbles.
DEVICE int expert_order(int index) { return (index & ~7) | ((index & 3) << 1) | ((index >> 2) & 1); }

// 1 / rms of each row, from the sums of squares that the residual stream's writers left: float32 [ROWS, count], at most
// MOST a row. The warps of a block share the rows; `load` and `reduce` are apart so that other loads can travel in between.
template <int WARPS, int MOST = HIDDEN_TILES>
struct InverseRms {
  static constexpr int PER_WARP = (ROWS + WARPS - 1) / WARPS, PER_LANE = (MOST + 31) / 32;
  int lane = lane_id(), warp = warp_id() % WARPS;
  float part[PER_WARP][PER_LANE];

  DEVICE int row_of(int i) const { return warp + i * WARPS; }
  DEVICE void load(const float* squares, int count = HIDDEN_TILES) {
#pragma unroll
    for (int i = 0; i < PER_WARP; i++)
#pragma unroll
      for (int j = 0; j < PER_LANE; j++) {
        const int row = row_of(i), at = lane + j * 32;
        part[i][j] = row < ROWS && at < count ? load_fresh(squares + row * count + at) : 0.f;
      }
  }
  DEVICE void reduce(float (&scale)[ROWS], float epsilon) const {
#pragma unroll
    for (int i = 0; i < PER_WARP; i++) {
      const int row = row_of(i);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < PER_LANE; j++) sum += part[i][j];
      sum = warp_sum(sum);
      if (row < ROWS && lane == 0) scale[row] = rsqrtf(sum / H + epsilon);
    }
  }
};
