#include "strips.h"

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "cost.h"

namespace fastinv {

Strips::Strips(const Program& program, int64_t bytes) : program_(program), readers_(program.shapes().size()) {
  for (size_t n = 0; n < program.nodes().size(); ++n) {
    const auto& inputs = program.nodes()[n]->inputs;
    for (size_t k = 0; k < inputs.size(); ++k) {
      readers_[static_cast<size_t>(inputs[k])].emplace_back(static_cast<int>(n), k);
    }
  }
  first_ = find_first(bytes);
  const int rows = height(program.output());
  for (int count = 1; count <= rows; count += 1 + count / 4) {
    std::vector<Step> steps = plan(ceil_div(rows, count));
    std::vector<Window> found = windows(&steps);
    int64_t floats = 0;
    for (int v = 0; v <= program_.output(); ++v) {
      Window& window = found[static_cast<size_t>(v)];
      window.offset = floats + program_.floats_before(v);
      floats += round_up(window.floats, kLineFloats) + program_.floats_around(v);
    }
    if (count > 1 && floats >= window_floats_) continue;
    steps_ = std::move(steps);
    windows_ = std::move(found);
    window_floats_ = floats;
    count_ = count;
    if (floats * int64_t{sizeof(float)} <= bytes) break;
  }
}

// The last linear layer's value, where nothing else is read after it, and what comes before is small.
int Strips::find_first(int64_t bytes) const {
  const int last = program_.last_linear();
  int64_t floats = 0;
  for (int v = 0; v <= last; ++v) floats += element_count(program_.shapes()[static_cast<size_t>(v)]);
  if (last == program_.output() || floats * int64_t{sizeof(float)} > bytes) return 0;
  for (int v = 0; v < last; ++v) {
    for (const auto& [reader, input] : readers_[static_cast<size_t>(v)]) {
      if (reader >= last) return 0;
    }
  }
  return last;
}

// Rows of any image, in either layout: [C, H, W] is kept whole, but can be written and read by rows.
int Strips::height(int value) const {
  const Shape& shape = program_.shapes()[static_cast<size_t>(value)];
  return shape.size() == 3 ? static_cast<int>(shape[1]) : 1;
}

Rows Strips::rows_read(const Node& node, size_t input, Rows rows) const {
  const int all = height(node.inputs[input]);
  if (node.row_step() == 0) return {0, all};
  const Rows read = node.rows_read(input, rows);
  return {std::clamp(read.begin, 0, all), std::clamp(read.end, 0, all)};
}

std::vector<Strips::Step> Strips::plan(int height) const {
  std::vector<int> done(program_.shapes().size(), 0);
  std::vector<Step> steps;
  const int rows = this->height(program_.output());
  for (int row = height; row < rows + height; row += height) {
    request(program_.output(), std::min(row, rows), &done, &steps);
  }
  return steps;
}

// Steps up to the first `rows` rows of the value, and those that they need.
void Strips::request(int value, int rows, std::vector<int>* done, std::vector<Step>* steps) const {
  int& ready = (*done)[static_cast<size_t>(value)];
  if (value == first_ || ready >= rows) return;
  const Node& node = *program_.nodes()[static_cast<size_t>(value) - 1];
  const int step = node.row_step() > 0 ? node.row_step() : height(value);
  const int end = std::min<int>(height(value), static_cast<int>(round_up(rows, step)));
  for (size_t k = 0; k < node.inputs.size(); ++k) {
    request(node.inputs[k], rows_read(node, k, {ready, end}).end, done, steps);
  }
  steps->push_back({value - 1, {ready, end}, 0});
  ready = end;
}

// Fills in what each step may give up, and finds how much must be kept at the same time.
std::vector<Strips::Window> Strips::windows(std::vector<Step>* steps) const {
  const auto& nodes = program_.nodes();
  std::vector<Window> windows(program_.shapes().size());
  std::vector<int> done(nodes.size(), 0);  // rows of each node's output
  for (Step& step : *steps) {
    const int value = nodes[static_cast<size_t>(step.node)]->output;
    Window& window = windows[static_cast<size_t>(value)];
    if (!whole(value)) {
      step.first_kept = step.rows.begin;
      for (const auto& [reader, input] : readers_[static_cast<size_t>(value)]) {
        const Node& node = *nodes[static_cast<size_t>(reader)];
        const int from = done[static_cast<size_t>(reader)], all = height(node.output);
        if (from < all) step.first_kept = std::min(step.first_kept, rows_read(node, input, {from, all}).begin);
      }
      window.row = program_.row_floats(value);
      const int64_t after = program_.image_floats(value) - height(value) * window.row;  // the zeros of padded ones
      window.floats = std::max(window.floats, (step.rows.end - step.first_kept) * window.row + after);
    } else if (value != program_.output()) {
      window.floats = program_.image_floats(value);
    }
    done[static_cast<size_t>(step.node)] = step.rows.end;
  }
  return windows;
}

void Strips::run(float* in, float* out, float** values, const int64_t* stride, float* windows, float* scratch) const {
  const size_t last = windows_.size() - 1;
  const auto first = static_cast<size_t>(first_);
  for (size_t v = first + 1; v < last; ++v) values[v] = windows + windows_[v].offset;
  values[first] = in;
  values[last] = out;
  const Frame frame = {values, stride, scratch};
  for (const Step& step : steps_) {
    const Node& node = *program_.nodes()[static_cast<size_t>(step.node)];
    const Window& window = windows_[static_cast<size_t>(node.output)];
    if (window.row > 0) {
      // values[v] is where row 0 would lie; the rows that are kept move to the beginning of the window.
      float* const begin = windows + window.offset;
      float*& value = values[node.output];
      const float* kept = value + step.first_kept * window.row;
      if (kept != begin) {
        std::memmove(begin, kept,
                     static_cast<size_t>((step.rows.begin - step.first_kept) * window.row) * sizeof(float));
        value = begin - step.first_kept * window.row;
      }
    }
    node.row_step() > 0 ? node.forward_rows(frame, step.rows) : node.forward(frame, 1, {});
  }
}

}  // namespace fastinv
