// bf16 by the processor's own products of pairs (AVX512_BF16): x0 * y0 + x1 * y1 in one step, summed in fp32.
//
// A pair is two neighbours of the dimension that is summed over: channels for scores, which in K lie as they must, and keys for outputs,
// whose rows of V are laced together tile by tile. Weights are rounded to bf16, as on a GPU's tensor cores.
#pragma once
#include "forward.h"

#if defined(__AVX512BF16__)

INLINE vec dot(vec acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

// (even, odd) of each lane as a pair of bf16, rounded to the nearest.
INLINE __m512i lace_pair(vec even, vec odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even)), high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

INLINE void store(float* p, __m512i pairs) { _mm512_storeu_si512(p, pairs); }
INLINE __m512i load_pairs(const float* p) { return _mm512_loadu_si512(p); }
INLINE __m512i all_pairs(const uint16_t* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}

// acc[m] += sum over pairs k of A(m, k) * B[k]; the pairs of A(m, .) next to each other, or those of A(., k).
template <Layout LAYOUT, int M>
INLINE void multiply_pairs(vec (&acc)[M][2], const uint16_t* a, int64_t a_step, const float* b, int64_t n) {
  for (int64_t k = 0; k < n; k++) {
    const __m512i b0 = load_pairs(b + k * WIDTH), b1 = load_pairs(b + k * WIDTH + LANES);
    for (int m = 0; m < M; m++) {
      const __m512i x = all_pairs(LAYOUT == M_CONTIGUOUS ? a + k * a_step + 2 * m : a + m * a_step + 2 * k);
      acc[m][0] = dot(acc[m][0], x, b0);
      acc[m][1] = dot(acc[m][1], x, b1);
    }
  }
}

// A way to form the products of a tile, as `Widened` in forward.h.
struct Pairs {
  static constexpr bool PAIRS = true;
  static constexpr int64_t TOGETHER = 2;

  static bool takes(const Problem& p) { return p.type == BF16 && p.head_dim % 2 == 0; }

  static void read_queries(float* q, const Problem& p, const Panel& rows, int64_t batch, float* room) {
    transpose_rows(q, p, rows, p.q, p.q_at, batch, p.head_dim, room);
    lace(q, p.head_dim);
  }

  // Rows as lanes, [channel][row], to pairs of channels, [channel / 2][row], in place.
  static void lace(float* x, int64_t channels) {
    for (int64_t c = 0; c < channels; c += 2)
      for (int half = 0; half < 2; half++) {
        const float* at = x + c * WIDTH + half * LANES;
        store(x + c / 2 * WIDTH + half * LANES, lace_pair(load(at), load(at + WIDTH)));
      }
  }

  static Tile value_rows(const Problem& p, int64_t batch, int64_t head, int32_t key, int64_t, float*) {
    return {begin_of(p, p.v, p.v_at, batch, head, key), p.v_at.row * 2};
  }

  static Tile keys(const Problem& p, int64_t batch, int64_t head, int32_t key, int64_t, float*) {
    return {begin_of(p, p.k, p.k_at, batch, head, key), p.k_at.row * 2};
  }

  // Rows 2j and 2j + 1 of V laced; behind the last row, zeros.
  static Tile values(const Problem& p, int64_t batch, int64_t head, int32_t key, int64_t count, float* room) {
    const char* begin = begin_of(p, p.v, p.v_at, batch, head, key);
    uint32_t* to = (uint32_t*)room;
    for (int64_t j = 0; j < count; j += 2, to += p.v_head_dim) {
      const uint16_t *even = (const uint16_t*)begin + j * p.v_at.row, *odd = even + p.v_at.row;
      const bool both = j + 1 < count;
      int64_t c = 0;
      for (; c + LANES <= p.v_head_dim; c += LANES) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + c)));
        const __m512i high = both ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(odd + c))) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
      for (; c < p.v_head_dim; c++) to[c] = even[c] | (both ? (uint32_t)odd[c] << 16 : 0);
    }
    return {(const char*)room, p.v_head_dim * 2};  // so that `behind`, which skips pairs of keys, ends up on a row of pairs
  }

  template <int M>
  static __attribute__((always_inline)) void multiply(vec (&acc)[M][2], const Tile& k, int64_t j, const float* q, int64_t channels) {
    multiply_pairs<K_CONTIGUOUS>(acc, (const uint16_t*)(k.at + j * k.step), k.step / 2, q, channels / 2);
  }

  // Weights of half a panel, laced in pairs of keys, in the place of the scores; gives their sums.
  static __attribute__((always_inline)) vec weigh(float* s, int64_t count, vec base_2, vec from) {
    vec sum = zero();
    for (int64_t j = 0; j < count; j += 2) {
      const vec even = exp2(fma(load(s + j * WIDTH), base_2, from));
      const vec odd = j + 1 < count ? exp2(fma(load(s + (j + 1) * WIDTH), base_2, from)) : zero();
      sum = add(sum, add(even, odd));
      store(s + j / 2 * WIDTH, lace_pair(even, odd));
    }
    return sum;
  }

  static void add_values(float* out, const Tile& v, const float* s, int64_t channels, int64_t count, const vec (&shrink)[2]) {
    in_blocks(channels, [&](auto size, int64_t c) {
      vec acc[size.value][2];
      clear(acc);
      multiply_pairs<M_CONTIGUOUS>(acc, (const uint16_t*)v.at + 2 * c, 2 * channels, s, ceil_div(count, 2));
      for (int m = 0; m < size.value; m++)
        for (int half = 0; half < 2; half++) {
          float* at = out + (c + m) * WIDTH + half * LANES;
          store(at, fma(load(at), shrink[half], acc[m][half]));
        }
    });
  }
};

#endif
