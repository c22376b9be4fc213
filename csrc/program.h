// A program: a network lowered to kernel launches over values.
//
// Images, values of rank 3, lie as [H, W, C] where kernels read them (channels last), or as [C, H, W] (row-major), as
// the input and the output of the program do. Each value is in one layout; what reads it in the other has it converted
// first, once. A differentiable program takes its input channels last, and leaves its output as it comes: its solver
// converts both once per image, and not in every step.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "convolution.h"
#include "node.h"

namespace fastinv {

using Shape = std::vector<int64_t>;  // without the batch axis; [C, H, W] for images

int64_t element_count(const Shape& shape);

struct ConvolutionSpec {
  int stride[2], padding[2], dilation[2];  // padding: top, left; for transposed, what is cut there
  int groups;
  bool transposed;
};

struct PoolSpec {
  int kernel[2], stride[2], padding[2], dilation[2];
};

struct NormalizeSpec {
  int groups;
  bool spatial, centered;
  float eps;
};

struct AttentionSpec {
  int windows, heads;
  float scale;
};

// A sparse matrix in compressed rows, [rows, columns].
struct SparseMatrix {
  std::vector<int32_t> first, index;
  std::vector<float> weight;
  int columns = 0;

  SparseMatrix transposed() const;
  int rows() const { return static_cast<int>(first.size()) - 1; }
  SparseAxis view() const { return {first.data(), index.data(), weight.data()}; }
};

class Program {
 public:
  // `differentiable`: prepare for backward passes too. `abreast`: the network is a chain of convolutions on small
  // images. `bfloat16`: convolutions may round their factors to that; only where the machine has_bfloat16.
  Program(const Kernels& kernels, Shape input, bool differentiable, bool abreast, bool bfloat16);

  // Each appends a node and returns the number of its value. Arrays are row-major and copied.
  // `addend`: a value of the output's shape that is added before the activation, or −1.
  int convolution(int input, const float* weight, const float* bias, int kernel_h, int kernel_w, Shape output,
                  const ConvolutionSpec& spec, Activation activation, int addend);
  int linear(int input, const float* weight, const float* bias, Shape output, Activation activation);
  int max_pool(int input, Shape output, const PoolSpec& spec, Activation activation);
  int resample(int input, SparseMatrix rows, SparseMatrix columns, Activation activation);
  int gather(int input, std::vector<int32_t> index, Shape output, Activation activation);
  int concat(std::vector<int> inputs, int axis, Shape output, Activation activation);
  int binary(BinaryKind kind, int a, int b, Shape output, Activation activation);
  int normalize(int input, std::vector<float> weight, std::vector<float> bias, const NormalizeSpec& spec,
                Activation activation);
  int attention(int q, int k, int v, std::vector<float> bias, const AttentionSpec& spec, Activation activation);
  int matmul(int a, int b, int groups, bool transposed, Activation activation);
  int softmax(int input);
  int affine(int input, std::vector<float> scale, std::vector<float> shift, Activation activation);
  int activate(int input, Activation activation);

  // Makes this value the output; without it, the last one is.
  int finish(int value);

  const Kernels& kernels() const { return kernels_; }
  bool differentiable() const { return differentiable_; }
  const std::vector<Shape>& shapes() const { return shapes_; }
  const std::vector<std::unique_ptr<Node>>& nodes() const { return nodes_; }
  // The rows of an image that lie one after the other in memory; 1 for all other values.
  int height(int value) const;
  bool channels_last(int value) const { return channels_last_[static_cast<size_t>(value)]; }
  // Floats of an image of this value, of a row of one, and of what is before the first image, and around all of them.
  int64_t image_floats(int value) const;
  int64_t row_floats(int value) const;
  int64_t floats_before(int value) const;
  int64_t floats_around(int value) const;
  // One image of this value from [C, H, W] to how it lies, or back.
  void lay_out(int value, const float* from, float* to) const;
  void bring_back(int value, const float* from, float* to) const;
  int output() const { return static_cast<int>(shapes_.size()) - 1; }
  bool rounds() const { return rounds_; }                     // factors of some convolution to bfloat16
  int64_t linear_weights() const { return linear_weights_; }  // of all linear layers
  int last_linear() const { return last_linear_; }            // the value that the last one gives; 0 without any
  bool prefers_abreast() const { return abreast_; }
  bool runs_abreast() const;                    // a chain of nodes that can
  bool reveals_nonfinite() const;               // whether no input value that is not finite can hide from the output
  int64_t scratch_floats(int64_t lanes) const;  // the most that a node needs

 private:
  const Shape& shape(int value) const;
  // Whether the nodes are a chain, each with this property.
  bool is_chain_of(bool (Node::*property)() const) const;
  // The value in this layout, converted where it is not; values of other ranks are in both.
  int in_layout(int value, bool channels_last);
  void hand_over();
  const Padded* padded(int value) const;  // how it lies, if so
  bool same_in_both(int value) const;
  template <class T, class... Args>
  int append(Activation activation, std::vector<int> inputs, Shape output, Args&&... args);
  template <class T, class... Args>
  int append_in(bool channels_last, Activation activation, std::vector<int> inputs, Shape output, Args&&... args);

  const Kernels& kernels_;
  const bool differentiable_;
  const bool abreast_;
  double rounding_;  // squared relative error that factors in bfloat16 may still add
  int64_t linear_weights_ = 0;
  int last_linear_ = 0;
  bool rounds_ = false;
  std::vector<Shape> shapes_;
  std::vector<bool> channels_last_;
  std::map<int, Padded> padded_;  // values that lie so
  std::map<int, int> converted_;  // a value to the same in the other layout
  std::vector<std::unique_ptr<Node>> nodes_;
};

}  // namespace fastinv
