// Codes <-> 32-bit words, the bit string that every packed format is made of.
//
// A line of codes is one little-endian bit string: code j takes bits j·bits ... (j+1)·bits - 1,
// lowest bit first, and word w holds bits 32w ... 32w + 31. So 2, 4 and 8 bits never straddle two
// words, and 32 codes of 3, 5 or 6 bits fill as many words, with codes that straddle two. A last
// word that is not full ends in zero bits. docs/formats.md says which way each format lays its
// lines.
#pragma once

#include <cstdint>

#include "base/view.h"

namespace qcore {

// Words that `count` codes of `bits` bits need: ceil(count · bits / 32).
int64_t packed_words(int64_t count, int bits);

// Lines are rows: codes (rows, columns) -> words (rows, packed_words(columns, bits)).
// Throws ArgumentError when bits is not one of kCodeBits, when shapes disagree, or when a code is
// not below 2^bits.
void pack_rows(MatrixView<const uint8_t> codes, int bits, MatrixView<int32_t> words);

// Lines are columns: codes (rows, columns) -> words (packed_words(rows, bits), columns).
void pack_columns(MatrixView<const uint8_t> codes, int bits, MatrixView<int32_t> words);

// The inverses. Bits behind the last code are not looked at.
void unpack_rows(MatrixView<const int32_t> words, int bits, MatrixView<uint8_t> codes);
void unpack_columns(MatrixView<const int32_t> words, int bits, MatrixView<uint8_t> codes);

}  // namespace qcore
