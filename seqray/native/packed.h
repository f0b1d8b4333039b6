// Packed sequences as attention goes through them: runs of whole sequences, and blocks of queries in them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "simd.h"

namespace seqray {

constexpr int64_t QUERIES = 32, EVENTS = 128;

struct Sizes {
  int64_t T, H, d;
  int64_t D() const { return H * d; }
  int64_t row() const { return 3 * D(); }
};

// Where each event's sequence begins and ends, and runs of whole sequences that a thread does in one go.
struct Sequences {
  explicit Sequences(const at::Tensor& lengths) {
    TORCH_CHECK(lengths.is_contiguous());
    const int64_t* length = lengths.const_data_ptr<int64_t>();
    runs.push_back(0);
    for (int64_t b = 0, at = 0; b < lengths.numel(); at += length[b++]) {
      begin.insert(begin.end(), length[b], at);
      end.insert(end.end(), length[b], at + length[b]);
      if (at > runs.back() && at + length[b] - runs.back() > EVENTS) runs.push_back(at);
    }
    runs.push_back(static_cast<int64_t>(begin.size()));
  }

  std::vector<int64_t> begin, end, runs;
};

// A block of queries first to stop of a head, and the keys it meets.
struct Block {
  Block(const Sequences& of, int64_t first, int64_t stop)
      : sequences(of), first(first), count(stop - first), key(of.begin[first]), keys(stop - key) {}

  // Which of 16 queries, from the block's `lane` on, see the key.
  __mmask16 see(int64_t other, int64_t lane) const {
    const int64_t query = first + lane;
    return first_lanes(sequences.end[other] - query) & ~first_lanes(other - query);
  }

  const Sequences& sequences;
  int64_t first, count, key, keys;
};

}  // namespace seqray
