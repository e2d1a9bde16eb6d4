// The binary interface of DLPack 1.x that this library reads: declarations only, in our own words.
// Layouts are fixed by the standard (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace sphinx::dlpack {

constexpr int32_t kCPU = 1, kCUDA = 2;                                      // device types
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6;  // type codes

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; NULL means contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {  // what the capsule "dltensor" of __dlpack__() holds
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

// What the capsule "dlpack_exchange_api" on a tensor type holds. Only the last two entries are called here.
struct ExchangeTable {
  Version version;
  ExchangeTable* previous;
  void* allocate;
  void* managed_from_python;
  void* managed_to_python;
  int (*borrow_from_python)(void* object, Tensor* out);  // may be NULL; -1: failed, a Python exception is set
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace sphinx::dlpack
