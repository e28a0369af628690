// The plain C interface of every compiled int8 kernel. One shared library holds one kernel; `cachequant.kernels.cuda.library`
// mirrors these structures with ctypes.
//
//   out[m, n] = cast(scale[n] * sum_k x[m, k] * w[n, k] + shift[n] + beta * source[m, n] + row_sum[m] * offset[n])
//
// x and w are int8, the sum is an int32, the rest float32. A cast to int8 rounds to nearest even and saturates. Kernels
// compiled with CQ_GELU_TANH have no source and write the integers of GELU(out) on `grid` instead.
#pragma once

#include <cstdint>

extern "C" {

struct CqEpilogue {
  const float* scale;    // [n]
  const float* shift;    // [n], null for 0
  const void* source;    // [m, n] of the output's type (half for int8 outputs), null for none; may be `out` itself
  float beta;            // factor of source
  const float* row_sum;  // [m] sums of x over k, null for none
  const float* offset;   // [n], null where row_sum is
  const float* columns;  // [n] 0, 1, 2, ...; read by the sm80 convolution only
  void* out;             // [m, n]
  const float* grid;     // inverse scale, zero point, lowest and highest integer; null without an activation
};

struct CqLaunch {
  void* workspace;
  int64_t workspace_bytes;
  void* stream;
  int32_t device;
  int32_t multiprocessors;
};

struct CqGemm {
  const int8_t* x;  // [m, k], rows contiguous
  const int8_t* w;  // [n, k], rows contiguous
  int32_t m, n, k;
  CqEpilogue epilogue;
};

struct CqConv {
  const int8_t* x;  // [batch, height, width, channels]; padding is already in it
  const int8_t* w;  // [n, rows, columns, channels]
  int32_t batch, height, width, channels, n, rows, columns, stride_h, stride_w;
  CqEpilogue epilogue;  // m runs over [batch, out_height, out_width]
};

}  // extern "C"

// Every kernel's library exports the three functions below, for CqGemm or for CqConv. Statuses: 0 is success, 1 ... 999 a
// cutlass::Status, 1000 + e a cudaError_t e.
#define CQ_EXPORT extern "C" __attribute__((visibility("default")))
constexpr int kCqCudaError = 1000;
