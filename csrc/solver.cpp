#include "solver.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <thread>
#include <utility>

#include "nodes.h"
#include "threads.h"

namespace fastinv {
namespace {

constexpr double kPi = 3.14159265358979323846;

}  // namespace

// What asks the caller whether to go on, ten times a second.
class Solver::Watch {
 public:
  Watch(Call& call, bool caller) : call_(call), caller_(caller), asked_(Clock::now()) {}

  bool stopped() {
    if (caller_ && Clock::now() - asked_ > std::chrono::milliseconds(100)) {
      if (call_.poll({call_.images, call_.steps})) call_.stop = true;
      asked_ = Clock::now();
    }
    return call_.stop.load(std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;
  Call& call_;
  const bool caller_;
  Clock::time_point asked_;
};

Solver::Solver(Program program, Recipe recipe, int threads, int64_t block)
    : program_(std::move(program)),
      recipe_(std::move(recipe)),
      threads_(threads),
      watched_(recipe_.tolerance > 0.0 || recipe_.keep_best || recipe_.method == Method::kLbfgs) {
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
  std::vector<bool> written(program_.shapes().size(), false);
  written[static_cast<size_t>(program_.output())] = true;
  first_.resize(nodes.size());
  for (size_t k = nodes.size(); k-- > 0;) {
    for (int input : nodes[k]->inputs) {
      first_[k].push_back(!written[static_cast<size_t>(input)]);
      written[static_cast<size_t>(input)] = true;
    }
  }
  const bool alone =
      !nodes.empty() && std::all_of(nodes.begin(), nodes.end() - 1, [](const std::unique_ptr<Node>& node) {
        return dynamic_cast<const LayoutNode*>(node.get()) != nullptr;
      });
  if (alone) quadratic_ = nodes.back()->quadratic();
  if (quadratic_ && recipe_.tv_beta == 2.0 && (recipe_.method == Method::kExact || !watched_)) {
    smooth_ = quadratic_->add_total_variation(recipe_.tv_weight);
  }
  block_ = plan_block(block);
  if (quadratic_) {
    auto w = make_workspace();
    forward(*w, 1);  // memory begins as zeros
    at_zero_.assign(w->values.back(), w->values.back() + element_count(program_.shapes().back()));
    std::vector<std::unique_ptr<Workspace>> made;
    made.push_back(std::move(w));
    workspaces_.give_back(std::move(made));
  }
}

// Weights that several images share are read from the cache once. Where all values of an image stay in it, from step to
// step, another image would only take their place.
int64_t Solver::plan_block(int64_t most) const {
  constexpr int64_t kResident = 1024 * 1024 / sizeof(float);  // L2 of the processors with AVX-512
  constexpr int64_t kMost = 4;
  if (quadratic_ || recipe_.method == Method::kExact) return 1;
  return most > 0 ? most : image_floats() <= kResident ? 1 : kMost;
}

int64_t Solver::image_floats() const {
  int64_t floats = stride_.back() + 4 * stride_.front();
  for (int64_t stride : stride_) floats += 2 * stride;
  return floats;
}

// Of a worker, beside its nodes' scratch memory.
int64_t Solver::memory_floats() const {
  int64_t floats = block_ * image_floats() + tv_scratch_floats();
  if (quadratic_) floats += stride_.front() + quadratic_->scratch_floats();
  return floats;
}

int64_t Solver::workspace_bytes() const {
  int64_t floats = memory_floats() + program_.scratch_floats();
  if (recipe_.method == Method::kLbfgs) floats += block_ * Lbfgs::floats(stride_.front());
  return floats * int64_t{sizeof(float)};
}

int64_t Solver::tv_scratch_floats() const {
  const Shape& image = program_.shapes().front();
  return round_up(4 * (image[2] + 1) * image[0], kLineFloats);
}

std::unique_ptr<Solver::Workspace> Solver::make_workspace() const {
  auto w = std::make_unique<Workspace>();
  w->node_scratch = Buffer(program_.scratch_floats());
  w->memory = Buffer(memory_floats());
  float* at = w->memory.data();
  const auto next = [&at](int64_t size) { return std::exchange(at, at + size); };
  for (int64_t stride : stride_) w->values.push_back(next(block_ * stride));
  for (int64_t stride : stride_) w->grads.push_back(next(block_ * stride));
  w->features = next(block_ * stride_.back());
  w->first = next(block_ * stride_.front());
  w->second = next(block_ * stride_.front());
  w->largest = next(block_ * stride_.front());
  w->best = next(block_ * stride_.front());
  w->tv_scratch = next(tv_scratch_floats());
  if (quadratic_) {
    w->constant = next(stride_.front());
    w->copy = next(quadratic_->scratch_floats());
  }
  w->slots.resize(static_cast<size_t>(block_));
  return w;
}

float* Solver::at(float* block, int64_t slot, size_t value) const { return block + slot * stride_[value]; }

// ---- the network and the objective ----------------------------------------------------------------------------------

void Solver::forward(Workspace& w, int64_t images) const {
  const Frame values = {w.values.data(), stride_.data(), w.node_scratch.data()};
  for (const auto& node : program_.nodes()) node->forward(values, images, {});
}

double Solver::residual(Workspace& w, int64_t slot) const {
  const size_t last = stride_.size() - 1;
  return program_.kernels().residual(at(w.values.back(), slot, last), at(w.features, slot, last),
                                     at(w.grads.back(), slot, last), element_count(program_.shapes().back()));
}

void Solver::backward(Workspace& w, int64_t images) const {
  const Kernels& kernels = program_.kernels();
  const Frame values = {w.values.data(), stride_.data(), nullptr};
  const Frame grads = {w.grads.data(), stride_.data(), w.node_scratch.data()};
  const auto& nodes = program_.nodes();
  for (size_t k = nodes.size(); k-- > 0;) {
    const Node& node = *nodes[k];
    if (node.activation.kind != ActivationKind::kIdentity) {
      const int64_t size = element_count(program_.shapes()[static_cast<size_t>(node.output)]);
      for (int64_t i = 0; i < images; ++i) {
        const float* y = values.at(node.output, i);
        kernels.activate_gradient(y, y, grads.at(node.output, i), size, node.activation);
      }
    }
    for (size_t input = 0; input < node.inputs.size(); ++input) {
      node.backward(values, grads, images, input, first_[k][input]);
    }
  }
}

double Solver::total_variation(Workspace& w, int64_t slot) const {
  if (recipe_.tv_weight == 0.0) return 0.0;
  const Shape& image = program_.shapes().front();
  return program_.kernels().total_variation({at(w.values.front(), slot), at(w.grads.front(), slot), w.tv_scratch,
                                             static_cast<int32_t>(image[1]), static_cast<int32_t>(image[2]),
                                             static_cast<int32_t>(image[0]), static_cast<float>(recipe_.tv_weight),
                                             static_cast<float>(recipe_.tv_beta)});
}

void Solver::load_features(Workspace& w, const float* features, int64_t slot) const {
  const Shape& result = program_.shapes().back();
  const int64_t rows = result.size() == 3 && program_.channels_last(program_.output()) ? result[0] : 1;
  const int64_t columns = element_count(result) / rows;
  program_.kernels().transpose(features, columns, at(w.features, slot, stride_.size() - 1), rows, rows, columns);
}

void Solver::evaluate(Workspace& w, int64_t active) const {
  if (quadratic_) {  // one image in flight
    Slot& slot = w.slots.front();
    slot.objective = 0.0;
    if (watched_ || is_last(slot)) {
      forward(w, 1);
      slot.objective = residual(w, 0);
    }
    if (!is_last(slot)) quadratic_->gradient(w.values.front(), w.constant, w.grads.front(), w.copy);
    if (is_last(slot) || !smooth_) slot.objective += total_variation(w, 0);
    return;
  }
  forward(w, active);
  bool steps = false;  // the last iterates need their objectives, but no gradient
  for (int64_t i = 0; i < active; ++i) {
    Slot& slot = w.slots[static_cast<size_t>(i)];
    slot.objective = residual(w, i);
    steps = steps || !is_last(slot);
  }
  if (steps) backward(w, active);
  for (int64_t i = 0; i < active; ++i) w.slots[static_cast<size_t>(i)].objective += total_variation(w, i);
}

// ---- one image ------------------------------------------------------------------------------------------------------

void Solver::begin(Workspace& w, const Batch& batch, int64_t index, int64_t image) const {
  const Shape& shape = program_.shapes().front();
  const int64_t size = element_count(shape), out_size = element_count(program_.shapes().back());
  Slot& slot = w.slots[static_cast<size_t>(index)];
  slot.image = image;
  slot.report = {0.0, 0, false};
  slot.best = INFINITY;
  slot.calm = 0;
  load_features(w, batch.features + image * out_size, index);
  if (quadratic_ && recipe_.method != Method::kExact) {  // the gradient at zero
    std::copy(at_zero_.begin(), at_zero_.end(), w.values.back());
    residual(w, 0);
    backward(w, 1);
    std::copy_n(w.grads.front(), size, w.constant);
  }
  float* z = at(w.values.front(), index);
  program_.kernels().transpose(batch.init + image * batch.init_stride, size / shape[0], z, shape[0], shape[0],
                               size / shape[0]);
  for (float* moments : {w.first, w.second, w.largest}) std::fill_n(at(moments, index), size, 0.0f);
  if (recipe_.method != Method::kLbfgs) return;
  if (!slot.lbfgs) {
    slot.lbfgs = std::make_unique<Lbfgs>(program_.kernels(), size, low_.empty() ? nullptr : low_.data(),
                                         high_.empty() ? nullptr : high_.data());
  }
  slot.lbfgs->restart(z);
}

// Whether the objective has changed as little as the tolerance for as long as it takes.
bool Solver::is_calm(Slot& slot, double before, double after) const {
  if (recipe_.tolerance == 0.0) return false;
  slot.calm = std::fabs(after - before) <= recipe_.tolerance * std::fabs(before) ? slot.calm + 1 : 0;
  return slot.calm >= recipe_.patience;
}

bool Solver::advance(Workspace& w, int64_t index) const {
  if (recipe_.method == Method::kLbfgs) return advance_lbfgs(w, index);
  Slot& slot = w.slots[static_cast<size_t>(index)];
  ImageReport& report = slot.report;
  const double before = report.objective;  // of the iterate before
  report.objective = slot.objective;
  if (recipe_.keep_best && slot.objective < slot.best) {
    slot.best = slot.objective;
    std::copy_n(at(w.values.front(), index), stride_.front(), at(w.best, index));
  }
  report.converged = report.steps > 0 && is_calm(slot, before, slot.objective);
  if (report.converged || is_last(slot)) return false;
  ++report.steps;
  step(w, index);
  return true;
}

bool Solver::advance_lbfgs(Workspace& w, int64_t index) const {
  Slot& slot = w.slots[static_cast<size_t>(index)];
  ImageReport& report = slot.report;
  Lbfgs& lbfgs = *slot.lbfgs;
  const Lbfgs::Verdict verdict = lbfgs.next(slot.objective, at(w.values.front(), index), at(w.grads.front(), index));
  const double before = report.objective;
  const bool accepted = lbfgs.steps() > report.steps;
  report.objective = lbfgs.objective();
  report.steps = lbfgs.steps();
  report.converged = verdict == Lbfgs::Verdict::kStuck || (accepted && is_calm(slot, before, report.objective));
  return !report.converged && !is_last(slot);
}

void Solver::step(Workspace& w, int64_t index) const {
  const int64_t t = w.slots[static_cast<size_t>(index)].report.steps;
  const bool adam = recipe_.optimizer != OptimizerKind::kSgd;
  const double correction1 = adam ? 1.0 - std::pow(recipe_.beta1, static_cast<double>(t)) : 1.0;
  const double correction2 = adam ? 1.0 - std::pow(recipe_.beta2, static_cast<double>(t)) : 1.0;
  OptimizerArgs args = {};
  args.z = at(w.values.front(), index);
  args.grad = at(w.grads.front(), index);
  args.first = at(w.first, index);
  args.second = at(w.second, index);
  args.largest = at(w.largest, index);
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
  args.root_scale = static_cast<float>(1.0 / std::sqrt(correction2));
  args.momentum = static_cast<float>(recipe_.momentum);
  args.first_step = t == 1;
  program_.kernels().optimizer(args);
}

// Writes what the image is now.
void Solver::finish(Workspace& w, const Batch& batch, int64_t index) const {
  const Shape& shape = program_.shapes().front();
  const int64_t size = element_count(shape), pixels = size / shape[0];
  const Slot& slot = w.slots[static_cast<size_t>(index)];
  const float* z = at(w.values.front(), index);
  ImageReport& report = batch.reports[slot.image];
  report = slot.report;
  if (recipe_.method == Method::kLbfgs) z = slot.lbfgs->best();
  if (recipe_.keep_best && slot.best < report.objective) {
    z = at(w.best, index);
    report.objective = slot.best;
  }
  program_.kernels().transpose(z, shape[0], batch.out + slot.image * size, pixels, pixels, shape[0]);
}

// What an image in flight takes along into another slot: all but what each evaluation makes anew.
void Solver::move(Workspace& w, int64_t from, int64_t to) const {
  if (from == to) return;
  std::swap(w.slots[static_cast<size_t>(from)], w.slots[static_cast<size_t>(to)]);
  for (float* block : {w.values.front(), w.first, w.second, w.largest, w.best}) {
    std::copy_n(at(block, from), stride_.front(), at(block, to));
  }
  std::copy_n(at(w.features, from, stride_.size() - 1), stride_.back(), at(w.features, to, stride_.size() - 1));
}

// ---- quadratic objectives -------------------------------------------------------------------------------------------

// What follows from a direction d by the quadratic part of the objective: its gradient is H·z + c, and this H·d.
void Solver::times_hessian(Workspace& w, const float* direction) const {
  const Kernels& kernels = program_.kernels();
  const int64_t size = element_count(program_.shapes().front());
  float *z = w.values.front(), *result = w.grads.front();
  if (knows_hessian()) {
    quadratic_->gradient(direction, w.constant, result, w.copy);
    return;
  }
  // Features are edge(0) here, so c is 0 but for rounding; that must not be large beside the direction, which shrinks.
  const double length = std::sqrt(kernels.dot(direction, direction, size) / static_cast<double>(size));
  const float unit = length > 0.0 ? static_cast<float>(1.0 / length) : 1.0f;
  for (int64_t i = 0; i < size; ++i) z[i] = unit * direction[i];
  forward(w, 1);
  residual(w, 0);
  backward(w, 1);
  total_variation(w, 0);
  for (int64_t i = 0; i < size; ++i) result[i] *= static_cast<float>(length);
}

// Hestenes and Stiefel 1952. Takes the image in the first slot to the end; false when it was stopped on the way.
bool Solver::conjugate_gradients(Workspace& w, Call& call, Watch& watch) const {
  constexpr double kExact = 1e-6;  // of the first residual
  constexpr int kStalled = 50;     // steps without a new lowest residual: rounding is all that is left
  const Kernels& kernels = program_.kernels();
  const int64_t size = element_count(program_.shapes().front()), out_size = element_count(program_.shapes().back());
  Slot& slot = w.slots.front();
  ImageReport& report = slot.report;
  float *z = w.values.front(), *residual_left = w.first, *direction = w.second, *solution = w.largest;
  forward(w, 1);
  residual(w, 0);
  backward(w, 1);
  total_variation(w, 0);
  for (int64_t i = 0; i < size; ++i) direction[i] = residual_left[i] = -w.grads.front()[i];
  std::copy_n(z, size, solution);
  std::fill_n(z, size, 0.0f);
  if (knows_hessian()) {
    std::fill_n(w.constant, size, 0.0f);
  } else {
    forward(w, 1);
    std::copy_n(w.values.back(), out_size, w.features);
  }
  double before = kernels.dot(residual_left, residual_left, size);
  const double goal = kExact * kExact * before;
  double lowest = before;
  int idle = 0;
  bool stopped = false;
  for (report.converged = before <= goal; !report.converged && report.steps < recipe_.steps; ++report.steps) {
    stopped = watch.stopped();
    if (stopped || idle == kStalled) break;
    times_hessian(w, direction);
    const float* image = w.grads.front();
    const double curvature = kernels.dot(direction, image, size);
    if (!(curvature > 0.0)) break;  // in the null space, or too large for float32
    const float step = static_cast<float>(before / curvature);
    kernels.add_scaled(step, direction, solution, size);
    kernels.add_scaled(-step, image, residual_left, size);
    const double after = kernels.dot(residual_left, residual_left, size);
    const float keep = static_cast<float>(after / before);
    for (int64_t i = 0; i < size; ++i) direction[i] = residual_left[i] + keep * direction[i];
    before = after;
    idle = before < lowest ? 0 : idle + 1;
    lowest = std::min(lowest, before);
    report.converged = before <= goal;
    ++call.steps;
  }
  std::copy_n(solution, size, z);
  load_features(w, call.batch.features + slot.image * out_size, 0);
  forward(w, 1);
  report.objective = residual(w, 0) + total_variation(w, 0);
  return !stopped;
}

// ---- many images ----------------------------------------------------------------------------------------------------

void Solver::work(Workspace& w, Call& call, bool caller) const {
  const Batch& batch = call.batch;
  Watch watch(call, caller);
  int64_t active = 0;
  const auto leave = [&](int64_t slot) {
    finish(w, batch, slot);
    move(w, --active, slot);
  };
  while (!watch.stopped()) {
    while (active < block_) {
      const int64_t image = call.next.fetch_add(1);
      if (image >= batch.n) break;
      begin(w, batch, active++, image);
    }
    if (active == 0) return;
    if (recipe_.method == Method::kExact) {
      const bool done = conjugate_gradients(w, call, watch);
      leave(0);
      call.images += done;
      continue;
    }
    evaluate(w, active);
    int64_t steps = 0;
    for (int64_t slot = active; slot-- > 0;) {
      const ImageReport& report = w.slots[static_cast<size_t>(slot)].report;
      const int64_t before = report.steps;
      const bool goes_on = advance(w, slot);
      steps += report.steps - before;
      if (goes_on) continue;
      leave(slot);
      ++call.images;
    }
    call.steps += steps;
  }
  if (active > 0 && recipe_.method == Method::kDescent) {  // what their last steps came to
    forward(w, active);
    for (int64_t i = 0; i < active; ++i) {
      w.slots[static_cast<size_t>(i)].report.objective = residual(w, i) + total_variation(w, i);
    }
  }
  while (active > 0) leave(active - 1);
}

bool Solver::solve(const Batch& batch, const Poll& poll) {
  if (batch.n == 0) return true;
  const int64_t size = element_count(program_.shapes().front());
  for (int64_t i = 0; i < batch.n; ++i) {
    batch.reports[i] = {std::numeric_limits<double>::quiet_NaN(), 0, false};
    std::copy_n(batch.init + i * batch.init_stride, size, batch.out + i * size);
  }
  const int workers = static_cast<int>(std::min<int64_t>(threads_, batch.n));
  auto workspaces = workspaces_.take(workers, [this] { return make_workspace(); });
  Call call = {batch, poll};
  call.working = workers;
  run_team(workers, [&](int worker, int team) {
    if (worker == 0) call.working -= workers - team;  // those whom another caller has
    try {
      work(*workspaces[static_cast<size_t>(worker)], call, worker == 0);
    } catch (...) {
      call.stop = true;
      --call.working;
      throw;
    }
    --call.working;
    if (worker > 0) return;
    // The last images may take the others long: the caller must be able to stop them.
    Watch watch(call, true);
    const auto since = std::chrono::steady_clock::now();
    while (call.working > 0 && !watch.stopped()) {
      const bool soon = std::chrono::steady_clock::now() - since < std::chrono::milliseconds(1);
      soon ? std::this_thread::yield() : std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  });
  workspaces_.give_back(std::move(workspaces));
  return !call.stop;
}

}  // namespace fastinv
