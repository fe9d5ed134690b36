// Converts between exceptions and ONNX Runtime's status objects: no exception leaves this library.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "ort_abi.h"

namespace vitoats {

// An error of our own, with an error code of ONNX Runtime.
struct Error {
  int code;
  std::string message;
};

[[noreturn]] inline void refuse(const std::string& message) {
  throw Error{ort::kInvalidArgument, message};
}

// An error status from ONNX Runtime as an exception.
struct StatusError {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status) throw StatusError{status};
}

// Runs body and converts any exception to a status; messages of our own begin with name.
template <class Body>
OrtStatus* guarded(const ort::Api& api, const char* name, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const Error& error) {
    return api.CreateStatus(error.code, (std::string(name) + ": " + error.message).c_str());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ort::kFail, (std::string(name) + ": out of memory").c_str());
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kFail, error.what());
  }
}

}  // namespace vitoats
