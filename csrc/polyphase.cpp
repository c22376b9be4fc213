#include "polyphase.h"

#include <algorithm>

#include "cost.h"

namespace fastinv {
namespace {

constexpr int kMaxInputs = 5;  // of a tile along an axis

// G by number of outputs. The points are 0, 1 and ∞ for F(2, 2), with rows of Bᵀ in whole numbers, and ±a, ±b and ∞ for
// F(4, 2): rows of G are (1, p) / Π (p − q) over the other points q.
constexpr double kA = kNearPoint, kB = kFarPoint, kD = 2 * (kA * kA - kB * kB);
constexpr double kG1[1][2] = {{1, 0}};
constexpr double kG2[3][2] = {{1, 0}, {1, 1}, {0, 1}};
constexpr double kG4[5][2] = {
    {1 / (kA * kD), 1 / kD}, {-1 / (kA * kD), 1 / kD}, {-1 / (kB * kD), -1 / kD}, {1 / (kB * kD), -1 / kD}, {0, 1}};

const double (*filter_transform(int outputs))[2] { return outputs == 1 ? kG1 : outputs == 2 ? kG2 : kG4; }

// Transformed inputs and products of a chunk of tiles stay in L2 (1 MiB on Zen 4) beside the images and the weights of
// one position; between half and three times this size nothing changes by more than 2%.
constexpr int64_t kChunkFloats = 320 * 1024 / sizeof(float);
constexpr int64_t kMaxChunk = 32;  // in tiles of the product's rows; more would not make weights cheaper
// Images that go through all phases together: each phase reads them again, from L2.
constexpr int64_t kGroupFloats = 256 * 1024 / sizeof(float);

}  // namespace

AxisPhase axis_phase(const Axis& axis, int first) {
  const int parity = (first + axis.padding) % 2;  // of the taps
  AxisPhase phase = {};
  phase.first = first;
  phase.outputs = axis.out > first ? ceil_div(axis.out - first, 2) : 0;
  phase.taps = (axis.kernel - parity + 1) / 2;
  phase.last_tap = parity + 2 * (phase.taps - 1);
  phase.start = (first + axis.padding - phase.last_tap) / 2;  // exact: they have the same parity
  return phase;
}

bool Polyphase::applies(const Geometry& g) {
  const auto fits = [](const Axis& a) { return a.stride == 2 && a.kernel >= 2 && a.kernel <= 4 && a.dilation == 1; };
  return g.transposed && g.groups == 1 && fits(g.axis[0]) && fits(g.axis[1]);
}

Polyphase::Polyphase(const Kernels& kernels, const Geometry& geometry, PolyphaseForm form, const WeightAt& weight,
                     const float* bias)
    : kernels_(kernels), geometry_(geometry), form_(form), zeros_(geometry.in_channels) {
  for (int y = 0; y < std::min(geometry.axis[0].out, 2); ++y) {
    for (int x = 0; x < std::min(geometry.axis[1].out, 2); ++x) add_phase(y, x);
  }
  pack(weight, bias);
}

void Polyphase::add_phase(int first_y, int first_x) {
  const int in = geometry_.in_channels, out = geometry_.out_channels;
  Phase p = {};
  p.axis[0] = axis_phase(geometry_.axis[0], first_y);
  p.axis[1] = axis_phase(geometry_.axis[1], first_x);
  for (int a = 0; a < 2; ++a) {
    p.tile[a] = p.axis[a].taps == 2 ? form_.outputs : 1;
    p.inputs[a] = p.tile[a] + p.axis[a].taps - 1;
    p.tiles[a] = ceil_div(p.axis[a].outputs, p.tile[a]);
  }
  p.positions = p.inputs[0] * p.inputs[1];
  if (p.plain()) {
    plan_plain(&p);
  } else {
    p.row_units = p.tiles[1];
    const int64_t fitting = kChunkFloats / (p.positions * int64_t{in + out});
    p.chunk = static_cast<int>(std::clamp<int64_t>(fitting / kMaxTilePixels, 1, kMaxChunk)) * kMaxTilePixels;
    // One line more between positions: strides that are powers of two would put all of them into the same cache sets.
    p.in_stride = round_up(int64_t{p.chunk} * in, kLineFloats) + kLineFloats;
    p.out_stride = round_up(int64_t{p.chunk} * out, kLineFloats) + kLineFloats;
  }
  p.units = int64_t{p.tiles[0]} * p.row_units;
  p.product = std::make_unique<Product>(kernels_, in, out, p.positions, form_.bfloat16 && !p.plain());
  phases_.push_back(std::move(p));
}

// A phase of one tap takes its pixels from the image and writes them into it.
void Polyphase::plan_plain(Phase* phase) {
  const Axis &rows = geometry_.axis[0], &columns = geometry_.axis[1];
  const AxisPhase &py = phase->axis[0], &px = phase->axis[1];
  phase->first_plain = static_cast<int>(product_tiles_.size());
  phase->row_units = ceil_div(px.outputs, kMaxTilePixels);
  for (int i = 0; i < py.outputs; ++i) {
    for (int t = 0; t < phase->row_units; ++t) {
      Tile tile = {};
      Run run = {};
      tile.first_run = static_cast<int32_t>(product_runs_.size());
      tile.runs = 1;
      run.length = geometry_.in_channels;
      for (int j = px.outputs * t / phase->row_units; j < px.outputs * (t + 1) / phase->row_units; ++j) {
        const int p = tile.pixels++, y = py.start + i, x = px.start + j;
        const bool inside = y >= 0 && y < rows.in && x >= 0 && x < columns.in;
        run.offset[p] = inside ? (y * columns.in + x) * geometry_.in_channels : kOutside;
        tile.out[p] = ((py.first + 2 * i) * columns.out + px.first + 2 * j) * geometry_.out_channels;
      }
      product_tiles_.push_back(tile);
      product_runs_.push_back(run);
    }
  }
}

void Polyphase::pack(const WeightAt& weight, const float* bias) {
  const int in = geometry_.in_channels, out = geometry_.out_channels;
  bias_ = Buffer(round_up(out, kernels_.width));
  if (bias) std::copy_n(bias, out, bias_.data());
  for (const Phase& phase : phases_) {
    const AxisPhase &py = phase.axis[0], &px = phase.axis[1];
    const auto rows = filter_transform(phase.tile[0]), columns = filter_transform(phase.tile[1]);
    for (int o = 0; o < out; ++o) {
      for (int i = 0; i < in; ++i) {
        double taps[2][2] = {};
        for (int y = 0; y < py.taps; ++y) {
          for (int x = 0; x < px.taps; ++x) taps[y][x] = weight(0, o, i, py.last_tap - 2 * y, px.last_tap - 2 * x);
        }
        for (int u = 0; u < phase.inputs[0]; ++u) {
          for (int v = 0; v < phase.inputs[1]; ++v) {
            double value = 0.0;
            for (int y = 0; y < 2; ++y) {
              for (int x = 0; x < 2; ++x) value += rows[u][y] * columns[v][x] * taps[y][x];
            }
            phase.product->set(u * phase.inputs[1] + v, i, o, value);
          }
        }
      }
    }
  }
}

void Polyphase::transform_inputs(const Phase& phase, const Operands& operands, int64_t first, int count,
                                 float* transformed) const {
  const Axis &rows = geometry_.axis[0], &columns = geometry_.axis[1];
  const int channels = geometry_.in_channels;
  for (int t = 0; t < count; ++t) {
    const int64_t image = (first + t) / phase.units;
    const int tile = static_cast<int>((first + t) % phase.units);
    const float* in = operands.in + image * operands.in_stride;
    const int y0 = phase.axis[0].start + tile / phase.tiles[1] * phase.tile[0];
    const int x0 = phase.axis[1].start + tile % phase.tiles[1] * phase.tile[1];
    const float* pixels[kMaxInputs * kMaxInputs];
    const float** pixel = pixels;
    for (int y = y0; y < y0 + phase.inputs[0]; ++y) {
      for (int x = x0; x < x0 + phase.inputs[1]; ++x) {
        const bool inside = y >= 0 && y < rows.in && x >= 0 && x < columns.in;
        *pixel++ = inside ? in + (int64_t{y} * columns.in + x) * channels : zeros_.data();
      }
    }
    kernels_.polyphase_input({pixels, channels, transformed + int64_t{t} * channels, phase.in_stride, phase.positions});
  }
}

void Polyphase::transform_outputs(const Phase& phase, const Operands& operands, const float* products, int64_t first,
                                  int count) const {
  const AxisPhase &py = phase.axis[0], &px = phase.axis[1];
  const int channels = geometry_.out_channels, width = geometry_.axis[1].out;
  for (int t = 0; t < count; ++t) {
    const int64_t image = (first + t) / phase.units;
    const int tile = static_cast<int>((first + t) % phase.units);
    const int i = tile / phase.tiles[1] * phase.tile[0], j = tile % phase.tiles[1] * phase.tile[1];
    const int64_t at = (int64_t{py.first + 2 * i} * width + px.first + 2 * j) * channels;
    const int rows = std::min(phase.tile[0], py.outputs - i), columns = std::min(phase.tile[1], px.outputs - j);
    const bool upright = phase.tile[1] == 1;  // one column: the kernel sees it as a row
    kernels_.polyphase_output({products + int64_t{t} * channels, phase.out_stride, phase.positions, bias_.data(),
                               operands.out + image * operands.out_stride + at,
                               operands.addend ? operands.addend + image * operands.addend_stride + at : nullptr,
                               int64_t{2} * width * channels, int64_t{2} * (upright ? width : 1) * channels, channels,
                               upright ? 1 : rows, upright ? rows : columns, operands.activation});
  }
}

void Polyphase::run_tiles(const Phase& phase, const Operands& operands, int64_t first, int64_t last,
                          float* scratch) const {
  float* products = scratch + phase.positions * phase.in_stride;
  for (int64_t begin = first; begin < last; begin += phase.chunk) {
    const int count = static_cast<int>(std::min<int64_t>(phase.chunk, last - begin));
    transform_inputs(phase, operands, begin, count, scratch);
    phase.product->run(phase.positions, count, scratch, phase.in_stride, products, phase.out_stride,
                       products + phase.positions * phase.out_stride);
    transform_outputs(phase, operands, products, begin, count);
  }
}

void Polyphase::run_plain(const Phase& phase, const Operands& x, int64_t first, int64_t last) const {
  for (int64_t begin = first; begin < last;) {
    const int64_t image = begin / phase.units, end = std::min(last, (image + 1) * phase.units);
    const TileRow row = {phase.first_plain + static_cast<int32_t>(begin - image * phase.units),
                         static_cast<int32_t>(end - begin), 0, 0};
    kernels_.correlate({x.in + image * x.in_stride, x.out + image * x.out_stride, zeros_.data(), &row, 1,
                        product_tiles_.data(), product_runs_.data(), phase.product->weights(0), geometry_.in_channels,
                        bias_.data(), geometry_.out_channels, x.addend ? x.addend + image * x.addend_stride : nullptr,
                        x.activation});
    begin = end;
  }
}

void Polyphase::run(const Operands& operands, Share share, float* scratch) const {
  const Axis& rows = geometry_.axis[0];
  const int64_t row = int64_t{geometry_.in_channels} * geometry_.axis[1].in, size = row * rows.in;
  // Images go in groups; of those that are larger than that, bands of rows, which begin with a tile in every phase.
  const int step = 2 * form_.outputs;
  const int64_t band = std::min<int64_t>(rows.out, round_up(std::max<int64_t>(1, 2 * kGroupFloats / row), step));
  const int64_t group = band < rows.out ? 1 : std::max<int64_t>(1, kGroupFloats / size);
  Operands some = operands;
  for (int64_t first = 0; first < operands.images; first += group) {
    some.images = std::min(group, operands.images - first);
    some.in = operands.in + first * operands.in_stride;
    some.out = operands.out + first * operands.out_stride;
    if (operands.addend) some.addend = operands.addend + first * operands.addend_stride;
    for (int begin = 0; begin < rows.out; begin += static_cast<int>(band)) {
      run_band(some, begin, static_cast<int>(std::min<int64_t>(begin + band, rows.out)), share, scratch);
    }
  }
}

// All phases begin with a tile, and one of them has about as many as go through all stages together.
int Polyphase::row_step() const {
  int step = 1;
  for (const Phase& p : phases_) {
    if (!p.plain()) step = std::max(step, p.chunk / p.row_units);
  }
  return 2 * form_.outputs * step;
}

// Phases one after the other, each over all images: the weights of one are a quarter of all or so. More than one image
// only with all of their rows.
void Polyphase::run_band(const Operands& operands, int first_row, int last_row, Share share, float* scratch) const {
  struct Stretch {
    int64_t begin, end;
  };
  const auto units = [&](const Phase& p) {
    const auto before = [&p](int row) {  // rows of tiles that begin before this row
      return std::min<int64_t>(p.tiles[0], ceil_div(std::max(0, row - p.axis[0].first), 2 * p.tile[0]));
    };
    return Stretch{before(first_row) * p.row_units, (operands.images - 1) * p.units + before(last_row) * p.row_units};
  };
  int64_t total = 0;
  for (const Phase& phase : phases_) total += (units(phase).end - units(phase).begin) * phase.work();
  int64_t begin = share.begin(total), end = share.end(total);  // from the start of the phase, in products
  for (const Phase& phase : phases_) {
    const Stretch all = units(phase);
    const int64_t count = all.end - all.begin, work = phase.work();
    const auto unit = [&](int64_t products) {
      return all.begin + std::clamp<int64_t>((products + work - 1) / work, 0, count);
    };
    const int64_t first = unit(begin), last = unit(end);
    if (first < last) {
      phase.plain() ? run_plain(phase, operands, first, last) : run_tiles(phase, operands, first, last, scratch);
    }
    begin -= count * work;
    end -= count * work;
  }
}

int64_t Polyphase::scratch_floats(int64_t) const {
  int64_t most = 0;
  for (const Phase& p : phases_)
    most = std::max(most, p.positions * (p.in_stride + p.out_stride) + p.product->scratch_floats(p.chunk));
  return most;
}

std::string Polyphase::algorithm() const {
  const std::string m = std::to_string(form_.outputs);
  return "polyphase winograd " + m + "x" + m + (form_.bfloat16 ? ", bfloat16" : "");
}

}  // namespace fastinv
