// A catalogue in codes, tile by tile, as top_items meets it.
//
// What all items have in common moves all scores of a query alike, so that it is taken out before the rounding.
// Shapes: D hidden (K: padded for products), V items + padding.

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "codes.h"

namespace seqray {
namespace {

// The mean of the rows (D).
std::vector<float> mean_row(const float* rows, int64_t V, int64_t D) {
  std::vector<double> sums(D);
  for (int64_t v = 1; v < V; v++) {
    for (int64_t i = 0; i < D; i++) sums[i] += rows[v * D + i];
  }
  std::vector<float> mean(D);
  for (int64_t i = 0; i < D; i++) mean[i] = static_cast<float>(sums[i] / std::max<int64_t>(V - 1, 1));
  return mean;
}

// The catalogue's weights (V, D): `codes` and `step` of Items, and its `size`, `error`, `norm` and `part`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> pack_items(const at::Tensor& weights) {
  TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == at::kFloat);
  const int64_t V = weights.size(0), D = weights.size(1), K = rounded(D, 4), tiles = (V + ITEMS - 1) / ITEMS;
  const float* from = weights.const_data_ptr<float>();
  at::Tensor codes = at::zeros(tiles * ITEMS * K, at::kByte), steps = at::zeros(tiles * ITEMS, at::kFloat);
  at::Tensor bounds = at::zeros(4, at::kFloat);
  uint8_t* into = codes.mutable_data_ptr<uint8_t>();
  float *step = steps.mutable_data_ptr<float>(), *bound = bounds.mutable_data_ptr<float>();
  const std::vector<float> mean = mean_row(from, V, D);
  std::vector<float> row(D);
  std::vector<int8_t> code(D);
  for (int64_t v = 1; v < V; v++) {
    for (int64_t i = 0; i < D; i++) row[i] = from[v * D + i] - mean[i];
    const Rounded found(row.data(), D, finest_step(row.data(), D), code.data());
    uint8_t* tile = into + v / ITEMS * ITEMS * K + v % ITEMS * 4;
    for (int64_t i = 0; i < D; i++) tile[i / 4 * 4 * ITEMS + i % 4] = static_cast<uint8_t>(code[i] + LARGEST);
    step[v] = found.step;
    bound[0] = std::max(bound[0], found.size), bound[1] = std::max(bound[1], found.error);
    bound[2] = std::max(bound[2], norm(from + v * D, D));
    bound[3] = std::max(bound[3], largest_part(code.data(), D));
  }
  return {codes, steps, bounds};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqray, library) {
  library.def("pack_items(Tensor weights) -> (Tensor, Tensor, Tensor)", &pack_items);
}

}  // namespace seqray
