// The experts of a row, and the list that the router leaves for the expert kernels: which have rows, and which rows.
//
// A pair is row * TOP_K + slot. Rows of length 0 are padding and have no pairs, so they cost nothing further on.
#pragma once
#include "common.cuh"

constexpr int PAIRS = ROWS * TOP_K;
constexpr int MAX_ACTIVE = EXPERTS < PAIRS ? EXPERTS : PAIRS;
constexpr int EXPERT_ROUNDS = (EXPERTS + 31) / 32;  // experts a lane, when a warp looks at all

struct Routing {
  int active;                  // experts with at least one pair
  int expert[MAX_ACTIVE];      // their ids, ascending
  int begin[MAX_ACTIVE + 1];   // pairs of active expert a: pair[begin[a]] .. pair[begin[a + 1] - 1]
  int pair[PAIRS];
};

// Floats as integers of the same order; 0 for NaN, below every number.
DEVICE u32 order_of(float value) {
  const u32 bits = __float_as_uint(value);
  return value != value ? 0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float value_of(u32 order) { return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order); }

// One warp: the TOP_K largest of a row's logits (lane's expert i * 32 + lane in value[i]), the lower id first among equals.
// Lane `slot` gets that slot's expert and its share of the softmax over the chosen; -1 and 0 for a padding row.
DEVICE void choose(const float (&value)[EXPERT_ROUNDS], bool is_padding, int& expert, float& share) {
  u32 order[EXPERT_ROUNDS];
#pragma unroll
  for (int i = 0; i < EXPERT_ROUNDS; i++) order[i] = i * 32 + lane_id() < EXPERTS ? order_of(value[i]) : 0u;
  float largest = 0.f, sum = 0.f;
  expert = -1;
  share = 0.f;
#pragma unroll
  for (int slot = 0; slot < TOP_K; slot++) {
    u32 mine = 0, best;
#pragma unroll
    for (int i = 0; i < EXPERT_ROUNDS; i++) mine = max(mine, order[i]);
    best = __reduce_max_sync(FULL, mine);
    u32 at = EXPERTS;
#pragma unroll
    for (int i = EXPERT_ROUNDS - 1; i >= 0; i--)
      if (order[i] == best && best != 0) at = i * 32 + lane_id();
    at = __reduce_min_sync(FULL, at);
    if (at >= EXPERTS) at = slot;  // only NaN logits get here: stay within the tables
#pragma unroll
    for (int i = 0; i < EXPERT_ROUNDS; i++)
      if ((int)at == i * 32 + lane_id()) order[i] = 0;
    const float logit = value_of(best);
    if (slot == 0) largest = logit;
    const float weight = __expf(logit - largest);
    sum += weight;
    if (lane_id() == slot) {
      expert = at;
      share = weight;
    }
  }
  share /= sum;
  if (is_padding) {
    expert = -1;
    share = 0.f;
  }
}

// The same list for a single row: its experts differ, so each is an active expert of its own.
DEVICE int write_short_list(const int* chosen, Routing* routing) {
  const int slot = lane_id(), mine = slot < TOP_K ? chosen[slot] : -1, active = chosen[0] < 0 ? 0 : TOP_K;
  int rank = 0;
#pragma unroll
  for (int other = 0; other < TOP_K; other++) {
    const int expert = chosen[other];
    rank += expert < mine || (expert == mine && other < slot);
  }
  if (slot < active) {
    routing->expert[rank] = mine;
    routing->begin[rank] = rank;
    routing->pair[rank] = slot;
  }
  if (slot == 0) {
    routing->active = active;
    routing->begin[active] = active;
  }
  return active;
}

// One warp: the list of `chosen` [PAIRS], each lane for its experts. Returns the number of active experts.
DEVICE int write_list(const int* chosen, Routing* routing) {
  int active = 0, used = 0;
  for (int first = 0; first < EXPERTS; first += 32) {
    const int expert = first + lane_id();
    int count = 0;
    if (expert < EXPERTS)
#pragma unroll 8
      for (int pair = 0; pair < PAIRS; pair++) count += chosen[pair] == expert;
    int before = count;  // inclusive prefix sum over lanes
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      int other = __shfl_up_sync(FULL, before, step);
      if (lane_id() >= step) before += other;
    }
    const u32 with_rows = __ballot_sync(FULL, count > 0);
    const int total = __shfl_sync(FULL, before, 31);
    if (count > 0) {
      const int index = active + __popc(with_rows & ((1u << lane_id()) - 1));
      int next = used + before - count;
      routing->expert[index] = expert;
      routing->begin[index] = next;
#pragma unroll 8
      for (int pair = 0; pair < PAIRS; pair++)
        if (chosen[pair] == expert) routing->pair[next++] = pair;
    }
    active += __popc(with_rows);
    used += total;
  }
  if (lane_id() == 0) {
    routing->active = active;
    routing->begin[active] = used;
  }
  return active;
}
