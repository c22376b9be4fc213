// The two passes of a program that is differentiated, through a block of images: forward, and from the gradient of the
// output back to the input.
//
// What the way back needs is kept, and no more: of most activations a bit for each value, of a pool an index for each
// result. All other memory is shared by values and gradients whose lives do not overlap.
#pragma once

#include <cstdint>
#include <vector>

#include "arena.h"
#include "program.h"
#include "threads.h"

namespace fastinv {

// Who goes through the network together, with the values of one of them; by default one alone.
struct Crew {
  Share share;
  float* scratch;  // as many floats as the program's nodes ask for
  Barrier* barrier = nullptr;

  void meet() const {
    if (barrier) barrier->wait(static_cast<int>(share.count));
  }
};

class Passes {
 public:
  // Of images one by one, or of so many abreast as if they were one. The program must outlive it.
  explicit Passes(const Program& program, int64_t lanes = 1);

  // Where everything lies: of image i of the block, so many floats behind.
  struct Tape {
    std::vector<float*> values, grads;  // by value; values.front() are the images
    std::vector<float*> gates, saved;   // by node
  };

  int64_t stride(size_t value) const { return stride_[value]; }  // floats from image to image
  int64_t image_floats() const { return arena_.size(); }         // beside the image itself
  // For a block of images at `images`, with block · image_floats() floats of memory.
  Tape tape(float* images, float* memory, int64_t block) const;

  void forward(const Tape& tape, int64_t images, const Crew& crew) const;
  // From the gradients of the output; their memory, like that of the values, is used for others on the way.
  void backward(const Tape& tape, int64_t images, const Crew& crew) const;

 private:
  struct Place {
    int64_t offset = 0, stride = 0;  // for one image
  };

  void plan();
  int64_t size(size_t value) const { return element_count(program_.shapes()[value]) * lanes_; }
  Frame frame(const std::vector<float*>& data, float* scratch, float* saved = nullptr, int64_t saved_stride = 0) const;
  uint8_t* gate(const Tape& tape, size_t node, int64_t image) const;

  const Program& program_;
  const int64_t lanes_;
  std::vector<std::vector<bool>> first_;  // by node and input: whether backward writes first to that gradient
  std::vector<int64_t> stride_;           // by value
  Arena arena_;
  std::vector<Place> values_, grads_, gates_, saved_;
};

}  // namespace fastinv
