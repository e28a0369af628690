// int8 matrix product for Hopper: TMA loads, wgmma, a persistent grid; one tile shape per compilation (see build.py).
#include "sm90_epilogue.h"

#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace {

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

#if CQ_COOPERATIVE
using MainSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using EndSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
#else
using MainSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using EndSchedule = cutlass::epilogue::TmaWarpSpecialized;
#endif

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cq::Tile, cq::Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float,
    cq::Source, RowMajor, cq::kAlignSource, cq::Out, RowMajor, cq::kAlignOut, EndSchedule, cq::Visitor>::CollectiveOp;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,
    int8_t, RowMajor, 16, int8_t, ColumnMajor, 16, int32_t, cq::Tile, cq::Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
    MainSchedule>::CollectiveOp;

using Kernel = cutlass::gemm::kernel::GemmUniversal<
    cute::Shape<int, int, int, int>, Mainloop, Epilogue, cutlass::gemm::PersistentScheduler>;
using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

Device::Arguments arguments(const CqGemm& p, const CqLaunch& launch) {
  auto rows = [](int64_t pitch) { return cute::make_stride(pitch, cute::Int<1>{}, int64_t(0)); };
  cutlass::KernelHardwareInfo hardware{launch.device, launch.multiprocessors};
  return {cutlass::gemm::GemmUniversalMode::kGemm,
          {p.m, p.n, p.k, 1},
          {p.x, rows(p.k), p.w, rows(p.k)},
          {cq::visitor(p.epilogue), cq::source(p.epilogue), rows(p.n), static_cast<cq::Out*>(p.epilogue.out), rows(p.n)},
          hardware};
}

}  // namespace

CQ_EXPORT int64_t cq_workspace(const CqGemm* p, const CqLaunch* launch) {
  return int64_t(Device::get_workspace_size(arguments(*p, *launch)));
}

CQ_EXPORT int cq_run(const CqGemm* p, const CqLaunch* launch) {
  auto made = arguments(*p, *launch);
  return cq::run<Device>(made, *launch);
}

CQ_EXPORT int cq_shared_memory() { return int(Kernel::SharedStorageSize); }
