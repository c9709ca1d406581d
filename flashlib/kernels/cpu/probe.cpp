// What this processor and this operating system can run. Compiled without any instruction that must be asked for.
//
// Asked of the processor itself: __builtin_cpu_supports answers 0 to everything under some compilers, and a feature that the operating
// system does not save between threads must not be used although CPUID names it.
#include <cpuid.h>
#include <stdint.h>

enum Feature : int64_t { AVX2 = 1, AVX512 = 2, AVX512_BF16 = 4, AMX_BF16 = 8 };

static uint64_t saved_registers() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

static bool has(uint32_t found, uint32_t wanted) { return (found & wanted) == wanted; }

extern "C" __attribute__((visibility("default"))) int64_t flashlib_cpu_features(void) {
  uint32_t a, b, c, d, b7 = 0, c7 = 0, d7 = 0, a71 = 0, extended = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const uint32_t basic = c;
  if (!has(basic, bit_OSXSAVE)) return 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) b7 = b, c7 = c, d7 = d;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) a71 = a;
  if (__get_cpuid(0x80000001, &a, &b, &c, &d)) extended = c;
  (void)c7;
  const uint64_t saved = saved_registers();
  const uint64_t ymm = 0x6, zmm = 0xE6, tiles = 0x60000;
  int64_t found = 0;
  const bool v3 = has(basic, bit_AVX | bit_FMA | bit_F16C | bit_MOVBE | bit_POPCNT | bit_SSE4_2) && has(b7, bit_AVX2 | bit_BMI | bit_BMI2) && has(extended, bit_LZCNT);
  if ((saved & ymm) == ymm && v3) found |= AVX2;
  const bool v4 = has(b7, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL);
  if (found && (saved & zmm) == zmm && v4) found |= AVX512;
  if ((found & AVX512) && has(a71, 1u << 5)) found |= AVX512_BF16;
  if ((found & AVX512) && (saved & tiles) == tiles && has(d7, 1u << 22 | 1u << 24)) found |= AMX_BF16;
  return found;
}
