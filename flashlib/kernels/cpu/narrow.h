// Few query rows, as in decoding: each number of K and V is used a few times at most, and reading them is all the time there is.
//
// A panel of lanes would be mostly empty. Here lanes are channels: a score is a sum across lanes, and an output row is a sum of rows
// of V. Keys are read in the type in which they are stored.
#pragma once
#include "pairs.h"

constexpr int64_t NARROW = 16;  // most rows of a KV head for which this is faster than a panel
constexpr int AT_ONCE = LANES == 16 ? 4 : 2;  // rows that share what is loaded: as many sums for four keys each as there are registers for

INLINE int64_t whole(int64_t channels) { return ceil_div(channels, LANES) * LANES; }

INLINE bool is_narrow(const Problem& p) { return heads_share(p) && group_size(p) * p.q_len <= NARROW; }

// Keys of a tile as they lie in memory; step in bytes.
struct RawTile {
  const char* at;
  int64_t step;
  int64_t type;
  int64_t bytes;  // of a key
};

// Channels that fill no whole number of vectors are copied to where zeros follow them.
static RawTile raw_tile(const Problem& p, const char* x, const Strides& at, int64_t channels, int64_t batch, int64_t head, int32_t key, int64_t count, float* room) {
  const char* begin = begin_of(p, x, at, batch, head, key);
  const int64_t step = at.row * size_of(p.type), width = whole(channels);
  if (width == channels) return {begin, step, p.type, channels * size_of(p.type)};
  for (int64_t j = 0; j < count; j++) {
    widen(room + j * width, begin + j * step, p.type, channels);
    memset(room + j * width + channels, 0, (width - channels) * sizeof(float));
  }
  return {(const char*)room, width * (int64_t)sizeof(float), FP32, width * (int64_t)sizeof(float)};
}

template <Type TYPE>
INLINE vec load_typed(const char* p) {
  return TYPE == FP32 ? load((const float*)p) : TYPE == BF16 ? load_bf16((const uint16_t*)p) : load_half((const uint16_t*)p);
}

template <Type TYPE, int R>
static void narrow_scores(float* s, const float* q, const RawTile& k, const RawTile& soon, int64_t count, int64_t width) {
  constexpr int64_t size = TYPE == FP32 ? 4 : 2;
  for (int64_t j = 0; j < count; j += 4) {
    vec acc[R][4];
    for (int n = 0; n < 4; n++) {  // key by key: memory is fastest in the order in which it lies
      const char* key = k.at + (j + n < count ? j + n : count - 1) * k.step;
      fetch(soon.at + (j + n) * soon.step, soon.bytes);
      for (int r = 0; r < R; r++) acc[r][n] = zero();
      for (int64_t c = 0; c < width; c += LANES) {
        const vec x = load_typed<TYPE>(key + c * size);
        for (int r = 0; r < R; r++) acc[r][n] = fma(load(q + r * width + c), x, acc[r][n]);
      }
    }
    for (int r = 0; r < R; r++) store_sums(s + r * KEYS + j, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
  }
}

template <Type TYPE, int R, int N>
INLINE void narrow_columns(float* out, const float* weight, const float* shrink, const RawTile& v, const RawTile& soon, int64_t count, int64_t width, int64_t c) {
  constexpr int64_t size = TYPE == FP32 ? 4 : 2;
  vec acc[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) acc[r][n] = zero();
  for (int64_t j = 0; j < count; j++) {
    if (c == 0) fetch(soon.at + j * soon.step, soon.bytes);
    for (int n = 0; n < N; n++) {
      const vec x = load_typed<TYPE>(v.at + j * v.step + (c + n * LANES) * size);
      for (int r = 0; r < R; r++) acc[r][n] = fma(all(weight[r * KEYS + j]), x, acc[r][n]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      float* at = out + r * width + c + n * LANES;
      store(at, fma(load(at), all(shrink[r]), acc[r][n]));
    }
}

template <Type TYPE, int R>
static void narrow_values(float* out, const float* weight, const float* shrink, const RawTile& v, const RawTile& soon, int64_t count, int64_t width) {
  constexpr int MANY = R * 8 <= 4 * AT_ONCE ? 8 : 4;  // of few rows whole rows of V, in the order in which they lie
  int64_t c = 0;
  for (; c + MANY * LANES <= width; c += MANY * LANES) narrow_columns<TYPE, R, MANY>(out, weight, shrink, v, soon, count, width, c);
  for (; c + 4 * LANES <= width; c += 4 * LANES) narrow_columns<TYPE, R, 4>(out, weight, shrink, v, soon, count, width, c);
  for (; c < width; c += LANES) narrow_columns<TYPE, R, 1>(out, weight, shrink, v, soon, count, width, c);
}

template <Type TYPE>
static void narrow_scores_of(int64_t rows, float* s, const float* q, const RawTile& k, const RawTile& soon, int64_t count, int64_t width) {
  if (rows == 1) return narrow_scores<TYPE, 1>(s, q, k, soon, count, width);
  if (rows == 2 || AT_ONCE == 2) return narrow_scores<TYPE, 2>(s, q, k, soon, count, width);
  if (rows == 3) return narrow_scores<TYPE, AT_ONCE - 1>(s, q, k, soon, count, width);
  narrow_scores<TYPE, AT_ONCE>(s, q, k, soon, count, width);
}

template <Type TYPE>
static void narrow_values_of(int64_t rows, float* out, const float* weight, const float* shrink, const RawTile& v, const RawTile& soon, int64_t count, int64_t width) {
  if (rows == 1) return narrow_values<TYPE, 1>(out, weight, shrink, v, soon, count, width);
  if (rows == 2 || AT_ONCE == 2) return narrow_values<TYPE, 2>(out, weight, shrink, v, soon, count, width);
  if (rows == 3) return narrow_values<TYPE, AT_ONCE - 1>(out, weight, shrink, v, soon, count, width);
  narrow_values<TYPE, AT_ONCE>(out, weight, shrink, v, soon, count, width);
}

struct NarrowRow {
  float largest, sum;  // the largest in base 2
};

// Scores of one row to weights; gives what the row's output so far is multiplied by. s has room for whole vectors.
static float narrow_softmax(NarrowRow& row, float* s, const Panel& rows, int64_t i, const Scoring& how, int32_t key, int64_t count) {
  // Of this tile, what the row sees: [from, to).
  const int64_t from = most(rows.first[i] - key, 0), to = most(least(rows.behind[i] - key, (int32_t)count), 0);
  vec top = all(-INF);
  for (int64_t j = 0; j < whole(count); j += LANES) {
    vec x = load(s + j);
    x = how.plain() ? mul(x, all(how.scale * LOG2_E)) : mul(shaped_keys(x, how, rows.slope[i], rows.position[i], key + (int32_t)j), all(LOG2_E));
    store(s + j, x);
  }
  for (int64_t j = 0; j < from && j < count; j++) s[j] = -INF;
  for (int64_t j = to; j < whole(count); j++) s[j] = -INF;
  for (int64_t j = 0; j < whole(count); j += LANES) top = greater(top, load(s + j));
  const float largest = fmaxf(row.largest, maximum(top)), base = largest == -INF ? 0 : largest;
  vec total = zero();
  for (int64_t j = 0; j < whole(count); j += LANES) {
    const vec weight = exp2(sub(load(s + j), all(base)));
    total = add(total, weight);
    store(s + j, weight);
  }
  const float shrink = row.largest == -INF ? 0 : exp2f(row.largest - base);
  row = {largest, row.sum * shrink + sum(total)};
  return shrink;
}

static void narrow_unit(void* call, int64_t unit) {
  Problem& p = *(Problem*)call;
  const int64_t splits = splits_of(p), split = unit % splits, pair = unit / splits, batch = pair / p.kv_heads, kv_head = pair % p.kv_heads;
  const int64_t width = whole(p.head_dim), v_width = whole(p.v_head_dim), row_count = group_size(p) * p.q_len;
  const Scoring how = scoring_of(p);
  float* room = memory_for(p, (NARROW + KEYS) * (width + v_width) + AT_ONCE * KEYS);
  if (!room) return;
  float *q = room, *out = q + NARROW * width, *s = out + NARROW * v_width, *k_room = s + AT_ONCE * KEYS, *v_room = k_room + KEYS * width;
  memset(room, 0, NARROW * (width + v_width) * sizeof(float));
  Panel rows;
  fill(&rows, p, {batch, kv_head, kv_head * group_size(p), 0, row_count}, 0);
  NarrowRow state[NARROW];
  for (int64_t i = 0; i < row_count; i++) {
    state[i] = {-INF, 0};
    const char* from = p.q + (batch * p.q_at.batch + rows.head[i] * p.q_at.head + rows.row[i] * p.q_at.row) * size_of(p.type);
    if (sees(rows, i)) widen(q + i * width, from, p.type, p.head_dim);
  }
  const int32_t begin = (int32_t)(split * p.split), end = p.split ? (int32_t)(begin + p.split) : INT32_MAX;
  for (Run run = next_run(&rows, 1, begin); run.from < end; run = next_run(&rows, 1, run.to)) {
    const int32_t to = least(run.to, end);
    for (int32_t key = run.from, next; key < to; key = next) {
      next = tile_end(p, key, to);
      const int64_t count = next - key;
      if (!page_exists(p, batch, key)) return;
      const RawTile k = raw_tile(p, p.k, p.k_at, p.head_dim, batch, kv_head, key, count, k_room);
      const RawTile v = raw_tile(p, p.v, p.v_at, p.v_head_dim, batch, kv_head, key, count, v_room);
      // While keys are read values are asked for, and the other way round. The next page may be anywhere: nothing is asked for.
      const RawTile next_k = {k.at + count * k.step, k.step, k.type, p.pages || next >= to ? 0 : k.bytes};
      for (int64_t i = 0; i < row_count; i += AT_ONCE) {
        const int64_t together = row_count - i < AT_ONCE ? row_count - i : AT_ONCE;
        float shrink[AT_ONCE];
        const auto score = k.type == FP32 ? narrow_scores_of<FP32> : k.type == BF16 ? narrow_scores_of<BF16> : narrow_scores_of<FP16>;
        score(together, s, q + i * width, k, v, count, width);
        for (int64_t r = 0; r < together; r++) shrink[r] = narrow_softmax(state[i + r], s + r * KEYS, rows, i + r, how, key, count);
        const auto gather = v.type == FP32 ? narrow_values_of<FP32> : v.type == BF16 ? narrow_values_of<BF16> : narrow_values_of<FP16>;
        gather(together, out + i * v_width, s, shrink, v, next_k, count, v_width);
      }
    }
    if (run.to >= end) break;
  }
  for (int64_t i = 0; i < row_count; i++) {
    float* row = out + i * v_width;
    const float normal = state[i].sum > 0 ? 1 / state[i].sum : 0;
    for (int64_t c = 0; c < v_width; c += LANES) store(row + c, mul(load(row + c), all(normal)));
    write_row(p, batch, rows.head[i], rows.row[i], split, row, state[i].largest, state[i].sum);
  }
}

static void forward(Problem& p) {
  const int64_t pairs = p.batch * p.kv_heads * splits_of(p);
  const int64_t units = pairs * row_blocks(p, PANELS * WIDTH);
  if (is_narrow(p)) share(narrow_unit, &p, pairs, p.threads);
#if defined(__AVX512BF16__)
  else if (Pairs::takes(p)) share(forward_unit<Pairs>, &p, units, p.threads);
#endif
  else share(forward_unit<Widened>, &p, units, p.threads);
  if (p.split) share(merge_unit, &p, p.batch * p.q_heads * p.q_len, p.threads);
}
