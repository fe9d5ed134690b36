#include "float_weights.h"

#include <algorithm>
#include <vector>

namespace vitoats {
namespace {

struct Owner {
  FloatWeights view;
  std::vector<uint64_t> masks;
  std::vector<unsigned char> values;
  std::vector<int64_t> group_start, row_start;
};

// The bits of one row in a strip.
uint64_t word(const SparseMatrix& S, int64_t row, int64_t strip) {
  const uint8_t* bytes = S.mask + row * S.mask_stride + 8 * strip;
  const int64_t n = std::min<int64_t>(8, S.mask_stride - 8 * strip);
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; ++i) bits |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return bits;
}

}  // namespace

std::shared_ptr<const void> pack_float_weights(const Weights& weights) {
  const SparseMatrix& S = weights.S;
  const int64_t strips = (S.columns + kStrip - 1) / kStrip, groups = (S.rows + kGroup - 1) / kGroup;
  const size_t width = size_of(weights.type);
  const auto owner = std::make_shared<Owner>();
  owner->masks.resize(static_cast<size_t>(strips * S.rows));
  owner->values.resize(static_cast<size_t>(S.n_values) * width);
  owner->group_start.resize(static_cast<size_t>(strips * groups));
  owner->row_start.resize(static_cast<size_t>(S.rows) + 1);

  int64_t* row_start = owner->row_start.data();
  for (int64_t row = 0; row < S.rows; ++row) {
    row_start[row + 1] = row_start[row];
    for (int64_t strip = 0; strip < strips; ++strip) row_start[row + 1] += __builtin_popcountll(word(S, row, strip));
  }

  const auto* source = static_cast<const unsigned char*>(S.values);
  unsigned char* target = owner->values.data();
  int64_t* next = row_start;  // each row's first value that is not copied yet; finally where the next row begins
  int64_t copied = 0;
  for (int64_t strip = 0; strip < strips; ++strip)
    for (int64_t row = 0; row < S.rows; ++row) {
      if (row % kGroup == 0) owner->group_start[static_cast<size_t>(strip * groups + row / kGroup)] = copied;
      const uint64_t bits = word(S, row, strip);
      owner->masks[static_cast<size_t>(strip * S.rows + row)] = bits;
      const int64_t n = __builtin_popcountll(bits);
      std::copy_n(source + static_cast<size_t>(next[row]) * width, static_cast<size_t>(n) * width,
                  target + static_cast<size_t>(copied) * width);
      next[row] += n;
      copied += n;
    }
  std::copy_backward(row_start, row_start + S.rows, row_start + S.rows + 1);
  row_start[0] = 0;

  owner->view = {weights, strips, groups, owner->masks.data(), target, owner->group_start.data(), row_start};
  return {owner, &owner->view};
}

}  // namespace vitoats
