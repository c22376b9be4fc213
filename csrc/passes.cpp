#include "passes.h"

#include <algorithm>

#include "buffer.h"

namespace fastinv {
namespace {

// Whether the derivative of the node's activation is 1 or one other number.
bool gated(const Node& node) {
  const ActivationKind kind = node.activation.kind;
  return kind == ActivationKind::kRelu || kind == ActivationKind::kLeakyRelu || kind == ActivationKind::kHardtanh;
}

// This worker's part of so many floats, in whole cache lines.
struct Part {
  Part(const Share& share, int64_t size)
      : begin(share.begin(round_up(size, kLineFloats) / kLineFloats) * kLineFloats),
        end(std::min(size, share.end(round_up(size, kLineFloats) / kLineFloats) * kLineFloats)) {}

  const int64_t begin, end;
};

}  // namespace

Passes::Passes(const Program& program, int64_t lanes) : program_(program), lanes_(lanes) {
  const auto& nodes = program_.nodes();
  for (size_t v = 0; v < program_.shapes().size(); ++v) stride_.push_back(round_up(size(v), kLineFloats));
  std::vector<bool> written(stride_.size(), false);
  written[static_cast<size_t>(program_.output())] = true;
  first_.resize(nodes.size());
  for (size_t k = nodes.size(); k-- > 0;) {
    for (int input : nodes[k]->inputs) {
      first_[k].push_back(!written[static_cast<size_t>(input)]);
      written[static_cast<size_t>(input)] = true;
    }
  }
  plan();
}

// Node k runs at step k, and back at step 2·K − k; at step K the gradient of the output is taken.
void Passes::plan() {
  const auto& nodes = program_.nodes();
  const auto count = static_cast<int64_t>(nodes.size());
  const size_t output = stride_.size() - 1;
  const auto back = [count](int64_t node) { return 2 * count - node; };
  std::vector<int64_t> last_use(stride_.size(), -1), first_gradient(stride_.size(), 2 * count);
  last_use[output] = first_gradient[output] = count;
  for (int64_t k = 0; k < count; ++k) {
    const Node& node = *nodes[static_cast<size_t>(k)];
    for (int input : node.inputs) {
      const auto v = static_cast<size_t>(input);
      last_use[v] = std::max(last_use[v], node.reads_inputs_back() ? back(k) : k);
      first_gradient[v] = std::min(first_gradient[v], back(k));
    }
    const bool reads_output = node.activation.kind != ActivationKind::kIdentity && !gated(node);
    if (reads_output || node.reads_output_back()) last_use[static_cast<size_t>(node.output)] = back(k);
  }
  const auto place = [this](int64_t size, int64_t begin, int64_t end) {
    const int64_t stride = round_up(size, kLineFloats);
    return Place{stride > 0 ? arena_.place(stride, begin, end) : 0, stride};
  };
  values_.resize(stride_.size());
  grads_.resize(stride_.size());
  grads_[0] = place(stride_[0], first_gradient[0], back(-1));  // for the step
  for (int64_t k = 0; k < count; ++k) {
    const Node& node = *nodes[static_cast<size_t>(k)];
    const auto v = static_cast<size_t>(node.output);
    values_[v] = place(stride_[v], k, std::max(k, last_use[v]));
    grads_[v] = place(stride_[v], std::min(first_gradient[v], back(k)), back(k));
    constexpr int64_t kFloat = sizeof(float);
    const int64_t gate_floats = (program_.kernels().gate_bytes(stride_[v]) + kFloat - 1) / kFloat;
    gates_.push_back(place(gated(node) ? gate_floats : 0, k, back(k)));
    saved_.push_back(place(node.saved_floats() * lanes_, k, back(k)));
  }
}

Passes::Tape Passes::tape(float* images, float* memory, int64_t block) const {
  const auto at = [memory, block](const std::vector<Place>& places) {
    std::vector<float*> found;
    for (const Place& place : places) found.push_back(place.stride > 0 ? memory + place.offset * block : nullptr);
    return found;
  };
  Tape tape = {at(values_), at(grads_), at(gates_), at(saved_)};
  tape.values.front() = images;
  return tape;
}

void Passes::forward(const Tape& tape, int64_t images, const Crew& crew) const {
  const Kernels& kernels = program_.kernels();
  const auto& nodes = program_.nodes();
  for (size_t k = 0; k < nodes.size(); ++k) {
    const Node& node = *nodes[k];
    node.forward(frame(tape.values, crew.scratch, tape.saved[k], saved_[k].stride), images, crew.share);
    crew.meet();
    if (!gated(node)) continue;
    const auto v = static_cast<size_t>(node.output);
    const Part part(crew.share, size(v));
    for (int64_t i = 0; i < images; ++i) {
      kernels.take_gate(tape.values[v] + i * stride_[v] + part.begin, part.end - part.begin, node.activation,
                        gate(tape, k, i) + kernels.gate_bytes(part.begin));
    }
  }
  crew.meet();
}

void Passes::backward(const Tape& tape, int64_t images, const Crew& crew) const {
  const Kernels& kernels = program_.kernels();
  const auto& nodes = program_.nodes();
  const Frame grads = frame(tape.grads, crew.scratch);
  for (size_t k = nodes.size(); k-- > 0;) {
    const Node& node = *nodes[k];
    const auto v = static_cast<size_t>(node.output);
    if (node.activation.kind != ActivationKind::kIdentity) {
      const Part part(crew.share, size(v));
      for (int64_t i = 0; i < images; ++i) {
        float* grad = tape.grads[v] + i * stride_[v] + part.begin;
        if (gated(node)) {
          kernels.pass_gate(gate(tape, k, i) + kernels.gate_bytes(part.begin), node.activation, grad,
                            part.end - part.begin);
        } else {
          const float* y = tape.values[v] + i * stride_[v] + part.begin;
          kernels.activate_gradient(y, y, grad, part.end - part.begin, node.activation);
        }
      }
      crew.meet();
    }
    const Frame values = frame(tape.values, nullptr, tape.saved[k], saved_[k].stride);
    const bool shares = node.shares_backward();
    for (size_t input = 0; input < node.inputs.size(); ++input) {
      if (shares || crew.share.index == 0) {
        node.backward(values, grads, images, input, first_[k][input], shares ? crew.share : Share{});
      }
      crew.meet();
    }
  }
}

Frame Passes::frame(const std::vector<float*>& data, float* scratch, float* saved, int64_t saved_stride) const {
  return {data.data(), stride_.data(), scratch, 0, saved, saved_stride, lanes_};
}

uint8_t* Passes::gate(const Tape& tape, size_t node, int64_t image) const {
  return reinterpret_cast<uint8_t*>(tape.gates[node] + image * gates_[node].stride);
}

}  // namespace fastinv
