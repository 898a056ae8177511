// Step D: router logits, top-k, softmax over the k, and the work list of the expert kernels.
//
// One block: the router's weights wait in registers before the residual stream is complete, and nothing is handed from
// block to block.
#include "projection.cuh"
#include "routing.cuh"

constexpr int GROUP = EXPERTS < 32 ? (EXPERTS + 15) / 16 : 2;  // tiles of 16 experts at once
constexpr int WARPS = 16;
typedef Projection<H, WARPS, GROUP, 6, 6> Product;
constexpr int PER_LANE = (EXPERTS + 31) / 32;

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
    float value[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) value[i] = i * 32 + lane < EXPERTS ? logits[row][i * 32 + lane] : MINUS_INFINITY;
    const bool padding = lengths[row] == 0;
    float largest = 0.f, sum = 0.f, mine = 0.f;
    for (int slot = 0; slot < TOP_K; slot++) {
      float best = MINUS_INFINITY;
      int at = EXPERTS;
#pragma unroll
      for (int i = 0; i < PER_LANE; i++)
        if (value[i] > best) {
          best = value[i];
          at = i * 32 + lane;
        }
#pragma unroll
      for (int step = 16; step; step >>= 1) {
        float other = __shfl_xor_sync(FULL, best, step);
        int other_at = __shfl_xor_sync(FULL, at, step);
        if (other > best || (other == best && other_at < at)) {
          best = other;
          at = other_at;
        }
      }
      if (at >= EXPERTS) at = slot;  // only NaN logits get here: stay within the tables
#pragma unroll
      for (int i = 0; i < PER_LANE; i++)
        if (at == i * 32 + lane) value[i] = MINUS_INFINITY;
      if (slot == 0) largest = best;
      float weight = __expf(best - largest);
      sum += weight;
      if (lane == slot) mine = weight;
      if (lane == 0) {
        chosen[row * TOP_K + slot] = padding ? -1 : at;
        ids[row * TOP_K + slot] = padding ? -1 : at;
      }
    }
    if (lane < TOP_K) shares[row * TOP_K + lane] = padding ? 0.f : mine / sum;
  }
  __syncthreads();

  if (warp_id() != 0) return;  // one warp writes the list, each lane for its experts
  int active = 0, used = 0;
  for (int first = 0; first < EXPERTS; first += 32) {
    const int expert = first + lane;
    int count = 0;
    if (expert < EXPERTS)
      for (int pair = 0; pair < PAIRS; pair++) count += chosen[pair] == expert;
    int before = count;  // inclusive prefix sum over lanes
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      int other = __shfl_up_sync(FULL, before, step);
      if (lane >= step) before += other;
    }
    const u32 with_rows = __ballot_sync(FULL, count > 0);
    const int total = __shfl_sync(FULL, before, 31);
    if (count > 0) {
      const int index = active + __popc(with_rows & ((1u << lane) - 1));
      int next = used + before - count;
      routing->expert[index] = expert;
      routing->begin[index] = next;
      for (int pair = 0; pair < PAIRS; pair++)
        if (chosen[pair] == expert) routing->pair[next++] = pair;
    }
    active += __popc(with_rows);
    used += total;
  }
  if (lane == 0) {
    routing->active = active;
    routing->begin[active] = used;
  }
}
