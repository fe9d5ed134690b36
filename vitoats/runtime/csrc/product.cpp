// Splits a product into tasks: tiles of tokens times ranges of rows.
#include "product.h"

#include <algorithm>
#include <limits>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "tasks.h"

namespace vitoats {
namespace {

constexpr int64_t kPackColumns = 128;  // columns in a packing task
constexpr int64_t kRankGroup = 4;      // rows of V that are computed together

int64_t first_level_cache() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 32 * 1024;
}

// The number of vectors of tokens, for the columns of one strip, that fit into the L1 cache with room left for sums and values.
int64_t vectors_in_cache(int lanes) {
  static const int64_t cache = first_level_cache();
  return cache * 9 / 10 / (kStrip * lanes * static_cast<int64_t>(sizeof(float)));
}

// Splits the rows of each tile into tasks of whole groups, small enough that every core gets several tasks.
struct RowTasks {
  int64_t rows, of_task, count;

  RowTasks(int64_t rows_, int64_t tiles, int64_t group) : rows(rows_) {
    static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    const int64_t fair = rows * tiles / (4 * cores);
    of_task = std::clamp<int64_t>(fair / group * group, 2 * group, kMaxRows);
    count = ceil_div(rows, of_task);
  }

  int64_t begin(int64_t task) const { return task * of_task; }
  int64_t end(int64_t task) const { return std::min(rows, begin(task) + of_task); }
};

// Splits tokens into tiles of as many vectors as fit into the L1 cache, and into chunks of as many tiles as fit into the
// scratch memory.
struct Tiling {
  int64_t tokens, lanes, floats_of_token;
  int64_t vectors_of_tile, tiles_of_chunk;
  int strips;  // in a pass

  Tiling(int64_t tokens_, int lanes_, int64_t floats_of_token_)
      : tokens(tokens_), lanes(lanes_), floats_of_token(floats_of_token_) {
    const int64_t vectors = ceil_div(tokens, lanes), in_cache = vectors_in_cache(lanes_);
    const int64_t in_scratch = static_cast<int64_t>(kScratchBytes / sizeof(float)) / (lanes * floats_of_token);
    const int64_t tiles = ceil_div(vectors, std::clamp<int64_t>(std::min(in_cache, in_scratch), 1, kMaxVectors));
    vectors_of_tile = ceil_div(vectors, tiles);
    const int64_t chunks = ceil_div(tiles, std::max<int64_t>(in_scratch / vectors_of_tile, 1));
    tiles_of_chunk = ceil_div(tiles, chunks);
    strips = static_cast<int>(std::clamp<int64_t>(in_cache / vectors_of_tile, 1, kMaxStrips));
  }

  int64_t tokens_of_tile() const { return vectors_of_tile * lanes; }
  int64_t tokens_of_chunk() const { return tiles_of_chunk * tokens_of_tile(); }
  int64_t padded(int64_t n) const { return ceil_div(n, lanes) * lanes; }
  int64_t floats_of_chunk() const { return std::min(tokens_of_chunk(), padded(tokens)) * floats_of_token; }

  // The tiles of the chunk that begins at token begin.
  std::vector<TokenTile> chunk(int64_t begin, float* packed, uint8_t* non_finite) const {
    std::vector<TokenTile> tiles;
    const int64_t end = std::min(tokens, begin + tokens_of_chunk());
    for (int64_t first = begin; first < end; first += tokens_of_tile()) {
      const int64_t count = std::min(tokens_of_tile(), end - first);
      tiles.push_back({first, count, padded(count), packed + (first - begin) * floats_of_token, non_finite + (first - begin)});
    }
    return tiles;
  }
};

void fill_nan(const Output& y, int64_t token, int64_t rows, int64_t row, int64_t row_end) {
  std::fill(y.data + token * rows + row, y.data + token * rows + row_end, std::numeric_limits<float>::quiet_NaN());
}

}  // namespace

Product::Product(const Weights& weights, const Kernels& kernels)
    : kernels_(kernels),
      rows_(weights.S.rows),
      columns_(weights.S.columns),
      z_rows_(weights.z_rows()),
      weights_(kernels.pack_weights(weights)),
      scratch_(ScratchPool::shared()) {}

void Product::run(const float* x, int64_t tokens, const Output& y, const Parallel& parallel) const {
  if (tokens == 0) return;
  if (tokens <= kSpmvTokens) {
    spmv(x, tokens, y, parallel);
  } else {
    spmm(x, tokens, y, parallel);
  }
}

void Product::spmv(const float* x, int64_t tokens, const Output& y, const Parallel& parallel) const {
  const Scratch scratch(*scratch_, static_cast<size_t>(tokens * z_rows_) * sizeof(float));
  float* z = scratch.data();
  bool finite[kSpmvTokens];
  for (int64_t t = 0; t < tokens; ++t) finite[t] = all_finite(ValueType::kFloat32, x + t * columns_, columns_);

  const RowTasks z_tasks(z_rows_, 1, kRankGroup), y_tasks(rows_, 1, kGroup);
  run_tasks(parallel, z_tasks.count, [&](int64_t task) {
    kernels_.spmv_project(weights_.get(), x, tokens, z_tasks.begin(task), z_tasks.end(task), z);
  });
  run_tasks(parallel, y_tasks.count, [&](int64_t task) {
    const int64_t row = y_tasks.begin(task), row_end = y_tasks.end(task);
    kernels_.spmv(weights_.get(), x, z, tokens, row, row_end, y);
    for (int64_t t = 0; t < tokens; ++t)
      if (!finite[t]) fill_nan(y, t, rows_, row, row_end);
  });
}

void Product::spmm(const float* x, int64_t tokens, const Output& y, const Parallel& parallel) const {
  const Tiling tiling(tokens, kernels_.lanes, columns_ + z_rows_);
  const Scratch scratch(*scratch_, static_cast<size_t>(tiling.floats_of_chunk()) * sizeof(float));
  std::vector<uint8_t> non_finite(static_cast<size_t>(tiling.tokens_of_chunk()));
  const int64_t pack_tasks = ceil_div(columns_, kPackColumns);
  for (int64_t first = 0; first < tokens; first += tiling.tokens_of_chunk()) {
    std::fill(non_finite.begin(), non_finite.end(), uint8_t{0});
    const std::vector<TokenTile> tile = tiling.chunk(first, scratch.data(), non_finite.data());
    const auto tiles = static_cast<int64_t>(tile.size());
    const RowTasks z_tasks(z_rows_, tiles, kRankGroup), y_tasks(rows_, tiles, kGroup);
    run_tasks(parallel, tiles, pack_tasks, [&](int64_t i, int64_t task) {
      const int64_t column = task * kPackColumns;
      kernels_.pack_tokens(x, columns_, tile[i], column, std::min(column + kPackColumns, columns_));
    });
    run_tasks(parallel, tiles, z_tasks.count, [&](int64_t i, int64_t task) {
      kernels_.spmm_project(weights_.get(), tile[i], z_tasks.begin(task), z_tasks.end(task));
    });
    run_tasks(parallel, tiles, y_tasks.count, [&](int64_t i, int64_t task) {
      const int64_t row = y_tasks.begin(task), row_end = y_tasks.end(task);
      kernels_.spmm(weights_.get(), tile[i], row, row_end, tiling.strips, y);
      for (int64_t t = 0; t < tile[i].count; ++t)
        if (tile[i].non_finite[t]) fill_nan(y, tile[i].first + t, rows_, row, row_end);
    });
  }
}

}  // namespace vitoats
