// Python object -> TensorView, without a copy, through DLPack. Only bind.cpp files include this.
//
// Tensor types that carry DLPack's C exchange table (torch >= 2.11) are read through it, about 0.1 us each; the others
// through their __dlpack__() capsule. The table drops torch's conj and neg bits and takes tensors that require
// gradients: the wrappers in sphinx_fast/ops refuse or handle those.
#pragma once

#include <Python.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "common/dlpack.h"
#include "common/tensor_view.h"

namespace sphinx {

// The message of the pending Python exception, which is cleared.
inline std::string take_python_error() {
  PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
#if PY_VERSION_HEX >= 0x030C0000
  value = PyErr_GetRaisedException();
#else
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
#endif
  std::string text = "unknown error";
  if (PyObject* str = value ? PyObject_Str(value) : nullptr) {
    if (const char* utf8 = PyUnicode_AsUTF8(str)) text = utf8;
    Py_DECREF(str);
  }
  PyErr_Clear();
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(trace);
  return text;
}

// Whether tensors of a type are what they look like. One that computes in Python (its __torch_dispatch__ is not the
// disabled one) may have no memory, as a fake tensor: a slice of it starts at an address that is an offset from NULL.
inline bool has_memory(PyTypeObject* type) {
  PyObject* const dispatch = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__torch_dispatch__");
  PyObject* const name = dispatch ? PyObject_GetAttrString(dispatch, "__name__") : nullptr;
  const char* const text = name ? PyUnicode_AsUTF8(name) : nullptr;
  const bool plain = !dispatch || (text && std::string(text) == "_disabled_torch_dispatch_impl");
  Py_XDECREF(dispatch);
  Py_XDECREF(name);
  PyErr_Clear();
  return plain;
}

// The exchange table of an object's type, or NULL. The last type is remembered, and kept alive so that its address
// cannot come to mean another type. Called with the GIL held. ValueError where the type has no memory.
inline const dlpack::ExchangeTable* exchange_table(PyObject* object, const std::string& name) {
  static PyTypeObject* known_type = nullptr;
  static const dlpack::ExchangeTable* known_table = nullptr;
  PyTypeObject* type = Py_TYPE(object);
  if (type == known_type) return known_table;
  check(has_memory(type), name, ": expected memory, got a ", type->tp_name,
        ", which computes in Python and may have none");

  const dlpack::ExchangeTable* table = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
    table = static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  while (table && table->version.major != 1) table = table->previous;
  if (table && !table->borrow_from_python) table = nullptr;
  Py_INCREF(type);
  Py_XDECREF(known_type);
  known_type = type;
  known_table = table;
  return table;
}

inline DType to_dtype(dlpack::DataType type) {
  if (type.lanes != 1) return DType::other;
  const int key = type.code * 1000 + type.bits;
  switch (key) {
    case dlpack::kUInt * 1000 + 8:
      return DType::u8;
    case dlpack::kInt * 1000 + 32:
      return DType::i32;
    case dlpack::kInt * 1000 + 64:
      return DType::i64;
    case dlpack::kFloat * 1000 + 16:
      return DType::f16;
    case dlpack::kFloat * 1000 + 32:
      return DType::f32;
    case dlpack::kFloat * 1000 + 64:
      return DType::f64;
    case dlpack::kBFloat * 1000 + 16:
      return DType::bf16;
    default:
      return DType::other;
  }
}

struct ReleaseObject {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};

class Borrow {
 public:
  // `object` must outlive the Borrow; the call's arguments do.
  Borrow(PyObject* object, std::string name) {
    view_.name = std::move(name);
    const dlpack::ExchangeTable* table = exchange_table(object, view_.name);
    dlpack::Tensor tensor{};
    if (table) {
      if (table->borrow_from_python(object, &tensor) != 0) {
        throw TypeError(
            concat(view_.name, ": expected a dense tensor, got one that cannot be borrowed: ", take_python_error()));
      }
    } else {
      tensor = tensor_of_capsule(object);
    }
    fill(tensor);
    if (table && view_.device == DeviceKind::cuda) {
      check_type(table->current_stream(dlpack::kCUDA, view_.device_id, &view_.stream) == 0, view_.name,
                 ": the current CUDA stream is unknown");
    }
    view_.expect_sound();
  }

  const TensorView& operator*() const { return view_; }
  const TensorView* operator->() const { return &view_; }

 private:
  dlpack::Tensor tensor_of_capsule(PyObject* object) {
    capsule_.reset(PyObject_CallMethod(object, "__dlpack__", nullptr));
    const void* managed = capsule_ ? PyCapsule_GetPointer(capsule_.get(), "dltensor") : nullptr;
    if (!managed) {
      throw TypeError(
          concat(view_.name, ": expected a tensor, got ", Py_TYPE(object)->tp_name, " (", take_python_error(), ")"));
    }
    return static_cast<const dlpack::ManagedTensor*>(managed)->tensor;
  }

  void fill(const dlpack::Tensor& tensor) {
    check_type(tensor.device.type == dlpack::kCPU || tensor.device.type == dlpack::kCUDA, view_.name,
               ": expected a CPU or CUDA tensor, got DLPack device type ", tensor.device.type);
    check(tensor.ndim >= 0 && tensor.ndim <= kMaxRank, view_.name, ": expected at most ", kMaxRank, " dimensions, got ",
          tensor.ndim);
    view_.dtype = to_dtype(tensor.dtype);
    view_.device = tensor.device.type == dlpack::kCPU ? DeviceKind::cpu : DeviceKind::cuda;
    view_.device_id = tensor.device.id;
    view_.rank = tensor.ndim;
    view_.data = tensor.data ? static_cast<char*>(tensor.data) + tensor.byte_offset : nullptr;
    int64_t stride = 1;
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      view_.shape[d] = tensor.shape[d];
      view_.strides[d] = tensor.strides ? tensor.strides[d] : stride;
      stride = tensor.shape[d] > 0 ? checked_mul(stride, tensor.shape[d], view_.name.c_str()) : 0;
    }
  }

  TensorView view_;
  std::unique_ptr<PyObject, ReleaseObject> capsule_;
};

// A tensor that may be None; given as a pybind11 handle.
class Optional {
 public:
  template <class Handle>
  Optional(const Handle& object, const char* name) {
    if (object.ptr() != Py_None) borrowed_.emplace(object.ptr(), name);
  }
  explicit operator bool() const { return borrowed_.has_value(); }
  const TensorView& operator*() const { return **borrowed_; }
  const TensorView* operator->() const { return &**borrowed_; }
  void* data() const { return borrowed_ ? (*borrowed_)->data : nullptr; }

  // Contiguous, of this dtype and shape, where `on` is.
  const Optional& expect(const TensorView& on, DType dtype, std::initializer_list<int64_t> shape) const {
    if (borrowed_) {
      (*borrowed_)->expect_dtype({dtype}).expect_shape(shape).expect_contiguous().expect_device_of(on);
    }
    return *this;
  }

 private:
  std::optional<Borrow> borrowed_;
};

}  // namespace sphinx
