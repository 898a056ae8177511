// All layers of a step in one launch: a block for each multiprocessor stays, and blocks meet at counters between stages.
//
// A block owns columns of the residual stream, which never leave its registers, and the rows of the output and down
// projections that add to them; rotary pairs of the qkv projection; and tiles of the chosen experts' gate_up. The router's
// logits come as sums over each block's columns. Meaning: the kernels of qkv.cu, attention.cu, out_proj.cu, router.cu and
// experts.cu in turn, for up to 8 rows.
#include "attend.cuh"
#include "feed.cuh"

extern "C" __device__ int layers_shared = sizeof(Shared), layers_threads = THREADS, layers_words = LAYER_WORDS,
                          layers_counters = NUM_STAGES * SPREAD * LINE;

struct Step {  // what the layers of a step read and write, beside weights: see layers.py
  const Layer* layers;
  const float2* rotations;
  const int *positions, *lengths;
  float* residual;
  u16* scaled;                  // bf16 [ROWS, H], for qkv and lm_head
  const float* first_squares;   // [ROWS, first_count]: of the stream as it comes
  float* squares;               // [ROWS, GROUPS * GRID]
  u16* query;
  Part* parts;
  int* tickets;
  u16* attended;
  u16* expert_input;            // bf16 [ROWS, H] in expert order
  float* expert_squares;        // [ROWS, GROUPS * GRID]
  float* logits;                // [ROWS, GRID, EXPERTS]: sums over a block's columns
  float* inverse;
  int* ids;
  float* shares;
  u16* act;
  int* active;                  // [layers]
  int* counters;
  int num_layers, first_count;
  float epsilon, limit, attention_scale;
#if RANKS > 1
  Exchange exchange;
#endif
};
extern "C" __device__ int layers_step_bytes = sizeof(Step);

// Products of up to 16 staged bf16 rows with the activations, K shared by a group's warps: activations stay in registers.
template <int K>
struct Product {
  static constexpr int K_CHUNKS = K / 32, STEPS = steps_of(K);
  uint4 x[IS_SINGLE ? 1 : STEPS];
  uint4* const held;
  const int warp, g, t;

  DEVICE explicit Product(const Worker& worker)
      : held(worker.held()), warp(worker.warp), g(worker.lane >> 2), t(worker.lane & 3) {}
  DEVICE int chunk(int step) const { return 2 * (warp + WARPS * (step >> 1)) + (step & 1); }
  DEVICE void load(const u16* activations) {
    if constexpr (IS_SINGLE) {
#pragma unroll
      for (int first = 0; first < STEPS * 4; first += 32) {
        const int unit = first + g * 4 + t, at = chunk(unit / 4);
        if (unit < STEPS * 4)
          held[unit] = at < K_CHUNKS ? load_fresh((const uint4*)(activations + at * 32 + t * 8)) : make_uint4(0, 0, 0, 0);
      }
      __syncwarp();
    } else {
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        const int at = chunk(step);
        x[step] = at < K_CHUNKS && g < ROWS ? load_fresh((const uint4*)(activations + g * K + at * 32 + t * 8))
                                            : make_uint4(0, 0, 0, 0);
      }
    }
  }
  // `upper` and `lower` are this lane's rows g and g + 8 of the tile in shared memory. A row that is not there may be any:
  // its products reach this lane only, which leaves c as it was.
  DEVICE void multiply(const u8* upper, bool has_upper, const u8* lower, bool has_lower, float (&c)[4]) const {
    float d[4][4] = {};  // chains of dependent products
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int at = min(chunk(step), K_CHUNKS - 1);  // past the end the activations are zero
      const uint4 a = *(const uint4*)(upper + at * 64 + t * 16), b = *(const uint4*)(lower + at * 64 + t * 16);
      const uint4 k = IS_SINGLE ? held[step * 4 + t] : x[IS_SINGLE ? 0 : step];  // a single row stands in every column
      mma(d[step & 1], a.x, b.x, a.y, b.y, k.x, k.y);
      mma(d[2 + (step & 1)], a.z, b.z, a.w, b.w, k.z, k.w);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < 2 ? has_upper : has_lower) c[i] += d[0][i] + d[1][i] + d[2][i] + d[3][i];
  }
};

DEVICE KeyPlace project_qkv(const Worker& worker, const Step& step, const Layer& layer, int number) {
  // The next layer's pointers, to the copy that nobody reads: all are past the last layer.
  if (worker.index >= CONSUMERS - 32 && number + 1 < step.num_layers && worker.lane < LAYER_WORDS)
    ((u64*)&worker.shared.rest.layer[(number + 1) & 1])[worker.lane] = ((const u64*)(step.layers + number + 1))[worker.lane];
  const Range pairs = worker.share(ROTARY_PAIRS);
  // A thread's output: pair `mine` of the group, of one row.
  const int mine = worker.thread & 15, row = worker.thread >> 4;
  const bool has_output = row < ROWS && mine < pairs.count() && step.lengths[row < ROWS ? row : 0] != 0;
  const int head = (pairs.begin + mine) / HALF, dim = (pairs.begin + mine) % HALF;
  float bias_a = 0.f, bias_b = 0.f;
  float2 turn = make_float2(1.f, 0.f);
  u16* out = nullptr;
  if (has_output) {
    const int position = step.positions[row];
    bias_a = widen(layer.qkv_bias[head * HEAD_DIM + dim]);
    bias_b = widen(layer.qkv_bias[head * HEAD_DIM + dim + HALF]);
    if (head < HEADS + KV_HEADS) turn = step.rotations[(size_t)position * HALF + dim];
    if (head < HEADS) {
      out = step.query + (row * HEADS + head) * HEAD_DIM + dim;
    } else {
      const int block = layer.table[row * layer.table_stride + position / BLOCK_SIZE];
      const size_t slot = (size_t)block * BLOCK_SIZE + position % BLOCK_SIZE;
      out = layer.cache + (slot * (2 * KV_HEADS) + (head - HEADS)) * HEAD_DIM + dim;  // all keys, then all values
    }
  }
  const KeyPlace keys = place_keys(worker, layer, step.lengths);
  if (number) worker.wait(number - 1, DOWN, GRID);
  Product<H> product(worker);
  product.load(step.scaled);
  InverseRms<WARPS, MOST_SQUARES> rms{worker.lane, worker.warp};
  rms.load(number ? step.squares : step.first_squares, number ? GROUPS * GRID : step.first_count);
  Products& shared = worker.scratch().products;
  const int g = worker.lane >> 2;
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
    float c[4] = {0.f, 0.f, 0.f, 0.f};
    const int count = min(8, pairs.count() - tile * 8);
    constexpr int MOST = at_most(8, at_most(STAGES, QKV_STAGES) * QKV_STEP);  // pairs at a time
    for (int first = 0; first < count; first += MOST) {
      const int stages = (min(MOST, count - first) + QKV_STEP - 1) / QKV_STEP, at = g - first;
      for (int i = 0; i < stages; i++) worker.await(i);
      const bool is_here = at >= 0 && at < min(MOST, count - first);
      const int pair = is_here ? at : 0, in_stage = min(QKV_STEP, count - first - pair / QKV_STEP * QKV_STEP);
      const u8* stage = worker.stage(pair / QKV_STEP);
      product.multiply(stage + place<H, 2 * QKV_STEP>(pair % QKV_STEP), is_here,
                       stage + place<H, 2 * QKV_STEP>(in_stage + pair % QKV_STEP), is_here, c);
      worker.release(stages);
    }
    store_sums(shared.sums[tile], worker, c);
  }
  rms.reduce(worker.shared.rest.scale[worker.group], step.epsilon);
  worker.group_barrier();
  if (has_output) {
    const float scale = worker.shared.rest.scale[worker.group][row];
    const float a = total(shared.sums[mine >> 3], mine & 7, row) * scale + bias_a;
    const float b = total(shared.sums[mine >> 3], (mine & 7) + 8, row) * scale + bias_b;
    out[0] = narrow(a * turn.x - b * turn.y);
    out[HALF] = narrow(b * turn.x + a * turn.y);
  }
  worker.arrive(number, QKV);
  return keys;
}

// A thread's place in the residual stream: one column of one row, for the whole launch.
struct Place {
  int row, column;
  bool is_mine;

  DEVICE explicit Place(const Worker& worker) : row(worker.thread >> 4) {
    const Range columns = worker.share(H);
    column = columns.begin + (worker.thread & 15);
    is_mine = row < ROWS && column < columns.end;
  }
};
DEVICE float half_warp_sum(float value) {
  const u32 mask = 0xffffu << (lane_id() & 16);
#pragma unroll
  for (int step = 8; step; step >>= 1) value += __shfl_xor_sync(mask, value, step);
  return value;
}

DEVICE void project_out(const Worker& worker, const Step& step, const Layer& layer, int number, float& x) {
  const Place place_of(worker);
  const Range columns = worker.share(H);
  const float bias = place_of.is_mine ? widen(layer.out_bias[place_of.column]) : 0.f;
  const float norm = place_of.is_mine ? layer.post_norm[place_of.column] : 0.f;
  // The router's weights for sixteen threads an expert, two of the block's columns each.
  const int j = worker.index & 15;
  float router[EXPERT_ROUNDS][GROUPS];
#pragma unroll
  for (int i = 0; i < EXPERT_ROUNDS; i++)
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      const Range of = share_of(H, worker.block, group);
      const int expert = i * 32 + (worker.index >> 4);
      router[i][group] =
          expert < EXPERTS && j < of.count() ? widen(layer.router[(size_t)expert * H + of.begin + j]) : 0.f;
    }
  worker.wait(number, ATTENDED, ROW_HEADS);
  Product<WIDTH> product(worker);
  product.load(step.attended);
  float c[4] = {0.f, 0.f, 0.f, 0.f};
  const int g = worker.lane >> 2;
  constexpr int MOST = STAGES * OUT_STEP;  // rows that the ring holds at once
  for (int first = 0; first < columns.count(); first += MOST) {
    const int count = min(MOST, columns.count() - first), stages = (count + OUT_STEP - 1) / OUT_STEP;
    for (int i = 0; i < stages; i++) worker.await(i);
    auto is_here = [&](int at) { return at >= 0 && at < count; };
    auto row = [&](int at) {
      at = is_here(at) ? at : 0;
      return worker.stage(at / OUT_STEP) + place<WIDTH, OUT_STEP>(at % OUT_STEP);
    };
    product.multiply(row(g - first), is_here(g - first), row(g + 8 - first), is_here(g + 8 - first), c);
    worker.release(stages);
  }
  Products& shared = worker.scratch().products;
  store_sums(shared.sums[0], worker, c);
  worker.group_barrier();
  Products& first = worker.shared.scratch[0].products;
  if (place_of.row < ROWS) {
    float value = 0.f;
    if (place_of.is_mine) {
      float sum = total(shared.sums[0], worker.thread & 15, place_of.row);
#if RANKS > 1
      sum = exchange_sum(step.exchange, worker.shared.rest.exchanges + 2 * number + 1, place_of.row, place_of.column, sum);
#endif
      x += sum + bias;
      value = x * norm;
      step.expert_input[place_of.row * H + expert_order(place_of.column)] = narrow(value);
    }
    first.columns[place_of.row][worker.group * 16 + (worker.thread & 15)] = value;
    const float square = half_warp_sum(x * x);
    if ((worker.thread & 15) == 0)
      step.expert_squares[(place_of.row * GRID + worker.block) * GROUPS + worker.group] = square;
  }
  worker.block_barrier();
#pragma unroll
  for (int i = 0; i < EXPERT_ROUNDS; i++) {
    const int expert = i * 32 + (worker.index >> 4);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      float part = 0.f;
#pragma unroll
      for (int group = 0; group < GROUPS; group++) part += router[i][group] * first.columns[row][group * 16 + j];
      part = half_warp_sum(part);
      if (expert < EXPERTS && j == row) step.logits[(row * GRID + worker.block) * EXPERTS + expert] = part;
    }
  }
  worker.arrive(number, OUT);
}

// The whole block: sum up one row's logits; warp 0 chooses, lane `slot` has the result. Valid in warp 0.
DEVICE void route_row(const Worker& worker, const Step& step, const Layer& layer, int row, int& expert, float& share,
                      float& inverse) {
  Products& shared = worker.shared.scratch[0].products;
  const int lane = worker.lane, part = worker.index >> 5;
  constexpr int PARTS = CONSUMERS / 32;
  float squares = 0.f, bias[EXPERT_ROUNDS] = {};
  if (part == 0) {
#pragma unroll
    for (int i = 0; i < (GROUPS * GRID + 31) / 32; i++)
      if (i * 32 + lane < GROUPS * GRID) squares += load_fresh(step.expert_squares + row * GROUPS * GRID + i * 32 + lane);
#pragma unroll
    for (int i = 0; i < EXPERT_ROUNDS; i++)
      if (i * 32 + lane < EXPERTS) bias[i] = widen(layer.router_bias[i * 32 + lane]);
  }
#pragma unroll
  for (int i = 0; i < EXPERT_ROUNDS; i++) {
    float sum = 0.f;
#pragma unroll
    for (int block = 0; block < GRID; block += PARTS)
      if (i * 32 + lane < EXPERTS && block + part < GRID)
        sum += load_fresh(step.logits + (row * GRID + block + part) * EXPERTS + i * 32 + lane);
    shared.logits[part][i * 32 + lane] = sum;
  }
  worker.block_barrier();
  if (part != 0) return;
  inverse = rsqrtf(warp_sum(squares) / H + step.epsilon);
  float value[EXPERT_ROUNDS];
#pragma unroll
  for (int i = 0; i < EXPERT_ROUNDS; i++) {
    float sum = 0.f;
#pragma unroll
    for (int from = 0; from < PARTS; from++) sum += shared.logits[from][i * 32 + lane];
    value[i] = sum * inverse + bias[i];
  }
  choose(value, step.lengths[row] == 0, expert, share);
}

// Leaves the routing in shared memory, and tells the suppliers.
DEVICE void route(const Worker& worker, const Step& step, const Layer& layer, int number) {
  Rest& rest = worker.shared.rest;
  const int lane = worker.lane;
  constexpr int APART = GRID / ROWS;
  const bool has_row = ROWS == 1 || (worker.block % APART == 0 && worker.block / APART < ROWS);
  if (has_row) {
    const int row = ROWS == 1 ? 0 : worker.block / APART;
    int expert;
    float share, inverse;
    if (ROWS > 1) worker.wait(number, OUT, GRID);
    route_row(worker, step, layer, row, expert, share, inverse);
    if (worker.index < 32) {
      if (lane < TOP_K && (ROWS > 1 || worker.block == 0)) {
        step.ids[row * TOP_K + lane] = expert;
        step.shares[row * TOP_K + lane] = share;
      }
      if (ROWS == 1) {
        if (lane < TOP_K) {
          rest.chosen[lane] = expert;
          rest.shares[lane] = share;
        }
        rest.inverse[0] = inverse;
      } else {
        if (lane == 0) step.inverse[row] = inverse;
        __syncwarp();
        if (lane == 0) announce(worker.counters, number, ROUTED, row);
      }
    }
  }
  if (worker.index < 32) {
    if (ROWS > 1) {
      wait_for(worker.counters, number, ROUTED, ROWS, lane);
      __syncwarp();
      for (int pair = lane; pair < PAIRS; pair += 32) {
        rest.chosen[pair] = load_fresh(step.ids + pair);
        rest.shares[pair] = load_fresh(step.shares + pair);
      }
      if (lane < ROWS) rest.inverse[lane] = load_fresh(step.inverse + lane);
    }
    __syncwarp();
    const int active = ROWS == 1 ? write_short_list(rest.chosen, &rest.routing) : write_list(rest.chosen, &rest.routing);
    if (worker.block == 0 && lane == 0) step.active[number] = active;
    __syncwarp();
    if (lane == 0) arrive_barrier(&rest.routed);
  }
  worker.block_barrier();
}

// A single row's input of the experts, where gate_up looks for it: [step][word][lane % 4], to touch each bank once.
DEVICE void hold_input(const Worker& worker, const u16* input) {
  uint4* held = worker.held();
#pragma unroll
  for (int first = 0; first < GateUpTile::STEPS * 16; first += 32) {
    const int unit = first + worker.lane, block = 4 * (worker.warp + WARPS * (unit / 16)) + unit % 4;
    if (unit < GateUpTile::STEPS * 16)
      held[unit] = block < H / 32 ? load_fresh((const uint4*)(input + block * 32) + unit / 4 % 4) : make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
}

DEVICE void gate_up(const Worker& worker, const Step& step, const Layer& layer, int number) {
  constexpr int TILES = 2 * I / 16;
  const Rest& rest = worker.shared.rest;
  const Routing& list = rest.routing;
  const Range tiles = worker.share(list.active * TILES);
  Products& shared = worker.scratch().products;
  const int g = worker.lane >> 2, i = worker.thread & 7, n = worker.thread >> 3;
  int index = tiles.begin / TILES, tile = tiles.begin % TILES, base = 0, loaded = -1, left = tiles.count();
  GateUpTile work{{}, worker.lane, worker.warp};
  const uint4* held = worker.held();
  if (left > 0) {
    int count = list.begin[index + 1] - list.begin[index];
    u32 biases = 0;
    auto load = [&] {  // what the coming pass needs
      if (!IS_SINGLE && (loaded != index || count > 8))
        work.load(base + g < count ? step.expert_input + list.pair[list.begin[index] + base + g] / TOP_K * H : nullptr);
      loaded = index;
      if (n < min(count - base, 8))
        biases = *(const u32*)(layer.gate_up_bias + (size_t)list.expert[index] * 2 * I + tile * 16 + 2 * i);
    };
    load();
    for (int buffer = 0; left > 0; buffer ^= 1) {
      float c[4];
      const u8* stage = worker.await();
      if (IS_SINGLE)
        work.multiply(stage, stage + GateUpTile::WEIGHT_BYTES, c,
                      [&](int step, int word) { return held[(step * 4 + word) * 4 + (worker.lane & 3)]; });
      else
        work.multiply(stage, stage + GateUpTile::WEIGHT_BYTES, c);
      const int first = list.begin[index] + base, here = min(count - base, 8), output = tile * 8 + i;
      const u32 bias = biases;
      base += 8;
      if (base >= count) {
        worker.release();
        left--;
        base = 0;
        if (++tile == TILES) {
          tile = 0;
          index++;
        }
        if (left > 0) count = list.begin[index + 1] - list.begin[index];
      }
      if (left > 0) load();
      store_sums(shared.sums[buffer], worker, c);
      worker.group_barrier();
      if (n < here) {
        const int pair = list.pair[first + n];
        const float scale = rest.inverse[pair / TOP_K];
        const float gate = fminf(total(shared.sums[buffer], i, n) * scale + low_half(bias), step.limit);
        const float up =
            fminf(fmaxf(total(shared.sums[buffer], i + 8, n) * scale + high_half(bias), -step.limit), step.limit);
        const float value = gate / (1.f + __expf(-1.702f * gate)) * (up + 1.f);
        step.act[(size_t)pair * I + expert_order(output)] = narrow(value);
      }
    }
  }
  worker.arrive(number, ACTIVATED);
}

DEVICE void down(const Worker& worker, const Step& step, const Layer& layer, int number, float& x) {
  const Place place_of(worker);
  const Rest& rest = worker.shared.rest;
  const Routing& list = rest.routing;
  const Range columns = worker.share(H);
  Products& shared = worker.scratch().products;
  const int g = worker.lane >> 2, t = worker.lane & 3, i = worker.thread & 15, n = worker.thread >> 4;
  const int sums_row = (i >> 1) + (i & 1) * 8;
  const float norm = place_of.is_mine ? layer.next_norm[place_of.column] : 0.f;
  const int used = list.begin[list.active];
  DownTile work{{}, worker.lane, worker.warp};
  auto scales_of = [&](const u8* stage, int index) {
    const u64 begin = (u64)(layer.down_scales + ((size_t)list.expert[index] * H + columns.begin) * (I / 32));
    return stage + DownTile::WEIGHT_BYTES + (begin & 15);
  };
  // Eight pairs of the list at a time, a column each, whichever experts they have; of an expert's products, the columns
  // of its pairs count. So activations are loaded, and sums exchanged between warps, once for eight pairs.
  int index = 0;
  for (int base = 0; base < at_least(used, 1); base += 8) {
    const int count = min(8, used - base), buffer = base >> 3 & 1;
    float offset = 0.f, share = 0.f;
    int pair = 0;
    if (n < count && i < columns.count()) {
      int expert = index;
      while (list.begin[expert + 1] <= base + n) expert++;
      pair = list.pair[base + n];
      share = rest.shares[pair];
      offset = widen(layer.down_bias[(size_t)list.expert[expert] * H + columns.begin + i]);
    }
    if (base == 0) {
      worker.wait(number, ACTIVATED, GRID);
    }
    if (count <= 0 || columns.count() == 0) continue;
    work.load(g < count ? step.act + (size_t)list.pair[base + g] * I : nullptr);
    float c[4] = {0.f, 0.f, 0.f, 0.f};
    for (;;) {
      float d[4];
      const u8* stage = worker.await();
      work.multiply(stage, scales_of(stage, index), d);
      const int begin = list.begin[index] - base, end = list.begin[index + 1] - base;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int column = 2 * t + (k & 1);
        if (column >= begin && column < end) c[k] = d[k];
      }
      if (end > 8) break;  // more of this expert's pairs follow
      worker.release();
      index++;
      if (end >= count) break;
    }
    store_sums(shared.sums[buffer], worker, c);
    worker.group_barrier();
    if (n < count && i < columns.count())
      shared.parts[pair][i] = (total(shared.sums[buffer], sums_row, n) + offset) * share;
  }
  worker.group_barrier();
  if (place_of.row < ROWS) {
    if (place_of.is_mine) {
      float delta = 0.f;
      if (rest.chosen[place_of.row * TOP_K] >= 0)
#pragma unroll
        for (int slot = 0; slot < TOP_K; slot++) delta += shared.parts[place_of.row * TOP_K + slot][i];
#if RANKS > 1
      delta = exchange_sum(step.exchange, rest.exchanges + 2 * number + 2, place_of.row, place_of.column, delta);
#endif
      x += delta;
      step.scaled[place_of.row * H + place_of.column] = narrow(x * norm);
    }
    const float square = half_warp_sum(x * x);
    if (i == 0) step.squares[(place_of.row * GRID + worker.block) * GROUPS + worker.group] = square;
  }
  worker.arrive(number, DOWN);
}

DEVICE void compute(Shared& shared, const Step& step) {
  u32 turn = 0;
  float x = 0.f;
  auto here = [&] { return Worker(shared, step.counters, turn); };
  {
    const Worker worker = here();
    if (worker.index < LAYER_WORDS)
      ((u64*)&shared.rest.layer[0])[worker.index] = ((const u64*)step.layers)[worker.index];
    wait_for_previous();
    release_next();
#if RANKS > 1
    if (worker.index == 0) shared.rest.exchanges = load_fresh(step.exchange.number);
#endif
    const Place place_of(worker);
    if (place_of.is_mine) x = load_fresh(step.residual + place_of.row * H + place_of.column);
    worker.block_barrier();
  }
  for (int number = 0; number < step.num_layers; number++) {
    const Layer& layer = shared.rest.layer[number & 1];
    const KeyPlace keys = project_qkv(here(), step, layer, number);
    attend(here(), layer, number, keys, step.attention_scale, step.query, step.parts, step.tickets, step.attended);
    project_out(here(), step, layer, number, x);
    if (IS_SINGLE) {  // a single row's activations are every expert's
      const Worker worker = here();
      worker.wait(number, OUT, GRID);
      hold_input(worker, step.expert_input);
    }
    route(here(), step, layer, number);
    gate_up(here(), step, layer, number);
    down(here(), step, layer, number, x);
  }
  const Worker worker = here();
  const Place place_of(worker);
  if (place_of.is_mine) step.residual[place_of.row * H + place_of.column] = x;

  // The last block to leave sets the counters back: nobody looks at them any more.
  int* exits = step.counters + step.num_layers * NUM_STAGES * SPREAD * LINE;
  if (worker.index == 0) {
    __threadfence();
    shared.rest.is_last[0] = atomicAdd(exits, 1) == GRID - 1;
  }
  worker.block_barrier();
  if (!shared.rest.is_last[0]) return;
  for (int i = worker.index; i < step.num_layers * NUM_STAGES * SPREAD; i += CONSUMERS) step.counters[i * LINE] = 0;
  if (worker.index == 0) {
    *exits = 0;
#if RANKS > 1
    *step.exchange.number = shared.rest.exchanges + 2 * step.num_layers;
#endif
  }
}

extern __shared__ __align__(128) u8 dynamic[];

KERNEL(THREADS, 1)
decode_layers(const __grid_constant__ Step step) {
  Shared& shared = *(Shared*)dynamic;
  if (threadIdx.x == 0) {
    for (int group = 0; group < GROUPS; group++)
      for (int stage = 0; stage < STAGES; stage++) {
        init_barrier(&shared.full[group][stage], 1);
        init_barrier(&shared.empty[group][stage], WARPS);
      }
    init_barrier(&shared.rest.routed, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    const int group = (int)(threadIdx.x - CONSUMERS) / 32;
    if (group < GROUPS && lane_id() == 0) Supplier{shared, group}.run(step.layers, step.num_layers);
  } else {
    compute(shared, step);
  }
}
