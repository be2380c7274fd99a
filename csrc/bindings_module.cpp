// The Python module. setup.py defines GDL_MODULE: _cpu_avx512_bf16, _cpu_avx512, _cpu_avx2, _cpu_default or _cuda.
#include "bindings.h"
#include "tensors.h"

PYBIND11_MODULE(GDL_MODULE, module) {
  gdl::Tensor::bind();
  gdl::Binding::run_all(module);
}
