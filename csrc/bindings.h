// Every op binds itself: csrc/bindings_<backend>_<op>.cpp holds one `static const gdl::Binding`, and the module runs
// them all.
//
// Bindings take addresses and sizes as integers, never tensors. So no native file includes a torch header: it compiles
// in seconds, links against no libtorch, and one build serves every torch version. The launchers in Python read
// tensors.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace gdl {

struct Binding {
  using Bind = void (*)(pybind11::module_&);

  explicit Binding(Bind bind) : bind(bind), next(first) { first = this; }

  static void run_all(pybind11::module_& module) {
    for (const Binding* b = first; b != nullptr; b = b->next) b->bind(module);
  }

  Bind bind;
  const Binding* next;
  inline static const Binding* first = nullptr;
};

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace gdl
