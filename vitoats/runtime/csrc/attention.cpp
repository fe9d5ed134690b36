// Splits attention into tasks: heads, or blocks of queries where there are few heads for many cores.
#include "attention.h"

#include <algorithm>
#include <thread>

#include "tasks.h"

namespace vitoats {
namespace {

constexpr int64_t kFairTasks = 3;  // for each core, or one of them is left alone at the end for too long

constexpr HeadPart kParts[] = {HeadPart::kKeys, HeadPart::kValues};

}  // namespace

void Attention::run(const Activations& qkv, int64_t batch, int64_t tokens, int64_t width, float* y, const Parallel& parallel) const {
  if (batch == 0 || tokens == 0 || width == 0) return;
  const int64_t y_stride = heads_ * width, stride = 3 * y_stride, all = batch * heads_;
  const auto head = [&](int64_t i) {
    const int64_t token = i / heads_ * tokens, column = i % heads_ * width;
    const Activations q = qkv.from(token * stride + column);
    return Head{q, q.from(y_stride), q.from(2 * y_stride), y + token * y_stride + column, tokens, width, stride, y_stride, scale_};
  };
  const int64_t size = kernels_.packed_size(head(0));
  const auto bytes = [&](int64_t heads) { return static_cast<size_t>(heads * size) * sizeof(float); };

  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  if (all >= kFairTasks * cores) {  // a task is a whole head: no waiting in between, and it stays in the cache
    return run_tasks(parallel, all, [&](int64_t i) {
      const Scratch packed(*scratch_, bytes(1));
      for (const HeadPart part : kParts) kernels_.pack(head(i), part, packed.data());
      kernels_.attend(head(i), packed.data(), 0, tokens);
    });
  }
  const int64_t blocks = ceil_div(tokens, kernels_.queries);
  const int64_t at_once = std::clamp<int64_t>(static_cast<int64_t>(kScratchBytes / bytes(1)), 1, all);
  const Scratch packed(*scratch_, bytes(at_once));
  for (int64_t first = 0; first < all; first += at_once) {
    const int64_t heads = std::min(at_once, all - first);
    run_tasks(parallel, heads * 2, [&](int64_t i) {
      kernels_.pack(head(first + i / 2), kParts[i % 2], packed.data() + i / 2 * size);
    });
    run_tasks(parallel, heads * blocks, [&](int64_t i) {
      const int64_t query = i % blocks * kernels_.queries;
      kernels_.attend(head(first + i / blocks), packed.data() + i / blocks * size, query, std::min(query + kernels_.queries, tokens));
    });
  }
}

}  // namespace vitoats
