#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "arena.h"
#include "threads.h"

namespace fastinv {
namespace {

// Images in a block share weights while those are in cache; their values should stay in L2 beside them. Half of
// 1 MiB, the smallest L2 of the processors with AVX-512.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kMaxBlock = 32;  // and images that a worker takes at once, one block after the other
// A linear layer reads all its weights once per tile of rows: with fewer images than a tile has rows it would be
// bound by memory.
constexpr int64_t kLinearBlock = 2 * kMaxTilePixels;

}  // namespace

Engine::Engine(Program program, int64_t flops, int threads)
    : program_(std::move(program)), threads_(threads), flops_(flops), reveals_nonfinite_(program_.reveals_nonfinite()) {
  if (program_.output() == 0) throw std::invalid_argument("the program does nothing: finish it first");
  plan_memory();
  const int64_t bytes = (arena_size_ + stride_.front() + stride_.back()) * int64_t{sizeof(float)};
  if (program_.prefers_abreast() && program_.runs_abreast()) abreast_ = program_.kernels().width;
  if (bytes > 2 * kBlockBytes && abreast_ == 0) {
    auto strips = std::make_unique<const Strips>(program_, kBlockBytes);
    if (strips->count() > 1) strips_ = std::move(strips);
  }
  // Where other values are larger than the weights, more images would cost more than they save.
  const bool pays = (strips_ && strips_->first() > 0) || program_.linear_weights() * int64_t{sizeof(float)} > bytes;
  block_ = std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(bytes, 1), pays ? kLinearBlock : 1, kMaxBlock);
  if (abreast_ > 0) block_ = kMaxBlock;
}

// Values whose lives do not overlap share memory.
void Engine::plan_memory() {
  const auto& shapes = program_.shapes();
  const auto& nodes = program_.nodes();
  std::vector<int> last_use(shapes.size(), -1);  // the node that reads the value last
  for (size_t k = 0; k < nodes.size(); ++k) {
    for (int input : nodes[k]->inputs) last_use[static_cast<size_t>(input)] = static_cast<int>(k);
  }
  last_use[static_cast<size_t>(program_.output())] = static_cast<int>(nodes.size());
  Arena arena;
  for (size_t v = 0; v < shapes.size(); ++v) {
    const bool callers = v == 0 || v + 1 == shapes.size();  // input and output are used where the caller has them
    const int64_t image = program_.image_floats(static_cast<int>(v));
    stride_.push_back(callers ? image : round_up(image, kLineFloats));
    if (callers) {
      offset_.push_back(0);
      continue;
    }
    // Value v is written by node v − 1: memory of a value last read there cannot be taken yet.
    const auto node = static_cast<int>(v) - 1;
    offset_.push_back(arena.place(size(v), node, std::max(node, last_use[v])));
  }
  arena_size_ = arena.size();
}

int64_t Engine::size(size_t value) const { return stride_[value] + program_.floats_around(static_cast<int>(value)); }

std::unique_ptr<Engine::Workspace> Engine::make_workspace() const {
  auto workspace = std::make_unique<Workspace>();
  workspace->scratch = Buffer::for_work(scratch_floats());
  int64_t largest = 0;
  for (const Shape& shape : program_.shapes()) largest = std::max(largest, element_count(shape));
  for (Buffer& buffer : workspace->abreast) buffer = Buffer(largest * abreast_);
  for (size_t v = 0; v < offset_.size(); ++v) workspace->abreast_data.push_back(workspace->abreast[v % 2].data());
  workspace->data.resize(offset_.size());
  if (!strips_) use_arena(*workspace);
  return workspace;
}

// Images in strips have windows, and memory for what comes before them.
void Engine::use_strips(Workspace& workspace) const {
  if (workspace.windows.size() > 0) return;
  workspace.windows = Buffer(strips_->window_floats());
  workspace.before = Buffer(floats_before_strips() * block_);
  float* at = workspace.before.data();
  for (int v = 1; v <= strips_->first(); ++v) {
    workspace.data[static_cast<size_t>(v)] = at + program_.floats_before(v);
    at += size(static_cast<size_t>(v)) * block_;
  }
}

int64_t Engine::floats_before_strips() const {
  int64_t floats = 0;
  for (int v = 1; v <= strips_->first(); ++v) floats += size(static_cast<size_t>(v));
  return floats;
}

// Those that threads share have all values there.
void Engine::use_arena(Workspace& workspace) const {
  if (workspace.arena.size() > 0) return;
  workspace.arena = Buffer::for_work(arena_size_ * block_);
  for (size_t v = 1; v + 1 < offset_.size(); ++v) {
    workspace.data[v] = workspace.arena.data() + offset_[v] * block_ + program_.floats_before(static_cast<int>(v));
  }
}

const void* Source::at(int64_t element) const {
  switch (dtype) {
    case Dtype::kFloat32: return static_cast<const float*>(data) + element;
    case Dtype::kFloat16:
    case Dtype::kBfloat16: return static_cast<const uint16_t*>(data) + element;
    default: return static_cast<const uint8_t*>(data) + element;
  }
}

WidenArgs Source::widened(int64_t element, float* to, int64_t count, int64_t channel) const {
  const auto c = static_cast<size_t>(channel);
  return {at(element), to, count, dtype, scale.empty() ? 1.0f : scale[c], scale.empty() ? 0.0f : zero_point[c]};
}

// Makes this share of the block's features floats at value 0, where they are anything else.
void Engine::read(Workspace& workspace, const Source& in, int64_t first, int64_t images, Share share) const {
  if (in.direct()) return;
  if (in.channels_last) return turn(workspace, in, first, images, share);
  const int64_t size = element_count(program_.shapes().front()), begin = share.begin(images * size);
  const int64_t end = share.end(images * size);
  const int64_t channels = std::max<int64_t>(1, static_cast<int64_t>(in.scale.size())), plane = size / channels;
  for (int64_t at = begin; at < end;) {
    const int64_t channel = at / plane % channels, until = std::min(end, (at / plane + 1) * plane);
    program_.kernels().widen(in.widened(first * size + at, workspace.in.data() + at, until - at, channel));
    at = until;
  }
}

// The same of features [H, W, C].
void Engine::turn(Workspace& workspace, const Source& in, int64_t first, int64_t images, Share share) const {
  const Kernels& kernels = program_.kernels();
  const Shape& shape = program_.shapes().front();
  const int64_t channels = shape[0], pixels = shape[1] * shape[2], size = channels * pixels;
  const int64_t end = share.end(images * pixels);
  // One worker's own: those that share a block have one workspace.
  std::unique_ptr<float[]> widened(in.dtype == Dtype::kFloat32 ? nullptr : new float[static_cast<size_t>(size)]);
  for (int64_t at = share.begin(images * pixels); at < end;) {
    const int64_t image = at / pixels, until = std::min(end, (image + 1) * pixels), pixel = at - image * pixels;
    const int64_t element = (first + image) * size + pixel * channels;
    if (widened) kernels.widen(in.widened(element, widened.get(), (until - at) * channels, 0));
    const float* from = widened ? widened.get() : static_cast<const float*>(in.at(element));
    kernels.transpose(from, channels, workspace.in.data() + image * size + pixel, pixels, until - at, channels);
    at = until;
  }
}

std::vector<double> Engine::profile(double seconds) const {
  using Clock = std::chrono::steady_clock;
  const auto& nodes = program_.nodes();
  const auto w = make_workspace();
  use_arena(*w);
  w->in = Buffer(stride_.front() * block_);
  w->out = Buffer(stride_.back() * block_);
  w->data.front() = w->in.data();
  w->data.back() = w->out.data();
  for (int64_t i = 0; i < w->in.size(); ++i) w->in[i] = static_cast<float>(i * 2654435761 % 2048) / 1024.0f - 1.0f;
  const Frame frame = {w->data.data(), stride_.data(), w->scratch.data()};
  std::vector<std::vector<double>> samples(nodes.size());
  run_team(1, [&](int, int) {
    const auto begin = Clock::now();
    do {
      for (size_t k = 0; k < nodes.size(); ++k) {
        const auto from = Clock::now();
        nodes[k]->forward(frame, block_, {});
        samples[k].push_back(std::chrono::duration<double>(Clock::now() - from).count());
      }
    } while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds || samples.front().size() < 3);
  });
  std::vector<double> medians;
  for (std::vector<double>& times : samples) {
    std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
    medians.push_back(times[times.size() / 2] / static_cast<double>(block_));
  }
  return medians;
}

// The block's images from `first` on, as many as go abreast.
void Engine::run_abreast(Workspace& w, int64_t first) const {
  const Kernels& kernels = program_.kernels();
  const auto& shapes = program_.shapes();
  const int64_t in_size = element_count(shapes.front()), out_size = element_count(shapes.back());
  kernels.transpose(w.data.front() + first * in_size, in_size, w.abreast_data.front(), abreast_, abreast_, in_size);
  Frame frame = {w.abreast_data.data(), stride_.data(), w.scratch.data()};
  frame.lanes = abreast_;
  for (const auto& node : program_.nodes()) node->forward(frame, 1, {});
  kernels.transpose(w.abreast_data.back(), abreast_, w.data.back() + first * out_size, out_size, out_size, abreast_);
}

// Whether the threads work on each image together: few images would leave some of them idle, and each image is long
// enough, 10 µs of one core or so, for them to meet after every layer.
bool Engine::shares_images(int64_t n) const {
  constexpr int64_t kWorthwhile = 400'000;  // FLOPs
  return flops_ >= kWorthwhile && leaves_idle(n, threads_);
}

bool Engine::run(const Source& in, float* out, uint8_t* bytes, int64_t n) {
  if (n == 0) return true;
  const int64_t in_size = element_count(program_.shapes().front());
  const int64_t out_size = element_count(program_.shapes().back());
  std::atomic<bool> finite{true};
  const auto work = [&](Workspace& w, int64_t first, int64_t last, float* scratch, Share share, const auto& meet) {
    const int64_t images = last - first;
    const float *inputs = w.data.front(), *outputs = w.data.back();
    const auto all_finite = [&](const float* values, int64_t count, Share part) {
      const int64_t from = part.begin(count);
      return program_.kernels().finite(values + from, part.end(count) - from);
    };
    read(w, in, first, images, share);
    if (in.channels_last) meet();  // what a worker has turned is not what it looks at next
    if (!reveals_nonfinite_ && !all_finite(inputs, images * in_size, share)) finite = false;
    int64_t done = 0;
    if (abreast_ > 0 && share.count == 1 && images >= abreast_) {
      for (; done + abreast_ <= images; done += abreast_) run_abreast(w, done);
      w.data.front() += done * in_size;
      w.data.back() += done * out_size;
    }
    if (strips_ && share.count == 1) {
      use_strips(w);
      const auto from = static_cast<size_t>(strips_->first());
      const Frame frame = {w.data.data(), stride_.data(), scratch};
      for (size_t k = 0; k < from; ++k) program_.nodes()[k]->forward(frame, images, {});
      std::vector<float*> values(w.data.size());
      for (; done < images; ++done) {
        strips_->run(frame.at(strips_->first(), done), w.data.back() + done * out_size, values.data(), stride_.data(),
                     w.windows.data(), scratch);
      }
    }
    if (done < images) {
      // What another worker takes next is in the cache they share, at least.
      const int64_t ahead = in.direct() && share.count == 1 ? n - last : 0;
      const Frame frame = {w.data.data(), stride_.data(), scratch, ahead};
      for (const auto& node : program_.nodes()) {
        if (node != program_.nodes().front() || !in.direct()) meet();
        node->forward(frame, images - done, share);
      }
    }
    if (reveals_nonfinite_ || bytes) meet();
    // One value for 21 of the features at conv11, and still in the cache: 27 µs an image instead of 30. But finite
    // features may overflow on the way, too.
    if (reveals_nonfinite_ && !all_finite(outputs, images * out_size, share) &&
        !all_finite(inputs, images * in_size, {})) {
      finite = false;
    }
    if (!bytes) return;
    const int64_t from = share.begin(images * out_size), to = share.end(images * out_size);
    program_.kernels().to_bytes(w.out.data() + from, bytes + first * out_size + from, to - from);
  };
  // Input and output as the nodes see them: the caller's memory where it holds floats.
  const auto place = [&](Workspace& w, int64_t first) {
    if (!in.direct() && w.in.size() == 0) w.in = Buffer(in_size * block_);
    if (bytes && w.out.size() == 0) w.out = Buffer(out_size * block_);
    float* callers = static_cast<float*>(const_cast<void*>(in.at(first * in_size)));  // no node writes to it
    w.data.front() = in.direct() ? callers : w.in.data();
    w.data.back() = bytes ? w.out.data() : out + first * out_size;
  };

  if (shares_images(n)) {
    // In the first worker's arena; of the others' workspaces only the scratch memory is used.
    auto workspaces = workspaces_.take(threads_, [this] { return make_workspace(); });
    for (int64_t first = 0; first < n; first += block_) {
      Workspace& w = *workspaces.front();
      use_arena(w);
      const int64_t last = std::min(first + block_, n);
      place(w, first);
      Barrier barrier;
      run_team(threads_, [&](int worker, int workers) {
        float* scratch = workspaces[static_cast<size_t>(worker)]->scratch.data();
        work(w, first, last, scratch, {worker, workers}, [&] { barrier.wait(workers); });
      });
    }
    workspaces_.give_back(std::move(workspaces));
    return finite;
  }
  // Small batches are cut finer so that every thread has work; results do not depend on the cut.
  const int64_t even = (n + threads_ - 1) / threads_;
  const int64_t block = std::min(block_, abreast_ > 0 && n >= abreast_ ? round_up(even, abreast_) : even);
  const int workers = static_cast<int>(std::min<int64_t>(threads_, (n + block - 1) / block));
  auto workspaces = workspaces_.take(workers, [this] { return make_workspace(); });
  const int64_t step = abreast_ > 0 && block >= abreast_ ? abreast_ : block;
  parallel_ranges(workers, n, step, kMaxBlock, [&](int worker, int64_t begin, int64_t end) {
    Workspace& w = *workspaces[static_cast<size_t>(worker)];
    for (int64_t first = begin; first < end; first += block) {
      place(w, first);
      work(w, first, std::min(first + block, end), w.scratch.data(), {}, [] {});
    }
  });
  workspaces_.give_back(std::move(workspaces));
  return finite;
}

}  // namespace fastinv
