// Every op binds itself: csrc/bindings_<backend>_<op>.cpp holds one `static const gdl::Binding`, and the module runs
// them all.
//
// No native file includes a torch header: it compiles in seconds, links against no libtorch, and one build serves every
// torch version. Bindings read tensors through DLPack's table of C functions (tensors.h).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

}  // namespace gdl
