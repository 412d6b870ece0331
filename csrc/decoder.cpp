// How a decoder's layers are walked, all threads side by side.
#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "halves.h"
#include "ready.h"
#include "threads.h"
#include "workspace.h"

namespace gossamer {
namespace {

constexpr int64_t kMostOpened = 64 << 20;  // bytes of a layer's cache that is opened for several rows at once

// Weights that see the same activations, and may be made ready for together.
bool alike(const Selected& a, const Selected& b) {
    return a.values == b.values && a.parts == b.parts && (a.layout == kBySteps) == (b.layout == kBySteps) &&
           (a.layout == kColumns) == (b.layout == kColumns) && a.inputs == b.inputs && a.in == b.in;
}

bool alike(const Linear& a, const Linear& b) {
    const auto same = [](const Term& one, const Term& other) { return alike(one.w, other.w); };
    const Terms some = a.program.terms(), others = b.program.terms();
    return !a.inner() && !b.inner() &&
           std::equal(some.begin(), some.end(), others.begin(), others.end(), same);
}

bool same_list(const Selected& a, const Selected& b) {
    return a.inputs && b.inputs && a.in == b.in && std::equal(a.inputs, a.inputs + a.in, b.inputs);
}

// One row of an embedding as float32 (docs/architecture.md, "Geometry").
void read_row(const Packed& w, int64_t row, float scale, float* to) {
    const int64_t panel = row / kPanel, output = row % kPanel, bytes = stored_bytes(w.values, kWeights);
    for (int64_t g = 0; g < w.groups; g++) {
        const uint8_t* group = w.data + (panel * w.groups + g) * bytes;
        const uint16_t* scales = w.scales + (panel * w.groups + g) * w.parts * kPanel;
        float of_part[2] = {1, 1};
        for (int part = 0; w.scales && part < w.parts; part++)
            of_part[part] = float_of_half(scales[part * kPanel + output]);
        for (int64_t i = 0; i < kGroup && kGroup * g + i < w.in; i++) {
            const int64_t e = 64 * (i / 4) + 4 * output + i % 4;
            float value;
            if (w.values == kFloat32) {
                std::memcpy(&value, group + 4 * e, 4);
            } else if (w.values == kBFloat16) {
                uint16_t half;
                std::memcpy(&half, group + 2 * e, 2);
                value = float_of_bfloat16(half);
            } else {
                int code;
                if (w.values == kInt8) {
                    code = group[e];
                } else if (code_bits(w.values) == 4) {
                    const uint8_t two = group[e / 128 * 64 + e % 64];
                    code = e % 128 < 64 ? two & 15 : two >> 4;
                } else {
                    const int low = group[e / 256 * 64 + e % 64] >> 2 * (e % 256 / 64) & 3;
                    const int high = group[256 + e / 8] >> e % 8 & 1;
                    code = low + 4 * high;
                }
                if (has_levels(w.values)) code = kLevels[w.values - kNl4][code];
                value = of_part[i / (kGroup / w.parts)] * float(code - zero_of(w.values));
            }
            to[kGroup * g + i] = value * scale;
        }
    }
}

thread_local Workspace workspace;

}  // namespace

void DecoderModel::add(Layer layer) {
    for (const std::pair<Linear*, Linear*>& pair :
         {std::pair(&layer.q, &layer.k), {&layer.k, &layer.v}, {&layer.gate, &layer.up}})
        for (size_t i = 0;
             i < std::min(pair.first->program.terms().size(), pair.second->program.terms().size()); i++) {
            const Selected& before = pair.first->program.weight(i);
            Selected& w = pair.second->program.weight(i);
            if (same_list(before, w)) w.inputs = before.inputs;
        }
    layers.push_back(std::move(layer));
}

std::string DecoderModel::check() const {
    const auto dense = [](const Layer& layer) { return !layer.mixture; };
    const bool has_dense = std::any_of(layers.begin(), layers.end(), dense);
    if (hidden < 1 || inner < int64_t(has_dense) || heads < 1 || kv_heads < 1 || head_dim < 2 ||
        vocabulary < 1 || layers.empty())
        return "it has no layers, or a size below 1";
    if (heads % kv_heads) return std::to_string(heads) + " heads cannot share " + std::to_string(kv_heads);
    if (head_dim % 2 || head_dim > kMostHead)
        return "heads of " + std::to_string(head_dim) + " numbers; they must be even, and at most " +
               std::to_string(kMostHead);
    std::string fault = fits({embedding, nullptr}, vocabulary, hidden, "the embedding");
    if (fault.empty() && embedding.layout != kDense) fault = "the embedding is not dense";
    if (fault.empty()) fault = fits(head, vocabulary, hidden, "the head");
    if (fault.empty() &&
        (embedding.inputs || head.program.terms().size() != 1 || head.program.terms().first->w.inputs))
        fault = "the embedding or the head is more than one packed weight";
    for (size_t i = 0; i < layers.size() && fault.empty(); i++) {
        const Layer& l = layers[i];
        const std::string of = " of layer " + std::to_string(i);
        const int64_t queries = heads * head_dim, keys = kv_heads * head_dim;
        std::vector<std::string> faults = {
            fits(l.q, queries, hidden, "q" + of), fits(l.k, keys, hidden, "k" + of),
            fits(l.v, keys, hidden, "v" + of), fits(l.o, hidden, queries, "o" + of)};
        if (l.mixture)
            faults.push_back(l.mixture->check(hidden, of));
        else
            faults.insert(faults.end(),
                          {fits(l.gate, inner, hidden, "gate" + of), fits(l.up, inner, hidden, "up" + of),
                           fits(l.down, hidden, inner, "down" + of)});
        for (const std::string& one : faults)
            if (fault.empty()) fault = one;
        if (fault.empty() && !l.mixture && unit_of(l.gate) != unit_of(l.up))
            fault = "gate and up" + of + " are split differently";
    }
    return fault;
}

// ---- a run of the layers

// Numbers in memory that all threads see are [row][...]; rows are padded to whole blocks, whose last rows are
// zeros. With one row each thread makes activations ready for itself, which is faster than to wait for
// another. Rows are positions of one cache, one behind the other; or `each` is the next one of its own cache.
class DecoderRun {
  public:
    DecoderRun(const DecoderModel& model, Cache* const* caches, bool each, const Tier& tier, int threads,
               const Gates* gates, Policy* policy, bool step)
        : m_(model),
          caches_(caches),
          cache_(*caches[0]),
          each_(each),
          step_(step),
          policy_(policy),
          tier_(tier),
          ops_(*tier.decoder),
          attention_(*tier.attention),
          threads_(threads),
          barrier_(threads),
          gates_(gates) {}

    void run(const int64_t* tokens, int64_t count, bool all, float* logits, DecoderTimes* times) {
        tokens_ = tokens;
        rows_ = count;
        block_ = count > kFewRows ? tier_.row_block : kMaxRowBlock;
        padded_ = padded_rows(count, block_);
        all_ = all;
        logits_ = logits;
        times_ = times;
        start_ = cache_.length();
        const int64_t caches = each_ ? count : 1, more = each_ ? 1 : count;
        for (int64_t i = 0; i < caches; i++) caches_[i]->grow(caches_[i]->length() + more);
        if (policy_) policy_->begin(cache_, count, step_, threads_);
        lay_out();
        cache_.stage(stages() ? reinterpret_cast<uint8_t*>(staged_) : nullptr);
        if (rows_ > 1) {
            tickets_ = std::make_unique<std::atomic<int64_t>[]>(m_.layers.size());
            for (size_t i = 0; i < m_.layers.size(); i++) tickets_[i] = 0;
        }
        if (threads_ == 1)
            work(0);
        else
            run_together(
                threads_, [](void* self, int worker) { static_cast<DecoderRun*>(self)->work(worker); }, this);
        cache_.stage(nullptr);
        for (int64_t i = 0; i < caches; i++) caches_[i]->fill(caches_[i]->length() + more);
        if (gates_) gates_->count_tokens(count);
        if (policy_) policy_->end(cache_);
    }

  private:
    using Clock = std::chrono::steady_clock;

    // Where everything lies in the workspace.
    void lay_out() {
        const int64_t queries = m_.heads * m_.head_dim, keys = m_.kv_heads * m_.head_dim;
        int64_t ready = 0, room = 0, scratch = 0, routed = 0, inner = 0;
        const auto need = [&](std::initializer_list<const Linear*> group) {
            int64_t bytes = 0, selected = 0, numbers = 0;
            for (const Linear* linear : group) {
                numbers += inner_numbers(*linear);
                bytes += activation_bytes(*linear, padded_);
                selected += room_bytes(*linear, padded_);
                scratch = std::max(scratch, scratch_bytes(*linear, padded_, block_));
            }
            ready = std::max(ready, bytes);
            room = std::max(room, selected);
            inner = std::max(inner, numbers);
        };
        for (const Layer& l : m_.layers) {
            need({&l.q, &l.k, &l.v});
            need({&l.o});
            if (l.mixture) {
                need({&l.mixture->router});
                scratch = std::max(scratch, l.mixture->scratch_bytes(padded_, block_));
                routed = std::max(routed, Routed(*l.mixture, sizes(), nullptr).bytes());
                continue;
            }
            need({&l.gate, &l.up});
            need({&l.down});
        }
        need({&m_.head});
        const int64_t state = state_size(m_.head_dim);
        int64_t most_chunks = 16;  // doubled, so that a long answer does not ask for memory chunk by chunk
        while (most_chunks * kChunk < start_ + rows_) most_chunks *= 2;
        const int64_t widest = std::max({m_.hidden, queries, m_.inner});
        const int64_t opened_bytes =
            stages() ? 2 * m_.kv_heads * seen_compressed() * whole_bytes(m_.head_dim) : 0;
        const int64_t numbers[] = {padded_ * m_.hidden,
                                   padded_ * m_.hidden,
                                   padded_ * queries,
                                   padded_ * keys,
                                   padded_ * keys,
                                   padded_ * queries,
                                   padded_ * m_.inner,
                                   padded_ * m_.inner,
                                   rows_ * m_.head_dim,
                                   padded_ * m_.vocabulary * (all_ && padded_ > rows_),
                                   rows_ * m_.heads * wide_of(m_.head_dim),
                                   rows_ == 1 ? m_.heads * most_chunks * state : 0,
                                   gates_ && padded_ > 1 ? padded_ * widest : 0,
                                   padded_ > 1 ? room / 4 : 0,
                                   stages() ? cache_.stage_bytes() / 4 : 0,
                                   routed / 4,
                                   padded_ * inner,
                                   opened_bytes <= kMostOpened ? opened_bytes / 4 : 0};
        float** places[] = {&x_,     &normed_, &q_,      &k_,      &v_,       &attended_,
                            &gate_,  &up_,     &angles_, &spare_,  &queries_, &states_,
                            &gated_, &room_,   &staged_, &routed_, &inner_,   &opened_};
        constexpr int kPlaces = sizeof places / sizeof *places;
        static_assert(kPlaces == sizeof numbers / sizeof *numbers, "each place has a number");
        const bool own = padded_ == 1;  // activations, and the row that they are made of
        const int64_t of_attention =
            aligned(attention_.scratch_bytes(m_.head_dim, cache_.type())) + aligned(4 * kQueries * state);
        const int64_t of_row = aligned(4 * std::max(m_.hidden, queries));
        const int64_t of_own = own ? ready + of_row + room + (gates_ ? aligned(4 * widest) : 0) : 0;
        const int64_t of_worker = scratch + of_own + of_attention;
        int64_t bytes = own ? 0 : ready;
        for (int64_t n : numbers) bytes += aligned(4 * n);
        uint8_t* at = workspace.get(bytes + threads_ * of_worker);
        for (int i = 0; i < kPlaces; i++) {
            *places[i] = reinterpret_cast<float*>(at);
            at += aligned(4 * numbers[i]);
        }
        if (!numbers[kPlaces - 1]) opened_ = nullptr;
        ready_ = at;
        workers_ = at + (own ? 0 : ready);
        of_worker_ = of_worker;
        scratch_bytes_ = scratch;
        ready_bytes_ = own ? ready : 0;
        own_bytes_ = of_own;
        row_bytes_ = of_row;
        room_bytes_ = own ? room : 0;
    }

    struct Worker {
        int id;
        uint8_t* scratch;
        uint8_t* ready;            // activations made ready
        float *normed, *attended;  // rows that they are made of
        float* gated;              // and what gates leave of them
        uint8_t* room;             // what weights select of those
        float* states;             // of queries that attend
        uint8_t* attention;        // scratch of theirs
    };

    Worker worker_of(int id) const {
        uint8_t* at = workers_ + id * of_worker_;
        Worker w{id,      at,     ready_, normed_, attended_, gated_, reinterpret_cast<uint8_t*>(room_),
                 nullptr, nullptr};
        at += scratch_bytes_;
        if (padded_ == 1) {
            w.ready = at;
            w.normed = w.attended = reinterpret_cast<float*>(at + ready_bytes_);
            w.room = at + ready_bytes_ + row_bytes_;
            w.gated = reinterpret_cast<float*>(at + ready_bytes_ + row_bytes_ + room_bytes_);
            at += own_bytes_;
        }
        w.states = reinterpret_cast<float*>(at);
        w.attention = at + aligned(4 * kQueries * state_size(m_.head_dim));
        return w;
    }

    // Rows that a worker makes ready: with one row, each does it for itself.
    Share own_rows(int id) const {
        if (padded_ == 1) return {0, 1};
        const Share blocks = share_of((padded_ + kMaxRowBlock - 1) / kMaxRowBlock, id, threads_);
        return {std::min(padded_, blocks.begin * kMaxRowBlock), std::min(padded_, blocks.end * kMaxRowBlock)};
    }

    RowSizes sizes() const { return {m_.hidden, rows_, padded_, block_}; }

    void meet() {
        if (padded_ > 1) barrier_.wait();
    }

    // Where weights side by side read what they read: a layer, and the site of the first, if it has any.
    struct Reads {
        int64_t layer;
        Site first;
    };
    static constexpr Reads kNoSite{-1, kSites};

    const Gate* gate_at(const Reads& at, size_t i) const {
        return gates_ && at.layer >= 0 ? &gates_->of(at.layer, Site(at.first + int(i))) : nullptr;
    }

    // Whether linear i reads what the one before it does.
    template <size_t N>
    bool together(const Linear* const (&linears)[N], const Reads& at, size_t i) const {
        if (i == 0 || !alike(*linears[i], *linears[i - 1])) return false;
        return !gates_ || at.layer < 0 || *gate_at(at, i) == *gate_at(at, i - 1);
    }

    // What a gate leaves of rows of `x`, `n` wide, where `x` may lie already; counts what it drops.
    const float* left_of(const Worker& me, const Reads& at, size_t i, const float* x, int64_t n,
                         Share rows) const {
        int64_t dropped = 0;
        for (int64_t r = rows.begin; r < rows.end; r++) {
            const int64_t some = drop(ops_, *gate_at(at, i), x + r * n, n, me.gated + r * n);
            dropped += r < rows_ ? some : 0;
        }
        if (padded_ > 1 || me.id == 0) gates_->count(at.layer, Site(at.first + int(i)), dropped);
        return me.gated;
    }

    // Makes rows of `x` ready for weights that see them, after a norm where there is one.
    template <size_t N>
    void make_ready(const Worker& me, const Linear* const (&linears)[N], const float* x, const float* norm,
                    const Reads& at) {
        const Share rows = own_rows(me.id);
        if (norm) {
            for (int64_t r = rows.begin; r < rows.end; r++)
                ops_.rms_norm(x + r * m_.hidden, norm, m_.hidden, m_.eps, me.normed + r * m_.hidden);
            x = me.normed;
        }
        uint8_t *memory = me.ready, *room = me.room;
        for (size_t i = 0; i < N; i++) {
            const Gate* gate = gate_at(at, i);
            const float* left = x;
            if (gate && gate->on) left = left_of(me, at, i, x, linears[i]->program.in(), rows);
            if (together(linears, at, i)) continue;
            gossamer::make_ready(tier_, *linears[i], left, rows, padded_, block_, memory, room);
            memory += activation_bytes(*linears[i], padded_);
            room += room_bytes(*linears[i], padded_);
        }
        meet();
        for (int64_t stage = 0; stage < most_inner(linears); stage++) run_inner(me, linears, at, stage);
    }

    template <size_t N>
    static int64_t most_inner(const Linear* const (&linears)[N]) {
        int64_t most = 0;
        for (const Linear* linear : linears) most = std::max(most, linear->inner());
        return most;
    }

    // An inner stage of weights side by side, all threads together, made ready for what multiplies its sums.
    template <size_t N>
    void run_inner(const Worker& me, const Linear* const (&linears)[N], const Reads& at, int64_t number) {
        const auto each = [&](const auto& act) {
            float* numbers = inner_;
            uint8_t* room = me.room;
            for (size_t i = 0; i < N; i++) {
                const Linear& linear = *linears[i];
                if (number < linear.inner()) {
                    const Stage stage = linear.program.stage(number);
                    act(linear, stage, ready_for(me, linears, i, at), numbers + padded_ * stage.before, room);
                }
                numbers += padded_ * inner_numbers(linear);
                if (!together(linears, at, i)) room += room_bytes(linear, padded_);
            }
        };
        each([&](const Linear& linear, const Stage& stage, uint8_t* ready, float* numbers, uint8_t*) {
            multiply(tier_, linear, stage, ready, padded_, block_, numbers, nullptr,
                     share_of(units_of(stage), me.id, threads_), me.scratch);
        });
        barrier_.wait();
        each([&](const Linear& linear, const Stage&, uint8_t* ready, float* numbers, uint8_t* room) {
            gossamer::make_ready(tier_, linear, numbers, own_rows(me.id), padded_, block_, ready, room,
                                 number);
        });
        meet();
    }

    // Where the activations of a linear's terms lie, made ready.
    template <size_t N>
    uint8_t* ready_for(const Worker& me, const Linear* const (&linears)[N], size_t index,
                       const Reads& at) const {
        uint8_t* memory = me.ready;
        for (size_t i = 1; i <= index; i++)
            if (!together(linears, at, i)) memory += activation_bytes(*linears[i - 1], padded_);
        return memory;
    }

    // Outputs of some units of a linear, whose activations lie at `ready`.
    void multiply_some(const Worker& me, const Linear& linear, uint8_t* ready, float* y, const float* base,
                       Share units) {
        multiply(tier_, linear, ready, padded_, block_, y, base, units, me.scratch);
    }

    // This worker's share of the outputs of several weights side by side.
    template <size_t N>
    void multiply_all(const Worker& me, const Linear* const (&linears)[N], float* const (&y)[N],
                      const float* base, const Reads& at) {
        int64_t all = 0;
        for (const Linear* linear : linears) all += panels_of(*linear);
        const Share mine = share_of(all, me.id, threads_);
        int64_t before = 0;
        for (size_t i = 0; i < N; i++) {
            const int64_t unit = unit_of(*linears[i]), count = units_of(*linears[i]);
            const auto clipped = [&](int64_t at) {
                return std::min(count, std::max<int64_t>(0, (at - before + unit - 1) / unit));
            };
            multiply_some(me, *linears[i], ready_for(me, linears, i, at), y[i], base,
                          {clipped(mine.begin), clipped(mine.end)});
            before += panels_of(*linears[i]);
        }
    }

    Cache& cache_of(int64_t row) const { return each_ ? *caches_[row] : cache_; }
    int64_t position_of(int64_t row) const { return each_ ? caches_[row]->length() : start_ + row; }

    // cos and sin of every row's position: head_dim / 2 of each.
    void fill_angles(Share rows) {
        const int64_t half = m_.head_dim / 2;
        for (int64_t r = rows.begin; r < rows.end; r++)
            for (int64_t i = 0; i < half; i++) {
                const float angle = float(position_of(r)) * m_.frequencies[i];
                angles_[r * m_.head_dim + i] = std::cos(angle) * m_.rotation_scale;
                angles_[r * m_.head_dim + half + i] = std::sin(angle) * m_.rotation_scale;
            }
    }

    void rotate(const Layer& layer, float* head, int64_t row) const {
        if (!layer.rotates) return;
        const float* angles = angles_ + row * m_.head_dim;
        ops_.rotate(head, angles, angles + m_.head_dim / 2, m_.head_dim / 2);
    }

    // Queries and keys are normed and rotated; keys and values go into the cache.
    void place(const Worker& me, int64_t number) {
        const Layer& layer = m_.layers[size_t(number)];
        const int64_t dim = m_.head_dim, heads = m_.heads + m_.kv_heads;
        const Share mine = share_of(rows_ * heads, me.id, threads_);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            const int64_t row = i / heads, head = i % heads, key_head = head - m_.heads;
            const bool query = key_head < 0;
            float* x = query ? q_ + (row * m_.heads + head) * dim : k_ + (row * m_.kv_heads + key_head) * dim;
            const float* norm = query ? layer.norm_query : layer.norm_key;
            if (norm) ops_.rms_norm(x, norm, dim, m_.eps, x);
            rotate(layer, x, row);
            if (query) {
                attention_.place_query(x, dim, m_.scaling, cache_.type(), query_at(row, head));
                continue;
            }
            place_key(number, key_head, row, x, v_ + (row * m_.kv_heads + key_head) * dim);
        }
    }

    void place_key(int64_t number, int64_t head, int64_t row, const float* key, const float* value) {
        const int64_t position = position_of(row), chunk = position / kChunk, dim = m_.head_dim;
        const bool final = each_ || row + 1 == rows_;
        const Cache& cache = cache_of(row);
        if (!cache.packed())
            return attention_.place_position(key, value, dim, cache.type(), position % kChunk, final,
                                             cache.keys_of(number, head)[chunk],
                                             cache.values_of(number, head)[chunk]);
        if (!stages())
            for (int64_t block = cache.due_from(); block < cache.due(position + 1); block++)
                for (bool keys : {true, false}) cache.compress(number, head, keys, block);
        const WholeBlocks whole = cache.whole_of(number, head);
        const int64_t at = position / kBlock % whole.slots * whole_bytes(dim);
        attention_.place_position(key, value, dim, kCacheBF16, position % kBlock, final, whole.keys + at,
                                  whole.values + at);
    }

    // A packed cache, where several rows of it come: their blocks lie aside while they look.
    bool stages() const { return cache_.packed() && rows_ > 1 && !each_; }

    void take_in(const Worker& me, int64_t number) const {
        const Share mine = share_of(stages() ? m_.kv_heads : 0, me.id, threads_);
        for (int64_t head = mine.begin; head < mine.end; head++) cache_.take_in(number, head);
    }

    void give_back(const Worker& me, int64_t number) const {
        const Share mine = share_of(stages() ? m_.kv_heads : 0, me.id, threads_);
        for (int64_t head = mine.begin; head < mine.end; head++)
            cache_.give_back(number, head, start_ + rows_);
    }

    void compress(const Worker& me, int64_t number) {
        const int64_t from = cache_.due_from(), count = cache_.due(start_ + rows_) - from;
        if (!stages() || count <= 0) return;
        const Share mine = share_of(2 * count * m_.kv_heads, me.id, threads_);
        for (int64_t i = mine.begin; i < mine.end; i++)
            cache_.compress(number, i / (2 * count), i % 2 == 0, from + i / 2 % count);
        barrier_.wait();
    }

    // Opens the blocks that several rows see compressed, once for all of them.
    void open(const Worker& me, int64_t number) {
        const int64_t from = first_seen(number, start_) / kBlock,
                      count = opened_ ? seen_compressed() - from : 0;
        if (count <= 0) return;
        const Share mine = share_of(2 * count * m_.kv_heads, me.id, threads_);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            const int64_t head = i / (2 * count), block = from + i / 2 % count;
            const bool keys = i % 2 == 0;
            const WholeBlocks opened = opened_of(head);
            const Compression how = cache_.how(number, head);
            attention_.open(&how, keys, m_.head_dim, block, cache_.compressed_at(number, head, keys, block),
                            (keys ? opened.keys : opened.values) + block * whole_bytes(m_.head_dim));
        }
        barrier_.wait();
    }

    int64_t seen_compressed() const { return cache_.due(start_ + rows_); }  // blocks, by the last row

    WholeBlocks opened_of(int64_t head) const {
        if (!opened_) return {};
        const int64_t bytes = seen_compressed() * whole_bytes(m_.head_dim);
        uint8_t* at = reinterpret_cast<uint8_t*>(opened_) + head * 2 * bytes;
        return {at, at + bytes, seen_compressed()};
    }

    // What attends together lies side by side: rows of a head, or where each row has its own keys its heads.
    uint8_t* query_at(int64_t row, int64_t head) const {
        const int64_t at = each_ ? row * m_.heads + head : head * rows_ + row;
        return reinterpret_cast<uint8_t*>(queries_) + at * query_bytes(m_.head_dim, cache_.type());
    }

    // Finds the blocks that rows look at in a layer.
    void choose(const Worker& me, int64_t number) {
        const PolicyRows rows{cache_, *tier_.estimate, number,
                              start_, rows_,           m_.layers[size_t(number)].window,
                              q_,     queries_,        query_bytes(m_.head_dim, cache_.type())};
        if (policy_->prepares()) {
            policy_->prepare(rows, me.id);
            barrier_.wait();
        }
        policy_->choose(rows, me.id);
        barrier_.wait();
    }

    bool chooses(int64_t number) const { return policy_ && policy_->acts(number); }

    // `count` queries from (row, head) on, as they lie, look at all that they see in [begin, end), or at the
    // blocks of a list.
    void attend(const Worker& me, int64_t number, int64_t row, int64_t head, int count, int64_t begin,
                int64_t end, float* states, Policy::List list = {}) {
        const int64_t kv_head = head / (m_.heads / m_.kv_heads);
        const Cache& cache = cache_of(row);
        Attention a{};
        a.count = count;
        a.dim = m_.head_dim;
        a.type = cache.type();
        a.keys = cache.keys_of(number, kv_head);
        a.values = cache.values_of(number, kv_head);
        if (cache.packed()) {
            a.how = cache.how(number, kv_head);
            a.whole = cache.whole_of(number, kv_head);
            a.opened = opened_of(kv_head);
        }
        a.queries = query_at(row, head);
        a.many = rows_ > kFewRows;
        for (int i = 0; i < count; i++) {
            a.last[i] = each_ || rows_ == 1 ? position_of(row) : start_ + row + i;
            a.first[i] = first_seen(number, a.last[i]);
            open_state(states + i * state_size(m_.head_dim), m_.head_dim);
        }
        a.block_begin = std::max(begin, a.first[0]) / kBlock;
        a.block_end = (std::min(end, a.last[count - 1] + 1) + kBlock - 1) / kBlock;
        if (list.blocks) {
            a.blocks = list.blocks;
            a.block_begin = 0;
            a.block_end = list.count;
        }
        a.states = states;
        a.scratch = me.attention;
        attention_.attend(&a);
    }

    int64_t first_seen(int64_t number, int64_t position) const {
        const int64_t window = m_.layers[size_t(number)].window;
        return window ? std::max<int64_t>(0, position - window + 1) : 0;
    }

    // One row: chunks of all heads are shared out, by their blocks, and merged afterwards. Returns how many
    // blocks there are; `before`: those of earlier ones.
    template <class F>
    int64_t each_chunk(int64_t number, const F& f) const {
        const int64_t first = first_seen(number, start_), group = m_.heads / m_.kv_heads;
        int64_t before = 0;
        for (int64_t head = 0; head < m_.heads;) {
            const int64_t count = std::min<int64_t>(kQueries, group - head % group);
            for (int64_t chunk = first / kChunk; chunk <= start_ / kChunk; chunk++) {
                const int64_t begin = std::max(first, chunk * kChunk) / kBlock;
                const int64_t end = std::min(start_, (chunk + 1) * kChunk - 1) / kBlock + 1;
                f(head, int(count), chunk, before);
                before += end - begin;
            }
            head += count;
        }
        return before;
    }

    // The same over the lists of a policy: heads that share keys and have the same list attend together.
    template <class F>
    int64_t each_listed_chunk(const F& f) const {
        const int64_t group = m_.heads / m_.kv_heads;
        int64_t before = 0;
        for (int64_t head = 0, count = 1; head < m_.heads; head += count, count = 1) {
            const Policy::List list = policy_->list(head, 0);
            const int64_t most = std::min<int64_t>(kQueries, group - head % group);
            while (count < most && same(list, policy_->list(head + count, 0))) count++;
            each_run(list, [&](int64_t chunk, Policy::List run) {
                f(head, int(count), chunk, run, before);
                before += run.count;
            });
        }
        return before;
    }

    static bool same(Policy::List a, Policy::List b) {
        return a.count == b.count && std::equal(a.blocks, a.blocks + a.count, b.blocks);
    }

    // Runs of a list that lie in one chunk.
    template <class F>
    static void each_run(Policy::List list, const F& f) {
        for (int64_t i = 0, end; i < list.count; i = end) {
            const int64_t chunk = list.blocks[i] * kBlock / kChunk;
            for (end = i; end < list.count && list.blocks[end] * kBlock / kChunk == chunk;) end++;
            f(chunk, Policy::List{list.blocks + i, end - i});
        }
    }

    float* state_of(int64_t head, int64_t chunk) const {
        return states_ + (chunk * m_.heads + head) * state_size(m_.head_dim);
    }

    void attend_by_lists(const Worker& me, int64_t number) {
        const Share mine = share_of(each_listed_chunk([](auto...) {}), me.id, threads_);
        each_listed_chunk([&](int64_t head, int count, int64_t chunk, Policy::List run, int64_t before) {
            if (before >= mine.begin && before < mine.end)
                attend(me, number, 0, head, count, 0, 0, state_of(head, chunk), run);
        });
    }

    void attend_by_chunks(const Worker& me, int64_t number) {
        if (chooses(number)) return attend_by_lists(me, number);
        const int64_t all = each_chunk(number, [](int64_t, int, int64_t, int64_t) {});
        const Share mine = share_of(all, me.id, threads_);
        each_chunk(number, [&](int64_t head, int count, int64_t chunk, int64_t before) {
            if (before >= mine.begin && before < mine.end)
                attend(me, number, 0, head, count, chunk * kChunk, (chunk + 1) * kChunk,
                       state_of(head, chunk));
        });
    }

    // Each worker for itself.
    void merge_chunks(const Worker& me, int64_t number) const {
        const int64_t first = first_seen(number, start_) / kChunk;
        for (int64_t head = 0; head < m_.heads; head++) {
            float* state = me.states;
            open_state(state, m_.head_dim);
            const auto merge = [&](int64_t chunk, Policy::List = {}) {
                attention_.merge(state_of(head, chunk), m_.head_dim, state);
            };
            if (chooses(number))
                each_run(policy_->list(head, 0), merge);
            else
                for (int64_t chunk = first; chunk <= start_ / kChunk; chunk++) merge(chunk);
            attention_.finish(state, m_.head_dim, me.attended + head * m_.head_dim);
        }
    }

    // Several rows: tiles of a head's rows, which lie between multiples of kQueries. Late rows see the most:
    // first come first served, from the last on.
    void attend_by_tiles(const Worker& me, int64_t number) {
        const int64_t first = start_ / kQueries, tiles = (start_ + rows_ - 1) / kQueries - first + 1;
        const int64_t size = state_size(m_.head_dim);
        std::atomic<int64_t>& next = tickets_[size_t(number)];
        for (;;) {
            const int64_t ticket = next.fetch_add(1, std::memory_order_relaxed);
            if (ticket >= tiles * m_.heads) return;
            const int64_t tile = first + tiles - 1 - ticket / m_.heads, head = ticket % m_.heads;
            const int64_t begin = std::max(start_, tile * kQueries);
            const int64_t end = std::min(start_ + rows_, (tile + 1) * kQueries);
            const Policy::List list =
                chooses(number) ? policy_->list(head, begin / kBlock - start_ / kBlock) : Policy::List{};
            attend(me, number, begin - start_, head, int(end - begin), 0, end, me.states, list);
            for (int64_t i = 0; i < end - begin; i++)
                attention_.finish(me.states + i * size, m_.head_dim,
                                  attended_ + ((begin + i - start_) * m_.heads + head) * m_.head_dim);
        }
    }

    // Rows that each have their own keys: of each row the heads that share some.
    void attend_by_rows(const Worker& me, int64_t number) {
        const int64_t group = m_.heads / m_.kv_heads, size = state_size(m_.head_dim);
        const int64_t most = std::min<int64_t>(kQueries, group), parts = (group + most - 1) / most;
        std::atomic<int64_t>& next = tickets_[size_t(number)];
        for (;;) {
            const int64_t ticket = next.fetch_add(1, std::memory_order_relaxed);
            if (ticket >= rows_ * m_.kv_heads * parts) return;
            const int64_t row = ticket / (m_.kv_heads * parts), part = ticket % parts;
            const int64_t head = ticket / parts % m_.kv_heads * group + part * most;
            const int count = int(std::min(most, group - part * most));
            attend(me, number, row, head, count, 0, position_of(row) + 1, me.states);
            for (int i = 0; i < count; i++)
                attention_.finish(me.states + i * size, m_.head_dim,
                                  attended_ + (row * m_.heads + head + i) * m_.head_dim);
        }
    }

    // Seconds since the last call go to `part`.
    void spent(double DecoderTimes::* part) {
        if (!times_) return;
        const auto now = Clock::now();
        times_->*part += std::chrono::duration<double>(now - since_).count();
        since_ = now;
    }

    void work(int id) {
        const Worker me = worker_of(id);
        const bool timed = id == 0 && times_;
        if (timed) since_ = Clock::now();
        const Share some = share_of(rows_, id, threads_);
        for (int64_t r = some.begin; r < some.end; r++)
            read_row(m_.embedding, tokens_[r], m_.embedding_scale, x_ + r * m_.hidden);
        if (id == threads_ - 1 && padded_ > rows_) {
            std::memset(x_ + rows_ * m_.hidden, 0, size_t((padded_ - rows_) * m_.hidden) * 4);
            std::memset(attended_ + rows_ * m_.heads * m_.head_dim, 0,
                        size_t((padded_ - rows_) * m_.heads * m_.head_dim) * 4);
        }
        fill_angles(some);
        barrier_.wait();
        if (timed) spent(&DecoderTimes::rest);
        for (size_t i = 0; i < m_.layers.size(); i++) layer(me, int64_t(i), timed);
        if (logits_) head(me);
        if (timed) spent(&DecoderTimes::head);
    }

    void layer(const Worker& me, int64_t number, bool timed) {
        const Layer& l = m_.layers[size_t(number)];
        const Reads at_q{number, kAtQ}, at_o{number, kAtO};
        take_in(me, number);
        make_ready(me, {&l.q, &l.k, &l.v}, x_, l.norm_attention, at_q);
        multiply_all(me, {&l.q, &l.k, &l.v}, {q_, k_, v_}, nullptr, at_q);
        barrier_.wait();
        if (timed) spent(&DecoderTimes::attention_products);
        place(me, number);
        barrier_.wait();
        compress(me, number);
        open(me, number);
        if (chooses(number)) choose(me, number);
        if (rows_ == 1)
            attend_by_chunks(me, number);
        else if (each_)
            attend_by_rows(me, number);
        else
            attend_by_tiles(me, number);
        barrier_.wait();
        give_back(me, number);
        if (rows_ == 1) merge_chunks(me, number);
        if (timed) spent(&DecoderTimes::attention);
        make_ready(me, {&l.o}, me.attended, nullptr, at_o);
        multiply_all(me, {&l.o}, {x_}, x_, at_o);
        barrier_.wait();
        if (timed) spent(&DecoderTimes::attention_products);
        if (l.mixture)
            mix(me, *l.mixture, l.norm_mlp);
        else
            mlp(me, l, number);
        if (timed) spent(&DecoderTimes::mlp);
    }

    void mlp(const Worker& me, const Layer& l, int64_t number) {
        const Reads at_gate{number, kAtGate}, at_down{number, kAtDown};
        const Linear* inner[] = {&l.gate, &l.up};
        make_ready(me, {&l.gate, &l.up}, x_, l.norm_mlp, at_gate);
        const bool activated = gates_ && gates_->of(number, kAtActivated).on;
        const Share mine = share_of(units_of(l.gate), me.id, threads_);
        multiply_some(me, l.gate, ready_for(me, inner, 0, at_gate), gate_, nullptr, mine);
        multiply_some(me, l.up, ready_for(me, inner, 1, at_gate), up_, nullptr, mine);
        const int64_t wide = kPanel * unit_of(l.gate), from = mine.begin * wide;
        const int64_t to = std::min(mine.end * wide, m_.inner);
        for (int64_t r = 0; r < padded_ && from < to; r++)
            if (activated)
                ops_.silu(gate_ + r * m_.inner + from, to - from);
            else
                ops_.gate(gate_ + r * m_.inner + from, up_ + r * m_.inner + from, to - from);
        barrier_.wait();
        make_ready(me, {&l.down}, activated ? gated_products(me, number) : gate_, nullptr, at_down);
        multiply_all(me, {&l.down}, {x_}, x_, at_down);
        barrier_.wait();
    }

    void mix(const Worker& me, const Mixture& mixture, const float* norm) {
        const Routed routed(mixture, sizes(), reinterpret_cast<uint8_t*>(routed_));
        make_ready(me, {&mixture.router}, x_, norm, kNoSite);
        multiply_all(me, {&mixture.router}, {routed.scores()}, nullptr, kNoSite);
        barrier_.wait();
        routed.run(tier_, barrier_, me.id, threads_, me.normed, x_, me.scratch);
    }

    // What the gate of the activation leaves of this worker's rows, times the up projection's outputs.
    const float* gated_products(const Worker& me, int64_t number) const {
        const Share rows = own_rows(me.id);
        left_of(me, {number, kAtActivated}, 0, gate_, m_.inner, rows);
        for (int64_t i = rows.begin * m_.inner; i < rows.end * m_.inner; i++) me.gated[i] *= up_[i];
        return me.gated;
    }

    // Logits of all rows, or of the last alone.
    void head(const Worker& me) {
        if (all_) {
            make_ready(me, {&m_.head}, x_, m_.norm, kNoSite);
            multiply_all(me, {&m_.head}, {padded_ > rows_ ? spare_ : logits_}, nullptr, kNoSite);
            if (padded_ > rows_) {
                barrier_.wait();
                const Share mine = share_of(rows_ * m_.vocabulary, me.id, threads_);
                std::memcpy(logits_ + mine.begin, spare_ + mine.begin, size_t(mine.end - mine.begin) * 4);
            }
            return;
        }
        // as a row of its own, whatever the others were
        const Selected& w = m_.head.program.terms().first->w;
        float* normed = me.id == 0 ? normed_ : nullptr;
        if (normed) {
            ops_.rms_norm(x_ + (rows_ - 1) * m_.hidden, m_.norm, m_.hidden, m_.eps, normed);
            gossamer::make_ready(tier_, w, normed, kF32, 0, 1, activations_at(ready_of_head(), w, 1),
                                 nullptr);
        }
        barrier_.wait();
        const Share mine = share_of(units_of(m_.head), me.id, threads_);
        if (mine.begin == mine.end) return;
        const int64_t unit = unit_of(m_.head), begin = mine.begin * unit,
                      end = std::min(mine.end * unit, w.panels);
        multiply(tier_, w, activations_at(ready_of_head(), w, 1), Output{logits_, kF32, nullptr}, begin, end,
                 me.scratch);
        if (m_.head.bias)
            for (int64_t o = kPanel * begin; o < std::min(kPanel * end, w.out); o++)
                logits_[o] += m_.head.bias[o];
    }

    uint8_t* ready_of_head() const { return padded_ == 1 ? worker_of(0).ready : ready_; }

    const DecoderModel& m_;
    Cache* const* const caches_;
    Cache& cache_;  // the first, or the only one
    const bool each_, step_;
    Policy* const policy_;
    const Tier& tier_;
    const DecoderOps& ops_;
    const AttentionOps& attention_;
    const int threads_;
    Barrier barrier_;
    const Gates* const gates_;
    const int64_t* tokens_ = nullptr;
    int64_t rows_ = 0, padded_ = 0, block_ = kMaxRowBlock, start_ = 0;
    bool all_ = false;
    float* logits_ = nullptr;
    float *x_, *normed_, *q_, *k_, *v_, *attended_, *gate_, *up_, *angles_, *spare_, *queries_, *states_,
        *gated_, *room_, *staged_, *routed_, *inner_, *opened_;
    uint8_t *ready_ = nullptr, *workers_ = nullptr;
    int64_t of_worker_ = 0, scratch_bytes_ = 0, ready_bytes_ = 0, own_bytes_ = 0, row_bytes_ = 0,
            room_bytes_ = 0;
    std::unique_ptr<std::atomic<int64_t>[]> tickets_;
    DecoderTimes* times_ = nullptr;
    Clock::time_point since_;
};

void decode(const DecoderModel& model, Cache& cache, const Tier& tier, const int64_t* tokens, int64_t count,
            bool all, float* logits, int threads, DecoderTimes* times, const Gates* gates, Policy* policy,
            bool step) {
    for (int64_t done = 0; done < count;) {
        const int64_t some = std::min(count - done, kMostRows - cache.length() % kMostRows);
        float* wanted = all ? logits + done * model.vocabulary : done + some == count ? logits : nullptr;
        Cache* caches[] = {&cache};
        DecoderRun(model, caches, false, tier, threads, gates, policy, step)
            .run(tokens + done, some, all, wanted, times);
        done += some;
    }
}

void decode_each(const DecoderModel& model, Cache* const* caches, const Tier& tier, const int64_t* tokens,
                 int64_t count, float* logits, int threads, const Gates* gates) {
    for (int64_t done = 0; done < count;) {
        const int64_t some = std::min<int64_t>(count - done, kFewRows);
        DecoderRun(model, caches + done, true, tier, threads, gates, nullptr, true)
            .run(tokens + done, some, true, logits + done * model.vocabulary, nullptr);
        done += some;
    }
}

}  // namespace gossamer
