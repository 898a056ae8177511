// A tile of 16 rows of MXFP4 weights in shared memory, times up to 8 activation rows, on the tensor cores.
//
// Unpacking: a nibble's E2M1 code goes to bit 15 (sign) and bits 8..6 of a bf16, which reads as value * 2^-126 (codes 0
// and 1 as subnormals), and one bf16x2 product by 2^126 * block scale makes it exact. In float32 the subnormals
// could be flushed; in bf16x2 they are not. Block scales above 2 would overflow the factor: the loader refuses them.
#pragma once
#include "common.cuh"

constexpr u32 LARGEST_SCALE = 128;  // E8M0, = 2.0

DEVICE u32 scale_pair(u32 scale) { return (scale + 126) * 0x00800080u; }

DEVICE u32 scaled_pair(u32 code, u32 factor) {
  u32 value;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(value) : "r"(code), "r"(factor), "r"(0x80008000u));
  return value;
}

// Nibbles i and i + 4 of a word, as a bf16 pair. One product puts a nibble's sign and its magnitude in their places; two
// masks keep the rest out. Shifts instead would go to the same pipe as the masks, which bounds these kernels.
template <int i>
DEVICE u32 unpack(u32 word, u32 factor) {
  const u32 from = i < 2 ? word : word >> 8;
  const u32 alone = from & (i % 2 ? 0x00f000f0u : 0x000f000fu);
  return scaled_pair(alone * (i % 2 ? 0x104u : 0x1040u) & 0x81c081c0u, factor);
}

// BLOCKS blocks of 32 along K; a block of WARPS warps shares them in steps of 4 (128 k).
template <int BLOCKS, int WARPS>
struct ExpertTile {
  static constexpr int ROW_BYTES = BLOCKS * 16;
  static constexpr int WEIGHT_BYTES = 16 * ROW_BYTES;
  static constexpr int SCALE_BYTES = 16 * BLOCKS;
  static constexpr int BYTES = WEIGHT_BYTES + SCALE_BYTES;
  static constexpr int STEPS = ((BLOCKS + 3) / 4 + WARPS - 1) / WARPS;

  uint4 x[STEPS][4];  // this lane's activations: its column's block, in expert order

  int lane = lane_id(), warp = warp_id() % WARPS;

  DEVICE int block(int step) const { return 4 * (warp + WARPS * step) + (lane & 3); }

  // Activations of one column: bf16 [32 * BLOCKS] in expert order, or null for none.
  DEVICE void load(const u16* column) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const bool wanted = column && block(step) < BLOCKS;
#pragma unroll
      for (int word = 0; word < 4; word++)
        x[step][word] = wanted ? load_fresh((const uint4*)(column + block(step) * 32) + word) : make_uint4(0, 0, 0, 0);
    }
  }

  // c[g] is row 2g, c[g + 8] row 2g + 1 of the tile: gate and up meet in one lane, and 16-byte reads of eight lanes
  // touch each bank once when a row is 90 blocks long.
  DEVICE void multiply(const u8* weights, const u8* block_scales, float (&c)[4]) const {
    multiply(weights, block_scales, c, [&](int step, int word) { return x[step][word]; });
  }
  // `held(step, word)` gives a lane's activations, when they are kept elsewhere.
  template <typename Held>
  DEVICE void multiply(const u8* weights, const u8* block_scales, float (&c)[4], Held held) const {
    const int g = lane >> 2;
    float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int clamped = min(block(step), BLOCKS - 1);  // past the end the activations are zero
      const uint4 upper = *(const uint4*)(weights + (2 * g) * ROW_BYTES + clamped * 16);
      const uint4 lower = *(const uint4*)(weights + (2 * g + 1) * ROW_BYTES + clamped * 16);
      const u8* scales = block_scales + 2 * g * BLOCKS + clamped;
      const u32 s = scale_pair(scales[0]), r = scale_pair(scales[BLOCKS]);
      const u32 a[4] = {upper.x, upper.y, upper.z, upper.w}, b[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
      for (int word = 0; word < 4; word++) {
        const uint4 k = held(step, word);
        mma(even, unpack<0>(a[word], s), unpack<0>(b[word], r), unpack<1>(a[word], s), unpack<1>(b[word], r),
            k.x, k.y);
        mma(odd, unpack<2>(a[word], s), unpack<2>(b[word], r), unpack<3>(a[word], s), unpack<3>(b[word], r),
            k.z, k.w);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] = even[i] + odd[i];
  }
};
