// The kernels whose weights stay in shared memory while persistent blocks take image after image: what each is compiled
// for. A kind has a `Worker`, for the threads of a block that multiply on Hopper's tensor cores.
#pragma once

#include "tail.h"
#include "wide_tail.h"
#include "window_layer.h"

namespace fastinv {

template <class Type, bool kChannelsLast>
struct NarrowTail {
  template <class Thread>
  using Worker = tail::Worker<Type, kChannelsLast, Thread>;
  static constexpr int kTeams = tail::kTeams, kThreads = tail::kThreads;
};

template <class Type, int kStrips>
struct WideTail {
  template <class Thread>
  using Worker = tail::WideWorker<Type, kStrips, Thread>;
  static constexpr int kTeams = tail::kTeams, kThreads = tail::kThreads;
};

template <class Type, int kInputs, int kStrips, int kPhases>
struct Windowed {
  template <class Thread>
  using Worker = window::LayerWorker<Type, kInputs, kStrips, kPhases, Thread>;
  static constexpr int kTeams = Worker<int>::kTeams, kThreads = Worker<int>::kThreads;
};

// launch(kind) for the kind that is asked for: of a type, then of so many strips.
template <class Type, int kStrips, class F>
void with_strips(const Tail&, F&& launch) {
  launch(WideTail<Type, kStrips>{});
}
template <class Type, int kStrips, class F>
void with_strips(const WindowLayer& p, F&& launch) {
  if (p.phases == 4) {
    launch(Windowed<Type, 64, kStrips, 4>{});
  } else if (p.inputs == 64) {
    launch(Windowed<Type, 64, kStrips, 1>{});
  } else if constexpr (kStrips < 4) {  // else there is no room
    launch(Windowed<Type, 128, kStrips, 1>{});
  }
}
template <class Type, class Params, class F>
void with_width(const Params& p, F&& launch) {
  switch (p.width / window::kStrip) {
    case 1: with_strips<Type, 1>(p, launch); break;
    case 2: with_strips<Type, 2>(p, launch); break;
    default: with_strips<Type, 4>(p, launch);
  }
}
template <class Type, class F>
void with_type(const Tail& p, F&& launch) {
  if (p.inputs != tail::kInputs) {
    with_width<Type>(p, launch);
  } else {
    p.channels_last ? launch(NarrowTail<Type, true>{}) : launch(NarrowTail<Type, false>{});
  }
}
template <class Type, class F>
void with_type(const WindowLayer& p, F&& launch) {
  with_width<Type>(p, launch);
}
template <class Params, class F>
void with_kind(const Params& p, F&& launch) {
  p.float16 ? with_type<Float16>(p, launch) : with_type<Bfloat16>(p, launch);
}

// Whether there is a kernel for these shapes. Of a tail they are its own.
inline bool fits(const WindowLayer& p) {
  const int strips = p.width / window::kStrip;
  return p.width % window::kStrip == 0 && (strips == 1 || strips == 2 || strips == 4) && p.height % (4 / strips) == 0 &&
         p.outputs % 8 == 0 && p.outputs <= window::kOutputs &&
         (p.phases == 4 ? p.inputs == 64 : p.phases == 1 && (p.inputs == 64 || (p.inputs == 128 && strips < 4)));
}
inline bool fits(const Tail& p) {
  WindowLayer first{};
  first.height = p.height;
  first.width = p.width;
  first.inputs = p.inputs;
  first.outputs = window::kOutputs;
  first.phases = 4;
  return p.inputs == tail::kInputs ? p.height == 16 && p.width == 16 : p.channels_last && fits(first);
}

}  // namespace fastinv
