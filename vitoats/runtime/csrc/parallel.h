// Tasks on threads, independent of whose threads they are.
#pragma once

#include <cstddef>

namespace vitoats {

// Runs call(context, i) for all i in [0, n), in any order, on any threads.
struct Parallel {
  virtual void run(void (*call)(void* context, size_t i), size_t n, void* context) const = 0;

 protected:
  ~Parallel() = default;
};

}  // namespace vitoats
