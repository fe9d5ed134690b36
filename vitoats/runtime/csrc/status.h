// The bridge between exceptions here and the statuses of ONNX Runtime: nothing leaves this library but as a status.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "ort_abi.h"

namespace vitoats {

// What is wrong; code is ONNX Runtime's.
struct Error {
  int code;
  std::string message;
};

[[noreturn]] inline void refuse(const std::string& message) {
  throw Error{ort::kInvalidArgument, "vitoats::SparseMatMul: " + message};
}

// A status of ONNX Runtime, which owns no memory of ours, as an exception that unwinds.
struct StatusError {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status) throw StatusError{status};
}

// Runs body; whatever it throws becomes a status.
template <class Body>
OrtStatus* guarded(const ort::Api& api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const Error& error) {
    return api.CreateStatus(error.code, error.message.c_str());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ort::kFail, "vitoats::SparseMatMul: out of memory");
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kFail, error.what());
  }
}

}  // namespace vitoats
