// All kernels for one instruction set. Compiled once per set, with that set's flags; the macros come from CMake:
// FASTINV_ISA (avx512, avx2, portable), FASTINV_VECTOR_HEADER, FASTINV_MAX_VECTORS.
//
// Everything but the one table below has internal linkage and nothing of the standard library is used: an inline
// function compiled under two instruction sets, merged by the linker, would run on machines that lack one of them.
#include "kernels.h"

#include <math.h>
#include <string.h>

#include FASTINV_VECTOR_HEADER

#define FASTINV_STRING_(x) #x
#define FASTINV_STRING(x) FASTINV_STRING_(x)
#define FASTINV_JOIN_(a, b) a##b
#define FASTINV_JOIN(a, b) FASTINV_JOIN_(a, b)

namespace fastinv {
namespace {

static_assert(kMaxVectors == FASTINV_MAX_VECTORS);

#include "kernels/activation.h"
#include "kernels/amx.h"
#include "kernels/attention.h"
#include "kernels/bfloat16.h"
#include "kernels/convert.h"
#include "kernels/correlate.h"
#include "kernels/depthwise.h"
#include "kernels/elementwise.h"
#include "kernels/gate.h"
#include "kernels/lanes.h"
#include "kernels/normalize.h"
#include "kernels/peak.h"
#include "kernels/planar.h"
#include "kernels/planar_winograd.h"
#include "kernels/polyphase.h"
#include "kernels/pool.h"
#include "kernels/product.h"
#include "kernels/quadratic.h"
#include "kernels/rmle.h"
#include "kernels/softmax.h"
#include "kernels/transpose.h"
#include "kernels/winograd.h"

}  // namespace

extern const Kernels FASTINV_JOIN(kernels_, FASTINV_ISA);
const Kernels FASTINV_JOIN(kernels_, FASTINV_ISA) = {
    FASTINV_STRING(FASTINV_ISA),
    kWidth,
    kMaxVectors,
    {kDotPixels[0], kDotPixels[1], kDotPixels[2], kDotPixels[3], kDotPixels[4]},
    {kPlanarRows[0], kPlanarRows[1], kPlanarRows[2], kPlanarRows[3], kPlanarRows[4]},
    {kPlanarWinogradPositions[0], kPlanarWinogradPositions[1], kPlanarWinogradPositions[2], kPlanarWinogradPositions[3],
     kPlanarWinogradPositions[4]},
    kQuadraticRows,
    correlate,
    correlate_dot,
    correlate_abreast,
    correlate_abreast_dot,
    planar,
    planar_winograd,
    quadratic,
    product,
    bfloat16_product,
    amx,
    amx_round,
    amx_turn,
    depthwise,
    winograd_input,
    winograd_output,
    winograd_adjoint_input,
    winograd_adjoint_output,
    polyphase_input,
    polyphase_output,
    max_pool,
    max_pool_gradient,
    max_pool_pairs,
    max_pool_pairs_gradient,
    resample,
    binary,
    binary_gradient,
    affine,
    normalize,
    normalize_gradient,
    attention,
    attention_gradient,
    matmul,
    softmax,
    softmax_gradient,
    activate,
    activate_gradient,
    take_gate,
    pass_gate,
    gate_bytes,
    transpose,
    finite,
    widen,
    to_bytes,
    bring,
    bring_as_bfloat16,
    gather,
    add,
    residual,
    squared_distance,
    total_variation,
    optimizer,
    dot,
    add_scaled,
    fma_peak,
};

}  // namespace fastinv
