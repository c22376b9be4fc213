// Errors of CUDA's runtime as exceptions. What one call leaves is taken back, or the next launch would seem to fail.
#pragma once

#include <stdexcept>
#include <string>

namespace fastinv {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace fastinv
