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

// Rows of a task: few enough that every core gets several.
int64_t rows_of_task(int64_t rows, int64_t blocks) {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const int64_t fair = rows * blocks / (4 * cores);
  return std::clamp<int64_t>(fair / kGroup * kGroup, 2 * kGroup, kMaxRows);
}

struct Few {
  const Kernels& kernels;
  const SparseMatrix& S;
  const float* x;
  int64_t tokens, rows;
  const Output& y;

  static void call(void* context, size_t i) {
    const Few& self = *static_cast<const Few*>(context);
    const int64_t row = static_cast<int64_t>(i) * self.rows;
    self.kernels.few(self.S, self.x, self.tokens, row, std::min(row + self.rows, self.S.rows), self.y);
  }
};

struct Many {
  const Kernels& kernels;
  const PackedMatrix& S;
  const float* x;
  int64_t columns;
  const Output& y;
  const TokenBlock* blocks;
  int words;  // tiles of a pass
  int64_t rows, row_tasks, column_tasks;

  static void pack(void* context, size_t i) {
    const Many& self = *static_cast<const Many*>(context);
    const int64_t block = static_cast<int64_t>(i) / self.column_tasks;
    const int64_t column = static_cast<int64_t>(i) % self.column_tasks * kPackColumns;
    const int64_t end = std::min(column + kPackColumns, self.columns);
    self.kernels.pack(self.x, self.columns, self.blocks[block], column, end);
  }

  static void call(void* context, size_t i) {
    const Many& self = *static_cast<const Many*>(context);
    const int64_t block = static_cast<int64_t>(i) / self.row_tasks;
    const int64_t row = static_cast<int64_t>(i) % self.row_tasks * self.rows;
    self.kernels.many(self.S, self.blocks[block], row, std::min(row + self.rows, self.S.rows), self.words, self.y);
  }
};

}  // namespace

Weights::Weights(const SparseMatrix& S) : in_order_(S) {
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
  packed_ = {S.rows, tiles, groups, nnz, masks_.data(), values_.data(), start_.data(), S.half};
}

bool multiply(const Kernels& kernels, const Weights& weights, const float* x, int64_t tokens, const Output& y,
              const Parallel& parallel) {
  const SparseMatrix& S = weights.in_order();
  if (tokens == 0) return true;
  if (tokens <= kFewTokens) {
    Few few{kernels, S, x, tokens, rows_of_task(S.rows, 1), y};
    parallel.run(Few::call, static_cast<size_t>((S.rows + few.rows - 1) / few.rows), &few);
    return true;
  }
  const int64_t vectors = (tokens + kernels.lanes - 1) / kernels.lanes;
  const int64_t fitting = vectors_in_cache(kernels.lanes);
  const int64_t most = std::clamp<int64_t>(fitting, 1, kMaxVectors);
  const int64_t n_blocks = (vectors + most - 1) / most;
  const int64_t vectors_of_block = (vectors + n_blocks - 1) / n_blocks;
  const int64_t of_block = vectors_of_block * kernels.lanes;  // tokens
  const int words = static_cast<int>(std::clamp<int64_t>(fitting / vectors_of_block, 1, kMaxWords));

  thread_local Scratch scratch;
  float* packed = scratch.at_least(static_cast<size_t>(vectors * kernels.lanes * S.columns));
  if (!packed) return false;
  std::vector<TokenBlock> blocks;
  for (int64_t first = 0; first < tokens; first += of_block) {
    const int64_t count = std::min(of_block, tokens - first);
    const int64_t stride = (count + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
    blocks.push_back({first, count, stride, packed});
    packed += stride * S.columns;
  }
  const auto count = static_cast<int64_t>(blocks.size());
  Many many{kernels, weights.packed(), x, S.columns, y, blocks.data(), words, rows_of_task(S.rows, count), 0, 0};
  many.row_tasks = (S.rows + many.rows - 1) / many.rows;
  many.column_tasks = (S.columns + kPackColumns - 1) / kPackColumns;
  parallel.run(Many::pack, static_cast<size_t>(count * many.column_tasks), &many);
  parallel.run(Many::call, static_cast<size_t>(count * many.row_tasks), &many);
  return true;
}

}  // namespace vitoats
