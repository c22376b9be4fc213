// The rMLE loop: z* = argmin Σ(edge(z) − v)² + weight · TV_β(z), image by image (He et al. 2019, Algorithm 1).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "program.h"
#include "workspace.h"

namespace fastinv {

struct Recipe {
  OptimizerKind optimizer;
  int64_t steps;
  double lr, beta1, beta2, eps, momentum;
  bool cosine;  // the step size falls to 0 in half a wave
  double tv_weight, tv_beta;
  double tolerance;
  int64_t patience;
  bool keep_best;
  bool exact;  // the minimum by conjugate gradients instead of the optimizer's steps; for quadratic objectives
  std::vector<float> low, high;  // bounds of z for every channel, or empty
};

struct ImageReport {
  double objective = 0.0;
  int64_t steps = 0;
  bool converged = false;
};

class Solver {
 public:
  // The program must be differentiable and its input [C, H, W].
  Solver(Program program, Recipe recipe, int threads);

  // features: [n, *output shape]; init: [C, H, W], or [n, C, H, W] with init_stride = C·H·W; out: [n, C, H, W].
  // `interrupted` is asked now and then, by the calling thread alone; once it says yes, solve returns early with
  // false and the images unfinished.
  bool solve(const float* features, const float* init, int64_t init_stride, float* out, ImageReport* reports, int64_t n,
             const std::function<bool()>& interrupted);

  const Program& program() const { return program_; }
  bool quadratic() const { return quadratic_ != nullptr; }
  int64_t workspace_bytes() const;

 private:
  struct Workspace {
    Buffer memory, node_scratch;
    std::vector<float*> values, grads;
    float *features, *first, *second, *largest, *best, *constant, *copy, *scratch;
  };

  int64_t tv_scratch_floats() const;
  std::unique_ptr<Workspace> make_workspace() const;
  double objective(Workspace& w) const;  // forward, and the gradients of the residual at the output
  void backward(Workspace& w) const;
  TotalVariationArgs total_variation(Workspace& w) const;  // at z, added to its gradient
  void gradient_at_zero(Workspace& w) const;               // to w.constant
  void step(Workspace& w, int64_t t) const;
  bool knows_hessian() const { return quadratic_ && (smooth_ || recipe_.tv_weight == 0.0); }
  void times_hessian(Workspace& w, const float* direction) const;  // to the gradient of the image
  template <class Poll>
  bool conjugate_gradients(Workspace& w, ImageReport& report, const Poll& poll) const;
  template <class Poll>
  bool solve_image(Workspace& w, const float* features, const float* init, float* out, ImageReport& report,
                   const Poll& poll) const;

  const Program program_;
  const Recipe recipe_;
  const int threads_;
  std::vector<float> low_, high_;         // bounds of every element, in the internal layout, or empty
  std::vector<std::vector<bool>> first_;  // by node and input: whether backward writes first to that gradient
  std::vector<int64_t> stride_;
  Quadratic* quadratic_ = nullptr;  // of the edge, where that is one convolution
  bool watched_;                    // whether the objective is needed after every step
  bool smooth_ = false;             // whether the quadratic form holds the total variation too
  WorkspacePool<Workspace> workspaces_;
};

}  // namespace fastinv
