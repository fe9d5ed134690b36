// Splits work into tasks.
#pragma once

#include <cstdint>

#include "flush_subnormals.h"
#include "parallel.h"

namespace vitoats {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs body(i) for all i in [0, n), with subnormal numbers treated as zero.
template <class Body>
void run_tasks(const Parallel& parallel, int64_t n, const Body& body) {
  const auto call = [](void* context, size_t i) {
    const FlushSubnormals flush;
    (*static_cast<const Body*>(context))(static_cast<int64_t>(i));
  };
  if (n > 0) parallel.run(call, static_cast<size_t>(n), const_cast<Body*>(&body));
}

// Runs body(tile, task) for each task of each tile.
template <class Body>
void run_tasks(const Parallel& parallel, int64_t tiles, int64_t tasks, const Body& body) {
  run_tasks(parallel, tiles * tasks, [&](int64_t i) { body(i / tasks, i % tasks); });
}

}  // namespace
}  // namespace vitoats
