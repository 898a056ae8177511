// The list that the router leaves for the expert kernels: which experts have rows, and which rows they have.
//
// A pair is row * TOP_K + slot. Rows of length 0 are padding and have no pairs, so they cost nothing further on.
#pragma once
#include "common.cuh"

constexpr int PAIRS = ROWS * TOP_K;
constexpr int MAX_ACTIVE = EXPERTS < PAIRS ? EXPERTS : PAIRS;

struct Routing {
  int active;                  // experts with at least one pair
  int expert[MAX_ACTIVE];      // their ids, ascending
  int begin[MAX_ACTIVE + 1];   // pairs of active expert a: pair[begin[a]] .. pair[begin[a + 1] - 1]
  int pair[PAIRS];
};
