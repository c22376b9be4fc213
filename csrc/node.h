// One kernel launch of a program, forward and backward, over the values of a block of images.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "padded.h"
#include "quadratic.h"
#include "share.h"

namespace fastinv {

// Where values lie: value v of image i of the block starts at data[v] + i · stride[v].
struct Frame {
  float* const* data;
  const int64_t* stride;
  float* scratch = nullptr;  // for the node that runs, as many floats as it asks for
  int64_t ahead = 0;         // images that lie behind the block's at value 0, and are read next
  float* saved = nullptr;    // what this node's forward pass leaves for its way back; null where there is none
  int64_t saved_stride = 0;  // floats from image to image
  int64_t lanes = 1;         // images abreast: each element of a value is so many floats, one of each image

  float* at(int value, int64_t image = 0) const { return data[value] + image * stride[value]; }
};

// Rows begin to end of an image.
struct Rows {
  int begin, end;
};

class Node {
 public:
  Node(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation)
      : kernels(kernels), inputs(std::move(inputs)), output(output), activation(activation) {}
  virtual ~Node() = default;
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  // Computes this share of the output of the block's first `images` images. The caller sees to it that the inputs
  // are complete: workers that share a block wait for each other between nodes.
  virtual void forward(const Frame& values, int64_t images, Share share) const = 0;

  // Images of [H, W, C] can be computed some rows at a time, from the top. How many at once (at the end there may be
  // fewer), or 0 where an image is computed as a whole.
  virtual int row_step() const { return 0; }
  // The rows of an input that output rows `rows` read; some may lie outside. `rows` begins with a step.
  virtual Rows rows_read(size_t, Rows rows) const { return rows; }
  // Those rows of the first image.
  virtual void forward_rows(const Frame&, Rows) const {}

  // Whether forward and backward also take frames with images abreast, as many as a vector has lanes, instead of a
  // block and all by one worker; results are the same.
  virtual bool runs_abreast() const { return false; }

  // Floats of scratch that forward and backward need, whatever the number of images, of which `lanes` are abreast.
  virtual int64_t scratch_floats(int64_t) const { return 0; }

  // Builds what backward needs; called once, and only for programs that are differentiated.
  virtual void prepare_backward() {}

  // Takes the gradients of the output, before the activation, to input number `input`, for the block's first `images`
  // images. Writes them where `first`, adds to what is there otherwise. Does this share of it, or, where
  // shares_backward() says no, all.
  virtual void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                        Share share) const = 0;
  virtual bool shares_backward() const { return false; }

  // Floats of an image that forward leaves for backward, and whether that reads inputs and output again.
  virtual int64_t saved_floats() const { return 0; }
  virtual bool reads_inputs_back() const { return false; }
  virtual bool reads_output_back() const { return false; }

  // Whether an input value that is not finite always leaves one in the output that is not.
  virtual bool reveals_nonfinite() const { return false; }

  // Whether the shares of a single image's work are of about the same size; else one worker does all of it.
  virtual bool shares_image() const { return false; }

  // Σ (forward(z) − v)² as a quadratic form of images z [H, W, C], where that can be had and pays; once prepared for
  // backward passes.
  virtual Quadratic* quadratic() { return nullptr; }

  // As of a convolution, for its first input and for its output.
  virtual const Padded* reads_padded() const { return nullptr; }
  virtual void read_padded() {}
  virtual bool give_padded(const Padded&) { return false; }

  // What runs: kernel and, where there is a choice, its form.
  virtual std::string describe() const = 0;

  const Kernels& kernels;
  const std::vector<int> inputs;
  const int output;
  const Activation activation;
};

}  // namespace fastinv
