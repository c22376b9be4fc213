// Images whose values do not fit the cache go through all layers strip by strip, depth first: each layer computes the
// rows that the next ones need, just before they need them. Of values between the layers only a window is kept, the
// rows that are still to be read. Linear layers are not among them where others follow: images share their weights, so
// many together go as far as the last one.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace fastinv {

class Strips {
 public:
  // Plans strips of the output, as high as the windows fit into so many bytes.
  Strips(const Program& program, int64_t bytes);

  int count() const { return count_; }
  int first() const { return first_; }  // the value that strips begin with: 0, or what the last linear layer gives
  int64_t window_floats() const { return window_floats_; }  // of all windows

  // One image, from that value to the output. `values` has room for a pointer to every value; `windows` and `scratch`
  // begin on a cache line.
  void run(float* in, float* out, float** values, const int64_t* stride, float* windows, float* scratch) const;

 private:
  struct Step {
    int node;
    Rows rows;
    int first_kept;  // row of its output that some reader still needs; those before are given up
  };
  struct Window {
    int64_t row = 0;     // floats; 0 where the whole value is kept
    int64_t offset = 0;  // in the memory of all windows
    int64_t floats = 0;
  };

  std::vector<Step> plan(int height) const;
  std::vector<Window> windows(std::vector<Step>* steps) const;
  void request(int value, int rows, std::vector<int>* done, std::vector<Step>* steps) const;
  int height(int value) const;
  Rows rows_read(const Node& node, size_t input, Rows rows) const;
  bool whole(int value) const { return value == first_ || value == program_.output() || program_.height(value) == 1; }
  int find_first(int64_t bytes) const;

  const Program& program_;
  std::vector<std::vector<std::pair<int, size_t>>> readers_;  // of each value: nodes, and which input it is
  std::vector<Step> steps_;
  std::vector<Window> windows_;
  int64_t window_floats_ = 0;
  int count_ = 1;
  int first_ = 0;
};

}  // namespace fastinv
