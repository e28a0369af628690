// The epilogue of interface.h as a visitor tree for CUTLASS 3.x, shared by the sm90 product and convolution.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"

#include "interface.h"

#ifndef CQ_OUT
#define CQ_OUT cutlass::half_t
#endif

namespace cq {

using Out = CQ_OUT;
using Tile = cute::Shape<cute::Int<CQ_TILE_M>, cute::Int<CQ_TILE_N>, cute::Int<CQ_TILE_K>>;
using Cluster = cute::Shape<cute::Int<CQ_CLUSTER_M>, cute::_1, cute::_1>;

constexpr int kAlignOut = 16 / sizeof(Out);
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

namespace fusion = cutlass::epilogue::fusion;
template <class T>
using MultiplyAdd = fusion::Sm90Compute<cutlass::homogeneous_multiply_add, T, float, kRound>;
using Row = fusion::Sm90RowBroadcast<0, Tile, float>;
using Column = fusion::Sm90ColBroadcast<0, Tile, float>;

using Shift = fusion::Sm90EVT<MultiplyAdd<float>, Column, Row, Row>;
inline typename Shift::Arguments shift(const CqEpilogue& e) { return {{e.row_sum}, {e.offset}, {e.shift}, {}}; }

#ifdef CQ_GELU_TANH

using Source = void;
constexpr int kAlignSource = 1;

struct Grid {
  const float* values;  // inverse scale, zero point, lowest and highest integer
};

// The integer of GELU(y), in its form with tanh: y / (1 + exp(-2u)). Clipped and rounded before the zero point is added, as in
// triton_pointwise.round_to_grid; adding and taking away 1.5 * 2^23 rounds to nearest even.
template <class T>
struct GeluToGrid {
  using Arguments = Grid;

  template <class Values>
  CUTLASS_DEVICE Values operator()(const Values& y, const Grid& grid) const {
    const float inverse = grid.values[0], zero = grid.values[1];
    const float low = grid.values[2] - zero, high = grid.values[3] - zero;
    Values u;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Values::kElements; ++i) {
      float cubic = 1.5957691216057308f * (y[i] + 0.044715f * y[i] * y[i] * y[i]);
      float scaled = __fdividef(y[i], 1.0f + __expf(fminf(-cubic, 80.0f))) * inverse;
      u[i] = ((fminf(fmaxf(scaled, low), high) + 12582912.0f) - 12582912.0f) + zero;
    }
    return u;
  }
};

using Linear = fusion::Sm90EVT<MultiplyAdd<float>, Row, fusion::Sm90AccFetch, Shift>;
using Visitor = fusion::Sm90EVT<fusion::Sm90Compute<GeluToGrid, Out, float, kRound>, Linear>;

inline typename Visitor::Arguments visitor(const CqEpilogue& e) {
  typename Linear::Arguments linear{{e.scale}, {}, shift(e), {}};
  return {linear, {e.grid}};
}

inline const Source* source(const CqEpilogue&) { return nullptr; }

#else

using Source = cute::conditional_t<cute::is_same_v<Out, int8_t>, cutlass::half_t, Out>;
constexpr int kAlignSource = 16 / sizeof(Source);

using Added = fusion::Sm90EVT<MultiplyAdd<float>, fusion::Sm90ScalarBroadcast<float>, fusion::Sm90SrcFetch<Source>, Shift>;
using Visitor = fusion::Sm90EVT<MultiplyAdd<Out>, Row, fusion::Sm90AccFetch, Added>;

inline typename Visitor::Arguments visitor(const CqEpilogue& e) {
  float beta = e.source ? e.beta : 0.0f;  // a zero beta skips the load
  typename Added::Arguments added{{{beta}}, {}, shift(e), {}};
  return {{e.scale}, {}, added, {}};
}

// Where the kernel's descriptor of the source points; without one, any address of the right alignment.
inline const Source* source(const CqEpilogue& e) {
  return static_cast<const Source*>(e.source ? e.source : e.out);
}

#endif

template <class Device>
int run(typename Device::Arguments& arguments, const CqLaunch& launch) {
  Device device;
  if (auto status = Device::can_implement(arguments); status != cutlass::Status::kSuccess) return int(status);
  if (int64_t(Device::get_workspace_size(arguments)) > launch.workspace_bytes) {
    return int(cutlass::Status::kErrorWorkspaceNull);
  }
  auto stream = static_cast<cudaStream_t>(launch.stream);
  auto status = device.initialize(arguments, launch.workspace, stream);
  if (status == cutlass::Status::kSuccess) status = device.run(stream);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return kCqCudaError + int(error);
  return int(status);
}

}  // namespace cq
