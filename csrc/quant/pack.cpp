#include "quant/pack.h"

#include <algorithm>

#include "base/error.h"
#include "base/parallel.h"
#include "quant/grid.h"

namespace qcore {
namespace {

constexpr int kWordBits = 32;
// 32 codes fill exactly `bits` words, so a block of 32 touches no word of the next one.
constexpr int64_t kBlock = 32;
// Rows that one thread takes at a time; small enough to balance, large enough to amortize.
constexpr int64_t kRowsPerItem = 16;

void check_lines(int64_t lines, int64_t codes, int64_t line_words, int64_t lines_of_words,
                 int bits) {
  require_bits(bits, "pack");
  if (lines != lines_of_words || line_words != packed_words(codes, bits)) {
    throw ArgumentError(message(lines, " lines of ", codes, " codes of ", bits, " bits need ",
                                packed_words(codes, bits), " words a line, not ", lines_of_words,
                                " lines of ", line_words, "."));
  }
}

[[noreturn]] void throw_code_too_large(int bits) {
  throw ArgumentError(message("a code is not below 2^", bits, "."));
}

void pack_row(const uint8_t* codes, int64_t count, int bits, int32_t* words) {
  uint64_t pending = 0;
  int filled = 0;
  unsigned seen = 0;
  for (int64_t j = 0; j < count; ++j) {
    seen |= codes[j];
    pending |= static_cast<uint64_t>(codes[j]) << filled;
    filled += bits;
    if (filled >= kWordBits) {
      *words++ = static_cast<int32_t>(static_cast<uint32_t>(pending));
      pending >>= kWordBits;
      filled -= kWordBits;
    }
  }
  if (filled > 0) *words = static_cast<int32_t>(static_cast<uint32_t>(pending));
  if (seen >> bits != 0) throw_code_too_large(bits);
}

void unpack_row(const int32_t* words, int64_t count, int bits, uint8_t* codes) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t pending = 0;
  int filled = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (filled < bits) {
      pending |= static_cast<uint64_t>(static_cast<uint32_t>(*words++)) << filled;
      filled += kWordBits;
    }
    codes[j] = static_cast<uint8_t>(pending & mask);
    pending >>= bits;
    filled -= bits;
  }
}

// Up to 32 rows of codes into their words; the inner loop runs along the row and vectorizes.
void pack_column_block(MatrixView<const uint8_t> codes, int bits, MatrixView<int32_t> words,
                       int64_t first_row) {
  const int64_t rows = std::min(kBlock, codes.rows - first_row);
  const int64_t first_word = first_row * bits / kWordBits;
  const int64_t block_words = packed_words(rows, bits);
  for (int64_t w = 0; w < block_words; ++w) {
    std::fill_n(words.row(first_word + w), words.columns, 0);
  }
  unsigned seen = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* code = codes.row(first_row + r);
    const int64_t bit = r * bits;
    const int shift = static_cast<int>(bit % kWordBits);
    int32_t* low = words.row(first_word + bit / kWordBits);
    for (int64_t c = 0; c < codes.columns; ++c) {
      seen |= code[c];
      low[c] = static_cast<int32_t>(static_cast<uint32_t>(low[c]) | uint32_t{code[c]} << shift);
    }
    if (shift + bits > kWordBits) {
      int32_t* high = words.row(first_word + bit / kWordBits + 1);
      for (int64_t c = 0; c < codes.columns; ++c) {
        high[c] = static_cast<int32_t>(static_cast<uint32_t>(high[c]) |
                                       uint32_t{code[c]} >> (kWordBits - shift));
      }
    }
  }
  if (seen >> bits != 0) throw_code_too_large(bits);
}

void unpack_column_block(MatrixView<const int32_t> words, int bits, MatrixView<uint8_t> codes,
                         int64_t first_row) {
  const int64_t rows = std::min(kBlock, codes.rows - first_row);
  const int64_t first_word = first_row * bits / kWordBits;
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* code = codes.row(first_row + r);
    const int64_t bit = r * bits;
    const int shift = static_cast<int>(bit % kWordBits);
    const int32_t* low = words.row(first_word + bit / kWordBits);
    for (int64_t c = 0; c < codes.columns; ++c) {
      code[c] = static_cast<uint8_t>(static_cast<uint32_t>(low[c]) >> shift & mask);
    }
    if (shift + bits > kWordBits) {
      const int32_t* high = words.row(first_word + bit / kWordBits + 1);
      for (int64_t c = 0; c < codes.columns; ++c) {
        const uint32_t upper = static_cast<uint32_t>(high[c]) << (kWordBits - shift);
        code[c] = static_cast<uint8_t>((code[c] | upper) & mask);
      }
    }
  }
}

}  // namespace

int64_t packed_words(int64_t count, int bits) { return (count * bits + kWordBits - 1) / kWordBits; }

void pack_rows(MatrixView<const uint8_t> codes, int bits, MatrixView<int32_t> words) {
  check_lines(codes.rows, codes.columns, words.columns, words.rows, bits);
  parallel_blocks(codes.rows, kRowsPerItem, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      pack_row(codes.row(r), codes.columns, bits, words.row(r));
    }
  });
}

void pack_columns(MatrixView<const uint8_t> codes, int bits, MatrixView<int32_t> words) {
  check_lines(codes.columns, codes.rows, words.rows, words.columns, bits);
  parallel_blocks(codes.rows, kBlock, [&](int64_t begin, int64_t /*end*/) {
    pack_column_block(codes, bits, words, begin);
  });
}

void unpack_rows(MatrixView<const int32_t> words, int bits, MatrixView<uint8_t> codes) {
  check_lines(codes.rows, codes.columns, words.columns, words.rows, bits);
  parallel_blocks(codes.rows, kRowsPerItem, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      unpack_row(words.row(r), codes.columns, bits, codes.row(r));
    }
  });
}

void unpack_columns(MatrixView<const int32_t> words, int bits, MatrixView<uint8_t> codes) {
  check_lines(codes.columns, codes.rows, words.rows, words.columns, bits);
  parallel_blocks(codes.rows, kBlock, [&](int64_t begin, int64_t /*end*/) {
    unpack_column_block(words, bits, codes, begin);
  });
}

}  // namespace qcore
