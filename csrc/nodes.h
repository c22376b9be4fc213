// The nodes a program is made of. Which kernel serves which op is said here and nowhere else.
#pragma once

#include <memory>

#include "node.h"
#include "program.h"

namespace fastinv {

class ConvolutionNode : public Node {
 public:
  ConvolutionNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                  const Geometry& geometry, const float* weight, const float* bias, const Choice& choice, bool abreast,
                  double* rounding, bool keep_weights);
  void forward(const Frame& values, int64_t images, Share share) const override;
  bool runs_abreast() const override;
  int64_t scratch_floats(int64_t lanes) const override;
  int row_step() const override { return convolution_->row_step(); }
  Rows rows_read(size_t input, Rows rows) const override;
  void forward_rows(const Frame& values, Rows rows) const override;
  bool shares_image() const override { return true; }
  bool reveals_nonfinite() const override {
    return activation.kind == ActivationKind::kIdentity && geometry_.reads_all();
  }
  void prepare_backward() override;
  bool shares_backward() const override { return true; }
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  Quadratic* quadratic() override { return quadratic_.get(); }
  const Padded* reads_padded() const override { return convolution_->reads_padded(); }
  void read_padded() override { convolution_->read_padded(); }
  bool give_padded(const Padded& layout) override { return convolution_->give_padded(layout); }
  std::string describe() const override;

 private:
  Operands operands(const Frame& values, int64_t images) const;
  WeightAt weight_at(const float* weight, bool adjoint) const;

  const Geometry geometry_;
  std::vector<float> weight_, bias_;  // until prepare_backward
  const Choice choice_;
  const std::unique_ptr<Convolution> convolution_;
  std::unique_ptr<const Convolution> gradient_;
  std::unique_ptr<Quadratic> quadratic_;
};

// Rows of `in` floats to rows of `out`: the rows of all images of a block go through one kernel.
class LinearNode : public Node {
 public:
  LinearNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation, int64_t rows, int in,
             int out, const float* weight, const float* bias, bool keep_weight);
  void forward(const Frame& values, int64_t images, Share share) const override;
  void prepare_backward() override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  bool shares_backward() const override { return true; }
  bool shares_image() const override;
  std::string describe() const override;

 private:
  class Matrix;

  const int64_t rows_;
  const int in_, out_;
  std::vector<float> weight_;  // until prepare_backward
  std::shared_ptr<const Matrix> matrix_, gradient_;
};

class MaxPoolNode : public Node {
 public:
  // `row_major`: on [C, H, W], which takes windows in pairs.
  MaxPoolNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
              const PoolArgs& geometry, bool row_major);
  // Whether windows are 2×2 side by side.
  static bool in_pairs(const PoolArgs& geometry);
  bool runs_abreast() const override { return true; }
  void forward(const Frame& values, int64_t images, Share share) const override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  bool shares_backward() const override;
  int64_t saved_floats() const override { return int64_t{geometry_.out_h} * geometry_.out_w * geometry_.channels; }
  std::string describe() const override { return "max_pool"; }

 private:
  const PoolArgs geometry_;
  const bool row_major_;
};

class ResampleNode : public Node {
 public:
  ResampleNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation, int channels,
               SparseMatrix rows, SparseMatrix columns);
  bool runs_abreast() const override { return true; }
  void forward(const Frame& values, int64_t images, Share share) const override;
  void prepare_backward() override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  std::string describe() const override { return "resample"; }

 private:
  const int channels_;
  const SparseMatrix rows_, columns_;
  SparseMatrix rows_transposed_, columns_transposed_;
};

class GatherNode : public Node {
 public:
  GatherNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
             const std::vector<int32_t>& index);
  void forward(const Frame& values, int64_t images, Share share) const override;
  void prepare_backward() override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  bool shares_image() const override { return true; }
  bool shares_backward() const override { return true; }
  std::string describe() const override;

 private:
  // What is turned over, if that is all: so many matrices of rows × columns.
  struct Matrices {
    int64_t count = 0, rows = 0, columns = 0;
  };
  static Matrices matrices_of(const std::vector<int32_t>& index);
  // out = in in the order of the index, or turned over, or added to what is there: this share of the images.
  template <class At>
  void gather(const std::vector<int32_t>& index, const Matrices& turned, int64_t images, Share share, bool accumulate,
              Activation act, At at) const;

  Matrices turned_;
  int64_t run_;                 // elements that stay together
  std::vector<int32_t> index_;  // of runs: a permutation
  std::vector<int32_t> inverse_;
};

class ConcatNode : public Node {
 public:
  // `outer` stretches, each made of one stretch of chunks[k] floats from every input k.
  ConcatNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation, int64_t outer,
             std::vector<int64_t> chunks);
  void forward(const Frame& values, int64_t images, Share share) const override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  std::string describe() const override { return "concat"; }

 private:
  const int64_t outer_;
  const std::vector<int64_t> chunks_;
  int64_t total_;
};

class BinaryNode : public Node {
 public:
  // `geometry` holds kind, sizes and strides.
  BinaryNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
             const BinaryArgs& geometry, int64_t size_a, int64_t size_b);
  void forward(const Frame& values, int64_t images, Share share) const override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  bool reads_inputs_back() const override { return geometry_.kind == BinaryKind::kMul; }
  std::string describe() const override { return geometry_.kind == BinaryKind::kAdd ? "add" : "mul"; }

 private:
  const BinaryArgs geometry_;
  const int64_t sizes_[2];
};

class AffineNode : public Node {
 public:
  AffineNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation, int64_t outer,
             std::vector<float> scale, std::vector<float> shift, int height);
  int row_step() const override { return height_ > 1 && outer_ % height_ == 0 ? 1 : 0; }
  void forward_rows(const Frame& values, Rows rows) const override;
  void forward(const Frame& values, int64_t images, Share share) const override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  std::string describe() const override { return "affine"; }

 private:
  const int64_t outer_;
  const std::vector<float> scale_, shift_;
  const int height_;
};

class NormalizeNode : public Node {
 public:
  // `geometry` holds sizes and what is normalized, of images of this height.
  NormalizeNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                const NormalizeArgs& geometry, std::vector<float> weight, std::vector<float> bias, int height);
  int row_step() const override { return height_ > 1 && !geometry_.spatial ? 1 : 0; }
  void forward_rows(const Frame& values, Rows rows) const override;
  void forward(const Frame& values, int64_t images, Share share) const override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  bool shares_image() const override { return units() >= kSharedUnits; }
  bool shares_backward() const override { return true; }
  int64_t scratch_floats(int64_t) const override;
  int64_t saved_floats() const override;
  bool reads_inputs_back() const override { return true; }
  std::string describe() const override { return geometry_.spatial ? "normalize image" : "normalize rows"; }

 private:
  static constexpr int64_t kSharedUnits = 16;  // of which the threads' shares come out about even
  int64_t units() const { return geometry_.spatial ? geometry_.groups : geometry_.rows; }
  template <class Body>
  void for_each_part(int64_t images, Share share, const Body& body) const;

  NormalizeArgs geometry_;
  const std::vector<float> weight_, bias_;
  const int height_;
};

class AttentionNode : public Node {
 public:
  // Of queries, keys and values; `geometry` holds sizes and scale. `bias` may be empty.
  AttentionNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                const AttentionArgs& geometry, std::vector<float> bias);
  void forward(const Frame& values, int64_t images, Share share) const override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  bool shares_image() const override { return true; }
  bool shares_backward() const override { return true; }
  int64_t scratch_floats(int64_t) const override;
  bool reads_inputs_back() const override { return true; }
  std::string describe() const override { return "attention"; }

 private:
  // Of this image, with the units from first to last.
  AttentionArgs args(const Frame& values, int64_t image, float* scratch, int64_t first, int64_t last) const;

  AttentionArgs geometry_;
  const std::vector<float> bias_;
};

// A product of two values, for each group of rows by itself.
class MatmulNode : public Node {
 public:
  // a [groups · rows, depth] times b [groups · depth, columns], or, where `transposed`, [groups · columns, depth].
  struct Geometry {
    int64_t groups, rows, columns, depth;
    bool transposed;
  };

  MatmulNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
             const Geometry& geometry);
  void forward(const Frame& values, int64_t images, Share share) const override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share share) const override;
  bool shares_image() const override { return true; }
  bool shares_backward() const override { return true; }
  int64_t scratch_floats(int64_t) const override { return geometry_.columns * geometry_.depth; }
  bool reads_inputs_back() const override { return true; }
  std::string describe() const override { return "matmul"; }

 private:
  // c = a · b of each group, a [rows, depth] and b [depth, columns] as they are or turned over, by blocks of rows.
  struct Product {
    const float *a, *b;
    float* c;
    int64_t rows, columns, depth;
    bool a_turned, b_turned, accumulate;
  };
  void multiply(const Product& product, float* scratch, int64_t first, int64_t last) const;
  // Of one image: forward, or the gradient of input 0 or 1.
  Product forward_product(const Frame& values, int64_t image) const;
  Product gradient_product(const Frame& values, const Frame& grads, int64_t image, size_t input) const;

  const Geometry geometry_;
};

class SoftmaxNode : public Node {
 public:
  SoftmaxNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation, int64_t rows,
              int64_t columns);
  void forward(const Frame& values, int64_t images, Share share) const override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share share) const override;
  bool shares_image() const override { return true; }
  bool shares_backward() const override { return true; }
  bool reads_output_back() const override { return true; }
  std::string describe() const override { return "softmax"; }

 private:
  const int64_t rows_, columns_;
};

// Between [C, H, W] and [H, W, C]; or a copy, of values of other ranks.
class LayoutNode : public Node {
 public:
  // Turns a matrix of rows × columns over, one of them the channels of an image of this height.
  LayoutNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation, int64_t rows,
             int64_t columns, bool to_channels_last, int height);
  bool runs_abreast() const override { return true; }
  int row_step() const override { return height_ > 1 ? 1 : 0; }
  void forward_rows(const Frame& values, Rows rows) const override;
  void forward(const Frame& values, int64_t images, Share share) const override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  int64_t scratch_floats(int64_t lanes) const override { return rows_ * columns_ * lanes; }
  bool reveals_nonfinite() const override { return true; }
  bool shares_image() const override { return rows_ != 1 && columns_ != 1; }
  std::string describe() const override { return rows_ == 1 || columns_ == 1 ? "copy" : "layout"; }

 private:
  const int64_t rows_, columns_;
  const bool to_channels_last_;
  const int height_;
};

// An activation by itself. Its own `activation` is the identity: backward needs the input, which only this node has.
class ActivationNode : public Node {
 public:
  ActivationNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation own, int64_t size, int height);
  bool runs_abreast() const override { return true; }
  int row_step() const override { return height_ > 1 ? 1 : 0; }
  void forward_rows(const Frame& values, Rows rows) const override;
  void forward(const Frame& values, int64_t images, Share share) const override;
  void backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                Share) const override;
  bool reads_inputs_back() const override { return true; }
  bool reads_output_back() const override { return true; }
  std::string describe() const override { return "activation"; }

 private:
  const Activation own_;
  const int64_t size_;
  const int height_;
};

}  // namespace fastinv
