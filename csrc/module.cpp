// The bindings, and nothing else: checks of what numpy hands over, the GIL, exceptions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <numeric>
#include <optional>

#include "engine.h"
#include "isa.h"
#include "solver.h"
#include "threads.h"
#include "upload.h"

namespace py = pybind11;
using namespace fastinv;

namespace {

using FloatArray = py::array_t<float, py::array::c_style>;
using IntArray = py::array_t<int32_t, py::array::c_style>;
using ActivationTuple = std::tuple<int, float, float>;
using Pair = std::array<int, 2>;

Activation to_activation(const ActivationTuple& t) {
  const int kind = std::get<0>(t);
  if (kind < 0 || kind > static_cast<int>(ActivationKind::kReciprocal))
    throw std::invalid_argument("unknown activation");
  return {static_cast<ActivationKind>(kind), std::get<1>(t), std::get<2>(t)};
}

template <class T>
std::vector<T> to_vector(const py::array_t<T, py::array::c_style>& a) {
  return {a.data(), a.data() + a.size()};
}

void expect_size(const char* name, const FloatArray& a, int64_t size) {
  if (a.size() != size) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(a.size()) + " floats, expected " +
                                std::to_string(size));
  }
}

SparseMatrix to_sparse(const FloatArray& dense) {
  if (dense.ndim() != 2) throw std::invalid_argument("resample: matrices expected");
  SparseMatrix m;
  m.columns = static_cast<int>(dense.shape(1));
  m.first.push_back(0);
  for (py::ssize_t i = 0; i < dense.shape(0); ++i) {
    for (py::ssize_t j = 0; j < dense.shape(1); ++j) {
      if (dense.at(i, j) == 0.0f) continue;
      m.index.push_back(static_cast<int32_t>(j));
      m.weight.push_back(dense.at(i, j));
    }
    m.first.push_back(static_cast<int32_t>(m.index.size()));
  }
  return m;
}

int convolution(Program& p, int input, const FloatArray& weight, const FloatArray& bias, Shape output, Pair stride,
                Pair padding, Pair dilation, int groups, bool transposed, const ActivationTuple& activation,
                int addend) {
  if (weight.ndim() != 4) throw std::invalid_argument("convolution: weight of rank 4 expected");
  const int64_t channels = p.shapes().at(static_cast<size_t>(input)).at(0);
  const int64_t outputs = output.at(0);
  expect_size("convolution: weight", weight, channels * outputs / groups * weight.shape(2) * weight.shape(3));
  expect_size("convolution: bias", bias, outputs);
  const ConvolutionSpec spec = {
      {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}, groups, transposed};
  return p.convolution(input, weight.data(), bias.data(), static_cast<int>(weight.shape(2)),
                       static_cast<int>(weight.shape(3)), std::move(output), spec, to_activation(activation), addend);
}

int linear(Program& p, int input, const FloatArray& weight, const FloatArray& bias, Shape output,
           const ActivationTuple& activation) {
  expect_size("linear: weight", weight, p.shapes().at(static_cast<size_t>(input)).back() * output.back());
  expect_size("linear: bias", bias, output.back());
  return p.linear(input, weight.data(), bias.data(), std::move(output), to_activation(activation));
}

std::vector<std::pair<std::string, bool>> describe(const Program& program) {
  std::vector<std::pair<std::string, bool>> lines;
  for (const auto& node : program.nodes()) lines.emplace_back(node->describe(), node->shares_image());
  return lines;
}

// Whether it is [n, *shape].
bool fits(const py::array& a, const Shape& shape, py::ssize_t n) {
  return a.ndim() == static_cast<py::ssize_t>(shape.size()) + 1 && a.shape(0) == n &&
         std::equal(shape.begin(), shape.end(), a.shape() + 1);
}

void check_batch(const char* name, const py::array& a, const Shape& shape, py::ssize_t n) {
  if (!(a.flags() & py::array::c_style)) throw std::invalid_argument(std::string(name) + ": not contiguous");
  if (!fits(a, shape, n)) throw std::invalid_argument(std::string(name) + ": wrong shape");
}

// The type of features that come as an array of this one; bfloat16 comes as its bits, uint16.
Dtype to_dtype(const py::array& a) {
  if (py::isinstance<py::array_t<float>>(a)) return Dtype::kFloat32;
  if (py::isinstance<py::array_t<uint16_t>>(a)) return Dtype::kBfloat16;
  if (py::isinstance<py::array_t<uint8_t>>(a)) return Dtype::kUint8;
  if (py::isinstance<py::array_t<int8_t>>(a)) return Dtype::kInt8;
  if (a.dtype().kind() == 'f' && a.itemsize() == 2 && a.dtype().byteorder() != '>') return Dtype::kFloat16;
  throw std::invalid_argument("x: of a type the engine does not read");
}

bool run_engine(Engine& engine, const py::array& in, py::array& out, const FloatArray& scale,
                const FloatArray& zero_point, bool channels_last) {
  const auto& shapes = engine.program().shapes();
  const py::ssize_t n = in.ndim() > 0 ? in.shape(0) : 0;
  Shape given = shapes.front();
  if (channels_last) {
    if (given.size() != 3) throw std::invalid_argument("x: no channels to be last");
    std::rotate(given.begin(), given.begin() + 1, given.end());
  }
  check_batch("x", in, given, n);
  check_batch("out", out, shapes.back(), n);
  Source source = {in.data(), to_dtype(in), to_vector(scale), to_vector(zero_point), channels_last};
  const bool quantised = source.dtype == Dtype::kUint8 || source.dtype == Dtype::kInt8;
  const size_t channels = shapes.front().empty() ? 1 : static_cast<size_t>(shapes.front().front());
  const auto all_equal = [](const std::vector<float>& numbers) {
    return std::adjacent_find(numbers.begin(), numbers.end(), std::not_equal_to<>()) == numbers.end();
  };
  // Then features are widened in one go: of 4,096 flat ones each is a channel of its own (156 µs, and 3 µs so).
  const bool same = all_equal(source.scale) && all_equal(source.zero_point);
  for (std::vector<float>* numbers : {&source.scale, &source.zero_point}) {
    if (quantised ? numbers->size() != 1 && numbers->size() != channels : !numbers->empty())
      throw std::invalid_argument("scale: a wrong number of them");
    if (quantised) numbers->resize(same ? 1 : channels, numbers->front());
  }
  if (quantised && channels_last && !same) throw std::invalid_argument("scale: one for all where channels are last");
  void* to = out.mutable_data();
  const Dtype result = to_dtype(out);
  if (result != Dtype::kFloat32 && result != Dtype::kUint8) throw std::invalid_argument("out: of a wrong type");
  const py::gil_scoped_release release;
  if (result == Dtype::kUint8) return engine.run(source, static_cast<uint8_t*>(to), n);
  return engine.run(source, static_cast<float*>(to), n);
}

// The results for a numpy array that the engine can read where it lies; None for anything else, and for NaN or Inf.
py::object run_plain(Engine& engine, const py::object& x, py::ssize_t most) {
  namespace numpy = py::detail;
  if (Py_TYPE(x.ptr()) != numpy::npy_api::get().PyArray_Type_) return py::none();
  const auto in = py::reinterpret_borrow<py::array>(x);
  const Shape &features = engine.program().shapes().front(), &image = engine.program().shapes().back();
  const bool plain = (in.flags() & numpy::npy_api::NPY_ARRAY_ALIGNED_) != 0 && py::isinstance<FloatArray>(in);
  if (!plain || in.ndim() == 0 || in.shape(0) > most || !fits(in, features, in.shape(0))) return py::none();
  std::vector<py::ssize_t> shape = {in.shape(0)};
  shape.insert(shape.end(), image.begin(), image.end());
  FloatArray out(shape);
  const Source source = {in.data(), Dtype::kFloat32, {}, {}, false};
  float* to = out.mutable_data();
  const bool finite = [&] {
    const py::gil_scoped_release release;
    return engine.run(source, to, shape.front());
  }();
  return finite ? py::object(std::move(out)) : py::none();
}

bool all_finite(const Solver& solver, const FloatArray& features) {
  const float* values = features.data();
  const int64_t size = features.size();
  const py::gil_scoped_release release;
  return solver.finite(values, size);
}

// Ctrl-C ends it early; what else a signal's handler or `progress` raises comes through.
py::tuple solve(Solver& solver, const FloatArray& features, const FloatArray& init, const py::object& progress) {
  const Shape &image = solver.program().shapes().front(), &feature = solver.program().shapes().back();
  const py::ssize_t n = features.ndim() > 0 ? features.shape(0) : 0;
  check_batch("features", features, feature, n);
  const bool shared = init.ndim() == static_cast<py::ssize_t>(image.size());
  const int64_t size = element_count(image);
  if (shared) {
    expect_size("init", init, size);
  } else {
    check_batch("init", init, image, n);
  }
  std::vector<py::ssize_t> shape = {n};
  shape.insert(shape.end(), image.begin(), image.end());
  FloatArray out(shape);
  py::array_t<double> objective(n);
  py::array_t<int64_t> steps(n);
  py::array_t<bool> converged(n);
  std::vector<ImageReport> reports(static_cast<size_t>(n));
  const float *from = features.data(), *start = init.data();
  float* to = out.mutable_data();
  std::optional<py::error_already_set> raised;
  const auto poll = [&](const Progress& so_far) {
    const KeepDenormals keep;
    const py::gil_scoped_acquire acquire;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!progress.is_none()) progress(so_far.images, so_far.steps);
    } catch (py::error_already_set& error) {
      raised = std::move(error);
    }
    return raised.has_value();
  };
  {
    const py::gil_scoped_release release;
    solver.solve({from, start, shared ? 0 : size, to, reports.data(), n}, poll);
  }
  if (raised && !raised->matches(PyExc_KeyboardInterrupt)) throw std::move(*raised);
  for (py::ssize_t i = 0; i < n; ++i) {
    const ImageReport& report = reports[static_cast<size_t>(i)];
    objective.mutable_at(i) = report.objective;
    steps.mutable_at(i) = report.steps;
    converged.mutable_at(i) = report.converged;
  }
  return py::make_tuple(out, objective, steps, converged, !raised);
}

// What is to become `to`, byte for byte.
Copy to_copy(const py::array& from, py::array& to) {
  for (const py::array* a : {&from, static_cast<const py::array*>(&to)}) {
    if (!(a->flags() & py::array::c_style)) throw std::invalid_argument("copy: not contiguous");
  }
  if (from.nbytes() != to.nbytes()) throw std::invalid_argument("copy: of another size");
  return {static_cast<const uint8_t*>(from.data()), static_cast<uint8_t*>(to.mutable_data()), from.nbytes()};
}

void send(Upload& upload, const py::array& source, uint64_t there, bool rounds, uint64_t stream,
          const py::object& results, const py::object& out) {
  if (!(source.flags() & py::array::c_style)) throw std::invalid_argument("send: not contiguous");
  if (rounds && !py::isinstance<py::array_t<float>>(source)) throw std::invalid_argument("send: floats are rounded");
  Copy beside = {nullptr, nullptr, 0};
  if (!results.is_none()) {
    auto to = out.cast<py::array>();
    beside = to_copy(results.cast<py::array>(), to);
  }
  const void* values = source.data();
  const int64_t bytes = source.nbytes() / (rounds ? 2 : 1);
  const py::gil_scoped_release release;
  upload.send(values, there, bytes, rounds, reinterpret_cast<void*>(stream), beside);
}

double fma_peak(const std::string& isa, int threads, double seconds) {
  if (threads < 1 || !(seconds > 0 && seconds <= 60)) throw std::invalid_argument("fma_peak: threads or seconds");
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 4096;
  const Kernels& kernels = kernels_for(isa);
  std::vector<double> speeds(static_cast<size_t>(threads));
  const py::gil_scoped_release release;
  run_team(threads, [&](int worker, int) {
    const Clock::time_point begin = Clock::now();
    double elapsed;
    int64_t rounds = 0;
    volatile float result = 0.0f;
    do {
      result = kernels.fma_peak(kRounds, result);
      rounds += kRounds;
      elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    } while (elapsed < seconds);
    speeds[static_cast<size_t>(worker)] = 2e-9 * kPeakChains * kernels.width * static_cast<double>(rounds) / elapsed;
  });
  return std::accumulate(speeds.begin(), speeds.end(), 0.0);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled CPU engine of fastinv.";

  m.def("available_threads", &available_threads, "Processors this process may run on.");
  m.def(
      "isas",
      [] {
        std::vector<std::pair<std::string, bool>> list;
        for (const Isa& isa : isas()) list.emplace_back(isa.kernels->isa, isa.runnable);
        return list;
      },
      "Instruction sets of this build, best first, and whether this machine runs them.");
  m.def(
      "vector_width", [](const std::string& isa) { return kernels_for(isa).width; }, py::arg("isa"),
      "Floats in a vector of the instruction set.");
  m.def(
      "has_bfloat16", [](const std::string& isa) { return has_bfloat16(kernels_for(isa)); }, py::arg("isa"),
      "Whether this machine multiplies bfloat16 numbers in the instruction set.");
  m.def(
      "has_tiles", [](const std::string& isa) { return has_tiles(kernels_for(isa)); }, py::arg("isa"),
      "Whether the instruction set's kernels multiply tiles of them: with AMX, or one number at a time in 'portable'.");
  m.def(
      "resolve_isa", [](const std::string& name) { return std::string(kernels_for(name).isa); }, py::arg("name"),
      "The named instruction set, or the best for ''. ValueError when the machine lacks it.");

  m.def("fma_peak", &fma_peak, py::arg("isa"), py::arg("threads"), py::arg("seconds"),
        "GFLOP/s of multiply-adds in registers, by so many threads for so long.");

  m.def(
      "copy",
      [](const py::array& source, py::array target, int threads) {
        const Copy whole = to_copy(source, target);
        const py::gil_scoped_release release;
        copy(whole, threads);
      },
      py::arg("source"), py::arg("target"), py::arg("threads"), "target = source, byte for byte; contiguous both.");

  py::class_<Upload>(m, "Upload", "What brings arrays to a GPU through pieces of pinned memory, by all threads.")
      .def(py::init([](py::array pinned, int threads, const std::string& driver, const std::string& isa) {
             const int64_t pieces = int64_t{Upload::kPieces} * threads,
                           piece = threads < 1 ? 0 : pinned.nbytes() / pieces;
             if (piece < 4 || piece % 4 != 0) throw std::invalid_argument("Upload: pinned or threads");
             auto* memory = static_cast<uint8_t*>(pinned.mutable_data());
             return std::make_unique<Upload>(kernels_for(isa), memory, piece, threads, driver);
           }),
           py::arg("pinned"), py::arg("threads"), py::arg("driver"), py::arg("isa") = "", py::keep_alive<1, 2>())
      .def("send", &send, py::arg("source"), py::arg("there"), py::arg("rounds"), py::arg("stream"),
           py::arg("results") = py::none(), py::arg("out") = py::none(),
           "On the stream, bytes from address `there` on become what `source` holds, with `rounds` as bfloat16; beside "
           "it out = results. Returns when source has been read and the results are copied.")
      .def_readonly_static("pieces", &Upload::kPieces, "Of a thread.");

  py::class_<Program>(m, "Program", "A network as kernel launches.")
      .def(py::init([](const std::string& isa, Shape input, bool differentiable, bool abreast, bool bfloat16) {
             const Kernels& kernels = kernels_for(isa);
             if (bfloat16 && !has_bfloat16(kernels) && !has_tiles(kernels))
               throw std::invalid_argument("no bfloat16 on this machine");
             return std::make_unique<Program>(kernels, std::move(input), differentiable, abreast, bfloat16);
           }),
           py::arg("isa"), py::arg("input"), py::arg("differentiable"), py::arg("abreast") = false,
           py::arg("bfloat16") = false)
      .def("convolution", &convolution, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
           py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("transposed"),
           py::arg("activation"), py::arg("addend") = -1)
      .def("linear", &linear, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
           py::arg("activation"))
      .def(
          "max_pool",
          [](Program& p, int input, Shape output, Pair kernel, Pair stride, Pair padding, Pair dilation,
             const ActivationTuple& activation) {
            const PoolSpec spec = {
                {kernel[0], kernel[1]}, {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
            return p.max_pool(input, std::move(output), spec, to_activation(activation));
          },
          py::arg("input"), py::arg("output"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
          py::arg("dilation"), py::arg("activation"))
      .def(
          "resample",
          [](Program& p, int input, const FloatArray& rows, const FloatArray& columns,
             const ActivationTuple& activation) {
            return p.resample(input, to_sparse(rows), to_sparse(columns), to_activation(activation));
          },
          py::arg("input"), py::arg("rows"), py::arg("columns"), py::arg("activation"))
      .def(
          "gather",
          [](Program& p, int input, const IntArray& index, Shape output, const ActivationTuple& activation) {
            return p.gather(input, to_vector(index), std::move(output), to_activation(activation));
          },
          py::arg("input"), py::arg("index"), py::arg("output"), py::arg("activation"))
      .def(
          "concat",
          [](Program& p, std::vector<int> inputs, int axis, Shape output, const ActivationTuple& activation) {
            return p.concat(std::move(inputs), axis, std::move(output), to_activation(activation));
          },
          py::arg("inputs"), py::arg("axis"), py::arg("output"), py::arg("activation"))
      .def_property_readonly("rounds", &Program::rounds, "Whether some factors are rounded to bfloat16.")
      .def(
          "add",
          [](Program& p, int a, int b, Shape output, const ActivationTuple& activation) {
            return p.binary(BinaryKind::kAdd, a, b, std::move(output), to_activation(activation));
          },
          py::arg("a"), py::arg("b"), py::arg("output"), py::arg("activation"))
      .def(
          "mul",
          [](Program& p, int a, int b, Shape output, const ActivationTuple& activation) {
            return p.binary(BinaryKind::kMul, a, b, std::move(output), to_activation(activation));
          },
          py::arg("a"), py::arg("b"), py::arg("output"), py::arg("activation"))
      .def(
          "affine",
          [](Program& p, int input, const FloatArray& scale, const FloatArray& shift,
             const ActivationTuple& activation) {
            return p.affine(input, to_vector(scale), to_vector(shift), to_activation(activation));
          },
          py::arg("input"), py::arg("scale"), py::arg("shift"), py::arg("activation"))
      .def(
          "normalize",
          [](Program& p, int input, const FloatArray& weight, const FloatArray& bias, int groups, bool spatial,
             bool centered, float eps, const ActivationTuple& activation) {
            return p.normalize(input, to_vector(weight), to_vector(bias), {groups, spatial, centered, eps},
                               to_activation(activation));
          },
          py::arg("input"), py::arg("weight"), py::arg("bias"), py::kw_only(), py::arg("groups"), py::arg("spatial"),
          py::arg("centered"), py::arg("eps"), py::arg("activation"))
      .def(
          "attention",
          [](Program& p, int q, int k, int v, const FloatArray& bias, int windows, int heads, float scale,
             const ActivationTuple& activation) {
            return p.attention(q, k, v, to_vector(bias), {windows, heads, scale}, to_activation(activation));
          },
          py::arg("q"), py::arg("k"), py::arg("v"), py::arg("bias"), py::kw_only(), py::arg("windows"),
          py::arg("heads"), py::arg("scale"), py::arg("activation"))
      .def(
          "matmul",
          [](Program& p, int a, int b, int groups, bool transposed, const ActivationTuple& activation) {
            return p.matmul(a, b, groups, transposed, to_activation(activation));
          },
          py::arg("a"), py::arg("b"), py::kw_only(), py::arg("groups"), py::arg("transposed"), py::arg("activation"))
      .def("softmax", &Program::softmax, py::arg("input"))
      .def(
          "activate",
          [](Program& p, int input, const ActivationTuple& activation) {
            return p.activate(input, to_activation(activation));
          },
          py::arg("input"), py::arg("activation"))
      .def("finish", &Program::finish, py::arg("value"), "Makes this value the output; returns its number.");

  py::class_<Engine>(m, "Engine", "Forward runs of a program, which it takes over.")
      .def(py::init([](Program& program, int64_t flops, int threads) {
             return std::make_unique<Engine>(std::move(program), flops, threads);
           }),
           py::arg("program"), py::arg("flops"), py::arg("threads"))
      .def("run", &run_engine, py::arg("x"), py::arg("out"), py::arg("scale").noconvert() = FloatArray(0),
           py::arg("zero_point").noconvert() = FloatArray(0), py::arg("channels_last") = false,
           "Features of any type to floats or bytes. False when they hold NaN or Inf: the results mean nothing.")
      .def("run_plain", &run_plain, py::arg("x"), py::arg("most"),
           "New results for at most so many features in a plain float32 array; None for any other, and for NaN or Inf.")
      .def(
          "describe", [](const Engine& e) { return describe(e.program()); },
          "For every launch the kernel, and whether threads share a single image.")
      .def("profile", &Engine::profile, py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
           "Seconds that one thread spends in each launch, for one image.")
      .def_property_readonly("isa", [](const Engine& e) { return std::string(e.program().kernels().isa); })
      .def_property_readonly("block", &Engine::block, "Images a thread takes at once.")
      .def_property_readonly("strips", &Engine::strips, "Strips that an image is cut into; 1: none.")
      .def_property_readonly("workspace_bytes", &Engine::workspace_bytes, "Memory of one thread.");

  py::class_<Solver>(m, "Solver", "The rMLE loop over a differentiable program, which it takes over.")
      .def(py::init([](Program& program, const std::string& optimizer, int64_t steps, double lr, double beta1,
                       double beta2, double eps, double momentum, bool cosine, double tv_weight, double tv_beta,
                       double tolerance, int64_t patience, bool keep_best, std::vector<float> low,
                       std::vector<float> high, int threads, int64_t block) {
             const OptimizerKind kind = optimizer == "sgd"       ? OptimizerKind::kSgd
                                        : optimizer == "amsgrad" ? OptimizerKind::kAmsgrad
                                                                 : OptimizerKind::kAdam;
             const Method method = optimizer == "exact"   ? Method::kExact
                                   : optimizer == "lbfgs" ? Method::kLbfgs
                                                          : Method::kDescent;
             Recipe recipe = {method,         kind,           steps,     lr,      beta1,     beta2,    eps,
                              momentum,       cosine,         tv_weight, tv_beta, tolerance, patience, keep_best,
                              std::move(low), std::move(high)};
             return std::make_unique<Solver>(std::move(program), std::move(recipe), threads, block);
           }),
           py::arg("program"), py::kw_only(), py::arg("optimizer"), py::arg("steps"), py::arg("lr"), py::arg("beta1"),
           py::arg("beta2"), py::arg("eps"), py::arg("momentum"), py::arg("cosine"), py::arg("tv_weight"),
           py::arg("tv_beta"), py::arg("tolerance"), py::arg("patience"), py::arg("keep_best"), py::arg("low"),
           py::arg("high"), py::arg("threads"), py::arg("block") = 0)
      .def(
          "solve", &solve, py::arg("features").noconvert(), py::arg("init").noconvert(),
          py::arg("progress") = py::none(),
          "(z, objective, steps, converged), one entry per image, and whether it came to the end. `progress` is called "
          "with the images done and the steps of all images so far, ten times a second.")
      .def("finite", &all_finite, py::arg("features"), "Whether no value is NaN or Inf.")
      .def(
          "hessian",
          [](const Solver& s) {
            const std::vector<float> matrix = s.hessian();
            const int64_t size = matrix.empty() ? 0 : s.image_size();
            return py::array_t<float>({size, size}, matrix.data());
          },
          "The matrix [n, n] of a quadratic objective's gradient, where its inverse would pay; else [0, 0].")
      .def(
          "take_inverse",
          [](Solver& s, const py::array_t<double, py::array::c_style>& inverse) {
            if (inverse.size() != s.image_size() * s.image_size()) throw std::invalid_argument("not [n, n]");
            s.take_inverse(inverse.data());
          },
          py::arg("inverse").noconvert(), "Of that matrix: from now on exact minima come from it.")
      .def("describe", [](const Solver& s) { return describe(s.program()); })
      .def_property_readonly("quadratic", &Solver::quadratic, "Whether steps take the gradient from a quadratic form.")
      .def_property_readonly("isa", [](const Solver& s) { return std::string(s.program().kernels().isa); })
      .def_property_readonly("block", &Solver::block, "Images a thread has in flight.")
      .def_property_readonly("images_abreast", &Solver::images_abreast,
                             "Images of a group that goes through its steps together, or 0.")
      .def_property_readonly("workspace_bytes", &Solver::workspace_bytes, "Memory of one thread.");
}
