// What every call of an op asks about its arguments; see gdl_kernels/_direct.py and gdl_kernels/_backends.py.
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/huge_pages.h"
#include "tensors.h"

namespace {

using namespace gdl;
namespace py = pybind11;

// Types that are asked for by identity, and what a tensor does not say through DLPack.
struct Torch {
  py::object tensor, parameter, dtype, is_neg, requires_grad;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor");
    parameter = torch.attr("nn").attr("Parameter");
    dtype = torch.attr("dtype");
    is_neg = tensor.attr("is_neg");
    requires_grad = tensor.attr("requires_grad");
  }

  // Of a subclass, what an op does is the subclass's to say.
  bool is_plain(py::handle object) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    return type == tensor.ptr() || type == parameter.ptr();
  }

  bool is_negative(py::handle object) const { return is_true(PyObject_CallOneArg(is_neg.ptr(), object.ptr())); }

  bool wants_gradient(py::handle object) const {
    return is_true(
        Py_TYPE(requires_grad.ptr())
            ->tp_descr_get(requires_grad.ptr(), object.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()))));
  }

 private:
  static bool is_true(PyObject* given) {
    const auto answer = py::reinterpret_steal<py::object>(given);
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }
};

const Torch* torch = nullptr;

// Nothing where there is no memory to read: of meta and sparse tensors, of those of torch.func's transforms, and of
// those that are zero and say no more.
std::optional<Tensor> read(py::handle object) {
  try {
    const Tensor tensor(object);
    if (tensor.data<void>() != nullptr || tensor.numel() == 0) return tensor;
  } catch (const py::error_already_set&) {
  }
  return std::nullopt;
}

// (its items, their number) of a tuple or a list.
std::optional<std::pair<PyObject**, Py_ssize_t>> items(PyObject* object) {
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return std::nullopt;
  return std::pair(PySequence_Fast_ITEMS(object), PySequence_Fast_GET_SIZE(object));
}

bool is_number_or_name(PyObject* object) {
  return object == Py_None || PyFloat_CheckExact(object) || PyLong_CheckExact(object) || PyBool_Check(object) ||
         PyUnicode_CheckExact(object);
}

// With a gradient of tensors that are arguments themselves, or also of some in lists.
enum Verdict { kDispatch, kDirect, kDirectWithGradient, kDirectWithGradientInLists };

// Whether an op's implementation can be called with the arguments as they are, and with `gradients` on whether any of
// them wants one.
Verdict look(py::handle arguments, bool gradients, bool in_list = false) {
  Verdict verdict = kDirect;
  const auto [first, count] = *items(arguments.ptr());
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const object = first[i];
    if (torch->is_plain(object)) {
      const std::optional<Tensor> tensor = read(object);
      if (!tensor) return kDispatch;
      if (tensor->is_integral()) {
        if (in_list) return verdict;  // the many of a layout: one stands for all
        continue;
      }
      if (torch->is_negative(object)) return kDispatch;  // what it holds is not what is in its memory
      if (gradients && verdict == kDirect && torch->wants_gradient(object)) verdict = kDirectWithGradient;
    } else if (items(object)) {
      const Verdict of_items = look(object, gradients && verdict != kDirectWithGradientInLists, true);
      if (of_items == kDispatch) return kDispatch;
      if (of_items != kDirect) verdict = kDirectWithGradientInLists;
    } else if (!is_number_or_name(object)) {
      return kDispatch;
    }
  }
  return verdict;
}

class Signature {
 public:
  Signature() { bytes_.reserve(1024); }

  // False where arguments have something in them that has no signature. Of a tensor that grows along a dimension from
  // call to call strides are left out, and of its size there is only said which is the first of that size.
  bool add(PyObject* object, int growing = -1) {
    if (torch->is_plain(object)) return add_tensor(object, growing);
    if (const auto sequence = items(object)) {
      put('[', sequence->second);
      for (Py_ssize_t i = 0; i < sequence->second; ++i)
        if (!add(sequence->first[i])) return false;
      return true;
    }
    if (object == Py_None || PyBool_Check(object) ||
        Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(torch->dtype.ptr())) {
      put('=', object);  // one of each lives as long as the process
    } else if (PyFloat_CheckExact(object)) {
      put('.', PyFloat_AS_DOUBLE(object));
    } else if (PyLong_CheckExact(object)) {
      int overflow = 0;
      put('#', PyLong_AsLongLongAndOverflow(object, &overflow));
      return overflow == 0;
    } else if (PyUnicode_CheckExact(object)) {
      Py_ssize_t length = 0;
      const char* const text = PyUnicode_AsUTF8AndSize(object, &length);
      if (text == nullptr) throw py::error_already_set();
      put('"', length);
      bytes_.append(text, length);
    } else {
      return false;
    }
    return true;
  }

  py::bytes bytes() const { return py::bytes(bytes_); }

 private:
  bool add_tensor(PyObject* object, int growing) {
    const std::optional<Tensor> tensor = read(object);
    if (!tensor) return false;
    put(torch->wants_gradient(object) ? 'g' : 't', tensor->dtype());
    put('@', tensor->device());
    put(':', tensor->dim());
    for (int d = 0; d < tensor->dim(); ++d)
      if (growing < 0)
        put(',', std::array{tensor->size(d), tensor->stride(d)});
      else
        put('~', d == growing ? place_of(tensor->size(d)) : tensor->size(d));
    return true;
  }

  std::int64_t place_of(std::int64_t size) {
    const auto found = std::find(grown_.begin(), grown_.end(), size);
    const std::int64_t place = found - grown_.begin();
    if (found == grown_.end()) grown_.push_back(size);
    return place;
  }

  template <typename T>
  void put(char kind, const T& value) {
    static_assert(std::has_unique_object_representations_v<T> || std::is_floating_point_v<T>);
    char packed[1 + sizeof(T)] = {kind};
    std::memcpy(packed + 1, &value, sizeof(T));
    bytes_.append(packed, sizeof(packed));
  }

  std::string bytes_;
  std::vector<std::int64_t> grown_;
};

// A function of an op's name, a backend's and the arguments of a call, that gives its signature. growing[i]: the
// dimension along which argument i grows from call to call, or -1.
py::cpp_function signature(const std::vector<int>& growing) {
  return [growing](py::handle op, py::handle backend, const py::tuple& arguments) -> std::optional<py::bytes> {
    Signature made;
    if (!made.add(op.ptr()) || !made.add(backend.ptr())) return std::nullopt;
    const auto [first, count] = *items(arguments.ptr());
    for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i)
      if (!made.add(first[i], i < growing.size() ? growing[i] : -1)) return std::nullopt;
    return made.bytes();
  };
}

// Outputs of at least so many bytes: the C library may take such memory from the system, and give it back, at every
// call.
constexpr std::int64_t kHugeBytes = 2 << 20;

void prefer_huge_pages_for(py::handle out) {
  if (const auto outputs = items(out.ptr())) {
    for (Py_ssize_t i = 0; i < outputs->second; ++i) prefer_huge_pages_for(outputs->first[i]);
    return;
  }
  const Tensor tensor(out);
  if (tensor.nbytes() >= kHugeBytes)
    prefer_huge_pages(reinterpret_cast<std::uintptr_t>(tensor.data<char>()), tensor.nbytes());
}

const Binding binding([](py::module_& module) {
  torch = new Torch;  // the types live as long as the process
  module.def("look",
             [](const py::tuple& arguments, bool gradients) { return static_cast<int>(look(arguments, gradients)); });
  module.def("signature", &signature);
  module.def("prefer_huge_pages", &prefer_huge_pages_for);
});

}  // namespace
