// Attention in blocks with a running softmax (Dao et al. 2022): no [N, M] matrix is ever written to memory.
//
// With AVX-512 and VNNI queries and keys are multiplied as integers of 12 to 14 bits and a sign, on a grid for each query and one
// for all keys of a head, twice as fast as in float32; elsewhere in float32. Either way an operand is 32-bit words: one value
// or two.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include <limits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

using at::Tensor;
using namespace cachequant;

constexpr int64_t kQueries = 48, kKeys = 512, kVectors = 4, kPanel = kVectors * kLanes;
constexpr float kLog2E = 1.44269504f;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// 2^x for x <= 0, relative error 2e-7 down to 2^-126.
inline Vector power_of_two(Vector x) {
  const Vector shifted = maximum(x, all(-126.0f)) + kRounder;
  const Vector r = maximum(x, all(-126.0f)) - (shifted - kRounder);
  Vector p = r * 1.326472711e-3f + 9.671512855e-3f;
  p = p * r + 5.5507337455e-2f;
  p = p * r + 2.4022242082e-1f;
  p = p * r + 6.9314697760e-1f;
  p = p * r + 1.0f;
  return reinterpret_cast<Vector>(bits(p) + (bits(shifted) << 23));
}

// A row of queries or keys as words; `grid` is what a unit of it is worth.

struct Floats {
  typedef float Word;
  typedef Vector Sums;
  static constexpr float kLowest = std::numeric_limits<float>::lowest();

  static int64_t words(int64_t width) { return width; }
  static float grid(const float*, int64_t) { return 1.0f; }
  static void write(const float* row, int64_t width, float, float* words) { std::copy(row, row + width, words); }
  static Vector value(Vector sums) { return sums; }
  static void add(Vector& sums, float left, const float* right) { sums += left * load(right); }
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Pairs {
  typedef int32_t Word;
  typedef Integers Sums;
  static constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();

  static int64_t words(int64_t width) { return (width + 1) / 2; }

  // The finest grid on which a value fits 16 bits and the row's length stays below 46,000 (and half the root of 512 by rounding):
  // the product of two such rows fits 32 bits (Cauchy and Schwarz).
  static float grid(const float* row, int64_t width) {
    Vector top{}, square{};
    vectors(width, [&](int64_t i, int64_t count) {
      const Vector x = load(row + i, count);
      top = maximum(top, maximum(x, -x));
      square += x * x;
    });
    return std::max(std::max(largest_of(top) / 32767.0f, std::sqrt(sum_of(square)) / 46000.0f), 1e-30f);
  }

  static void write(const float* row, int64_t width, float grid, int32_t* words) {
    const float inverse = 1.0f / grid;
    int16_t* out = reinterpret_cast<int16_t*>(words);
    vectors(width, [&](int64_t i, int64_t count) {
      const Integers whole = bits(load(row + i, count) * inverse + kRounder) - std::bit_cast<int32_t>(kRounder);
      typedef int16_t Shorts __attribute__((vector_size(kLanes * sizeof(int16_t))));
      store(out + i, __builtin_convertvector(whole, Shorts), count);
    });
  }

  static Vector value(Integers sums) { return __builtin_convertvector(sums, Vector); }
  static void add(Integers& sums, int32_t left, const int32_t* right) {
    sums = (Integers)_mm512_dpwssd_epi32((__m512i)sums, _mm512_set1_epi32(left), _mm512_loadu_si512(right));
  }
};
typedef Pairs Fast;
#else
typedef Floats Fast;
#endif

inline Integers lanes_below(int64_t count) {
  Integers lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count);
}

// Scores of kRowCount queries and kCount vectors of keys, of which the last has `inside` keys; the largest of each lane so far.
template <class Kind, int kRowCount, int kCount>
inline void score(const typename Kind::Word* query, int64_t stride, const typename Kind::Word* panel, int64_t words,
                  typename Kind::Word* out, typename Kind::Sums* highest, int64_t inside) {
  typename Kind::Sums sums[kRowCount][kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) sums[r][v] = typename Kind::Sums{};
  for (int64_t k = 0; k < words; ++k)
#pragma GCC unroll 8
    for (int r = 0; r < kRowCount; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) Kind::add(sums[r][v], query[r * stride + k], panel + k * kPanel + v * kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; ++r) {
    if (inside < kLanes) sums[r][kCount - 1] = lanes_below(inside) ? sums[r][kCount - 1] : typename Kind::Sums{} + Kind::kLowest;
    auto top = highest[r];
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      top = top > sums[r][v] ? top : sums[r][v];
      store(out + r * kKeys + v * kLanes, sums[r][v]);
    }
    highest[r] = top;
  }
}

template <class Kind, int kCount>
void score_rows(const typename Kind::Word* query, int64_t stride, const typename Kind::Word* panel, int64_t words,
                typename Kind::Word* out, typename Kind::Sums* highest, int64_t rows, int64_t inside) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6)
    score<Kind, 6, kCount>(query + r * stride, stride, panel, words, out + r * kKeys, highest + r, inside);
  for (; r < rows; ++r)
    score<Kind, 1, kCount>(query + r * stride, stride, panel, words, out + r * kKeys, highest + r, inside);
}

// scores [rows, 512] of `keys` keys, at most a panel's.
template <class Kind>
void score_panel(const typename Kind::Word* query, int64_t stride, const typename Kind::Word* panel, int64_t words,
                 typename Kind::Word* out, typename Kind::Sums* highest, int64_t rows, int64_t keys) {
  const int64_t inside = (keys - 1) % kLanes + 1;
  switch ((keys + kLanes - 1) / kLanes) {
    case 4: return score_rows<Kind, 4>(query, stride, panel, words, out, highest, rows, inside);
    case 3: return score_rows<Kind, 3>(query, stride, panel, words, out, highest, rows, inside);
    case 2: return score_rows<Kind, 2>(query, stride, panel, words, out, highest, rows, inside);
    default: return score_rows<Kind, 1>(query, stride, panel, words, out, highest, rows, inside);
  }
}

// Scores of a row -> 2^(factor * score - top), in place; updates the row's maximum and sum, returns the factor by which
// earlier blocks shrink.
template <class Kind>
float softmax_row(float* row, typename Kind::Sums highest, float factor, int64_t keys, float& top, float& sum) {
  typedef typename Kind::Sums Sums;
  const float before = top;
  top = std::max(top, largest_of(Kind::value(highest)) * factor);
  Vector total{};
  vectors(keys, [&](int64_t j, int64_t count) {
    Vector e = power_of_two(Kind::value(reinterpret_cast<Sums>(load(row + j))) * factor - top);
    if (count < kLanes) e = lanes_below(count) ? e : Vector{};
    total += e;
    store(row + j, e);
  });
  const float shrink = power_of_two(all(before - top))[0];
  sum = sum * shrink + sum_of(total);
  return shrink;
}

// c [kRowCount, width] (+)= a [kRowCount, depth] b [depth, width]; the width is kCount vectors, and half a one more if asked.
template <int kRowCount, int kCount, bool kHalf>
inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth, bool add) {
  typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
  Vector sums[kRowCount][kCount];
  Half rest[kRowCount];
#pragma GCC unroll 12
  for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) sums[r][v] = add ? load(c + r * ldc + v * kLanes) : Vector{};
    rest[r] = Half{};
    if (kHalf && add) std::memcpy(&rest[r], c + r * ldc + kCount * kLanes, sizeof(Half));
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[kCount];
    Half end{};
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) right[v] = load(b + k * ldb + v * kLanes);
    if (kHalf) std::memcpy(&end, b + k * ldb + kCount * kLanes, sizeof(Half));
#pragma GCC unroll 12
    for (int r = 0; r < kRowCount; ++r) {
      const float left = a[r * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) sums[r][v] += left * right[v];
      if (kHalf) rest[r] += left * end;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) store(c + r * ldc + v * kLanes, sums[r][v]);
    if (kHalf) std::memcpy(c + r * ldc + kCount * kLanes, &rest[r], sizeof(Half));
  }
}

template <int kCount, bool kHalf>
void columns(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t depth,
             bool add) {
  constexpr int kStep = 24 / (kCount + kHalf) > 12 ? 12 : 24 / (kCount + kHalf);
  int64_t r = 0;
  for (; r + kStep <= rows; r += kStep) tile<kStep, kCount, kHalf>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, add);
  for (; r + 4 <= rows; r += 4) tile<4, kCount, kHalf>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, add);
  for (; r < rows; ++r) tile<1, kCount, kHalf>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, add);
}

// c [rows, width] (+)= a [rows, depth] b [depth, width]; rows of b and c have room for whole vectors.
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t width,
              int64_t depth, bool add) {
  int64_t j = 0;
  for (; j + kPanel <= width; j += kPanel) columns<kVectors, false>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add);
  switch ((width - j + kLanes / 2 - 1) / (kLanes / 2)) {
    case 8: columns<4, false>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add); break;
    case 7: columns<3, true>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add); break;
    case 6: columns<3, false>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add); break;
    case 5: columns<2, true>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add); break;
    case 4: columns<2, false>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add); break;
    case 3: columns<1, true>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add); break;
    case 2:
    case 1: columns<1, false>(a, lda, b + j, ldb, c + j, ldc, rows, depth, add); break;
    default: break;
  }
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

// What a head's keys and values become, and room for one block of queries; all of it words of 32 bits.
template <class Kind>
struct Attention {
  typedef typename Kind::Word Word;
  typedef typename Kind::Sums Sums;

  const float *query, *key, *value;
  int64_t batch, heads, queries, keys, width, row_q, row_k, row_v;
  float scale;
  int64_t words = Kind::words(width), row = round_up(words, kLanes);
  int64_t padded_keys = round_up(keys, kLanes), padded_width = round_up(width, kLanes);
  int64_t values_at = round_up(keys, kPanel) * words, grid_at = values_at + padded_keys * padded_width, size = grid_at + 1;

  // Of one head: panels of keys [keys / 64, words, 64], values [padded_keys, padded_width], the grid of the keys.
  void pack(int64_t task, float* packed) const {
    const int64_t b = task / heads, h = task % heads;
    const float *k = key + b * keys * row_k + h * width, *v = value + b * keys * row_v + h * width;
    float grid = 0.0f;
    for (int64_t j = 0; j < keys; ++j) grid = std::max(grid, Kind::grid(k + j * row_k, width));
    packed[grid_at] = grid;
    std::vector<Word> rows(kLanes * row);
    for (int64_t j = 0; j < keys; j += kLanes) {
      const int64_t count = std::min(kLanes, keys - j);
      for (int64_t i = 0; i < count; ++i) Kind::write(k + (j + i) * row_k, width, grid, rows.data() + i * row);
      for (int64_t d = 0; d < words; d += kLanes) {
        Vector square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) square[i] = load(reinterpret_cast<const float*>(rows.data()) + i * row + d);
        transpose(square);
        float* column = packed + j / kPanel * kPanel * words + d * kPanel + j % kPanel;
        for (int64_t i = 0; i < std::min(kLanes, words - d); ++i) store(column + i * kPanel, square[i]);
      }
    }
    for (int64_t j = 0; j < padded_keys; ++j) {
      const int64_t inside = j < keys ? width : 0;
      float* to = packed + values_at + j * padded_width;
      std::copy(v + j * row_v, v + j * row_v + inside, to);
      std::fill(to + inside, to + padded_width, 0.0f);
    }
  }

  // Output rows [begin, end) of one head into out [rows, padded_width].
  void block(int64_t task, int64_t begin, int64_t end, const float* packed, Word* words_q, float* scores, float* out) const {
    const int64_t b = task / heads, h = task % heads, rows = end - begin;
    float top[kQueries], sum[kQueries], factor[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = query + (b * queries + begin + r) * row_q + h * width;
      const float grid = Kind::grid(from, width);
      Kind::write(from, width, grid, words_q + r * row);
      factor[r] = grid * packed[grid_at] * scale * kLog2E;
      top[r] = std::numeric_limits<float>::lowest();
      sum[r] = 0.0f;
    }
    for (int64_t start = 0; start < keys; start += kKeys) {
      const int64_t count = std::min(kKeys, keys - start);
      Sums highest[kQueries];
      std::fill(highest, highest + rows, Sums{} + Kind::kLowest);
      for (int64_t j = 0; j < count; j += kPanel)
        score_panel<Kind>(words_q, row, reinterpret_cast<const Word*>(packed) + (start + j) * words, words,
                          reinterpret_cast<Word*>(scores) + j, highest, rows, std::min(kPanel, count - j));
      for (int64_t r = 0; r < rows; ++r) {
        const float shrink = softmax_row<Kind>(scores + r * kKeys, highest[r], factor[r], count, top[r], sum[r]);
        if (start > 0)
          for (int64_t d = 0; d < padded_width; ++d) out[r * padded_width + d] *= shrink;
      }
      multiply(scores, kKeys, packed + values_at + start * padded_width, padded_width, out, padded_width, rows, width,
               count, start > 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float whole = 1.0f / sum[r];
      for (int64_t d = 0; d < width; ++d) out[r * padded_width + d] *= whole;
    }
  }
};

// Of a row [B, N, C] from the next.
int64_t distance(const Tensor& rows) { return rows.stride(rows.size(1) == 1 ? 0 : 1); }

// softmax(q k^T scale) v per head: q [B, N, H*d], k and v [B, M, H*d], rows may be strided -> [B, N, H*d], integers if a grid is given.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, int64_t heads, double scale,
                 at::ArrayRef<double> grid) {
  for (const Tensor* t : {&query, &key, &value})
    TORCH_CHECK(t->dim() == 3 && t->scalar_type() == at::kFloat && t->stride(2) == 1 &&
                    (t->size(0) == 1 || t->size(1) == 1 || t->stride(0) == t->size(1) * t->stride(1)),
                "attention: expected float32 rows [B, N, C], all the same distance apart");
  TORCH_CHECK(heads > 0, "attention: expected heads");
  const int64_t channels = query.size(2), width = channels / heads;
  TORCH_CHECK(scale >= 0.0 && (grid.empty() || grid.size() == 3), "attention: expected a scale of 0 or more and one grid or none");
  TORCH_CHECK(width * heads == channels && width <= 512 && key.sizes() == value.sizes() && key.size(2) == channels &&
                  key.size(0) == query.size(0), "attention: shapes do not fit");
  const Attention<Fast> job{query.const_data_ptr<float>(), key.const_data_ptr<float>(), value.const_data_ptr<float>(),
                            query.size(0), heads, query.size(1), key.size(1), width,
                            distance(query), distance(key), distance(value), static_cast<float>(scale)};
  const bool quantized = !grid.empty();
  Tensor out = at::empty(query.sizes(), query.options().dtype(quantized ? at::kByte : at::kFloat));
  const int64_t tasks = job.batch * heads, blocks = (job.queries + kQueries - 1) / kQueries;
  // Room for one block of queries.
  struct Room {
    std::vector<Fast::Word> queries;
    std::vector<float> scores, rows;

    explicit Room(const Attention<Fast>& job)
        : queries(kQueries * job.row), scores(kQueries * kKeys), rows(kQueries * job.padded_width) {}
  };
  // Blocks [first, last) of one head, whose operands are `packed`.
  const auto run = [&](int64_t t, int64_t first, int64_t last, const float* packed, Room& room) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * kQueries, end = std::min(begin + kQueries, job.queries);
      job.block(t, begin, end, packed, room.queries.data(), room.scores.data(), room.rows.data());
      for (int64_t r = begin; r < end; ++r) {
        const int64_t place = (t / heads * job.queries + r) * channels + t % heads * width;
        const float* row = room.rows.data() + (r - begin) * job.padded_width;
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
      std::vector<float> packed(job.size);
      Room room(job);
      for (int64_t t = first; t < last; ++t) {
        job.pack(t, packed.data());
        run(t, 0, blocks, packed.data(), room);
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
    Room room(job);
    for (int64_t i = first; i < last; ++i) run(i / blocks, i % blocks, i % blocks + 1, buffer + i / blocks * job.size, room);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cachequant, m) {
  m.def("attention(Tensor query, Tensor key, Tensor value, int heads, float scale, float[] grid) -> Tensor");
}

TORCH_LIBRARY_IMPL(cachequant, CPU, m) { m.impl("attention", attention); }
