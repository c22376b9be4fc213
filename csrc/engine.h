// Forward runs of a program over batches.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program.h"
#include "workspace.h"

namespace fastinv {

class Engine {
 public:
  Engine(Program program, int threads);

  // in: [n, *input shape], out: [n, *output shape], both row-major. Safe to call from several threads at once.
  void run(const float* in, float* out, int64_t n);

  const Program& program() const { return program_; }
  int64_t workspace_bytes() const {
    return (arena_size_ * block_ + program_.scratch_floats()) * int64_t{sizeof(float)};
  }
  int64_t block() const { return block_; }

 private:
  struct Workspace {
    Buffer arena, scratch;
    std::vector<float*> data;
  };

  void plan_memory();
  std::unique_ptr<Workspace> make_workspace() const;
  void run_block(Workspace& workspace, const float* in, float* out, int64_t images) const;

  const Program program_;
  const int threads_;
  std::vector<int64_t> stride_;  // floats from image to image, by value
  std::vector<int64_t> offset_;  // of the value in the arena, for one image
  int64_t arena_size_ = 0;       // for one image
  int64_t block_ = 1;            // images a worker takes at once
  WorkspacePool<Workspace> workspaces_;
};

}  // namespace fastinv
