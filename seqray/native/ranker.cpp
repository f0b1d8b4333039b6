// Histories in the ids of the shop in, the best items out, in one call: ids become indices, the transformer reads them,
// and the catalogue meets what it says. The interpreter's lock is free from the first to the last.
//
// Shapes: B queries, N ids of all histories, V items + padding, D hidden, K top-k, P pairs (query, excluded item).

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>

#include "top_items.h"
#include "transformer.h"

namespace seqray {
namespace {

// Something in UTF-8 about each item, one after the other, each ending where `ends` says.
class Texts {
 public:
  Texts(const at::Tensor& letters, const at::Tensor& ends) : letters_(letters), ends_(ends) {
    TORCH_CHECK(letters.is_contiguous() && ends.is_contiguous());
  }

  int64_t count() const { return ends_.numel(); }

  std::string_view of(int64_t item) const {
    const int64_t begin = item > 1 ? ends()[item - 2] : 0;
    return {letters() + begin, static_cast<size_t>(ends()[item - 1] - begin)};
  }

  // To wait for memory takes longer than all else here, so it is asked for ahead: first all ends, then all letters.
  void prefetch(const int64_t* items, size_t count) const {
    for (size_t i = 0; i < count; i++) {
      if (items[i] > 0) __builtin_prefetch(ends() + items[i] - 1);
    }
    for (size_t i = 0; i < count; i++) {
      if (items[i] > 1) __builtin_prefetch(letters() + ends()[items[i] - 2]);
    }
  }

 private:
  const int64_t* ends() const { return ends_.const_data_ptr<int64_t>(); }
  const char* letters() const { return reinterpret_cast<const char*>(letters_.const_data_ptr<uint8_t>()); }

  at::Tensor letters_, ends_;
};

// Items by their ids: a table with half a hash and the item_index in a slot, 0: free.
class Ids {
 public:
  Ids(const at::Tensor& letters, const at::Tensor& ends) : texts_(letters, ends) {
    const int64_t V = texts_.count() + 1;
    size_t size = 64;
    while (size < static_cast<size_t>(2 * V)) size *= 2;
    slots_.assign(size, 0);
    for (int64_t item = 1; item < V; item++) {
      const uint64_t hash = hash_of(texts_.of(item));
      size_t place = hash & (size - 1);
      while (slots_[place]) place = (place + 1) & (size - 1);
      slots_[place] = slot(hash, item);
    }
  }

  // The item_index of each id, 0 where there is none.
  void look_up(const std::vector<std::string_view>& ids, int64_t* found) const {
    const size_t count = ids.size(), mask = slots_.size() - 1;
    std::vector<uint64_t> hash(count);
    for (size_t i = 0; i < count; i++) {
      hash[i] = hash_of(ids[i]);
      __builtin_prefetch(&slots_[hash[i] & mask]);
    }
    for (size_t i = 0; i < count; i++) found[i] = next(hash[i], hash[i] & mask).second;
    texts_.prefetch(found, count);
    for (size_t i = 0; i < count; i++) {
      if (found[i] && texts_.of(found[i]) != ids[i]) found[i] = search(hash[i], ids[i]);
    }
  }

 private:
  static uint64_t hash_of(std::string_view id) {  // FNV-1a, with its high bits mixed down
    uint64_t hash = 0xcbf29ce484222325u;
    for (const char letter : id) hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100000001b3u;
    hash = (hash ^ (hash >> 32)) * 0x9e3779b97f4a7c15u;
    return hash ^ (hash >> 29);
  }

  static uint64_t slot(uint64_t hash, int64_t item) {
    return (hash & 0xffffffff00000000u) | static_cast<uint64_t>(item);
  }

  // The next slot from `place` on with half this hash, and its item; item 0 where there is none.
  std::pair<size_t, int64_t> next(uint64_t hash, size_t place) const {
    const size_t mask = slots_.size() - 1;
    for (; slots_[place]; place = (place + 1) & mask) {
      if ((slots_[place] ^ hash) >> 32 == 0) return {place, static_cast<int64_t>(slots_[place] & 0xffffffffu)};
    }
    return {place, 0};
  }

  int64_t search(uint64_t hash, std::string_view wanted) const {
    for (size_t start = hash & (slots_.size() - 1);;) {
      const auto [place, item] = next(hash, start);
      if (!item || texts_.of(item) == wanted) return item;
      start = (place + 1) & (slots_.size() - 1);
    }
  }

  Texts texts_;
  std::vector<uint64_t> slots_;
};

// The parts of a text that NULs part.
std::vector<std::string_view> split(const at::Tensor& text, int64_t count) {
  std::vector<std::string_view> parts;
  parts.reserve(count);
  const char* at = reinterpret_cast<const char*>(text.const_data_ptr<uint8_t>());
  const char* end = at + text.numel();
  for (int64_t i = 0; i < count; i++) {
    const void* nul = at < end ? std::memchr(at, 0, end - at) : nullptr;
    const char* stop = nul ? static_cast<const char*>(nul) : end;
    TORCH_CHECK((stop == end) == (i == count - 1), "another number of ids than told");
    parts.emplace_back(at, stop - at);
    at = stop + 1;
  }
  return parts;
}

at::Tensor tensor_of(const std::vector<int64_t>& values) {
  at::Tensor made = at::empty(static_cast<int64_t>(values.size()), at::kLong);
  std::copy(values.begin(), values.end(), made.mutable_data_ptr<int64_t>());
  return made;
}

void append(std::string& into, const auto& number) {
  char digits[32];
  into.append(digits, std::to_chars(digits, digits + sizeof(digits), number).ptr);
}

// The items of an answer up to the first that may not be returned, as JSON; `names`: their ids as JSON.
void append_items(std::string& into, const Texts& names, const int64_t* items, const float* scores, int64_t count) {
  const float* end = std::find(scores, scores + count, -std::numeric_limits<float>::infinity());
  names.prefetch(items, end - scores);
  into += '[';
  for (int64_t i = 0; i < end - scores; i++) {
    into += i ? ",{\"item_id\":" : "{\"item_id\":";
    into += names.of(items[i]);
    into += ",\"rank\":";
    append(into, i + 1);
    into += ",\"score\":";
    append(into, static_cast<double>(scores[i]));
    into += ",\"source\":\"model\"}";
  }
  into += ']';
}

// What is asked after the histories that hold a known id; `rows`: which these are.
struct Questions {
  // items: item_index of each id, 0 for unknown ones; longest: events that the model reads.
  void add(
      int64_t row, const int64_t* items, int64_t count, int64_t longest, bool hides_seen, const int64_t* given,
      const int64_t* given_end, int64_t wanted, const at::Tensor& mask) {
    std::vector<int64_t> known;
    std::copy_if(items, items + count, std::back_inserter(known), [](int64_t item) { return item > 0; });
    if (known.empty()) return;
    rows.push_back(row), k.push_back(wanted), allowed.push_back(mask);
    lengths.push_back(std::min<int64_t>(known.size(), longest));
    read.insert(read.end(), known.end() - lengths.back(), known.end());
    excluded.insert(excluded.end(), given, given_end);
    if (hides_seen) excluded.insert(excluded.end(), known.begin(), known.end());
    ends.push_back(excluded.size());
  }

  std::vector<int64_t> rows, read, lengths, k, excluded, ends;
  std::vector<at::Tensor> allowed;
};

// The rows of an answer (R, width) at their places in a table (B, K).
template <typename T>
void put(const at::Tensor& from, const std::vector<int64_t>& rows, const at::Tensor& into) {
  const int64_t width = from.size(1), K = into.size(1);
  for (size_t r = 0; r < rows.size(); r++) {
    std::copy_n(from.const_data_ptr<T>() + r * width, width, into.mutable_data_ptr<T>() + rows[r] * K);
  }
}

class Ranker : public torch::CustomClassHolder {
 public:
  Ranker(
      const at::Tensor& ids, const at::Tensor& id_ends, const at::Tensor& names, const at::Tensor& name_ends,
      const at::Tensor& table, double scale, const at::Tensor& positions, bool from_newest,
      std::vector<at::Tensor> weights, int64_t heads, double epsilon, bool normalize, double temperature,
      const at::Tensor& item_weights, const at::Tensor& codes, const at::Tensor& step, const at::Tensor& bounds)
      : ids_(ids, id_ends),
        names_(names, name_ends),
        transformer_{
            table, scale, positions, from_newest, std::move(weights), heads, epsilon, normalize, temperature},
        catalogue_{item_weights, codes, step, bounds} {}

  // item_index of each id (N), 0 for unknown ones; item_index (B, K) and score of the best items after each history: 0
  // and -inf where fewer are allowed, and in the rows of histories without a known id; and where `as_json` (B) asks for
  // it the items as JSON, one after the other, with the ends (B).
  //
  // `text`: the ids of all histories with NULs between; `counts` (B): how many each has; `hides_seen` (B): whether they
  // are excluded; `k`, `excluded`, `ends`, `allowed`: see top_items.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> best(
      const at::Tensor& text, const at::Tensor& counts, const at::Tensor& as_json, const at::Tensor& k,
      const at::Tensor& hides_seen, const at::Tensor& excluded, const at::Tensor& ends,
      const std::vector<at::Tensor>& allowed) {
    const int64_t B = counts.numel(), longest = transformer_.positions.size(0);
    const int64_t *count = counts.const_data_ptr<int64_t>(), *end = ends.const_data_ptr<int64_t>();
    const at::Tensor found = at::empty(counts.sum().item<int64_t>(), at::kLong);
    int64_t* items = found.mutable_data_ptr<int64_t>();
    ids_.look_up(split(text, found.numel()), items);
    Questions asked;
    for (int64_t b = 0, at = 0; b < B; at += count[b++]) {
      const int64_t* given = excluded.const_data_ptr<int64_t>();
      asked.add(
          b, items + at, count[b], longest, hides_seen.const_data_ptr<bool>()[b], given + (b ? end[b - 1] : 0),
          given + end[b], k.const_data_ptr<int64_t>()[b], allowed[b]);
    }
    const int64_t K = std::max<int64_t>(1, std::min(k.max().item<int64_t>(), catalogue_.weights.size(0)));
    const at::Tensor index = at::zeros({B, K}, at::kLong);
    const at::Tensor scores = at::full({B, K}, -std::numeric_limits<float>::infinity(), at::kFloat);
    if (!asked.rows.empty()) {
      const at::Tensor hidden = run(transformer_, tensor_of(asked.read), tensor_of(asked.lengths), {});
      const auto [best_index, best_scores] = top_items(
          catalogue_, hidden, tensor_of(asked.k), tensor_of(asked.excluded), tensor_of(asked.ends), asked.allowed);
      put<int64_t>(best_index, asked.rows, index);
      put<float>(best_scores, asked.rows, scores);
    }
    const auto [text_of_items, text_ends] = as_text(index, scores, as_json.const_data_ptr<bool>());
    return {found, index, scores, text_of_items, text_ends};
  }

 private:
  // The items of the rows that are wanted as JSON, one after the other, with the ends (B).
  std::tuple<at::Tensor, at::Tensor> as_text(const at::Tensor& index, const at::Tensor& scores, const bool* wanted) {
    const int64_t B = index.size(0), K = index.size(1);
    std::string json;
    std::vector<int64_t> ends;
    for (int64_t b = 0; b < B; b++) {
      const int64_t* items = index.const_data_ptr<int64_t>() + b * K;
      if (wanted[b]) append_items(json, names_, items, scores.const_data_ptr<float>() + b * K, K);
      ends.push_back(json.size());
    }
    at::Tensor bytes = at::empty(static_cast<int64_t>(json.size()), at::kByte);
    std::copy(json.begin(), json.end(), bytes.mutable_data_ptr<uint8_t>());
    return {bytes, tensor_of(ends)};
  }

  Ids ids_;
  Texts names_;
  Transformer transformer_;
  Catalogue catalogue_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(seqray, library) {
  library.class_<Ranker>("Ranker")
      .def(torch::init<
           const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
           const at::Tensor&, bool, std::vector<at::Tensor>, int64_t, double, bool, double, const at::Tensor&,
           const at::Tensor&, const at::Tensor&, const at::Tensor&>())
      .def("best", &Ranker::best);
}

}  // namespace seqray
