// Memory for the transposed tokens of one product. Buffers are kept for the next product, since page faults on new memory cost
// more than the product; they are freed with the last session.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace vitoats {

// Products split their work so that this is enough, unless a single vector of tokens takes more.
constexpr size_t kScratchBytes = size_t{16} << 20;

class ScratchPool {
 public:
  // The pool of the process, which exists as long as anything holds it.
  static std::shared_ptr<ScratchPool> shared();

  struct Free {
    void operator()(float* p) const;
  };
  struct Buffer {
    std::unique_ptr<float, Free> data;  // aligned to 64 bytes
    size_t bytes = 0;
  };

  Buffer take(size_t bytes);   // throws std::bad_alloc
  void give_back(Buffer buffer) noexcept;

 private:
  std::mutex mutex_;
  std::vector<Buffer> buffers_;  // one per product that ran at the same time
};

// Holds a buffer during its lifetime.
class Scratch {
 public:
  Scratch(ScratchPool& pool, size_t bytes) : pool_(pool), buffer_(pool.take(bytes)) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { pool_.give_back(std::move(buffer_)); }

  float* data() const { return buffer_.data.get(); }

 private:
  ScratchPool& pool_;
  ScratchPool::Buffer buffer_;
};

}  // namespace vitoats
