// Forward: FlashAttention-2's loop over keys, for panels of query rows (Dao 2023, arXiv 2307.08691, algorithm 1).
#pragma once
#include <math.h>
#include <stdlib.h>

#include "pool.h"
#include "rows.h"

// Room for so many numbers, or null.
static float* memory_for(Problem& p, int64_t numbers) {
  float* memory = (float*)scratch_of(numbers * sizeof(float));
  if (!memory) __atomic_store_n(&p.out_of_memory, 1, __ATOMIC_RELAXED);
  return memory;
}

// Statistics of a panel's rows, and its output: O^T [channel][row], not yet divided by the sums.
struct Softmax {
  float* out;
  float largest[WIDTH], sum[WIDTH];  // of the scores seen so far, and of their exponentials
};

// How the products of a tile are formed. This is the way that every type can go: in fp32, to which shorter types are widened.
struct Widened {
  static constexpr bool PAIRS = false;
  static constexpr int64_t TOGETHER = 1;  // keys that cannot be parted

  static void read_queries(float* q, const Problem& p, const Panel& rows, int64_t batch, float* room) {
    transpose_rows(q, p, rows, p.q, p.q_at, batch, p.head_dim, room);
  }
  static Tile keys(const Problem& p, int64_t batch, int64_t head, int32_t key, int64_t count, float* room) {
    return tile_of(p, p.k, p.k_at, p.head_dim, batch, head, key, count, room);
  }
  static Tile values(const Problem& p, int64_t batch, int64_t head, int32_t key, int64_t count, float* room) {
    return tile_of(p, p.v, p.v_at, p.v_head_dim, batch, head, key, count, room);
  }
  // Values as keys are taken, and lanes as `multiply` takes them: for the backward, where rows of V are multiplied by rows of dO.
  static Tile value_rows(const Problem& p, int64_t batch, int64_t head, int32_t key, int64_t count, float* room) {
    return values(p, batch, head, key, count, room);
  }
  static void lace(float*, int64_t) {}

  // acc[m] += products of key j + m with the panel's queries.
  template <int M>
  static __attribute__((always_inline)) void multiply(vec (&acc)[M][2], const Tile& k, int64_t j, const float* q, int64_t channels) {
    ::multiply<K_CONTIGUOUS>(acc, k.numbers(j), k.step / (int64_t)sizeof(float), q, WIDTH, channels);
  }

  // Weights of half a panel in the place of the scores, 2^(score * base_2 + from); gives their sums.
  static __attribute__((always_inline)) vec weigh(float* s, int64_t count, vec base_2, vec from) {
    vec sum = zero();
    for (int64_t j = 0; j < count; j++) {
      const vec weight = exp2(fma(load(s + j * WIDTH), base_2, from));
      sum = add(sum, weight);
      store(s + j * WIDTH, weight);
    }
    return sum;
  }

  // out = shrink * out + V^T times the weights.
  static void add_values(float* out, const Tile& v, const float* s, int64_t channels, int64_t count, const vec (&shrink)[2]) {
    add_product<M_CONTIGUOUS>(out, WIDTH, v.numbers(), v.step / (int64_t)sizeof(float), s, WIDTH, channels, count, shrink);
  }
};

// Scores S^T [key][row] of the keys from `key` on, hidden ones -inf, and the largest of each row.
template <class Form, bool SHAPED, bool MASKED>
static void scores(float* s, vec (&largest)[2], const Panel& rows, const Scoring& how, const float* q, const Tile& k, int32_t key, int64_t count, int64_t channels) {
  in_blocks(count, [&](auto size, int64_t j) {
    vec acc[size.value][2];
    clear(acc);
    Form::multiply(acc, k, j, q, channels);
    for (int m = 0; m < size.value; m++)
      for (int half = 0; half < 2; half++) {
        vec x = acc[m][half];
        const int32_t at = key + (int32_t)j + m;
        if (SHAPED) x = shaped(x, how, rows, half, at);
        if (MASKED) x = choose(between(load(rows.first + half * LANES), at, load(rows.behind + half * LANES)), x, all(-INF));
        largest[half] = greater(largest[half], x);
        store(s + (j + m) * WIDTH + half * LANES, x);
      }
  });
}

template <class Form>
static void visit(Softmax& softmax, float* s, const Panel& rows, const Scoring& how, const float* q, const Tile& k, const Tile& v, int32_t key, int64_t count, const Problem& p) {
  vec largest[2] = {load(softmax.largest), load(softmax.largest + LANES)}, shrink[2];
  const bool masked = key < rows.all_from || key + count > rows.all_to;
  const auto score = how.plain() ? (masked ? scores<Form, false, true> : scores<Form, false, false>) : (masked ? scores<Form, true, true> : scores<Form, true, false>);
  score(s, largest, rows, how, q, k, key, count, p.head_dim);
  const vec base_2 = all(how.to_base_2());
  for (int half = 0; half < 2; half++) {
    // Of a row that has seen nothing yet the largest is -inf, and -inf - (-inf) is NaN: count from 0 there.
    const vec top = choose(below(all(-INF), largest[half]), largest[half], zero()), from = sub(zero(), mul(base_2, top));
    // Both products rounded: where the largest stays, the exponent is 0 and not what one rounding left, which would add up over the tiles.
    shrink[half] = exp2(add(mul(base_2, load(softmax.largest + half * LANES)), from));
    const vec sum = Form::weigh(s + half * LANES, count, base_2, from);
    store(softmax.sum + half * LANES, fma(load(softmax.sum + half * LANES), shrink[half], sum));
    store(softmax.largest + half * LANES, largest[half]);
  }
  Form::add_values(softmax.out, v, s, p.v_head_dim, count, shrink);
}

INLINE int64_t row_index(const Problem& p, int64_t batch, int64_t head, int64_t row) { return (batch * p.q_heads + head) * p.q_len + row; }

// Where a row of the output goes: its place in `out`, or where keys are split in the split's part.
INLINE char* out_at(const Problem& p, int64_t batch, int64_t head, int64_t row, int64_t split) {
  if (!p.split) return p.out + (batch * p.out_at.batch + head * p.out_at.head + row * p.out_at.row) * size_of(p.type);
  return (char*)(p.partial_out + (split * p.batch * p.q_heads * p.q_len + row_index(p, batch, head, row)) * p.v_head_dim);
}
INLINE int64_t out_type(const Problem& p) { return p.split ? FP32 : p.type; }

// The LSE of a row, from the largest score in base 2 and the sum of the exponentials.
static void write_lse(const Problem& p, int64_t batch, int64_t head, int64_t row, int64_t split, float largest, float sum) {
  const double lse = sum > 0 ? (double)largest + log2((double)sum) : -INF;
  const int64_t index = row_index(p, batch, head, row);
  if (p.split) p.partial_lse[split * p.batch * p.q_heads * p.q_len + index] = (float)lse;
  else p.lse[index] = (float)(lse * 0.6931471805599453);
}

static void write_row(const Problem& p, int64_t batch, int64_t head, int64_t row, int64_t split, const float* out, float largest, float sum) {
  write_lse(p, batch, head, row, split, largest, sum);
  narrow(out_at(p, batch, head, row, split), out, out_type(p), p.v_head_dim);
}

// Outputs and LSE of a panel. `room`: 8 rows.
static void finish(const Softmax& softmax, const Panel& rows, const Scoring& how, const Problem& p, int64_t batch, int64_t split, float* room) {
  for (int half = 0; half < 2; half++) {
    const vec total = load(softmax.sum + half * LANES), some = choose(below(zero(), total), total, all(1));
    const vec normal = div(all(1), some);  // of a row that saw nothing, sum and output are 0
    for (int64_t c = 0; c < p.v_head_dim; c++) {
      float* at = softmax.out + c * WIDTH + half * LANES;
      store(at, mul(load(at), normal));
    }
  }
  const int64_t type = out_type(p);
  for (int64_t begin = 0; begin < rows.count; begin += 8) {
    float* to[8];
    char* out[8];
    for (int64_t j = 0; j < 8; j++) {
      const int64_t i = begin + j;
      to[j] = room + j * p.v_head_dim;
      if (i >= rows.count) continue;
      write_lse(p, batch, rows.head[i], rows.row[i], split, softmax.largest[i] * how.to_base_2(), softmax.sum[i]);
      out[j] = out_at(p, batch, rows.head[i], rows.row[i], split);
      if (type == FP32) to[j] = (float*)out[j];
    }
    transpose_out(to, softmax.out, begin, p.v_head_dim);
    if (type == FP32) continue;
    for (int64_t j = 0; j < 8 && begin + j < rows.count; j++) narrow(out[j], to[j], type, p.v_head_dim);
  }
}

INLINE int64_t splits_of(const Problem& p) { return p.split ? ceil_div(p.kv_len, p.split) : 1; }

INLINE int64_t lines(int64_t numbers) { return ceil_div(numbers, 16) * 16; }  // whole cache lines, in numbers of fp32

// Keys of a tile widened, or rows on their way to lanes and back: numbers of fp32.
INLINE int64_t tile_room(const Problem& p, int64_t channels) { return lines((p.type == FP32 ? 9 : KEYS) * channels); }

static int64_t forward_room(const Problem& p) {
  return PANELS * WIDTH * (p.head_dim + p.v_head_dim) + KEYS * WIDTH + tile_room(p, p.head_dim) + tile_room(p, p.v_head_dim);
}

template <class Form>
static void forward_unit(void* call, int64_t unit) {
  Problem& p = *(Problem*)call;
  const int64_t splits = splits_of(p), blocks = row_blocks(p, PANELS * WIDTH);
  const int64_t split = unit % splits, number = unit / splits % blocks, pair = unit / splits / blocks;
  const Block block = block_of(p, pair / p.kv_heads, pair % p.kv_heads, number, PANELS * WIDTH);
  const Scoring how = scoring_of(p);
  float* room = memory_for(p, forward_room(p));
  if (!room) return;
  const auto cut = [&](int64_t numbers) { return room += numbers, room - numbers; };
  float *s = cut(KEYS * WIDTH), *k_room = cut(tile_room(p, p.head_dim)), *v_room = cut(tile_room(p, p.v_head_dim));
  Panel panels[PANELS];
  Softmax softmax[PANELS];
  float* q[PANELS];
  const int64_t count = ceil_div(block.count, WIDTH);
  for (int64_t n = 0; n < count; n++) {
    fill(&panels[n], p, block, n * WIDTH);
    q[n] = cut(WIDTH * p.head_dim), softmax[n].out = cut(WIDTH * p.v_head_dim);
    Form::read_queries(q[n], p, panels[n], block.batch, k_room);
    memset(softmax[n].out, 0, WIDTH * p.v_head_dim * sizeof(float));
    for (int i = 0; i < WIDTH; i++) softmax[n].largest[i] = -INF, softmax[n].sum[i] = 0;
  }
  const int32_t begin = (int32_t)(split * p.split), end = p.split ? (int32_t)(begin + p.split) : INT32_MAX;
  for (Run run = next_run(panels, count, begin); run.from < end; run = next_run(panels, count, run.to)) {
    const int32_t to = least(run.to, end);
    for (int32_t key = run.from, next; key < to; key = next) {
      next = tile_end(p, key, to);
      if (!page_exists(p, block.batch, key)) return;
      const Tile k = Form::keys(p, block.batch, block.kv_head, key, next - key, k_room);
      const Tile v = Form::values(p, block.batch, block.kv_head, key, next - key, v_room);
      for (int64_t n = 0; n < count; n++) {
        const int32_t from = most(key, panels[n].lowest), behind = least(next, panels[n].highest);
        if (from >= behind) continue;
        const int64_t skipped = (from - key) / Form::TOGETHER * Form::TOGETHER;
        visit<Form>(softmax[n], s, panels[n], how, q[n], k.behind(skipped), v.behind(skipped), key + (int32_t)skipped, behind - key - skipped, p);
      }
    }
    if (run.to >= end) break;
  }
  for (int64_t n = 0; n < count; n++) finish(softmax[n], panels[n], how, p, block.batch, split, v_room);
}

// One row: the splits' parts by the algebra of partial results, weights exp2(lse - largest lse).
static void merge_unit(void* call, int64_t index) {
  Problem& p = *(Problem*)call;
  const int64_t rows = p.batch * p.q_heads * p.q_len, splits = splits_of(p);
  float* out = memory_for(p, p.v_head_dim);
  if (!out) return;
  memset(out, 0, p.v_head_dim * sizeof(float));
  float largest = -INF, sum = 0;
  for (int64_t n = 0; n < splits; n++) largest = fmaxf(largest, p.partial_lse[n * rows + index]);
  for (int64_t n = 0; n < splits; n++) {
    const float lse = p.partial_lse[n * rows + index];
    if (lse == -INF) continue;
    const float weight = exp2f(lse - largest);
    const float* part = p.partial_out + (n * rows + index) * p.v_head_dim;
    sum += weight;
    for (int64_t c = 0; c < p.v_head_dim; c++) out[c] += weight * part[c];
  }
  for (int64_t c = 0; c < p.v_head_dim; c++) out[c] = sum > 0 ? out[c] / sum : 0;
  p.lse[index] = sum > 0 ? (float)(((double)largest + log2((double)sum)) * 0.6931471805599453) : -INF;
  const int64_t row = index % p.q_len, head = index / p.q_len % p.q_heads, batch = index / p.q_len / p.q_heads;
  narrow(p.out + (batch * p.out_at.batch + head * p.out_at.head + row * p.out_at.row) * size_of(p.type), out, p.type, p.v_head_dim);
}
