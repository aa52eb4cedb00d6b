// A packed weight that owns its memory, so that Python and the model can share it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "kernels/packed_matmul/packed_matmul.h"

namespace qcore::bind {

// Never copied: held by std::shared_ptr, which also serves as a Linear's owner.
struct PackedWeightBuffer {
  static constexpr std::align_val_t kAlignment{64};

  explicit PackedWeightBuffer(const kernels::PackedWeightView& shape)
      : nbytes(kernels::packed_weight_bytes(shape)),
        data(static_cast<uint8_t*>(::operator new(static_cast<std::size_t>(nbytes), kAlignment))),
        view(shape) {
    view.data = data;
  }
  ~PackedWeightBuffer() { ::operator delete(data, kAlignment); }
  PackedWeightBuffer(const PackedWeightBuffer&) = delete;
  PackedWeightBuffer& operator=(const PackedWeightBuffer&) = delete;

  int64_t n_groups() const { return view.in_features / view.group_size; }

  int64_t nbytes;
  uint8_t* data;
  kernels::PackedWeightView view;
};

}  // namespace qcore::bind
