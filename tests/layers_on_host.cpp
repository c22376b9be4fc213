// Runs the kernels of layers in their stand-in on the host, for `test_cuda_sanitized.py`: over odd shapes, with blocks
// and threads in other orders and shared memory that holds other things, which must not change a bit of the results.
// AddressSanitizer looks for reads and writes out of bounds: all memory, shared memory too, ends where it has to.
#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <tuple>

#include "layers.h"
#include "planar.h"
#include "small_tail.h"

using namespace fastinv;

namespace {

int failures = 0;

// Memory of the heap that begins at a multiple of so many bytes, and ends where it is to end.
class Memory {
 public:
  explicit Memory(size_t bytes, size_t alignment = 16)
      : whole_((bytes + alignment - 1) / alignment * alignment),
        used_(bytes),
        start_(static_cast<unsigned char*>(std::aligned_alloc(alignment, whole_))) {
    ASAN_POISON_MEMORY_REGION(start_ + used_, whole_ - used_);
  }
  Memory(const Memory&) = delete;
  ~Memory() {
    ASAN_UNPOISON_MEMORY_REGION(start_, whole_);
    std::free(start_);
  }
  unsigned char* get() const { return start_; }
  size_t size() const { return used_; }

 private:
  size_t whole_, used_;
  unsigned char* start_;
};

unsigned state = 1;
float number() {  // from -1 to 1
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}
void fill_halves(const Memory& memory) {
  for (size_t i = 0; i < memory.size() / 2; ++i) {
    const auto half = static_cast<uint16_t>(pack(Float16{}, number(), 0.0f));
    std::memcpy(memory.get() + 2 * i, &half, 2);
  }
}
// Of each `growing` values those of the next ones are larger, up to a thousand times.
void fill_floats(const Memory& memory, size_t growing = 1) {
  for (size_t i = 0; i < memory.size() / 4; ++i) {
    const float value = growing > 1 ? std::ldexp(number(), static_cast<int>(i / growing % 4) * 3) : number();
    std::memcpy(memory.get() + 4 * i, &value, 4);
  }
}

template <class Params>
void run(const Params& p, int blocks, bool backward) {
  with_kind(p, [&](auto kind) {
    using Kind = decltype(kind);
    using Worker = typename Kind::template Worker<HostThread>;
    for (int block = 0; block < blocks; ++block) {
      const Memory shared(static_cast<size_t>(Worker::shared(p)), 1024);
      std::memset(shared.get(), backward ? 0xff : 0, shared.size());  // NaN, or 0
      HostThreads threads(Kind::kThreads, backward);
      threads.run([&](int index) {
        HostThread self(threads, index);
        Worker(p, self, shared.get()).run(block, blocks);
      });
    }
  });
}

void run(const SmallTail& p, int, bool backward) { small::on_host(p, backward); }
void run(const PlanarLayer& p, int blocks, bool backward) { planar::on_host(p, backward, blocks); }

template <class Params>
void check(Params p, int height, int width, int outputs, size_t bytes, const char* what) {
  const Memory first(bytes), second(bytes);
  std::memset(first.get(), 1, bytes);
  std::memset(second.get(), 2, bytes);
  p.out = reinterpret_cast<decltype(p.out)>(first.get());
  run(p, 2, false);
  p.out = reinterpret_cast<decltype(p.out)>(second.get());
  run(p, 3, true);
  if (std::memcmp(first.get(), second.get(), bytes) != 0) {
    std::printf("%s %dx%d, %d outputs: the order changes the result\n", what, height, width, outputs);
    ++failures;
  }
}

void check_window(int height, int width, int inputs, int phases, int outputs, bool adds) {
  WindowLayer p{};
  p.height = height;
  p.across = window::Across<0>(width);
  p.inputs = inputs;
  p.outputs = outputs;
  p.phases = phases;
  p.images = 3;
  p.float16 = 1;
  p.finish = Finish::kLeakyRelu;
  p.a = 0.1f;
  if (!fits(p)) std::abort();
  const size_t cells = size_t(p.images) * height * width, results = cells * phases * outputs * 2;
  const Memory x(cells * inputs * 2),
      weights(size_t(phases == 4 && inputs == 64 ? 16 : 9) * p.parts() * 64 * inputs * 2), bias(4 * outputs),
      addend(results);
  fill_halves(x);
  fill_halves(weights);
  fill_floats(bias);
  fill_halves(addend);
  p.x = x.get();
  p.weights = weights.get();
  p.bias = reinterpret_cast<const float*>(bias.get());
  p.addend = adds ? addend.get() : nullptr;
  check(p, height, width, outputs, results, "window");
}

void check_halves(int height, int width, int outputs, bool back) {
  HalvedLayer p{};
  p.height = height;
  p.width = width;
  p.x_pitch = 128;
  p.out_pitch = outputs;
  p.outputs = outputs;
  p.images = 5;
  p.unscale = 0.25f;
  p.finish = Finish::kLeakyRelu;
  p.a = 0.1f;
  if (!fits(p)) std::abort();
  const size_t cells = size_t(p.images) * height * width, results = 4 * cells * outputs;
  const Memory x(4 * (cells * p.x_pitch - 64)), weights(size_t(9) * 2 * 64 * 64 * 2), bias(4 * outputs),
      others(results);
  fill_floats(x, size_t(width) * 128);  // row by row
  fill_halves(weights);
  fill_floats(bias);
  fill_floats(others);
  p.x = reinterpret_cast<const float*>(x.get());
  p.weights = weights.get();
  p.bias = reinterpret_cast<const float*>(bias.get());
  p.addend = back ? nullptr : reinterpret_cast<const float*>(others.get());
  p.saved = back ? reinterpret_cast<const float*>(others.get()) : nullptr;
  check(p, height, width, outputs, results, "halves");
}

void check_tail(int height, int width, int inputs, int outputs, Result result, bool channels_last) {
  Tail p{};
  p.height = height;
  p.width = width;
  p.inputs = inputs;
  p.outputs = outputs;
  p.images = 3;
  p.float16 = 1;
  p.channels_last = channels_last;
  p.finish = Finish::kSigmoid;
  p.result = result;
  if (!fits(p)) std::abort();
  const size_t cells = size_t(p.images) * height * width;
  const size_t size = result == Result::kFloat32 ? 4 : result == Result::kUint8 ? 1 : 2;
  const Memory x(cells * inputs * 2), first(size_t(inputs == 128 ? 9 : 16) * 64 * inputs * 2), last(4 * 48 * 64 * 2),
      bias(4 * 64), last_bias(4 * outputs), flag(4);
  fill_halves(x);
  fill_halves(first);
  fill_halves(last);
  fill_floats(bias);
  fill_floats(last_bias);
  p.x = x.get();
  p.first = first.get();
  p.last = last.get();
  p.bias = reinterpret_cast<const float*>(bias.get());
  p.last_bias = reinterpret_cast<const float*>(last_bias.get());
  p.flag = channels_last ? nullptr : reinterpret_cast<int32_t*>(flag.get());
  p.out_n = 4 * height * width * outputs;
  p.out_c = 4 * height * width;
  p.out_y = 2 * width;
  p.out_x = 1;
  check(p, height, width, outputs, cells * 4 * outputs * size, "tail");
}

void check_small_tail(int images, Result given, Result result, bool channels_last) {
  SmallTail p{};
  p.images = images;
  p.channels_last = channels_last;
  p.given = given;
  p.result = result;
  p.finish = Finish::kSigmoid;
  const size_t values = size_t(images) * small::kPixels, pixels = size_t(images) * small::kOut * small::kOut;
  const Memory x(values * (given == Result::kFloat32 ? 4 : 2)), weights(4 * small::kWeights), flag(4);
  given == Result::kFloat32 ? fill_floats(x) : fill_halves(x);
  fill_floats(weights);
  p.x = x.get();
  p.weights = reinterpret_cast<const float*>(weights.get());
  p.flag = reinterpret_cast<int32_t*>(flag.get());
  check(p, small::kOut, small::kOut, 1, pixels * (result == Result::kFloat32 ? 4 : 1), "small tail");
}

void check_planar(int height, int width, int outputs, Result result) {
  PlanarLayer p{};
  p.images = 4;
  p.height = height;
  p.width = width;
  p.outputs = outputs;
  p.float16 = 1;
  p.room = kMostShared;
  p.result = result;
  p.finish = Finish::kSigmoid;
  p.out_n = height * width * outputs;
  p.out_c = height * width;
  p.out_y = width;
  p.out_x = 1;
  if (!fits(p)) std::abort();
  const size_t pixels = size_t(p.images) * height * width;
  const Memory x(pixels * planar::kInputs * 2, 8), weights(4 * planar::kWeightFloats), bias(4 * outputs), flag(4);
  fill_halves(x);
  fill_halves(weights);
  fill_floats(bias);
  p.x = x.get();
  p.weights = reinterpret_cast<const LeftFactor*>(weights.get());
  p.bias = reinterpret_cast<const float*>(bias.get());
  p.flag = reinterpret_cast<int32_t*>(flag.get());
  check(p, height, width, outputs, pixels * outputs * (result == Result::kFloat32 ? 4 : 1), "planar");
}

// Around multiples of d, from d itself to the largest.
void check_divisor(int d) {
  const window::Divisor divisor(d);
  for (int64_t multiple = d; multiple <= INT32_MAX; multiple *= 2) {
    for (const int64_t n : {multiple - 1, multiple, INT32_MAX - INT32_MAX % multiple - 1, int64_t{INT32_MAX}}) {
      if (divisor.of(static_cast<int>(n)) == n / d) continue;
      std::printf("%d / %d is wrong\n", static_cast<int>(n), d);
      ++failures;
    }
  }
}

}  // namespace

int main() {
  for (int d = 1; d <= 520; ++d) check_divisor(d);
  for (const auto& [height, width] : {std::pair{4, 16}, {8, 16}, {6, 32}, {1, 64}, {3, 64}}) {
    check_tail(height, width, 64, 3, Result::kFloat32, true);
    check_tail(height, width, 64, 4, Result::kUint8, true);
  }
  for (const auto& [height, width] : {std::pair{8, 16}, {3, 64}, {8, 8}, {5, 10}, {5, 20}, {3, 56}, {2, 112}}) {
    check_window(height, width, 64, 1, 64, true);
    check_window(height, width, 64, 4, 40, true);
    if (width < 56) check_window(height, width, 128, 1, 8, false);
    if (width < 56) check_window(height, width, 128, 4, 72, true);
  }
  for (const auto& [height, width] : {std::pair{8, 8}, {11, 8}, {5, 16}, {1, 32}, {3, 32}, {2, 64}}) {
    check_halves(height, width, 64, false);
    check_halves(height, width, 48, true);
  }
  check_tail(16, 16, 128, 3, Result::kFloat32, false);
  check_tail(16, 16, 128, 1, Result::kFloat16, true);
  for (const auto& [height, width] : {std::pair{1, 4}, {3, 4}, {6, 6}, {17, 20}, {32, 32}}) {
    check_planar(height, width, 3, Result::kFloat32);
    check_planar(height, width, 1, Result::kUint8);
  }
  check_small_tail(9, Result::kFloat32, Result::kUint8, false);
  check_small_tail(16, Result::kFloat16, Result::kFloat32, true);
  return failures == 0 ? 0 : 1;
}
