#include "quant/pack.h"

#include <cstdint>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "quant/spec.h"

namespace qcore {
namespace {

uint8_t code_of(int64_t r, int64_t c, int bits) {
  return static_cast<uint8_t>((7 * r + 3 * c + r * c) & ((1 << bits) - 1));
}

// One bit at a time, straight from the definition in the header.
bool bit_of(const std::vector<int32_t>& line, int64_t bit) {
  const auto word = static_cast<uint32_t>(line[static_cast<size_t>(bit / 32)]);
  return (word >> (bit % 32) & 1U) != 0;
}

// The codes 0, step, 2 · step, ... modulo 2^bits, whole words of them.
std::vector<uint32_t> packed_steps(int64_t count, int step, int bits) {
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>(i * static_cast<size_t>(step) % (size_t{1} << bits));
  }
  std::vector<int32_t> words(static_cast<size_t>(packed_words(count, bits)));
  pack_rows(matrix_view<const uint8_t>(codes.data(), 1, count), bits,
            matrix_view(words.data(), 1, packed_words(count, bits)));
  return {words.begin(), words.end()};
}

// docs/formats.md
void test_worked_words_that_straddle() {
  CHECK((packed_steps(32, 1, 3) == std::vector<uint32_t>{0x88FAC688, 0xC688FAC6, 0xFAC688FA}));
  CHECK((packed_steps(32, 1, 5) ==
         std::vector<uint32_t>{0x8A418820, 0xC5A92839, 0xCA307B9A, 0x38BDAB49, 0xFFBBCDEB}));
  CHECK((packed_steps(16, 4, 6) == std::vector<uint32_t>{0x10308100, 0x89207185, 0xF38D30B2}));
}

void test_every_bit_and_the_way_back(int64_t rows, int64_t columns, int bits) {
  std::vector<uint8_t> codes(static_cast<size_t>(rows * columns));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      codes[static_cast<size_t>(r * columns + c)] = code_of(r, c, bits);
    }
  }
  const auto view = matrix_view<const uint8_t>(codes.data(), rows, columns);

  const int64_t row_words = packed_words(columns, bits);
  std::vector<int32_t> by_row(static_cast<size_t>(rows * row_words), -1);
  pack_rows(view, bits, matrix_view(by_row.data(), rows, row_words));
  const int64_t column_words = packed_words(rows, bits);
  std::vector<int32_t> by_column(static_cast<size_t>(columns * column_words), -1);
  pack_columns(view, bits, matrix_view(by_column.data(), column_words, columns));

  bool rows_hold = true;
  for (int64_t r = 0; r < rows; ++r) {
    const std::vector<int32_t> line(by_row.begin() + r * row_words,
                                    by_row.begin() + (r + 1) * row_words);
    for (int64_t bit = 0; bit < row_words * 32; ++bit) {
      const bool wanted =
          bit < columns * bits && (code_of(r, bit / bits, bits) >> (bit % bits) & 1) != 0;
      rows_hold = rows_hold && bit_of(line, bit) == wanted;
    }
  }
  CHECK(rows_hold);
  bool columns_hold = true;
  for (int64_t c = 0; c < columns; ++c) {
    std::vector<int32_t> line;
    for (int64_t w = 0; w < column_words; ++w) {
      line.push_back(by_column[static_cast<size_t>(w * columns + c)]);
    }
    for (int64_t bit = 0; bit < column_words * 32; ++bit) {
      const bool wanted =
          bit < rows * bits && (code_of(bit / bits, c, bits) >> (bit % bits) & 1) != 0;
      columns_hold = columns_hold && bit_of(line, bit) == wanted;
    }
  }
  CHECK(columns_hold);

  std::vector<uint8_t> back(codes.size(), 0xFF);
  unpack_rows(matrix_view<const int32_t>(by_row.data(), rows, row_words), bits,
              matrix_view(back.data(), rows, columns));
  CHECK(back == codes);
  back.assign(codes.size(), 0xFF);
  unpack_columns(matrix_view<const int32_t>(by_column.data(), column_words, columns), bits,
                 matrix_view(back.data(), rows, columns));
  CHECK(back == codes);
}

void test_refuses_what_it_cannot_pack() {
  std::vector<uint8_t> codes(8, 1);
  codes[7] = 16;
  std::vector<int32_t> words(8);
  const auto view = matrix_view<const uint8_t>(codes.data(), 1, 8);
  CHECK_THROWS(pack_rows(view, 4, matrix_view(words.data(), 1, 1)), ArgumentError);
  CHECK_THROWS(pack_columns(view, 4, matrix_view(words.data(), 1, 8)), ArgumentError);
  CHECK_THROWS(pack_rows(view, 8, matrix_view(words.data(), 1, 1)), ArgumentError);
  CHECK_THROWS(pack_rows(view, 7, matrix_view(words.data(), 1, 2)), ArgumentError);
}

}  // namespace
}  // namespace qcore

int main() {
  qcore::test_worked_words_that_straddle();
  for (const int bits : qcore::kCodeBits) {
    for (const int64_t rows : {0, 1, 7, 8, 31, 33, 64}) {
      for (const int64_t columns : {0, 1, 5, 8, 31, 32, 97}) {
        qcore::test_every_bit_and_the_way_back(rows, columns, bits);
      }
    }
  }
  qcore::test_refuses_what_it_cannot_pack();
  return qcore::test::report();
}
