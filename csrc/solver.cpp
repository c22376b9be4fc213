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

Solver::Solver(Program program, Recipe recipe, int threads, int64_t block)
    : program_(std::move(program)),
      passes_(program_),
      recipe_(std::move(recipe)),
      threads_(threads),
      low_(bounds(recipe_.low, program_.shapes().front())),
      high_(bounds(recipe_.high, program_.shapes().front())) {
  const Shape& image = program_.shapes().front();
  if (!program_.differentiable()) throw std::invalid_argument("the program was not built for gradients");
  if (image.size() != 3) throw std::invalid_argument("the edge must take images [C, H, W]");
  const auto channels = recipe_.low.empty() ? 0 : static_cast<size_t>(image[0]);
  if (recipe_.low.size() != channels || recipe_.high.size() != channels) {
    throw std::invalid_argument("one bound for every channel expected");
  }
  const auto& nodes = program_.nodes();
  const bool alone =
      !nodes.empty() && std::all_of(nodes.begin(), nodes.end() - 1, [](const std::unique_ptr<Node>& node) {
        return dynamic_cast<const LayoutNode*>(node.get()) != nullptr;
      });
  if (alone) quadratic_ = nodes.back()->quadratic();
  if (quadratic_ && recipe_.tv_beta == 2.0) smooth_ = quadratic_->add_total_variation(recipe_.tv_weight);
  const bool many = block == 0 || block >= program_.kernels().width;
  if (many && !quadratic_ && Lockstep::suits(program_, recipe_)) {
    lockstep_ = std::make_unique<Lockstep>(program_, recipe_);
  }
  block_ = plan_block(block);
}

// Whether the layers of an image are long enough for threads to meet after each.
bool Solver::is_large() const {
  constexpr int64_t kLarge = 256 * 1024 / sizeof(float);
  return image_floats() > kLarge && !quadratic_ && recipe_.method != Method::kExact;
}

bool Solver::shares_images(int64_t n) const { return is_large() && leaves_idle(n, threads_); }

// An image by itself stays in the cache from step to step. But weights want to be read for many pixels at once: where
// layers of a large edge have few, images share them.
int64_t Solver::plan_block(int64_t most) const {
  constexpr int64_t kPixels = 256, kMost = 4;
  if (quadratic_ || recipe_.method == Method::kExact) return 1;
  if (most > 0) return most;
  if (!is_large()) return 1;
  int64_t fewest = kPixels;
  for (const Shape& shape : program_.shapes()) fewest = std::min(fewest, shape.size() == 3 ? shape[1] * shape[2] : 1);
  return std::clamp<int64_t>(kPixels / fewest, 1, kMost);
}

int64_t Solver::image_floats() const { return passes_.image_floats() + result_stride() + 5 * image_stride(); }

// Of a worker, beside its nodes' scratch memory.
int64_t Solver::memory_floats() const {
  int64_t floats = block_ * image_floats() + total_variation_scratch(program_.shapes().front());
  if (quadratic_) floats += image_stride() + quadratic_->scratch_floats();
  return floats;
}

int64_t Solver::workspace_bytes() const {
  int64_t floats = memory_floats() + program_.scratch_floats(1);
  if (recipe_.method == Method::kLbfgs) floats += block_ * Lbfgs::floats(image_stride());
  if (lockstep_) floats += lockstep_->workspace_floats();
  if (inverse_) floats += newton_floats();
  return floats * int64_t{sizeof(float)};
}

std::unique_ptr<Solver::Workspace> Solver::make_workspace() const {
  auto w = std::make_unique<Workspace>();
  w->node_scratch = Buffer::for_work(program_.scratch_floats(1));
  w->memory = Buffer::for_work(memory_floats());
  float* at = w->memory.data();
  const auto next = [&at](int64_t size) { return std::exchange(at, at + size); };
  w->images = next(block_ * image_stride());
  w->tape = passes_.tape(w->images, next(block_ * passes_.image_floats()), block_);
  w->gradients = w->tape.grads.front();
  w->results = w->tape.values.back();
  w->features = next(block_ * result_stride());
  w->first = next(block_ * image_stride());
  w->second = next(block_ * image_stride());
  w->largest = next(block_ * image_stride());
  w->best = next(block_ * image_stride());
  w->tv_scratch = next(total_variation_scratch(program_.shapes().front()));
  if (quadratic_) {
    w->constant = next(image_stride());
    w->copy = next(quadratic_->scratch_floats());
  }
  w->slots.resize(static_cast<size_t>(block_));
  return w;
}

// ---- the network and the objective ----------------------------------------------------------------------------------

double Solver::residual(Workspace& w, int64_t slot) const {
  return program_.kernels().residual(result_at(w.results, slot), result_at(w.features, slot),
                                     result_at(w.tape.grads.back(), slot), element_count(program_.shapes().back()));
}

double Solver::add_total_variation(Workspace& w, int64_t slot) const {
  return total_variation(program_.kernels(), recipe_, program_.shapes().front(), image_at(w.images, slot),
                         image_at(w.gradients, slot), w.tv_scratch);
}

double Solver::objective(Workspace& w, int64_t slot) const { return residual(w, slot) + add_total_variation(w, slot); }

double Solver::objective_alone(Workspace& w) const {
  if (quadratic_) return evaluate_quadratic(w, true);
  load_features(w, 0);
  forward(w, 1);
  return objective(w, 0);
}

double Solver::evaluate_quadratic(Workspace& w, bool valued) const {
  const Kernels& kernels = program_.kernels();
  const Slot& slot = w.slots.front();
  const auto differentiate = [&] { quadratic_->gradient(w.images, w.constant, w.gradients, w.copy); };
  double value = 0.0;
  differentiate();
  if (valued) {
    const int64_t size = image_size();
    value = slot.at_zero + 0.5 * (kernels.dot(w.images, w.gradients, size) + kernels.dot(w.images, w.constant, size));
    // L-BFGS goes on until rounding is all that is left.
    if (recipe_.method == Method::kLbfgs || !(value >= kTrusted * slot.at_zero)) {
      load_features(w, 0);
      forward(w, 1);
      value = smooth_ ? objective(w, 0) : residual(w, 0);
      differentiate();
    }
  }
  return smooth_ ? value : value + add_total_variation(w, 0);
}

void Solver::evaluate(Workspace& w, int64_t active, const Crew& crew) const {
  if (quadratic_) {  // one image in flight
    Slot& slot = w.slots.front();
    slot.objective = evaluate_quadratic(w, recipe_.watches() || is_last(slot));
    return;
  }
  passes_.forward(w.tape, active, crew);
  const auto slots = w.slots.begin();
  // The last iterates need their objectives, but no gradient.
  const bool steps = std::any_of(slots, slots + active, [this](const Slot& slot) { return !is_last(slot); });
  if (crew.share.index == 0) {
    for (int64_t i = 0; i < active; ++i) slots[i].objective = residual(w, i);
  }
  crew.meet();
  if (steps) passes_.backward(w.tape, active, crew);
  if (crew.share.index > 0) return;
  for (int64_t i = 0; i < active; ++i) slots[i].objective += add_total_variation(w, i);
}

// What the others of a crew do while the first one works.
void Solver::help(Workspace& w, const Crew& crew, const std::atomic<int64_t>& active) const {
  for (;;) {
    crew.meet();
    if (active == 0) return;
    evaluate(w, active, crew);
  }
}

// ---- one image ------------------------------------------------------------------------------------------------------

void Solver::begin(Workspace& w, const Batch& batch, int64_t index, int64_t image) const {
  const int64_t size = image_size();
  Slot& slot = w.slots[static_cast<size_t>(index)];
  slot.image = image;
  slot.features = features_of(batch, image);
  slot.report = {0.0, 0, false};
  slot.best = INFINITY;
  slot.calm = 0;
  slot.descent = {};
  if (quadratic_) slot.at_zero = quadratic_->at_zero(slot.features, w.constant, w.node_scratch.data());
  if (!quadratic_ || (recipe_.method == Method::kExact && !knows_hessian())) load_features(w, index);
  float* z = image_at(w.images, index);
  program_.lay_out(0, batch.init + image * batch.init_stride, z);
  for (float* moments : {w.first, w.second, w.largest}) std::fill_n(image_at(moments, index), size, 0.0f);
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
    std::copy_n(image_at(w.images, index), image_stride(), image_at(w.best, index));
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
  const Lbfgs::Verdict verdict = lbfgs.next(slot.objective, image_at(w.images, index), image_at(w.gradients, index));
  const double before = report.objective;
  const bool accepted = lbfgs.steps() > report.steps;
  report.objective = lbfgs.objective();
  report.steps = lbfgs.steps();
  report.converged = verdict == Lbfgs::Verdict::kStuck || (accepted && is_calm(slot, before, report.objective));
  return !report.converged && !is_last(slot);
}

void Solver::step(Workspace& w, int64_t index) const {
  w.slots[static_cast<size_t>(index)].descent.step(
      program_.kernels(), recipe_,
      {image_at(w.images, index), image_at(w.gradients, index), image_at(w.first, index), image_at(w.second, index),
       image_at(w.largest, index), low_, high_, image_size()});
}

// Writes what the image is now.
void Solver::finish(Workspace& w, const Batch& batch, int64_t index) const {
  const Slot& slot = w.slots[static_cast<size_t>(index)];
  const float* z = image_at(w.images, index);
  ImageReport& report = batch.reports[slot.image];
  report = slot.report;
  if (recipe_.method == Method::kLbfgs) z = slot.lbfgs->best();
  if (recipe_.keep_best && slot.best < report.objective) {
    z = image_at(w.best, index);
    report.objective = slot.best;
  }
  program_.bring_back(0, z, batch.out + slot.image * image_size());
}

// The objective of an image by itself at z, and all that came of it.
void Solver::conclude(Workspace& w, const Batch& batch, int64_t image, const float* z, ImageReport report) const {
  Slot& slot = w.slots.front();
  slot.image = image;
  slot.features = features_of(batch, image);
  std::copy_n(z, image_size(), w.images);
  slot.report = report;
  slot.report.objective = objective_alone(w);
  finish(w, batch, 0);
}

// What an image in flight takes along into another slot: all but what each evaluation makes anew.
void Solver::move(Workspace& w, int64_t from, int64_t to) const {
  if (from == to) return;
  std::swap(w.slots[static_cast<size_t>(from)], w.slots[static_cast<size_t>(to)]);
  for (float* block : {w.images, w.first, w.second, w.largest, w.best}) {
    std::copy_n(image_at(block, from), image_stride(), image_at(block, to));
  }
  std::copy_n(result_at(w.features, from), result_stride(), result_at(w.features, to));
}

// ---- many images ----------------------------------------------------------------------------------------------------

// Images that a worker should have in flight: fewer and fewer towards the end of a batch, so that all end together.
int64_t Solver::in_flight(const Call& call) const {
  const int64_t left = std::max<int64_t>(0, call.batch.n - call.next), shares = 2 * threads_;
  return std::clamp<int64_t>((left + shares - 1) / shares, 1, block_);
}

void Solver::work(Workspace& w, Call& call, bool caller, const Crew& crew) const {
  const Batch& batch = call.batch;
  Watch watch(call, caller);
  int64_t active = 0;
  const auto leave = [&](int64_t slot) {
    finish(w, batch, slot);
    move(w, --active, slot);
  };
  while (!watch.stopped()) {
    const int64_t group = call.next_abreast.fetch_add(lockstep_ ? lockstep_->images() : 0);
    if (group < call.abreast) {
      run_abreast(w, call, watch, group);
      continue;
    }
    if (inverse_) {
      const int64_t even = (batch.n + threads_ - 1) / threads_, some = std::min(even, kMostTogether);
      const int64_t first = call.next.fetch_add(some);
      if (first >= batch.n) return;
      newton(w, call, first, std::min(some, batch.n - first));
      continue;
    }
    const int64_t wanted = crew.barrier ? block_ : in_flight(call);
    while (active < wanted) {
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
    if (crew.barrier) call.active = active;
    crew.meet();
    evaluate(w, active, crew);
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
    if (!quadratic_) forward(w, active);
    for (int64_t i = 0; i < active; ++i) {
      w.slots[static_cast<size_t>(i)].report.objective = quadratic_ ? evaluate_quadratic(w, true) : objective(w, i);
    }
  }
  while (active > 0) leave(active - 1);
}

bool Solver::finite(const float* values, int64_t size) const {
  constexpr int64_t kWorthwhile = 256 * 1024;  // 1 MiB takes about 40 µs
  const int workers = static_cast<int>(std::clamp<int64_t>(size / kWorthwhile, 1, threads_));
  std::atomic<bool> found{true};
  run_team(workers, [&](int worker, int team) {
    const Share share = {worker, team};
    const int64_t begin = share.begin(size);
    if (!program_.kernels().finite(values + begin, share.end(size) - begin)) found = false;
  });
  return found;
}

bool Solver::solve(const Batch& batch, const Poll& poll) {
  if (batch.n == 0) return true;
  const int64_t size = image_size();
  for (int64_t i = 0; i < batch.n; ++i) {
    batch.reports[i] = {std::numeric_limits<double>::quiet_NaN(), 0, false};
    std::copy_n(batch.init + i * batch.init_stride, size, batch.out + i * size);
  }
  const bool together = shares_images(batch.n);
  const int workers = together ? threads_ : static_cast<int>(std::min<int64_t>(threads_, batch.n));
  auto workspaces = workspaces_.take(workers, [this] { return make_workspace(); });
  Call call = {batch, poll};
  call.next = call.abreast = together ? 0 : abreast(batch.n);
  call.working = workers;
  Barrier barrier;
  run_team(workers, [&](int worker, int team) {
    Workspace& own = *workspaces[static_cast<size_t>(worker)];
    Crew crew = alone(own);
    if (together && team > 1) crew = {{worker, team}, own.node_scratch.data(), &barrier};
    if (crew.barrier && worker > 0) return help(*workspaces.front(), crew, call.active);
    const auto dismiss = [&] {
      call.active = 0;
      crew.meet();
    };
    if (worker == 0) call.working -= workers - team;  // those whom another caller has
    try {
      work(own, call, worker == 0, crew);
    } catch (...) {
      call.stop = true;
      --call.working;
      if (crew.barrier) dismiss();
      throw;
    }
    --call.working;
    if (crew.barrier) return dismiss();
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
