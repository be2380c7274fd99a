// Every op binds itself: csrc/bindings_<backend>_<op>.cpp holds one `static const gdl::Binding`, and the module runs
// them all.
//
// No native file includes a torch header: it compiles in seconds, links against no libtorch, and one build serves every
// torch version. Bindings of the CPU's kernels read tensors through DLPack's table of C functions (tensors.h). Those of
// CUDA's take addresses and sizes as integers, which the launchers in Python read off the tensors.
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
