// int8 forward convolution (NHWC) for Hopper: im2col TMA loads, wgmma; one tile shape per compilation (see build.py).
// TMA fills what lies outside the image with 0, which need not stand for 0: images come padded with their zero point.
#include "sm90_epilogue.h"

#include "cutlass/conv/collective/collective_builder.hpp"
#include "cutlass/conv/convnd_problem_shape.hpp"
#include "cutlass/conv/convolution.h"
#include "cutlass/conv/device/conv_universal_adapter.hpp"
#include "cutlass/conv/dispatch_policy.hpp"
#include "cutlass/conv/kernel/conv_universal.hpp"

namespace {

using Nhwc = cutlass::layout::TensorNHWC;
constexpr auto kForward = cutlass::conv::Operator::kFprop;
using TileOf = cute::Shape<cute::Int<CQ_TILE_M>, cute::Int<CQ_TILE_N>, cute::Shape<cute::Int<CQ_TILE_K>>>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cq::Tile, cq::Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float,
    cq::Source, Nhwc, cq::kAlignSource, cq::Out, Nhwc, cq::kAlignOut,
    cutlass::epilogue::TmaWarpSpecialized, cq::Visitor>::CollectiveOp;

using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kForward, int8_t, Nhwc, 16, int8_t, Nhwc, 16, int32_t,
    TileOf, cq::Cluster,
    cutlass::conv::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;

using Problem = cutlass::conv::ConvProblemShape<kForward, 2>;
using Kernel = cutlass::conv::kernel::ConvUniversal<Problem, Mainloop, Epilogue>;
using Device = cutlass::conv::device::ConvUniversalAdapter<Kernel>;

Problem problem(const CqConv& p) {
  return Problem(cutlass::conv::Mode::kCrossCorrelation, {p.batch, p.height, p.width, p.channels},
                 {p.n, p.rows, p.columns, p.channels}, {0, 0}, {0, 0}, {p.stride_h, p.stride_w}, {1, 1}, 1);
}

Device::Arguments arguments(const CqConv& p, const CqLaunch& launch) {
  Problem shape = problem(p);
  typename Kernel::StrideD stride{};  // ((Q, P, N), K, 1) from the packed strides of [N, P, Q, K]
  cute::for_each(cute::make_seq<3>{}, [&](auto i) { cute::get<0, i>(stride) = shape.stride_C[2 - i]; });
  cutlass::KernelHardwareInfo hardware{launch.device, launch.multiprocessors};
  return {shape,
          {p.x, p.w},
          {cq::visitor(p.epilogue), cq::source(p.epilogue), stride, static_cast<cq::Out*>(p.epilogue.out), stride},
          hardware};
}

}  // namespace

CQ_EXPORT int64_t cq_workspace(const CqConv* p, const CqLaunch* launch) {
  return int64_t(Device::get_workspace_size(arguments(*p, *launch)));
}

CQ_EXPORT int cq_run(const CqConv* p, const CqLaunch* launch) {
  auto made = arguments(*p, *launch);
  return cq::run<Device>(made, *launch);
}

CQ_EXPORT int cq_shared_memory() { return int(Kernel::SharedStorageSize); }
