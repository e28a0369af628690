// Sixteen floats at once, one register with AVX-512. Portable C++20; elsewhere the compiler divides them, and some compilers
// compare them one by one.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace cachequant {

constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

inline Vector load(const float* p, int64_t count = kLanes) {
  Vector v{};
  if (count == kLanes)
    std::memcpy(&v, p, sizeof(v));
  else
    std::memcpy(&v, p, count * sizeof(float));
  return v;
}

template <class T, class V>
inline void store(T* p, V v, int64_t count = kLanes) {
  static_assert(sizeof(V) == kLanes * sizeof(T));
  if (count == kLanes)
    std::memcpy(p, &v, sizeof(v));
  else
    std::memcpy(p, &v, count * sizeof(T));
}

// body(i, count) for every vector of [0, n); the last one may be short.
template <class Body>
inline void vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

inline Vector maximum(Vector x, Vector y) { return x > y ? x : y; }
inline Vector minimum(Vector x, Vector y) { return x < y ? x : y; }
inline Vector all(float x) { return Vector{} + x; }
inline Integers bits(Vector x) { return reinterpret_cast<Integers>(x); }

inline float sum_of(Vector x) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

inline float largest_of(Vector x) {
  float top = x[0];
  for (int i = 1; i < kLanes; ++i) top = std::max(top, x[i]);
  return top;
}

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even

inline Vector exponential(Vector x) {  // relative error 2e-7 on [-87, 88]
  x = minimum(maximum(x, all(-87.0f)), all(88.0f));
  const Vector shifted = x * 1.44269504f + kRounder;
  const Vector n = shifted - kRounder;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return reinterpret_cast<Vector>(bits(p) + (bits(shifted) << 23));
}

inline Vector silu(Vector x) { return x / (1.0f + exponential(-x)); }

inline Vector gelu(Vector x) {  // x * Phi(x); erf after Abramowitz and Stegun 7.1.26, absolute error 1.5e-7
  const Vector z = maximum(x, -x) * 0.70710678f;
  const Vector t = 1.0f / (1.0f + 0.3275911f * z);
  Vector p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vector tail = 0.5f * p * t * exponential(-z * z);  // Phi(-|x|)
  return x * (x > 0.0f ? 1.0f - tail : tail);
}

struct Grid {  // q = clip(round(x / s) + z, 0, levels)
  float inverse, low, high;
  int32_t zero;

  Bytes operator()(Vector x) const {
    const Vector clipped = minimum(maximum(x * inverse, all(low)), all(high));  // the bounds are integers
    const Integers q = bits(clipped + kRounder) - std::bit_cast<int32_t>(kRounder) + zero;
    return __builtin_convertvector(q, Bytes);
  }
};

inline Grid grid_of(at::ArrayRef<double> values, size_t index) {
  const double zero = values[3 * index + 1], levels = values[3 * index + 2];
  return {static_cast<float>(1.0 / values[3 * index]), static_cast<float>(-zero), static_cast<float>(levels - zero),
          static_cast<int32_t>(zero)};
}

inline void quantize_row(const float* x, uint8_t* out, int64_t n, Grid grid) {
  vectors(n, [&](int64_t i, int64_t count) { store(out + i, grid(load(x + i, count)), count); });
}

}  // namespace cachequant
