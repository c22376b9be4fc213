#include "solver.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include "nodes.h"
#include "threads.h"

namespace fastinv {
namespace {

constexpr double kPi = 3.14159265358979323846;

double dot(const float* a, const float* b, int64_t size) {
  constexpr int64_t kLanes = 16;  // sums side by side, which the compiler puts into vectors
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  }
  double total = 0.0;
  for (; i < size; ++i) total += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (const double lane : lanes) total += lane;
  return total;
}

}  // namespace

Solver::Solver(Program program, Recipe recipe, int threads)
    : program_(std::move(program)),
      recipe_(std::move(recipe)),
      threads_(threads),
      watched_(recipe_.tolerance > 0.0 || recipe_.keep_best) {
  const Shape& image = program_.shapes().front();
  if (!program_.differentiable()) throw std::invalid_argument("the program was not built for gradients");
  if (image.size() != 3) throw std::invalid_argument("the edge must take images [C, H, W]");
  for (const Shape& shape : program_.shapes()) stride_.push_back(round_up(element_count(shape), kLineFloats));
  const auto channels = static_cast<size_t>(image[0]);
  if (!recipe_.low.empty()) {
    if (recipe_.low.size() != channels || recipe_.high.size() != channels) {
      throw std::invalid_argument("one bound for every channel expected");
    }
    for (int64_t p = 0; p < image[1] * image[2]; ++p) {
      low_.insert(low_.end(), recipe_.low.begin(), recipe_.low.end());
      high_.insert(high_.end(), recipe_.high.begin(), recipe_.high.end());
    }
  }
  const auto& nodes = program_.nodes();
  const bool alone =
      !nodes.empty() && std::all_of(nodes.begin(), nodes.end() - 1, [](const std::unique_ptr<Node>& node) {
        return dynamic_cast<const LayoutNode*>(node.get()) != nullptr;
      });
  if (alone) quadratic_ = nodes.back()->quadratic();
  if (quadratic_ && recipe_.tv_beta == 2.0 && (recipe_.exact || !watched_))
    smooth_ = quadratic_->add_total_variation(recipe_.tv_weight);
  std::vector<bool> written(program_.shapes().size(), false);
  written[static_cast<size_t>(program_.output())] = true;
  first_.resize(nodes.size());
  for (size_t k = nodes.size(); k-- > 0;) {
    for (int input : nodes[k]->inputs) {
      first_[k].push_back(!written[static_cast<size_t>(input)]);
      written[static_cast<size_t>(input)] = true;
    }
  }
}

int64_t Solver::workspace_bytes() const {
  int64_t floats = 0;
  for (int64_t stride : stride_) floats += 2 * stride;
  if (quadratic_) floats += stride_.front() + quadratic_->scratch_floats();
  return (floats + stride_.back() + 4 * stride_.front() + tv_scratch_floats() + program_.scratch_floats()) *
         int64_t{sizeof(float)};
}

int64_t Solver::tv_scratch_floats() const {
  const Shape& image = program_.shapes().front();
  return 4 * (image[2] + 1) * image[0];
}

std::unique_ptr<Solver::Workspace> Solver::make_workspace() const {
  auto w = std::make_unique<Workspace>();
  w->node_scratch = Buffer(program_.scratch_floats());
  w->memory = Buffer(workspace_bytes() / int64_t{sizeof(float)} - program_.scratch_floats());
  float* at = w->memory.data();
  const auto next = [&at](int64_t size) { return std::exchange(at, at + size); };
  for (int64_t stride : stride_) w->values.push_back(next(stride));
  for (int64_t stride : stride_) w->grads.push_back(next(stride));
  w->features = next(stride_.back());
  w->first = next(stride_.front());
  w->second = next(stride_.front());
  w->largest = next(stride_.front());
  w->best = next(stride_.front());
  if (quadratic_) {
    w->constant = next(stride_.front());
    w->copy = next(quadratic_->scratch_floats());
  }
  w->scratch = next(tv_scratch_floats());
  return w;
}

double Solver::objective(Workspace& w) const {
  const Frame values = {w.values.data(), stride_.data(), w.node_scratch.data()};
  for (const auto& node : program_.nodes()) node->forward(values, 1, {});
  return program_.kernels().residual(w.values.back(), w.features, w.grads.back(),
                                     element_count(program_.shapes().back()));
}

void Solver::backward(Workspace& w) const {
  const Kernels& kernels = program_.kernels();
  const Frame values = {w.values.data(), stride_.data(), nullptr};
  const Frame grads = {w.grads.data(), stride_.data(), w.node_scratch.data()};
  const auto& nodes = program_.nodes();
  for (size_t k = nodes.size(); k-- > 0;) {
    const Node& node = *nodes[k];
    if (node.activation.kind != ActivationKind::kIdentity) {
      const float* y = values.at(node.output);
      kernels.activate_gradient(y, y, grads.at(node.output),
                                element_count(program_.shapes()[static_cast<size_t>(node.output)]), node.activation);
    }
    for (size_t input = 0; input < node.inputs.size(); ++input) {
      node.backward(values, grads, input, first_[k][input]);
    }
  }
}

TotalVariationArgs Solver::total_variation(Workspace& w) const {
  const Shape& image = program_.shapes().front();
  return {w.values.front(),
          w.grads.front(),
          w.scratch,
          static_cast<int32_t>(image[1]),
          static_cast<int32_t>(image[2]),
          static_cast<int32_t>(image[0]),
          static_cast<float>(recipe_.tv_weight),
          static_cast<float>(recipe_.tv_beta)};
}

void Solver::gradient_at_zero(Workspace& w) const {
  std::fill_n(w.values.front(), stride_.front(), 0.0f);
  objective(w);
  backward(w);
  std::copy_n(w.grads.front(), stride_.front(), w.constant);
}

void Solver::step(Workspace& w, int64_t t) const {
  const bool adam = recipe_.optimizer != OptimizerKind::kSgd;
  const double correction1 = adam ? 1.0 - std::pow(recipe_.beta1, static_cast<double>(t)) : 1.0;
  const double correction2 = adam ? 1.0 - std::pow(recipe_.beta2, static_cast<double>(t)) : 1.0;
  OptimizerArgs args = {};
  args.z = w.values.front();
  args.grad = w.grads.front();
  args.first = w.first;
  args.second = w.second;
  args.largest = w.largest;
  args.low = low_.empty() ? nullptr : low_.data();
  args.high = high_.empty() ? nullptr : high_.data();
  args.size = element_count(program_.shapes().front());
  args.kind = recipe_.optimizer;
  args.beta1 = static_cast<float>(recipe_.beta1);
  args.beta2 = static_cast<float>(recipe_.beta2);
  args.eps = static_cast<float>(recipe_.eps);
  const double done = static_cast<double>(t - 1) / static_cast<double>(recipe_.steps);
  const double lr = recipe_.cosine ? recipe_.lr * 0.5 * (1.0 + std::cos(kPi * done)) : recipe_.lr;
  args.step_size = static_cast<float>(lr / correction1);
  args.root_correction2 = static_cast<float>(std::sqrt(correction2));
  args.momentum = static_cast<float>(recipe_.momentum);
  args.first_step = t == 1;
  program_.kernels().optimizer(args);
}

// What follows from a direction d by the quadratic part of the objective: its gradient is H·z + c, and this H·d.
void Solver::times_hessian(Workspace& w, const float* direction) const {
  const int64_t size = element_count(program_.shapes().front());
  float *z = w.values.front(), *result = w.grads.front();
  if (knows_hessian()) {
    quadratic_->gradient(direction, w.constant, result, w.copy);
    return;
  }
  // Features are edge(0) here, so c is 0 but for rounding; that must not be large beside the direction, which shrinks.
  const double length = std::sqrt(dot(direction, direction, size) / static_cast<double>(size));
  const float unit = length > 0.0 ? static_cast<float>(1.0 / length) : 1.0f;
  for (int64_t i = 0; i < size; ++i) z[i] = unit * direction[i];
  objective(w);
  backward(w);
  if (recipe_.tv_weight > 0.0) program_.kernels().total_variation(total_variation(w));
  for (int64_t i = 0; i < size; ++i) result[i] *= static_cast<float>(length);
}

// Hestenes and Stiefel 1952. Starts at z, ends there, and leaves the features changed.
template <class Poll>
bool Solver::conjugate_gradients(Workspace& w, ImageReport& report, const Poll& poll) const {
  constexpr double kExact = 1e-6;  // of the first residual
  constexpr int kStalled = 50;     // steps without a new lowest residual: rounding is all that is left
  const int64_t size = element_count(program_.shapes().front());
  float *z = w.values.front(), *residual = w.first, *direction = w.second, *solution = w.largest;
  objective(w);
  backward(w);
  if (recipe_.tv_weight > 0.0) program_.kernels().total_variation(total_variation(w));
  for (int64_t i = 0; i < size; ++i) direction[i] = residual[i] = -w.grads.front()[i];
  std::copy_n(z, size, solution);
  std::fill_n(z, size, 0.0f);
  if (knows_hessian()) {
    std::fill_n(w.constant, size, 0.0f);
  } else {
    objective(w);
    std::copy_n(w.values.back(), element_count(program_.shapes().back()), w.features);
  }
  double before = dot(residual, residual, size);
  const double goal = kExact * kExact * before;
  double lowest = before;
  int idle = 0;
  for (report.converged = before <= goal; !report.converged && report.steps < recipe_.steps; ++report.steps) {
    if (idle == kStalled) break;
    if (poll()) return false;
    times_hessian(w, direction);
    const float* image = w.grads.front();
    const double curvature = dot(direction, image, size);
    if (!(curvature > 0.0)) break;  // in the null space, or too large for float32
    const float step = static_cast<float>(before / curvature);
    for (int64_t i = 0; i < size; ++i) {
      solution[i] += step * direction[i];
      residual[i] -= step * image[i];
    }
    const double after = dot(residual, residual, size);
    const float keep = static_cast<float>(after / before);
    for (int64_t i = 0; i < size; ++i) direction[i] = residual[i] + keep * direction[i];
    before = after;
    idle = before < lowest ? 0 : idle + 1;
    lowest = std::min(lowest, before);
    report.converged = before <= goal;
  }
  std::copy_n(solution, size, z);
  return true;
}

template <class Poll>
bool Solver::solve_image(Workspace& w, const float* features, const float* init, float* out, ImageReport& report,
                         const Poll& poll) const {
  const Kernels& kernels = program_.kernels();
  const Shape &image = program_.shapes().front(), &result = program_.shapes().back();
  const int64_t size = element_count(image), out_size = element_count(result);
  const bool turned = result.size() == 3 && program_.channels_last(program_.output());
  const int64_t result_rows = turned ? result[0] : 1;
  float* z = w.values.front();
  const auto load_features = [&] {
    kernels.transpose(features, out_size / result_rows, w.features, result_rows, result_rows, out_size / result_rows);
  };
  load_features();
  if (quadratic_ && !recipe_.exact) gradient_at_zero(w);
  kernels.transpose(init, size / image[0], z, image[0], image[0], size / image[0]);
  std::fill_n(w.first, size, 0.0f);
  std::fill_n(w.second, size, 0.0f);
  std::fill_n(w.largest, size, 0.0f);
  const TotalVariationArgs tv = total_variation(w);
  double before = 0.0, best = INFINITY;
  int64_t calm = 0;  // evaluations in a row within the tolerance
  report = {};
  if (recipe_.exact) {
    if (!conjugate_gradients(w, report, poll)) return false;
    load_features();
    report.objective = objective(w) + (recipe_.tv_weight > 0.0 ? kernels.total_variation(tv) : 0.0);
    kernels.transpose(z, image[0], out, size / image[0], size / image[0], image[0]);
    return true;
  }
  for (;;) {
    if (poll()) return false;
    // The last iterate needs its objective, but no gradient of the network.
    const bool last = report.steps == recipe_.steps;
    double value = !quadratic_ || watched_ || last ? objective(w) : 0.0;
    if (!last) quadratic_ ? quadratic_->gradient(z, w.constant, w.grads.front(), w.copy) : backward(w);
    if (recipe_.tv_weight > 0.0 && (last || !smooth_)) value += kernels.total_variation(tv);
    if (recipe_.keep_best && value < best) {
      best = value;
      std::copy_n(z, size, w.best);
    }
    if (recipe_.tolerance > 0.0 && report.steps > 0) {
      calm = std::fabs(value - before) <= recipe_.tolerance * std::fabs(before) ? calm + 1 : 0;
      report.converged = calm >= recipe_.patience;
    }
    before = value;
    report.objective = recipe_.keep_best && best < value ? best : value;
    if (report.converged || last) break;
    step(w, ++report.steps);
  }
  const bool earlier = recipe_.keep_best && best < before;
  kernels.transpose(earlier ? w.best : z, image[0], out, size / image[0], size / image[0], image[0]);
  return true;
}

bool Solver::solve(const float* features, const float* init, int64_t init_stride, float* out, ImageReport* reports,
                   int64_t n, const std::function<bool()>& interrupted) {
  if (n == 0) return true;
  const int64_t size = element_count(program_.shapes().front());
  const int64_t feature_size = element_count(program_.shapes().back());
  const int workers = static_cast<int>(std::min<int64_t>(threads_, n));
  auto workspaces = workspaces_.take(workers, [this] { return make_workspace(); });
  std::atomic<bool> stop{false};
  using Clock = std::chrono::steady_clock;
  auto asked = Clock::now();
  parallel_for(workers, n, [&](int worker, int64_t i) {
    // Worker 0 is the caller: it alone may ask, ten times a second.
    const auto poll = [&] {
      if (worker == 0 && Clock::now() - asked > std::chrono::milliseconds(100)) {
        if (interrupted()) stop = true;
        asked = Clock::now();
      }
      return stop.load(std::memory_order_relaxed);
    };
    solve_image(*workspaces[static_cast<size_t>(worker)], features + i * feature_size, init + i * init_stride,
                out + i * size, reports[i], poll);
  });
  workspaces_.give_back(std::move(workspaces));
  return !stop;
}

}  // namespace fastinv
