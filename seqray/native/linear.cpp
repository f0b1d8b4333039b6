// A linear layer in bf16 with what stands before and after it: y = [residual + dropout] (W prepare(x) + b), where
// prepare is nothing, a layer norm or GELU. A block of rows goes through all of it in the cache.
//
// Slopes over the weights are added up over PARTs of rows, and these in their order, so that the results do not
// depend on the number of threads. Shapes: T rows, I inputs, O outputs.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "bf16.h"
#include "simd.h"

namespace seqray {
namespace {

constexpr int64_t ROWS = 64, PART = 12 * ROWS;

enum class Prepare : int64_t { nothing, norm, gelu };

// Scale, shift and epsilon of a layer norm.
struct Norm {
  const float *scale, *shift;
  float epsilon;
};

// A row of a layer norm: (x - mean) * rate. Sums are taken from the row's first number on, so that one pass is exact.
struct Moments {
  Moments() = default;
  template <typename X>
  Moments(const X* x, int64_t count, float epsilon) {
    const __m512 origin = _mm512_set1_ps(static_cast<float>(x[0]));
    __m512 sums = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    columns(count, [&](int64_t i, __mmask16 some) {
      const __m512 off = _mm512_maskz_sub_ps(some, load(x + i, some), origin);
      sums = _mm512_add_ps(sums, off);
      squares = _mm512_fmadd_ps(off, off, squares);
    });
    const float share = 1.0f / count, off = _mm512_reduce_add_ps(sums) * share;
    mean = static_cast<float>(x[0]) + off;
    rate = 1 / std::sqrt(std::max(_mm512_reduce_add_ps(squares) * share - off * off, 0.0f) + epsilon);
  }

  __m512 of(__m512 x) const { return _mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(mean)), _mm512_set1_ps(rate)); }

  float mean, rate;
};

// What a layer is, beside its input.
struct Layer {
  int64_t T, I, O;
  Prepare prepare;
  Norm norm;
  const float *weight, *bias;  // (O, I), (O) or null
  Dropout dropout;

  int64_t inner() const { return rounded(I, 32); }
  int64_t outer() const { return rounded(O, 32); }
};

// A prepared row; of a norm its moments, and of GELU its slope where one is wanted.
template <typename X>
void prepare_row(const Layer& of, const X* x, float* into, Moments& moments, float* slope) {
  if (of.prepare == Prepare::nothing) {
    columns(of.I, [&](int64_t i, __mmask16 some) { store(into + i, some, load(x + i, some)); });
  } else if (of.prepare == Prepare::norm) {
    moments = Moments(x, of.I, of.norm.epsilon);
    columns(of.I, [&](int64_t i, __mmask16 some) {
      const __m512 scale = load(of.norm.scale + i, some), shift = load(of.norm.shift + i, some);
      store(into + i, some, _mm512_fmadd_ps(moments.of(load(x + i, some)), scale, shift));
    });
  } else {
    columns(of.I, [&](int64_t i, __mmask16 some) {
      const __m512 value = load(x + i, some);
      const Normal normal(value);
      store(into + i, some, _mm512_mul_ps(value, normal.share));
      if (!slope) return;
      const __m512 bell = _mm512_mul_ps(normal.bell, _mm512_set1_ps(0.3989422804f));
      store(slope + i, some, _mm512_fmadd_ps(value, bell, normal.share));
    });
  }
}

// Dropout of a row: what stays, scaled up.
__m512 drop(const Dropout& dropout, __m512 value, int64_t column, __m512i place) {
  const __mmask16 kept = dropout.kept(dropout.lanes(column), place);
  return _mm512_maskz_mul_ps(kept, value, _mm512_set1_ps(dropout.factor));
}

template <typename X, typename Y>
void forward_block(
    const Layer& of, int64_t first, int64_t count, const X* x, const bf16* weight, const float* residual, Y* y) {
  static thread_local Scratch<float> prepared_memory, product_memory;
  static thread_local Scratch<bf16> narrow_memory;
  float *prepared = prepared_memory.of(ROWS * of.I), *made = product_memory.of(ROWS * of.outer());
  bf16* narrow = narrow_memory.of(ROWS * of.inner());
  Moments moments;
  for (int64_t r = 0; r < count; r++) prepare_row(of, x + (first + r) * of.I, prepared + r * of.I, moments, nullptr);
  narrow_rows(prepared, of.I, count, of.I, narrow, ROWS, of.inner());
  product(ROWS, of.outer(), of.inner(), narrow, of.inner(), weight, of.outer(), made, of.outer(), false);
  for (int64_t r = 0; r < count; r++) {
    const __m512i place = of.dropout.place(first + r, 0);
    const int64_t row = (first + r) * of.O;
    columns(of.O, [&](int64_t i, __mmask16 some) {
      __m512 value = load(made + r * of.outer() + i, some);
      if (of.bias) value = _mm512_add_ps(value, load(of.bias + i, some));
      if (of.dropout.on) value = drop(of.dropout, value, i, place);
      if (residual) value = _mm512_add_ps(value, load(residual + row + i, some));
      store(y + row + i, some, value);
    });
  }
}

// Slopes over the parameters, of a part of the rows: (O, I), or (I, O) where O is larger; (O); (I); (I).
struct Slopes {
  Slopes(const Layer& of, float* at) : weight(at), bias(at + of.O * of.I), scale(bias + of.O), shift(scale + of.I) {}
  static int64_t size(const Layer& of) { return of.O * of.I + of.O + 2 * of.I; }

  float *weight, *bias, *scale, *shift;
};

// `slope`, over an output row of a layer norm, becomes the slope over its input.
template <typename X>
void norm_backward(const Layer& of, const X* x, const Moments& moments, float* slope, const Slopes& slopes) {
  __m512 sum = _mm512_setzero_ps(), along = _mm512_setzero_ps();
  columns(of.I, [&](int64_t i, __mmask16 some) {
    const __m512 normed = moments.of(load(x + i, some)), of_normed = load(slope + i, some);
    store(slopes.scale + i, some, _mm512_fmadd_ps(of_normed, normed, load(slopes.scale + i, some)));
    store(slopes.shift + i, some, _mm512_add_ps(of_normed, load(slopes.shift + i, some)));
    const __m512 scaled = _mm512_mul_ps(of_normed, load(of.norm.scale + i, some));
    sum = _mm512_add_ps(sum, scaled);
    along = _mm512_fmadd_ps(scaled, normed, along);
    store(slope + i, some, scaled);
  });
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / of.I);
  const __m512 share = _mm512_set1_ps(_mm512_reduce_add_ps(along) / of.I);
  columns(of.I, [&](int64_t i, __mmask16 some) {
    const __m512 off = _mm512_sub_ps(load(slope + i, some), mean);
    const __m512 rest = _mm512_fnmadd_ps(moments.of(load(x + i, some)), share, off);
    store(slope + i, some, _mm512_mul_ps(rest, _mm512_set1_ps(moments.rate)));
  });
}

template <typename X, typename Y>
void backward_block(
    const Layer& of, int64_t first, int64_t count, const X* x, const Y* slope_y, const bf16* weight, X* slope_x,
    const Slopes& slopes) {
  static thread_local Scratch<float> prepared_memory, gelu_memory, slope_memory, product_memory;
  static thread_local Scratch<bf16> narrow_memory, pair_memory, column_memory;
  const int64_t I = of.I, O = of.O, inner = of.inner(), outer = of.outer();
  float *prepared = prepared_memory.of(ROWS * I), *gelu = gelu_memory.of(ROWS * I);
  float *slope = slope_memory.of(ROWS * O), *made = product_memory.of(ROWS * inner);
  bf16 *narrow = narrow_memory.of(ROWS * outer), *pairs = pair_memory.of(ROWS * std::max(inner, outer));
  bf16* turned = column_memory.of(ROWS * std::min(I, O));
  Moments moments[ROWS];
  for (int64_t r = 0; r < count; r++) {
    prepare_row(of, x + (first + r) * I, prepared + r * I, moments[r], gelu + r * I);
    const __m512i place = of.dropout.place(first + r, 0);
    columns(O, [&](int64_t i, __mmask16 some) {
      __m512 value = load(slope_y + (first + r) * O + i, some);
      if (of.dropout.on) value = drop(of.dropout, value, i, place);
      store(slope + r * O + i, some, value);
      store(slopes.bias + i, some, _mm512_add_ps(load(slopes.bias + i, some), value));
    });
  }
  const bool tall = O > I;  // then the slopes over the weights are made as (I, O)
  turn(tall ? prepared : slope, tall ? I : O, count, tall ? I : O, turned, ROWS, ROWS);
  pair_rows(tall ? slope : prepared, tall ? O : I, count, tall ? O : I, pairs, ROWS, tall ? outer : inner);
  product(
      tall ? I : O, tall ? O : I, ROWS, turned, ROWS, pairs, tall ? outer : inner, slopes.weight, tall ? O : I, true);
  narrow_rows(slope, O, count, O, narrow, ROWS, outer);
  product(ROWS, inner, outer, narrow, outer, weight, inner, made, inner, false);
  for (int64_t r = 0; r < count; r++) {
    float* row = made + r * inner;
    if (of.prepare == Prepare::norm) norm_backward(of, x + (first + r) * I, moments[r], row, slopes);
    columns(I, [&](int64_t i, __mmask16 some) {
      __m512 value = load(row + i, some);
      if (of.prepare == Prepare::gelu) value = _mm512_mul_ps(value, load(gelu + r * I + i, some));
      store(slope_x + (first + r) * I + i, some, value);
    });
  }
}

template <typename X, typename Y>
void forward(const Layer& of, const X* x, const float* residual, Y* y) {
  const at::Tensor memory = at::empty(of.inner() * of.outer(), at::kBFloat16);
  bf16* weight = memory.mutable_data_ptr<bf16>();
  pair_columns(of.weight, of.I, of.O, of.I, weight, of.outer(), of.inner());
  share<bf16>((of.T + ROWS - 1) / ROWS, [&](int64_t b) {
    forward_block(of, b * ROWS, std::min(ROWS, of.T - b * ROWS), x, weight, residual, y);
  });
}

// Fills slope_x; gives the slopes over the parameters, one after the other as `Slopes` says.
template <typename X, typename Y>
at::Tensor backward(const Layer& of, const X* x, const Y* slope_y, X* slope_x) {
  const at::Tensor memory = at::empty(of.inner() * of.outer(), at::kBFloat16);
  bf16* weight = memory.mutable_data_ptr<bf16>();
  pair_rows(of.weight, of.I, of.O, of.I, weight, of.outer(), of.inner());
  const int64_t parts = std::max<int64_t>(1, (of.T + PART - 1) / PART), size = Slopes::size(of);
  at::Tensor slopes = at::zeros({parts, size}, at::kFloat);
  float* into = slopes.mutable_data_ptr<float>();
  share<bf16>(parts, [&](int64_t p) {
    const int64_t stop = std::min((p + 1) * PART, of.T);
    for (int64_t t = p * PART; t < stop; t += ROWS) {
      backward_block(of, t, std::min(ROWS, stop - t), x, slope_y, weight, slope_x, Slopes(of, into + p * size));
    }
  });
  at::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t p = 1; p < parts; p++) {
      for (int64_t i = begin; i < end; i++) into[i] += into[p * size + i];
    }
  });
  return slopes.select(0, 0);
}

using Optional = std::optional<at::Tensor>;

const float* floats(const Optional& tensor) {
  if (!tensor) return nullptr;
  TORCH_CHECK(tensor->is_contiguous());
  return tensor->const_data_ptr<float>();
}

Layer layer(
    const at::Tensor& x, const at::Tensor& weight, const Optional& bias, int64_t prepare, const Optional& scale,
    const Optional& shift, double epsilon, double rate, int64_t seed) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && weight.dim() == 2 && weight.size(1) == x.size(1));
  TORCH_CHECK(!bias || bias->numel() == weight.size(0));
  const bool given = scale && shift && scale->numel() == x.size(1) && shift->numel() == x.size(1);
  TORCH_CHECK(given || prepare != static_cast<int64_t>(Prepare::norm));
  return {
      x.size(0), x.size(1), weight.size(0), static_cast<Prepare>(prepare),
      {floats(scale), floats(shift), static_cast<float>(epsilon)}, floats(weight), floats(bias), Dropout(rate, seed)};
}

// (T, O): in the residual's float32 where there is one, else in bf16.
at::Tensor linear(
    const at::Tensor& x, const at::Tensor& weight, const Optional& bias, int64_t prepare, const Optional& scale,
    const Optional& shift, double epsilon, const Optional& residual, double rate, int64_t seed) {
  const Layer of = layer(x, weight, bias, prepare, scale, shift, epsilon, rate, seed);
  TORCH_CHECK(!residual || residual->numel() == of.T * of.O);
  at::Tensor y = at::empty({of.T, of.O}, x.options().dtype(residual ? at::kFloat : at::kBFloat16));
  typed(x, [&](auto* from) { typed(y, [&](auto* into) { forward(of, from, floats(residual), into); }); });
  return y;
}

// (slope over x, those over weight, bias, scale, shift).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& slope, const at::Tensor& x, const at::Tensor& weight, int64_t prepare, const Optional& scale,
    const Optional& shift, double epsilon, double rate, int64_t seed) {
  const Layer of = layer(x, weight, {}, prepare, scale, shift, epsilon, rate, seed);
  TORCH_CHECK(slope.numel() == of.T * of.O);
  const at::Tensor slope_x = at::empty(x.sizes(), x.options());
  at::Tensor found;
  typed(x, [&](auto* from) {
    typed(slope, [&](auto* of_y) {
      found = backward(of, from, of_y, static_cast<decltype(from)>(slope_x.data_ptr()));
    });
  });
  const auto parts = found.split_with_sizes({of.O * of.I, of.O, of.I, of.I});
  const bool tall = of.O > of.I;
  const at::Tensor of_weight = tall ? parts[0].view({of.I, of.O}).t().contiguous() : parts[0].view({of.O, of.I});
  return {slope_x, of_weight, parts[1], parts[2], parts[3]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqray, library) {
  library.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, int prepare, Tensor? scale, Tensor? shift, float epsilon, "
      "Tensor? residual, float rate, int seed) -> Tensor");
  library.def(
      "linear_backward(Tensor slope, Tensor x, Tensor weight, int prepare, Tensor? scale, Tensor? shift, "
      "float epsilon, float rate, int seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(seqray, CPU, library) {
  library.impl("linear", &linear);
  library.impl("linear_backward", &linear_backward);
}

}  // namespace seqray
