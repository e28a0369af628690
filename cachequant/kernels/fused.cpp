// What stands between two integer products on the CPU, in one pass each: normalise, activate, quantise.
//
// Portable C++20 over ATen's thread pool. Every operator has a reference in plain torch, cachequant/kernels/fused.py, and is
// tested against it. Tensors are float32, channels last: [B, P, C] with P pixels.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "vectors.h"

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;
using namespace cachequant;

struct Identity {
  Vector operator()(Vector x) const { return x; }
};

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

}  // namespace

TORCH_LIBRARY(cachequant, m) {
  m.def("quantize(Tensor x, float[] grid) -> Tensor");
  m.def("group_norm(Tensor x, Tensor? other, Tensor? sums, Tensor? columns, Tensor? skip, Tensor? shift, Tensor gamma, "
        "Tensor beta, int groups, float eps, bool activate, float[] grids) -> Tensor[]");
  m.def("add_terms(Tensor(a!) x, Tensor? other, Tensor sums, Tensor columns) -> ()");
  m.def("window_sums(Tensor q, int zero, int[] place) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor gamma, Tensor beta, float eps, float[] grids) -> Tensor[]");
  m.def("geglu(Tensor x, float[] grid) -> Tensor");
}

TORCH_LIBRARY_IMPL(cachequant, CPU, m) {
  m.impl("quantize", quantize);
  m.impl("group_norm", group_norm);
  m.impl("add_terms", add_terms);
  m.impl("window_sums", window_sums);
  m.impl("layer_norm", layer_norm);
  m.impl("geglu", geglu);
}
