// Cuts a product into tasks: blocks of tokens times blocks of rows.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "sparse_matmul.h"

namespace vitoats {
namespace {

constexpr int64_t kPackColumns = 128;  // of a packing task
constexpr int64_t kRankGroup = 4;      // rows of V that are computed at once

// Memory for transposed activations: each thread keeps its own from call to call, since fresh pages cost more than the product.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  float* at_least(size_t floats) {
    if (floats > size_) {
      std::free(data_);
      const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      size_ = data_ ? floats : 0;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

int64_t first_level_cache() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 32 * 1024;
}

// How many vectors of activations, of the 64 columns of a tile, fit into the first level cache and leave room for sums and values.
int64_t vectors_in_cache(int lanes) {
  static const int64_t cache = first_level_cache();
  return cache * 9 / 10 / (64 * lanes * static_cast<int64_t>(sizeof(float)));
}

// Rows of a task, a whole number of groups: few enough that every core gets several tasks.
int64_t rows_of_task(int64_t rows, int64_t blocks, int64_t group) {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const int64_t fair = rows * blocks / (4 * cores);
  return std::clamp<int64_t>(fair / group * group, 2 * group, kMaxRows);
}

int64_t tasks(int64_t rows, int64_t of_task) { return (rows + of_task - 1) / of_task; }

struct Few {
  const Kernels& kernels;
  const Weights& weights;
  const float* x;
  int64_t tokens;
  const Output& y;
  float* z;  // [tokens, blocks rank]
  int64_t z_rows, y_rows;

  static void project(void* context, size_t i) {
    const Few& self = *static_cast<const Few*>(context);
    const SparseMatrix& V = self.weights.V();
    const int64_t row = static_cast<int64_t>(i) * self.z_rows;
    self.kernels.few(V, self.x, self.tokens, row, std::min(row + self.z_rows, V.rows), {self.z, nullptr}, false);
  }

  static void call(void* context, size_t i) {
    const Few& self = *static_cast<const Few*>(context);
    const SparseMatrix &S = self.weights.S(), &U = self.weights.U();
    const int64_t row = static_cast<int64_t>(i) * self.y_rows, end = std::min(row + self.y_rows, S.rows);
    self.kernels.few(S, self.x, self.tokens, row, end, self.y, false);
    if (U.columns) self.kernels.few(U, self.z, self.tokens, row, end, {self.y.data, nullptr}, true);
  }
};

struct Many {
  const Kernels& kernels;
  const PackedMatrix& S;
  const float* x;
  const Output& y;
  const TokenBlock* blocks;
  int words;  // tiles of a pass
  int64_t pack_tasks, z_rows, z_tasks, y_rows, y_tasks;  // of a block

  static void pack(void* context, size_t i) {
    const Many& self = *static_cast<const Many*>(context);
    const int64_t block = static_cast<int64_t>(i) / self.pack_tasks;
    const int64_t column = static_cast<int64_t>(i) % self.pack_tasks * kPackColumns;
    const int64_t end = std::min(column + kPackColumns, self.S.columns);
    self.kernels.pack(self.x, self.S.columns, self.blocks[block], column, end);
  }

  static void project(void* context, size_t i) {
    const Many& self = *static_cast<const Many*>(context);
    const int64_t block = static_cast<int64_t>(i) / self.z_tasks;
    const int64_t row = static_cast<int64_t>(i) % self.z_tasks * self.z_rows;
    const int64_t end = std::min(row + self.z_rows, self.S.low_rank.blocks * self.S.low_rank.rank);
    self.kernels.project(self.S, self.blocks[block], row, end);
  }

  static void call(void* context, size_t i) {
    const Many& self = *static_cast<const Many*>(context);
    const int64_t block = static_cast<int64_t>(i) / self.y_tasks;
    const int64_t row = static_cast<int64_t>(i) % self.y_tasks * self.y_rows;
    self.kernels.many(self.S, self.blocks[block], row, std::min(row + self.y_rows, self.S.rows), self.words, self.y);
  }
};

}  // namespace

Weights::Banded::Banded(int64_t rows, int64_t columns, int64_t blocks, int64_t width, const void* values, bool half)
    : mask(static_cast<size_t>(rows * ((columns + 7) / 8))), row_start(static_cast<size_t>(rows) + 1) {
  const int64_t stride = (columns + 7) / 8;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row / (rows / blocks) * width;
    for (int64_t k = first; k < first + width; ++k) mask[static_cast<size_t>(row * stride + k / 8)] |= static_cast<uint8_t>(1 << k % 8);
    row_start[static_cast<size_t>(row) + 1] = (row + 1) * width;
  }
  matrix = {rows, columns, stride, mask.data(), values, half, row_start.data()};
}

Weights::Weights(const SparseMatrix& S, const LowRank& low_rank)
    : S_(S),
      U_(S.rows, low_rank.blocks * low_rank.rank, low_rank.blocks, low_rank.rank, low_rank.U, S.half),
      V_(low_rank.blocks * low_rank.rank, S.columns, 1, S.columns, low_rank.V, S.half) {
  const int64_t tiles = (S.columns + 63) / 64, groups = (S.rows + kGroup - 1) / kGroup, nnz = S.row_start[S.rows];
  const size_t width = S.half ? 1 : 2;  // of a value, in units of values_
  masks_.resize(static_cast<size_t>(tiles * S.rows));
  values_.resize(static_cast<size_t>(nnz) * width);
  start_.resize(static_cast<size_t>(tiles * groups));
  const auto* source = static_cast<const uint16_t*>(S.values);
  std::vector<int64_t> next(S.row_start, S.row_start + S.rows);  // each row's first value that is not copied yet
  int64_t copied = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t from = 8 * tile, bytes = std::min<int64_t>(8, S.mask_stride - from);
    for (int64_t row = 0; row < S.rows; ++row) {
      if (row % kGroup == 0) start_[static_cast<size_t>(tile * groups + row / kGroup)] = copied;
      uint64_t bits = 0;
      for (int64_t i = 0; i < bytes; ++i)
        bits |= static_cast<uint64_t>(S.mask[row * S.mask_stride + from + i]) << (8 * i);
      masks_[static_cast<size_t>(tile * S.rows + row)] = bits;
      const int64_t n = __builtin_popcountll(bits);
      std::copy_n(source + static_cast<size_t>(next[row]) * width, static_cast<size_t>(n) * width,
                  values_.data() + static_cast<size_t>(copied) * width);
      next[row] += n;
      copied += n;
    }
  }
  packed_ = {S.rows, S.columns, tiles, groups, nnz, masks_.data(), values_.data(), start_.data(), S.half, low_rank};
}

bool multiply(const Kernels& kernels, const Weights& weights, const float* x, int64_t tokens, const Output& y,
              const Parallel& parallel) {
  const PackedMatrix& S = weights.packed();
  const int64_t rank = S.low_rank.blocks * S.low_rank.rank;
  thread_local Scratch scratch;
  if (tokens == 0) return true;
  if (tokens <= kFewTokens) {
    float* z = scratch.at_least(static_cast<size_t>(tokens * rank));
    if (rank && !z) return false;
    Few few{kernels, weights, x, tokens, y, z, rows_of_task(rank, 1, kRankGroup), rows_of_task(S.rows, 1, kGroup)};
    if (rank) parallel.run(Few::project, static_cast<size_t>(tasks(rank, few.z_rows)), &few);
    parallel.run(Few::call, static_cast<size_t>(tasks(S.rows, few.y_rows)), &few);
    return true;
  }
  const int64_t vectors = (tokens + kernels.lanes - 1) / kernels.lanes;
  const int64_t fitting = vectors_in_cache(kernels.lanes);
  const int64_t most = std::clamp<int64_t>(fitting, 1, kMaxVectors);
  const int64_t n_blocks = (vectors + most - 1) / most;
  const int64_t vectors_of_block = (vectors + n_blocks - 1) / n_blocks;
  const int64_t of_block = vectors_of_block * kernels.lanes;  // tokens
  const int words = static_cast<int>(std::clamp<int64_t>(fitting / vectors_of_block, 1, kMaxWords));

  float* packed = scratch.at_least(static_cast<size_t>(vectors * kernels.lanes * (S.columns + rank)));
  if (!packed) return false;
  std::vector<TokenBlock> blocks;
  for (int64_t first = 0; first < tokens; first += of_block) {
    const int64_t count = std::min(of_block, tokens - first);
    const int64_t stride = (count + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
    blocks.push_back({first, count, stride, packed});
    packed += stride * (S.columns + rank);
  }
  const auto count = static_cast<int64_t>(blocks.size());
  Many many{kernels, S, x, y, blocks.data(), words, tasks(S.columns, kPackColumns), 0, 0, 0, 0};
  many.z_rows = rows_of_task(rank, count, kRankGroup);
  many.z_tasks = tasks(rank, many.z_rows);
  many.y_rows = rows_of_task(S.rows, count, kGroup);
  many.y_tasks = tasks(S.rows, many.y_rows);
  parallel.run(Many::pack, static_cast<size_t>(count * many.pack_tasks), &many);
  if (rank) parallel.run(Many::project, static_cast<size_t>(count * many.z_tasks), &many);
  parallel.run(Many::call, static_cast<size_t>(count * many.y_tasks), &many);
  return true;
}

}  // namespace vitoats
