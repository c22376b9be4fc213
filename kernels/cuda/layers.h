// The kernels whose weights stay in shared memory while persistent blocks take image after image: what each is compiled
// for. A kind has a `Worker`, for the threads of a block that multiply on Hopper's tensor cores.
#pragma once

#include "tail.h"
#include "wide_tail.h"
#include "window_halves.h"
#include "window_layer.h"

namespace fastinv {

template <class Type, bool kChannelsLast>
struct NarrowTail {
  template <class Thread>
  using Worker = tail::Worker<Type, kChannelsLast, Thread>;
  static constexpr int kThreads = tail::kThreads;
};

template <class Type, int kStrips>
struct WideTail {
  template <class Thread>
  using Worker = tail::WideWorker<Type, kStrips, Thread>;
  static constexpr int kThreads = tail::kThreads;
};

template <class Type, int kInputs, class Taps, int kTeams>
struct Windowed {
  template <class Thread>
  using Worker = window::LayerWorker<Type, kInputs, Taps, kTeams, Thread>;
  static constexpr int kThreads = kTeams * kTeam;
};

template <int kWidth>
struct Halves {
  template <class Thread>
  using Worker = window::HalvedWorker<kWidth, Thread>;
  static constexpr int kThreads = Worker<int>::kThreads;
};

// launch(kind) for the kind that is asked for; whether there is one.
template <class Type, class F>
bool with_type(const Tail& p, F&& launch) {
  const auto strips = p.width / tail::kStrip;
  if (p.inputs == tail::kInputs) {
    if (p.height != tail::kStrip || p.width != tail::kStrip) return false;
    p.channels_last ? launch(NarrowTail<Type, true>{}) : launch(NarrowTail<Type, false>{});
    return true;
  }
  if (p.inputs != 64 || !p.channels_last || p.height <= 0 || p.width % tail::kStrip != 0) return false;
  if (strips == 1 && p.height % 4 == 0) return launch(WideTail<Type, 1>{}), true;
  if (strips == 2 && p.height % 2 == 0) return launch(WideTail<Type, 2>{}), true;
  if (strips == 4) return launch(WideTail<Type, 4>{}), true;
  return false;
}

// One with more warpgroups, or where memory does not suffice with fewer.
template <class More, class Fewer, class F>
bool with_teams(const WindowLayer& p, F&& launch) {
  if (More::template Worker<int>::shared(p) <= kMostShared) return launch(More{}), true;
  if (Fewer::template Worker<int>::shared(p) <= kMostShared) return launch(Fewer{}), true;
  return false;
}
template <class Type, class F>
bool with_type(const WindowLayer& p, F&& launch) {
  const int cells = p.height * p.across.cells(), bands = (cells + window::kBand - 1) / window::kBand;
  // A band that is half empty takes as long as a full one.
  if (cells <= 0 || 4 * cells < 3 * window::kBand * bands) return false;
  if (p.outputs <= 0 || p.parts() > window::kMostParts || p.outputs % 8 != 0) return false;
  if (p.inputs == 64 && p.phases == 1) {
    return with_teams<Windowed<Type, 64, Around, 4>, Windowed<Type, 64, Around, 2>>(p, launch);
  }
  if (p.inputs == 128 && p.phases == 1) {
    return with_teams<Windowed<Type, 128, Around, 3>, Windowed<Type, 128, Around, 2>>(p, launch);
  }
  if (p.inputs == 64 && p.phases == 4) {
    return with_teams<Windowed<Type, 64, AroundTwo, 2>, Windowed<Type, 64, AroundTwo, 1>>(p, launch);
  }
  if (p.inputs == 128 && p.phases == 4) {
    return with_teams<Windowed<Type, 128, OnwardTwo, 2>, Windowed<Type, 128, OnwardTwo, 1>>(p, launch);
  }
  return false;
}
template <class Params, class F>
bool with_kind(const Params& p, F&& launch) {
  return p.float16 ? with_type<Float16>(p, launch) : with_type<Bfloat16>(p, launch);
}
template <class F>
bool with_kind(const HalvedLayer& p, F&& launch) {
  if (p.height <= 0 || p.outputs <= 0 || p.outputs > window::kOutputs || p.outputs % 8 != 0) return false;
  if (p.width == 8) return launch(Halves<8>{}), true;
  if (p.width == 16) return launch(Halves<16>{}), true;
  if (p.width == 32) return launch(Halves<32>{}), true;
  if (p.width == 64) return launch(Halves<64>{}), true;
  return false;
}

// Blocks for each image: of a layer whose weights a block has not room for, several.
template <class Params>
int parts(const Params&) {
  return 1;
}
inline int parts(const WindowLayer& p) { return p.parts(); }

// Whether there is a kernel for these shapes.
template <class Params>
bool fits(const Params& p) {
  return with_kind(p, [](auto) {});
}

}  // namespace fastinv
