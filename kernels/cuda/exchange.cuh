// How ranks on GPUs of one host add up their parts of a number, inside the kernel that computes it.
//
// A number travels as one 8-byte store into the memory of each peer: its value, and above it the number of the exchange.
// Who reads the right exchange number has the value with it: no fence, no second trip. Parts are added in the order of
// ranks, so all ranks hold the same bits.
//
// Two mailboxes take turns. A sender of exchange n + 2 has seen n + 1 from every peer, each of which had read n before it
// sent that (kernels of a step run one after another), so the place is free.
//
// RANKS is a macro. With one rank nothing of this exists, and kernels have one argument less.
#pragma once
#include "common.cuh"

#if RANKS > 1
constexpr int MAIL_ROWS = 16, TURN_ROWS = 256;

struct Exchange {  // as exchange.py writes it
  u64* mail[RANKS];   // of each rank, as mapped here: [2][senders][MAIL_ROWS][H], then [2][senders][TURN_ROWS][2]
  int* number;        // of the last exchange of the layers so far; even
  int* turns;         // [TURN_ROWS]: of the last token exchanged for each row
  int rank;
};
#define EXCHANGES , const __grid_constant__ Exchange exchange

DEVICE void post(u64* to, u32 value, u32 number) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"((u64)number << 32 | value) : "memory");
}
DEVICE u64 look_into(const u64* from) {
  u64 mail;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(mail) : "l"(from) : "memory");
  return mail;
}
// Where a sender's number for a place lies in any mailbox.
DEVICE size_t mail_place(u32 number, int sender, int row, int column) {
  return (((number & 1) * RANKS + sender) * MAIL_ROWS + row) * (size_t)H + column;
}
DEVICE size_t token_place(u32 number, int sender, int row) {
  return (size_t)2 * RANKS * MAIL_ROWS * H + (((number & 1) * RANKS + sender) * TURN_ROWS + row) * 2;
}

// A peer may be held up for long by its host: its executor has the patience, and ends the process when it is over.
constexpr int MOST_LOOKS = 1 << 30;

// Give `mine`, take everyone's. Each place of an exchange belongs to one thread of every rank.
// `place(number, sender)` tells where a sender's word lies in a mailbox.
template <typename Place>
DEVICE void exchange_words(const Exchange& exchange, u32 number, u32 mine, u32 (&all)[RANKS], Place place) {
#pragma unroll
  for (int peer = 0; peer < RANKS; peer++)
    if (peer != exchange.rank) post(exchange.mail[peer] + place(number, exchange.rank), mine, number);
  u64* own = nullptr;
#pragma unroll
  for (int peer = 0; peer < RANKS; peer++)
    if (peer == exchange.rank) own = exchange.mail[peer];
  bool is_missing = true;
  for (int looks = 0; is_missing; looks++) {
    is_missing = false;
#pragma unroll
    for (int peer = 0; peer < RANKS; peer++) {
      const u64 mail = peer == exchange.rank ? (u64)number << 32 | mine : look_into(own + place(number, peer));
      is_missing |= (u32)(mail >> 32) != number;
      all[peer] = (u32)mail;
    }
    if (looks > MOST_LOOKS) __trap();
  }
}

// The sum of all ranks' parts of the residual stream's [row][column].
DEVICE float exchange_sum(const Exchange& exchange, u32 number, int row, int column, float mine) {
  u32 all[RANKS];
  exchange_words(exchange, number, __float_as_uint(mine), all,
                 [&](u32 number, int sender) { return mail_place(number, sender, row, column); });
  float sum = __uint_as_float(all[0]);
#pragma unroll
  for (int peer = 1; peer < RANKS; peer++) sum += __uint_as_float(all[peer]);
  return sum;
}

// The best of all ranks' ranked tokens of a row; one thread.
DEVICE u64 exchange_best(const Exchange& exchange, int row, u64 mine) {
  const u32 number = (u32)(exchange.turns[row] += 1);
  u32 scores[RANKS], tokens[RANKS];
  exchange_words(exchange, number, (u32)(mine >> 32), scores,
                 [&](u32 number, int sender) { return token_place(number, sender, row); });
  exchange_words(exchange, number, (u32)mine, tokens,
                 [&](u32 number, int sender) { return token_place(number, sender, row) + 1; });
  u64 best = 0;
#pragma unroll
  for (int peer = 0; peer < RANKS; peer++) best = max(best, (u64)scores[peer] << 32 | tokens[peer]);
  return best;
}
#else
#define EXCHANGES
#endif
