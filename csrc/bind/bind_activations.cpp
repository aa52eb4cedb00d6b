// The kernels that work on activations, as Python sees them; private, for the tests and `eval`.
#include <pybind11/stl.h>

#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "base/backend.h"
#include "base/error.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "kernels/attention/attention.h"
#include "kernels/attention_backward/attention_backward.h"
#include "kernels/compare_logits/compare_logits.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/gram/gram.h"
#include "kernels/logit_gradient/logit_gradient.h"
#include "model/kv_cache.h"

namespace qcore::bind {
namespace {

// Adds to `out`, or to zeros.
py::array gram(const py::array& x, double factor, const std::optional<py::array>& out) {
  const AnyMatrixView view = as_any_matrix(x, "x");
  const int64_t k = view.columns;
  py::array sums =
      out ? *out : py::array(py::module_::import("numpy").attr("zeros")(py::make_tuple(k, k)));
  require_shape(sums, "out", k, k);
  const MatrixView<double> to = as_output_matrix<double>(sums, "out");
  if (k > 1 && to.row_stride != k) throw DtypeError("out is not contiguous. Pass a whole array.");
  const kernels::GramArgs args{view.data, view.dtype, view.row_stride, view.rows,
                               k,         factor,     to.data};
  const py::gil_scoped_release nogil;
  kernels::gram(args, active_backend());
  return sums;
}

// Keys and values of stacked sequences in pages, and the sequences of q that read them.
class StackedSequences {
 public:
  StackedSequences(const kernels::AttentionKeys& keys, const MatrixView<const float>& q,
                   const MatrixView<const float>& k, const MatrixView<const float>& v,
                   const MatrixView<float>& out, const std::vector<int64_t>& n_queries,
                   const std::vector<int64_t>& n_keys) {
    if (n_queries.size() != n_keys.size()) {
      throw ArgumentError(message("n_queries names ", n_queries.size(), " sequences and n_keys ",
                                  n_keys.size(), ". They must be as many."));
    }
    int64_t query = 0;
    int64_t key = 0;
    for (size_t s = 0; s < n_queries.size(); ++s) {
      if (n_queries[s] < 0 || n_keys[s] < 0 || n_queries[s] > q.rows - query ||
          n_keys[s] > k.rows - key) {
        throw ArgumentError("n_queries or n_keys add up to more rows than q or k has.");
      }
      caches_.emplace_back(1, k.columns);
      caches_.back().keep_as(keys);
      caches_.back().append(0, k.row(key), v.row(key), k.row_stride, n_keys[s]);
      sequences_.push_back(
          {q.row(query), caches_.back().pages(0), out.row(query), n_queries[s], n_keys[s]});
      query += n_queries[s];
      key += n_keys[s];
    }
    if (query != q.rows || key != k.rows) {
      throw ArgumentError(message("n_queries and n_keys add up to ", query, " and ", key,
                                  " rows; q has ", q.rows, " and k ", k.rows, "."));
    }
  }

  const kernels::AttentionSequence* data() const { return sequences_.data(); }
  int64_t size() const { return static_cast<int64_t>(sequences_.size()); }

 private:
  std::vector<model::KvCache> caches_;
  std::vector<kernels::AttentionSequence> sequences_;
};

Dtype key_dtype(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBfloat16;
  throw ArgumentError(message("keys is \"", name, "\". Use one of: float32, bfloat16."));
}

py::array_t<float> attention(const py::array& q, const py::array& k, const py::array& v,
                             const std::vector<int64_t>& n_queries,
                             const std::vector<int64_t>& n_keys, int64_t n_heads,
                             int64_t n_kv_heads, float scale, float softcap, int64_t window,
                             const std::string& keys) {
  const auto qs = as_matrix<float>(q, "q");
  const auto ks = as_matrix<float>(k, "k");
  const auto vs = as_matrix<float>(v, "v");
  if (n_heads < 1 || n_kv_heads < 1 || qs.columns % n_heads != 0) {
    throw ArgumentError(message("q has ", qs.columns, " columns for ", n_heads, " heads."));
  }
  kernels::AttentionArgs args;
  args.keys = {key_dtype(keys), n_kv_heads, qs.columns / n_heads};
  require_shape(k, "k", -1, n_kv_heads * args.keys.head_dim);
  require_shape(v, "v", ks.rows, n_kv_heads * args.keys.head_dim);
  if (ks.rows > 1 && ks.row_stride != vs.row_stride) {
    throw DtypeError("k and v have different strides. Pass both C-contiguous.");
  }
  auto out = new_array<float>({qs.rows, qs.columns});
  const auto outs = matrix_view(out.mutable_data(), qs.rows, qs.columns);
  const StackedSequences sequences(args.keys, qs, ks, vs, outs, n_queries, n_keys);
  args.sequences = sequences.data();
  args.n_sequences = sequences.size();
  args.n_heads = n_heads;
  args.q_stride = qs.row_stride;
  args.out_stride = outs.row_stride;
  args.scale = scale;
  args.softcap = softcap;
  args.window = window;
  const py::gil_scoped_release nogil;
  kernels::attention(args, active_backend());
  return out;
}

py::array_t<float> rms_norm(const py::array& x, const py::array& weight, float eps) {
  const auto xs = as_matrix<float>(x, "x");
  const float* w = as_vector<float>(weight, "weight", xs.columns);
  auto out = new_array<float>({xs.rows, xs.columns});
  const kernels::RmsNormArgs args{xs.data,    xs.row_stride, w,         eps, out.mutable_data(),
                                  xs.columns, xs.rows,       xs.columns};
  const py::gil_scoped_release nogil;
  kernels::rms_norm(args, active_backend());
  return out;
}

void rotary(py::array x, const py::array& cos, const py::array& sin, const py::array& positions,
            int64_t n_heads) {
  const auto xs = as_output_matrix<float>(x, "x");
  const auto cosines = as_matrix<float>(cos, "cos");
  const auto sines = as_matrix<float>(sin, "sin");
  require_shape(sin, "sin", cosines.rows, cosines.columns);
  const int64_t* rows = as_vector<int64_t>(positions, "positions", xs.rows);
  if (n_heads < 1 || xs.columns % n_heads != 0) {
    throw ArgumentError(message("x has ", xs.columns, " columns for ", n_heads, " heads."));
  }
  if (cosines.row_stride != cosines.columns || sines.row_stride != sines.columns) {
    throw DtypeError("cos or sin is not C-contiguous. Pass np.ascontiguousarray of it.");
  }
  for (int64_t r = 0; r < xs.rows; ++r) {
    if (rows[r] >= 0 && rows[r] < cosines.rows) continue;
    throw ArgumentError(
        message("positions[", r, "] is ", rows[r], "; cos has ", cosines.rows, " rows."));
  }
  const kernels::RotaryArgs args{xs.data,    xs.row_stride,        xs.rows,
                                 n_heads,    xs.columns / n_heads, cosines.data,
                                 sines.data, cosines.columns,      rows};
  const py::gil_scoped_release nogil;
  kernels::rotary(args, active_backend());
}

kernels::Activation activation_named(const std::string& name) {
  if (name == "silu") return kernels::Activation::kSilu;
  if (name == "gelu_tanh") return kernels::Activation::kGeluTanh;
  if (name == "gelu") return kernels::Activation::kGelu;
  throw ArgumentError(message("activation is \"", name, "\". Use one of: silu, gelu_tanh, gelu."));
}

py::array_t<float> gated_activation(const py::array& gate, const py::array& up,
                                    const std::string& activation) {
  const auto gates = as_matrix<float>(gate, "gate");
  const auto ups = as_matrix<float>(up, "up");
  require_shape(up, "up", gates.rows, gates.columns);
  auto out = new_array<float>({gates.rows, gates.columns});
  const kernels::GatedActivationArgs args{
      gates.data,     gates.row_stride,   ups.data,
      ups.row_stride, out.mutable_data(), gates.columns,
      gates.rows,     gates.columns,      activation_named(activation)};
  const py::gil_scoped_release nogil;
  kernels::gated_activation(args, active_backend());
  return out;
}

const float* contiguous_logits(const py::array& array, const char* name, int64_t rows,
                               int64_t vocabulary) {
  const auto view = as_matrix<float>(array, name);
  require_shape(array, name, rows, vocabulary);
  if (view.rows > 1 && view.row_stride != view.columns) {
    throw DtypeError(message(name, " is not C-contiguous. Pass np.ascontiguousarray(", name, ")."));
  }
  return view.data;
}

py::dict compare_logits(const py::array& base, const std::optional<py::array>& other,
                        const py::array& targets) {
  kernels::CompareLogitsArgs args;
  args.base = contiguous_logits(base, "base", -1, -1);
  args.rows = base.shape(0);
  args.vocabulary = base.shape(1);
  if (other) args.other = contiguous_logits(*other, "other", args.rows, args.vocabulary);
  args.targets = as_vector<int64_t>(targets, "targets", args.rows);
  py::dict results;
  const auto add = [&](const char* name) {
    auto array = new_array<double>({args.rows});
    results[name] = array;
    return array.mutable_data();
  };
  args.base_nll = add("base_nll");
  args.base_top_probability = add("base_top_probability");
  if (other) {
    args.other_nll = add("other_nll");
    args.kl = add("kl");
    auto same = new_array<uint8_t>({args.rows});
    results["same_top"] = same;
    args.same_top = same.mutable_data();
  }
  const py::gil_scoped_release nogil;
  kernels::compare_logits(args, active_backend());
  return results;
}

// q, k and v side by side in one matrix, as a block has them; so is the result.
py::array_t<float> attention_backward(const py::array& qkv, const py::array& out_gradient,
                                      const std::vector<int64_t>& lengths, int64_t n_heads,
                                      int64_t n_kv_heads, float scale, float softcap,
                                      int64_t window) {
  const auto states = as_matrix<float>(qkv, "qkv");
  const auto gradient = as_matrix<float>(out_gradient, "out_gradient");
  const int64_t heads = n_heads + 2 * n_kv_heads;
  if (n_heads < 1 || n_kv_heads < 1 || states.columns % heads != 0) {
    throw ArgumentError(message("qkv has ", states.columns, " columns for ", heads, " heads."));
  }
  const int64_t head_dim = states.columns / heads;
  require_shape(out_gradient, "out_gradient", states.rows, n_heads * head_dim);
  if (std::accumulate(lengths.begin(), lengths.end(), int64_t{0}) != states.rows) {
    throw ArgumentError(message("lengths do not add up to the ", states.rows, " rows of qkv."));
  }
  auto out = new_array<float>({states.rows, states.columns});
  kernels::AttentionBackwardArgs args;
  args.q = states.data;
  args.k = args.q + n_heads * head_dim;
  args.v = args.k + n_kv_heads * head_dim;
  args.stride = states.row_stride;
  args.out_gradient = gradient.data;
  args.out_gradient_stride = gradient.row_stride;
  args.q_gradient = out.mutable_data();
  args.k_gradient = args.q_gradient + n_heads * head_dim;
  args.v_gradient = args.k_gradient + n_kv_heads * head_dim;
  args.gradient_stride = states.columns;
  args.lengths = lengths.data();
  args.n_sequences = static_cast<int64_t>(lengths.size());
  args.n_heads = n_heads;
  args.n_kv_heads = n_kv_heads;
  args.head_dim = head_dim;
  args.scale = scale;
  args.softcap = softcap;
  args.window = window;
  const py::gil_scoped_release nogil;
  kernels::attention_backward(args, active_backend());
  return out;
}

py::array_t<float> rms_norm_backward(const py::array& x, const py::array& weight, float eps,
                                     const py::array& gradient) {
  const auto xs = as_matrix<float>(x, "x");
  const float* w = as_vector<float>(weight, "weight", xs.columns);
  const auto gradients = as_matrix<float>(gradient, "gradient");
  require_shape(gradient, "gradient", xs.rows, xs.columns);
  auto out = new_array<float>({xs.rows, xs.columns});
  const kernels::RmsNormBackwardArgs args{xs.data,
                                          xs.row_stride,
                                          w,
                                          eps,
                                          gradients.data,
                                          gradients.row_stride,
                                          out.mutable_data(),
                                          xs.columns,
                                          false,
                                          xs.rows,
                                          xs.columns};
  const py::gil_scoped_release nogil;
  kernels::rms_norm_backward(args, active_backend());
  return out;
}

py::tuple gated_activation_backward(const py::array& gate, const py::array& up,
                                    const py::array& gradient, const std::string& activation) {
  const auto gates = as_matrix<float>(gate, "gate");
  const auto ups = as_matrix<float>(up, "up");
  const auto gradients = as_matrix<float>(gradient, "gradient");
  require_shape(up, "up", gates.rows, gates.columns);
  require_shape(gradient, "gradient", gates.rows, gates.columns);
  auto of_gate = new_array<float>({gates.rows, gates.columns});
  auto of_up = new_array<float>({gates.rows, gates.columns});
  const kernels::GatedActivationBackwardArgs args{gates.data,
                                                  gates.row_stride,
                                                  ups.data,
                                                  ups.row_stride,
                                                  gradients.data,
                                                  gradients.row_stride,
                                                  of_gate.mutable_data(),
                                                  gates.columns,
                                                  of_up.mutable_data(),
                                                  gates.columns,
                                                  gates.rows,
                                                  gates.columns,
                                                  activation_named(activation)};
  {
    const py::gil_scoped_release nogil;
    kernels::gated_activation_backward(args, active_backend());
  }
  return py::make_tuple(of_gate, of_up);
}

py::array_t<double> logit_gradient(py::array logits, const std::optional<py::array>& base,
                                   const std::optional<py::array>& draws, float softcap) {
  const auto out = as_output_matrix<float>(logits, "logits");
  contiguous_logits(logits, "logits", -1, -1);
  if (base.has_value() == draws.has_value()) {
    throw ArgumentError("logit_gradient: pass either base or draws.");
  }
  auto losses = new_array<double>({out.rows});
  kernels::LogitGradientArgs args;
  args.logits = out.data;
  args.rows = out.rows;
  args.vocabulary = out.columns;
  args.softcap = softcap;
  args.losses = losses.mutable_data();
  if (base) args.base = contiguous_logits(*base, "base", out.rows, out.columns);
  if (draws) args.draws = as_vector<double>(*draws, "draws", out.rows);
  const py::gil_scoped_release nogil;
  kernels::logit_gradient(args, active_backend());
  return losses;
}

}  // namespace

void bind_activations(py::module_& module) {
  module.def("gram", &gram, py::arg("x"), py::arg("factor") = 1.0, py::arg("out") = py::none(),
             "out (zeros) + factor · xᵀ · x in float64, upper triangle; the rest stays.");
  module.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("n_queries"), py::arg("n_keys"), py::arg("n_heads"), py::arg("n_kv_heads"),
             py::arg("scale"), py::arg("softcap") = 0.0f, py::arg("window") = 0,
             py::arg("keys") = "float32", "Causal attention over sequences stacked row by row.");
  module.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"),
             "weight · x / sqrt(mean(x²) + eps), row by row.");
  module.def("rotary", &rotary, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("positions"),
             py::arg("n_heads"), "Rotates the heads of x in place.");
  module.def("gated_activation", &gated_activation, py::arg("gate"), py::arg("up"),
             py::arg("activation") = "silu", "activation(gate) · up.");
  module.def("compare_logits", &compare_logits, py::arg("base"), py::arg("other"),
             py::arg("targets"), "How far other's next-token distributions are from base's.");
  module.def("attention_backward", &attention_backward, py::arg("qkv"), py::arg("out_gradient"),
             py::arg("lengths"), py::arg("n_heads"), py::arg("n_kv_heads"), py::arg("scale"),
             py::arg("softcap") = 0.0f, py::arg("window") = 0,
             "The gradient of attention with respect to qkv.");
  module.def("rms_norm_backward", &rms_norm_backward, py::arg("x"), py::arg("weight"),
             py::arg("eps"), py::arg("gradient"), "The gradient of rms_norm with respect to x.");
  module.def("gated_activation_backward", &gated_activation_backward, py::arg("gate"),
             py::arg("up"), py::arg("gradient"), py::arg("activation") = "silu",
             "The gradients of gated_activation with respect to gate and up.");
  module.def("logit_gradient", &logit_gradient, py::arg("logits"), py::arg("base") = py::none(),
             py::arg("draws") = py::none(), py::arg("softcap") = 0.0f,
             "Logits become the gradient of a loss with respect to them; returns the losses.");
}

}  // namespace qcore::bind
