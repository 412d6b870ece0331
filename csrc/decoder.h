// A Llama-like decoder over packed weights: tokens in, logits out, nothing in between leaves this code.
//
//   x = embedding[token]
//   each layer:  x += o(attention(q(n), k(n), v(n)))    n = norm(x)
//                x += down(silu(gate(n)) * up(n))       n = norm(x)
//   logits = head(norm(x))
//
// All threads run the whole of it side by side and wait for each other where one needs what others made
// (about six times a layer), so that a token costs one call of the team.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "dispatch.h"

namespace gossamer {

// A packed weight, and a bias or null.
struct Linear {
    Packed w;
    const float* bias;
};

struct Layer {
    const float *norm_attention, *norm_mlp;  // hidden numbers
    const float *norm_query, *norm_key;      // head_dim numbers, or null
    Linear q, k, v, o, gate, up, down;
    int64_t window;  // positions that one sees, itself among them; 0: all
    bool rotates;    // rotary embeddings
};

struct DecoderModel {
    int64_t hidden, inner, heads, kv_heads, head_dim, vocabulary;
    float eps, scaling, rotation_scale;
    const float* frequencies;  // head_dim / 2 of them
    const float* norm;
    Packed embedding;  // (vocabulary, hidden), layout dense
    float embedding_scale;
    Linear head;
    std::vector<Layer> layers;

    // An empty string, or which part does not fit.
    std::string check() const;
};

// Keys and values of one sequence: chunks of kChunk positions of all layers and heads.
class DecoderCache {
  public:
    DecoderCache(const DecoderModel& model, int dtype);
    DecoderCache(const DecoderCache&) = delete;
    int64_t length() const { return length_; }
    void truncate(int64_t length);  // forgets what comes after
    bool fits(const DecoderModel& model) const {
        return layers_ == int64_t(model.layers.size()) && kv_heads_ == model.kv_heads &&
               head_dim_ == model.head_dim;
    }
    int64_t bytes() const { return int64_t(chunks_.size()) * chunk_bytes_; }

  private:
    friend class DecoderRun;
    void grow(int64_t length);

    const int64_t layers_, kv_heads_, head_dim_;
    const int dtype_;
    const int64_t part_bytes_;  // keys, or values, of one head in a chunk
    const int64_t chunk_bytes_;
    int64_t length_ = 0;
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };
    std::vector<std::unique_ptr<uint8_t[], Free>> chunks_;
    std::vector<const uint8_t*> parts_;  // [layer][head][keys, values][chunk of room_]
    int64_t room_ = 0;
};

// Seconds of the parts of a forward pass, of the first thread, its waiting for others included.
struct DecoderTimes {
    double attention_products, attention, mlp, head, rest;
};

// Appends `count` tokens to the cache. Logits, float32 (vocabulary) a row: of the last token, or of all.
// Tokens must lie in the vocabulary. Throws std::bad_alloc, and leaves the cache as it was then.
void decode(const DecoderModel& model, DecoderCache& cache, const Tier& tier, const int64_t* tokens,
            int64_t count, bool all, float* logits, int threads, DecoderTimes* times);

}  // namespace gossamer
