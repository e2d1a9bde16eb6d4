// sphinx_fast._C: one bind line per room, and what this build is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace sphinx {

namespace attention {
void bind(py::module_& module);
}
namespace fusion {
void bind(py::module_& module);
}
namespace views {
void bind(py::module_& module);
}

namespace {

py::dict build_info() {
  py::dict info;
#ifdef SPHINX_WITH_CUDA
  info["cuda"] = SPHINX_CUDA_VERSION;
  info["cuda_archs"] = SPHINX_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  info["compiler"] = __VERSION__;
  return info;
}

// The instruction sets of this processor that there are loops for, the best last.
std::vector<std::string> isas() {
  return {kIsaNames, kIsaNames + static_cast<int>(best_isa()) + 1};
}

}  // namespace
}  // namespace sphinx

PYBIND11_MODULE(_C, module) {
  py::register_local_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const sphinx::TypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
  });
  sphinx::loaded_openmp();
  module.def("build_info", &sphinx::build_info);
  module.def("isas", &sphinx::isas);
  sphinx::attention::bind(module);
  sphinx::fusion::bind(module);
  sphinx::views::bind(module);
}
