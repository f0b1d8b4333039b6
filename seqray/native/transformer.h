// A causal transformer in float32 as a kernel runs it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace seqray {

struct Transformer {
  at::Tensor table;  // (V, D): the items' vectors, to be multiplied by scale
  double scale;
  at::Tensor positions;  // (longest history, D)
  bool from_newest;      // where positions count from
  // For each block: scale and shift of a norm, weight (inputs, outputs) and bias of qkv and out, of the second norm, of
  // expand and contract; then the last norm.
  std::vector<at::Tensor> weights;
  int64_t heads;
  double epsilon;
  bool normalize;  // hidden states, before they are divided by the temperature
  double temperature;
};

// Hidden states (B, D) after the newest event of each history: `items` (T), `lengths` (B), and what is added to the
// vectors of the events (T, D), if anything.
at::Tensor run(
    const Transformer& transformer, const at::Tensor& items, const at::Tensor& lengths,
    const std::optional<at::Tensor>& added);

}  // namespace seqray
