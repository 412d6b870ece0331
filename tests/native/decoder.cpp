// A whole decoder on random packed weights: finite logits, and the same bits of a token whatever the threads,
// and whatever came with it. That they are the right ones is tested from Python (tests/engine).
#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>

#include "running.h"
#include "validate.h"

namespace testing {

using namespace gossamer;

namespace {

// Nothing is a whole number of panels, groups or registers; three heads share keys, of which four attend
// together.
constexpr int64_t kLayers = 3, kHidden = 60, kInner = 100, kHeads = 6, kKvHeads = 2, kHead = 20,
                  kVocabulary = 70;
constexpr int64_t kPrompt = 600, kTokens = 620;  // past two chunks of the cache, and one border of 512 rows

// A decoder and all that it points to.
class RandomDecoder {
  public:
    explicit RandomDecoder(Random& random) : random_(random) {
        const Packed rows = weight("dense", "int8", kVocabulary, kHidden);
        const float scale = 1 / std::sqrt(float(kHead));
        model = {kHidden, kInner,  kHeads,  kKvHeads, kHead, kVocabulary, 1e-5f, scale,
                 1,       nullptr, nullptr, rows,     1.5f,  {},          {}};
        float* frequencies = numbers(kHead / 2, 0, 1);
        for (int i = 0; i < kHead / 2; i++) frequencies[i] = float(std::pow(10000, -2.0 * i / kHead));
        model.frequencies = frequencies;
        model.norm = numbers(kHidden, 0.5, 1.5);
        model.head = {rows, numbers(kVocabulary, -1, 1)};
        const std::vector<Layer> layers = {
            {numbers(kHidden, 0.5, 1.5), numbers(kHidden, 0.5, 1.5), numbers(kHead, 0.5, 1.5),
             numbers(kHead, 0.5, 1.5), sum("dense", "int4", kHeads * kHead, kHidden, false),
             sum("dense", "int4", kKvHeads * kHead, kHidden, false),
             linear("bitmap", "bfloat16", kKvHeads * kHead, kHidden, false),
             linear("32:64", "int4", kHidden, kHeads * kHead, false),
             linear("32:64", "nl3", kInner, kHidden, false), linear("dense", "nl4", kInner, kHidden, false),
             linear("columns", "int8", kHidden, kInner, false), 0, true},
            {numbers(kHidden, 0.5, 1.5), numbers(kHidden, 0.5, 1.5), nullptr, nullptr,
             linear("dense", "bfloat16", kHeads * kHead, kHidden, true),
             product("32:64", "int4 by 32", kKvHeads * kHead, kHidden, true, false),
             linear("16x4", "int8", kKvHeads * kHead, kHidden, true),
             sum("columns", "int8", kHidden, kHeads * kHead, true),
             product("columns", "int4", kInner, kHidden, true, false),
             linear("columns", "int4", kInner, kHidden, true),
             product("dense", "int3", kHidden, kInner, true, true), 100, true},
            {numbers(kHidden, 0.5, 1.5),
             numbers(kHidden, 0.5, 1.5),
             nullptr,
             nullptr,
             product("dense", "int4", kHeads * kHead, kHidden, false, true),
             product("dense", "int4", kKvHeads * kHead, kHidden, false, true),
             linear("dense", "int4", kKvHeads * kHead, kHidden, false),
             linear("32:64", "int4", kHidden, kHeads * kHead, false),
             {},
             {},
             {},
             0,
             true,
             mixture()}};
        for (const Layer& layer : layers) model.add(layer);
        CHECK(model.layers[0].q.program.weight(1).inputs == model.layers[0].k.program.weight(1).inputs,
              "a list is kept twice");
    }

    DecoderModel model;

  private:
    Packed weight(const char* layout, const char* values, int64_t out, int64_t in) {
        const LayoutCase* laid = kLayouts;
        while (strcmp(laid->name, layout)) laid++;
        const ValuesCase* kind = kValues;
        while (strcmp(kind->name, values)) kind++;
        weights_.emplace_back(random_, *laid, *kind, out, in);
        Weight& w = weights_.back();
        // such that results are about as large as inputs: 2^-10 to 2^-9 for int8, 16 times that for int4
        const int exponent = kind->values == kInt8   ? 5
                             : kind->values == kInt4 ? 9
                             : kind->values == kInt3 ? 10
                                                     : 7;
        for (int64_t i = 0; i < w.scales.size() / 2; i++)
            w.scales.as<uint16_t>()[i] = uint16_t(exponent << 10 | random_.below(1024));
        CHECK(check(w.packed(), 1).empty(), "a good weight is refused");
        return w.packed();
    }

    float* numbers(int64_t count, double low, double high) {
        numbers_.emplace_back(4 * count, random_);
        float* at = numbers_.back().as<float>();
        for (int64_t i = 0; i < count; i++) at[i] = float(low + (high - low) * random_.unit());
        return at;
    }

    Linear linear(const char* layout, const char* values, int64_t out, int64_t in, bool bias) {
        return {weight(layout, values, out, in), bias ? numbers(out, -1, 1) : nullptr};
    }

    // Experts of every kind: one layout, another, and sums; three of five are chosen.
    Mixture mixture() {
        Mixture m(linear("dense", "float32", 5, kHidden, true), 3, true);
        const int64_t width = 40;
        const char* layouts[] = {"dense", "32:64", "columns", "bitmap"};
        for (const char* layout : layouts)
            m.add({linear(layout, "int4", 2 * width, kHidden, true),
                   linear(layout, "int8", kHidden, width, true)});
        m.add(
            {sum("dense", "int4", 2 * width, kHidden, false), sum("columns", "int8", kHidden, width, false)});
        return m;
    }

    // Of two weights, each of which reads some of the inputs.
    Linear sum(const char* layout, const char* values, int64_t out, int64_t in, bool bias) {
        std::vector<int32_t> lists[2];
        for (int32_t i = 0; i < in; i++) lists[i % 7 == 3].push_back(i);
        Program terms;
        for (int few : {0, 1}) {
            lists_.push_back(lists[few]);
            const Selected term(
                weight(few ? "16x4" : layout, few ? "bfloat16" : values, out, int64_t(lists[few].size())),
                lists_.back().data(), in);
            CHECK(check_inputs(term).empty(), "a good list is refused");
            terms.add_term(term, 1, -1);
        }
        return {terms, bias ? numbers(out, -1, 1) : nullptr};
    }

    // A weight and the product of two beside it, or of three alone, the middle one of some of its inputs.
    Linear product(const char* layout, const char* values, int64_t out, int64_t in, bool bias, bool alone) {
        const int64_t rank = alone ? 37 : 5;
        Program stages;
        stages.add_term(weight(alone ? layout : "dense", alone ? values : "bfloat16", rank, in), 1, -1);
        if (alone) {
            lists_.push_back({});
            for (int32_t i = 0; i < rank; i += 2) lists_.back().push_back(i);
            const Selected middle(weight("16x4", "bfloat16", 40, int64_t(lists_.back().size())),
                                  lists_.back().data(), rank);
            stages.begin_stage();
            stages.add_term(middle, 1, 0);
            stages.add_term(weight("dense", "int8", 40, rank), 1, 0);
        }
        stages.begin_stage();
        if (!alone) stages.add_term(weight(layout, values, out, in), 1, -1);
        stages.add_term(weight("dense", "bfloat16", out, alone ? 40 : rank), 1, alone ? 1 : 0);
        CHECK(stages.check().empty(), "a good program is refused");
        return {stages, bias ? numbers(out, -1, 1) : nullptr};
    }

    Random& random_;
    std::deque<std::vector<int32_t>> lists_;
    std::vector<Weight> weights_;
    std::vector<Buffer> numbers_;
};

// Of a packed cache: what is compressed, and where power iteration begins.
Compression how_of(CacheType type) {
    Compression how;
    if (type == kCachePacked) how = {2, 3, {1, 1}, {1, 0}};
    return how;
}

std::vector<float> start_of(CacheType type) {
    std::vector<float> start(size_t(how_of(type).rank * kHead));
    for (size_t i = 0; i < start.size(); i++) start[i] = float(i * 7 % 11) - 5;
    return start;
}

// Vectors along numbers of a head, of which each one has some.
KeyBasis basis_of(const DecoderModel& model) {
    KeyBasis basis;
    basis.rank = 7;
    basis.rotates.assign(size_t(kLayers), 1);
    basis.frequencies.assign(model.frequencies, model.frequencies + kHead / 2);
    for (int64_t i = 0; i < kLayers * kKvHeads * kHead * basis.rank; i++)
        basis.vectors.push_back(i / basis.rank % basis.rank == i % basis.rank ? 0.4f : 0.0f);
    return basis;
}

// One sequence: logits of what is appended, all rows or the last.
class Sequence {
  public:
    Sequence(const DecoderModel& model, const Tier& tier, CacheType type, int threads, const Gates* gates,
             Random& random, bool low_rank = false)
        : cache(int64_t(model.layers.size()), model.kv_heads, model.head_dim, type, how_of(type),
                start_of(type), low_rank ? basis_of(model) : KeyBasis{}),
          model_(model),
          tier_(tier),
          threads_(threads),
          gates_(gates),
          random_(random) {}

    Rows append(const std::vector<int64_t>& tokens, int64_t count, bool all, Policy* policy = nullptr) {
        const Buffer logits((all ? count : 1) * kVocabulary * 4, random_);
        memset(logits.data(), 0xff, size_t(logits.size()));  // NaN: what is not written shows
        decode(model_, cache, tier_, tokens.data() + cache.length(), count, all, logits.as<float>(), threads_,
               nullptr, gates_, policy, count == 1);
        const float* first = logits.as<float>();
        return Rows(first, first + logits.size() / 4);
    }

    Cache cache;

  private:
    const DecoderModel& model_;
    const Tier& tier_;
    const int threads_;
    const Gates* gates_;
    Random& random_;
};

// Goes on after the prompt one by one, or by few, and again from within it. `want` are the logits of all
// tokens, `alone` those of the ones after the prompt as they come one by one: the same but for tiles, which
// give what comes in pieces of more than kFewRows bits of its own.
void check_going_on(Sequence& some, const std::vector<int64_t>& tokens, const Rows& want, const Rows& alone,
                    bool tiles, Random& random) {
    some.cache.truncate(kPrompt);
    while (some.cache.length() < kTokens) {
        const int64_t at = some.cache.length(),
                      count = tiles ? std::min<int64_t>(1 + random.below(7), kTokens - at) : 1;
        const bool all = count > 1 || random.chance(0.5);
        check_same(some.append(tokens, count, all), 0, alone, at - kPrompt, count, kVocabulary,
                   "a token among few, and alone");
    }
    // within a chunk: what lay behind in it must not be seen again; of a packed cache no further than it goes
    // back
    const int64_t bytes = some.cache.bytes();
    const bool packed = some.cache.packed();
    some.cache.truncate((packed ? kTokens - kBlock : 495) + random.below(10));
    CHECK(packed || some.cache.bytes() < bytes, "a cache that was truncated keeps %lld bytes",
          (long long)some.cache.bytes());
    while (some.cache.length() < kTokens) {
        // by tiles: no piece, nor the part of one on either side of the border at 512, of few rows
        const int64_t pieces[] = {2, 3, 7, 8, 9, 47}, at = some.cache.length(), left = kTokens - at;
        int64_t count = std::min(pieces[random.below(6)], left);
        if (tiles) count = at < 512 ? 512 - at : left < 40 ? left : 17 + random.below(left - 34);
        if (tiles && at < 512 && count <= kFewRows) {
            some.cache.truncate(480);
            continue;
        }
        check_same(some.append(tokens, count, true), 0, want, at, count, kVocabulary,
                   "a piece, and all at once");
    }
}

void check_decoder(const DecoderModel& model, const std::vector<int64_t>& tokens, const Tier& tier,
                   CacheType type, int threads, const Gates* gates, Random& random) {
    const char* names[] = {"float32", "bfloat16", "int8", "packed"};
    const char* cache = names[type];
    const char* gated = gates ? ", gated" : "";
    describe("%s, decoder%s, cache of %s", tier.name, gated, cache);
    Sequence whole(model, tier, type, 1, gates, random);
    const Rows want = whole.append(tokens, kTokens, true);
    for (size_t i = 0; i < want.size(); i++)
        CHECK(std::isfinite(want[i]), "logit %zu of token %zu is %g", i % kVocabulary, i / kVocabulary,
              double(want[i]));
    Rows alone;
    whole.cache.truncate(kPrompt);
    while (whole.cache.length() < kTokens) {
        const Rows one = whole.append(tokens, 1, false);
        alone.insert(alone.end(), one.begin(), one.end());
    }
    const bool tiles = has_tiles(tier);
    if (!tiles) check_same(alone, 0, want, kPrompt, kTokens - kPrompt, kVocabulary, "alone, and among all");
    check_going_on(whole, tokens, want, alone, tiles, random);
    describe("%s, decoder%s, cache of %s, %d threads", tier.name, gated, cache, threads);
    Sequence other(model, tier, type, threads, gates, random);
    check_same(other.append(tokens, kPrompt, false), 0, want, kPrompt - 1, 1, kVocabulary,
               "the last token of a prompt, and it among all");
    CHECK(other.cache.length() == kPrompt, "there are %lld positions", (long long)other.cache.length());
    check_going_on(other, tokens, want, alone, tiles, random);
}

// Sequences of many lengths that each get a token together, and those of as many calls; blocks of packed
// caches fall due on the way.
void check_each(const DecoderModel& model, const std::vector<int64_t>& tokens, const Tier& tier,
                CacheType type, int threads, const Gates* gates, Random& random) {
    describe("%s, sequences together, cache type %d, %d threads", tier.name, int(type), threads);
    std::vector<int64_t> lengths = {0, 1, 62, 127, 254};
    while (int64_t(lengths.size()) < kFewRows + 2) lengths.push_back(random.below(20));
    std::deque<Sequence> alone, together;
    for (const int64_t length : lengths)
        for (std::deque<Sequence>* some : {&alone, &together}) {
            some->emplace_back(model, tier, type, threads, gates, random, type == kCachePacked);
            if (length) some->back().append(tokens, length, false);
        }
    std::vector<Cache*> caches;
    for (Sequence& sequence : together) caches.push_back(&sequence.cache);
    for (int step = 0; step < 4; step++) {
        // from the second step on those at the front have ended: what was a row of a later pass is now of the
        // first
        const size_t from = step ? 1 : 0;
        std::vector<int64_t> next;
        for (size_t i = from; i < caches.size(); i++) next.push_back(tokens[size_t(caches[i]->length())]);
        const Buffer logits(int64_t(next.size()) * kVocabulary * 4, random);
        memset(logits.data(), 0xff, size_t(logits.size()));
        decode_each(model, caches.data() + from, tier, next.data(), int64_t(next.size()), logits.as<float>(),
                    threads, gates);
        const float* first = logits.as<float>();
        const Rows got(first, first + logits.size() / 4);
        for (size_t i = from; i < caches.size(); i++) {
            const Rows want = alone[i].append(tokens, 1, false);
            check_same(got, int64_t(i - from), want, 0, 1, kVocabulary, "a token with others, and alone");
            CHECK(caches[i]->length() == alone[i].cache.length(), "there are %lld positions",
                  (long long)caches[i]->length());
        }
    }
}

// Every kind of policy beside each other: the same bits on any threads, after what was forgotten too, and
// those of dense attention where all is within the budget.
void check_policies(const DecoderModel& model, const std::vector<int64_t>& tokens, const Tier& tier,
                    CacheType type, int threads, Random& random) {
    describe("%s, policies, cache type %d, %d threads", tier.name, int(type), threads);
    const bool packed = type == kCachePacked;  // with keys in low rank here, coded ones above
    std::vector<float> gate(2 * kHead * kHead);
    for (float& number : gate) number = float(2 * random.unit() - 1);
    const auto made = [&](int64_t few) {
        const HeadPolicy kinds[] = {
            {kLookAtAll, 1, 0, 0, 0, 0, 0, 0, 0, 0},      {kLookStatic, 1, 1, few, 3, 1, 0, 0, 0, 0},
            {kLookPooled, 1, 0, 0, 0, 0, few, 0, 0, 0},   {kLookPooled, 1, 0, 0, 0, 0, few, 0, 0, 2},
            {kLookAcross, 0, 0, 0, 0, 0, 0, few, few, 0}, {kLookTree, 1, 1, 1, 0, 0, few, 0, 0, 0}};
        std::vector<HeadPolicy> heads(kinds, kinds + 6);
        heads.insert(heads.end(), {kinds[5], kinds[4], kinds[3], kinds[2], kinds[1], kinds[0]});
        heads.insert(heads.end(), kinds, kinds + 6);
        return std::make_unique<Policy>(kLayers, kHeads, heads, Labels(kLayers, kKvHeads, {}), gate, kHead);
    };
    CHECK(made(2)->check().empty(), "a good policy is refused: %s", made(2)->check().c_str());
    for (int64_t few : {int64_t(2), int64_t(99)}) {
        const auto one = made(few), other = made(few);
        Sequence whole(model, tier, type, 1, nullptr, random, packed),
            parts(model, tier, type, threads, nullptr, random, packed);
        Rows want = whole.append(tokens, kPrompt, true, one.get());
        parts.append(tokens, 512, false, other.get());
        parts.append(tokens, 40, false, other.get());
        parts.cache.truncate(512);
        check_same(parts.append(tokens, kPrompt - 512, true, other.get()), 0, want, 512, kPrompt - 512,
                   kVocabulary, "the end of a prompt under a policy");
        for (int64_t at = kPrompt; at < kTokens; at++)
            check_same(parts.append(tokens, 1, false, other.get()), 0,
                       whole.append(tokens, 1, false, one.get()), 0, 1, kVocabulary,
                       "a token under a policy");
        CHECK((one->looked() < one->there()) == (few == 2), "%lld of %lld blocks were looked at",
              (long long)one->looked(), (long long)one->there());
        if (few == 2) continue;
        Sequence dense(model, tier, type, threads, nullptr, random, packed);
        check_same(dense.append(tokens, kPrompt, true), 0, want, 0, kPrompt, kVocabulary,
                   "all blocks, and dense");
    }
}

}  // namespace

void test_decoder() {
    Random random(10);
    const RandomDecoder decoder(random);
    CHECK(decoder.model.check().empty(), "a good decoder is refused: %s", decoder.model.check().c_str());
    std::vector<int64_t> tokens;
    for (int64_t i = 0; i < kTokens; i++) tokens.push_back(random.below(kVocabulary));
    for (const Tier* tier : tiers_under_test())
        for (CacheType type : {kCacheF32, kCacheBF16, kCacheI8, kCachePacked})
            check_decoder(decoder.model, tokens, *tier, type, type == kCacheF32 ? 2 : 3, nullptr, random);
    for (const Tier* tier : tiers_under_test())
        for (CacheType type : {kCacheF32, kCacheBF16, kCacheI8, kCachePacked})
            check_each(decoder.model, tokens, *tier, type, type == kCacheF32 ? 1 : 3, nullptr, random);
    // by threshold, by count, with importance and without; some sites of the second layer have none
    const std::vector<float> importance(kInner, 0.5f);
    Gates gates(kLayers);
    for (int site = 0; site < kSites; site++) {
        gates.set(0, Site(site), {true, 0.3f, site % 2 ? -1 : 20, site % 3 ? importance.data() : nullptr});
        if (site % 3) gates.set(1, Site(site), {true, 0.3f, site % 2 ? 20 : -1, nullptr});
    }
    for (const Tier* tier : tiers_under_test())
        check_decoder(decoder.model, tokens, *tier, kCacheF32, 3, &gates, random);
    for (const Tier* tier : tiers_under_test())
        check_each(decoder.model, tokens, *tier, kCacheF32, 2, &gates, random);
    for (const Tier* tier : tiers_under_test())
        for (CacheType type : {kCacheF32, kCacheBF16, kCacheI8, kCachePacked})
            check_policies(decoder.model, tokens, *tier, type, type == kCacheF32 ? 3 : 2, random);
    CHECK(gates.tokens() > 0 && gates.dropped(0, kAtQ) == 20 * gates.tokens(),
          "%lld activations were dropped of %lld tokens", (long long)gates.dropped(0, kAtQ),
          (long long)gates.tokens());
}

}  // namespace testing
