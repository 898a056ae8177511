// Step D: router logits, top-k, softmax over the k, and the work list of the expert kernels.
//
// One block: the router's weights wait in registers before the residual stream is complete, and nothing is handed from
// block to block.
#include "projection.cuh"
#include "routing.cuh"

constexpr int GROUP = EXPERTS < 32 ? (EXPERTS + 15) / 16 : 2;  // tiles of 16 experts at once
constexpr int WARPS = 16;
typedef Projection<H, WARPS, GROUP, 6, 6> Product;

// `scaled` is in expert order; so must the weights' halves pair up: (0,4) (1,5) (2,6) (3,7).
DEVICE uint4 pair_up(uint4 w) {
  return make_uint4(__byte_perm(w.x, w.z, 0x5410), __byte_perm(w.x, w.z, 0x7632), __byte_perm(w.y, w.w, 0x5410),
                    __byte_perm(w.y, w.w, 0x7632));
}

KERNEL(WARPS * 32, 1)
norm_router_topk(const u16* weights, const u16* bias, const u16* scaled, const float* squares, float epsilon,
                 const int* lengths, float* inverse, int* ids, float* shares, Routing* routing) {
  __shared__ Product::Sums sums;
  __shared__ float scale[ROWS];
  __shared__ float logits[ROWS][EXPERTS];
  __shared__ int chosen[PAIRS];
  const int lane = lane_id(), g = lane >> 2;

  Product product;
#pragma unroll
  for (int tile = 0; tile < GROUP; tile++)
    product.set_rows(tile, weights, min(tile * 16 + g, EXPERTS - 1), min(tile * 16 + g + 8, EXPERTS - 1));
  product.prefetch();
  wait_for_previous();
  release_next();
  InverseRms<WARPS> rms;
  rms.load(squares);
  for (int first = 0; first < EXPERTS; first += GROUP * 16) {
    if (first) {
#pragma unroll
      for (int tile = 0; tile < GROUP; tile++) {
        int upper = first + tile * 16 + g;
        product.set_rows(tile, weights, min(upper, EXPERTS - 1), min(upper + 8, EXPERTS - 1));
      }
      product.prefetch();
      __syncthreads();  // the last round's sums have been read
    }
    product.run(scaled, pair_up);
    product.store(sums);
    if (first == 0) rms.reduce(scale, epsilon);
    __syncthreads();
    for (int item = threadIdx.x; item < GROUP * 16 * ROWS; item += WARPS * 32) {
      const int row = item / (GROUP * 16), i = item % (GROUP * 16), expert = first + i;
      if (expert < EXPERTS) logits[row][expert] = Product::total(sums, i, row) * scale[row] + widen(bias[expert]);
    }
  }
  if (threadIdx.x < ROWS) inverse[threadIdx.x] = scale[threadIdx.x];
  __syncthreads();

  for (int row = warp_id(); row < ROWS; row += WARPS) {  // a warp picks a row's experts
    float value[EXPERT_ROUNDS], share;
    int expert;
#pragma unroll
    for (int i = 0; i < EXPERT_ROUNDS; i++) value[i] = i * 32 + lane < EXPERTS ? logits[row][i * 32 + lane] : 0.f;
    choose(value, lengths[row] == 0, expert, share);
    if (lane < TOP_K) {
      chosen[row * TOP_K + lane] = expert;
      ids[row * TOP_K + lane] = expert;
      shares[row * TOP_K + lane] = share;
    }
  }
  __syncthreads();
  if (warp_id() == 0) write_list(chosen, routing);
}
