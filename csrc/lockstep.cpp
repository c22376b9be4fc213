#include "lockstep.h"

#include <algorithm>
#include <utility>

namespace fastinv {
namespace {

// In the cache with the weights: measured on Zen 4, whose L2 has 1 MiB.
constexpr int64_t kCacheBytes = 1536 * 1024;

}  // namespace

Lockstep::Lockstep(const Program& program, const Recipe& recipe)
    : program_(program),
      recipe_(recipe),
      images_(program.kernels().width),
      passes_(program, images_),
      low_(bounds(recipe.low, program.shapes().front(), images_)),
      high_(bounds(recipe.high, program.shapes().front(), images_)) {}

bool Lockstep::suits(const Program& program, const Recipe& recipe) {
  if (recipe.method != Method::kDescent || recipe.watches() || !program.runs_abreast()) return false;
  const Lockstep lockstep(program, recipe);
  return lockstep.workspace_floats() * int64_t{sizeof(float)} <= kCacheBytes;
}

int64_t Lockstep::memory_floats() const {
  const int64_t image = passes_.stride(0), result = passes_.stride(static_cast<size_t>(program_.output()));
  return passes_.image_floats() + result + 4 * image + total_variation_scratch(program_.shapes().front(), images_);
}

std::unique_ptr<Lockstep::Workspace> Lockstep::make_workspace() const {
  auto w = std::make_unique<Workspace>();
  w->scratch = Buffer::for_work(program_.scratch_floats(images_));
  w->memory = Buffer::for_work(memory_floats());
  const auto& shapes = program_.shapes();
  w->apart = Buffer(images_ * std::max(element_count(shapes.front()), element_count(shapes.back())));
  float* at = w->memory.data();
  const auto next = [&at](int64_t size) { return std::exchange(at, at + size); };
  const int64_t image = passes_.stride(0);
  w->images = next(image);
  w->tape = passes_.tape(w->images, next(passes_.image_floats()), 1);
  w->features = next(passes_.stride(static_cast<size_t>(program_.output())));
  w->first = next(image);
  w->second = next(image);
  w->largest = next(image);
  w->tv_scratch = next(total_variation_scratch(program_.shapes().front(), images_));
  return w;
}

int64_t Lockstep::run(Workspace& w, const float* features, const float* init, int64_t init_stride,
                      const std::function<bool()>& go_on) const {
  begin(w, features, init, init_stride);
  Descent descent;
  int64_t steps = 0;
  for (; steps < recipe_.steps && go_on(); ++steps) step(w, descent);
  const int64_t size = element_count(program_.shapes().front());
  program_.kernels().transpose(w.images, images_, w.apart.data(), size, size, images_);
  return steps;
}

void Lockstep::begin(Workspace& w, const float* features, const float* init, int64_t init_stride) const {
  const int64_t size = element_count(program_.shapes().front()), results = element_count(program_.shapes().back());
  const auto put = [&](int value, const float* from, int64_t stride, int64_t count, float* to) {
    for (int64_t k = 0; k < images_; ++k) program_.lay_out(value, from + k * stride, w.apart.data() + k * count);
    program_.kernels().transpose(w.apart.data(), count, to, images_, images_, count);
  };
  put(program_.output(), features, results, results, w.features);
  put(0, init, init_stride, size, w.images);
  for (float* moments : {w.first, w.second, w.largest}) std::fill_n(moments, size * images_, 0.0f);
}

void Lockstep::step(Workspace& w, Descent& descent) const {
  const Kernels& kernels = program_.kernels();
  const Crew crew = {{}, w.scratch.data()};
  float* gradient = w.tape.grads.front();
  passes_.forward(w.tape, 1, crew);
  kernels.residual(w.tape.values.back(), w.features, w.tape.grads.back(),
                   element_count(program_.shapes().back()) * images_);
  passes_.backward(w.tape, 1, crew);
  total_variation(kernels, recipe_, program_.shapes().front(), w.images, gradient, w.tv_scratch, images_);
  descent.step(kernels, recipe_,
               {w.images, gradient, w.first, w.second, w.largest, low_, high_,
                element_count(program_.shapes().front()) * images_});
}

}  // namespace fastinv
