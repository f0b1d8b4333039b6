// The best items of a catalogue, exactly.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace seqray {

// Weights (V, D) of the items in float32, and what pack_items made of them.
struct Catalogue {
  at::Tensor weights, codes, step, bounds;
};

// item_index (B, K) and score of the best items of each query (B, D), 0 and -inf where fewer are allowed. `k` (B);
// `excluded` (P): those of each query end at `ends` (B); `allowed`: a mask (V) for each query, or empty.
std::tuple<at::Tensor, at::Tensor> top_items(
    const Catalogue& catalogue, const at::Tensor& hidden, const at::Tensor& k, const at::Tensor& excluded,
    const at::Tensor& ends, const std::vector<at::Tensor>& allowed);

}  // namespace seqray
