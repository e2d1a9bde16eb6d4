// A borrowed tensor: raw pointer, extents, strides, device and stream, with every check a kernel relies on.
// Nothing here knows Python; borrow.h makes views out of Python objects.
#pragma once

#include <array>
#include <initializer_list>
#include <string>

#include "common/check.h"

namespace sphinx {

enum class DType : uint8_t { u8, i32, i64, f16, bf16, f32, f64, other };
enum class DeviceKind : uint8_t { cpu, cuda };

inline const char* dtype_name(DType dtype) {
  constexpr const char* names[] = {"uint8",    "int32",   "int64",   "float16",
                                   "bfloat16", "float32", "float64", "another type"};
  return names[static_cast<int>(dtype)];
}

inline int64_t item_size(DType dtype) {
  constexpr int64_t sizes[] = {1, 4, 8, 2, 2, 4, 8, 1};
  return sizes[static_cast<int>(dtype)];
}

constexpr int kMaxRank = 8;
constexpr int64_t kAny = -1;  // in expect_shape: any extent

struct TensorView {
  std::string name;  // of the argument, for messages
  void* data = nullptr;
  DType dtype = DType::other;
  DeviceKind device = DeviceKind::cpu;
  int device_id = 0;
  void* stream = nullptr;  // cudaStream_t; NULL on the CPU
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> strides{};  // in elements

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  int64_t numel() const {
    int64_t count = 1;
    for (int d = 0; d < rank; ++d) count = checked_mul(count, shape[d], name.c_str());
    return count;
  }

  std::string shape_text() const {
    std::string text = "[";
    for (int d = 0; d < rank; ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
    return text + "]";
  }

  std::string device_text() const { return device == DeviceKind::cpu ? "cpu" : "cuda:" + std::to_string(device_id); }

  // True of every view before a kernel sees it: sane extents and strides, memory that exists and is aligned.
  const TensorView& expect_sound() const {
    int64_t last = 0;  // offset of the last element
    for (int d = 0; d < rank; ++d) {
      check(shape[d] >= 0, name, ": expected extents >= 0, got shape ", shape_text());
      check(strides[d] >= 0 || shape[d] <= 1, name, ": expected strides >= 0, got ", strides[d], " in dimension ", d);
    }
    const int64_t count = numel();
    if (count == 0) return *this;
    for (int d = 0; d < rank; ++d) {
      if (shape[d] > 1) last = checked_add(last, checked_mul(shape[d] - 1, strides[d], name.c_str()), name.c_str());
    }
    checked_mul(checked_add(last, 1, name.c_str()), item_size(dtype), name.c_str());
    check(data != nullptr, name, ": expected memory for shape ", shape_text(), ", got none (a fake or meta tensor?)");
    check(reinterpret_cast<uintptr_t>(data) % item_size(dtype) == 0, name, ": expected memory aligned to ",
          item_size(dtype), " bytes, got address ", data);
    return *this;
  }

  const TensorView& expect_dtype(std::initializer_list<DType> allowed) const {
    std::string expected;
    for (DType one : allowed) {
      if (dtype == one) return *this;
      expected += (expected.empty() ? "" : ", ") + std::string(dtype_name(one));
    }
    throw TypeError(concat(name, ": expected dtype ", expected, ", got ", dtype_name(dtype)));
  }

  // The exact extents; kAny lets an extent be anything.
  const TensorView& expect_shape(std::initializer_list<int64_t> expected) const {
    bool equal = rank == static_cast<int>(expected.size());
    std::string text = "[";
    int d = 0;
    for (int64_t extent : expected) {
      equal = equal && (extent == kAny || extent == shape[d]);
      text += (d++ ? ", " : "") + (extent == kAny ? std::string("any") : std::to_string(extent));
    }
    check(equal, name, ": expected shape ", text, "], got ", shape_text());
    return *this;
  }

  const TensorView& expect_contiguous() const {
    int64_t stride = 1;
    for (int d = rank - 1; d >= 0; --d) {
      check(shape[d] <= 1 || strides[d] == stride || numel() == 0, name, ": expected contiguous memory, got stride ",
            strides[d], " in dimension ", d, " of shape ", shape_text());
      stride *= shape[d];
    }
    return *this;
  }

  const TensorView& expect_device_of(const TensorView& other) const {
    check(device == other.device && device_id == other.device_id, name, ": expected device ", other.device_text(),
          " (that of ", other.name, "), got ", device_text());
    return *this;
  }
};

}  // namespace sphinx
