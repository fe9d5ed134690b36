#include "int8_weights.h"

#include <algorithm>
#include <cstring>

namespace vitoats {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::vector<float> padded(const float* numbers, int64_t n, int64_t size) {
  std::vector<float> copy(static_cast<size_t>(size));
  std::copy_n(numbers, n, copy.begin());
  return copy;
}

// The sums of the 16 rows of a strip.
void add_rows(const int8_t* quad, int64_t quads, float* sums) {
  int32_t sum[kStripRows] = {};
  for (int64_t q = 0; q < quads; ++q, quad += kQuadBytes)
    for (int j = 0; j < kQuadBytes; ++j) sum[j / kQuad] += quad[j];
  std::copy_n(sum, kStripRows, sums);
}

// A copy of a strip with zeros behind it.
const int8_t* copied(Int8Weights& weights, const int8_t* strip, int64_t bytes, int64_t room) {
  std::vector<int8_t>& copy = weights.copies.emplace_back(static_cast<size_t>(room));
  std::copy_n(strip, bytes, copy.begin());
  return copy.data();
}

// Strips that lie one after another: those whose last step would be read past the end of all are copied.
DenseStrips dense_strips(Int8Weights& weights, const int8_t* matrix, int64_t strips, int64_t quads, std::vector<float>& sums) {
  DenseStrips found;
  found.quads = quads;
  sums.resize(static_cast<size_t>(strips * kStripRows));
  const int64_t bytes = quads * kQuadBytes, room = ceil_div(quads, kStepQuads) * kStepQuads * kQuadBytes;
  for (int64_t s = 0; s < strips; ++s) {
    const int8_t* strip = matrix + s * bytes;
    add_rows(strip, quads, sums.data() + s * kStripRows);
    const bool inside = s * bytes + room <= strips * bytes;
    found.strip.push_back(inside ? strip : copied(weights, strip, bytes, room));
  }
  return found;
}

SparseStrips sparse_strips(Int8Weights& weights, const Int8Constants& constants, int64_t quads) {
  SparseStrips found;
  found.quads = quads;
  found.masks = constants.mask;
  weights.S_sum.resize(static_cast<size_t>(weights.strips * kStripRows));
  const int8_t *next = constants.values, *end = next + constants.n_values;
  for (int64_t s = 0; s < weights.strips; ++s) {
    const int8_t* first = next;
    int32_t sum[kStripRows] = {};
    for (int64_t q = 0; q < quads; ++q) {
      const uint8_t* bytes = constants.mask + (s * quads + q) * 8;
      for (int j = 0; j < kQuadBytes; ++j)
        if (bytes[j / 8] >> j % 8 & 1) sum[j / kQuad] += *next++;
    }
    std::copy_n(sum, kStripRows, weights.S_sum.data() + s * kStripRows);
    found.values.push_back(end - next >= kQuadBytes ? first : copied(weights, first, next - first, next - first + kQuadBytes));
  }
  return found;
}

}  // namespace

std::shared_ptr<const Int8Weights> prepare_int8(const Int8Constants& constants) {
  const auto weights = std::make_shared<Int8Weights>();
  weights->rows = constants.rows;
  weights->columns = constants.columns;
  weights->strips = ceil_div(constants.rows, kStripRows);
  weights->sparse = constants.mask != nullptr;
  weights->norm = constants.norm;
  weights->activation = constants.activation;
  const int64_t quads = ceil_div(constants.columns, kQuad), size = weights->strips * kStripRows;
  if (weights->sparse) {
    weights->S = sparse_strips(*weights, constants, quads);
  } else {
    weights->dense = dense_strips(*weights, constants.values, weights->strips, quads, weights->S_sum);
  }
  weights->scale = padded(constants.scale, constants.rows, size);
  weights->bias = padded(constants.bias, constants.rows, size);
  const auto non_zero = [](int8_t value) { return value != 0; };
  const int64_t rank_quads = ceil_div(constants.rank, kQuad);
  if (!std::any_of(constants.U, constants.U + weights->strips * rank_quads * kQuadBytes, non_zero)) return weights;

  weights->parts = constants.parts;
  weights->rank = constants.rank;
  weights->rank_strips = ceil_div(constants.rank, kStripRows);
  weights->U = dense_strips(*weights, constants.U, weights->strips, rank_quads, weights->U_sum);
  weights->V = dense_strips(*weights, constants.V, weights->parts * weights->rank_strips, quads, weights->V_sum);
  weights->U_scale = padded(constants.U_scale, constants.rows, size);
  for (int64_t part = 0; part < weights->parts; ++part) {
    const std::vector<float> scale = padded(constants.V_scale + part * constants.rank, constants.rank, weights->z_stride());
    weights->V_scale.insert(weights->V_scale.end(), scale.begin(), scale.end());
  }
  return weights;
}

}  // namespace vitoats
