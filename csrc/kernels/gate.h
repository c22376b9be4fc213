// Derivatives that are 1 or one other number, as bits: what the way back needs of such an activation.
#pragma once

int64_t gate_bytes(int64_t size) { return (size + kWidth - 1) / kWidth * kMaskBytes; }

FASTINV_INLINE Mask gate_of(V y, Activation act) {
  // Strictly inside, as in PyTorch. A leaky ReLU of a positive slope keeps the sign.
  if (act.kind == ActivationKind::kHardtanh) return both(less(set1(act.a), y), less(y, set1(act.b)));
  return less(zero(), y);
}

void take_gate(const float* y, int64_t size, Activation act, uint8_t* gate) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth, gate += kMaskBytes) store_mask(gate, gate_of(load(y + i), act));
  if (i < size) store_mask(gate, gate_of(load_first(y + i, static_cast<int>(size - i)), act));
}

void pass_gate(const uint8_t* gate, Activation act, float* grad, int64_t size) {
  const V other = set1(act.kind == ActivationKind::kLeakyRelu ? act.a : 0.0f);
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth, gate += kMaskBytes) {
    const V g = load(grad + i);
    store(grad + i, select(load_mask(gate), g, mul(g, other)));
  }
  if (i < size) {
    const int n = static_cast<int>(size - i);
    const V g = load_first(grad + i, n);
    store_first(grad + i, select(load_mask(gate), g, mul(g, other)), n);
  }
}
