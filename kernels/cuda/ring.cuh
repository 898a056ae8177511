// A ring of shared-memory stages filled by bulk copies from global memory, one mbarrier per stage.
//
// A copy needs no registers and no threads, so a block keeps megabytes in flight over the chip. Before sm_90 the whole
// block copies by hand at the moment of need: correct, not fast.
#pragma once
#include "common.cuh"

template <int STAGES>
struct Ring {
  u64 full[STAGES];

  DEVICE static u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

  DEVICE void init() {  // one thread; a block barrier must follow
#if __CUDA_ARCH__ >= 900
    for (int stage = 0; stage < STAGES; stage++)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(full + stage)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  // One thread. Sizes and addresses are multiples of 16.
  DEVICE void expect(int stage, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(full + stage)), "r"(bytes)
                 : "memory");
#endif
  }
  DEVICE void copy(int stage, void* to, const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared(to)),
                 "l"(from), "r"(bytes), "r"(shared(full + stage))
                 : "memory");
#endif
  }
  // All threads; `round` counts how often the stage has been filled before.
  DEVICE void await(int stage, int round) {
#if __CUDA_ARCH__ >= 900
    u32 done = 0;
    while (!done)
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(shared(full + stage)), "r"(round & 1)
          : "memory");
#endif
  }
};
