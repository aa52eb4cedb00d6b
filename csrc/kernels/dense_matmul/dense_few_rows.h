// A few rows of x against rows of a dense weight that are read where they lie: a panel that serves
// a few rows is not worth writing. Squares of the weight are transposed in registers, so that lanes
// are outputs and every sum runs over the inputs in the order of tile_product.h: the same bits.
//
// The weight comes from memory, where one stream per thread is fastest and a square touches as many
// rows as there are lanes. So while one piece is worked on, the next one is called into the
// second-level cache line by line in the order of its addresses.
#pragma once

#include "kernels/dense_matmul/dense_pack.h"

namespace {

using qcore::kernels::DenseRowsArgs;

constexpr int64_t kCacheLineBytes = 64;

// What a word of a square does to the sum of one row; kXBytes of x belong to it. `whole` is false
// for a last word that holds one input where others hold two.
struct PairWord {
  using Load = FloatLoad;
  static constexpr int64_t kInputs = 2;
  static constexpr int64_t kXBytes = 4;
  static QCORE_INLINE Simd::F add(Simd::F sum, const uint8_t* x, Simd::F w, bool /*whole*/) {
    return Simd::dot_pairs(sum, spread_step(x), Simd::bits(w));
  }
};

QCORE_INLINE Simd::F spread_float(const uint8_t* x) {
  float value;
  std::memcpy(&value, x, sizeof value);
  return Simd::spread(value);
}

template <class LoadType>
struct FloatWord {
  using Load = LoadType;
  static constexpr int64_t kInputs = 1;
  static constexpr int64_t kXBytes = 4;
  static QCORE_INLINE Simd::F add(Simd::F sum, const uint8_t* x, Simd::F w, bool /*whole*/) {
    return Simd::fma(spread_float(x), w, sum);
  }
};

// Two bfloat16 inputs for float32 rows: half as many words to transpose as when they are widened
// first.
struct SplitWord {
  using Load = FloatLoad;
  static constexpr int64_t kInputs = 2;
  static constexpr int64_t kXBytes = 8;
  static QCORE_INLINE Simd::F add(Simd::F sum, const uint8_t* x, Simd::F w, bool whole) {
    sum = Simd::fma(spread_float(x), Simd::low_bf16(w), sum);
    return whole ? Simd::fma(spread_float(x + 4), Simd::high_bf16(w), sum) : sum;
  }
};

// Walks a piece of memory line by line, row after row.
struct Ahead {
  const uint8_t* line;
  const uint8_t* row_end;
  int64_t row_bytes;
  int64_t gap_bytes;  // from the end of a row to the next row

  QCORE_INLINE void call(int lines) {
#pragma GCC unroll 16
    for (int i = 0; i < lines; ++i) {
      __builtin_prefetch(line, 0, 2);
      line += kCacheLineBytes;
      if (line >= row_end) {
        line = row_end + gap_bytes;
        row_end = line + row_bytes;
      }
    }
  }
};

// Up to kRows rows of x from `row` on and Simd::kLanes outputs from `output` on.
template <class Word, int kRows>
void few_rows_of(const DenseRowsArgs& args, int64_t row, int64_t output, Ahead& ahead) {
  using Load = typename Word::Load;
  constexpr int64_t kWordBytes = Load::kBytes / Simd::kLanes;
  constexpr int kSquareLines = static_cast<int>(Simd::kLanes * Load::kBytes / kCacheLineBytes);
  const PanelSource& weight = args.weight;
  const int64_t lanes = weight.outputs - output;
  const int64_t last_row = args.rows - 1 - row;
  const uint8_t* rows[Simd::kLanes];
#pragma GCC unroll 16
  for (int o = 0; o < Simd::kLanes; ++o) {
    // Lanes without an output repeat the first one, rows that do not exist the last one; what they
    // give is not stored.
    rows[o] = weight.weight + (o < lanes ? output + o : output) * weight.stride_bytes;
  }
  const uint8_t* x[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    x[r] = args.x + (row + (r < last_row ? r : last_row)) * args.x_stride_bytes;
  }
  float* y = args.y + row * args.y_stride + output;
  Simd::F total[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const bool resume = args.resume && r <= last_row;
    total[r] = resume ? Simd::load_first(y + r * args.y_stride, lanes) : Simd::zero();
  }
  const auto add = [&](Simd::F line, int64_t word, bool whole) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      total[r] = Word::add(total[r], x[r] + word * Word::kXBytes, line, whole);
    }
  };
  const int64_t words = weight.inputs / Word::kInputs;  // whole ones
  int64_t word = 0;
  for (; word + Simd::kLanes <= words; word += Simd::kLanes) {
    Simd::F square[Simd::kLanes];
#pragma GCC unroll 16
    for (int o = 0; o < Simd::kLanes; ++o) square[o] = Load::load(rows[o] + word * kWordBytes);
    ahead.call(kSquareLines);
    Simd::transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < Simd::kLanes; ++i) add(square[i], word + i, true);
  }
  if (word * Word::kInputs < weight.inputs) {
    const int64_t bytes_left = (weight.inputs - word * Word::kInputs) * kWordBytes / Word::kInputs;
    Simd::F rest[Simd::kLanes];
    for (int o = 0; o < Simd::kLanes; ++o) {
      rest[o] = load_row<Load>(rows[o] + word * kWordBytes, bytes_left);
    }
    Simd::transpose(rest);
    for (int i = 0; (word + i) * Word::kInputs < weight.inputs; ++i) {
      add(rest[i], word + i, word + i < words);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r > last_row) break;
    if (args.bias != nullptr) {
      total[r] = Simd::add(total[r], Simd::load_first(args.bias + output, lanes));
    }
    Simd::store_first(y + r * args.y_stride, total[r], lanes);
  }
}

template <class Word>
void few_rows(const DenseRowsArgs& args) {
  const int64_t row_bytes =
      args.weight.inputs * Word::Load::kBytes / (Simd::kLanes * Word::kInputs);
  Ahead ahead{args.ahead, args.ahead + row_bytes, row_bytes, args.weight.stride_bytes - row_bytes};
  for (int64_t output = 0; output < args.weight.outputs; output += Simd::kLanes) {
    // As few passes as the registers allow.
    for (int64_t row = 0; row < args.rows;) {
      const int64_t left = args.rows - row;
      if (left > 4) {
        few_rows_of<Word, 8>(args, row, output, ahead), row += 8;
      } else if (left > 2) {
        few_rows_of<Word, 4>(args, row, output, ahead), row += 4;
      } else if (left > 1) {
        few_rows_of<Word, 2>(args, row, output, ahead), row += 2;
      } else {
        few_rows_of<Word, 1>(args, row, output, ahead), row += 1;
      }
    }
  }
}

void few_rows_floats(const DenseRowsArgs& args) {
  switch (args.weight.dtype) {
    case Dtype::kFloat32:
      return few_rows<FloatWord<FloatLoad>>(args);
    case Dtype::kBfloat16:
      return few_rows<SplitWord>(args);
    case Dtype::kFloat16:
      return few_rows<FloatWord<F16Load>>(args);
  }
}

}  // namespace
