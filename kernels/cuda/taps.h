// Which pixels around a cell a convolution's outputs read, and in what order its weights lie.
#pragma once

#include "halves.h"

namespace fastinv {

constexpr int kShifts = 9;

// Which of the 3×3 pixels around a cell, shifts 0 to 8 row by row, its phases read (row parity · 2 + column parity),
// and the number of the two among all that do, shift by shift. One phase reads all.
struct Around {
  static constexpr int kPhases = 1, kPlaces = kShifts;
  FASTINV_BOTH static constexpr bool reads(int, int) { return true; }
  FASTINV_BOTH static constexpr int place(int, int shift) { return shift; }
};

// Of four, those of an even row read the cell's own row and the one above, of an odd row the one below, too; and so for
// columns.
struct AroundTwo {
  static constexpr int kPhases = 4, kPlaces = 16;

  FASTINV_BOTH static constexpr bool reads(int phase, int shift) {
    const int down = shift / 3 - phase / 2, right = shift % 3 - phase % 2;
    return down >= 0 && down <= 1 && right >= 0 && right <= 1;
  }
  // Three rows of shifts have 4, 8 and 4.
  FASTINV_BOTH static constexpr int place(int phase, int shift) {
    const int row = shift / 3, column = shift % 3;
    const int before = row * 4 + (row == 2 ? 4 : 0), beside = column + (column == 2 ? 1 : 0);
    return before + beside * of(row) + (phase / 2 - row / 2) * of(column) + phase % 2 - column / 2;
  }

 private:
  FASTINV_BOTH static constexpr int of(int side) { return side == 1 ? 2 : 1; }  // phases that read there
};

// All read the cell, those of an odd row the one below, too; and so for columns.
struct OnwardTwo {
  static constexpr int kPhases = 4, kPlaces = 9;

  FASTINV_BOTH static constexpr bool reads(int phase, int shift) {
    const int down = shift / 3 - 1, right = shift % 3 - 1;
    return down >= 0 && down <= phase / 2 && right >= 0 && right <= phase % 2;
  }
  FASTINV_BOTH static constexpr int place(int phase, int shift) {
    return shift == 4 ? phase : shift == 5 ? 4 + phase / 2 : shift == 7 ? 4 + phase : 8;
  }
};

}  // namespace fastinv
