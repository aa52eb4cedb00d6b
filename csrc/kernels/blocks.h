// How the fast matrix products cut their work, and the memory they work in.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <vector>

namespace qcore::kernels {

// Rows [row, row + rows) and outputs [output, output + outputs) of y; `output` is a multiple of
// kPanelOutputs.
struct Block {
  int64_t row;
  int64_t rows;
  int64_t output;
  int64_t outputs;
};

// Cuts y (n_tokens, out_features) into blocks and runs them in parallel, or in one piece when that
// is not worth waking threads. A block's result must not depend on how it was cut.
void for_each_block(int64_t n_tokens, int64_t out_features, int64_t in_features,
                    const std::function<void(const Block&)>& body);

// The same for several weights that read one x, in one parallel region: body(w, block) for every
// block of weight w.
void for_each_block(int64_t n_tokens, const std::vector<int64_t>& out_features, int64_t in_features,
                    const std::function<void(int64_t, const Block&)>& body);

// Uninitialized memory at a multiple of 64 bytes. Large pieces ask for pages of 2 MiB: a stream of
// weights otherwise loses up to half of the memory's speed to address translation.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t bytes);

  int64_t bytes() const { return bytes_; }
  template <typename T>
  T* as(int64_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(data_.get() + offset_bytes);
  }

 private:
  struct Free {
    std::align_val_t alignment;
    void operator()(uint8_t* data) const;
  };
  std::unique_ptr<uint8_t, Free> data_{nullptr, Free{}};
  int64_t bytes_ = 0;
};

// At least `bytes` bytes that belong to the calling thread, kept for its next block. A body of
// for_each_block asks once.
const AlignedBuffer& thread_scratch(int64_t bytes);

}  // namespace qcore::kernels
