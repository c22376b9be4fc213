// The border between the engine and the kernels: plain structs and one table of functions per instruction set.
//
// Kernels see one image at a time in the internal layout: [H, W, C] for images (channels last), row-major for
// everything else. They know nothing of networks, batches or threads, and use no standard library.
#pragma once

#include <cstdint>

namespace fastinv {

enum class ActivationKind : int {
  kIdentity,
  kRelu,
  kLeakyRelu,
  kSigmoid,
  kTanh,
  kSilu,
  kGelu,
  kGeluTanh,
  kSoftplus,
  kHardtanh,
  kClamp,
  kElu,
  kExp,
  kSqrt,
  kReciprocal,
};

struct Activation {
  ActivationKind kind = ActivationKind::kIdentity;
  float a = 0.0f;
  float b = 0.0f;
};

// ---- correlate: every dense convolution, transposed convolution, linear layer and their gradients -------------
//
// out[p] = activation(bias + Σ_run Σ_k in[p's offset for the run + k] · weight[run.weight + k])
//
// Strides, dilation, padding and the sub-convolutions of a transposed convolution are all resolved when a network
// is compiled, into the offsets below. A run is a stretch of the input that lies contiguous in memory: the
// channels under one tap, or under several taps side by side.

constexpr int kMaxTilePixels = 6;
constexpr int kMaxNarrowPixels = 8;  // where output channels are one vector: fewer sums would wait for each other
constexpr int kMaxDotOutputs = 4;
constexpr int32_t kOutside = -1;  // this pixel's run lies in the padding: read zeros

struct Run {
  int32_t weight;  // first weight row
  int32_t length;  // floats, and weight rows
  int32_t offset[kMaxNarrowPixels];
};

struct Tile {
  int32_t first_run;
  int32_t runs;
  int32_t pixels;
  int32_t out[kMaxNarrowPixels];
};

struct TileRow {
  int32_t first_tile;
  int32_t tiles;
  int64_t in_base;
  int64_t out_base;
};

struct CorrelateArgs {
  const float* in;
  float* out;
  const float* zeros;  // as many as the longest run
  const TileRow* rows;
  int64_t row_count;
  const Tile* tiles;
  const Run* runs;
  const float* weights;  // broadcast: [block][row][block's channels]; dot: [channel][row]
  int64_t weight_rows;
  const float* bias;  // one per output channel (broadcast: padded to whole vectors), or null
  int32_t out_channels;
  const float* addend;  // laid out as `out`, added before the activation (`out` itself: accumulate), or null
  Activation activation;
};

// out[k][r][o] = Σ_i in[k][r][i] · weights[k][i][o] for each of so many matrices k.
//
// While a block of weights is multiplied, the one behind it is fetched into L2. For few rows they come from farther
// away: 2.4 MB of a Winograd layer 128 → 128, 18 of CIFAR ReLU32's rMLE step, 4% of whose time this saves.
struct ProductArgs {
  const float* in;
  int64_t in_step;  // floats from matrix to matrix
  float* out;
  int64_t out_step;
  const float* weights;  // as of a correlation, in blocks of channels, matrix after matrix
  int32_t matrices, rows, in_channels, out_channels;
};

// One row of the results of a depthwise correlation, in tiles of neighbouring pixels:
//
// out[p, c] = activation(bias[c] + Σ_{row of taps, tap} in[row, p's column for the tap, c] · weights[row, tap, c])
//
// A run is taps side by side: pixel p of the tile reads column p · pixel_step + k, counted from `column`, through its
// tap k. What does not fit, dilated taps or pixels more than two columns apart, is in runs of one tap.
constexpr int kDepthwiseTaps[] = {7, 5, 3, 2, 1};  // of a run

struct DepthwiseRun {
  int32_t column;  // floats from the start of the row, perhaps before it
  uint32_t there;  // a bit for each column that is read: whether it lies inside
  int32_t taps;
  int32_t weight;  // floats from the first tap of the row
};

struct DepthwiseTile {
  int32_t out;  // floats from the start of the row
  int32_t pixels;
  int32_t first_run, runs;
};

struct DepthwiseTapRow {
  int64_t in, weight;  // where the row of inputs starts, and that of taps
};

struct DepthwiseArgs {
  const float* in;
  float* out;
  const DepthwiseTapRow* tap_rows;
  int32_t tap_row_count;
  const DepthwiseTile* tiles;
  int32_t tile_count;
  const DepthwiseRun* runs;
  int32_t pixel_step;             // 1 or 2
  int64_t column_step, out_step;  // floats from column to column, and from pixel to pixel
  const float* weights;           // [row of taps, tap, channel]
  const float* bias;              // [channel] or null
  int32_t channels;
  int64_t row_size;     // floats
  const float* addend;  // as above
  Activation activation;
};

// out[r][o] = Σ_i in[r][i] · weights[i][o] of factors rounded to bfloat16, rows up to a chunk's.
struct Bfloat16ProductArgs {
  const float* in;
  float* out;
  uint16_t* rounded;        // memory for the rounded inputs
  const uint16_t* weights;  // [block of channels][pair of in channels][channel][2]
  int32_t rows, in_channels, out_channels;
};

// ---- convolutions on AMX's tiles -----------------------------------------------------------------------------------

constexpr int kAmxRows = 16, kAmxDepth = 32, kAmxColumns = 16;  // of tiles: pixels, input and output channels

// Memory that is read next, from `next` to `end`: so many lines are asked for with each piece of other work, a hundred
// cycles or so. More of them at once would wait for each other.
struct AmxAhead {
  const char *next, *end;
  int32_t lines;
};

// [pixel][in channel] floats as bfloat16, with zeros up to a multiple of kAmxDepth, out_step from pixel to pixel.
struct AmxRoundArgs {
  const float* in;
  uint16_t* out;
  int64_t pixels;
  int32_t channels, out_step;
};

// The same of pixels first to last of an image [in channel][row_pixels · row + column].
struct AmxTurnArgs {
  const float* in;
  int64_t in_channel;  // floats from channel to channel
  uint16_t* out;       // where pixel 0 goes
  int64_t out_row;     // elements from row to row
  int32_t first, last, row_pixels;
  int32_t channels, out_step;
  AmxAhead* ahead;
};

// Tiles first to last of one phase's positions: position q is column q % row_positions of row q / row_positions, and
// those of `image_rows` rows are one image's. It is an output where its row and column are less than rows and columns.
struct AmxArgs {
  const uint16_t* in;                  // the pixel that position 0 would read without padding
  const int64_t* taps;                 // elements from there, of each tap
  int32_t tap_count, depth;            // depth: input channels, in whole tiles
  int64_t in_image, in_row, in_pixel;  // elements from one to the next
  const uint16_t* weights;  // [two tiles of columns or the last one][tap][tile of depth][tile][in / 2][column][2]
  const float* bias;        // [out channel], in whole tiles
  int32_t out_channels;     // which are the weights' columns
  // If more than 1: columns are [row of taps][out channel], of so many rows of taps, one row of the input apart, and
  // all in one tile; `taps` are those of the first. Then out_channel is not 1, and first to last are whole rows.
  int32_t stacked;
  int64_t first, last, positions;  // of positions all: the last tile may have more
  int32_t row_positions, image_rows;
  int32_t rows, columns;
  float* out;
  uint16_t* rounded;                      // where not null, results go here, as bfloat16: whole pairs of tiles
  int64_t out_image, out_row, out_pixel;  // elements from one to the next
  int64_t out_channel;                    // 1; else pixels of a row lie side by side, and each row has its own tiles
  const float* addend;                    // or null
  int64_t addend_image, addend_row, addend_pixel;
  AmxAhead* ahead;
  Activation activation;
};

// Winograd's output transform of one tile: up to outputs × outputs pixels, 4×4 or 2×2, from 36 products each,
// position_stride apart.
struct WinogradOutputArgs {
  const float* products;
  int64_t position_stride;
  const float* bias;  // [channel]
  bool abreast;       // channels are those of images abreast, a vector for each
  float* out;
  const float* addend;  // as above
  int64_t row_stride;   // floats from output row to row
  int32_t channels;
  int32_t outputs;
  int32_t rows, columns;  // pixels inside the image
  Activation activation;
};

// What a tile of the adjoint form adds to the 6×6 pixels around it, from 36 products each, position_stride apart.
struct WinogradAdjointArgs {
  const float* products;
  int64_t position_stride;
  float* out;          // where the first of the 6×6 pixels lies, or would
  int64_t row_stride;  // floats from row to row
  int32_t channels;
  int32_t first_row, last_row, first_column, last_column;  // those inside the image; the last is not
};

constexpr int kMaxQuadraticRows = 16;

// Rows of 2·AᵀA·z + c, from a copy of z with zeros around it.
struct QuadraticArgs {
  const float* in;  // what the first offset of the first row tap of the first of these rows reads
  int64_t in_row;   // floats from row to row
  const float* constant;
  float* out;
  int64_t row;  // floats in a row of `constant` and `out`
  // [vector of the row][group][offset][tap][lane] where all rows have the same; else [vector of the row][row tap of
  // the first row][offset][row][lane], of groups row taps.
  const float* weights;
  int32_t offsets, groups, taps, rows;  // so many floats of a row, from one on; taps: 0 where rows differ
};

constexpr int kMaxDifferentRows = 2;

// The points ±a and ±b of F(4, 2). These multiply rounding errors by 1.7 along an axis; the usual 0, ±1 and 2 by 2.5
// (the root of the mean of Aᵀ²·(Bᵀ² ∘ G²) over random inputs). All that the transforms multiply by is exact in float32.
constexpr float kNearPoint = 0.375f, kFarPoint = 1.25f;

// The transforms of one tile of a polyphase convolution, of one axis (3 or 5 positions) or two (9 or 25).
struct PolyphaseInputArgs {
  const float* const* pixels;  // as many as positions, row by row
  int32_t channels;
  float* out;
  int64_t position_stride;
  int32_t positions;
};

struct PolyphaseOutputArgs {
  const float* products;
  int64_t position_stride;
  int32_t positions;
  const float* bias;  // [channel]
  float* out;
  const float* addend;            // as above
  int64_t row_step, column_step;  // floats from pixel to pixel
  int32_t channels;
  int32_t rows, columns;  // pixels inside the image; one row where one axis is transformed
  Activation activation;
};

// ---- correlate in [C, H, W] ----------------------------------------------------------------------------------------

constexpr int kMaxPlanarTaps = 16;  // that reach one output, along each axis

// Rows first_row to first_row + rows of one row phase: output row i·step_y + phase_y reads input rows from i + shift_y,
// one for each of taps_y. With step_x = 2, channels come in pairs: the even and the odd columns of one channel.
struct PlanarArgs {
  const float* in;
  float* out;
  const float* addend;   // as above
  const float* weights;  // [block of channels][in channel][taps_y / taps][taps_x][taps][channel · step_x]
  const float* bias;     // [channel · step_x]
  int32_t in_channels, in_h, in_w;
  int32_t out_channels, out_h, out_w;
  int32_t taps_y, taps_x, shift_y, shift_x;
  int32_t step_y, step_x, phase_y;
  int32_t block;  // output channels at once: block · step_x is at most kMaxPlanarOutputs
  int32_t taps;   // row taps at once; divides taps_y
  int32_t first_row, rows;
  const float* next;  // what the next calls will read, to be fetched meanwhile: so many floats for each input channel
  int32_t next_step;  // of each tile
  bool abreast;       // on as many images as a vector has lanes, [C, H, W, lane]; without addend
  Activation activation;
};

constexpr int kMaxPlanarOutputs = 4;

// Four output rows by F(4, 3) along the columns; pointers to images point at the first row read or written.
struct PlanarWinogradArgs {
  const float* in;
  float* out;
  const float* addend;   // as above
  const float* weights;  // [block of channels][pass][in channel][taps_x][position][channel]
  const float* bias;     // [channel]
  float* transformed;    // [in channel of a chunk][6][pitch] and one margin more: rows from `margin` on, zeros between
  float* products;       // [block of channels][6][channel][products_row]
  int64_t margin, pitch, products_row;
  int32_t in_channels, in_h, in_w;
  int32_t out_channels, out_h, out_w;
  int32_t taps_x, shift_x;
  int32_t block, chunk;  // channels at once: output, at most kMaxPlanarOutputs, and input
  int32_t in_row;        // number of the first row read
  int32_t rows;          // output rows inside the image
  const float* next;     // as above
  int32_t next_step;     // for each input channel
  Activation activation;
};

// ---- pooling and resampling -------------------------------------------------------------------------------------

struct PoolArgs {
  const float* in;
  float* out;
  int32_t in_h, in_w, out_h, out_w, channels;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  Activation activation;
  float* index;  // which of its window's positions each result comes from, row by row, the first of several; or null
};

struct PoolGradientArgs {
  PoolArgs pool;          // with the index of the forward pass; in, out and activation unused
  const float* grad_out;  // [out_h, out_w, channels]
  float* grad_in;         // [in_h, in_w, channels]
  bool accumulate;
};

// A sparse matrix with one row per output position: entries first[i] .. first[i + 1].
struct SparseAxis {
  const int32_t* first;
  const int32_t* index;
  const float* weight;
};

// out[i, j, c] = activation(Σ_u Σ_v rows[i, u] · columns[j, v] · in[u, v, c])
struct ResampleArgs {
  const float* in;
  float* out;
  int32_t in_w, out_h, out_w, channels;
  SparseAxis rows, columns;
  bool accumulate;
  Activation activation;
};

// ---- elementwise --------------------------------------------------------------------------------------------------

enum class BinaryKind : int { kAdd, kMul };

constexpr int kMaxRank = 6;

// out[i] = a[i] ∘ b[i] over `rank` axes; a stride of 0 broadcasts, and the last axis has strides 0 or 1.
struct BinaryArgs {
  const float* a;
  const float* b;
  float* out;
  BinaryKind kind;
  int32_t rank;
  int64_t size[kMaxRank];
  int64_t stride_a[kMaxRank], stride_b[kMaxRank];
  Activation activation;
};

// grad_a[i] += grad_out[i] · (kMul ? b[i] : 1), summed where a was broadcast.
struct BinaryGradientArgs {
  const float* grad_out;
  const float* b;
  float* grad_a;
  BinaryKind kind;
  int32_t rank;
  int64_t size[kMaxRank];
  int64_t stride_a[kMaxRank], stride_b[kMaxRank];
};

// out[o, i] = activation(scale[i] · in[o, i] + shift[i]); shift may be null.
struct AffineArgs {
  const float* in;
  float* out;
  const float* scale;
  const float* shift;
  int64_t outer, inner;
  bool accumulate;
  Activation activation;
};

// ---- norms ---------------------------------------------------------------------------------------------------------

// y = (x − μ) / √(σ² + eps) · weight + bias of a matrix [rows, channels], μ and σ² over channels / groups channels of a
// row, or, where `spatial`, of all rows.
struct NormalizeArgs {
  const float* in;
  float* out;
  const float* weight;  // [channel]
  const float* bias;    // [channel]
  int64_t rows;
  int32_t channels, groups;
  int64_t first, last;  // of rows, or of groups where `spatial`: those to be done
  bool spatial;
  bool centered;  // else μ is 0
  float eps;
  Activation activation;
  float* statistics;  // μ and 1 / √(σ² + eps) of each [row,] group; or null
  float* scratch;     // where `spatial`: kNormalizeScratch · channels floats
};

constexpr int kNormalizeScratch = 4;

struct NormalizeGradientArgs {
  NormalizeArgs norm;  // with what the forward pass left; out, bias and activation unused
  const float* grad_out;
  float* grad_in;
  bool accumulate;
};

// ---- attention -----------------------------------------------------------------------------------------------------

constexpr int kAttentionBlock = 24;  // queries at once: four tiles of rows

// out = activation(softmax(scale · q · kᵀ + bias) · v) of each head, whose channels lie side by side, of each window.
struct AttentionArgs {
  const float* q;                 // [window][query][head][channel]
  const float* k;                 // [window][key][head][channel]
  const float* v;                 // [window][key][head][value channel]
  const float* bias;              // [biases][query][key], taken in turns by [window][head]; or null
  float* out;                     // [window][query][head][value channel]
  int64_t queries, keys, blocks;  // of a window; blocks: of queries
  int32_t windows, heads, channels, value_channels, biases;
  int64_t first, last;  // of [window][head][block of queries], those to be done
  float scale;
  Activation activation;
  float* scratch;  // attention_scratch() floats
};

// For keys in whole vectors.
constexpr int64_t attention_scratch(int64_t keys, int64_t channels, int64_t value_channels) {
  return keys * (channels + value_channels + 2 * kAttentionBlock) + kAttentionBlock;
}

struct AttentionGradientArgs {
  AttentionArgs attention;  // out and activation unused; first and last are of [window][head] unless `input` is 0
  int input;                // whose gradient: 0 q, 1 k, 2 v
  const float* grad_out;
  float* grad_in;
  bool accumulate;
};

// c[m][n] = Σ_k a[m · a_row + k · a_step] · b[k · b_row + n], added to what is there where `accumulate`.
struct MatmulArgs {
  int64_t rows, columns, depth;
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool accumulate;
};

// out = softmax(in), of each row by itself.
struct SoftmaxArgs {
  const float* in;
  float* out;
  int64_t rows, columns;
};

// grad_in = out · (grad_out − Σ out · grad_out), added to what is there where `accumulate`.
struct SoftmaxGradientArgs {
  const float* out;
  const float* grad_out;
  float* grad_in;
  int64_t rows, columns;
  bool accumulate;
};

// ---- types at the public door --------------------------------------------------------------------------------------

enum class Dtype : int { kFloat32, kFloat16, kBfloat16, kUint8, kInt8 };

// out[i] = in[i], or (in[i] − zero_point) · scale of quantised types, rounded after each of the two.
struct WidenArgs {
  const void* in;
  float* out;
  int64_t size;
  Dtype dtype;
  float scale, zero_point;
};

// ---- rMLE -----------------------------------------------------------------------------------------------------------

struct TotalVariationArgs {
  const float* z;  // [height, width, channels]
  float* grad;     // added to
  float* scratch;  // 3 rows of (width + 1) · channels
  int32_t height, width, channels;
  float weight, beta;
};

enum class OptimizerKind : int { kAdam, kAmsgrad, kSgd };

// One optimizer step with PyTorch's formulas, then the clamp to [low, high].
struct OptimizerArgs {
  float* z;
  const float* grad;
  float* first;      // m of Adam, the momentum buffer of SGD
  float* second;     // v of Adam
  float* largest;    // running maximum of v, for AMSGrad
  const float* low;  // bounds for every element, or null
  const float* high;
  int64_t size;
  OptimizerKind kind;
  float beta1, beta2, eps;
  float step_size;   // Adam: lr / (1 − β1^t); SGD: lr
  float root_scale;  // Adam: 1 / sqrt(1 − β2^t)
  float momentum;
  bool first_step;
};

constexpr int kPeakChains = 12;

// ---- the table -----------------------------------------------------------------------------------------------------

struct Kernels {
  const char* isa;
  int width;                                             // floats in a vector
  int max_vectors;                                       // vectors of output channels in a correlate tile
  int dot_pixels[kMaxDotOutputs + 1];                    // tile pixels of the dot form, by number of outputs
  int planar_rows[kMaxPlanarOutputs + 1];                // most rows of a planar tile, likewise
  int planar_winograd_positions[kMaxPlanarOutputs + 1];  // positions in a pass, by number of outputs
  int quadratic_rows;

  void (*correlate)(const CorrelateArgs&);
  void (*correlate_dot)(const CorrelateArgs&);
  // The same on as many images as a vector has lanes: offsets count pixels of that many floats. No addend.
  void (*correlate_abreast)(const CorrelateArgs&);
  void (*correlate_abreast_dot)(const CorrelateArgs&);
  void (*planar)(const PlanarArgs&);
  void (*planar_winograd)(const PlanarWinogradArgs&);
  void (*quadratic)(const QuadraticArgs&);
  void (*product)(const ProductArgs&);
  void (*bfloat16_product)(const Bfloat16ProductArgs&);  // null where the instruction set has none
  void (*amx)(const AmxArgs&);                           // as above
  void (*amx_round)(const AmxRoundArgs&);
  void (*amx_turn)(const AmxTurnArgs&);
  void (*depthwise)(const DepthwiseArgs&);
  // Winograd's input transform of one tile: 36 pixels to 36 positions, position_stride floats apart.
  void (*winograd_input)(const float* const* pixels, int32_t channels, float* out, int64_t position_stride);
  void (*winograd_output)(const WinogradOutputArgs&);
  // The same of the adjoint form, from outputs × outputs pixels, 4×4 or 2×2.
  void (*winograd_adjoint_input)(const float* const* pixels, int32_t outputs, int32_t channels, float* out,
                                 int64_t position_stride);
  void (*winograd_adjoint_output)(const WinogradAdjointArgs&);
  void (*polyphase_input)(const PolyphaseInputArgs&);
  void (*polyphase_output)(const PolyphaseOutputArgs&);
  void (*max_pool)(const PoolArgs&);
  void (*max_pool_gradient)(const PoolGradientArgs&);
  // The same for windows of 2×2 side by side, on [C, H, W].
  void (*max_pool_pairs)(const PoolArgs&);
  void (*max_pool_pairs_gradient)(const PoolGradientArgs&);
  void (*resample)(const ResampleArgs&);
  void (*binary)(const BinaryArgs&);
  void (*binary_gradient)(const BinaryGradientArgs&);
  void (*affine)(const AffineArgs&);
  void (*normalize)(const NormalizeArgs&);
  void (*normalize_gradient)(const NormalizeGradientArgs&);
  void (*attention)(const AttentionArgs&);
  void (*attention_gradient)(const AttentionGradientArgs&);
  void (*matmul)(const MatmulArgs&);
  void (*softmax)(const SoftmaxArgs&);
  void (*softmax_gradient)(const SoftmaxGradientArgs&);
  void (*activate)(const float* in, float* out, int64_t size, Activation);
  // grad[i] *= activation'(x[i]), from x and y = activation(x); x may be y where needs_input() says no.
  void (*activate_gradient)(const float* x, const float* y, float* grad, int64_t size, Activation);
  // A bit for each value y of a ReLU, leaky ReLU or hardtanh: whether its derivative is 1. And grad times the
  // derivative.
  void (*take_gate)(const float* y, int64_t size, Activation, uint8_t* gate);
  void (*pass_gate)(const uint8_t* gate, Activation, float* grad, int64_t size);
  int64_t (*gate_bytes)(int64_t size);  // of whole vectors
  // out[j · out_step + i] = in[i · in_step + j] for i < rows, j < columns.
  void (*transpose)(const float* in, int64_t in_step, float* out, int64_t out_step, int64_t rows, int64_t columns);
  bool (*finite)(const float* in, int64_t size);
  void (*widen)(const WidenArgs&);
  void (*to_bytes)(const float* in, uint8_t* out, int64_t size);
  // Copies that read ahead, for memory that no cache holds.
  void (*bring)(const uint8_t* in, uint8_t* out, int64_t size);
  void (*bring_as_bfloat16)(const float* in, uint16_t* out, int64_t size);
  void (*gather)(const float* in, const int32_t* index, float* out, int64_t size, bool accumulate);
  void (*add)(const float* in, float* out, int64_t size);
  // grad = 2 · (y − v); returns Σ (y − v)².
  double (*residual)(const float* y, const float* v, float* grad, int64_t size);
  // Σ (v − from)².
  double (*squared_distance)(const float* v, float from, int64_t size);
  // Adds weight · ∇TV_β(z) to grad; returns weight · TV_β(z).
  double (*total_variation)(const TotalVariationArgs&);
  void (*optimizer)(const OptimizerArgs&);
  double (*dot)(const float* a, const float* b, int64_t size);
  void (*add_scaled)(float scale, const float* from, float* to, int64_t size);  // to += scale · from
  // rounds × kPeakChains multiply-adds of whole vectors in registers, for the speed's sake; the result means nothing.
  float (*fma_peak)(int64_t rounds, float start);
};

}  // namespace fastinv
