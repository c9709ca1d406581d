// Vectors of fp32 numbers, as wide as the instruction set for which this file is compiled.
//
// Everything else in this folder is written in these few functions, so that one source serves all processors. Functions around
// intrinsics and not the compiler's own vector type: clang made code of half the speed from that.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

constexpr int LANES = 16;
constexpr int ROWS = 8;  // of a product that stays in registers: 8 x 2 vectors of the 32 that there are
typedef __m512 vec;
typedef __m512i ints;
typedef __mmask16 mask;

INLINE vec zero() { return _mm512_setzero_ps(); }
INLINE vec all(float x) { return _mm512_set1_ps(x); }
INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, vec x) { _mm512_storeu_ps(p, x); }
INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec div(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec greater(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec magnitude(vec x) { return _mm512_abs_ps(x); }
INLINE vec with_sign_of(vec x, vec sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(x), 0xCA));
}
INLINE float sum(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float maximum(vec x) { return _mm512_reduce_max_ps(x); }
INLINE mask below(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE vec choose(mask m, vec a, vec b) { return _mm512_mask_blend_ps(m, b, a); }

INLINE ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
INLINE mask between(ints first, int32_t x, ints behind) {  // first <= x < behind
  const __m512i at = _mm512_set1_epi32(x);
  return _mm512_cmple_epi32_mask(first, at) & _mm512_cmpgt_epi32_mask(behind, at);
}
INLINE vec distance(ints a, int32_t x) {
  return _mm512_cvtepi32_ps(_mm512_abs_epi32(_mm512_sub_epi32(a, _mm512_set1_epi32(x))));
}
INLINE ints counted() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

INLINE vec load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_half(uint16_t* p, vec x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE vec load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

// x = whole + part with 0 <= part < 1, and power_of_2(y, x) = y * 2^whole. -inf has part 0.
INLINE vec part_of(vec x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE vec power_of_2(vec y, vec x) { return _mm512_scalef_ps(y, x); }

#elif defined(__AVX2__)

constexpr int LANES = 8;
constexpr int ROWS = 6;  // 6 x 2 vectors of 16, and three for what they are made from
typedef __m256 vec;
typedef __m256i ints;
typedef __m256 mask;

INLINE vec zero() { return _mm256_setzero_ps(); }
INLINE vec all(float x) { return _mm256_set1_ps(x); }
INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, vec x) { _mm256_storeu_ps(p, x); }
INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec div(vec a, vec b) { return _mm256_div_ps(a, b); }
INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec greater(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec magnitude(vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE vec with_sign_of(vec x, vec sign) {
  const vec bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_and_ps(bit, sign), _mm256_andnot_ps(bit, x));
}
INLINE float sum(vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
INLINE float maximum(vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
INLINE mask below(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE vec choose(mask m, vec a, vec b) { return _mm256_blendv_ps(b, a, m); }

INLINE ints load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE mask between(ints first, int32_t x, ints behind) {
  const __m256i at = _mm256_set1_epi32(x);
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(first, at), _mm256_cmpgt_epi32(behind, at)));
}
INLINE vec distance(ints a, int32_t x) {
  return _mm256_cvtepi32_ps(_mm256_abs_epi32(_mm256_sub_epi32(a, _mm256_set1_epi32(x))));
}
INLINE ints counted() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

INLINE vec load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_half(uint16_t* p, vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE vec load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}

INLINE vec part_of(vec x) { return _mm256_sub_ps(x, _mm256_floor_ps(x)); }
INLINE vec power_of_2(vec y, vec x) {
  // 2^whole is put together from its bits, which must be those of a normal number: below, y * 2^whole counts as 0.
  const vec whole = _mm256_floor_ps(x), smallest = _mm256_set1_ps(-126.0f);
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(below(whole, smallest), _mm256_mul_ps(y, _mm256_castsi256_ps(bits)));
}

#else
#error "no vectors for this processor: x86-64 with AVX2, FMA and F16C is the least"
#endif

// Bytes that will be needed soon, to the second level of cache: the first holds what is being worked on.
INLINE void fetch(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
}

// The sums of four vectors, next to each other: half the steps of four sums.
INLINE void store_sums(float* to, vec a, vec b, vec c, vec d) {
#if defined(__AVX512F__)
  const auto half = [](vec x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
  const __m256 all_four = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
#else
  const __m256 all_four = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
#endif
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all_four), _mm256_extractf128_ps(all_four, 1)));
}

// Eight rows of eight numbers, rows to columns: to[j][i] = from[i][j]. AVX of 2011, which both instruction sets have.
INLINE void transpose_8(float* const (&to)[8], const float* const (&from)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(from[i]);
  for (int i = 0; i < 8; i += 2) b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
      a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xEE);
    }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to[i], _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to[i + 4], _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f, INF = __builtin_inff();

// 2^x for x <= 127: the fraction by a polynomial, the whole part into the exponent. Relative error of the polynomial 1.4e-8. It is 1 at
// 0 exactly, so that the only key of a row has weight 1. Coefficients: minimax over [0, 1) with the first held at 1 (Remez).
INLINE vec exp2(vec x) {
  const vec f = part_of(x);
  vec y = all(0.00021612914861179888f);
  y = fma(y, f, all(0.0012467846972867846f));
  y = fma(y, f, all(0.009675451554358006f));
  y = fma(y, f, all(0.055485282093286514f));
  y = fma(y, f, all(0.2402293086051941f));
  y = fma(y, f, all(0.6931470632553101f));
  y = fma(y, f, all(1.0f));
  return power_of_2(y, x);
}

// Near 0 a polynomial, because 1 - 2 / (e^2x + 1) cancels there (Cephes, tanhf).
INLINE vec tanh(vec x) {
  const vec a = magnitude(x), square = mul(x, x);
  const vec large = sub(all(1.0f), div(all(2.0f), add(exp2(mul(all(2.0f * LOG2_E), choose(below(a, all(10.0f)), a, all(10.0f)))), all(1.0f))));
  vec y = all(-5.70498872745e-3f);
  y = fma(y, square, all(2.06390887954e-2f));
  y = fma(y, square, all(-5.37397155531e-2f));
  y = fma(y, square, all(1.33314422036e-1f));
  y = fma(y, square, all(-3.33332819422e-1f));
  y = fma(mul(y, square), x, x);
  return choose(below(a, all(0.625f)), y, with_sign_of(large, x));
}

// The smallest vector that holds n numbers is loaded from and stored to memory whole; of a tail shorter than that, only what is there.
enum Type : int64_t { FP32 = 0, BF16 = 1, FP16 = 2 };

INLINE int64_t size_of(int64_t type) { return type == FP32 ? 4 : 2; }

INLINE vec load_as(int64_t type, const char* p) {
  return type == FP32 ? load((const float*)p) : type == BF16 ? load_bf16((const uint16_t*)p) : load_half((const uint16_t*)p);
}

INLINE void store_bf16(uint16_t* p, const float* x) {
  for (int i = 0; i < LANES; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to the nearest, of two the even one
    p[i] = x[i] != x[i] ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)rounded;
  }
}

// n numbers of any type to fp32.
static void widen(float* to, const char* from, int64_t type, int64_t n) {
  int64_t i = 0;
  const int64_t size = size_of(type);
  for (; i + LANES <= n; i += LANES) store(to + i, load_as(type, from + i * size));
  if (i < n) {
    alignas(64) char tail[LANES * 4] = {};
    alignas(64) float wide[LANES];
    memcpy(tail, from + i * size, (n - i) * size);
    store(wide, load_as(type, tail));
    memcpy(to + i, wide, (n - i) * 4);
  }
}

// The other way, rounded to the nearest.
static void narrow(char* to, const float* from, int64_t type, int64_t n) {
  const int64_t size = size_of(type);
  if (type == FP32) {
    memcpy(to, from, n * size);
    return;
  }
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t count = n - i < LANES ? n - i : LANES;
    alignas(64) float wide[LANES] = {};
    alignas(64) uint16_t short_[LANES];
    memcpy(wide, from + i, count * 4);
    if (type == BF16) store_bf16(short_, wide);
    else store_half(short_, load(wide));
    memcpy(to + i * size, short_, count * size);
  }
}
