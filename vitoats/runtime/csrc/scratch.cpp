#include "scratch.h"

#include <algorithm>
#include <new>
#include <utility>

namespace vitoats {
namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

void ScratchPool::Free::operator()(float* p) const { ::operator delete(p, kAlignment); }

std::shared_ptr<ScratchPool> ScratchPool::shared() {
  static std::mutex mutex;
  static std::weak_ptr<ScratchPool> current;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<ScratchPool> pool = current.lock();
  if (!pool) current = pool = std::make_shared<ScratchPool>();
  return pool;
}

ScratchPool::Buffer ScratchPool::take(size_t bytes) {
  Buffer buffer;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto better = [bytes](const Buffer& a, const Buffer& b) {  // the smallest that is large enough, else the largest
      return (a.bytes >= bytes) != (b.bytes >= bytes) ? a.bytes >= bytes : (a.bytes < b.bytes) == (a.bytes >= bytes);
    };
    const auto best = std::min_element(buffers_.begin(), buffers_.end(), better);
    if (best != buffers_.end()) {
      buffer = std::move(*best);
      *best = std::move(buffers_.back());
      buffers_.pop_back();
    }
  }
  if (buffer.bytes >= bytes) return buffer;
  buffer.data.reset();
  buffer.bytes = (bytes + 63) / 64 * 64;
  buffer.data.reset(static_cast<float*>(::operator new(buffer.bytes, kAlignment)));
  return buffer;
}

void ScratchPool::give_back(Buffer buffer) noexcept {
  if (buffer.bytes > kScratchBytes) return;
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    buffers_.push_back(std::move(buffer));
  } catch (const std::bad_alloc&) {  // then the buffer is freed
  }
}

}  // namespace vitoats
