// Sums over the GPUs of one host, through memory that each maps of every other: bf16 in, float32 between, bf16 out.
//
// Data are pushed: a block writes its part into every peer's inbox, then a flag, and waits for the flags of the same block
// of all peers; what it reads then lies in its own memory. Parts are added in the order of ranks, so all ranks hold the same
// bits. Launches of all ranks come in the same order with the same grids; two inboxes take turns from launch to launch,
// and a launch ends only when every peer has begun it, hence has ended the one before: nothing waits for readers.
//
// Compiled once per model width and number of ranks: macros H, RANKS, MOST_BLOCKS and INBOX_BYTES (of one sender).
#include "common.cuh"

constexpr int THREADS = 512;
constexpr int MOST_LOOKS = 1 << 30;

struct Peers {  // as all_reduce.py writes it
  u8* memory[RANKS];  // of each rank, as mapped here: flags, then inboxes
  int* launches;      // how many have ended; then how many blocks of this one have
  int rank;
};
// Flags: u32 [2 phases][senders][MOST_BLOCKS], the number of the last launch whose data have come.
constexpr size_t FLAG_BYTES = (size_t)2 * RANKS * MOST_BLOCKS * 4;
extern "C" __device__ int all_reduce_memory_bytes = FLAG_BYTES + (size_t)2 * RANKS * INBOX_BYTES;

DEVICE u32* flag_of(u8* memory, int phase, int sender, int block) {
  return (u32*)memory + (phase * RANKS + sender) * MOST_BLOCKS + block;
}
DEVICE uint4* inbox_of(u8* memory, u32 number, int sender) {
  return (uint4*)(memory + FLAG_BYTES + ((number & 1) * RANKS + sender) * (size_t)INBOX_BYTES);
}

// A block's part in one launch.
struct Meeting {
  const Peers& peers;
  u32 number;
  u8* own;

  DEVICE explicit Meeting(const Peers& peers) : peers(peers), number(load_fresh(peers.launches) + 1), own(nullptr) {
#pragma unroll
    for (int peer = 0; peer < RANKS; peer++)
      if (peer == peers.rank) own = peers.memory[peer];
  }
  // All threads: what they have written to the peers is there once the peers' `meet` returns, and the other way round.
  DEVICE void meet(int phase) const {
    __syncthreads();
    if (threadIdx.x < RANKS && (int)threadIdx.x != peers.rank) {
      u8* memory = nullptr;
#pragma unroll
      for (int peer = 0; peer < RANKS; peer++)
        if (peer == (int)threadIdx.x) memory = peers.memory[peer];
      asm volatile("fence.acq_rel.sys;" ::: "memory");
      asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag_of(memory, phase, peers.rank, blockIdx.x)), "r"(number)
                   : "memory");
      const u32* flag = flag_of(own, phase, threadIdx.x, blockIdx.x);
      u32 seen = number - 1;
      for (int looks = 0; (int)(seen - number) < 0; looks++) {  // a fast peer may have begun the next launch
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        if (looks > MOST_LOOKS) __trap();
      }
    }
    __syncthreads();
  }
  // All threads, at the end. The last block counts the launch.
  DEVICE void leave() const {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(peers.launches + 1, 1) == (int)gridDim.x - 1) {
      peers.launches[1] = 0;
      __threadfence();
      peers.launches[0] = number;
    }
  }
};

DEVICE void add(float (&sum)[8], uint4 part) {
  const u32 words[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum[2 * i] += low_half(words[i]);
    sum[2 * i + 1] += high_half(words[i]);
  }
}
DEVICE uint4 pack(const float (&sum)[8]) {
  return make_uint4(narrow_pair(sum[0], sum[1]), narrow_pair(sum[2], sum[3]), narrow_pair(sum[4], sum[5]),
                    narrow_pair(sum[6], sum[7]));
}
// All ranks' parts of unit `at` of an inbox, in the order of ranks.
DEVICE void sum_parts(const Meeting& meeting, size_t at, uint4 mine, float (&sum)[8]) {
  uint4 parts[RANKS];
#pragma unroll
  for (int peer = 0; peer < RANKS; peer++)
    parts[peer] = peer == meeting.peers.rank ? mine : load_fresh(inbox_of(meeting.own, meeting.number, peer) + at);
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] = 0.f;
#pragma unroll
  for (int peer = 0; peer < RANKS; peer++) add(sum, parts[peer]);
}
DEVICE void push(const Meeting& meeting, size_t at, uint4 value) {
#pragma unroll
  for (int peer = 0; peer < RANKS; peer++)
    if (peer != meeting.peers.rank) inbox_of(meeting.peers.memory[peer], meeting.number, meeting.peers.rank)[at] = value;
}

// Every rank sums everything. x bf16 [8 units], in place.
KERNEL(THREADS, 1)
all_reduce_one_shot(uint4* x, int units, const __grid_constant__ Peers peers) {
  const Meeting meeting(peers);
  const int begin = (int)((i64)units * blockIdx.x / gridDim.x), end = (int)((i64)units * (blockIdx.x + 1) / gridDim.x);
  for (int i = begin + threadIdx.x; i < end; i += THREADS) push(meeting, i, x[i]);
  meeting.meet(0);
  for (int i = begin + threadIdx.x; i < end; i += THREADS) {
    float sum[8];
    sum_parts(meeting, i, x[i], sum);
    x[i] = pack(sum);
  }
  meeting.leave();
}

// Every rank sums its share and gives the sum to the others: fewer bytes from three ranks on, two trips. An inbox holds
// the shares that come first, then the sums. x bf16 [8 units], in place.
KERNEL(THREADS, 1)
all_reduce_two_shot(uint4* x, int units, const __grid_constant__ Peers peers) {
  const Meeting meeting(peers);
  const int share = (units + RANKS - 1) / RANKS;
  const int begin = (int)((i64)share * blockIdx.x / gridDim.x), end = (int)((i64)share * (blockIdx.x + 1) / gridDim.x);
#pragma unroll
  for (int owner = 0; owner < RANKS; owner++)
    if (owner != peers.rank) {
      uint4* to = inbox_of(peers.memory[owner], meeting.number, peers.rank);
      for (int i = begin + threadIdx.x; i < end && owner * share + i < units; i += THREADS) to[i] = x[owner * share + i];
    }
  meeting.meet(0);
  for (int i = begin + threadIdx.x; i < end && peers.rank * share + i < units; i += THREADS) {
    float sum[8];
    sum_parts(meeting, i, x[peers.rank * share + i], sum);
    const uint4 value = pack(sum);
    x[peers.rank * share + i] = value;
    push(meeting, share + i, value);
  }
  meeting.meet(1);
#pragma unroll
  for (int owner = 0; owner < RANKS; owner++)
    if (owner != peers.rank) {
      const uint4* from = inbox_of(meeting.own, meeting.number, owner) + share;
      for (int i = begin + threadIdx.x; i < end && owner * share + i < units; i += THREADS)
        x[owner * share + i] = load_fresh(from + i);
    }
  meeting.leave();
}

// Where the MXFP4 expert kernels of Triton read a column: see kernels/triton/permute.py.
DEVICE int expert_place(int column) {
  const int low = column % 128, lane = low / 32, word = low / 8 % 4, high = low / 4 % 2, nibble = low % 4;
  return column - low + (2 * word + nibble / 2) * 16 + nibble % 2 * 8 + 2 * lane + high;
}

// One block a token: sum its `slots` deltas bf16 [T, slots, H] (weighed, where there are weights float32 [T, slots]; a
// slot that weighs 0 is not read) over slots and ranks, add the sum and a bias to the residual stream float32 [T, H], and
// norm it to `out` bf16 [T, H] and, in expert order and padded with zeros, `expert_out` bf16 [T, expert_width].
constexpr int UNITS = H / 8, NORM_THREADS = (UNITS + 31) / 32 * 32;
static_assert(H % 8 == 0 && UNITS <= 1024, "a thread for eight columns");
KERNEL(NORM_THREADS, 1)
all_reduce_add_norm(const uint4* deltas, const float* weights, int slots, const u16* bias, float* residual, const float* norm,
                    float epsilon, uint4* out, u16* expert_out, int expert_width, const __grid_constant__ Peers peers) {
  __shared__ float squares[NORM_THREADS / 32];
  const Meeting meeting(peers);
  const int token = blockIdx.x, unit = threadIdx.x;
  const bool is_inside = unit < UNITS;
  const size_t at = (size_t)token * UNITS + unit;
  uint4 mine = make_uint4(0, 0, 0, 0);
  float x[8] = {};
  if (is_inside) {
    if (slots == 1 && !weights) {
      mine = deltas[at];
    } else {
      for (int slot = 0; slot < slots; slot++) {
        const float weight = weights ? weights[token * slots + slot] : 1.f;
        if (weight == 0.f) continue;
        float part[8] = {};
        add(part, deltas[((size_t)token * slots + slot) * UNITS + unit]);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += weight * part[i];
      }
      mine = pack(x);
    }
    push(meeting, at, mine);
  }
  meeting.meet(0);
  float square = 0.f;
  if (is_inside) {
    float* stream = residual + at * 8;
    sum_parts(meeting, at, mine, x);
    if (bias) add(x, ((const uint4*)bias)[unit]);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float4 old = *(float4*)(stream + i);
      old.x = x[i] += old.x;
      old.y = x[i + 1] += old.y;
      old.z = x[i + 2] += old.z;
      old.w = x[i + 3] += old.w;
      *(float4*)(stream + i) = old;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) square += x[i] * x[i];
  }
  square = warp_sum(square);
  if (lane_id() == 0) squares[warp_id()] = square;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < NORM_THREADS / 32; warp++) total += squares[warp];
  const float scale = rsqrtf(total / H + epsilon);
  if (is_inside) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = x[i] * scale * norm[unit * 8 + i];
    out[at] = pack(x);
    if (expert_out)
#pragma unroll
      for (int i = 0; i < 8; i++) expert_out[(size_t)token * expert_width + expert_place(unit * 8 + i)] = narrow(x[i]);
  }
  if (expert_out)
    for (int column = H + threadIdx.x; column < expert_width; column += NORM_THREADS)
      expert_out[(size_t)token * expert_width + expert_place(column)] = 0;
  meeting.leave();
}
