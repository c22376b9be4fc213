// Errors of CUDA's runtime as exceptions.
#pragma once

#include <stdexcept>
#include <string>

namespace fastinv {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace fastinv
