// 3×3 convolutions of 8-bit integers by Winograd's F(4×4, 3×3), without rounding: cachequant/kernels/winograd.py has the
// mathematics and what every operand is. Needs AVX-512 with VNNI; elsewhere the operator does not exist. Sums wrap: -fwrapv.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>

namespace {

using at::Tensor;

constexpr int64_t kPoints = 36;   // products per tile and pair of channels
constexpr int64_t kOutputs = 64;  // output channels at a time, four registers
constexpr int64_t kRows = 6;      // tiles at a time
constexpr int64_t kBlock = 48;    // tiles whose sums stay in the core's cache
constexpr int64_t kChunk = 192;   // tiles transformed before they are multiplied, and more for many threads
constexpr int64_t kLargest = 768;
constexpr int32_t kCentre = 128;  // taken from every input, which halves the largest sum
constexpr int32_t kNinth = 954437177;  // 9 * kNinth = 1 modulo 2^32

typedef int16_t Shorts __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// Six values a step apart -> B^T d, in place.
inline void transform_image(Shorts* d, int step) {
  const Shorts d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  const Shorts a = d4 - (d2 << 2), b = d3 - (d1 << 2), c = d4 - d2, e = d3 - d1;
  d[0] = ((d[0] - d2) << 2) + c;
  d[step] = a + b;
  d[2 * step] = a - b;
  d[3 * step] = c + e + e;
  d[4 * step] = c - e - e;
  d[5 * step] = (d[5 * step] - d3) - (e << 2);
}

// Three weights -> D G g, six values a step apart.
inline void transform_weight(Shorts g0, Shorts g1, Shorts g2, Shorts* u, int step) {
  const Shorts near = g0 + g2, far = g0 + (g2 << 2), twice = g1 + g1;
  u[0] = g0;
  u[step] = near + g1;
  u[2 * step] = near - g1;
  u[3 * step] = far + twice;
  u[4 * step] = far - twice;
  u[5 * step] = g2;
}

// Six sums a step apart -> 24 A^T D^-1 m, four values an `out_step` apart.
inline void transform_sums(const Integers* m, int step, Integers* z, int out_step) {
  const Integers m0 = m[0], m5 = m[5 * step];
  const Integers s1 = m[step] + m[2 * step], d1 = (m[step] - m[2 * step]) << 2;
  const Integers s2 = m[3 * step] + m[4 * step], d2 = (m[3 * step] - m[4 * step]) << 1;
  z[0] = ((m0 - s1) << 2) + m0 + m0 + s2;
  z[out_step] = d2 - d1;
  z[2 * out_step] = (s2 - s1) << 2;
  z[3 * out_step] = (d2 << 2) - d1 + ((m5 + m5 + m5) << 3);
}

// m [kTiles, 64] = v [kTiles, 2 pairs] u [pairs, 64, 2], modulo 2^32; rows of v are a stride apart.
template <int kTiles>
inline void multiply_tiles(const int16_t* v, int64_t stride, const int16_t* u, int64_t pairs, int32_t* m) {
  __m512i sums[kTiles][4];
  #pragma GCC unroll 6
  for (int r = 0; r < kTiles; ++r)
    #pragma GCC unroll 6
    for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_setzero_si512();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i right[4];
    #pragma GCC unroll 6
    for (int j = 0; j < 4; ++j) right[j] = _mm512_loadu_si512(u + p * 2 * kOutputs + 32 * j);
    #pragma GCC unroll 6
    for (int r = 0; r < kTiles; ++r) {
      const __m512i left = _mm512_set1_epi32(load<int32_t>(v + r * stride + 2 * p));
      #pragma GCC unroll 6
      for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_dpwssd_epi32(sums[r][j], left, right[j]);
    }
  }
  #pragma GCC unroll 6
  for (int r = 0; r < kTiles; ++r)
    #pragma GCC unroll 6
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(m + r * kOutputs + 16 * j, sums[r][j]);
}

void multiply(const int16_t* v, int64_t stride, const int16_t* u, int64_t pairs, int32_t* m, int64_t rows) {
  for (; rows >= kRows; rows -= kRows, v += kRows * stride, m += kRows * kOutputs)
    multiply_tiles<kRows>(v, stride, u, pairs, m);
  switch (rows) {
    case 5: return multiply_tiles<5>(v, stride, u, pairs, m);
    case 4: return multiply_tiles<4>(v, stride, u, pairs, m);
    case 3: return multiply_tiles<3>(v, stride, u, pairs, m);
    case 2: return multiply_tiles<2>(v, stride, u, pairs, m);
    case 1: return multiply_tiles<1>(v, stride, u, pairs, m);
    default: return;
  }
}

struct Tile {
  int64_t image, top, left;
};

struct Convolution {
  const uint8_t* input;  // [batch, height, width, depth]
  const int8_t* weights;  // [blocks, depth, 9, 64]
  const int16_t* offsets;  // [blocks, 64], or none
  const int32_t* totals;  // [outputs]
  const float *scale, *bias;  // [outputs]; bias may be none
  float* output;  // [batch, height, width, outputs]
  int64_t batch, height, width, depth, outputs, slice;
  int32_t zero;
  float step;  // of the input's grid
  int64_t down = (height + 3) / 4, across = (width + 3) / 4, tiles = batch * down * across;
  int64_t plane = kBlock * depth + 32;  // of one point in transformed images, off the period of the cache's sets
  int64_t sums_plane = kBlock * kOutputs + 16;

  Tile tile(int64_t index) const {
    const int64_t rest = index % (down * across);
    return {index / (down * across), rest / across * 4, rest % across * 4};
  }

  // Pixel of the 6×6 window of a tile; none outside the image.
  const uint8_t* pixel(const Tile& tile, int64_t y, int64_t x) const {
    const int64_t row = tile.top + y - 1, column = tile.left + x - 1;
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    return inside ? input + ((tile.image * height + row) * width + column) * depth : nullptr;
  }

  // Tiles first + [begin, end) -> v [tiles / 48, 36, 48, depth].
  void transform_images(int64_t first, int64_t begin, int64_t end, int16_t* v) const {
    const __m256i border = _mm256_set1_epi8(static_cast<char>(zero));
    const Shorts centre = Shorts{} + static_cast<int16_t>(kCentre);
    for (int64_t t = begin; t < end; ++t) {
      const Tile here = tile(first + t);
      const uint8_t* from[kPoints];
      for (int i = 0; i < kPoints; ++i) from[i] = pixel(here, i / 6, i % 6);
      int16_t* to = v + t / kBlock * kPoints * plane + t % kBlock * depth;
      for (int64_t k = 0; k < depth; k += 32) {
        Shorts d[kPoints];
        for (int i = 0; i < kPoints; ++i)
          d[i] = (Shorts)_mm512_cvtepu8_epi16(from[i] == nullptr ? border : load<__m256i>(from[i] + k)) - centre;
        for (int x = 0; x < 6; ++x) transform_image(d + x, 6);
        for (int y = 0; y < 6; ++y) transform_image(d + 6 * y, 1);
        for (int i = 0; i < kPoints; ++i) store(to + i * plane + k, d[i]);
      }
    }
  }

  // Input channels [k, k + count) of 64 outputs -> u [36, count / 2, 64, 2].
  void transform_weights(int64_t block, int64_t k, int64_t count, int16_t* u) const {
    const int8_t* from = weights + (block * depth + k) * 9 * kOutputs;
    for (int64_t pair = 0; pair < count / 2; ++pair)
      for (int half = 0; half < 2; ++half) {
        const Shorts offset = offsets == nullptr ? Shorts{} : load<Shorts>(offsets + block * kOutputs + 32 * half);
        Shorts made[2][kPoints];
        for (int j = 0; j < 2; ++j) {
          Shorts g[9], columns[18];
          for (int i = 0; i < 9; ++i)
            g[i] = (Shorts)_mm512_cvtepi8_epi16(load<__m256i>(from + ((2 * pair + j) * 9 + i) * kOutputs + 32 * half)) + offset;
          for (int x = 0; x < 3; ++x) transform_weight(g[x], g[3 + x], g[6 + x], columns + x, 3);
          for (int y = 0; y < 6; ++y) transform_weight(columns[3 * y], columns[3 * y + 1], columns[3 * y + 2], made[j] + 6 * y, 1);
        }
        for (int i = 0; i < kPoints; ++i) {  // channels are stored so that interleaving puts them in order
          int16_t* to = u + (i * count / 2 + pair) * 2 * kOutputs + kOutputs * half;
          store(to, _mm512_unpacklo_epi16((__m512i)made[0][i], (__m512i)made[1][i]));
          store(to + 32, _mm512_unpackhi_epi16((__m512i)made[0][i], (__m512i)made[1][i]));
        }
      }
  }

  // Sums of one tile and 16 outputs -> its 4×4 pixels, exact integers: added to `kept` [16, 64] of earlier slices where
  // there are any, and kept there or, with the last slice, written.
  void finish(const int32_t* m, int64_t index, int64_t channel, int32_t* kept, bool earlier, bool last) const {
    Integers sums[kPoints], half[24], z[16];
    for (int i = 0; i < kPoints; ++i) sums[i] = load<Integers>(m + i * sums_plane);
    for (int x = 0; x < 6; ++x) transform_sums(sums + x, 6, half + x, 6);
    for (int y = 0; y < 4; ++y) transform_sums(half + 6 * y, 1, z + 4 * y, 1);
    for (int i = 0; i < 16; ++i) {
      z[i] = (z[i] * kNinth) >> 6;  // 576 times the result modulo 2^32 -> the result
      if (earlier) z[i] += load<Integers>(kept + i * kOutputs);
      if (!last) store(kept + i * kOutputs, z[i]);
    }
    if (last) write(z, tile(index), channel);
  }

  void write(const Integers* z, const Tile& here, int64_t channel) const {
    const Integers moved = load<Integers>(totals + channel) * (kCentre - zero);
    const __m512 factor = load<__m512>(scale + channel) * step;
    const __m512 shift = bias == nullptr ? _mm512_setzero_ps() : load<__m512>(bias + channel);
    for (int i = 0; i < 16; ++i) {
      const int64_t row = here.top + i / 4, column = here.left + i % 4;
      if (row >= height || column >= width) continue;
      const __m512 whole = _mm512_cvtepi32_ps((__m512i)(z[i] + moved));
      store(output + ((here.image * height + row) * width + column) * outputs + channel, _mm512_fmadd_ps(whole, factor, shift));
    }
  }

  // 64 outputs of the `count` tiles from `first` on; blocks of tiles part, part + parts, part + 2 parts, ...
  void run(int64_t block, int64_t first, int64_t count, int64_t part, int64_t parts, const int16_t* v, int16_t* u, int32_t* m,
           int32_t* kept) const {
    for (int64_t k = 0; k < depth; k += slice) {
      const int64_t channels = std::min(slice, depth - k);
      transform_weights(block, k, channels, u);
      for (int64_t start = part * kBlock; start < count; start += parts * kBlock) {
        const int64_t rows = std::min(kBlock, count - start);
        for (int i = 0; i < kPoints; ++i)
          multiply(v + (start / kBlock * kPoints + i) * plane + k, depth, u + i * channels * kOutputs, channels / 2,
                   m + i * sums_plane, rows);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t o = 0; o < kOutputs && block * kOutputs + o < outputs; o += 16)
            finish(m + r * kOutputs + o, first + start + r, block * kOutputs + o, kept + (start + r) * 16 * kOutputs + o, k > 0,
                   k + channels == depth);
      }
    }
  }
};

template <class T>
T* room(Tensor& keep, int64_t count) {  // 64-byte aligned memory that lives as long as `keep`
  keep = at::empty({count * static_cast<int64_t>(sizeof(T))}, at::kByte);
  return reinterpret_cast<T*>(keep.mutable_data_ptr<uint8_t>());
}

Tensor winograd(const Tensor& q, double step, int64_t zero, const Tensor& weights, const std::optional<Tensor>& offsets, const Tensor& totals,
                const Tensor& scale, const std::optional<Tensor>& bias, int64_t slice) {
  const int64_t outputs = scale.numel(), depth = q.dim() == 4 ? q.size(3) : 0, blocks = (outputs + kOutputs - 1) / kOutputs;
  TORCH_CHECK(q.dim() == 4 && q.scalar_type() == at::kByte && q.is_contiguous() && depth > 0 && depth % 32 == 0,
              "winograd: q must be uint8 [B, H, W, I], I a multiple of 32");
  TORCH_CHECK(weights.scalar_type() == at::kChar && weights.is_contiguous() &&
                  weights.sizes() == at::IntArrayRef({blocks, depth, 9, kOutputs}) && outputs % 16 == 0,
              "winograd: weights must be int8 [O / 64, I, 9, 64], O a multiple of 16");
  TORCH_CHECK(!offsets || (offsets->scalar_type() == at::kShort && offsets->is_contiguous() && offsets->numel() == blocks * kOutputs),
              "winograd: offsets must be int16 [O / 64, 64]");
  TORCH_CHECK(totals.scalar_type() == at::kInt && totals.is_contiguous() && totals.numel() == outputs,
              "winograd: totals must be int32 [O]");
  for (const Tensor* t : {&scale, bias ? &*bias : &scale})
    TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == outputs, "winograd: scale and bias must be float32 [O]");
  TORCH_CHECK(slice > 0 && slice % 2 == 0 && zero >= 0 && zero <= 255, "winograd: slice must be even, zero in [0, 255]");
  Tensor out = at::empty({q.size(0), q.size(1), q.size(2), outputs}, q.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  const Convolution job{q.const_data_ptr<uint8_t>(), weights.const_data_ptr<int8_t>(), offsets ? offsets->const_data_ptr<int16_t>() : nullptr,
                        totals.const_data_ptr<int32_t>(), scale.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr,
                        out.mutable_data_ptr<float>(), q.size(0), q.size(1), q.size(2), depth, outputs, std::min(slice, depth),
                        static_cast<int32_t>(zero), static_cast<float>(step)};
  const int64_t threads = at::get_num_threads();
  const int64_t shares = threads / std::gcd(blocks, threads);  // every thread gets as many of blocks times shares
  const int64_t chunk = std::min({std::max(kChunk, shares * kBlock), kLargest, job.tiles});
  Tensor images;
  int16_t* v = room<int16_t>(images, (chunk + kBlock - 1) / kBlock * kPoints * job.plane);
  for (int64_t first = 0; first < job.tiles; first += chunk) {
    const int64_t count = std::min(chunk, job.tiles - first), parts = std::min(shares, (count + kBlock - 1) / kBlock);
    at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) { job.transform_images(first, begin, end, v); });
    at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
      Tensor memory[3];
      int16_t* u = room<int16_t>(memory[0], kPoints * job.slice * kOutputs);
      int32_t* m = room<int32_t>(memory[1], kPoints * job.sums_plane);
      int32_t* kept = room<int32_t>(memory[2], job.slice < depth ? chunk * 16 * kOutputs : 0);
      for (int64_t i = begin; i < end; ++i) job.run(i / parts, first, count, i % parts, parts, v, u, m, kept);
    });
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cachequant, m) {
  m.def("winograd(Tensor q, float step, int zero, Tensor weights, Tensor? offsets, Tensor totals, Tensor scale, Tensor? bias, int slice) -> Tensor");
}

TORCH_LIBRARY_IMPL(cachequant, CPU, m) { m.impl("winograd", winograd); }

#endif
