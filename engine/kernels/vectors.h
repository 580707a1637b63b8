// As many floats at a time as a register of this processor holds: loading, rounding, summing, exponentials.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {
// A vector is exactly a register: GCC takes wider ones apart through memory, which costs a factor of fifteen. Of the
// registers there are (AVX-512 32, AVX2 16), ROWS x VECTORS hold sums; ACCUMULATORS of them in attention.
#if defined(__AVX512F__)
constexpr long LANES = 16, VECTORS = 4, ACCUMULATORS = 16;
#elif defined(__AVX__)
constexpr long LANES = 8, VECTORS = 2, ACCUMULATORS = 12;
#else
constexpr long LANES = 4, VECTORS = 2, ACCUMULATORS = 12;
#endif
constexpr long ROWS = 6, PANEL = VECTORS * LANES, FEW_ROWS = 16, ABREAST = 8 / VECTORS, STRETCH = 768, AHEAD = 4096, KEYS_AHEAD = 48;
typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t IVec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t UVec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t Half __attribute__((vector_size(LANES * 2), aligned(2)));

inline Vec load(const float *p) { return *(const Vec *)p; }
#if defined(__AVX512F__)
inline Vec load(const uint16_t *p) {  // GCC splits the generic conversion below into five shuffles
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
#elif defined(__AVX2__)
inline Vec load(const uint16_t *p) {
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
#else
inline Vec load(const uint16_t *p) { return (Vec)(__builtin_convertvector(*(const Half *)p, UVec) << 16); }
#endif
inline void store(float *p, Vec v) { *(Vec *)p = v; }
inline float widen(float x) { return x; }
inline float widen(uint16_t x) { uint32_t w = (uint32_t)x << 16; float f; memcpy(&f, &w, 4); return f; }
inline void narrow(float *p, float x) { *p = x; }
inline void narrow(uint16_t *p, float x) {  // round to nearest even, as torch does
    uint32_t w; memcpy(&w, &x, 4);
    *p = x != x ? 0x7fc0 : (uint16_t)((w + 0x7fff + ((w >> 16) & 1)) >> 16);
}
inline Vec all(float x) { return Vec{} + x; }
inline float sum(Vec v) {
    float t[LANES]; memcpy(t, &v, sizeof t);
    for (int step = LANES / 2; step; step /= 2) for (int i = 0; i < step; i++) t[i] += t[i + step];
    return t[0];
}
// e^x to about one unit in the last place (Cephes): x = n ln 2 + r, polynomial in r.
inline Vec exponential(Vec x) {
    x = x < -87.0f ? all(-87.0f) : x > 88.0f ? all(88.0f) : x;
    Vec n = x * 1.44269504088896341f + 12582912.0f;  // the constant's low bits round to the nearest integer
    n = n - 12582912.0f;
    Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f; p = p * r * r + r + 1.0f;
    IVec bits = (__builtin_convertvector(n, IVec) + 127) << 23;
    return p * (Vec)bits;
}
}  // namespace
