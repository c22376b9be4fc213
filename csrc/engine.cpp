#include "engine.h"

#include <algorithm>
#include <stdexcept>

#include "threads.h"

namespace fastinv {
namespace {

// Images in a block share weights while those are in cache; their values should stay in L2 beside them. Half of
// 1 MiB, the smallest L2 of the processors with AVX-512.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kMaxBlock = 32;
// A linear layer reads all its weights once per tile of rows: with fewer images than a tile has rows it would be
// bound by memory.
constexpr int64_t kLinearBlock = 2 * kMaxTilePixels;

struct Stretch {
  int64_t begin, end;
};

// The lowest offset where `size` floats fit beside `taken`.
int64_t first_fit(std::vector<Stretch> taken, int64_t size) {
  std::sort(taken.begin(), taken.end(), [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; });
  int64_t at = 0;
  for (const Stretch& stretch : taken) {
    if (at + size <= stretch.begin) break;
    at = std::max(at, stretch.end);
  }
  return at;
}

}  // namespace

Engine::Engine(Program program, int threads) : program_(std::move(program)), threads_(threads) {
  if (program_.output() == 0) throw std::invalid_argument("the program does nothing: finish it first");
  plan_memory();
  const int64_t bytes = std::max<int64_t>(arena_size_, 1) * int64_t{sizeof(float)};
  block_ = std::clamp<int64_t>(kBlockBytes / bytes, program_.has_linear() ? kLinearBlock : 1, kMaxBlock);
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
  for (size_t v = 0; v < shapes.size(); ++v) {
    const bool callers = v == 0 || v + 1 == shapes.size();  // input and output are used where the caller has them
    stride_.push_back(callers ? element_count(shapes[v]) : round_up(element_count(shapes[v]), kLineFloats));
    if (callers) {
      offset_.push_back(0);
      continue;
    }
    // Value v is written by node v − 1: memory of a value last read there cannot be taken yet.
    std::vector<Stretch> taken;
    for (size_t u = 1; u < v; ++u) {
      if (last_use[u] >= static_cast<int>(v) - 1) taken.push_back({offset_[u], offset_[u] + stride_[u]});
    }
    offset_.push_back(first_fit(std::move(taken), stride_[v]));
    arena_size_ = std::max(arena_size_, offset_[v] + stride_[v]);
  }
}

std::unique_ptr<Engine::Workspace> Engine::make_workspace() const {
  auto workspace = std::make_unique<Workspace>();
  workspace->arena = Buffer(arena_size_ * block_);
  workspace->scratch = Buffer(program_.scratch_floats());
  for (int64_t offset : offset_) workspace->data.push_back(workspace->arena.data() + offset * block_);
  return workspace;
}

void Engine::run_block(Workspace& workspace, const float* in, float* out, int64_t images) const {
  workspace.data.front() = const_cast<float*>(in);  // no node writes to the input
  workspace.data.back() = out;
  const Frame frame = {workspace.data.data(), stride_.data(), workspace.scratch.data()};
  for (const auto& node : program_.nodes()) node->forward(frame, images, {});
}

void Engine::run(const float* in, float* out, int64_t n) {
  if (n == 0) return;
  const int64_t in_size = element_count(program_.shapes().front());
  const int64_t out_size = element_count(program_.shapes().back());
  // Small batches are cut finer so that every thread has work; results do not depend on the cut.
  const int64_t block = std::min(block_, (n + threads_ - 1) / threads_);
  const int64_t blocks = (n + block - 1) / block;
  const int workers = static_cast<int>(std::min<int64_t>(threads_, blocks));
  auto workspaces = workspaces_.take(workers, [this] { return make_workspace(); });
  parallel_for(workers, blocks, [&](int worker, int64_t b) {
    const int64_t begin = b * block;
    run_block(*workspaces[static_cast<size_t>(worker)], in + begin * in_size, out + begin * out_size,
              std::min(block, n - begin));
  });
  workspaces_.give_back(std::move(workspaces));
}

}  // namespace fastinv
