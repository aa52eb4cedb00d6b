// The floor `model`, as Python sees it.
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/backend.h"
#include "base/error.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/bind_spec.h"
#include "bind/packed_weight.h"
#include "model/backward.h"
#include "model/block.h"
#include "model/decoder.h"
#include "model/loss.h"
#include "model/parameter_gradient.h"

namespace qcore::bind {
namespace {

using model::Activations;
using model::KvCache;
using model::Linear;
using OptionalArray = std::optional<py::array>;
using TapMap = std::map<std::string, py::function>;

template <typename T>
struct Choice {
  const char* name;
  T value;
};

template <typename T, std::size_t kCount>
T parse(const Choice<T> (&choices)[kCount], const char* what, const std::string& name) {
  std::string valid;
  for (const auto& choice : choices) {
    if (name == choice.name) return choice.value;
    valid += (valid.empty() ? "\"" : ", \"") + std::string(choice.name) + "\"";
  }
  throw ArgumentError(message(what, " is \"", name, "\". Use one of: ", valid, "."));
}

constexpr Choice<Activations> kActivations[] = {{"float32", Activations::kFloat32},
                                                {"bfloat16", Activations::kBfloat16},
                                                {"int8", Activations::kInt8}};
constexpr Choice<model::TapPoint> kTaps[] = {
    {"attention_input", model::TapPoint::kAttentionInput},
    {"attention_output", model::TapPoint::kAttentionOutput},
    {"mlp_input", model::TapPoint::kMlpInput},
    {"mlp_hidden", model::TapPoint::kMlpHidden}};
constexpr Choice<model::QkNorm> kQkNorms[] = {{"none", model::QkNorm::kNone},
                                              {"per_head", model::QkNorm::kPerHead},
                                              {"whole", model::QkNorm::kWholeProjection}};
constexpr Choice<kernels::Activation> kGates[] = {{"silu", kernels::Activation::kSilu},
                                                  {"gelu_tanh", kernels::Activation::kGeluTanh},
                                                  {"gelu", kernels::Activation::kGelu}};

// A Python object that a Linear borrows from; let go of under the GIL.
std::shared_ptr<void> keep(py::object object) {
  return {new py::object(std::move(object)), [](void* held) {
            const py::gil_scoped_acquire gil;
            delete static_cast<py::object*>(held);
          }};
}

Linear make_linear(const py::object& weight, const OptionalArray& bias) {
  Linear linear;
  linear.packed = py::isinstance<PackedWeightBuffer>(weight);
  if (linear.packed) {
    linear.weight = weight.cast<const PackedWeightBuffer&>().view;
  } else {
    linear.dense = as_any_matrix(weight.cast<py::array>(), "weight");
  }
  if (bias) linear.bias = as_vector<float>(*bias, "bias", linear.out_features());
  linear.owner = keep(py::make_tuple(weight, bias ? py::object(*bias) : py::none()));
  return linear;
}

model::NormWeight norm_of(const OptionalArray& array) {
  if (!array) return {};
  const float* data = as_vector<float>(*array, "norm", array->size());
  return {data, data + array->size()};
}

using Norms = std::map<std::string, py::array>;
using ExpertMlp = std::pair<std::vector<Linear>, Linear>;

std::unique_ptr<model::Experts> make_experts(const Linear& router,
                                             const std::vector<ExpertMlp>& experts,
                                             std::vector<Linear> shared_gate, int64_t top_k,
                                             bool normalize, int64_t intermediate_size) {
  auto made = std::make_unique<model::Experts>();
  made->top_k = top_k;
  made->normalize = normalize;
  made->intermediate_size = intermediate_size;
  made->router = router;
  for (const auto& [gate_up, down] : experts) made->experts.push_back({gate_up, down});
  made->shared_gate = std::move(shared_gate);
  return made;
}

std::unique_ptr<model::Block> make_block(const model::BlockSpec& spec, std::vector<Linear> qkv,
                                         Linear output, std::vector<Linear> gate_up,
                                         const Linear* down, const Norms& norms,
                                         const model::Experts* experts) {
  const auto norm = [&](const char* role) {
    const auto found = norms.find(role);
    return norm_of(found == norms.end() ? OptionalArray() : OptionalArray(found->second));
  };
  model::BlockWeights weights;
  weights.query_key_value = std::move(qkv);
  weights.output = std::move(output);
  weights.gate_up = std::move(gate_up);
  if (down != nullptr) weights.down = *down;
  if (experts != nullptr) weights.experts = *experts;
  weights.attention_input = norm("attention_input");
  weights.attention_output = norm("attention_output");
  weights.mlp_input = norm("mlp_input");
  weights.mlp_output = norm("mlp_output");
  weights.query = norm("query");
  weights.key = norm("key");
  return std::make_unique<model::Block>(spec, std::move(weights));
}

// A read-only view of a tap's rows, without a copy; its memory lives as long as the call.
py::array view_of(const AnyMatrixView& x) {
  const bool half = x.dtype == Dtype::kBfloat16;
  const py::dtype dtype =
      half ? py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"))
           : py::dtype::of<float>();
  const int64_t item = size_in_bytes(x.dtype);
  const py::capsule nobody(&x, [](void*) {});
  py::array view(dtype, {x.rows, x.columns}, {x.row_stride * item, item}, x.data, nobody);
  view.attr("flags").attr("writeable") = false;
  return view;
}

void set_taps(const TapMap& taps, model::ForwardArgs& args) {
  const py::function* functions[model::kTapPoints] = {};
  for (const auto& [name, function] : taps) {
    const auto point = static_cast<std::size_t>(parse(kTaps, "a tap", name));
    args.tapped[point] = true;
    functions[point] = &function;
  }
  args.tap = [=](model::TapPoint point, const AnyMatrixView& x) {
    const py::gil_scoped_acquire gil;
    (*functions[static_cast<std::size_t>(point)])(view_of(x));
  };
}

// The callable, and the experts that it wants to see.
using ExpertTap = std::pair<std::vector<int64_t>, py::function>;

void set_expert_tap(const std::optional<ExpertTap>& wanted, bool every_token,
                    model::ForwardArgs& args) {
  if (!wanted) return;
  args.experts.experts = wanted->first;
  args.experts.every_token = every_token;
  const py::function* function = &wanted->second;
  args.experts.tap = [=](int64_t expert, model::ExpertPoint point, const AnyMatrixView& x,
                         const std::vector<int64_t>& tokens) {
    const py::gil_scoped_acquire gil;
    const char* name = point == model::ExpertPoint::kInput ? "input" : "hidden";
    const py::array_t<int64_t> rows(static_cast<py::ssize_t>(tokens.size()), tokens.data());
    (*function)(expert, name, view_of(x), rows);
  };
}

py::object forward(const model::Block& self, const py::array& hidden, const py::array& lengths,
                   const std::string& activations, const TapMap& taps, bool stop_after_taps,
                   const OptionalArray& out, KvCache* cache,
                   const std::optional<ExpertTap>& expert_tap, bool every_token) {
  model::ForwardArgs args;
  args.hidden = as_matrix<float>(hidden, "hidden");
  args.lengths = as_vector<int64_t>(lengths, "lengths", lengths.size());
  args.n_sequences = lengths.size();
  args.activations = parse(kActivations, "activations", activations);
  args.stop_after_taps = stop_after_taps;
  args.cache = cache;
  set_taps(taps, args);
  set_expert_tap(expert_tap, every_token, args);
  py::array result =
      out ? *out : new_array<float>({stop_after_taps ? 0 : args.hidden.rows, args.hidden.columns});
  args.out = as_output_matrix<float>(result, "out");
  const Backend backend = active_backend();
  {
    const py::gil_scoped_release nogil;
    self.forward(args, backend);
  }
  return stop_after_taps ? py::none() : py::object(result);
}

std::size_t linears_of(const model::BlockWeights& weights, model::TapPoint point) {
  if (point == model::TapPoint::kAttentionInput) return weights.query_key_value.size();
  return point == model::TapPoint::kMlpInput ? weights.gate_up.size() : 1;
}

void set_gradient_taps(const TapMap& taps, model::BackwardArgs& args) {
  const py::function* functions[model::kTapPoints] = {};
  for (const auto& [name, function] : taps) {
    const auto point = static_cast<std::size_t>(parse(kTaps, "a tap", name));
    args.tapped[point] = true;
    functions[point] = &function;
  }
  args.tap = [=](model::TapPoint point, int64_t begin, const AnyMatrixView& x,
                 MatrixView<const float> y) {
    const py::gil_scoped_acquire gil;
    const AnyMatrixView gradient{y.data, Dtype::kFloat32, y.rows, y.columns, y.row_stride};
    (*functions[static_cast<std::size_t>(point)])(begin, view_of(x), view_of(gradient));
  };
}

// One dimension, contiguous, float64, to be added to.
double* as_sums(py::array array, const char* name, std::size_t length) {
  as_vector<double>(array, name, static_cast<int64_t>(length));
  return static_cast<double*>(array.mutable_data());
}

model::NormGradients norm_gradients_of(const model::BlockWeights& weights, const Norms& sums) {
  model::NormGradients to;
  const struct {
    const char* role;
    const model::NormWeight& norm;
    double*& gradient;
  } known[] = {{"attention_input", weights.attention_input, to.attention_input},
               {"attention_output", weights.attention_output, to.attention_output},
               {"mlp_input", weights.mlp_input, to.mlp_input},
               {"mlp_output", weights.mlp_output, to.mlp_output},
               {"query", weights.query, to.query},
               {"key", weights.key, to.key}};
  std::size_t found = 0;
  for (const auto& [role, norm, gradient] : known) {
    const auto given = sums.find(role);
    if (given == sums.end()) continue;
    gradient = as_sums(given->second, role, norm.size());
    ++found;
  }
  if (found == sums.size()) return to;
  throw ArgumentError("norm_gradients names a norm that no block has.");
}

py::tuple backward(const model::Block& self, const py::array& hidden, const py::array& gradient,
                   const py::array& lengths, const std::string& activations, const TapMap& taps,
                   bool squared_norms, const OptionalArray& out, const Norms& norm_gradients) {
  model::BackwardArgs args;
  args.hidden = as_matrix<float>(hidden, "hidden");
  args.out_gradient = as_matrix<float>(gradient, "gradient");
  args.lengths = as_vector<int64_t>(lengths, "lengths", lengths.size());
  args.n_sequences = lengths.size();
  args.activations = parse(kActivations, "activations", activations);
  set_gradient_taps(taps, args);
  args.norm_gradients = norm_gradients_of(self.weights(), norm_gradients);
  py::array result = out ? *out : new_array<float>({args.hidden.rows, args.hidden.columns});
  args.gradient = as_output_matrix<float>(result, "out");
  py::dict norms;
  for (const auto& [name, point] : kTaps) {
    if (!squared_norms) break;
    const auto linears = static_cast<int64_t>(linears_of(self.weights(), point));
    auto array = new_array<float>({linears, args.hidden.rows});
    args.squared_norms[static_cast<std::size_t>(point)] =
        matrix_view(array.mutable_data(), linears, args.hidden.rows);
    norms[name] = array;
  }
  const Backend backend = active_backend();
  {
    const py::gil_scoped_release nogil;
    model::backward(self, args, backend);
  }
  return py::make_tuple(result, norms);
}

void add_scale_gradient(py::array gradient, const py::array& x, const py::array& y_gradient,
                        const py::array& codes, const py::array& zeros, int64_t group_size) {
  model::ScaleGradientArgs args;
  args.x = as_any_matrix(x, "x");
  args.y_gradient = as_matrix<float>(y_gradient, "y_gradient");
  args.gradient = as_output_matrix<float>(gradient, "gradient");
  args.group_size = group_size;
  const int64_t out_features = args.y_gradient.columns;
  args.codes = as_contiguous<uint8_t>(codes, "codes", out_features, args.x.columns);
  args.zeros = as_contiguous<uint8_t>(zeros, "zeros", out_features, args.gradient.columns);
  const Backend backend = active_backend();
  const py::gil_scoped_release nogil;
  model::add_scale_gradient(args, backend);
}

py::array_t<float> embed(const py::array& table, const py::array& token_ids, float scale) {
  const AnyMatrixView rows = as_any_matrix(table, "table");
  const int64_t n_tokens = token_ids.size();
  const int64_t* ids = as_vector<int64_t>(token_ids, "token_ids", n_tokens);
  auto hidden = new_array<float>({n_tokens, rows.columns});
  const auto out = matrix_view(hidden.mutable_data(), n_tokens, rows.columns);
  const py::gil_scoped_release nogil;
  model::embed(rows, ids, n_tokens, scale, out);
  return hidden;
}

std::unique_ptr<model::Head> make_head(const Linear& linear, const py::array& norm, float norm_eps,
                                       float softcap) {
  return std::make_unique<model::Head>(model::Head{norm_of(norm), norm_eps, linear, softcap});
}

py::array_t<float> logits(const model::Head& self, const py::array& hidden,
                          const std::string& activations) {
  const MatrixView<const float> x = as_matrix<float>(hidden, "hidden");
  const Activations mode = parse(kActivations, "activations", activations);
  const int64_t vocabulary = self.linear.out_features();
  auto result = new_array<float>({x.rows, vocabulary});
  const auto out = matrix_view(result.mutable_data(), x.rows, vocabulary);
  const Backend backend = active_backend();
  const py::gil_scoped_release nogil;
  model::head_logits(self, x, out, mode, backend);
  return result;
}

py::tuple run_loss(const model::Head& self, model::LossArgs& args,
                   const OptionalArray& norm_gradient) {
  if (norm_gradient) {
    args.norm_gradient = as_sums(*norm_gradient, "norm_gradient", self.norm.size());
  }
  auto gradient = new_array<float>({args.hidden.rows, args.hidden.columns});
  auto losses = new_array<double>({args.hidden.rows});
  args.gradient = matrix_view(gradient.mutable_data(), args.hidden.rows, args.hidden.columns);
  args.losses = losses.mutable_data();
  const Backend backend = active_backend();
  {
    const py::gil_scoped_release nogil;
    model::loss_gradient(self, args, backend);
  }
  return py::make_tuple(gradient, losses);
}

py::tuple own_loss(const model::Head& self, const py::array& hidden, const py::array& draws,
                   const std::string& activations, const OptionalArray& norm_gradient) {
  model::LossArgs args;
  args.hidden = as_matrix<float>(hidden, "hidden");
  args.draws = as_vector<double>(draws, "draws", args.hidden.rows);
  args.activations = parse(kActivations, "activations", activations);
  return run_loss(self, args, norm_gradient);
}

py::tuple kl_loss(const model::Head& self, const py::array& hidden, const model::Head& base,
                  const py::array& base_hidden, const std::string& activations,
                  const OptionalArray& norm_gradient) {
  model::LossArgs args;
  args.hidden = as_matrix<float>(hidden, "hidden");
  args.base = &base;
  args.base_hidden = as_matrix<float>(base_hidden, "base_hidden");
  args.activations = parse(kActivations, "activations", activations);
  return run_loss(self, args, norm_gradient);
}

py::list cache_lengths(const KvCache& self) {
  py::list lengths;
  for (int64_t s = 0; s < self.n_sequences(); ++s) lengths.append(self.length(s));
  return lengths;
}

void bind_spec(py::module_& module) {
  using model::BlockSpec;
  py::class_<BlockSpec>(module, "BlockSpec", "One decoder block as data; decoder_spec.h.")
      .def(py::init<>())
      .def_readwrite("hidden_size", &BlockSpec::hidden_size)
      .def_readwrite("n_heads", &BlockSpec::n_heads)
      .def_readwrite("n_kv_heads", &BlockSpec::n_kv_heads)
      .def_readwrite("head_dim", &BlockSpec::head_dim)
      .def_readwrite("intermediate_size", &BlockSpec::intermediate_size)
      .def_readwrite("norm_eps", &BlockSpec::norm_eps)
      .def_readwrite("attention_scale", &BlockSpec::attention_scale)
      .def_readwrite("attention_softcap", &BlockSpec::attention_softcap)
      .def_readwrite("window", &BlockSpec::window)
      .def_readwrite("inverse_frequencies", &BlockSpec::inverse_frequencies)
      .def_readwrite("rotary_factor", &BlockSpec::rotary_factor)
      .def("set_qk_norm",
           [](BlockSpec& self, const std::string& name) {
             self.qk_norm = parse(kQkNorms, "qk_norm", name);
           })
      .def("set_activation", [](BlockSpec& self, const std::string& name) {
        self.activation = parse(kGates, "activation", name);
      });
}

}  // namespace

void bind_model(py::module_& module) {
  bind_spec(module);
  py::class_<Linear>(module, "Linear", "A dense array or a PackedWeight, and a bias.")
      .def(py::init(&make_linear), py::arg("weight"), py::arg("bias") = py::none());
  py::class_<KvCache>(module, "KvCache", "Keys and values of one block.")
      .def(py::init<int64_t, int64_t>(), py::arg("n_sequences"), py::arg("width"))
      .def_property_readonly("lengths", &cache_lengths);
  py::class_<model::Experts>(module, "Experts", "Router and experts of a block; experts.h.")
      .def(py::init(&make_experts), py::arg("router"), py::arg("experts"), py::arg("shared_gate"),
           py::arg("top_k"), py::arg("normalize"), py::arg("intermediate_size"));
  py::class_<model::Block>(module, "DecoderBlock", "One decoder block.")
      .def(py::init(&make_block), py::arg("spec"), py::arg("query_key_value"), py::arg("output"),
           py::arg("gate_up"), py::arg("down").none(true), py::arg("norms"),
           py::arg("experts") = nullptr)
      .def("forward", &forward, py::arg("hidden"), py::arg("lengths"),
           py::arg("activations") = "float32", py::arg("taps") = TapMap(),
           py::arg("stop_after_taps") = false, py::arg("out") = py::none(),
           py::arg("cache") = nullptr, py::arg("expert_tap") = py::none(),
           py::arg("every_token") = false, "Hidden states behind the block; None after taps alone.")
      .def("backward", &backward, py::arg("hidden"), py::arg("gradient"), py::arg("lengths"),
           py::arg("activations") = "float32", py::arg("taps") = TapMap(),
           py::arg("squared_norms") = false, py::arg("out") = py::none(),
           py::arg("norm_gradients") = Norms(),
           "d loss / d hidden, and tap -> |d loss / d y|² (linears, n_tokens).");
  py::class_<model::Head>(module, "Head", "Final norm, output head, soft cap.")
      .def(py::init(&make_head), py::arg("linear"), py::arg("norm"), py::arg("norm_eps"),
           py::arg("softcap") = 0.0f)
      .def("logits", &logits, py::arg("hidden"), py::arg("activations") = "float32")
      .def("own_loss", &own_loss, py::arg("hidden"), py::arg("draws"),
           py::arg("activations") = "float32", py::arg("norm_gradient") = py::none(),
           "Gradient and -log p(label) of each token; the draws pick labels from p.")
      .def("kl_loss", &kl_loss, py::arg("hidden"), py::arg("base"), py::arg("base_hidden"),
           py::arg("activations") = "float32", py::arg("norm_gradient") = py::none(),
           "Gradient and KL(base || self) of each token.");
  module.def("add_scale_gradient", &add_scale_gradient, py::arg("gradient"), py::arg("x"),
             py::arg("y_gradient"), py::arg("codes"), py::arg("zeros"), py::arg("group_size"),
             "Adds d loss / d scale of every group of a layer, for one run of tokens.");
  module.def("embed", &embed, py::arg("table"), py::arg("token_ids"), py::arg("scale") = 1.0f,
             "Rows of the embedding, scaled, in float32.");
}

}  // namespace qcore::bind
