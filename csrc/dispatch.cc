// The only file that knows every instruction set: which exist in this build, and which this CPU can run.
#include <cstring>

#include "kernels.h"
#if defined(BITSPIKE_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#endif
#ifdef BITSPIKE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef BITSPIKE_ARM64
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace bitspike {
namespace {

#ifdef BITSPIKE_X86
#ifdef _MSC_VER
bool bit(int word, int index) { return (word >> index) & 1; }

// The CPU has the instructions and the operating system saves the registers (xgetbv).
bool cpu_has(int leaf7_ebx_bits, int leaf7_ecx_bits, unsigned long long saved) {
  int r[4];
  __cpuid(r, 1);
  if (!bit(r[2], 27) || (_xgetbv(0) & saved) != saved) return false;
  __cpuidex(r, 7, 0);
  return (r[1] & leaf7_ebx_bits) == leaf7_ebx_bits && (r[2] & leaf7_ecx_bits) == leaf7_ecx_bits;
}

bool has_avx2() { return cpu_has(1 << 5, 0, 0x6); }
bool has_avx512() { return cpu_has((1 << 16) | (1 << 17) | (1 << 30) | (1u << 31), 1 << 11, 0xe6); }
bool has_avx512_popcount() { return has_avx512() && cpu_has(0, 1 << 14, 0xe6); }
bool has_avx512_compress() { return has_avx512() && cpu_has(0, 1 << 6, 0xe6); }
bool has_avx512_matrices() { return has_avx512() && cpu_has(0, 1 << 1 | 1 << 8, 0xe6); }
#else
bool has_avx2() { return __builtin_cpu_supports("avx2"); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_popcount() { return has_avx512() && __builtin_cpu_supports("avx512vpopcntdq"); }
bool has_avx512_compress() { return has_avx512() && __builtin_cpu_supports("avx512vbmi2"); }
bool has_avx512_matrices() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
}
#endif
#endif

#ifdef BITSPIKE_AMX
// The instructions for tiles of bytes, and leave to use their registers, which Linux gives to a process that asks.
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512_popcount() || !has_avx512_compress() || !has_avx512_matrices()) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr long kAskForComponent = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForComponent, kTileData) == 0;
}
#endif

#ifdef BITSPIKE_ARM64
bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

struct Available {
  const Kernels* list[5] = {};
#ifdef BITSPIKE_AMX
  Kernels amx = kernels_avx512;
#endif
  Available() {
    int n = 0;
    list[n++] = &kernels_scalar;
#ifdef BITSPIKE_X86
#ifndef _MSC_VER
    __builtin_cpu_init();
#endif
    if (has_avx2()) list[n++] = &kernels_avx2;
    if (has_avx512()) list[n++] = &kernels_avx512;
#ifdef BITSPIKE_AMX
    amx.name = "amx", amx.conv[static_cast<int>(Variant::matrix)] = matrix_amx, amx.spin = spin_amx;
    amx.attention_scratch_bytes = attention_scratch_bytes_amx, amx.attention = attention_amx;
    if (has_amx()) list[n++] = &amx;
#endif
#endif
#ifdef BITSPIKE_ARM64
    list[n++] = &kernels_neon;
    if (has_dot_product()) list[n++] = &kernels_neon_dot;
#endif
  }
};

}  // namespace

#ifdef BITSPIKE_X86
bool cpu_has_avx512_popcount() {
  static const bool has = has_avx512_popcount();
  return has;
}
bool cpu_has_avx512_compress() {
  static const bool has = has_avx512_compress();
  return has;
}
bool cpu_has_avx512_matrices() {
  static const bool has = has_avx512_matrices();
  return has;
}
#endif

const Kernels* const* available_kernels() {
  static const Available available;
  return available.list;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* const* k = available_kernels(); *k; ++k)
    if (std::strcmp((*k)->name, name) == 0) return *k;
  return nullptr;
}

}  // namespace bitspike
