// Run-time dtype -> compile-time type.
#pragma once

#include "common/float16.h"
#include "common/tensor_view.h"

namespace sphinx {

// Calls f with a value of the C++ type of `dtype`; one of float32, float16, bfloat16.
template <class F>
void dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f16:
      return f(Half{});
    case DType::bf16:
      return f(BFloat16{});
    default:
      throw TypeError(concat("expected dtype float32, float16 or bfloat16, got ", dtype_name(dtype)));
  }
}

// Why a CUDA tensor cannot be served by a build without the CUDA half.
[[noreturn]] inline void throw_no_cuda(const TensorView& tensor) {
  throw std::runtime_error(concat(tensor.name, " is on ", tensor.device_text(),
                                  ", but sphinx_fast._C was built without CUDA: install a CUDA toolkit and run "
                                  "CMAKE_ARGS=-DSPHINX_CUDA=ON pip install -e . --no-build-isolation"));
}

inline void check_backend(const TensorView& on) {
#ifndef SPHINX_WITH_CUDA
  if (on.device == DeviceKind::cuda) throw_no_cuda(on);
#endif
}

// The place of a dtype in a table for float32, float16, bfloat16.
inline int float_index(DType dtype) {
  return dtype == DType::f32 ? 0 : dtype == DType::f16 ? 1 : 2;
}

}  // namespace sphinx
