// MurmurHash3, 32 bits (Austin Appleby, public domain): the hash of shingles and n-grams.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qcore::calib {

// Of `size` bytes; the same on every machine, whatever its byte order.
uint32_t murmur3_32(const char* data, size_t size, uint32_t seed);

}  // namespace qcore::calib
