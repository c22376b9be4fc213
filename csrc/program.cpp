#include "program.h"

#include <algorithm>
#include <stdexcept>

#include "nodes.h"

namespace fastinv {
namespace {

// [C, H, W] lies as [H, W, C]; other ranks as they are.
Shape internal(const Shape& shape) { return shape.size() == 3 ? Shape{shape[1], shape[2], shape[0]} : shape; }

int internal_axis(int axis, size_t rank) { return rank == 3 ? (axis + 2) % 3 : axis; }

// Whether the derivative needs the activation's input: the result does not tell it.
bool needs_input(Activation activation) {
  switch (activation.kind) {
    case ActivationKind::kIdentity:
    case ActivationKind::kRelu:
    case ActivationKind::kSigmoid:
    case ActivationKind::kTanh:
    case ActivationKind::kHardtanh:
    case ActivationKind::kElu:
    case ActivationKind::kExp:
    case ActivationKind::kSqrt:
    case ActivationKind::kReciprocal: return false;
    case ActivationKind::kLeakyRelu: return activation.a <= 0.0f;
    default: return true;
  }
}

// Sizes and strides of a broadcast a ∘ b in the internal layout, with axes merged where both run on through them.
BinaryArgs broadcast(BinaryKind kind, const Shape& a, const Shape& b, const Shape& out) {
  BinaryArgs args = {};
  args.kind = kind;
  int64_t step_a = 1, step_b = 1;
  std::vector<int64_t> size, stride_a, stride_b;  // innermost first
  for (size_t axis = out.size(); axis-- > 0;) {
    const int64_t in_a = a[axis] == 1 ? 0 : step_a, in_b = b[axis] == 1 ? 0 : step_b;
    step_a *= a[axis];
    step_b *= b[axis];
    if (out[axis] == 1) continue;
    if (!size.empty() && in_a == stride_a.back() * size.back() && in_b == stride_b.back() * size.back()) {
      size.back() *= out[axis];
    } else {
      size.push_back(out[axis]);
      stride_a.push_back(in_a);
      stride_b.push_back(in_b);
    }
  }
  if (size.empty()) size = {1}, stride_a = {0}, stride_b = {0};
  args.rank = static_cast<int32_t>(size.size());
  std::reverse_copy(size.begin(), size.end(), args.size);
  std::reverse_copy(stride_a.begin(), stride_a.end(), args.stride_a);
  std::reverse_copy(stride_b.begin(), stride_b.end(), args.stride_b);
  return args;
}

constexpr double kRounding = 3e-4;  // the bound is 2e-2 relative, 4e-4 squared

}  // namespace

int64_t element_count(const Shape& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

Program::Program(const Kernels& kernels, Shape input, bool differentiable, bool abreast, bool bfloat16)
    : kernels_(kernels), differentiable_(differentiable), abreast_(abreast), rounding_(bfloat16 ? kRounding : 0.0) {
  shapes_.push_back(std::move(input));
  channels_last_.push_back(differentiable);
}

bool Program::is_chain_of(bool (Node::*property)() const) const {
  int before = 0;
  for (const auto& node : nodes_) {
    if (!((*node).*property)() || node->inputs.front() != before) return false;
    before = node->output;
  }
  return true;
}

bool Program::runs_abreast() const { return is_chain_of(&Node::runs_abreast); }

bool Program::reveals_nonfinite() const { return is_chain_of(&Node::reveals_nonfinite); }

int64_t Program::scratch_floats(int64_t lanes) const {
  int64_t most = 0;
  for (const auto& node : nodes_) most = std::max(most, node->scratch_floats(lanes));
  return most;
}

const Shape& Program::shape(int value) const {
  if (value < 0 || value >= static_cast<int>(shapes_.size())) throw std::invalid_argument("no such value");
  return shapes_[static_cast<size_t>(value)];
}

void Program::lay_out(int value, const float* from, float* to) const {
  const Shape& s = shape(value);
  const int64_t rows = s.size() == 3 && channels_last(value) ? s[0] : 1, columns = element_count(s) / rows;
  kernels_.transpose(from, columns, to, rows, rows, columns);
}

void Program::bring_back(int value, const float* from, float* to) const {
  const Shape& s = shape(value);
  const int64_t columns = s.size() == 3 && channels_last(value) ? s[0] : 1, rows = element_count(s) / columns;
  kernels_.transpose(from, columns, to, rows, rows, columns);
}

int Program::height(int value) const {
  const Shape& s = shape(value);
  return s.size() == 3 && channels_last(value) ? static_cast<int>(s[1]) : 1;
}

bool Program::same_in_both(int value) const {
  const Shape& s = shape(value);
  return s.size() != 3 || s[0] == 1 || s[1] * s[2] == 1;
}

int Program::in_layout(int value, bool channels_last) {
  if (same_in_both(value) || this->channels_last(value) == channels_last) return value;
  const auto known = converted_.find(value);
  if (known != converted_.end()) return known->second;
  const Shape s = shape(value);
  const int64_t pixels = s[1] * s[2];
  append_in<LayoutNode>(channels_last, {}, {value}, s, channels_last ? s[0] : pixels, channels_last ? pixels : s[0],
                        channels_last, static_cast<int>(s[1]));
  converted_[value] = output();
  return output();
}

int Program::finish(int value) {
  if (!differentiable_) value = in_layout(value, false);
  // The output is memory of its own, and the last value.
  if (value != output() || value == 0) {
    const Shape s = shape(value);
    append_in<LayoutNode>(channels_last(value), {}, {value}, s, 1, element_count(s), true, 1);
  }
  if (!differentiable_) hand_over();
  return output();
}

// Values that one node reads, and would round and put zeros around, are given so.
void Program::hand_over() {
  std::vector<std::vector<Node*>> readers(shapes_.size());
  for (const auto& node : nodes_) {
    for (int input : node->inputs) readers[static_cast<size_t>(input)].push_back(node.get());
  }
  for (const auto& giver : nodes_) {
    const auto& found = readers[static_cast<size_t>(giver->output)];
    if (found.size() != 1 || found.front()->inputs.front() != giver->output) continue;
    const Padded* layout = found.front()->reads_padded();
    if (!layout || !giver->give_padded(*layout)) continue;
    found.front()->read_padded();
    padded_.emplace(giver->output, *layout);
  }
}

const Padded* Program::padded(int value) const {
  const auto found = padded_.find(value);
  return found == padded_.end() ? nullptr : &found->second;
}

int64_t Program::image_floats(int value) const {
  const Padded* layout = padded(value);
  return layout ? layout->image() / 2 : element_count(shape(value));
}

int64_t Program::row_floats(int value) const {
  const Padded* layout = padded(value);
  return layout ? layout->row() / 2 : element_count(shape(value)) / height(value);
}

int64_t Program::floats_before(int value) const {
  const Padded* layout = padded(value);
  return layout ? layout->elements_before() / 2 : 0;
}

int64_t Program::floats_around(int value) const {
  const Padded* layout = padded(value);
  return layout ? layout->around() / 2 : 0;
}

// Appends a node whose inputs and output are channels last.
template <class T, class... Args>
int Program::append(Activation activation, std::vector<int> inputs, Shape output, Args&&... args) {
  for (int& input : inputs) input = in_layout(input, true);
  return append_in<T>(true, activation, std::move(inputs), std::move(output), std::forward<Args>(args)...);
}

template <class T, class... Args>
int Program::append_in(bool channels_last, Activation activation, std::vector<int> inputs, Shape output,
                       Args&&... args) {
  const bool apart = differentiable_ && needs_input(activation);
  shapes_.push_back(std::move(output));
  channels_last_.push_back(channels_last);
  nodes_.push_back(std::make_unique<T>(kernels_, std::move(inputs), this->output(), apart ? Activation{} : activation,
                                       std::forward<Args>(args)...));
  if (differentiable_) nodes_.back()->prepare_backward();
  return apart ? activate(this->output(), activation) : this->output();
}

int Program::convolution(int input, const float* weight, const float* bias, int kernel_h, int kernel_w, Shape output,
                         const ConvolutionSpec& spec, Activation activation, int addend) {
  const Shape& in = shape(input);
  if (addend >= 0 && shape(addend) != output) throw std::invalid_argument("convolution: addend of another shape");
  Geometry g = {};
  g.in_channels = static_cast<int>(in.at(0));
  g.out_channels = static_cast<int>(output.at(0));
  g.groups = spec.groups;
  g.transposed = spec.transposed;
  const int kernel[2] = {kernel_h, kernel_w};
  for (size_t axis = 0; axis < 2; ++axis) {
    g.axis[axis] = {static_cast<int>(in.at(axis + 1)),
                    static_cast<int>(output.at(axis + 1)),
                    kernel[axis],
                    spec.stride[axis],
                    spec.padding[axis],
                    spec.dilation[axis]};
  }
  const Layout layout = same_in_both(input)    ? Layout::kBoth
                        : channels_last(input) ? Layout::kChannelsLast
                                               : Layout::kRowMajor;
  // What may be a quadratic form stays exact.
  const bool alone = differentiable_ && input == 0 && addend < 0 && activation.kind == ActivationKind::kIdentity;
  const bool exact = alone && Quadratic::pays(g);
  double* const rounding = exact ? nullptr : &rounding_;
  Choice choice = choose(kernels_, g, layout, abreast_, rounding);
  if (differentiable_ && choice.layouts.in_row_major &&
      !choose(kernels_, g.adjoint(), Layout::kBoth, false, nullptr).layouts.in_row_major) {
    choice.layouts = {};
  }
  if (differentiable_ && choice.amx) choice.layouts = {};
  std::vector<int> inputs = {in_layout(input, !choice.layouts.in_row_major)};
  if (addend >= 0) inputs.push_back(in_layout(addend, !choice.layouts.out_row_major));
  const double before = rounding_;
  const int value =
      append_in<ConvolutionNode>(!choice.layouts.out_row_major, activation, std::move(inputs), std::move(output), g,
                                 weight, bias, choice, abreast_, rounding, differentiable_);
  rounds_ = rounds_ || rounding_ < before;
  return value;
}

int Program::linear(int input, const float* weight, const float* bias, Shape output, Activation activation) {
  const Shape in = shape(input);
  // The internal layout of rank 3 keeps the last axis of [C, H, W] apart from its end.
  if (in.size() == 3) throw std::invalid_argument("linear: rank 3 is not supported; reshape to rank 1 or 2 first");
  const int columns = static_cast<int>(in.back()), rows_out = static_cast<int>(output.back());
  const auto rows = static_cast<int>(element_count(in) / columns);
  // Rows as the pixels of an image of one row, where their products are faster on tiles.
  Geometry g = {};
  g.in_channels = columns;
  g.out_channels = rows_out;
  g.groups = 1;
  g.axis[0] = {1, 1, 1, 1, 0, 1};
  g.axis[1] = {rows, rows, 1, 1, 0, 1};
  if (rows > 1 && choose(kernels_, g, Layout::kBoth, false, &rounding_).amx) {
    rounds_ = true;
    return append<ConvolutionNode>(activation, {input}, std::move(output), g, weight, bias, Choice{{}, true}, false,
                                   &rounding_, differentiable_);
  }
  linear_weights_ += int64_t{columns} * rows_out;
  last_linear_ = append<LinearNode>(activation, {input}, std::move(output), rows, columns, rows_out, weight, bias,
                                    differentiable_);
  return last_linear_;
}

int Program::max_pool(int input, Shape output, const PoolSpec& spec, Activation activation) {
  const Shape& in = shape(input);
  PoolArgs args = {};
  args.channels = static_cast<int32_t>(in.at(0));
  args.in_h = static_cast<int32_t>(in.at(1));
  args.in_w = static_cast<int32_t>(in.at(2));
  args.out_h = static_cast<int32_t>(output.at(1));
  args.out_w = static_cast<int32_t>(output.at(2));
  std::copy_n(spec.kernel, 2, args.kernel);
  std::copy_n(spec.stride, 2, args.stride);
  std::copy_n(spec.padding, 2, args.padding);
  std::copy_n(spec.dilation, 2, args.dilation);
  if (!same_in_both(input) && !channels_last(input) && MaxPoolNode::in_pairs(args)) {
    return append_in<MaxPoolNode>(false, activation, {input}, std::move(output), args, true);
  }
  return append<MaxPoolNode>(activation, {input}, std::move(output), args, false);
}

int Program::resample(int input, SparseMatrix rows, SparseMatrix columns, Activation activation) {
  const Shape& in = shape(input);
  if (rows.columns != in.at(1) || columns.columns != in.at(2)) throw std::invalid_argument("resample: wrong matrices");
  const Shape output = {in[0], rows.rows(), columns.rows()};
  const int channels = static_cast<int>(in[0]);
  return append<ResampleNode>(activation, {input}, output, channels, std::move(rows), std::move(columns));
}

int Program::gather(int input, std::vector<int32_t> index, Shape output, Activation activation) {
  const auto size = element_count(shape(input));
  if (size != element_count(output) || size != static_cast<int64_t>(index.size())) {
    throw std::invalid_argument("gather: the index is not a permutation of the input");
  }
  for (int32_t i : index) {
    if (i < 0 || i >= size) throw std::invalid_argument("gather: the index leaves the input");
  }
  return append<GatherNode>(activation, {input}, std::move(output), std::move(index));
}

int Program::concat(std::vector<int> inputs, int axis, Shape output, Activation activation) {
  const int at = internal_axis(axis, output.size());
  const Shape out = internal(output);
  int64_t outer = 1;
  for (int i = 0; i < at; ++i) outer *= out[static_cast<size_t>(i)];
  std::vector<int64_t> chunks;
  for (int input : inputs) chunks.push_back(element_count(shape(input)) / outer);
  return append<ConcatNode>(activation, std::move(inputs), std::move(output), outer, std::move(chunks));
}

int Program::binary(BinaryKind kind, int a, int b, Shape output, Activation activation) {
  const BinaryArgs geometry = broadcast(kind, internal(shape(a)), internal(shape(b)), internal(output));
  const int64_t size_a = element_count(shape(a)), size_b = element_count(shape(b));
  return append<BinaryNode>(activation, {a, b}, std::move(output), geometry, size_a, size_b);
}

int Program::normalize(int input, std::vector<float> weight, std::vector<float> bias, const NormalizeSpec& spec,
                       Activation activation) {
  const Shape in = shape(input);
  const auto channels = static_cast<int64_t>(weight.size());
  const bool image = in.size() == 3;
  if (channels != (image ? in.front() : in.back()) || bias.size() != weight.size()) {
    throw std::invalid_argument("normalize: wrong number of weights");
  }
  if (spec.groups < 1 || channels % spec.groups != 0 || (spec.spatial && !image)) {
    throw std::invalid_argument("normalize: wrong groups");
  }
  NormalizeArgs args = {};
  args.rows = element_count(in) / channels;
  args.channels = static_cast<int32_t>(channels);
  args.groups = spec.groups;
  args.spatial = spec.spatial;
  args.centered = spec.centered;
  args.eps = spec.eps;
  return append<NormalizeNode>(activation, {input}, in, args, std::move(weight), std::move(bias),
                               image ? static_cast<int>(in[1]) : 1);
}

int Program::attention(int q, int k, int v, std::vector<float> bias, const AttentionSpec& spec, Activation activation) {
  const Shape queries = shape(q), keys = shape(k), values = shape(v);
  const bool matrices = queries.size() == 2 && keys.size() == 2 && values.size() == 2;
  if (!matrices || queries[1] != keys[1] || keys[0] != values[0]) {
    throw std::invalid_argument("attention: wrong shapes");
  }
  if (spec.heads < 1 || queries[1] % spec.heads != 0 || values[1] % spec.heads != 0) {
    throw std::invalid_argument("attention: wrong number of heads");
  }
  if (spec.windows < 1 || queries[0] % spec.windows != 0 || keys[0] % spec.windows != 0) {
    throw std::invalid_argument("attention: wrong number of windows");
  }
  AttentionArgs args = {};
  args.queries = queries[0] / spec.windows;
  args.keys = keys[0] / spec.windows;
  args.blocks = (args.queries + kAttentionBlock - 1) / kAttentionBlock;
  args.windows = spec.windows;
  args.heads = spec.heads;
  args.channels = static_cast<int32_t>(queries[1] / spec.heads);
  args.value_channels = static_cast<int32_t>(values[1] / spec.heads);
  args.scale = spec.scale;
  const int64_t scores = args.queries * args.keys, biases = scores > 0 ? static_cast<int64_t>(bias.size()) / scores : 0;
  args.biases = static_cast<int32_t>(biases);
  const int64_t units = int64_t{spec.windows} * spec.heads;
  if (!bias.empty() && (biases * scores != static_cast<int64_t>(bias.size()) || units % biases != 0)) {
    throw std::invalid_argument("attention: wrong number of biases");
  }
  return append<AttentionNode>(activation, {q, k, v}, {queries[0], values[1]}, args, std::move(bias));
}

int Program::matmul(int a, int b, int groups, bool transposed, Activation activation) {
  const Shape left = shape(a), right = shape(b);
  if (left.size() != 2 || right.size() != 2 || groups < 1 || left[0] % groups != 0 || right[0] % groups != 0) {
    throw std::invalid_argument("matmul: wrong shapes");
  }
  const int64_t depth = transposed ? right[1] : right[0] / groups;
  const int64_t columns = transposed ? right[0] / groups : right[1];
  if (left[1] != depth) throw std::invalid_argument("matmul: wrong depths");
  const MatmulNode::Geometry geometry = {groups, left[0] / groups, columns, depth, transposed};
  return append<MatmulNode>(activation, {a, b}, {left[0], columns}, geometry);
}

int Program::softmax(int input) {
  const Shape in = shape(input);
  if (in.size() != 2) throw std::invalid_argument("softmax: wrong shape");
  return append<SoftmaxNode>({}, {input}, in, in[0], in[1]);
}

int Program::affine(int input, std::vector<float> scale, std::vector<float> shift, Activation activation) {
  const Shape in = shape(input);
  const int64_t size = element_count(in), inner = static_cast<int64_t>(scale.size());
  if (inner == 0 || size % inner != 0 || scale.size() != shift.size()) {
    throw std::invalid_argument("affine: wrong number of scales");
  }
  return append<AffineNode>(activation, {input}, in, size / inner, std::move(scale), std::move(shift),
                            in.size() == 3 ? static_cast<int>(in[1]) : 1);
}

int Program::activate(int input, Activation activation) {
  const Shape in = shape(input);
  shapes_.push_back(in);
  channels_last_.push_back(channels_last_[static_cast<size_t>(input)]);
  nodes_.push_back(std::make_unique<ActivationNode>(kernels_, std::vector<int>{input}, output(), activation,
                                                    element_count(in), height(output())));
  return output();
}

}  // namespace fastinv
