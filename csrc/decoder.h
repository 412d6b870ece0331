// A Llama-like decoder over packed weights: tokens in, logits out, nothing in between leaves this code.
//
//   x = embedding[token]
//   each layer:  x += o(attention(q(n), k(n), v(n)))    n = norm(x)
//                x += down(silu(gate(n)) * up(n))       n = norm(x); or a mixture of such (mixture.h)
//   logits = head(norm(x))
//
// All threads run the whole of it side by side and wait for each other where one needs what others made
// (about six times a layer), so that a token costs one call of the team.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cache.h"
#include "dispatch.h"
#include "gates.h"
#include "linear.h"
#include "mixture.h"
#include "policy.h"

namespace gossamer {

struct Layer {
    const float *norm_attention, *norm_mlp;  // hidden numbers
    const float *norm_query, *norm_key;      // head_dim numbers, or null
    Linear q, k, v, o, gate, up, down;
    int64_t window;                    // positions that one sees, itself among them; 0: all
    bool rotates;                      // rotary embeddings
    std::optional<Mixture> mixture{};  // in place of gate, up and down
};

struct DecoderModel {
    int64_t hidden, inner, heads, kv_heads, head_dim, vocabulary;
    float eps, scaling, rotation_scale;
    const float* frequencies;  // head_dim / 2 of them
    const float* norm;
    Selected embedding;  // (vocabulary, hidden), layout dense
    float embedding_scale;
    Linear head;
    std::vector<Layer> layers;

    // Puts a layer behind the others. Lists of inputs that are equal become one: what weights side by side
    // read alike is made ready once.
    void add(Layer layer);

    // An empty string, or which part does not fit.
    std::string check() const;

    // Whether a cache is of this shape.
    bool owns(const Cache& cache) const {
        return cache.layers() == int64_t(layers.size()) && cache.kv_heads() == kv_heads &&
               cache.head_dim() == head_dim;
    }
};

// Seconds of the parts of a forward pass, of the first thread, its waiting for others included.
struct DecoderTimes {
    double attention_products, attention, mlp, head, rest;
};

// Appends `count` tokens to the cache. Logits, float32 (vocabulary) a row: of the last token, or of all.
// Tokens must lie in the vocabulary. `gates`: of as many layers, or null; `policy`: what is looked at, of
// this model and this cache; null: all; `step`: whether the tokens are one that comes by itself, where
// policies may look at something else than in a prompt. Throws std::bad_alloc, and leaves the cache as it was
// then.
void decode(const DecoderModel& model, Cache& cache, const Tier& tier, const int64_t* tokens, int64_t count,
            bool all, float* logits, int threads, DecoderTimes* times, const Gates* gates = nullptr,
            Policy* policy = nullptr, bool step = false);

// Appends one token to each of `count` caches of this model, all different and of one type. Logits, float32
// (vocabulary) a row, have the bits of as many calls of `decode`: so many go through the layers together as
// leave them. Throws std::bad_alloc; a cache is then as it was, or has its token.
void decode_each(const DecoderModel& model, Cache* const* caches, const Tier& tier, const int64_t* tokens,
                 int64_t count, float* logits, int threads, const Gates* gates = nullptr);

}  // namespace gossamer
