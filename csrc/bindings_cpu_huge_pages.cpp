#include "bindings.h"
#include "cpu/huge_pages.h"

namespace {

const gdl::Binding binding([](pybind11::module_& module) {
  module.def("prefer_huge_pages", &gdl::prefer_huge_pages);
});

}  // namespace
