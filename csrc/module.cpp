// The Python face of the kernels: gossamer.kernels._native. Tensors come as addresses; native.py checks them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "block_attention.h"
#include "clock.h"
#include "decoder.h"
#include "driver.h"
#include "reading.h"
#include "threads.h"
#include "validate.h"

namespace nb = nanobind;
using gossamer::Packed;
using gossamer::Program;
using gossamer::Selected;

namespace {

std::vector<std::string> tier_names(bool all) {
    int count;
    const gossamer::Tier* tiers = gossamer::tiers(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; i++)
        if (all || tiers[i].runs_here()) names.emplace_back(tiers[i].name);
    return names;
}

int tier_index(const std::string& name) {
    int count;
    const gossamer::Tier* tiers = gossamer::tiers(&count);
    for (int i = 0; i < count; i++)
        if (name == tiers[i].name && tiers[i].runs_here()) return i;
    return -1;
}

const gossamer::Tier& tier_of(int index) {
    int count;
    const gossamer::Tier* tiers = gossamer::tiers(&count);
    if (index < 0 || index >= count || !tiers[index].runs_here()) throw nb::value_error("no such tier");
    return tiers[index];
}

void check_fit(const gossamer::DecoderModel& model, const gossamer::Cache& cache,
               const gossamer::Gates* gates) {
    if (!model.owns(cache)) throw nb::value_error("a cache of another model");
    if (gates && gates->layers() != int64_t(model.layers.size()))
        throw nb::value_error("gates of another model");
}

gossamer::Linear linear_of(const Program& program, uintptr_t bias) {
    return {program, reinterpret_cast<const float*>(bias)};
}

}  // namespace

NB_MODULE(_native, m) {
    gossamer::team_kind();  // from now on forks are seen, before any kernel has run

    nb::class_<Selected>(m, "Packed")
        .def("__init__",
             [](Selected* self, int64_t out, int64_t in, int layout, int values, int keep, int parts,
                uintptr_t data, int64_t data_bytes, uintptr_t masks, uintptr_t scales, uintptr_t offsets) {
                 auto bytes = reinterpret_cast<const uint8_t*>(data);
                 new (self) Selected(Packed{
                     out, in, gossamer::panels_of(layout, out),
                     (in + gossamer::kGroup - 1) / gossamer::kGroup, layout, values, keep, parts, bytes,
                     bytes + data_bytes, reinterpret_cast<const uint64_t*>(masks),
                     reinterpret_cast<const uint16_t*>(scales), reinterpret_cast<const int64_t*>(offsets)});
             })
        .def(
            "check", [](const Selected& w, int threads) { return gossamer::check(w, threads); },
            nb::call_guard<nb::gil_scoped_release>(),
            "An empty string, or what is wrong with the packed bytes.")
        .def(
            "reading",
            [](const Selected& w, uintptr_t inputs, int64_t width) {
                return Selected(w, reinterpret_cast<const int32_t*>(inputs), width);
            },
            "The weight where its inputs are those of a list, int32, out of `width`.")
        .def("check_inputs", &gossamer::check_inputs, "An empty string, or what is wrong with the list.");
    nb::class_<Program>(m, "Program")
        .def(nb::init<>())
        .def("begin_stage", &Program::begin_stage)
        .def("add_term", &Program::add_term,
             "To the stage begun last; the weight's sections must outlive it.")
        .def("check", &Program::check, "An empty string, or which term does not fit.")
        .def_prop_ro("in_features", &Program::in)
        .def_prop_ro("out_features", &Program::out);
    nb::class_<gossamer::Cache>(m, "Cache")
        .def(
            "__init__",
            [](gossamer::Cache* self, int64_t layers, int64_t kv_heads, int64_t head_dim, int type,
               std::array<int, 6> how, std::vector<float> start, int64_t key_rank, const nb::bytes& vectors,
               std::vector<float> frequencies, float scale, std::vector<bool> rotates) {
                const auto [bits, rank, key_most, key_least, value_most, value_least] = how;
                const gossamer::Compression compression{
                    bits, rank, {key_most, key_least}, {value_most, value_least}};
                const bool packed = type == gossamer::kCachePacked;
                if (type < 0 || type > gossamer::kCachePacked ||
                    (packed && !gossamer::compresses(compression, head_dim)) ||
                    int64_t(start.size()) != (packed ? rank * head_dim : 0))
                    throw nb::value_error("no such type of cache");
                const bool low = packed && key_rank > 0;
                if ((!packed && key_rank) || key_rank < 0 || key_rank > gossamer::kMostKeyRank ||
                    int64_t(vectors.size()) != 4 * layers * kv_heads * head_dim * key_rank ||
                    (low && (head_dim % 2 || int64_t(frequencies.size()) != head_dim / 2 ||
                             int64_t(rotates.size()) != layers)))
                    throw nb::value_error("no such basis of keys");
                std::vector<float> numbers(vectors.size() / 4);
                if (!numbers.empty()) std::memcpy(numbers.data(), vectors.c_str(), vectors.size());
                new (self) gossamer::Cache(layers, kv_heads, head_dim, gossamer::CacheType(type), compression,
                                           std::move(start),
                                           {key_rank, std::move(numbers), std::move(frequencies), scale,
                                            std::vector<char>(rotates.begin(), rotates.end())});
            },
            nb::arg("layers"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("type"),
            nb::arg("how") = std::array<int, 6>{}, nb::arg("start") = std::vector<float>(),
            nb::arg("key_rank") = 0, nb::arg("vectors") = nb::bytes("", 0),
            nb::arg("frequencies") = std::vector<float>(), nb::arg("scale") = 1.0f,
            nb::arg("rotates") = std::vector<bool>(),
            "Of layers, heads of keys, and numbers of a head; type 0: float32, 1: bfloat16, 2: int8, 3: "
            "packed, "
            "with bits, rank, and outliers of keys (most, least) and of values, and where power iteration "
            "starts, [rank][head_dim]; and keys in low rank, with float32 vectors "
            "[layer][head][number][rank], the "
            "frequencies and scale of rotations, and which layers rotate.")
        .def_prop_ro("length", &gossamer::Cache::length)
        .def_prop_ro("nbytes", &gossamer::Cache::bytes)
        .def_prop_ro("token_bytes", &gossamer::Cache::token_bytes, "Of a position, but for a tail.")
        .def("truncate", &gossamer::Cache::truncate, "Forgets all but the first positions.");
    nb::class_<gossamer::Gates>(m, "Gates")
        .def(nb::init<int64_t>(), "Of layers, none of them gated yet.")
        .def(
            "set",
            [](gossamer::Gates& self, int64_t layer, int site, float threshold, int64_t pruned,
               uintptr_t importance) {
                if (layer < 0 || layer >= self.layers() || site < 0 || site >= gossamer::kSites)
                    throw nb::value_error("no such site");
                self.set(layer, gossamer::Site(site),
                         {true, threshold, pruned, reinterpret_cast<const float*>(importance)});
            },
            "Sites: what q, k, v, o, gate, up and down read, and what the activation gives; pruned: "
            "activations "
            "that each row loses, or -1 where the threshold says.")
        .def("dropped", [](const gossamer::Gates& self, int64_t layer,
                           int site) { return self.dropped(layer, gossamer::Site(site)); })
        .def_prop_ro("tokens", &gossamer::Gates::tokens, "That have run with them.");
    nb::class_<gossamer::Policy>(m, "Policy")
        .def(
            "__init__",
            [](gossamer::Policy* self, int64_t layers, int64_t heads,
               const std::vector<std::array<int64_t, gossamer::kPolicyNumbers>>& rows, int64_t kv_heads,
               std::vector<int32_t> labels, uintptr_t gates, int64_t gates_count, int64_t gate_dim) {
                std::vector<gossamer::HeadPolicy> of_heads;
                for (const auto& r : rows)
                    of_heads.push_back({r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9]});
                const float* from = reinterpret_cast<const float*>(gates);
                new (self) gossamer::Policy(layers, heads, std::move(of_heads),
                                            gossamer::Labels(layers, kv_heads, std::move(labels)),
                                            {from, from + gates_count * gate_dim * gate_dim}, gate_dim);
            },
            nb::arg("layers"), nb::arg("heads"), nb::arg("rows"), nb::arg("kv_heads") = 0,
            nb::arg("labels") = std::vector<int32_t>(), nb::arg("gates") = 0, nb::arg("gates_count") = 0,
            nb::arg("gate_dim") = 0,
            "Of one sequence; for each head of each layer the numbers of HeadPolicy (csrc/policy.h); labels: "
            "channels of each head of keys of each layer; gates: float32 [count][dim][dim].")
        .def_prop_ro("nbytes", &gossamer::Policy::bytes, "Of labels.")
        .def("check", &gossamer::Policy::check, "An empty string, or what is wrong.")
        .def_prop_ro("looked", &gossamer::Policy::looked, "Blocks that were looked at so far.")
        .def_prop_ro("there", &gossamer::Policy::there, "Those that dense attention would have looked at.");
    nb::class_<gossamer::Mixture>(m, "Mixture")
        .def(
            "__init__",
            [](gossamer::Mixture* self, const Program& router, uintptr_t bias, int64_t each,
               bool normalised) { new (self) gossamer::Mixture(linear_of(router, bias), each, normalised); },
            "each: experts that a token goes to; normalised: whether their weights "
            "add up to 1.")
        .def(
            "add",
            [](gossamer::Mixture& self, const Program& inner, uintptr_t inner_bias, const Program& down,
               uintptr_t down_bias) { self.add({linear_of(inner, inner_bias), linear_of(down, down_bias)}); },
            "An expert: gate and up, one behind the other, and down.");
    nb::class_<gossamer::DecoderModel>(m, "DecoderModel")
        .def(
            "__init__",
            [](gossamer::DecoderModel* self, std::vector<int64_t> sizes, std::vector<float> numbers,
               uintptr_t frequencies, uintptr_t norm, const Selected& embedding, const Selected& head,
               uintptr_t head_bias) {
                if (sizes.size() != 6 || numbers.size() != 4) throw nb::value_error("6 sizes and 4 numbers");
                new (self) gossamer::DecoderModel{sizes[0],
                                                  sizes[1],
                                                  sizes[2],
                                                  sizes[3],
                                                  sizes[4],
                                                  sizes[5],
                                                  numbers[0],
                                                  numbers[1],
                                                  numbers[2],
                                                  reinterpret_cast<const float*>(frequencies),
                                                  reinterpret_cast<const float*>(norm),
                                                  embedding,
                                                  numbers[3],
                                                  {head, reinterpret_cast<const float*>(head_bias)},
                                                  {}};
            },
            "sizes: hidden, inner, heads, kv_heads, head_dim, vocabulary; numbers: eps, scale of scores, "
            "scale of "
            "rotations, scale of the embedding; addresses of float32 arrays, 0: none.")
        .def(
            "add_layer",
            [](gossamer::DecoderModel& self, std::vector<uintptr_t> norms,
               std::vector<const Program*> weights, std::vector<uintptr_t> biases, int64_t window,
               bool rotates, const gossamer::Mixture* mixture) {
                const size_t count = mixture ? 4 : 7;
                if (norms.size() != 4 || weights.size() != count || biases.size() != count)
                    throw nb::value_error("4 norms, and 7 weights and biases, or 4 with a mixture");
                const auto array = [&](size_t i) { return reinterpret_cast<const float*>(norms[i]); };
                gossamer::Linear linears[7];
                for (size_t i = 0; i < count; i++) linears[i] = linear_of(*weights[i], biases[i]);
                self.add({array(0), array(1), array(2), array(3), linears[0], linears[1], linears[2],
                          linears[3], linears[4], linears[5], linears[6], window, rotates,
                          mixture ? std::optional(*mixture) : std::nullopt});
            },
            nb::arg("norms"), nb::arg("weights"), nb::arg("biases"), nb::arg("window"), nb::arg("rotates"),
            nb::arg("mixture").none() = nb::none(),
            "norms: of attention, MLP, query and key; weights: q, k, v, o, gate, up, down; mixture: what "
            "stands for the last three.")
        .def("check", &gossamer::DecoderModel::check, "An empty string, or which part does not fit.")
        .def(
            "decode",
            [](const gossamer::DecoderModel& self, gossamer::Cache& cache, int tier, uintptr_t tokens,
               int64_t count, bool all, uintptr_t logits, int threads, bool timed,
               const gossamer::Gates* gates, gossamer::Policy* policy, bool step) {
                const gossamer::Tier& chosen = tier_of(tier);
                check_fit(self, cache, gates);
                if (policy &&
                    (policy->layers() != int64_t(self.layers.size()) || policy->heads() != self.heads ||
                     !policy->check().empty() || !policy->suits(cache)))
                    throw nb::value_error("a policy of another model");
                gossamer::DecoderTimes times{};
                {
                    nb::gil_scoped_release release;
                    gossamer::decode(self, cache, chosen, reinterpret_cast<const int64_t*>(tokens), count,
                                     all, reinterpret_cast<float*>(logits), threads, timed ? &times : nullptr,
                                     gates, policy, step);
                }
                nb::dict parts;
                parts["attention_products"] = times.attention_products;
                parts["attention"] = times.attention;
                parts["mlp"] = times.mlp;
                parts["head"] = times.head;
                parts["rest"] = times.rest;
                return parts;
            },
            nb::arg("cache"), nb::arg("tier"), nb::arg("tokens"), nb::arg("count"), nb::arg("all"),
            nb::arg("logits"), nb::arg("threads"), nb::arg("timed"), nb::arg("gates").none() = nb::none(),
            nb::arg("policy").none() = nb::none(), nb::arg("step") = false,
            "Appends tokens; logits of the last one, or of all. Returns seconds of the parts by name, zeros "
            "if not timed. policy: what is looked at, or None: all; step: a token that comes by itself.")
        .def(
            "decode_each",
            [](const gossamer::DecoderModel& self, const std::vector<gossamer::Cache*>& caches, int tier,
               uintptr_t tokens, uintptr_t logits, int threads, const gossamer::Gates* gates) {
                const gossamer::Tier& chosen = tier_of(tier);
                for (size_t i = 0; i < caches.size(); i++) {
                    check_fit(self, *caches[i], gates);
                    if (caches[i]->type() != caches[0]->type())
                        throw nb::value_error("caches of several types");
                    for (size_t j = 0; j < i; j++)
                        if (caches[i] == caches[j]) throw nb::value_error("one cache twice");
                }
                nb::gil_scoped_release release;
                gossamer::decode_each(self, caches.data(), chosen, reinterpret_cast<const int64_t*>(tokens),
                                      int64_t(caches.size()), reinterpret_cast<float*>(logits), threads,
                                      gates);
            },
            nb::arg("caches"), nb::arg("tier"), nb::arg("tokens"), nb::arg("logits"), nb::arg("threads"),
            nb::arg("gates").none() = nb::none(), "Appends one token to each cache; logits of all.");
    m.attr("most_active") = gossamer::kMostActive;  // the gate of the layout columns
    m.def("compiled", [] { return tier_names(true); }, "Instruction sets that kernels were compiled for.");
    m.def("available", [] { return tier_names(false); }, "Those of them that run here.");
    m.def("tier", &tier_index, "Index of an instruction set that runs here, or -1.");
    m.def("team", [] { return std::string(gossamer::team_kind()); }, "Whose threads kernels use.");
    m.def("cycles_per_second", &gossamer::cycles_per_second, nb::call_guard<nb::gil_scoped_release>(),
          "Cycles a second of the calling core, measured now.");
    m.def(
        "sum_words",
        [](uintptr_t p, int64_t words, int threads) {
            nb::gil_scoped_release release;
            return gossamer::sum_words(reinterpret_cast<const uint64_t*>(p), words, threads);
        },
        "The sum of 8-byte words from an address on, modulo 2**64: plain reading of memory.");
    m.attr("attention_block") = gossamer::kBlock;
    m.attr("most_head") = gossamer::kMostHead;
    m.def(
        "attend_blocks",
        [](std::array<int64_t, 5> sizes, int tier, int dtype, std::array<uintptr_t, 4> arrays, float scaling,
           int64_t window, uintptr_t offsets, uintptr_t blocks, int threads) {
            const auto at = [&](size_t i) { return reinterpret_cast<void*>(arrays[i]); };
            const gossamer::BlockAttention attention{sizes[0],
                                                     sizes[1],
                                                     sizes[2],
                                                     sizes[3],
                                                     sizes[4],
                                                     dtype,
                                                     at(0),
                                                     at(1),
                                                     at(2),
                                                     at(3),
                                                     scaling,
                                                     window,
                                                     reinterpret_cast<const int64_t*>(offsets),
                                                     reinterpret_cast<const int32_t*>(blocks)};
            const gossamer::Tier& chosen = tier_of(tier);
            nb::gil_scoped_release release;
            gossamer::attend_blocks(attention, chosen, threads);
        },
        "sizes: heads, heads of keys, rows, positions, numbers of a head; arrays: queries, keys, values, "
        "outputs; offsets and blocks: lists of blocks, or 0.");
    m.def("stored_bytes", &gossamer::stored_bytes, "Bytes of `count` values of a panel-group.");
    m.def(
        "matmul",
        [](const Program& program, int tier, uintptr_t x, int64_t rows, int dtype, uintptr_t y, int threads) {
            const gossamer::Tier& chosen = tier_of(tier);
            nb::gil_scoped_release release;
            gossamer::matmul(program, chosen, reinterpret_cast<const void*>(x), rows, dtype,
                             reinterpret_cast<void*>(y), threads);
        },
        "y = x Wᵀ by a checked program; x and y are addresses of row-major arrays (dtype 0: float32, 1: "
        "bfloat16).");
}
