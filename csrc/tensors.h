// Tensors as bindings read them: through the table of C functions that torch, as every library of arrays with
// DLPack 1.3, has at `Tensor.__dlpack_c_exchange_api__`. DLPack fixes its layout for good, so no header of torch is
// needed, and one build serves every torch that has it. A tensor takes 60 ns to read so, and from Python as long for
// its shape alone.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace gdl {

namespace dlpack {

enum Code : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

enum DeviceType : std::int32_t { kCpu = 1 };

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Device {
  std::int32_t type, index;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  const std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    std::uint32_t major, minor;
  } version;
  const ExchangeApi* older;
  void *allocate, *from_object, *to_object;
  // 0, or -1 and a Python exception. Shape and strides are the tensor's own.
  int (*read)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace dlpack

// A tensor of torch, which lives for as long as the arguments of a call do.
class Tensor {
 public:
  Tensor() = default;

  // Throws Python's error where there is no memory to read, as of meta and sparse tensors.
  explicit Tensor(pybind11::handle object) : object_(object) {
    if (api_->read(object.ptr(), &read_) != 0) throw pybind11::error_already_set();
  }

  // Once in a process, before any tensor is read.
  static void bind() {
    type_ = pybind11::module_::import("torch").attr("Tensor").cast<pybind11::object>().release();
    const pybind11::object capsule = type_.attr("__dlpack_c_exchange_api__");
    api_ = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api_ == nullptr) throw pybind11::error_already_set();
    if (api_->version.major != 1) throw pybind11::import_error("torch's DLPack has another major version than 1");
  }

  static bool is_tensor(pybind11::handle object) {
    return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type_.ptr()));
  }

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(read_.data) + read_.byte_offset);
  }

  pybind11::handle object() const { return object_; }
  dlpack::DataType dtype() const { return read_.dtype; }
  dlpack::Device device() const { return read_.device; }
  int dim() const { return read_.ndim; }
  std::int64_t size(int d) const { return read_.shape[d]; }
  std::int64_t stride(int d) const { return read_.strides[d]; }

  bool is_on_cpu() const { return device().type == dlpack::kCpu; }

  bool is_integral() const {
    return dtype().code == dlpack::kInt || dtype().code == dlpack::kUInt || dtype().code == dlpack::kBool;
  }

  // As torch calls it; "" for what is not floating point.
  const char* dtype_name() const {
    if (dtype().code == dlpack::kBfloat) return "bfloat16";
    if (dtype().code != dlpack::kFloat) return "";
    return dtype().bits == 16 ? "float16" : dtype().bits == 32 ? "float32" : "float64";
  }

  // The product of the sizes from dimension `first` on.
  std::int64_t numel(int first = 0) const {
    std::int64_t product = 1;
    for (int d = first; d < dim(); ++d) product *= size(d);
    return product;
  }

  std::int64_t nbytes() const { return numel() * (read_.dtype.bits / 8); }

  bool is_contiguous() const {
    std::int64_t step = 1;
    for (int d = dim() - 1; d >= 0; --d) {
      if (size(d) != 1 && stride(d) != step) return numel() == 0;
      step *= size(d);
    }
    return true;
  }

 private:
  pybind11::handle object_;
  dlpack::Tensor read_{};

  inline static pybind11::handle type_;
  inline static const dlpack::ExchangeApi* api_ = nullptr;
};

// Tensors made for a kernel of others that don't lie as it reads them, kept while it runs. To be made and destroyed
// with the GIL held.
class Copies {
 public:
  Tensor keep(pybind11::object made) {
    kept_.push_back(std::move(made));
    return Tensor(kept_.back());
  }

  Tensor contiguous(const Tensor& x) { return x.is_contiguous() ? x : keep(x.object().attr("contiguous")()); }

 private:
  std::vector<pybind11::object> kept_;
};

}  // namespace gdl

namespace pybind11::detail {

template <>
struct type_caster<gdl::Tensor> {
  PYBIND11_TYPE_CASTER(gdl::Tensor, const_name("torch.Tensor"));

  bool load(handle object, bool) {
    if (!gdl::Tensor::is_tensor(object)) return false;
    value = gdl::Tensor(object);
    return true;
  }
};

}  // namespace pybind11::detail
