// What stands between two integer products on the CPU, in one pass each: normalise, activate, quantise; attention in blocks.
//
// Portable C++20 (vectorised by the compiler) over ATen's thread pool. Every operator has a reference in plain torch,
// cachequant/kernels/fused.py, and is tested against it. Tensors are float32, channels last: [B, P, C] with P pixels.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using at::Tensor;

// Sixteen floats at once: one register with AVX-512, two with AVX2, four with NEON or SSE.

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

Grid grid_of(at::ArrayRef<double> values, size_t index) {
  const double zero = values[3 * index + 1], levels = values[3 * index + 2];
  return {static_cast<float>(1.0 / values[3 * index]), static_cast<float>(-zero), static_cast<float>(levels - zero),
          static_cast<int32_t>(zero)};
}

struct Identity {
  Vector operator()(Vector x) const { return x; }
};

void quantize_row(const float* x, uint8_t* out, int64_t n, Grid grid) {
  vectors(n, [&](int64_t i, int64_t count) { store(out + i, grid(load(x + i, count)), count); });
}

const float* floats(const Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous(), "expected a contiguous float32 tensor");
  return t.const_data_ptr<float>();
}

// x -> integers on the grid [s, z, levels]; any shape, any dense order of memory, which is kept.
Tensor quantize(const Tensor& x, at::ArrayRef<double> grid) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_non_overlapping_and_dense(), "quantize: expected dense float32");
  const float* in = x.const_data_ptr<float>();
  Tensor out = at::empty_strided(x.sizes(), x.strides(), x.options().dtype(at::kByte));
  uint8_t* q = out.mutable_data_ptr<uint8_t>();
  const Grid g = grid_of(grid, 0);
  at::parallel_for(0, x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    quantize_row(in + begin, q + begin, end - begin, g);
  });
  return out;
}

// A value that is still a sum: data (+ other) (+ sums[row, k] * columns[k, channel] for k < 2), added wherever it is read.

enum Terms { kPlain, kOther, kOuter, kOtherOuter };

struct Part {
  const float* data;
  int64_t width, offset;
  const float *other = nullptr, *sums = nullptr, *columns = nullptr;
  int64_t count = 0;  // of outer products

  Part at(int64_t row) const {
    Part part = *this;
    part.data += row * width;
    if (other != nullptr) part.other += row * width;
    if (sums != nullptr) part.sums += row * count;
    return part;
  }

  Terms terms() const { return static_cast<Terms>((other != nullptr ? kOther : 0) + (count > 0 ? kOuter : 0)); }

  template <Terms kTerms>
  Vector value(int64_t row, int64_t c, int64_t lanes) const {
    Vector x = load(data + row * width + c, lanes);
    if constexpr (kTerms == kOther || kTerms == kOtherOuter) x += load(other + row * width + c, lanes);
    if constexpr (kTerms == kOuter || kTerms == kOtherOuter) {
      x += sums[row * count] * load(columns + c, lanes);
      if (count > 1) x += sums[row * count + 1] * load(columns + width + c, lanes);
    }
    return x;
  }
};

// run(std::integral_constant<Terms, ...>) for the terms that a part has.
template <class Run>
void with_terms(Terms terms, Run run) {
  switch (terms) {
    case kPlain: return run(std::integral_constant<Terms, kPlain>{});
    case kOther: return run(std::integral_constant<Terms, kOther>{});
    case kOuter: return run(std::integral_constant<Terms, kOuter>{});
    case kOtherOuter: return run(std::integral_constant<Terms, kOtherOuter>{});
  }
}

// x [R, C] += other + sums [R, k] columns [k, C], in place.
void add_terms(const Tensor& x, const std::optional<Tensor>& other, const Tensor& sums, const Tensor& columns) {
  const int64_t rows = x.size(0), width = x.size(1);
  float* out = const_cast<float*>(floats(x));
  TORCH_CHECK(!other || other->sizes() == x.sizes(), "add_terms: x and other differ");
  TORCH_CHECK(sums.dim() == 2 && sums.size(0) == rows && sums.size(1) <= 2 && columns.size(0) == sums.size(1) &&
                  columns.size(1) == width, "add_terms: sums and columns do not fit");
  const Part part{out, width, 0, other ? floats(*other) : nullptr, floats(sums), floats(columns), sums.size(1)};
  with_terms(part.terms(), [&](auto terms) {
    at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        vectors(width, [&](int64_t c, int64_t lanes) {
          store(out + r * width + c, part.template value<terms.value>(r, c, lanes), lanes);
        });
    });
  });
}

void row_sums(const uint8_t* q, int64_t rows, int64_t width, int64_t zero, float* sums) {
  at::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int32_t sum = 0;
      const uint8_t* row = q + r * width;
      for (int64_t c = 0; c < width; ++c) sum += row[c];
      sums[r] = static_cast<float>(sum - zero * width);
    }
  });
}

// Sum of q - zero over everything that each output pixel of a convolution reads: q is uint8 [B, H, W, C] -> [B * H' * W'].
// Padding stands for zero. place: kernel, stride, padding and dilation, two numbers each.
Tensor window_sums(const Tensor& q, int64_t zero, at::IntArrayRef place) {
  TORCH_CHECK(q.dim() == 4 && q.scalar_type() == at::kByte && q.is_contiguous() && place.size() == 8,
              "window_sums: q must be uint8 [B, H, W, C]");
  const int64_t batch = q.size(0), height = q.size(1), width = q.size(2);
  int64_t size[2];
  for (int i = 0; i < 2; ++i)
    size[i] = (q.size(1 + i) + 2 * place[4 + i] - place[6 + i] * (place[i] - 1) - 1) / place[2 + i] + 1;
  Tensor out = at::empty({batch * size[0] * size[1]}, q.options().dtype(at::kFloat));
  float* sums = out.mutable_data_ptr<float>();
  const int64_t pixels = batch * height * width;
  if (place[0] * place[1] * place[2] * place[3] == 1 && place[4] + place[5] == 0) {  // every output reads its own pixel
    row_sums(q.const_data_ptr<uint8_t>(), pixels, q.size(3), zero, sums);
    return out;
  }
  std::vector<float> pixel(pixels);
  row_sums(q.const_data_ptr<uint8_t>(), pixels, q.size(3), zero, pixel.data());
  const int64_t border = place[5], span = width + 2 * border;  // of a line, zeros at both ends
  at::parallel_for(0, batch * size[0], 16, [&](int64_t begin, int64_t end) {
    std::vector<float> line(span);
    for (int64_t r = begin; r < end; ++r) {
      const float* picture = pixel.data() + r / size[0] * height * width;
      const int64_t top = r % size[0] * place[2] - place[4];
      float* inside = line.data() + border;
      std::fill(inside, inside + width, 0.0f);
      for (int64_t u = 0; u < place[0]; ++u) {
        const int64_t y = top + u * place[6];
        if (y < 0 || y >= height) continue;
        for (int64_t x = 0; x < width; ++x) inside[x] += picture[y * width + x];
      }
      float* row = sums + r * size[1];
      std::fill(row, row + size[1], 0.0f);
      for (int64_t v = 0; v < place[1]; ++v) {
        const float* from = line.data() + v * place[7];
        if (place[3] == 1)
          for (int64_t j = 0; j < size[1]; ++j) row[j] += from[j];
        else
          for (int64_t j = 0; j < size[1]; ++j) row[j] += from[j * place[3]];
      }
    }
  });
  return out;
}

// Group normalisation of concat(x, skip) + shift, SiLU if asked, then integers of each part on its grid (or floats).

// Sums over pixels [begin, end) of x - x[0] and of its square, of kVectors vectors of channels from c on: side by side, so
// that a pixel is read as it lies in memory.
template <Terms kTerms, int kVectors>
void block_sums(const Part& part, int64_t c, int64_t lanes, int64_t begin, int64_t end, float* sum, float* square) {
  Vector pivot[kVectors], s[kVectors]{}, q[kVectors]{};
  for (int v = 0; v < kVectors; ++v) pivot[v] = part.value<kTerms>(0, c + v * kLanes, lanes);
  for (int64_t p = begin; p < end; ++p)
    for (int v = 0; v < kVectors; ++v) {
      const Vector d = part.value<kTerms>(p, c + v * kLanes, lanes) - pivot[v];
      s[v] += d;
      q[v] += d * d;
    }
  for (int v = 0; v < kVectors; ++v) {
    store(sum + c + v * kLanes, s[v], lanes);
    store(square + c + v * kLanes, q[v], lanes);
  }
}

template <Terms kTerms>
void channel_sums(const Part& part, int64_t begin, int64_t end, float* sum, float* square) {
  int64_t c = 0;
  for (; c + 8 * kLanes <= part.width; c += 8 * kLanes) block_sums<kTerms, 8>(part, c, kLanes, begin, end, sum, square);
  for (; c + 2 * kLanes <= part.width; c += 2 * kLanes) block_sums<kTerms, 2>(part, c, kLanes, begin, end, sum, square);
  for (; c < part.width; c += kLanes)
    block_sums<kTerms, 1>(part, c, std::min(kLanes, part.width - c), begin, end, sum, square);
}

template <Terms kTerms, bool kSilu, class Out, class Convert>
void apply_rows(const Part& part, int64_t begin, int64_t end, const float* a, const float* b, Out* out, Convert convert) {
  for (int64_t p = begin; p < end; ++p)
    vectors(part.width, [&](int64_t c, int64_t lanes) {
      const Vector y = part.value<kTerms>(p, c, lanes) * load(a + c, lanes) + load(b + c, lanes);
      store(out + p * part.width + c, convert(kSilu ? silu(y) : y), lanes);
    });
}

struct GroupNorm {
  Part parts[2];
  int64_t count, batch, pixels, channels, groups, shift_stride;
  const float *gamma, *beta, *shift;
  double eps;

  Part sample(int i, int64_t b) const { return parts[i].at(b * pixels); }

  // Sums of (x - pivot) and (x - pivot)^2 per channel of pixels [begin, end): totals is [2, C].
  void stats(int64_t b, int64_t begin, int64_t end, float* totals) const {
    for (int i = 0; i < count; ++i) {
      const Part part = sample(i, b);
      with_terms(part.terms(), [&](auto terms) {
        channel_sums<terms.value>(part, begin, end, totals + part.offset, totals + channels + part.offset);
      });
    }
  }

  // Per channel factor and offset of the whole normalisation, from the summed totals [2, C] of sample b.
  void fold(int64_t b, const double* totals, float* a, float* offset) const {
    const int64_t width = channels / groups;
    const double n = static_cast<double>(pixels);
    const float* pivot = offset;  // they lie there until the group's offsets take their place
    pivots(b, offset);
    for (int64_t g = 0; g < groups; ++g) {
      double mean = 0.0, spread = 0.0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) mean += totals[c] / n + pivot[c] + added(b, c);
      mean /= static_cast<double>(width);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const double m = totals[c] / n, d = m + pivot[c] + added(b, c) - mean;
        spread += std::max(totals[channels + c] / n - m * m, 0.0) + d * d;
      }
      const double inverse = 1.0 / std::sqrt(spread / static_cast<double>(width) + eps);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const double factor = inverse * gamma[c];
        a[c] = static_cast<float>(factor);
        offset[c] = static_cast<float>(beta[c] + (added(b, c) - mean) * factor);
      }
    }
  }

  // x[0] of every channel of sample b.
  void pivots(int64_t b, float* out) const {
    for (int i = 0; i < count; ++i) {
      const Part part = sample(i, b);
      with_terms(part.terms(), [&](auto terms) {
        vectors(part.width, [&](int64_t c, int64_t lanes) {
          store(out + part.offset + c, part.value<terms.value>(0, c, lanes), lanes);
        });
      });
    }
  }

  double added(int64_t b, int64_t c) const { return shift == nullptr ? 0.0 : shift[b * shift_stride + c]; }
};

template <class Out, class Convert>
void run_group_norm(const GroupNorm& norm, bool activate, Out** out, const Convert* converts) {
  const int64_t channels = norm.channels;
  const auto apply = [&](int64_t b, int64_t begin, int64_t end, const float* a, const float* offset) {
    for (int i = 0; i < norm.count; ++i) {
      const Part part = norm.sample(i, b);
      Out* target = out[i] + b * norm.pixels * part.width;
      with_terms(part.terms(), [&](auto terms) {
        const auto rows = activate ? apply_rows<terms.value, true, Out, Convert> : apply_rows<terms.value, false, Out, Convert>;
        rows(part, begin, end, a + part.offset, offset + part.offset, target, converts[i]);
      });
    }
  };
  constexpr int64_t kRows = 64;  // float sums stay short; longer ones are added up in double
  const auto totals_of = [&](int64_t b, int64_t begin, int64_t end, double* totals) {
    std::vector<float> part(2 * channels);
    for (int64_t p = begin; p < end; p += kRows) {
      norm.stats(b, p, std::min(p + kRows, end), part.data());
      for (int64_t c = 0; c < 2 * channels; ++c) totals[c] += part[c];
    }
  };
  if (norm.batch >= at::get_num_threads()) {  // a sample per task: its second reading comes from the cache
    at::parallel_for(0, norm.batch, 1, [&](int64_t first, int64_t last) {
      std::vector<double> totals(2 * channels);
      std::vector<float> a(channels), offset(channels);
      for (int64_t b = first; b < last; ++b) {
        std::fill(totals.begin(), totals.end(), 0.0);
        totals_of(b, 0, norm.pixels, totals.data());
        norm.fold(b, totals.data(), a.data(), offset.data());
        apply(b, 0, norm.pixels, a.data(), offset.data());
      }
    });
    return;
  }
  const int64_t chunks = std::min<int64_t>(4 * at::get_num_threads(), (norm.pixels + kRows - 1) / kRows);
  const int64_t length = (norm.pixels + chunks - 1) / chunks;
  for (int64_t b = 0; b < norm.batch; ++b) {
    std::vector<double> partial(2 * channels * chunks);
    std::vector<float> a(channels), offset(channels);
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k)
        totals_of(b, k * length, std::min((k + 1) * length, norm.pixels), partial.data() + 2 * channels * k);
    });
    for (int64_t k = 1; k < chunks; ++k)
      for (int64_t c = 0; c < 2 * channels; ++c) partial[c] += partial[2 * channels * k + c];
    norm.fold(b, partial.data(), a.data(), offset.data());
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k)
        apply(b, k * length, std::min((k + 1) * length, norm.pixels), a.data(), offset.data());
    });
  }
}

// grids: [s, z, levels] of each part, or empty for float outputs.
// other, sums and columns are further terms of x.
std::vector<Tensor> group_norm(const Tensor& x, const std::optional<Tensor>& other, const std::optional<Tensor>& sums,
                               const std::optional<Tensor>& columns, const std::optional<Tensor>& skip,
                               const std::optional<Tensor>& shift, const Tensor& gamma, const Tensor& beta, int64_t groups, double eps, bool activate,
                               at::ArrayRef<double> grids) {
  TORCH_CHECK(x.dim() == 3, "group_norm: x must be [B, P, C]");
  const int64_t rest = skip ? skip->size(2) : 0, channels = x.size(2) + rest;
  TORCH_CHECK(channels % groups == 0 && gamma.numel() == channels && beta.numel() == channels,
              "group_norm: channels do not fit groups or parameters");
  TORCH_CHECK(!skip || (skip->size(0) == x.size(0) && skip->size(1) == x.size(1)), "group_norm: x and skip differ");
  TORCH_CHECK(!other || other->sizes() == x.sizes(), "group_norm: x and other differ");
  TORCH_CHECK(!shift || (shift->dim() == 2 && shift->size(1) == channels &&
                         (shift->size(0) == x.size(0) || shift->size(0) == 1)),
              "group_norm: shift must be [B, C] or [1, C]");
  TORCH_CHECK(grids.empty() || grids.size() == (skip ? 6u : 3u), "group_norm: one grid per part");
  TORCH_CHECK(!sums || (columns && sums->size(0) == x.size(0) * x.size(1) && sums->size(1) <= 2 &&
                        columns->size(0) == sums->size(1) && columns->size(1) == x.size(2)), "group_norm: sums and columns do not fit");
  const int64_t outer = sums ? sums->size(1) : 0;
  GroupNorm norm{{{floats(x), x.size(2), 0, other ? floats(*other) : nullptr, sums ? floats(*sums) : nullptr,
                   columns ? floats(*columns) : nullptr, outer},
                  {skip ? floats(*skip) : nullptr, rest, x.size(2)}},
                 skip ? 2 : 1, x.size(0), x.size(1), channels, groups, shift && shift->size(0) > 1 ? channels : 0,
                 floats(gamma), floats(beta), shift ? floats(*shift) : nullptr, eps};
  std::vector<Tensor> outputs;
  const auto type = grids.empty() ? at::kFloat : at::kByte;
  outputs.push_back(at::empty(x.sizes(), x.options().dtype(type)));
  if (skip) outputs.push_back(at::empty(skip->sizes(), x.options().dtype(type)));
  if (x.numel() == 0) return outputs;
  if (grids.empty()) {
    float* out[2] = {outputs[0].mutable_data_ptr<float>(), skip ? outputs[1].mutable_data_ptr<float>() : nullptr};
    const Identity converts[2];
    run_group_norm(norm, activate, out, converts);
  } else {
    uint8_t* out[2] = {outputs[0].mutable_data_ptr<uint8_t>(), skip ? outputs[1].mutable_data_ptr<uint8_t>() : nullptr};
    const Grid converts[2] = {grid_of(grids, 0), grid_of(grids, skip ? 1 : 0)};
    run_group_norm(norm, activate, out, converts);
  }
  return outputs;
}

// Layer normalisation of each row [R, C], quantised on each of the grids.
std::vector<Tensor> layer_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps,
                               at::ArrayRef<double> grids) {
  TORCH_CHECK(x.dim() == 2 && gamma.numel() == x.size(1) && beta.numel() == x.size(1), "layer_norm: x must be [R, C]");
  const float *in = floats(x), *scale = floats(gamma), *offset = floats(beta);
  const int64_t rows = x.size(0), width = x.size(1);
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < grids.size() / 3; ++i) outputs.push_back(at::empty(x.sizes(), x.options().dtype(at::kByte)));
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> y(width);
    for (int64_t r = begin; r < end; ++r) {
      const float* row = in + r * width;
      Vector sum{}, square{};
      vectors(width, [&](int64_t c, int64_t count) { sum += load(row + c, count); });
      const float mean = sum_of(sum) / static_cast<float>(width);
      vectors(width, [&](int64_t c, int64_t count) {
        const Vector d = load(row + c, count) - mean;
        store(y.data() + c, d, count);
        square += count == kLanes ? d * d : load(y.data() + c, count) * load(y.data() + c, count);
      });
      const float inverse = static_cast<float>(1.0 / std::sqrt(sum_of(square) / static_cast<double>(width) + eps));
      vectors(width, [&](int64_t c, int64_t count) {
        store(y.data() + c, load(y.data() + c, count) * inverse * load(scale + c, count) + load(offset + c, count), count);
      });
      for (size_t i = 0; i < outputs.size(); ++i)
        quantize_row(y.data(), outputs[i].mutable_data_ptr<uint8_t>() + r * width, width, grid_of(grids, i));
    }
  });
  return outputs;
}

// GEGLU: x = [value | gate] of [R, 2C] -> integers of value * gelu(gate), [R, C].
Tensor geglu(const Tensor& x, at::ArrayRef<double> grid) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, "geglu: x must be [R, 2C]");
  const float* in = floats(x);
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  Tensor out = at::empty({rows, width}, x.options().dtype(at::kByte));
  uint8_t* q = out.mutable_data_ptr<uint8_t>();
  const Grid g = grid_of(grid, 0);
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float *value = in + r * 2 * width, *gate = value + width;
      uint8_t* target = q + r * width;
      vectors(width, [&](int64_t c, int64_t count) {
        store(target + c, g(load(value + c, count) * gelu(load(gate + c, count))), count);
      });
    }
  });
  return out;
}

// Attention in blocks with a running softmax (Dao et al. 2022): no [N, M] matrix is ever written to memory.

constexpr int64_t kQueries = 48, kKeys = 512, kPanel = 4 * kLanes;

template <int kRowCount, int kVectors>
void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth, bool add) {
  Vector acc[kRowCount][kVectors];
  for (int r = 0; r < kRowCount; ++r)
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = add ? load(c + r * ldc + v * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * ldb + v * kLanes);
    for (int r = 0; r < kRowCount; ++r) {
      const float left = a[r * lda + k];
      for (int v = 0; v < kVectors; ++v) acc[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < kRowCount; ++r)
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

template <int kVectors>
void columns(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t depth,
             bool add) {
  constexpr int kStep = kVectors == 1 ? 12 : kVectors == 2 ? 12 : kVectors == 3 ? 8 : 6;
  int64_t r = 0;
  for (; r + kStep <= rows; r += kStep) tile<kStep, kVectors>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, add);
  for (; r + 4 <= rows; r += 4) tile<4, kVectors>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, add);
  for (; r < rows; ++r) tile<1, kVectors>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, add);
}

// c [rows, width] (+)= a [rows, depth] b [depth, width]; width is a multiple of the vector length.
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t width,
              int64_t depth, bool add) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes) columns<4>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add);
  switch ((width - j) / kLanes) {
    case 3: columns<3>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add); break;
    case 2: columns<2>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add); break;
    case 1: columns<1>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add); break;
    default: break;
  }
}

// scores [padded] -> exp(scores - max), as good as 0 behind `keys`; updates the row's maximum and sum, returns the factor
// by which earlier blocks shrink.
float softmax_row(float* scores, int64_t keys, int64_t padded, float& top, float& sum) {
  for (int64_t j = keys; j < padded; ++j) scores[j] = std::numeric_limits<float>::lowest();
  Vector highest = all(top), total{};
  for (int64_t j = 0; j < padded; j += kLanes) highest = maximum(highest, load(scores + j));
  const float before = top;
  top = largest_of(highest);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vector e = exponential(load(scores + j) - top);
    total += e;
    store(scores + j, e);
  }
  const float shrink = exponential(all(before - top))[0];
  sum = sum * shrink + sum_of(total);
  return shrink;
}

template <int kStep, size_t... kLane>
inline void exchange(Vector& a, Vector& b, std::index_sequence<kLane...>) {
  const Vector low = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
  a = low;
}

template <int kStep>
inline void exchange_all(Vector* rows) {
  for (int64_t i = 0; i < kLanes; ++i)
    if ((i & kStep) == 0) exchange<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kLanes>{});
}

inline void transpose(Vector* rows) {  // 16 × 16
  exchange_all<8>(rows);
  exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Attention {
  const float *query, *key, *value;
  int64_t batch, heads, queries, keys, width, row_q, row_k, row_v;
  float scale;
  int64_t padded_keys = round_up(keys, kLanes), padded_width = round_up(width, kLanes);

  int64_t size = round_up(keys, kPanel) * width + padded_keys * padded_width;

  // Keys times the scale as transposed panels [keys / 64, width, 64], then padded values [padded_keys, padded_width], of one
  // head.
  void pack(int64_t task, float* panels) const {
    const int64_t b = task / heads, h = task % heads;
    const float *k = key + b * keys * row_k + h * width, *v = value + b * keys * row_v + h * width;
    for (int64_t j = 0; j < padded_keys; j += kLanes)
      for (int64_t d = 0; d < width; d += kLanes) {
        const int64_t count = std::min(kLanes, width - d);
        Vector tile[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) tile[i] = j + i < keys ? load(k + (j + i) * row_k + d, count) * scale : Vector{};
        transpose(tile);
        float* column = panels + j / kPanel * kPanel * width + d * kPanel + j % kPanel;
        for (int64_t i = 0; i < count; ++i) store(column + i * kPanel, tile[i]);
      }
    float* rows = values_of(panels);
    for (int64_t j = 0; j < padded_keys; ++j) {
      const int64_t inside = j < keys ? width : 0;
      std::copy(v + j * row_v, v + j * row_v + inside, rows + j * padded_width);
      std::fill(rows + j * padded_width + inside, rows + (j + 1) * padded_width, 0.0f);
    }
  }

  float* values_of(float* panels) const { return panels + round_up(keys, kPanel) * width; }

  // Output rows [begin, end) of one head into out [rows, padded_width].
  void block(int64_t task, int64_t begin, int64_t end, float* panels, float* scores, float* out) const {
    const float* v = values_of(panels);
    const int64_t b = task / heads, h = task % heads, rows = end - begin;
    const float* rows_q = query + (b * queries + begin) * row_q + h * width;
    float top[kQueries], sum[kQueries];
    std::fill(top, top + rows, std::numeric_limits<float>::lowest());
    std::fill(sum, sum + rows, 0.0f);
    for (int64_t start = 0; start < keys; start += kKeys) {
      const int64_t count = std::min(kKeys, keys - start), padded = round_up(count, kLanes);
      for (int64_t j = 0; j < padded; j += kPanel)
        multiply(rows_q, row_q, panels + (start + j) * width, kPanel, scores + j, kKeys, rows, std::min(kPanel, padded - j),
                 width, false);
      for (int64_t r = 0; r < rows; ++r) {
        const float shrink = softmax_row(scores + r * kKeys, count, padded, top[r], sum[r]);
        if (start > 0)
          for (int64_t d = 0; d < padded_width; ++d) out[r * padded_width + d] *= shrink;
      }
      multiply(scores, kKeys, v + start * padded_width, padded_width, out, padded_width, rows, padded_width, padded, start > 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float whole = 1.0f / sum[r];
      for (int64_t d = 0; d < padded_width; ++d) out[r * padded_width + d] *= whole;
    }
  }
};

// softmax(q k^T scale) v per head: q [B, N, H*d], k and v [B, M, H*d], rows may be strided -> [B, N, H*d], integers if a grid is given.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, int64_t heads, double scale,
                 at::ArrayRef<double> grid) {
  for (const Tensor* t : {&query, &key, &value})
    TORCH_CHECK(t->dim() == 3 && t->scalar_type() == at::kFloat && t->stride(2) == 1 &&
                    t->stride(0) == t->size(1) * t->stride(1), "attention: expected float32 rows [B, N, C]");
  const int64_t channels = query.size(2), width = channels / heads;
  TORCH_CHECK(width * heads == channels && width <= 512 && key.sizes() == value.sizes() && key.size(2) == channels &&
                  key.size(0) == query.size(0), "attention: shapes do not fit");
  const Attention job{query.const_data_ptr<float>(), key.const_data_ptr<float>(), value.const_data_ptr<float>(),
                      query.size(0), heads, query.size(1), key.size(1), width,
                      query.stride(1), key.stride(1), value.stride(1), static_cast<float>(scale)};
  const bool quantized = !grid.empty();
  Tensor out = at::empty(query.sizes(), query.options().dtype(quantized ? at::kByte : at::kFloat));
  const int64_t tasks = job.batch * heads, blocks = (job.queries + kQueries - 1) / kQueries;
  // Blocks [first, last) of one head, whose operands are packed in `panels`.
  const auto run = [&](int64_t t, int64_t first, int64_t last, float* panels, float* scores, float* rows) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * kQueries, end = std::min(begin + kQueries, job.queries);
      job.block(t, begin, end, panels, scores, rows);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t place = (t / heads * job.queries + r) * channels + t % heads * width;
        const float* row = rows + (r - begin) * job.padded_width;
        if (quantized)
          quantize_row(row, out.mutable_data_ptr<uint8_t>() + place, width, grid_of(grid, 0));
        else
          std::copy(row, row + width, out.mutable_data_ptr<float>() + place);
      }
    }
  };
  const int64_t threads = at::get_num_threads();
  if (tasks % threads == 0 || tasks >= 8 * threads) {  // a head per task: what is packed stays in the core's cache
    at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      std::vector<float> panels(job.size), scores(kQueries * kKeys), rows(kQueries * job.padded_width);
      for (int64_t t = first; t < last; ++t) {
        job.pack(t, panels.data());
        run(t, 0, blocks, panels.data(), scores.data(), rows.data());
      }
    });
    return out;
  }
  Tensor packed = at::empty({tasks, job.size}, query.options());
  float* buffer = packed.mutable_data_ptr<float>();
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) job.pack(t, buffer + t * job.size);
  });
  at::parallel_for(0, tasks * blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scores(kQueries * kKeys), rows(kQueries * job.padded_width);
    for (int64_t i = first; i < last; ++i)
      run(i / blocks, i % blocks, i % blocks + 1, buffer + i / blocks * job.size, scores.data(), rows.data());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(cachequant, m) {
  m.def("quantize(Tensor x, float[] grid) -> Tensor");
  m.def("group_norm(Tensor x, Tensor? other, Tensor? sums, Tensor? columns, Tensor? skip, Tensor? shift, Tensor gamma, "
        "Tensor beta, int groups, float eps, bool activate, float[] grids) -> Tensor[]");
  m.def("add_terms(Tensor(a!) x, Tensor? other, Tensor sums, Tensor columns) -> ()");
  m.def("window_sums(Tensor q, int zero, int[] place) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor gamma, Tensor beta, float eps, float[] grids) -> Tensor[]");
  m.def("geglu(Tensor x, float[] grid) -> Tensor");
  m.def("attention(Tensor query, Tensor key, Tensor value, int heads, float scale, float[] grid) -> Tensor");
}

TORCH_LIBRARY_IMPL(cachequant, CPU, m) {
  m.impl("quantize", quantize);
  m.impl("group_norm", group_norm);
  m.impl("add_terms", add_terms);
  m.impl("window_sums", window_sums);
  m.impl("layer_norm", layer_norm);
  m.impl("geglu", geglu);
  m.impl("attention", attention);
}
