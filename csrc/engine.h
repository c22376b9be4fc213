// Forward runs of a program over batches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "program.h"
#include "strips.h"
#include "workspace.h"

namespace fastinv {

// A batch as the caller has it: [n, *input shape], row-major, of any type.
struct Source {
  const void* data;
  Dtype dtype;
  std::vector<float> scale, zero_point;  // of quantised types: one for each channel, or one for all
  bool channels_last = false;            // [n, H, W, C], with one scale for all

  bool direct() const { return dtype == Dtype::kFloat32 && !channels_last; }  // nodes read it where it lies
  const void* at(int64_t element) const;
  // So many from an element on, of one channel or with one scale for all, to be widened.
  WidenArgs widened(int64_t element, float* to, int64_t count, int64_t channel) const;
};

class Engine {
 public:
  // `flops`: of one image.
  Engine(Program program, int64_t flops, int threads);

  // out: [n, *output shape], row-major: floats, or bytes that hold round(255 · x). False when the source holds NaN or
  // Inf; what was written then means nothing. Safe to call from several threads at once.
  bool run(const Source& in, float* out, int64_t n) { return run(in, out, nullptr, n); }
  bool run(const Source& in, uint8_t* out, int64_t n) { return run(in, nullptr, out, n); }

  // Seconds that one thread spends in each node for one image, from runs over a block that take about so long in all.
  std::vector<double> profile(double seconds) const;

  const Program& program() const { return program_; }
  int64_t workspace_bytes() const {
    const int64_t values = strips_ ? strips_->window_floats() + floats_before_strips() * block_ : arena_size_ * block_;
    return (values + scratch_floats()) * int64_t{sizeof(float)};
  }
  int64_t block() const { return block_; }
  int strips() const { return strips_ ? strips_->count() : 1; }  // of an image

 private:
  struct Workspace {
    Buffer arena, scratch;
    Buffer in, out;          // of a block, where the caller's are of another type or layout
    Buffer windows, before;  // of strips, and a block's values before them
    Buffer abreast[2];       // values of images abreast, in turns: those of a chain
    std::vector<float*> abreast_data;
    std::vector<float*> data;
  };

  void plan_memory();
  int64_t scratch_floats() const {  // some images of a batch go abreast, others do not
    return std::max(program_.scratch_floats(1), abreast_ > 0 ? program_.scratch_floats(abreast_) : 0);
  }
  int64_t floats_before_strips() const;  // of one image
  int64_t size(size_t value) const;      // floats of one image, and around it
  void use_arena(Workspace& workspace) const;
  void use_strips(Workspace& workspace) const;
  std::unique_ptr<Workspace> make_workspace() const;
  bool run(const Source& in, float* out, uint8_t* bytes, int64_t n);
  bool shares_images(int64_t n) const;
  void run_abreast(Workspace& workspace, int64_t first) const;
  void read(Workspace& workspace, const Source& in, int64_t first, int64_t images, Share share) const;
  void turn(Workspace& workspace, const Source& in, int64_t first, int64_t images, Share share) const;

  const Program program_;
  const int threads_;
  const int64_t flops_;
  const bool reveals_nonfinite_;          // in the output, which is smaller than the input, or hotter in the cache
  std::vector<int64_t> stride_;           // floats from image to image, by value
  std::vector<int64_t> offset_;           // of the value in the arena, for one image
  int64_t arena_size_ = 0;                // for one image
  int64_t block_ = 1;                     // images a worker takes at once
  int64_t abreast_ = 0;                   // images that go abreast, where the program can do that
  std::unique_ptr<const Strips> strips_;  // of images too large for the cache
  WorkspacePool<Workspace> workspaces_;
};

}  // namespace fastinv
