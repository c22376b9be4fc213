// rMLE of small images abreast: as many as a vector has lanes go through all their steps together, one in each lane.
//
// Layers of 8 channels, or rows of 24 pixels, leave half of a vector empty, and padding is multiplied by; here every
// product counts. What comes out is what each image by itself would have led to, bit for bit.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "passes.h"
#include "program.h"
#include "recipe.h"

namespace fastinv {

class Lockstep {
 public:
  // Whether images may go abreast: the program can, nobody asks for objectives on the way, and what they need while they
  // do fits the cache.
  static bool suits(const Program& program, const Recipe& recipe);

  // Both must outlive it.
  Lockstep(const Program& program, const Recipe& recipe);

  struct Workspace {
    Buffer memory, scratch;
    Buffer apart;  // the images, or their features, one after the other
    Passes::Tape tape;
    float *images, *features, *first, *second, *largest, *tv_scratch;
  };
  std::unique_ptr<Workspace> make_workspace() const;
  int64_t workspace_floats() const { return memory_floats() + program_.scratch_floats(images_); }

  int64_t images() const { return images_; }  // that go abreast

  // Takes all steps of the recipe, or fewer where go_on(), asked before each, says no; how many. Features lie one after
  // the other, row-major; so do starts, init_stride floats apart.
  int64_t run(Workspace& workspace, const float* features, const float* init, int64_t init_stride,
              const std::function<bool()>& go_on) const;
  // What an image has come to, [H, W, C].
  const float* iterate(const Workspace& workspace, int64_t image) const {
    return workspace.apart.data() + image * element_count(program_.shapes().front());
  }

 private:
  int64_t memory_floats() const;
  void begin(Workspace& workspace, const float* features, const float* init, int64_t init_stride) const;
  void step(Workspace& workspace, Descent& descent) const;

  const Program& program_;
  const Recipe& recipe_;
  const int64_t images_;
  const Passes passes_;
  const std::vector<float> low_, high_;
};

}  // namespace fastinv
