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
using Source = cute::conditional_t<cute::is_same_v<Out, int8_t>, cutlass::half_t, Out>;
using Tile = cute::Shape<cute::Int<CQ_TILE_M>, cute::Int<CQ_TILE_N>, cute::Int<CQ_TILE_K>>;
using Cluster = cute::Shape<cute::Int<CQ_CLUSTER_M>, cute::_1, cute::_1>;

constexpr int kAlignOut = 16 / sizeof(Out);
constexpr int kAlignSource = 16 / sizeof(Source);
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

namespace fusion = cutlass::epilogue::fusion;
template <class T>
using MultiplyAdd = fusion::Sm90Compute<cutlass::homogeneous_multiply_add, T, float, kRound>;
using Row = fusion::Sm90RowBroadcast<0, Tile, float>;
using Column = fusion::Sm90ColBroadcast<0, Tile, float>;

using Shift = fusion::Sm90EVT<MultiplyAdd<float>, Column, Row, Row>;
using Added = fusion::Sm90EVT<MultiplyAdd<float>, fusion::Sm90ScalarBroadcast<float>, fusion::Sm90SrcFetch<Source>, Shift>;
using Visitor = fusion::Sm90EVT<MultiplyAdd<Out>, Row, fusion::Sm90AccFetch, Added>;

inline typename Visitor::Arguments visitor(const CqEpilogue& e) {
  float beta = e.source ? e.beta : 0.0f;  // a zero beta skips the load
  typename Shift::Arguments shift{{e.row_sum}, {e.offset}, {e.shift}, {}};
  typename Added::Arguments added{{{beta}}, {}, shift, {}};
  return {{e.scale}, {}, added, {}};
}

// Where the kernel's descriptor of the source points; without one, any address of the right alignment.
inline const Source* source(const CqEpilogue& e) {
  return static_cast<const Source*>(e.source ? e.source : e.out);
}

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
