// Binds only: `fastinv._cuda`.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "run.h"

namespace py = pybind11;

namespace {

using fastinv::BandedForm;
using fastinv::Descent;
using fastinv::HalvedLayer;
using fastinv::PlanarLayer;
using fastinv::PooledLayers;
using fastinv::QuadraticForm;
using fastinv::SmallTail;
using fastinv::Tail;
using fastinv::WindowLayer;

constexpr int kBackward = -2;  // a device that is the host, too, with threads in another order: results are the same

// A field that holds the address of memory.
template <class Struct, class T>
void pointer(py::class_<Struct>& type, const char* name, T* Struct::* field) {
  type.def_property(
      name, [field](const Struct& s) { return reinterpret_cast<uintptr_t>(s.*field); },
      [field](Struct& s, uintptr_t address) { s.*field = reinterpret_cast<T*>(address); });
}

// A field that says what type values are of.
template <class Struct>
void result(py::class_<Struct>& type, const char* name, fastinv::Result Struct::* field) {
  type.def_property(
      name, [field](const Struct& s) { return static_cast<int>(s.*field); },
      [field](Struct& s, int code) { s.*field = static_cast<fastinv::Result>(code); });
}

template <class Problem>
void run(const Problem& problem, const Descent& descent, int device, uintptr_t stream) {
  if (!fastinv::fits(descent, problem))
    throw std::invalid_argument("there is no kernel for this edge and these images");
  if (device < 0) return fastinv::descend_on_host(descent, problem, device == kBackward);
  fastinv::launch_descend(descent, problem, device, stream);
}

template <class Layers>
void run_layers(const Layers& layers, int device, uintptr_t stream) {
  if (!fastinv::fits(layers)) throw std::invalid_argument("there is no kernel for these layers");
  if (layers.images == 0) return;
  if (device < 0) return fastinv::layers_on_host(layers, device == kBackward);
  fastinv::launch_layers(layers, device, stream);
}

template <class Problem>
py::class_<Problem> problem(py::module_& m, const char* name) {
  return py::class_<Problem>(m, name)
      .def(py::init([] { return Problem{}; }))
      .def("fits", [](const Problem& p, const Descent& d) { return fastinv::fits(d, p); })
      .def("run", &run<Problem>, py::arg("descent"), py::arg("device"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>(),
           "Take the steps, for memory of this device, on this stream; device −1 and −2: of the host.");
}

template <class Layers>
py::class_<Layers> layers(py::module_& m, const char* name) {
  return py::class_<Layers>(m, name)
      .def(py::init([] { return Layers{}; }))
      .def_property(
          "finish", [](const Layers& p) { return static_cast<int>(p.finish); },
          [](Layers& p, int code) { p.finish = static_cast<fastinv::Finish>(code); })
      .def("fits", [](const Layers& p) { return fastinv::fits(p); })
      .def("run", &run_layers<Layers>, py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
           "Compute the layers, for memory of this device, on this stream; device −1 and −2: of the host.");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("check_device", &fastinv::check_device, py::arg("device"), py::call_guard<py::gil_scoped_release>(),
        "Raise RuntimeError where the kernels cannot run on this device, as its driver is too old for them.");

  py::class_<Descent> descent(m, "Descent");
  descent.def(py::init([] { return Descent{}; }));
  pointer(descent, "z", &Descent::z);
  pointer(descent, "first", &Descent::first);
  pointer(descent, "second", &Descent::second);
  pointer(descent, "largest", &Descent::largest);
  pointer(descent, "rates", &Descent::rates);
  pointer(descent, "low", &Descent::low);
  pointer(descent, "high", &Descent::high);
  pointer(descent, "running", &Descent::running);
  pointer(descent, "taken", &Descent::taken);
  descent.def_readwrite("images", &Descent::images)
      .def_readwrite("height", &Descent::height)
      .def_readwrite("width", &Descent::width)
      .def_readwrite("channels", &Descent::channels)
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
      .def_readwrite("room", &Descent::room)
      .def_property(
          "optimizer", [](const Descent& d) { return static_cast<int>(d.optimizer); },
          [](Descent& d, int code) { d.optimizer = static_cast<fastinv::Optimizer>(code); });

  auto quadratic = problem<QuadraticForm>(m, "QuadraticForm");
  pointer(quadratic, "constant", &QuadraticForm::constant);
  pointer(quadratic, "weight", &QuadraticForm::weight);
  pointer(quadratic, "row_kind", &QuadraticForm::row_kind);
  pointer(quadratic, "column_kind", &QuadraticForm::column_kind);
  quadratic.def_readwrite("taps_y", &QuadraticForm::taps_y)
      .def_readwrite("taps_x", &QuadraticForm::taps_x)
      .def_readwrite("row_kinds", &QuadraticForm::row_kinds)
      .def_readwrite("column_kinds", &QuadraticForm::column_kinds);

  auto banded = problem<BandedForm>(m, "BandedForm");
  pointer(banded, "constant", &BandedForm::constant);
  pointer(banded, "weights", &BandedForm::weights);
  pointer(banded, "first", &BandedForm::first);
  pointer(banded, "kind", &BandedForm::kind);
  banded.def_readwrite("taps", &BandedForm::taps)
      .def_readwrite("factors", &BandedForm::factors)
      .def_readwrite("kinds", &BandedForm::kinds)
      .def_readwrite("scale", &BandedForm::scale)
      .def_readwrite("unscale", &BandedForm::unscale);

  auto pooled = problem<PooledLayers>(m, "PooledLayers");
  pointer(pooled, "target", &PooledLayers::target);
  pointer(pooled, "weights", &PooledLayers::weights);
  pointer(pooled, "first_bias", &PooledLayers::first_bias);
  pointer(pooled, "second_bias", &PooledLayers::second_bias);
  pooled.def_readwrite("first_scale", &PooledLayers::first_scale)
      .def_readwrite("second_scale", &PooledLayers::second_scale)
      .def_readwrite("first_gain", &PooledLayers::first_gain)
      .def_readwrite("second_gain", &PooledLayers::second_gain)
      .def_readwrite("second_offset", &PooledLayers::second_offset)
      .def_readwrite("back_gain", &PooledLayers::back_gain);

  auto tail = layers<Tail>(m, "Tail");
  pointer(tail, "x", &Tail::x);
  pointer(tail, "first", &Tail::first);
  pointer(tail, "last", &Tail::last);
  pointer(tail, "bias", &Tail::bias);
  pointer(tail, "last_bias", &Tail::last_bias);
  pointer(tail, "out", &Tail::out);
  pointer(tail, "flag", &Tail::flag);
  tail.def_readwrite("images", &Tail::images)
      .def_readwrite("height", &Tail::height)
      .def_readwrite("width", &Tail::width)
      .def_readwrite("inputs", &Tail::inputs)
      .def_readwrite("outputs", &Tail::outputs)
      .def_readwrite("channels_last", &Tail::channels_last)
      .def_readwrite("float16", &Tail::float16)
      .def_readwrite("out_n", &Tail::out_n)
      .def_readwrite("out_c", &Tail::out_c)
      .def_readwrite("out_y", &Tail::out_y)
      .def_readwrite("out_x", &Tail::out_x)
      .def_readwrite("slope", &Tail::slope)
      .def_readwrite("a", &Tail::a)
      .def_readwrite("b", &Tail::b);
  result(tail, "result", &Tail::result);

  auto window = layers<WindowLayer>(m, "WindowLayer");
  pointer(window, "x", &WindowLayer::x);
  pointer(window, "weights", &WindowLayer::weights);
  pointer(window, "bias", &WindowLayer::bias);
  pointer(window, "addend", &WindowLayer::addend);
  pointer(window, "out", &WindowLayer::out);
  window.def_readwrite("images", &WindowLayer::images)
      .def_readwrite("height", &WindowLayer::height)
      .def_property(
          "width", [](const WindowLayer& p) { return p.across.cells(); },
          [](WindowLayer& p, int width) { p.across = fastinv::window::Across<0>(width); })
      .def_readwrite("inputs", &WindowLayer::inputs)
      .def_readwrite("outputs", &WindowLayer::outputs)
      .def_readwrite("phases", &WindowLayer::phases)
      .def_readwrite("float16", &WindowLayer::float16)
      .def_readwrite("a", &WindowLayer::a)
      .def_readwrite("b", &WindowLayer::b);

  auto halved = layers<HalvedLayer>(m, "HalvedLayer");
  pointer(halved, "x", &HalvedLayer::x);
  pointer(halved, "weights", &HalvedLayer::weights);
  pointer(halved, "bias", &HalvedLayer::bias);
  pointer(halved, "addend", &HalvedLayer::addend);
  pointer(halved, "saved", &HalvedLayer::saved);
  pointer(halved, "out", &HalvedLayer::out);
  halved.def_readwrite("images", &HalvedLayer::images)
      .def_readwrite("height", &HalvedLayer::height)
      .def_readwrite("width", &HalvedLayer::width)
      .def_readwrite("x_pitch", &HalvedLayer::x_pitch)
      .def_readwrite("out_pitch", &HalvedLayer::out_pitch)
      .def_readwrite("outputs", &HalvedLayer::outputs)
      .def_readwrite("unscale", &HalvedLayer::unscale)
      .def_readwrite("a", &HalvedLayer::a)
      .def_readwrite("b", &HalvedLayer::b);

  auto small = layers<SmallTail>(m, "SmallTail");
  pointer(small, "x", &SmallTail::x);
  pointer(small, "weights", &SmallTail::weights);
  pointer(small, "out", &SmallTail::out);
  pointer(small, "flag", &SmallTail::flag);
  result(small, "given", &SmallTail::given);
  result(small, "result", &SmallTail::result);
  small.def_readwrite("images", &SmallTail::images)
      .def_readwrite("channels_last", &SmallTail::channels_last)
      .def_readwrite("slope", &SmallTail::slope)
      .def_readwrite("a", &SmallTail::a)
      .def_readwrite("b", &SmallTail::b);

  auto planar = layers<PlanarLayer>(m, "PlanarLayer");
  pointer(planar, "x", &PlanarLayer::x);
  pointer(planar, "weights", &PlanarLayer::weights);
  pointer(planar, "bias", &PlanarLayer::bias);
  pointer(planar, "out", &PlanarLayer::out);
  pointer(planar, "flag", &PlanarLayer::flag);
  result(planar, "result", &PlanarLayer::result);
  planar.def_readwrite("images", &PlanarLayer::images)
      .def_readwrite("height", &PlanarLayer::height)
      .def_readwrite("width", &PlanarLayer::width)
      .def_readwrite("outputs", &PlanarLayer::outputs)
      .def_readwrite("float16", &PlanarLayer::float16)
      .def_readwrite("room", &PlanarLayer::room)
      .def_readwrite("out_n", &PlanarLayer::out_n)
      .def_readwrite("out_c", &PlanarLayer::out_c)
      .def_readwrite("out_y", &PlanarLayer::out_y)
      .def_readwrite("out_x", &PlanarLayer::out_x)
      .def_readwrite("a", &PlanarLayer::a)
      .def_readwrite("b", &PlanarLayer::b);
}
