// int8 matrix product for Ampere and Ada: mma.sync; one tile shape per compilation (see build.py).
// clang-format off: the visitors' headers need the product's before them
#include "cutlass/cutlass.h"
#include "cutlass/gemm/device/gemm_universal.h"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"
// clang-format on

#include "interface.h"

#ifndef CQ_OUT
#define CQ_OUT cutlass::half_t
#endif

namespace {

namespace evt = cutlass::epilogue::threadblock;
using Out = CQ_OUT;
using Source = cute::conditional_t<cute::is_same_v<Out, int8_t>, cutlass::half_t, Out>;
using TileShape = cutlass::gemm::GemmShape<CQ_TILE_M, CQ_TILE_N, CQ_TILE_K>;
using WarpShape = cutlass::gemm::GemmShape<CQ_TILE_M / 2, CQ_TILE_N / 2, CQ_TILE_K>;
constexpr int kAlignOut = 16 / sizeof(Out);
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

using Map = evt::OutputTileThreadLayout<TileShape, WarpShape, Out, kAlignOut, 1>;
template <class T>
using MultiplyAdd = evt::VisitorCompute<cutlass::homogeneous_multiply_add, T, float, kRound>;
using Row = evt::VisitorRowBroadcast<Map, float, cute::Stride<cute::_0, cute::_1, int32_t>>;
using Column = evt::VisitorColBroadcast<Map, float, cute::Stride<cute::_1, cute::_0, int32_t>>;
using Pitch = cute::Stride<int64_t, cute::_1, int64_t>;

// CUTLASS's load reads through a null pointer; its guard against the matrix's border, given an empty matrix, lets it read
// nothing and gives zeros.
struct Load : evt::VisitorAuxLoad<Map, Source, Pitch> {
  using Base = evt::VisitorAuxLoad<Map, Source, Pitch>;
  using Base::Base;

  template <class Shape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, Shape shape) {
    if (!Base::params_ptr->ptr_aux) cute::get<0>(shape) = 0;
    return Base::get_callbacks(tile, thread, shape);
  }
};
using Shift = evt::Sm80EVT<MultiplyAdd<float>, Column, Row, Row>;
using Added = evt::Sm80EVT<MultiplyAdd<float>, evt::VisitorScalarBroadcast<float>, Load, Shift>;
using Scaled = evt::Sm80EVT<MultiplyAdd<Out>, Row, evt::VisitorAccFetch, Added>;
using Visitor = evt::Sm80EVT<evt::VisitorAuxStore<Map, Out, kRound, Pitch>, Scaled>;

using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
    int8_t, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 16,
    int8_t, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 16,
    Out, cutlass::layout::RowMajor, kAlignOut, int32_t, float,
    cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, TileShape, WarpShape, cutlass::gemm::GemmShape<16, 8, 32>,
    Visitor, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, CQ_STAGES,
    cutlass::arch::OpMultiplyAddSaturate, 1>::GemmKernel;
using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

Device::Arguments arguments(const CqGemm& p) {
  const CqEpilogue& e = p.epilogue;
  float beta = e.source ? e.beta : 0.0f;
  Pitch pitch{int64_t(p.n), {}, int64_t(p.m) * p.n};
  cute::Stride<cute::_0, cute::_1, int32_t> row{{}, {}, p.n};
  typename Shift::Arguments shift{
      {e.row_sum, 0.0f, {{}, {}, p.m}}, {e.offset, 0.0f, row}, {e.shift, 0.0f, row}, {}};
  auto* source = static_cast<Source*>(const_cast<void*>(e.source));
  typename Added::Arguments added{{{beta}}, {source, Source(0), pitch}, shift, {}};
  typename Scaled::Arguments scaled{{e.scale, 0.0f, row}, {}, added, {}};
  typename Visitor::Arguments visitor{scaled, {static_cast<Out*>(e.out), pitch}};
  return Device::Arguments(cutlass::gemm::GemmUniversalMode::kGemm, {p.m, p.n, p.k}, 1, visitor, p.x, p.w, nullptr, nullptr,
                           int64_t(p.m) * p.k, int64_t(p.n) * p.k, 0, 0, p.k, p.k, 0, 0);
}

}  // namespace

CQ_EXPORT int64_t cq_workspace(const CqGemm* p, const CqLaunch*) {
  return int64_t(Device::get_workspace_size(arguments(*p)));
}

CQ_EXPORT int cq_run(const CqGemm* p, const CqLaunch* launch) {
  auto made = arguments(*p);
  Device device;
  if (auto status = Device::can_implement(made); status != cutlass::Status::kSuccess) return int(status);
  auto stream = static_cast<cudaStream_t>(launch->stream);
  auto status = device.initialize(made, launch->workspace, stream);
  if (status == cutlass::Status::kSuccess) status = device.run(stream);
  cudaError_t error = cudaGetLastError();
  return error != cudaSuccess ? kCqCudaError + int(error) : int(status);
}

CQ_EXPORT int cq_shared_memory() { return int(sizeof(typename Kernel::SharedStorage)); }
