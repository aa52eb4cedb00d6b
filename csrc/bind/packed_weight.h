// A packed weight that owns its memory, so that Python and the model can share it.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/blocks.h"
#include "kernels/packed_matmul/packed_matmul.h"
#include "quant/spec.h"

namespace qcore::bind {

// Never copied: held by std::shared_ptr, which also serves as a Linear's owner.
struct PackedWeightBuffer {
  explicit PackedWeightBuffer(const kernels::PackedWeightView& shape)
      : nbytes(kernels::packed_weight_bytes(shape)), memory(nbytes), view(shape) {
    view.data = data();
  }
  PackedWeightBuffer(const PackedWeightBuffer&) = delete;
  PackedWeightBuffer& operator=(const PackedWeightBuffer&) = delete;

  uint8_t* data() const { return memory.as<uint8_t>(); }
  int64_t n_groups() const { return group_count(view.in_features, view.group_size); }

  int64_t nbytes;
  kernels::AlignedBuffer memory;
  kernels::PackedWeightView view;
};

}  // namespace qcore::bind
