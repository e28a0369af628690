// int8 forward convolution (NHWC) for Ampere and Ada: mma.sync; one tile shape per compilation (see build.py).
// clang-format off: the device adapter's header needs the kernel's before it
#include "cutlass/cutlass.h"
#include "cutlass/conv/conv2d_problem_size.h"
#include "cutlass/conv/kernel/default_conv2d_fprop_with_broadcast.h"
#include "cutlass/conv/device/implicit_gemm_convolution_fusion.h"
// clang-format on

#include "interface.h"

#ifndef CQ_OUT
#define CQ_OUT cutlass::half_t
#endif

namespace {

// scale[n]·acc + shift[n] + beta·source. CUTLASS hands this operator one vector over the output channels; it is given the
// channels' numbers (0, 1, 2, ...) there, and reads scale and shift itself.
template <class T>
struct ScaleShift {
  static constexpr int kElementsPerAccess = 16 / sizeof(T);
  static constexpr int kCount = kElementsPerAccess;
  static constexpr bool kIsSingleSource = true, kStoreZ = true, kStoreT = false, kIsHeavy = false;
  using ElementOutput = T;
  using ElementD = T;
  using ElementC = T;
  using ElementZ = T;
  using ElementT = T;
  using ElementAccumulator = int32_t;
  using ElementCompute = float;
  using ElementScalar = float;
  using ElementVector = float;
  template <class E>
  using Fragment = cutlass::Array<E, kElementsPerAccess>;
  using FragmentAccumulator = Fragment<int32_t>;
  using FragmentCompute = Fragment<float>;
  using FragmentC = Fragment<T>;
  using FragmentZ = Fragment<T>;
  using FragmentT = Fragment<T>;
  using FragmentOutput = Fragment<T>;
  using FragmentSource = Fragment<T>;
  using Vector = cutlass::AlignedArray<float, kElementsPerAccess, 16>;

  struct Params {
    const float* scale = nullptr;
    const float* shift = nullptr;
    float beta = 0.0f;
  };

  Params params;

  CUTLASS_HOST_DEVICE ScaleShift(const Params& given) : params(given) {}
  CUTLASS_HOST_DEVICE bool is_source_needed() const { return params.beta != 0.0f; }
  CUTLASS_HOST_DEVICE void set_k_partition(int, int) {}

  CUTLASS_HOST_DEVICE void operator()(FragmentZ& z, FragmentT&, const FragmentAccumulator& acc, const FragmentC& source,
                                      const FragmentCompute& channels) const {
    FragmentCompute y = affine(acc, channels);
    FragmentCompute added = cutlass::NumericArrayConverter<float, T, kElementsPerAccess>()(source);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kElementsPerAccess; ++i) y[i] += params.beta * added[i];
    z = cutlass::NumericArrayConverter<T, float, kElementsPerAccess>()(y);
  }

  CUTLASS_HOST_DEVICE void operator()(FragmentZ& z, FragmentT&, const FragmentAccumulator& acc,
                                      const FragmentCompute& channels) const {
    z = cutlass::NumericArrayConverter<T, float, kElementsPerAccess>()(affine(acc, channels));
  }

  CUTLASS_HOST_DEVICE FragmentCompute affine(const FragmentAccumulator& acc, const FragmentCompute& channels) const {
    int first = int(channels[0]);
    auto scale = *reinterpret_cast<const Vector*>(params.scale + first);
    Vector shift;
    shift.clear();
    if (params.shift) shift = *reinterpret_cast<const Vector*>(params.shift + first);
    FragmentCompute y = cutlass::NumericArrayConverter<float, int32_t, kElementsPerAccess>()(acc);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kElementsPerAccess; ++i) y[i] = scale[i] * y[i] + shift[i];
    return y;
  }
};

using Out = CQ_OUT;
using Nhwc = cutlass::layout::TensorNHWC;
using Kernel = typename cutlass::conv::kernel::DefaultConv2dFpropWithBroadcast<
    int8_t, Nhwc, int8_t, Nhwc, Out, Nhwc, int32_t, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<CQ_TILE_M, CQ_TILE_N, CQ_TILE_K>,
    cutlass::gemm::GemmShape<CQ_TILE_M / 2, CQ_TILE_N / 2, CQ_TILE_K>, cutlass::gemm::GemmShape<16, 8, 32>,
    ScaleShift<Out>, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, CQ_STAGES,
    cutlass::arch::OpMultiplyAddSaturate, cutlass::conv::IteratorAlgorithm::kOptimized,
    cutlass::conv::StrideSupport::kStrided, 16, 16>::Kernel;
using Device = cutlass::conv::device::ImplicitGemmConvolutionFusion<Kernel>;

Device::Arguments arguments(const CqConv& p) {
  const CqEpilogue& e = p.epilogue;
  int out_h = (p.height - p.rows) / p.stride_h + 1, out_w = (p.width - p.columns) / p.stride_w + 1;
  cutlass::conv::Conv2dProblemSize problem({p.batch, p.height, p.width, p.channels}, {p.n, p.rows, p.columns, p.channels},
                                           {0, 0, 0, 0}, {p.stride_h, p.stride_w}, {1, 1},
                                           {p.batch, out_h, out_w, p.n}, cutlass::conv::Mode::kCrossCorrelation, 1);
  auto nhwc = [](int h, int w, int c) { return Nhwc::packed({1, h, w, c}); };
  auto* source = static_cast<Out*>(const_cast<void*>(e.source ? e.source : e.out));
  Nhwc made = nhwc(out_h, out_w, p.n);
  return Device::Arguments(problem, {const_cast<int8_t*>(p.x), nhwc(p.height, p.width, p.channels)},
                           {const_cast<int8_t*>(p.w), nhwc(p.rows, p.columns, p.channels)}, {source, made},
                           {static_cast<Out*>(e.out), made}, {e.scale, e.shift, e.source ? e.beta : 0.0f},
                           cutlass::conv::SplitKMode::kSerial, const_cast<float*>(e.columns));
}

}  // namespace

CQ_EXPORT int64_t cq_workspace(const CqConv* p, const CqLaunch*) {
  Device device;
  return int64_t(device.get_workspace_size(arguments(*p)));
}

CQ_EXPORT int cq_run(const CqConv* p, const CqLaunch* launch) {
  if (p->epilogue.row_sum) return int(cutlass::Status::kErrorNotSupported);
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
