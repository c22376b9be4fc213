// How a value lies that a convolution on tiles hands to the next: as bfloat16 numbers, with zeros around each image, so
// that they can be multiplied where they are.
#pragma once

#include <cstdint>

namespace fastinv {

struct Padded {
  int width, height;  // pixels of a row and rows of an image, with the zeros up to the next
  int pitch;          // elements of a pixel
  int before[2];      // zeros before the first image: rows, and pixels
  int behind;         // pixels that may be read behind the last image, whatever they are

  // Elements: of a row, of an image, and of what is before and behind.
  int64_t row() const { return int64_t{width} * pitch; }
  int64_t image() const { return row() * height; }
  int64_t elements_before() const { return before[0] * row() + int64_t{before[1]} * pitch; }
  int64_t around() const { return elements_before() + int64_t{behind} * pitch; }
};

}  // namespace fastinv
