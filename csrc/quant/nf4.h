// NF4: 16 values at quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E), the
// weight's largest magnitude in a group as the scale.
//
//   weight ≈ scale · kNf4Table[code]
#pragma once

#include <cstdint>

#include "base/half.h"

namespace qcore {

constexpr int kNf4Bits = 4;
constexpr int kNf4Codes = 1 << kNf4Bits;
constexpr uint8_t kNf4Zero = 7;  // the code of 0.0

// bitsandbytes' numbers.
constexpr float kNf4Table[kNf4Codes] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// weight (rows, columns) -> codes (rows, columns) and scales (rows, n_groups). The code is the
// nearest entry of weight / scale, the lower one of two equally near. Scales are exact in
// scale_dtype; a group of zeros has scale 1. Throws NumericalError for a weight that is not finite
// or a scale that overflows.
void quantize_nf4(const float* weight, int64_t rows, int64_t columns, int64_t group_size,
                  Dtype scale_dtype, uint8_t* codes, float* scales);

// out (rows, columns) = scale · kNf4Table[code], rounded once to float32; codes are below 16.
void dequantize_nf4(const uint8_t* codes, const float* scales, int64_t rows, int64_t columns,
                    int64_t group_size, float* out);

}  // namespace qcore
