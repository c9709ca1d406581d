// What forward and backward share: the product that stays in registers, and the scores of a tile.
//
// Lanes are queries. A panel is as many query rows as two vectors have lanes; scores, weights and outputs of a panel are kept
// transposed, S^T [key][row] and O^T [channel][row]. The maximum and the sum of a row then never cross lanes, and K and V are read
// where they lie, one number at a time for a whole panel.
#pragma once
#include "simd.h"

constexpr int WIDTH = 2 * LANES;  // rows of a panel
constexpr int KEYS = 64;          // most keys of a tile. Sums of weights times values are formed tile by tile, so that none is longer
constexpr int PANELS = 2;         // most panels that share a tile of keys

template <int N>
struct Size {
  static constexpr int value = N;
};

// f(Size, first) for blocks of ROWS, and of fewer at the end.
template <class F>
INLINE void in_blocks(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + ROWS <= n; i += ROWS) f(Size<ROWS>(), i);
  if (ROWS > 4 && i + 4 <= n) f(Size<4>(), i), i += 4;
  if (i + 2 <= n) f(Size<2>(), i), i += 2;
  if (i < n) f(Size<1>(), i);
}

// Where the left factor of a product lies: A(m, k), with m or k next to each other.
enum Layout { M_CONTIGUOUS, K_CONTIGUOUS };

// acc[m] += sum over k of A(m, k) * B[k], B[k] being two vectors.
template <Layout LAYOUT, int M>
INLINE void multiply(vec (&acc)[M][2], const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t n) {
  for (int64_t k = 0; k < n; k++) {
    const vec b0 = load(b + k * b_step), b1 = load(b + k * b_step + LANES);
    for (int m = 0; m < M; m++) {
      const vec x = all(LAYOUT == M_CONTIGUOUS ? a[k * a_step + m] : a[m * a_step + k]);
      acc[m][0] = fma(x, b0, acc[m][0]);
      acc[m][1] = fma(x, b1, acc[m][1]);
    }
  }
}

template <int M>
INLINE void clear(vec (&acc)[M][2]) {
  for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = zero();
}

// to[m] = factor * to[m] + sum over k of A(m, k) * B[k], for m < rows.
template <Layout LAYOUT>
static void add_product(float* to, int64_t to_step, const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t rows, int64_t n, const vec (&factor)[2]) {
  in_blocks(rows, [&](auto size, int64_t m0) {
    vec acc[size.value][2];
    clear(acc);
    multiply<LAYOUT>(acc, LAYOUT == M_CONTIGUOUS ? a + m0 : a + m0 * a_step, a_step, b, b_step, n);
    for (int m = 0; m < size.value; m++)
      for (int half = 0; half < 2; half++) {
        float* at = to + (m0 + m) * to_step + half * LANES;
        store(at, fma(load(at), factor[half], acc[m][half]));
      }
  });
}

// How a score is made from a product q k: softcap * tanh(scale * qk / softcap) - slope * |position - key|. The scores of plain problems
// are left as they are, and `to_base_2` holds their scale.
struct Scoring {
  float scale, softcap;  // softcap 0 for none
  bool alibi;
  bool plain() const { return softcap == 0 && !alibi; }
  float to_base_2() const { return plain() ? scale * LOG2_E : LOG2_E; }
};

// The rows of a panel, by lane. What `count` leaves over repeats the last row, and its queries are 0.
struct Panel {
  int32_t first[WIDTH], behind[WIDTH];  // each row's interval of keys; row of no key: both 0
  int32_t position[WIDTH];              // the key at which the row sits, for ALiBi
  float slope[WIDTH];
  int64_t row[WIDTH], head[WIDTH];
  int64_t count;
  int32_t lowest, highest;    // keys from `lowest` to before `highest` are seen by some row,
  int32_t all_from, all_to;   // those from all_from to before all_to by every row
};

// The score of a product before ALiBi, and where `derivative` is given that of the score by the product.
INLINE vec capped(vec x, const Scoring& how, vec* derivative) {
  x = mul(x, all(how.scale));
  if (how.softcap == 0) return x;
  const vec t = tanh(mul(x, all(1.0f / how.softcap)));
  if (derivative) *derivative = mul(*derivative, fma(sub(zero(), t), t, all(1.0f)));
  return mul(all(how.softcap), t);
}

// Scores of one key and the rows of half a panel.
INLINE vec shaped(vec x, const Scoring& how, const Panel& rows, int half, int32_t key, vec* derivative = nullptr) {
  x = capped(x, how, derivative);
  if (how.alibi) x = fma(sub(zero(), load(rows.slope + half * LANES)), distance(load(rows.position + half * LANES), key), x);
  return x;
}

// Scores of one row and the keys from `key` on.
INLINE vec shaped_keys(vec x, const Scoring& how, float slope, int32_t position, int32_t key) {
  x = capped(x, how, nullptr);
  return how.alibi ? fma(all(-slope), distance(counted(), position - key), x) : x;
}
