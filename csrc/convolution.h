// What every compiled convolution is: a geometry, and a way to run it on one image.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "padded.h"
#include "share.h"

namespace fastinv {

// One axis of a correlation, 0 rows and 1 columns. Forward, tap k of output o reads input o·stride + k·dilation −
// padding; transposed, it reads (o + padding − k·dilation) / stride, where that is whole.
struct Axis {
  int in, out, kernel, stride, padding, dilation;
};

struct Geometry {
  Axis axis[2];
  int in_channels, out_channels, groups;
  bool transposed;

  // Whether tap `tap` of output `out` reads anything along an axis, and where, perhaps outside.
  bool source(int axis, int out, int tap, int* position) const;
  // Whether that lies inside.
  bool inside(int axis, int position) const { return position >= 0 && position < this->axis[axis].in; }

  // Outputs of one residue modulo this many share taps along an axis: the stride of a transposed convolution.
  int phases(int axis) const;
  // The taps of one of them, in increasing order of the input position they read.
  std::vector<int> phase_taps(int axis, int phase) const;

  // The geometry of the gradient to the input.
  Geometry adjoint() const;

  // The first input row that output row `row` reads, and the last; they may lie outside.
  int first_row_read(int row) const;
  int last_row_read(int row) const;

  // Whether every input is read for some output.
  bool reads_all() const;
};

// weight(group, output channel in the group, input channel in the group, row tap, column tap)
using WeightAt = std::function<float(int, int, int, int, int)>;

// What a convolution runs on: images [H, W, C] to images [H', W', C'], or as its layouts say, so many floats apart.
struct Operands {
  const float* in;
  int64_t in_stride;
  float* out;
  int64_t out_stride;
  const float* addend;  // laid out as the results, added before the activation (`out` itself: accumulate), or null
  int64_t addend_stride;
  int64_t images;
  Activation activation;
  int64_t ahead = 0;  // images that lie behind these at `in`, and are read next
  int64_t lanes = 1;  // images abreast, [H, W, C, lane] to [H', W', C', lane], where runs_abreast() says so
};

class Convolution {
 public:
  virtual ~Convolution() = default;

  // Does this share of the work; shares are of about the same size, within an image too. `scratch` has
  // scratch_floats() floats, on a cache line.
  virtual void run(const Operands& operands, Share share, float* scratch) const = 0;
  virtual int64_t scratch_floats(int64_t) const { return 0; }  // of so many lanes

  // The same for some rows of the results of the first image: as many as row_step says, or those that are left. 0 where
  // that cannot be done.
  virtual int row_step() const { return 0; }
  virtual void run_rows(const Operands&, int, int, float*) const {}

  // Whether `run` also takes as many images abreast as a vector has lanes, without addend and as a whole.
  virtual bool runs_abreast() const { return false; }

  // How it could read its input, or null; and to make it do so: then `in` is where the first pixel lies.
  virtual const Padded* reads_padded() const { return nullptr; }
  virtual void read_padded() {}
  // To give results so, if it can; then `out` is where the first pixel lies.
  virtual bool give_padded(const Padded&) { return false; }

  // What runs, for describe(): form and tile.
  virtual std::string algorithm() const = 0;
};

enum class Layout { kRowMajor, kChannelsLast, kBoth };  // [C, H, W], [H, W, C], or the same either way

// How a convolution's images lie: [C, H, W] is row-major.
struct Layouts {
  bool in_row_major = false, out_row_major = false;
};

// What a cost model of shapes and instruction set finds best, for images in this layout: the same network takes the
// same algorithms, and sums in the same order, on every machine with this instruction set.
struct Choice {
  Layouts layouts;
  bool amx = false;  // with factors rounded to bfloat16
};

// `abreast`: many small images can run abreast, if they are row-major. What `rounding` points to, if anything, is the
// squared relative error that rounding factors to bfloat16 may still add.
Choice choose(const Kernels& kernels, const Geometry& geometry, Layout input, bool abreast, const double* rounding);

// The convolution that was chosen. `bias` is [out_channels] or null; `rounding` is as above, and is spent where it
// gains.
std::unique_ptr<Convolution> make_convolution(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight,
                                              const float* bias, const Choice& choice, bool abreast, double* rounding);

// The same for the gradient of one, which has neither bias nor activation: `geometry` and `weight` are its own.
//
// `forward` is the choice for the convolution itself: what rounds there may round here.
std::unique_ptr<const Convolution> make_gradient(const Kernels& kernels, const Geometry& geometry,
                                                 const WeightAt& weight, const Choice& forward);

}  // namespace fastinv
