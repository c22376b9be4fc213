// Which layout takes a form: MNIST's and CIFAR-10's shallow edges.
#pragma once

#include "banded_images.h"
#include "banded_rows.h"

namespace fastinv {

// visit(edge), and whether there is a kernel for this form.
template <class F>
bool with_edge(const Descent& d, const BandedForm& form, F&& visit) {
  // Adam alone, so that no value branches; for AMSGrad's moment, and the total variation of another power, there is no
  // room either.
  if (d.width > band::kMostWidth || d.tv_weight != 0.0f || d.optimizer != Optimizer::kAdam) return false;
  const auto take = [&](auto layout) {
    using Layout = decltype(layout);
    const Banded<Layout> edge(form);
    if (!Layout::takes(d, form) || !has_room(d, edge)) return false;
    visit(edge);
    return true;
  };
  return take(BandedImages<9>{}) || take(BandedRows<3, 5>{});
}

}  // namespace fastinv
