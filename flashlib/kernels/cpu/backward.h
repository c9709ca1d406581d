// Backward: the weights are computed again from the LSE, tile by tile (Dao 2023, arXiv 2307.08691, algorithm 2).
//
// A unit of work owns some keys of one KV head: it visits all rows that see them, and sums dK and dV by itself. dQ is summed over
// units in a second step, always in the same order. Five products, all by the one that stays in registers: scores and dP have rows as
// lanes, as does dQ; dK and dV have channels as lanes.
#pragma once
#include "pairs.h"

constexpr int64_t CHUNK = 512;      // keys whose dK and dV are summed together: what the second cache level holds
constexpr int64_t DELTA_ROWS = 64;  // rows of a unit of work that only prepares or adds up rows

INLINE int64_t rows_of(const Problem& p) { return p.batch * p.q_heads * p.q_len; }

INLINE int64_t padded(int64_t channels) { return ceil_div(channels, WIDTH) * WIDTH; }  // whole pairs of vectors

// `workspace`: delta of each row, and behind it dQ in fp32, [parts, B, Hq, Sq, D]. One part of an fp32 problem sums in dQ itself.
INLINE float* deltas(const Problem& p) { return p.workspace; }
INLINE bool sums_in_place(const Problem& p) { return p.parts == 1 && p.type == FP32; }
INLINE float* partial_dq(const Problem& p, int64_t part) {
  return sums_in_place(p) ? (float*)p.dq : p.workspace + lines(rows_of(p)) + part * rows_of(p) * p.head_dim;
}

// delta = sum of out * dout over a row's channels, less the gradient of its LSE: what every dP of the row is reduced by.
static void delta_unit(void* call, int64_t unit) {
  Problem& p = *(Problem*)call;
  const int64_t rows = rows_of(p), from = unit * DELTA_ROWS, to = from + DELTA_ROWS < rows ? from + DELTA_ROWS : rows;
  const int64_t width = lines(p.v_head_dim + LANES);
  float *out = memory_for(p, 2 * width), *grad = out + width;
  if (!out) return;
  memset(out, 0, 2 * width * sizeof(float));
  for (int64_t index = from; index < to; index++) {
    const int64_t row = index % p.q_len, head = index / p.q_len % p.q_heads, batch = index / p.q_len / p.q_heads;
    const auto at = [&](const Strides& s) { return (batch * s.batch + head * s.head + row * s.row) * size_of(p.type); };
    widen(out, p.out + at(p.out_at), p.type, p.v_head_dim);
    widen(grad, p.grad_out + at(p.grad_out_at), p.type, p.v_head_dim);
    vec products = zero();
    for (int64_t c = 0; c < p.v_head_dim; c += LANES) products = fma(load(out + c), load(grad + c), products);
    deltas(p)[index] = sum(products) - (p.grad_lse ? p.grad_lse[index] : 0);
  }
}

// A panel of query rows with all that the backward needs of them. Transposed: [channel][row]; by rows: [row][padded channel].
struct BackwardPanel {
  Panel rows;
  float *q, *grad, *dq;          // transposed
  float *q_rows, *grad_rows;     // by rows
  float lse[WIDTH], delta[WIDTH];  // lse in base 2
};

// Weights P^T and what the gradients of scores are multiplied by to become those of products q k, [key][row].
template <class Form, bool SHAPED, bool MASKED>
static void weights(float* weight, float* slope, const BackwardPanel& panel, const Scoring& how, const Tile& k, int32_t key, int64_t count, int64_t channels) {
  const vec base_2 = all(how.to_base_2());
  in_blocks(count, [&](auto size, int64_t j) {
    vec acc[size.value][2];
    clear(acc);
    Form::multiply(acc, k, j, panel.q, channels);
    for (int m = 0; m < size.value; m++)
      for (int half = 0; half < 2; half++) {
        const int64_t at = (j + m) * WIDTH + half * LANES;
        const int32_t here = key + (int32_t)j + m;
        vec x = acc[m][half], dx = all(how.scale);
        if (SHAPED) x = shaped(x, how, panel.rows, half, here, &dx);
        vec y = exp2(fma(x, base_2, sub(zero(), load(panel.lse + half * LANES))));
        if (MASKED) y = choose(between(load(panel.rows.first + half * LANES), here, load(panel.rows.behind + half * LANES)), y, zero());
        store(weight + at, y);
        if (SHAPED) store(slope + at, dx);
      }
  });
}

// dS^T = P^T (dP^T - delta), times what `weights` left.
template <class Form, bool SHAPED>
static void score_gradients(float* ds, const float* weight, const float* slope, const BackwardPanel& panel, float scale, const Tile& v, int64_t count, int64_t channels) {
  in_blocks(count, [&](auto size, int64_t j) {
    vec acc[size.value][2];
    clear(acc);
    Form::multiply(acc, v, j, panel.grad, channels);
    for (int m = 0; m < size.value; m++)
      for (int half = 0; half < 2; half++) {
        const int64_t at = (j + m) * WIDTH + half * LANES;
        const vec x = mul(load(weight + at), sub(acc[m][half], load(panel.delta + half * LANES)));
        store(ds + at, mul(x, SHAPED ? load(slope + at) : all(scale)));
      }
  });
}

// to[key][channel] += sum over the panel's rows of left^T [key][row] * right [row][channel].
static void add_to_keys(float* to, const float* left, const float* right, int64_t width, int64_t keys, int64_t rows) {
  const vec one[2] = {all(1), all(1)};
  for (int64_t c = 0; c < width; c += WIDTH) add_product<K_CONTIGUOUS>(to + c, width, left, WIDTH, right + c, width, keys, rows, one);
}

struct KeySums {  // dK and dV of the keys from `first` on, [key][padded channel]
  float *dk, *dv;
  int32_t first;
};

// `k` and `v` as `Form` takes them, and the keys in fp32.
template <class Form>
static void visit_backward(BackwardPanel& panel, const KeySums& sums, float* weight, float* ds, float* slope, const Tile& k, const Tile& v, const Tile& wide_k, int32_t key, int64_t count, const Problem& p) {
  const Scoring how = scoring_of(p);
  const bool masked = key < panel.rows.all_from || key + count > panel.rows.all_to, plain = how.plain();
  const auto form = plain ? (masked ? weights<Form, false, true> : weights<Form, false, false>) : (masked ? weights<Form, true, true> : weights<Form, true, false>);
  form(weight, slope, panel, how, k, key, count, p.head_dim);
  (plain ? score_gradients<Form, false> : score_gradients<Form, true>)(ds, weight, slope, panel, how.scale, v, count, p.v_head_dim);
  const int64_t at = key - sums.first, width = padded(p.head_dim), v_width = padded(p.v_head_dim);
  add_to_keys(sums.dv + at * v_width, weight, panel.grad_rows, v_width, count, panel.rows.count);
  add_to_keys(sums.dk + at * width, ds, panel.q_rows, width, count, panel.rows.count);
  const vec one[2] = {all(1), all(1)};
  add_product<M_CONTIGUOUS>(panel.dq, WIDTH, wide_k.numbers(), wide_k.step / (int64_t)sizeof(float), ds, WIDTH, p.head_dim, count, one);
}

// The panel's rows of x twice: by rows, widened and padded with zeros, and with rows as lanes. Rows that see nothing are 0.
static void read_rows(float* by_rows, float* as_lanes, const Problem& p, const Panel& rows, const char* x, const Strides& at, int64_t batch, int64_t channels) {
  const int64_t width = padded(channels);
  for (int64_t begin = 0; begin < WIDTH; begin += 8) {
    const float* from[8];
    for (int64_t j = 0; j < 8; j++) {
      const int64_t i = begin + j;
      float* to = by_rows + i * width;
      from[j] = to;
      const int64_t filled = sees(rows, i) ? channels : 0;
      if (filled) widen(to, x + (batch * at.batch + rows.head[i] * at.head + rows.row[i] * at.row) * size_of(p.type), p.type, channels);
      memset(to + filled, 0, (width - filled) * sizeof(float));
    }
    transpose_in(as_lanes, begin, from, channels);
  }
}

template <class Form>
static void read(BackwardPanel& panel, const Problem& p, int64_t batch) {
  read_rows(panel.q_rows, panel.q, p, panel.rows, p.q, p.q_at, batch, p.head_dim);
  read_rows(panel.grad_rows, panel.grad, p, panel.rows, p.grad_out, p.grad_out_at, batch, p.v_head_dim);
  Form::lace(panel.q, p.head_dim), Form::lace(panel.grad, p.v_head_dim);
  memset(panel.dq, 0, WIDTH * p.head_dim * sizeof(float));
  for (int64_t i = 0; i < WIDTH; i++) {
    const int64_t index = row_index(p, batch, panel.rows.head[i], panel.rows.row[i]);
    const bool some = sees(panel.rows, i);  // else the LSE is -inf, and delta may be anything
    panel.lse[i] = some ? p.lse[index] * LOG2_E : 0, panel.delta[i] = some ? deltas(p)[index] : 0;
  }
}

// `room`: 8 rows.
static void add_dq(const BackwardPanel& panel, const Problem& p, int64_t batch, int64_t part, bool first, float* room) {
  for (int64_t begin = 0; begin < panel.rows.count; begin += 8) {
    float *rows[8], *to[8];
    for (int64_t j = 0; j < 8; j++) {
      const int64_t i = begin + j;
      rows[j] = room + j * p.head_dim;
      to[j] = partial_dq(p, part) + row_index(p, batch, panel.rows.head[i], panel.rows.row[i]) * p.head_dim;
      if (first && i < panel.rows.count) rows[j] = to[j];
    }
    transpose_out(rows, panel.dq, begin, p.head_dim);
    if (first) continue;
    for (int64_t j = 0; j < 8 && begin + j < panel.rows.count; j++)
      for (int64_t c = 0; c < p.head_dim; c++) to[j][c] += rows[j][c];
  }
}

// dK, dV and this part's share of dQ, of the keys [from, to) of one KV head: at most CHUNK.
template <class Form>
static void backward_chunk(Problem& p, int64_t batch, int64_t kv_head, int64_t part, int32_t from, int32_t to, bool first) {
  const int64_t width = padded(p.head_dim), v_width = padded(p.v_head_dim), both = p.head_dim + p.v_head_dim, keys = to - from;
  const bool wide = p.type != FP32;
  const int64_t numbers = CHUNK * (width + v_width) + (wide ? CHUNK * lines(both) : 0) + lines(8 * p.head_dim) + WIDTH * (2 * p.head_dim + p.v_head_dim + width + v_width) + 3 * KEYS * WIDTH;
  float* room = memory_for(p, numbers);
  if (!room) return;
  const auto cut = [&](int64_t count) { return room += count, room - count; };
  const KeySums sums = {cut(CHUNK * width), cut(CHUNK * v_width), from};
  float *weight = cut(KEYS * WIDTH), *ds = cut(KEYS * WIDTH), *slope = cut(KEYS * WIDTH), *row_room = cut(lines(8 * p.head_dim));
  BackwardPanel panel;
  panel.q = cut(WIDTH * p.head_dim), panel.dq = cut(WIDTH * p.head_dim), panel.grad = cut(WIDTH * p.v_head_dim);
  panel.q_rows = cut(WIDTH * width), panel.grad_rows = cut(WIDTH * v_width);
  Tile k = {nullptr, 0}, v = k, wide_k = k;
  if (keys > 0) {
    float* widened = wide ? cut(CHUNK * both) : nullptr;
    wide_k = Widened::keys(p, batch, kv_head, from, keys, widened);
    k = Form::PAIRS ? Form::keys(p, batch, kv_head, from, keys, nullptr) : wide_k;
    v = Form::value_rows(p, batch, kv_head, from, keys, wide ? widened + CHUNK * p.head_dim : nullptr);
  }
  memset(sums.dk, 0, keys * width * sizeof(float)), memset(sums.dv, 0, keys * v_width * sizeof(float));
  for (int64_t number = row_blocks(p, WIDTH); number-- > 0;) {
    fill(&panel.rows, p, block_of(p, batch, kv_head, number, WIDTH), 0);
    if (!first && most(from, panel.rows.lowest) >= least(to, panel.rows.highest)) continue;
    read<Form>(panel, p, batch);
    for (Run run = next_run(&panel.rows, 1, from); run.from < to; run = next_run(&panel.rows, 1, run.to)) {
      for (int32_t key = run.from, end = least(run.to, to), next; key < end; key = next) {
        next = least(end, key + KEYS);
        const int64_t at = key - from;
        visit_backward<Form>(panel, sums, weight, ds, slope, k.behind(at), v.behind(at), wide_k.behind(at), key, next - key, p);
      }
      if (run.to >= to) break;
    }
    add_dq(panel, p, batch, part, first, row_room);
  }
  for (int64_t key = 0; key < keys; key++) {
    const int64_t row = (batch * p.kv_heads + kv_head) * p.kv_len + from + key, size = size_of(p.type);
    narrow(p.dk + row * p.head_dim * size, sums.dk + key * width, p.type, p.head_dim);
    narrow(p.dv + row * p.v_head_dim * size, sums.dv + key * v_width, p.type, p.v_head_dim);
  }
}

template <class Form>
static void backward_unit(void* call, int64_t unit) {
  Problem& p = *(Problem*)call;
  const int64_t part = unit % p.parts, pair = unit / p.parts, keys = ceil_div(p.kv_len, p.parts);
  const int32_t begin = (int32_t)(part * keys), end = (int32_t)(begin + keys < p.kv_len ? begin + keys : p.kv_len);
  for (int32_t from = begin; from == begin || from < end; from += CHUNK)
    backward_chunk<Form>(p, pair / p.kv_heads, pair % p.kv_heads, part, from, most(from, least(end, from + CHUNK)), from == begin);
}

static void dq_unit(void* call, int64_t unit) {
  Problem& p = *(Problem*)call;
  const int64_t rows = rows_of(p), from = unit * DELTA_ROWS, to = from + DELTA_ROWS < rows ? from + DELTA_ROWS : rows;
  float* total = memory_for(p, p.head_dim);
  if (!total) return;
  for (int64_t row = from; row < to; row++) {
    memset(total, 0, p.head_dim * sizeof(float));
    for (int64_t part = 0; part < p.parts; part++) {
      const float* one = partial_dq(p, part) + row * p.head_dim;
      for (int64_t c = 0; c < p.head_dim; c++) total[c] += one[c];
    }
    narrow(p.dq + row * p.head_dim * size_of(p.type), total, p.type, p.head_dim);
  }
}

static void backward(Problem& p) {
  const int64_t row_units = ceil_div(rows_of(p), DELTA_ROWS);
  share(delta_unit, &p, row_units, p.threads);
  const int64_t units = p.batch * p.kv_heads * p.parts;
#if defined(__AVX512BF16__)
  if (Pairs::takes(p) && p.v_head_dim % 2 == 0) share(backward_unit<Pairs>, &p, units, p.threads);
  else
#endif
    share(backward_unit<Widened>, &p, units, p.threads);
  if (!sums_in_place(p)) share(dq_unit, &p, row_units, p.threads);
}
