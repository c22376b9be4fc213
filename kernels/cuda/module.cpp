// Binds only: `fastinv._cuda`.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "descent.h"

namespace py = pybind11;

namespace {

using fastinv::Descent;

// A field that holds the address of memory.
template <class T>
void pointer(py::class_<Descent>& type, const char* name, T* Descent::* field) {
  type.def_property(
      name, [field](const Descent& d) { return reinterpret_cast<uintptr_t>(d.*field); },
      [field](Descent& d, uintptr_t address) { d.*field = reinterpret_cast<T*>(address); });
}

void run(const Descent& descent, int device, uintptr_t stream) {
  if (!fastinv::fits(descent)) throw std::invalid_argument("there is no kernel for this image and these taps");
  if (device < 0) return fastinv::descend_on_host(descent);
  fastinv::launch_descend(descent, device, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  py::class_<Descent> type(m, "Descent");
  type.def(py::init([] { return Descent{}; }));
  pointer(type, "z", &Descent::z);
  pointer(type, "constant", &Descent::constant);
  pointer(type, "first", &Descent::first);
  pointer(type, "second", &Descent::second);
  pointer(type, "largest", &Descent::largest);
  pointer(type, "weight", &Descent::weight);
  pointer(type, "row_kind", &Descent::row_kind);
  pointer(type, "column_kind", &Descent::column_kind);
  pointer(type, "rates", &Descent::rates);
  pointer(type, "low", &Descent::low);
  pointer(type, "high", &Descent::high);
  pointer(type, "running", &Descent::running);
  pointer(type, "taken", &Descent::taken);
  type.def_readwrite("images", &Descent::images)
      .def_readwrite("height", &Descent::height)
      .def_readwrite("width", &Descent::width)
      .def_readwrite("channels", &Descent::channels)
      .def_readwrite("taps_y", &Descent::taps_y)
      .def_readwrite("taps_x", &Descent::taps_x)
      .def_readwrite("row_kinds", &Descent::row_kinds)
      .def_readwrite("column_kinds", &Descent::column_kinds)
      .def_readwrite("steps", &Descent::steps)
      .def_readwrite("most", &Descent::most)
      .def_readwrite("rest1", &Descent::rest1)
      .def_readwrite("beta2", &Descent::beta2)
      .def_readwrite("rest2", &Descent::rest2)
      .def_readwrite("eps", &Descent::eps)
      .def_readwrite("momentum", &Descent::momentum)
      .def_readwrite("tv_weight", &Descent::tv_weight)
      .def_readwrite("half_beta", &Descent::half_beta)
      .def_readwrite("root", &Descent::root)
      .def_property(
          "optimizer", [](const Descent& d) { return static_cast<int>(d.optimizer); },
          [](Descent& d, int code) { d.optimizer = static_cast<fastinv::Optimizer>(code); })
      .def("fits", &fastinv::fits, "Whether there is a kernel for it.")
      .def("run", &run, py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
           "Take the steps, for memory of this device, on this stream; device −1: of the host.");
}
