// Copies to memory that another device reads next. They go past the caches where the processor has such stores: others
// would read what they overwrite first, and memory carries half as much again.
#pragma once

#include <cstdint>

namespace fastinv {

void stage(const void* from, void* to, int64_t bytes, int threads);

// Rounded to the nearest bfloat16, of two the even one; NaN becomes 0x7fc0.
void stage_bfloat16(const float* from, uint16_t* to, int64_t count, int threads);

}  // namespace fastinv
