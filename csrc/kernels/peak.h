// What the machine can do at best: multiply-adds in registers, with no memory behind them.
#pragma once

// rounds × kPeakChains multiply-adds of whole vectors. A chain waits for itself, not for the others, and there are
// enough of them to hide the latency; the sum of their ends keeps them alive.
float fma_peak(int64_t rounds, float start) {
  const V factor = set1(0.999f), step = set1(0.001f);  // every chain tends to 1: no overflow, no denormal numbers
  V chain[kPeakChains];
  for (int i = 0; i < kPeakChains; ++i) chain[i] = set1(start + static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < kPeakChains; ++i) chain[i] = fma(chain[i], factor, step);
  }
  V total = zero();
  for (int i = 0; i < kPeakChains; ++i) total = add(total, chain[i]);
  return sum(total);
}
