#include "amx.h"

#include <algorithm>
#include <cstring>

#include "bfloat16.h"
#include "cost.h"
#include "isa.h"

namespace fastinv {
namespace {

// The copy of what is computed at once stays in L2, 2 MiB on Sapphire Rapids, beside the images and the weights.
constexpr int64_t kCopyElements = 512 * 1024 / sizeof(uint16_t);
constexpr int64_t kWorthwhile = 1024;  // positions that make the way of the weights from L2 cheap

// Inputs from output to output of a phase.
int step_of(const Geometry& g, int axis) { return g.transposed ? 1 : g.axis[axis].stride; }

// What output 0 of a phase reads along an axis by its taps, from the first on, perhaps outside.
std::vector<int> offsets(const Geometry& g, int axis, int phase) {
  std::vector<int> found;
  for (int tap : g.phase_taps(axis, phase)) {
    int position;
    g.source(axis, phase, tap, &position);
    found.push_back(position);
  }
  return found;
}

int outputs_of(const Geometry& g, int axis, int phase) { return ceil_div(g.axis[axis].out - phase, g.phases(axis)); }

struct Margins {
  int before = 0, after = 0;
};

// Zeros that are read around an image along an axis.
Margins margins(const Geometry& g, int axis) {
  Margins m;
  for (int phase = 0; phase < g.phases(axis); ++phase) {
    for (int offset : offsets(g, axis, phase)) {
      m.before = std::max(m.before, -offset);
      m.after = std::max(m.after, (outputs_of(g, axis, phase) - 1) * step_of(g, axis) + offset + 1 - g.axis[axis].in);
    }
  }
  return m;
}

// Pixels of an image along an axis, zeros up to the next included; with more padding than taps there are more outputs.
int extent(const Geometry& g, int axis) {
  const Margins m = margins(g, axis);
  return std::max(g.axis[axis].in + std::max(m.before, m.after), (outputs_of(g, axis, 0) - 1) * step_of(g, axis) + 1);
}

int pitch_of(const Geometry& g) {
  const int depth = static_cast<int>(round_up(g.in_channels, kAmxDepth));
  // A tile's rows, lines that lie large powers of two apart, would push each other out of L1.
  return depth % 256 == 0 ? depth + kAmxDepth : depth;
}

void clear(uint16_t* at, int64_t elements) { std::memset(at, 0, static_cast<size_t>(elements) * sizeof *at); }

Padded padded(const Geometry& g) {
  const int width = extent(g, 1);
  // What a row's last tile reads behind it, and the last row's zeros.
  const int behind = kAmxRows * step_of(g, 1) + width;
  return {width, extent(g, 0), pitch_of(g), {margins(g, 0).before, margins(g, 1).before}, behind};
}

}  // namespace

bool Amx::applies(const Kernels& kernels, const Geometry& g) { return has_tiles(kernels) && g.groups == 1; }

Amx::Plan Amx::plan(const Geometry& g, bool row_major) {
  const int columns = outputs_of(g, 1, 0), height = extent(g, 0), width = extent(g, 1);
  const double by_rows = double(columns) / round_up(columns, kAmxRows);
  const Axis& rows = g.axis[0];
  const bool one_phase = g.phases(0) * g.phases(1) == 1, side_by_side = step_of(g, 0) == 1 && step_of(g, 1) == 1;
  if (row_major && one_phase && step_of(g, 0) == 1 && rows.dilation == 1 && rows.kernel > 1 &&
      g.out_channels <= kMaxPlanarOutputs && rows.kernel * g.out_channels <= kAmxColumns) {
    return {false, by_rows, rows.kernel};
  }
  const double flat = double(columns) * outputs_of(g, 0, 0) / (double(height) * width);
  const bool fits = int64_t{height} * width * pitch_of(g) <= kCopyElements;
  if (side_by_side && fits && flat > 1.1 * by_rows) return {true, flat, 1};
  return {false, by_rows, 1};
}

bool Amx::gives_row_major(const Geometry& g) {
  return g.out_channels <= kMaxPlanarOutputs && g.phases(0) * g.phases(1) == 1 && !plan(g, true).flat;
}

Amx::Amx(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias, Layouts layouts)
    : kernels_(kernels),
      geometry_(geometry),
      layouts_(layouts),
      plan_(plan(geometry, layouts.out_row_major)),
      copy_(padded(geometry)) {
  for (int axis = 0; axis < 2; ++axis) step_[axis] = step_of(geometry, axis);
  for (int y = 0; y < geometry.phases(0); ++y) {
    for (int x = 0; x < geometry.phases(1); ++x) add_phase(y, x);
  }
  pack(weight, bias);
  choose_band();
}

void Amx::add_phase(int first_y, int first_x) {
  Phase phase = {};
  phase.first[0] = first_y;
  phase.first[1] = first_x;
  for (int axis = 0; axis < 2; ++axis) phase.outputs[axis] = outputs_of(geometry_, axis, phase.first[axis]);
  const std::vector<int> rows = offsets(geometry_, 0, first_y), columns = offsets(geometry_, 1, first_x);
  if (!rows.empty()) {
    phase.first_row = rows.front();
    phase.last_row = rows.back();
  }
  for (int y : rows) {
    if (plan_.stacked > 1 && y != phase.first_row) continue;
    for (int x : columns) phase.taps.push_back((int64_t{y} * copy_.width + x) * copy_.pitch);
  }
  phases_.push_back(std::move(phase));
}

// [phase][two tiles of columns, or the last one][tap][tile of depth][tile][in / 2][column][2]. Columns are output
// channels, of each stacked row of taps.
void Amx::pack(const WeightAt& weight, const float* bias) {
  const int in = geometry_.in_channels, out = geometry_.out_channels, all = out * plan_.stacked;
  const int64_t depth = round_up(in, kAmxDepth), padded = round_up(all, kAmxColumns);
  bias_ = Buffer(round_up(out, kAmxColumns));
  if (bias) std::copy_n(bias, out, bias_.data());
  int64_t size = 0;
  for (Phase& phase : phases_) {
    phase.weights = size;
    size += static_cast<int64_t>(phase.taps.size()) * depth * padded;
  }
  weights_ = Buffer::for_work(size / 2);
  auto* const packed = reinterpret_cast<uint16_t*>(weights_.data());
  for (const Phase& phase : phases_) {
    const auto rows = geometry_.phase_taps(0, phase.first[0]), columns = geometry_.phase_taps(1, phase.first[1]);
    const auto taps = static_cast<int64_t>(phase.taps.size()), row_taps = static_cast<int64_t>(columns.size());
    for (int64_t c = 0; c < all; ++c) {
      const int64_t block = c / (2 * kAmxColumns) * (2 * kAmxColumns), column = c - block;
      const int64_t tiles = padded - block > kAmxColumns ? 2 : 1;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int y = rows[static_cast<size_t>(plan_.stacked > 1 ? c / out : tap / row_taps)];
        const int x = columns[static_cast<size_t>(tap % row_taps)];
        for (int i = 0; i < in; ++i) {
          const int64_t k = tap * depth / kAmxDepth + i / kAmxDepth;
          const int64_t tile = block * taps * depth / (kAmxDepth * kAmxColumns) + k * tiles + column / kAmxColumns;
          const int64_t row = tile * kAmxDepth / 2 + i % kAmxDepth / 2;
          packed[phase.weights + (row * kAmxColumns + column % kAmxColumns) * 2 + i % 2] =
              to_bfloat16(weight(0, static_cast<int>(c % out), i, y, x));
        }
      }
    }
  }
}

// Images go together where they are small; of those that are larger than the copy may be, bands of rows.
void Amx::choose_band() {
  const int64_t row = copy_.row(), image = copy_.image();
  const int rows = geometry_.axis[0].out;
  band_ = rows;
  if (image <= kCopyElements) {
    const int64_t positions = int64_t{phases_.front().outputs[0]} * phases_.front().outputs[1];
    group_ = static_cast<int>(std::clamp<int64_t>(kWorthwhile / positions, 1, kCopyElements / image));
    copied_rows_ = int64_t{copy_.before[0]} + group_ * copy_.height;
    return;
  }
  const auto read = [&](int band) { return geometry_.last_row_read(band - 1) - geometry_.first_row_read(0) + 2; };
  while (band_ > 1 && read(band_) * row > kCopyElements) band_ -= (band_ + 7) / 8;
  copied_rows_ = read(band_);
}

int64_t Amx::copy_size(int64_t rows) const {
  return round_up((copy_.before[1] + rows * copy_.width + copy_.behind) * copy_.pitch, 2 * kLineFloats);
}

std::string Amx::algorithm() const {
  return std::string(plan_.stacked > 1 ? "amx stacked" : "amx") + (in_place_ ? " in place" : "") + ", bfloat16";
}

// Results are whole pairs of tiles, so that what they have more than channels is no part of a pixel.
bool Amx::give_padded(const Padded& layout) {
  if (layouts_.out_row_major || geometry_.out_channels % (2 * kAmxColumns) != 0) return false;
  out_ = layout;
  return true;
}

// Zeros around these rows of results.
void Amx::clear_around(const Operands& x, int first_row, int last_row) const {
  const int rows = geometry_.axis[0].out, columns = geometry_.axis[1].out;
  const int64_t beside = int64_t{out_->width - columns} * out_->pitch;
  auto* image = reinterpret_cast<uint16_t*>(x.out);
  if (first_row == 0) clear(image - out_->elements_before(), out_->elements_before());
  for (int64_t i = 0; i < x.images; ++i, image += out_->image()) {
    for (int row = first_row; row < last_row; ++row) clear(image + (row + 1) * out_->row() - beside, beside);
    if (last_row == rows) clear(image + rows * out_->row(), (out_->height - rows) * out_->row());
  }
}

void Amx::run(const Operands& x, Share share, float* scratch) const {
  const int rows = geometry_.axis[0].out;
  if (out_ && share.index == 0) clear_around(x, 0, rows);
  for (int64_t image = 0; image < x.images; image += group_) {
    const int images = static_cast<int>(std::min<int64_t>(group_, x.images - image));
    for (int row = 0; row < rows; row += band_) {
      run_band(x, image, images, row, std::min(rows, row + band_), share, scratch);
    }
  }
}

void Amx::run_rows(const Operands& x, int first_row, int last_row, float* scratch) const {
  if (out_) clear_around(x, first_row, last_row);
  for (int row = first_row; row < last_row; row += band_) {
    run_band(x, 0, 1, row, std::min(last_row, row + band_), {}, scratch);
  }
}

Amx::Part Amx::part(const Phase& phase, int images, int first_row, int last_row, Share share) const {
  Part part = {};
  part.row_positions = plan_.flat ? copy_.width : static_cast<int>(round_up(phase.outputs[1], kAmxRows));
  part.image_rows = plan_.flat ? copy_.height : phase.outputs[0];
  const auto below = [&](int row) {  // rows of the phase before output row `row`
    return std::clamp(ceil_div(row - phase.first[0], geometry_.phases(0)), 0, phase.outputs[0]);
  };
  const int64_t end = int64_t{images - 1} * part.image_rows + below(last_row);
  part.positions = end * part.row_positions;
  const int64_t first = int64_t{below(first_row)} * part.row_positions / kAmxRows;
  const int64_t unit = plan_.stacked > 1 ? part.row_positions / kAmxRows : 1;  // tiles that are not parted
  const int64_t units = ((part.positions + kAmxRows - 1) / kAmxRows - first) / unit;
  part.first = first + share.begin(units) * unit;
  part.last = first + share.end(units) * unit;
  return part;
}

// Pieces of work (see AmxAhead): four products of tiles each, or a tile turned over.
int64_t Amx::pieces(const Phase& phase, const Part& part) const {
  const int64_t taps = static_cast<int64_t>(phase.taps.size());
  const int64_t depth = ceil_div(geometry_.in_channels, kAmxDepth), out = ceil_div(geometry_.out_channels, kAmxColumns);
  const int64_t tiles = part.last - part.first;
  return taps * depth * out * tiles / 4 + (plan_.stacked > 1 ? tiles : 0);
}

// The row of the copy, row 0 being that of the first image, that a position is in without padding.
int Amx::row_read(const Part& part, int64_t position) const {
  const int64_t row = position / part.row_positions;
  return static_cast<int>(row / part.image_rows * copy_.height + row % part.image_rows * step_[0]);
}

void Amx::run_band(const Operands& x, int64_t image, int images, int first_row, int last_row, Share share,
                   float* scratch) const {
  std::vector<Part> parts;
  int from = images * copy_.height, to = -copy_.before[0];
  int64_t all_pieces = 1;
  for (const Phase& phase : phases_) {
    const Part p = part(phase, images, first_row, last_row, share);
    parts.push_back(p);
    if (p.first == p.last || phase.taps.empty()) continue;
    from = std::min(from, row_read(p, p.first * kAmxRows) + phase.first_row);
    to = std::max(to, row_read(p, std::min(p.last * kAmxRows, p.positions) - 1) + phase.last_row + 1);
    all_pieces += pieces(phase, p);
  }
  AmxAhead ahead = {};
  if (share.count == 1 && band_ == geometry_.axis[0].out) ahead = what_is_next(x, image, images, all_pieces);
  const uint16_t* row_0 = reinterpret_cast<const uint16_t*>(x.in) + image * copy_.image();
  if (!in_place_) {
    auto* const copy = reinterpret_cast<uint16_t*>(scratch);
    fill(x, image, images, from, to, copy, &ahead);
    row_0 = copy + (copy_.before[1] - int64_t{from} * copy_.width) * copy_.pitch;
  }
  for (size_t p = 0; p < phases_.size(); ++p) {
    if (parts[p].first == parts[p].last) continue;
    AmxArgs a = arguments(phases_[p], parts[p], x, image);
    a.in = row_0;
    a.ahead = &ahead;
    kernels_.amx(a);
  }
}

// The program's next images come from memory. Beside these pieces of work there are those of turning images over.
AmxAhead Amx::what_is_next(const Operands& x, int64_t image, int images, int64_t pieces) const {
  const int64_t following = std::min<int64_t>(images, x.images + x.ahead - image - images);
  if (x.ahead == 0 || following <= 0) return {};
  if (layouts_.in_row_major) {
    const int64_t pixels = int64_t{geometry_.axis[0].in} * geometry_.axis[1].in;
    pieces += images * ceil_div(geometry_.in_channels, kAmxDepth) * ((pixels + kAmxRows - 1) / kAmxRows);
  }
  const float* next = x.in + (image + images) * x.in_stride;
  const int64_t floats = following * x.in_stride;
  return {reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next + floats),
          static_cast<int32_t>(floats / kLineFloats / pieces + 1)};
}

// All but what comes from the copy.
AmxArgs Amx::arguments(const Phase& phase, const Part& part, const Operands& x, int64_t image) const {
  const int64_t channels = geometry_.out_channels, width = geometry_.axis[1].out, height = geometry_.axis[0].out;
  AmxArgs a = {};
  a.taps = phase.taps.data();
  a.tap_count = static_cast<int32_t>(phase.taps.size());
  a.depth = static_cast<int32_t>(round_up(geometry_.in_channels, kAmxDepth));
  a.in_image = copy_.image();
  a.in_row = step_[0] * copy_.row();
  a.in_pixel = int64_t{step_[1]} * copy_.pitch;
  a.weights = reinterpret_cast<const uint16_t*>(weights_.data()) + phase.weights;
  a.bias = bias_.data();
  a.out_channels = geometry_.out_channels;
  a.first = part.first;
  a.last = part.last;
  a.positions = part.positions;
  a.row_positions = part.row_positions;
  a.image_rows = part.image_rows;
  a.rows = phase.outputs[0];
  a.columns = phase.outputs[1];
  const int64_t pixel = layouts_.out_row_major ? 1 : channels;
  const int64_t at = (phase.first[0] * width + phase.first[1]) * pixel;
  a.addend = x.addend ? x.addend + image * x.addend_stride + at : nullptr;
  a.addend_image = x.addend_stride;
  a.addend_row = geometry_.phases(0) * width * pixel;
  a.addend_pixel = geometry_.phases(1) * pixel;
  if (out_) {
    a.out_image = out_->image();
    a.out_row = geometry_.phases(0) * out_->row();
    a.out_pixel = int64_t{geometry_.phases(1)} * out_->pitch;
    a.rounded = reinterpret_cast<uint16_t*>(x.out) + image * a.out_image + phase.first[0] * out_->row() +
                int64_t{phase.first[1]} * out_->pitch;
  } else {
    a.out = x.out + image * x.out_stride + at;
    a.out_image = x.out_stride;
    a.out_row = a.addend_row;
    a.out_pixel = a.addend_pixel;
  }
  a.out_channel = layouts_.out_row_major ? height * width : 1;
  a.stacked = plan_.stacked;
  a.activation = x.activation;
  return a;
}

// Rows first_row to last_row of the images one below the other, each with zeros up to the next, rounded to bfloat16.
void Amx::fill(const Operands& x, int64_t image, int images, int first_row, int last_row, uint16_t* copy,
               AmxAhead* ahead) const {
  const int rows = geometry_.axis[0].in, columns = geometry_.axis[1].in, channels = geometry_.in_channels;
  const int64_t row_size = copy_.row(), before = int64_t{copy_.before[1]} * copy_.pitch;
  const int64_t beside = int64_t{copy_.width - columns} * copy_.pitch;
  clear(copy, before);
  uint16_t* const row_0 = copy + before - first_row * row_size;
  for (int row = first_row; row < last_row;) {
    const int number = row < 0 ? 0 : row / copy_.height, top = number * copy_.height;
    const bool inside = row >= 0 && row - top < rows && number < images;
    const int end = std::min(last_row, inside ? top + rows : row + 1);
    if (!inside) {
      clear(row_0 + row * row_size, row_size);
    } else {
      const float* const in = x.in + (image + number) * x.in_stride;
      uint16_t* const out = row_0 + top * row_size;
      if (layouts_.in_row_major) {
        kernels_.amx_turn({in, int64_t{rows} * columns, out, row_size, (row - top) * columns, (end - top) * columns,
                           columns, channels, copy_.pitch, ahead});
      }
      for (int y = row - top; y < end - top; ++y) {
        if (!layouts_.in_row_major) {
          kernels_.amx_round(
              {in + int64_t{y} * columns * channels, out + y * row_size, columns, channels, copy_.pitch});
        }
        clear(out + (y + 1) * row_size - beside, beside);
      }
    }
    row = end;
  }
}

}  // namespace fastinv
