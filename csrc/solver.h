// The rMLE loop: z* = argmin Σ(edge(z) − v)² + weight · TV_β(z), image by image (He et al. 2019, Algorithm 1).
//
// A worker has a block of images in flight, whose passes through the network share weights. An image that is done
// leaves its slot to another one, so that each result depends on nothing but its own features and start. Where there
// are fewer large images than threads, all threads go through the network with each.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "lbfgs.h"
#include "lockstep.h"
#include "passes.h"
#include "product.h"
#include "program.h"
#include "recipe.h"
#include "workspace.h"

namespace fastinv {

struct ImageReport {
  double objective;
  int64_t steps;
  bool converged;
};

// Images done, and steps of all images, so far.
struct Progress {
  int64_t images, steps;
};

// Asked now and then, by the calling thread alone; true stops.
using Poll = std::function<bool(const Progress&)>;

class Solver {
 public:
  // The program must be differentiable and its input [C, H, W].
  // `block`: images that a worker has in flight, at most; 0: as many as suit.
  Solver(Program program, Recipe recipe, int threads, int64_t block = 0);

  // What to solve: features [n, *output shape]; init [C, H, W], or [n, C, H, W] with init_stride = C·H·W.
  struct Batch {
    const float* features;
    const float* init;
    int64_t init_stride;
    float* out;            // [n, C, H, W]
    ImageReport* reports;  // of images not begun: objective NaN, and no steps
    int64_t n;
  };

  // False when it was stopped. Images in flight are then written as they are, with the steps they have had; those not
  // begun are where they would have begun.
  bool solve(const Batch& batch, const Poll& poll);

  // Whether none of so many numbers is NaN or Inf, by all threads.
  bool finite(const float* values, int64_t size) const;

  // The matrix of a quadratic objective's gradient, row by row, where images are small enough for its inverse to pay;
  // else nothing. Exact minima come from the inverse as soon as it is there.
  std::vector<float> hessian() const;
  void take_inverse(const double* inverse);

  const Program& program() const { return program_; }
  int64_t image_size() const { return element_count(program_.shapes().front()); }
  bool quadratic() const { return quadratic_ != nullptr; }
  int64_t block() const { return block_; }
  int64_t images_abreast() const { return lockstep_ ? lockstep_->images() : 0; }  // of a group that may go so
  int64_t workspace_bytes() const;

 private:
  struct Slot {
    int64_t image;
    const float* features;  // as they came
    ImageReport report;
    double at_zero;    // where there is a quadratic form: the squared distance of an image of zeros from the features
    double objective;  // of the last evaluation
    double best;       // the lowest objective, where that iterate is kept
    int64_t calm;      // evaluations in a row within the tolerance
    Descent descent;
    std::unique_ptr<Lbfgs> lbfgs;
  };

  struct Workspace {
    Buffer memory, node_scratch;
    Passes::Tape tape;
    float *images, *gradients;                                // of the block: z, and the objective's gradient there
    float* results;                                           // of the network, until the way back
    float *features, *first, *second, *largest, *best;        // of the block
    float *constant = nullptr, *copy = nullptr, *tv_scratch;  // for one image
    std::vector<Slot> slots;
    std::unique_ptr<Lockstep::Workspace> abreast;
    Buffer newton;
  };

  // What all workers of a call share.
  struct Call {
    const Batch& batch;
    const Poll& poll;
    int64_t abreast = 0;  // images at the front that go abreast
    std::atomic<int64_t> next_abreast{0}, next{0}, images{0}, steps{0};
    std::atomic<int64_t> active{0};  // images that a crew is to go through with; 0 ends it
    std::atomic<int> working{0};
    std::atomic<bool> stop{false};
  };
  // What asks the caller whether to go on, ten times a second.
  class Watch {
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

  int64_t plan_block(int64_t most) const;
  int64_t image_floats() const;  // in flight
  int64_t memory_floats() const;
  std::unique_ptr<Workspace> make_workspace() const;
  int64_t in_flight(const Call& call) const;
  void work(Workspace& w, Call& call, bool caller, const Crew& crew) const;

  int64_t image_stride() const { return passes_.stride(0); }
  int64_t result_stride() const { return passes_.stride(static_cast<size_t>(program_.output())); }
  float* image_at(float* block, int64_t slot) const { return block + slot * image_stride(); }
  float* result_at(float* block, int64_t slot) const { return block + slot * result_stride(); }
  void begin(Workspace& w, const Batch& batch, int64_t slot, int64_t image) const;
  // The objective of the one image in flight, where it is asked for, and its gradient.
  double evaluate_quadratic(Workspace& w, bool valued) const;
  double objective(Workspace& w, int64_t slot) const;  // from the network's results
  double objective_alone(Workspace& w) const;          // of the image in the first slot, from its features on
  // The slots' objectives, and the gradients at the images.
  void evaluate(Workspace& w, int64_t active, const Crew& crew) const;
  bool is_large() const;
  bool shares_images(int64_t n) const;  // whether all threads go through the network with each of n images
  int64_t abreast(int64_t n) const;     // how many of n images go abreast
  void run_abreast(Workspace& w, Call& call, Watch& watch, int64_t image) const;
  void help(Workspace& w, const Crew& crew, const std::atomic<int64_t>& active) const;
  bool advance(Workspace& w, int64_t slot) const;  // a step; false when the image is done
  void finish(Workspace& w, const Batch& batch, int64_t slot) const;
  void conclude(Workspace& w, const Batch& batch, int64_t image, const float* z, ImageReport report) const;
  void move(Workspace& w, int64_t from, int64_t to) const;

  const float* features_of(const Batch& batch, int64_t image) const {
    return batch.features + image * element_count(program_.shapes().back());
  }
  void load_features(Workspace& w, int64_t slot) const {
    const float* features = w.slots[static_cast<size_t>(slot)].features;
    program_.lay_out(program_.output(), features, result_at(w.features, slot));
  }
  void forward(Workspace& w, int64_t images) const { passes_.forward(w.tape, images, alone(w)); }
  double residual(Workspace& w, int64_t slot) const;  // of the network's results, and its gradient there
  void backward(Workspace& w, int64_t images) const { passes_.backward(w.tape, images, alone(w)); }
  static Crew alone(Workspace& w) { return {{}, w.node_scratch.data()}; }
  double add_total_variation(Workspace& w, int64_t slot) const;  // at z; its gradient is added
  void step(Workspace& w, int64_t slot) const;
  bool is_last(const Slot& slot) const { return slot.report.steps == recipe_.steps; }
  bool advance_lbfgs(Workspace& w, int64_t slot) const;
  bool is_calm(Slot& slot, double before, double after) const;

  bool knows_hessian() const { return quadratic_ && (smooth_ || recipe_.tv_weight == 0.0); }
  void times_hessian(Workspace& w, const float* direction) const;  // to the gradient of the image
  bool conjugate_gradients(Workspace& w, Call& call, Watch& watch) const;
  void newton(Workspace& w, Call& call, int64_t first, int64_t count) const;  // so many images, to the end
  int64_t newton_floats() const { return 4 * kMostTogether * image_size(); }

  // Of an image's values. Larger ones take fewer products by conjugate gradients: 3 × 32 × 32 through CIFAR-10's conv11
  // 10 times 0.46 million for 19.
  static constexpr int64_t kMostInverted = 1024;
  // An objective by the quadratic form is off by up to 7e-8 of that of an image of zeros, which the other terms take
  // away from: one that is at least this part of it, by 1e-5 of itself.
  static constexpr double kTrusted = 1e-2;
  static constexpr double kExactGradient = 1e-6;  // at an exact minimum, of that at the start
  static constexpr int64_t kMostTogether = 18;    // three tiles of the product's rows

  const Program program_;
  const Passes passes_;
  const Recipe recipe_;
  const int threads_;
  const std::vector<float> low_, high_;
  Quadratic* quadratic_ = nullptr;            // of the edge, where that is one convolution
  std::unique_ptr<const Lockstep> lockstep_;  // of images abreast, where that suits
  std::unique_ptr<Product> inverse_;          // of the matrix of its gradient
  bool smooth_ = false;                       // whether the quadratic form holds the total variation too
  int64_t block_ = 1;                         // images that a worker has in flight
  WorkspacePool<Workspace> workspaces_;
};

}  // namespace fastinv
