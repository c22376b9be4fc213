// The way from the host's memory to a GPU's, and back out of what a GPU has written to the host's.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

namespace fastinv {

struct Copy {
  const uint8_t* from;
  uint8_t* to;
  int64_t bytes;
};

// By up to so many threads.
void copy(const Copy& copy, int threads);

struct Driver;  // the functions of CUDA's driver that are needed here

// A copy to a GPU overlaps with anything only from page-locked memory, which the user's is not. So each thread fills
// pieces of such memory, and starts them on their way itself: while one goes, it fills the other, and what the driver
// takes to start one holds up no other thread.
class Upload {
 public:
  static constexpr int kPieces = 2;  // of a thread

  // `pinned` is page-locked memory of kPieces · threads pieces of so many bytes, a multiple of 4, that outlives this.
  // `driver` is the library of CUDA's driver; with "" the host stands in for a GPU. Throws std::invalid_argument where
  // it cannot be loaded.
  Upload(const Kernels& kernels, uint8_t* pinned, int64_t piece, int threads, const std::string& driver);
  ~Upload();
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;

  // On the stream: `bytes` of what is at `there` become what is at `source`; with `rounds` that is float32, which
  // becomes bfloat16. Meanwhile the same threads do `beside`, as both take the same memory's time.
  // Returns when source has been read and the copy is done. Throws std::runtime_error with what the driver says.
  void send(const void* source, uint64_t there, int64_t bytes, bool rounds, void* stream, const Copy& beside);

 private:
  void send_piece(int worker, const uint8_t* source, uint64_t there, int64_t bytes, bool rounds, void* stream);

  const Kernels& kernels_;
  uint8_t* const pinned_;
  const int64_t piece_;
  const int threads_;
  std::unique_ptr<Driver> driver_;
  void* context_ = nullptr;  // the stream's
  std::vector<void*> gone_;  // for each piece an event, after which it may be filled again
  std::vector<int> turns_;   // for each thread the piece that is next
};

}  // namespace fastinv
