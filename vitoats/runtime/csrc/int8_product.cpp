// Splits an int8 product into tasks: groups of tokens are quantized and projected by V, then ranges of strips are multiplied.
#include "int8_product.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "tasks.h"

namespace vitoats {
namespace {

constexpr int64_t kGroup = 32;              // tokens; the largest block of a kernel
constexpr int64_t kGroupsOfTask = 3;        // in a task that quantizes, at most: each task reads all of V
constexpr int64_t kChunkBytes = 1 << 20;    // of quantized tokens, which stay in the second-level cache
constexpr int64_t kLine = 64;

int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

int64_t cores() {
  static const int64_t found = std::max(1u, std::thread::hardware_concurrency());
  return found;
}

// Whole steps of AMX, an odd number of cache lines: rows one below another fall into different sets of the cache.
int64_t row_bytes(int64_t columns) {
  const int64_t lines = ceil_div(columns, kLine);
  return (lines % 2 ? lines : lines + 1) * kLine;
}

// Ranges of whole panels, enough for all cores.
struct PanelTasks {
  int64_t strips, of_task, count;

  PanelTasks(int64_t strips_, int64_t tasks_of_core) : strips(strips_) {
    of_task = round_up(ceil_div(strips, tasks_of_core * cores()), 2);
    count = ceil_div(strips, of_task);
  }

  int64_t begin(int64_t task) const { return task * of_task; }
  int64_t end(int64_t task) const { return std::min(strips, begin(task) + of_task); }
};

// The memory for the tokens of a chunk, one array behind the other.
struct Layout {
  int64_t tokens, stride, z_stride, z_rows;  // z_rows: of each token
  int64_t q, scale, zero, z_q, z_scale, z_zero, z, bytes;

  Layout(const Int8Weights& weights, int64_t count)
      : tokens(round_up(count, kGroup)),
        stride(row_bytes(weights.columns)),
        z_stride(weights.rank ? row_bytes(weights.rank) : 0),
        z_rows(weights.rank ? weights.parts : 0) {
    const int64_t numbers = round_up(tokens * static_cast<int64_t>(sizeof(float)), kLine), z_numbers = numbers * z_rows;
    int64_t at = 0;
    const auto take = [&at](int64_t size) { return std::exchange(at, at + size); };
    q = take(tokens * stride);
    z_q = take(tokens * z_rows * z_stride);
    scale = take(numbers);
    zero = take(numbers);
    z_scale = take(z_numbers);
    z_zero = take(z_numbers);
    z = take(tokens * z_rows * weights.z_stride() * static_cast<int64_t>(sizeof(float)));
    bytes = at;
  }

  Int8Tokens place(uint8_t* memory, const Activations& x, int64_t count) const {
    const auto floats = [memory](int64_t at) { return reinterpret_cast<float*>(memory + at); };
    return {count, x, {memory + q, stride, floats(scale), floats(zero)}, floats(z), {memory + z_q, z_stride, floats(z_scale), floats(z_zero)}};
  }
};

}  // namespace

Int8Product::Int8Product(std::shared_ptr<const Int8Weights> weights, const Int8Kernels& kernels)
    : weights_(std::move(weights)), kernels_(kernels), scratch_(ScratchPool::shared()) {}

void Int8Product::run(const Activations& x, int64_t tokens, const Int8Output& output, const Parallel& parallel) const {
  if (tokens == 0) return;
  const Int8Weights& weights = *weights_;
  const int64_t in_chunk = std::max(kChunkBytes / row_bytes(weights.columns) / kGroup * kGroup, kGroup);
  const int64_t of_chunk = round_up(ceil_div(tokens, ceil_div(tokens, in_chunk)), kGroup);
  const Layout layout(weights, std::min(tokens, of_chunk));
  const Scratch scratch(*scratch_, static_cast<size_t>(layout.bytes));
  auto* memory = reinterpret_cast<uint8_t*>(scratch.data());
  for (int64_t first = 0; first < tokens; first += of_chunk) {
    const int64_t count = std::min(of_chunk, tokens - first);
    const Int8Tokens chunk = layout.place(memory, x.from(first * weights.columns), count);
    const Int8Output of_output = output.from(first * weights.rows);
    if (count <= kDotTokens) {
      quantize_few(chunk, parallel);
    } else {
      quantize_many(chunk, parallel);
    }
    const PanelTasks panels(weights.strips, count <= kDotTokens ? 4 : 2);
    run_tasks(parallel, panels.count, [&](int64_t task) {
      const Scratch expanded(*scratch_, static_cast<size_t>(expanded_bytes(weights)));
      kernels_.multiply(weights, chunk, panels.begin(task), panels.end(task), of_output, reinterpret_cast<int8_t*>(expanded.data()));
    });
  }
}

void Int8Product::quantize_many(const Int8Tokens& tokens, const Parallel& parallel) const {
  const Int8Weights& weights = *weights_;
  const int64_t of_task = std::clamp<int64_t>(tokens.count / cores() / kGroup, 1, kGroupsOfTask) * kGroup;
  run_tasks(parallel, ceil_div(tokens.count, of_task), [&](int64_t task) {
    const int64_t begin = task * of_task, end = std::min(tokens.count, begin + of_task);
    const Scratch normalized(*scratch_, static_cast<size_t>(weights.columns) * sizeof(float));
    kernels_.quantize(weights, tokens, begin, end, normalized.data());
    if (!weights.rank) return;
    kernels_.project(weights, tokens, begin, end, 0, weights.parts * weights.rank_strips);
    kernels_.quantize_z(weights, tokens, begin, end);
  });
}

void Int8Product::quantize_few(const Int8Tokens& tokens, const Parallel& parallel) const {
  const Int8Weights& weights = *weights_;
  run_tasks(parallel, 1, [&](int64_t) {
    const Scratch normalized(*scratch_, static_cast<size_t>(weights.columns) * sizeof(float));
    kernels_.quantize(weights, tokens, 0, tokens.count, normalized.data());
  });
  if (!weights.rank) return;
  const PanelTasks panels(weights.parts * weights.rank_strips, 4);
  run_tasks(parallel, panels.count, [&](int64_t task) {
    kernels_.project(weights, tokens, 0, tokens.count, panels.begin(task), panels.end(task));
  });
  run_tasks(parallel, 1, [&](int64_t) { kernels_.quantize_z(weights, tokens, 0, tokens.count); });
}

}  // namespace vitoats
