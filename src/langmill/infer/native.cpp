// A whole pass of a Transformer stack in one call: N tokens of any slots in, logits out, one team of threads.
//
// Plain C interface at the end of the file; infer/native.py packs the weights, builds this file and calls it.
// Weights stand in panels of 16 outputs, so that one vector register holds a number for each of them:
//   float32: [panel][input][16]
//   8 bits:  [panel][16 steps] then [panel][group of 32 inputs][8 vectors of 16 outputs x 4 inputs], code + 128
//   4 bits:  [panel][group][4 vectors, quads 2v in the low and 2v+1 in the high nibbles] then the group's steps, lows
// Quantised products take inputs rounded to 8 bits in groups of 32; inside a group all is integer arithmetic.
// Adapters of low rank stand beside the weights in float32, and each row may have another one.
// A row's result never depends on the other rows: each output is summed in one order, whatever the tile.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <thread>
#include <vector>
#if defined(__AVX512F__) && !defined(PORTABLE)
#include <immintrin.h>
#define WIDE 1  // the processor's own 16 lanes; else the compiler makes them of what there is
#endif

constexpr int LANES = 16, GROUP = 32, TILE = 16;  // TILE: rows that one walk over a panel serves
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint8_t U __attribute__((vector_size(64)));
typedef float Fu __attribute__((vector_size(64), aligned(4)));
typedef uint8_t Uu __attribute__((vector_size(64), aligned(1)));

static inline F load(const float* p) { return *(const Fu*)p; }
static inline void store(float* p, F v) { *(Fu*)p = v; }
static inline F all(float v) { return v - F{}; }  // v + 0 would be an addition: it is not v where v is -0
static inline F larger(F a, F b) { return a > b ? a : b; }
// a * b + sum, rounded once where the processor can. Left to a compiler that would depend on the loop around it, and a
// row's bits on the rows beside it; so it is told to leave all other products alone (-ffp-contract=off).
static inline F plus(F sum, F a, F b) {
#if defined(WIDE)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < LANES; i++) sum[i] = __builtin_fmaf(a[i], b[i], sum[i]);
    return sum;
#else
    return sum + a * b;
#endif
}
static inline F plus(F sum, F a, float b) { return plus(sum, a, all(b)); }
static inline int padded(int n) { return (n + GROUP - 1) / GROUP * GROUP; }
static inline float total(F v) {  // halves added to halves, as the processor's own words do
#if defined(WIDE)
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}
static inline float greatest(F v) {
#if defined(WIDE)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

// acc[lane] += sum over 4 of w[4 lane + j] * x[j]; w unsigned, x signed.
static inline I dot4(I acc, U w, const int8_t* x) {
    int32_t quad;
    memcpy(&quad, x, 4);
#if defined(WIDE) && defined(__AVX512VNNI__)
    return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(quad));
#else
    for (int lane = 0; lane < LANES; lane++)
        for (int j = 0; j < 4; j++) acc[lane] += int32_t(w[4 * lane + j]) * x[j];
    return acc;
#endif
}

static inline F halves(const uint16_t* p) {  // 16 float16 numbers
#if defined(WIDE)
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
    F out;
    for (int i = 0; i < LANES; i++) {
        uint32_t h = p[i], sign = (h & 0x8000u) << 16, rest = h & 0x7fffu, bits;
        float f;
        if (rest < 0x400) {
            f = rest * 5.9604644775390625e-8f;
            memcpy(&bits, &f, 4);
        } else {
            bits = (rest << 13) + 0x38000000u;
        }
        bits |= sign;
        memcpy(&f, &bits, 4);
        out[i] = f;
    }
    return out;
#endif
}

static inline F exponential(F x) {  // relative error below 2e-7
    x = larger(x, all(-87.0f));
    x = x > 88.0f ? all(88.0f) : x;
    const F shift = all(12582912.0f);
    F n = plus(shift, x, 1.44269504f) - shift;
    F r = plus(plus(x, n, -0.693359375f), n, 2.12194440e-4f);
    F p = all(1.9875691500e-4f);
    p = plus(all(1.3981999507e-3f), p, r);
    p = plus(all(8.3334519073e-3f), p, r);
    p = plus(all(4.1665795894e-2f), p, r);
    p = plus(all(1.6666665459e-1f), p, r);
    p = plus(all(5.0000001201e-1f), p, r);
    p = plus(r, p * r, r) + 1.0f;
    I bits = (__builtin_convertvector(n, I) + 127) << 23;
    return p * (F)bits;
}

enum Activation { GELU, GELU_TANH, RELU, SILU };
static inline F activate(int kind, F x) {
    if (kind == RELU) return larger(x, F{});
    if (kind == SILU) return x / (1.0f + exponential(-x));
    if (kind == GELU_TANH) {  // tanh(u) = 1 - 2 / (exp(2u) + 1)
        F u = 0.7978845608f * (x + 0.044715f * x * x * x);
        return x * (1.0f - 1.0f / (exponential(2.0f * u) + 1.0f));
    }
    // 1 - erf(u) for u >= 0, error below 2e-7: Abramowitz & Stegun 1964, 7.1.26
    F u = larger(x, -x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * u);
    F p = all(1.061405429f);
    p = plus(all(-1.453152027f), p, t);
    p = plus(all(1.421413741f), p, t);
    p = plus(all(-0.284496736f), p, t);
    p = plus(all(0.254829592f), p, t);
    F rest = 0.5f * p * t * exponential(-u * u);
    return x * (x > 0.0f ? 1.0f - rest : rest);
}

enum Kind { FLOAT, INT8, INT4, INT4_LOWS };
struct Linear {
    int32_t kind, in, out, has_bias;
    const uint8_t* data;
    const float* bias;  // padded to whole panels
    int panels() const { return (out + LANES - 1) / LANES; }
    int groups() const { return in / GROUP; }
    size_t bytes() const {  // of a panel
        size_t size = kind == FLOAT  ? size_t(in) * 64
                      : kind == INT8 ? 64 + size_t(in) * 16
                                     : size_t(groups()) * (256 + 32 * (kind == INT4_LOWS ? 2 : 1));
        return (size + 63) / 64 * 64;
    }
    const uint8_t* panel(int number) const { return data + bytes() * number; }
};

// N rows of numbers, and the same rounded to 8 bits: value = step * code, a step for each group of 32.
struct Rows {
    int width = 0;
    std::vector<float> values, steps;
    std::vector<int8_t> codes;
    std::vector<int32_t> sums;  // of each group's codes
    void make(int rows, int n) {
        width = padded(n);
        values.assign(size_t(rows) * width + LANES, 0);
        codes.assign(size_t(rows) * width + 64, 0);
        steps.assign(size_t(rows) * width / GROUP, 0);
        sums.assign(size_t(rows) * width / GROUP, 0);
    }
    float* row(int r) { return values.data() + size_t(r) * width; }
    const float* row(int r) const { return values.data() + size_t(r) * width; }
    void round(int r, int from, int to) {  // inputs `from` to `to` of a row, whole groups
        for (int g = from / GROUP; g < (to + GROUP - 1) / GROUP; g++) round(r, g, row(r) + g * GROUP);
    }
    void round(int r, int g, const float* x) {  // the 32 numbers at x, as group g of a row
        F a = load(x), b = load(x + LANES);
        const float most = greatest(larger(larger(a, -a), larger(b, -b)));
        const float back = most > 0 ? 127.0f / most : 0.0f;
        const size_t at = size_t(r) * (width / GROUP) + g;
        steps[at] = most / 127.0f;
        const F shift = all(12582912.0f);  // nearest, ties to even
        I first = __builtin_convertvector(a * back + shift - shift, I);
        I second = __builtin_convertvector(b * back + shift - shift, I);
        int8_t* out = codes.data() + size_t(r) * width + g * GROUP;
#if defined(WIDE)
        _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8((__m512i)first));
        _mm_storeu_si128((__m128i*)(out + LANES), _mm512_cvtepi32_epi8((__m512i)second));
        sums[at] = _mm512_reduce_add_epi32((__m512i)(first + second));
#else
        int32_t sum = 0;
        for (int i = 0; i < LANES; i++) {
            out[i] = int8_t(first[i]);
            out[i + LANES] = int8_t(second[i]);
            sum += first[i] + second[i];
        }
        sums[at] = sum;
#endif
    }
};

template <int KIND>
static inline F steps_of(const uint8_t* panel, int groups, int g) {
    return halves((const uint16_t*)(panel + size_t(groups) * 256) + g * LANES);
}

// out[r] = the 16 sums of row r, R rows `stride` numbers apart.
template <int R>
static inline void floats(const float* w, int inputs, const float* in, size_t stride, F* out) {
    F acc[R];
    for (int r = 0; r < R; r++) acc[r] = F{};
    for (int k = 0; k < inputs; k++) {
        F weights = load(w + size_t(k) * LANES);
        for (int r = 0; r < R; r++) acc[r] = plus(acc[r], weights, in[size_t(r) * stride + k]);
    }
    for (int r = 0; r < R; r++) out[r] = acc[r];
}

// out[r] = row r's 16 sums of one panel.
template <int KIND, int R>
static void tile(const Linear& l, const uint8_t* panel, const Rows& x, int first, F* out) {
    if constexpr (KIND == FLOAT) return floats<R>((const float*)panel, l.in, x.row(first), x.width, out);
    F acc[R];
    for (int r = 0; r < R; r++) acc[r] = F{};
    const int groups = l.groups();
    const uint8_t* codes = panel + (KIND == INT8 ? 64 : 0);
    for (int g = 0; g < groups; g++) {
        U w[8];
        F step, low;
        if constexpr (KIND == INT8) {
            for (int j = 0; j < 8; j++) w[j] = *(const Uu*)(codes + size_t(g) * 512 + j * 64);
        } else {
            for (int j = 0; j < 4; j++) {
                U both = *(const Uu*)(codes + size_t(g) * 256 + j * 64);
                w[2 * j] = both & 15;
#if defined(WIDE)
                w[2 * j + 1] = (U)_mm512_and_si512(_mm512_srli_epi16((__m512i)both, 4), _mm512_set1_epi8(15));
#else
                w[2 * j + 1] = both >> 4;
#endif
            }
            step = steps_of<KIND>(panel, groups, g);
            if constexpr (KIND == INT4_LOWS)
                low = halves((const uint16_t*)(panel + size_t(groups) * 288) + g * LANES);
        }
        for (int r = 0; r < R; r++) {
            const int8_t* in = x.codes.data() + size_t(first + r) * x.width + g * GROUP;
            const size_t at = size_t(first + r) * (x.width / GROUP) + g;
            const int32_t offset = KIND == INT8 ? -128 : KIND == INT4 ? -8 : 0;
            I sum = I{} + offset * x.sums[at];
            for (int j = 0; j < 8; j++) sum = dot4(sum, w[j], in + 4 * j);
            F value = __builtin_convertvector(sum, F);
            if constexpr (KIND == INT8) {
                acc[r] = plus(acc[r], value, x.steps[at]);
            } else {
                acc[r] = plus(acc[r], value, step * x.steps[at]);
                if constexpr (KIND == INT4_LOWS) acc[r] = plus(acc[r], low, x.steps[at] * x.sums[at]);
            }
        }
    }
    if constexpr (KIND == INT8) {
        F scale = load((const float*)panel);
        for (int r = 0; r < R; r++) acc[r] *= scale;
    }
    for (int r = 0; r < R; r++) out[r] = acc[r];
}

// `some` of rows 0 to `rows`, as many at once as there are kernels for.
template <class Some>
static inline void each(int rows, Some some) {
    for (int first = 0, taken; first < rows; first += taken) {
        const int left = rows - first;
        taken = left >= 16 ? 16 : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (taken == 16) some.template operator()<16>(first);
        else if (taken == 8) some.template operator()<8>(first);
        else if (taken == 4) some.template operator()<4>(first);
        else if (taken == 2) some.template operator()<2>(first);
        else some.template operator()<1>(first);
    }
}

template <int KIND>
static void tiles(const Linear& l, const uint8_t* panel, const Rows& x, int first, int rows, F* out) {
    each(rows, [&]<int R>(int row) { tile<KIND, R>(l, panel, x, first + row, out + row); });
}

// The sums of one panel with its bias for `rows` rows from `first`, at most TILE.
static void sums(const Linear& l, int panel, const Rows& x, int first, int rows, F* out) {
    const uint8_t* data = l.panel(panel);
    if (l.kind == FLOAT) tiles<FLOAT>(l, data, x, first, rows, out);
    else if (l.kind == INT8) tiles<INT8>(l, data, x, first, rows, out);
    else if (l.kind == INT4) tiles<INT4>(l, data, x, first, rows, out);
    else tiles<INT4_LOWS>(l, data, x, first, rows, out);
    if (l.has_bias)
        for (int r = 0; r < rows; r++) out[r] += load(l.bias + panel * LANES);
}

// Threads that walk through a pass together. Between passes they spin for a little, then sleep.
class Team {
    std::vector<std::thread> threads;
    std::atomic<uint32_t> begun{0}, arrived{0}, generation{0};
    std::atomic<bool> closing{false};
    std::function<void(int)> work;
    static void rest(int turns) {
        if (turns >= 4096) std::this_thread::yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
    void serve(int me) {
        uint32_t seen = 0;
        while (true) {
            for (int turns = 0; begun.load(std::memory_order_acquire) == seen; turns++) {
                if (turns > 20000) begun.wait(seen);
                else rest(turns & 4095);
            }
            seen++;
            if (closing) return;
            work(me);
            meet();
        }
    }

  public:
    const int size;
    explicit Team(int n) : size(n) {
        for (int me = 1; me < n; me++) threads.emplace_back([this, me] { serve(me); });
    }
    ~Team() {
        closing = true;
        begun++;
        begun.notify_all();
        for (auto& thread : threads) thread.join();
    }
    void run(std::function<void(int)> what) {
        work = std::move(what);
        begun.fetch_add(1, std::memory_order_release);
        if (size > 1) begun.notify_all();
        work(0);
        meet();
    }
    void meet() {  // returns once all have come here
        if (size == 1) return;
        uint32_t now = generation.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(size)) {
            arrived.store(0, std::memory_order_relaxed);
            generation.store(now + 1, std::memory_order_release);
            return;
        }
        for (int turns = 0; generation.load(std::memory_order_acquire) == now; turns++) rest(turns);
    }
    // Thread `me`'s share of `count` things.
    std::pair<int, int> share(int me, int count) const {
        return {int(int64_t(count) * me / size), int(int64_t(count) * (me + 1) / size)};
    }
};

struct Norm {
    const float *weight, *bias;  // padded; weight null: no norm here, bias null: none
};
struct Layer {
    Norm attention_norm, mlp_norm, q_norm, k_norm;
    Linear q, k, v, o, gate, up, down;
    int32_t window, unused;
};

// An adapter of a layer (Hu et al. 2021, arXiv:2106.09685, eq. 3). The A of all matrices that read the same rows stand
// one below the other, and so does what they make of a row, of which each matrix takes its own `rank` numbers. DoRA
// brings outputs to other lengths (Liu et al. 2024, arXiv:2402.09353, eq. 5): what stands before the bias, times `length`.
enum Matrix { Q, K, V, O, GATE, UP, DOWN, MATRICES, HEAD_MATRIX = MATRICES };
enum Input { TO_QKV, TO_O, TO_MLP, TO_DOWN, INPUTS };
struct Low {
    const float* a;  // [panel][input][16]
    int32_t in, ranks;  // ranks 0: no adapter reads here
    int panels() const { return (ranks + LANES - 1) / LANES; }
};
struct High {
    const float *b, *length;  // [panel][rank][16] with the adapter's scale; padded, or null: 1
    int32_t rank, from;       // rank 0: no adapter here
};
struct Adapter {
    Low low[INPUTS];
    High high[MATRICES];
};

struct Shape {
    int32_t dim, layers, heads, kv_heads, head_dim, hidden, vocab;
    int32_t rms, post, activation, gated, rope, causal, kv_bits;
    int32_t slots, length, tokens, threads;
    float eps, scale, embedding_scale, head_scale;
    const Layer* layer;
    Norm embedding_norm, last_norm;
    Linear embedding, head;
    const float *places;     // (length, padded dim) added to the token's vector, or null
    const float *angles;     // (length, head_dim) cosines of the first half, sines of the second, or null
};

// (x - mean) / sqrt(variance + eps) * weight + bias; rms: the mean counts as 0 (Zhang & Sennrich 2019).
static void normalise(const Norm& n, bool rms, float eps, const float* x, float* out, int width) {
    const int whole = (width + LANES - 1) / LANES;
    F sum{}, square{};
    for (int v = 0; v < whole && !rms; v++) sum += load(x + v * LANES);
    const float mean = total(sum) / width;
    for (int v = 0; v < whole; v++) {
        F part = load(x + v * LANES) - mean;
        if ((v + 1) * LANES > width)
            for (int i = width - v * LANES; i < LANES; i++) part[i] = 0;
        square = plus(square, part, part);
    }
    const float factor = 1.0f / std::sqrt(total(square) / width + eps);
    for (int v = 0; v < whole; v++) {
        F y = (load(x + v * LANES) - mean) * factor * load(n.weight + v * LANES);
        if (n.bias) y += load(n.bias + v * LANES);
        if ((v + 1) * LANES <= width) store(out + v * LANES, y);
        else memcpy(out + v * LANES, &y, sizeof(float) * (width - v * LANES));  // the next head begins there
    }
}

// Zeros that take memory only as they are written to, so that a long window costs what is read of it.
template <class T>
struct Zeros {
    T* at = nullptr;
    Zeros() = default;
    Zeros(const Zeros&) = delete;
    ~Zeros() { free(at); }
    void make(size_t count) {
        at = (T*)calloc(count, sizeof(T));
        if (!at) throw std::bad_alloc();
    }
    T* data() { return at; }
    const T* data() const { return at; }
    T& operator[](size_t i) { return at[i]; }
    const T& operator[](size_t i) const { return at[i]; }
};

// Keys stand in blocks of 16 places, [block][head_dim][16], so that one register holds a number of 16 keys; values
// stand place after place. With 8 bits each key and value has a step of its own.
template <class T>
struct Cache {
    int length = 0, head_dim = 0;
    size_t per_head = 0;
    Zeros<T> keys, values;
    Zeros<float> key_steps, value_steps;
    void make(size_t heads, int places, int dim) {
        length = (places + LANES - 1) / LANES * LANES, head_dim = dim, per_head = size_t(length) * dim;
        keys.make(heads * per_head + 64), values.make(heads * per_head + 64);
        if (sizeof(T) == 1) key_steps.make(heads * length), value_steps.make(heads * length);
    }
    void write(size_t head, int place, const float* k, const float* v) {
        T* key = keys.data() + head * per_head + size_t(place / LANES) * head_dim * LANES + place % LANES;
        T* value = values.data() + head * per_head + size_t(place) * head_dim;
        float k_back = 1, v_back = 1;
        if (sizeof(T) == 1) {
            float k_most = 0, v_most = 0;
            for (int d = 0; d < head_dim; d++)
                k_most = std::fmax(k_most, std::fabs(k[d])), v_most = std::fmax(v_most, std::fabs(v[d]));
            key_steps[head * length + place] = k_most / 127, value_steps[head * length + place] = v_most / 127;
            k_back = k_most > 0 ? 127 / k_most : 0, v_back = v_most > 0 ? 127 / v_most : 0;
        }
        for (int d = 0; d < head_dim; d++) {
            key[size_t(d) * LANES] = sizeof(T) == 1 ? T(std::nearbyint(k[d] * k_back)) : T(k[d]);
            value[d] = sizeof(T) == 1 ? T(std::nearbyint(v[d] * v_back)) : T(v[d]);
        }
    }
    void copy(size_t from, size_t to, int places) {
        size_t whole = size_t((places + LANES - 1) / LANES) * LANES;
        memcpy(&keys[to * per_head], &keys[from * per_head], whole * head_dim * sizeof(T));
        memcpy(&values[to * per_head], &values[from * per_head], size_t(places) * head_dim * sizeof(T));
        if (sizeof(T) == 1) {
            memcpy(&key_steps[to * length], &key_steps[from * length], whole * 4);
            memcpy(&value_steps[to * length], &value_steps[from * length], size_t(places) * 4);
        }
    }
};

static inline F sixteen(const float* p) { return load(p); }
static inline F sixteen(const int8_t* p) {
#if defined(WIDE)
    return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    F out;
    for (int i = 0; i < LANES; i++) out[i] = p[i];
    return out;
#endif
}

// The numbers from d on, W registers of them, of R rows' weighed values. A row's begin and end rise with it, and each
// sees what is its own alone: a number that is none, weighed with zero, would be none either.
template <class T, int R, int W>
static void weigh(const T* values, int dim, int d, const float* p, int room, const int* begins, const int* ends,
                  const float* parts, float* out, size_t stride) {
    F acc[R][W] = {};
    const int low = begins[R - 1], high = ends[0] > low ? ends[0] : low;  // between them all see all
    auto alone = [&](int r, int at, int end) {
        for (; at < end; at++)
            for (int w = 0; w < W; w++)
                acc[r][w] = plus(acc[r][w], sixteen(values + size_t(at) * dim + d + w * LANES), p[r * room + at]);
    };
    for (int r = 0; r < R; r++) alone(r, begins[r], ends[r] < low ? ends[r] : low);
    for (int at = low; at < high; at++) {
        F value[W];
        for (int w = 0; w < W; w++) value[w] = sixteen(values + size_t(at) * dim + d + w * LANES);
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W; w++) acc[r][w] = plus(acc[r][w], value[w], p[r * room + at]);
    }
    for (int r = 0; r < R; r++) alone(r, high, ends[r]);
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) {
            const F done = acc[r][w] * parts[r];
            float* to = out + r * stride + d + w * LANES;
            if (d + (w + 1) * LANES <= dim) store(to, done);
            else memcpy(to, &done, sizeof(float) * (dim - d - w * LANES));  // the next head begins there
        }
}

// What R queries of one head make of the places `from` to each one's `limits`; out and q are R rows `stride` apart.
template <class T, int R>
static void look(const Cache<T>& c, size_t head, const float* q, float* out, size_t stride, const int* from,
                 const int* limits, float scale, std::vector<float>& scores) {
    const int dim = c.head_dim, first = from[0] / LANES, last = (limits[R - 1] + LANES - 1) / LANES;
    const int room = (last - first) * LANES;
    if (scores.size() < size_t(room) * R) scores.resize(size_t(room) * R + 4096);
    const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    F most[R];
    for (int r = 0; r < R; r++) most[r] = all(-INFINITY);
    for (int block = first; block < last; block++) {
        const T* keys = c.keys.data() + head * c.per_head + size_t(block) * dim * LANES;
        F even[R], odd[R];
        for (int r = 0; r < R; r++) even[r] = odd[r] = F{};
        int d = 0;
        for (; d + 1 < dim; d += 2) {
            F one = sixteen(keys + d * LANES), two = sixteen(keys + (d + 1) * LANES);
            for (int r = 0; r < R; r++) {
                even[r] = plus(even[r], one, q[r * stride + d]);
                odd[r] = plus(odd[r], two, q[r * stride + d + 1]);
            }
        }
        if (d < dim)
            for (int r = 0; r < R; r++) even[r] = plus(even[r], sixteen(keys + d * LANES), q[r * stride + d]);
        F steps = all(scale);
        if (sizeof(T) == 1) steps *= load(c.key_steps.data() + head * c.length + block * LANES);
        for (int r = 0; r < R; r++) {
            F score = (even[r] + odd[r]) * steps;
            const int begin = from[r] - block * LANES, end = limits[r] - block * LANES;
            if (begin > 0 || end < LANES) score = ((lane < begin) | (lane >= end)) ? all(-INFINITY) : score;
            most[r] = larger(most[r], score);
            store(scores.data() + size_t(r) * room + (block - first) * LANES, score);
        }
    }
    float parts[R];
    int begins[R], ends[R];
    for (int r = 0; r < R; r++) {
        const float top = greatest(most[r]);
        F sum{};
        float* p = scores.data() + size_t(r) * room;
        for (int at = 0; at < room; at += LANES) {
            F score = load(p + at);
            F e = exponential(score - top);
            e = score == -INFINITY ? F{} : e;
            sum += e;
            if (sizeof(T) == 1) e *= load(c.value_steps.data() + head * c.length + first * LANES + at);
            store(p + at, e);
        }
        parts[r] = 1.0f / total(sum);
        begins[r] = from[r] - first * LANES, ends[r] = limits[r] - first * LANES;
    }
    const T* values = c.values.data() + head * c.per_head + size_t(first) * LANES * dim;
    for (int d = 0, wide; d < dim; d += wide * LANES) {
        const int left = (dim - d + LANES - 1) / LANES;
        wide = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (wide == 4) weigh<T, R, 4>(values, dim, d, scores.data(), room, begins, ends, parts, out, stride);
        else if (wide == 2) weigh<T, R, 2>(values, dim, d, scores.data(), room, begins, ends, parts, out, stride);
        else weigh<T, R, 1>(values, dim, d, scores.data(), room, begins, ends, parts, out, stride);
    }
}

struct Call {
    int n;
    const int64_t *ids, *slots, *places, *limits;
    const int64_t* starts;  // where in its slot a token's text begins, whole blocks of places; null: at the first
    int wanted;
    const int64_t* which;
    float* logits;  // (wanted, whole panels of the vocabulary), or null
    float* states;  // (n, padded dim), or null
    const int64_t* adapters;  // of each token, 0 for none; or null: none of any
    int start(int row) const { return starts ? int(starts[row]) : 0; }
    int64_t position(int row) const { return places[row] - start(row); }
    bool together(int row, int other) const {  // of one text
        return slots[row] == slots[other] && start(row) == start(other);
    }
};

// Where the first thread's time goes. Built with -DTIMED (`scripts/bench token_time`); else nothing of it is there.
enum Part { NORMS, PRODUCTS, ROTARY, ATTENTION, HEAD, WAITING, PARTS };
struct Clock {
#if defined(TIMED)
    std::chrono::steady_clock::time_point last;
    double seconds[PARTS] = {};
    void begin(int me) {
        if (me == 0) last = std::chrono::steady_clock::now();
    }
    void spent(int me, Part part) {
        if (me) return;
        const auto now = std::chrono::steady_clock::now();
        seconds[part] += std::chrono::duration<double>(now - last).count(), last = now;
    }
#else
    void begin(int) {}
    void spent(int, Part) {}
#endif
};

// Rows of one tile that have the same adapter.
struct Run {
    const Adapter* layers;
    int first, rows;
};

struct Model {
    Shape s;
    std::vector<Layer> layers;
    Team team;
    Rows x, h, q, k, v, mixed, inner, last;
    std::vector<const Adapter*> adapters;
    std::vector<Run> runs;         // of this pass; none where no row has an adapter
    std::vector<int> runs_before;  // each tile
    std::vector<float> low;        // what the runs' A make of their rows
    size_t low_width = 0;
    Cache<float> wide;
    Cache<int8_t> narrow;
    std::vector<std::vector<float>> scores;
    Clock clock;

    explicit Model(const Shape& shape) : s(shape), layers(shape.layer, shape.layer + shape.layers), team(shape.threads) {
        for (Rows* rows : {&x, &h}) rows->make(s.tokens, s.dim);
        for (Rows* rows : {&q, &mixed}) rows->make(s.tokens, s.heads * s.head_dim);
        for (Rows* rows : {&k, &v}) rows->make(s.tokens, s.kv_heads * s.head_dim);
        inner.make(s.tokens, s.hidden);
        last.make(s.tokens, s.dim);
        scores.resize(s.threads);
        size_t heads = size_t(s.slots) * (s.causal ? s.layers : 1) * s.kv_heads;
        if (s.kv_bits == 8) narrow.make(heads, s.length, s.head_dim);
        else wide.make(heads, s.length, s.head_dim);
    }
    size_t head_at(int64_t slot, int layer, int g) const {
        return (size_t(slot) * (s.causal ? s.layers : 1) + (s.causal ? layer : 0)) * s.kv_heads + g;
    }

    void embed(int64_t id, int64_t place, float* out) const {
        const Linear& l = s.embedding;
        const uint8_t* panel = l.panel(int(id / LANES));
        const int lane = int(id % LANES), groups = l.groups();
        for (int k = 0; k < l.in; k++) {
            const int g = k / GROUP, quad = k % GROUP / 4, j = k % 4;
            float w;
            if (l.kind == FLOAT) {
                w = ((const float*)panel)[size_t(k) * LANES + lane];
            } else if (l.kind == INT8) {
                int code = panel[64 + size_t(g) * 512 + quad * 64 + lane * 4 + j];
                w = float(code - 128) * ((const float*)panel)[lane];
            } else {
                int both = panel[size_t(g) * 256 + quad / 2 * 64 + lane * 4 + j];
                int code = quad % 2 ? both >> 4 : both & 15;
                float step = steps_of<INT4>(panel, groups, g)[lane];
                w = l.kind == INT4 ? step * float(code - 8)
                                   : step * float(code) + halves((const uint16_t*)(panel + size_t(groups) * 288) + g * LANES)[lane];
            }
            out[k] = w * s.embedding_scale + (s.places ? s.places[size_t(place) * padded(s.dim) + k] : 0.0f);
        }
        if (s.embedding_norm.weight) normalise(s.embedding_norm, s.rms, s.eps, out, out, s.dim);
    }

    void adapt(const Adapter* layers) {  // or std::bad_alloc, and nothing is changed
        size_t ranks = low_width;
        for (int layer = 0; layer < s.layers; layer++)
            for (const Low& l : layers[layer].low) ranks = std::max(ranks, size_t(l.panels()) * LANES);
        adapters.reserve(adapters.size() + 1);
        low.resize(ranks * s.tokens);
        low_width = ranks;
        adapters.push_back(layers);
    }

    void find_runs(const Call& c) {
        runs.clear(), runs_before.clear();
        if (!c.adapters) return;
        for (int row = 0; row < c.n; row++) {
            const int64_t number = c.adapters[row];
            if (row % TILE == 0) runs_before.push_back(int(runs.size()));
            if (!number) continue;
            if (row % TILE && c.adapters[row - 1] == number) runs.back().rows++;
            else runs.push_back({adapters[number - 1], row, 1});
        }
        runs_before.push_back(int(runs.size()));
    }

    // What the runs' A make of an input of a layer, shared among the threads; false where none reads it.
    bool lower(int layer, Input input, const Rows& in, int me) {
        if (runs.empty()) return false;
        int panels = 0;
        for (const Run& run : runs) panels = std::max(panels, run.layers[layer].low[input].panels());
        auto [from, to] = team.share(me, panels * int(runs.size()));
        F got[TILE];
        for (int task = from; task < to; task++) {
            const Run& run = runs[task % runs.size()];
            const int panel = task / int(runs.size());
            const Low& l = run.layers[layer].low[input];
            if (panel >= l.panels()) continue;
            const float* a = l.a + size_t(panel) * l.in * LANES;
            each(run.rows, [&]<int R>(int r) { floats<R>(a, l.in, in.row(run.first + r), in.width, got + r); });
            for (int r = 0; r < run.rows; r++) store(&low[(run.first + r) * low_width + panel * LANES], got[r]);
        }
        return panels > 0;
    }

    // Add to a tile's sums of one panel of a matrix what the adapters of its rows make of what `lower` found.
    void lift(const Linear& l, int layer, Matrix matrix, int panel, int first, F* out) const {
        F got[TILE];
        for (int number = runs_before[first / TILE]; number < runs_before[first / TILE + 1]; number++) {
            const Run& run = runs[number];
            const High& high = run.layers[layer].high[matrix];
            if (!high.rank) continue;
            const float* b = high.b + size_t(panel) * high.rank * LANES;
            const float* in = &low[run.first * low_width + high.from];
            each(run.rows, [&]<int R>(int r) { floats<R>(b, high.rank, in + r * low_width, low_width, got + r); });
            F* at = out + (run.first - first);
            for (int r = 0; r < run.rows; r++) at[r] += got[r];
            if (!high.length) continue;
            const F bias = l.has_bias ? load(l.bias + panel * LANES) : F{};
            const F length = load(high.length + panel * LANES);
            for (int r = 0; r < run.rows; r++) at[r] = (at[r] - bias) * length + bias;
        }
    }

    // out (rows, width) = l(in), panels shared among the threads; `add`: onto what stands there.
    void product(const Linear& l, int layer, Matrix matrix, const Rows& in, int n, float* out, size_t width, bool add,
                 int from, int to) {
        F got[TILE];
        for (int panel = from; panel < to; panel++)
            for (int first = 0; first < n; first += TILE) {
                const int rows = n - first < TILE ? n - first : TILE;
                sums(l, panel, in, first, rows, got);
                if (!runs.empty() && matrix != HEAD_MATRIX) lift(l, layer, matrix, panel, first, got);
                for (int r = 0; r < rows; r++) {
                    float* at = out + size_t(first + r) * width + panel * LANES;
                    store(at, add ? load(at) + got[r] : got[r]);
                }
            }
    }

    // Rows [from, to) of `in` made ready for products: normalised into h, or in place where norms come behind.
    void prepare(const Norm* norm, int from, int to) {
        for (int r = from; r < to; r++) {
            if (s.post) {
                if (norm) normalise(*norm, s.rms, s.eps, x.row(r), x.row(r), s.dim);
                memcpy(h.row(r), x.row(r), sizeof(float) * x.width);
            } else {
                normalise(*norm, s.rms, s.eps, x.row(r), h.row(r), s.dim);
            }
            h.round(r, 0, h.width);
        }
    }

    void turn(float* head, const Norm& norm, int64_t place) const {
        if (norm.weight) normalise(norm, true, s.eps, head, head, s.head_dim);
        if (!s.angles) return;
        const int half = s.head_dim / 2;
        const float* cosines = s.angles + size_t(place) * s.head_dim;
        const float* sines = cosines + half;
        for (int d = 0; d < half; d++) {
            const float a = head[d], b = head[d + half];
            head[d] = a * cosines[d] - b * sines[d];
            head[d + half] = b * cosines[d] + a * sines[d];
        }
    }

    template <class T>
    void attend(Cache<T>& cache, const Call& c, int layer, int from, int to, std::vector<float>& room) {
        const int window = layers[layer].window, per = s.heads / s.kv_heads;
        for (int task = from; task < to; task++) {  // all rows of a head stand together
            const int head = task / c.n, row = task % c.n;
            const size_t at = head_at(c.slots[row], layer, head / per);
            int rows = 1;  // neighbours of one text share the keys that are loaded
            while (rows < 4 && task + rows < to && row + rows < c.n && c.together(row, row + rows)) rows++;
            rows = rows == 4 ? 4 : 1;
            int begins[4], limits[4];
            for (int r = 0; r < rows; r++) {
                limits[r] = int(c.limits[row + r]);
                begins[r] = c.start(row + r);
                if (window > 0 && limits[r] - window > begins[r]) begins[r] = limits[r] - window;
            }
            const float* query = q.row(row) + head * s.head_dim;
            float* out = mixed.row(row) + head * s.head_dim;
            if (rows == 4) look<T, 4>(cache, at, query, out, q.width, begins, limits, s.scale, room);
            else look<T, 1>(cache, at, query, out, q.width, begins, limits, s.scale, room);
            task += rows - 1;
        }
    }

    void met(int me, Part part) {  // `part` is done by all
        clock.spent(me, part);
        team.meet();
        clock.spent(me, WAITING);
    }

    void block(const Call& c, int number, int me) {
        const Layer& l = layers[number];
        const Layer* before = number ? &layers[number - 1] : nullptr;
        auto [row0, row1] = team.share(me, c.n);
        prepare(s.post ? (before ? &before->mlp_norm : nullptr) : &l.attention_norm, row0, row1);
        met(me, NORMS);
        if (lower(number, TO_QKV, h, me)) met(me, PRODUCTS);
        const int qp = l.q.panels(), kp = l.k.panels(), vp = l.v.panels();
        auto [p0, p1] = team.share(me, qp + kp + vp);
        auto within = [](int at, int most) { return at < 0 ? 0 : at > most ? most : at; };
        product(l.q, number, Q, h, c.n, q.values.data(), q.width, false, within(p0, qp), within(p1, qp));
        product(l.k, number, K, h, c.n, k.values.data(), k.width, false, within(p0 - qp, kp), within(p1 - qp, kp));
        product(l.v, number, V, h, c.n, v.values.data(), v.width, false, within(p0 - qp - kp, vp), within(p1 - qp - kp, vp));
        met(me, PRODUCTS);
        for (int r = row0; r < row1; r++) {
            for (int i = 0; i < s.heads; i++) turn(q.row(r) + i * s.head_dim, l.q_norm, c.position(r));
            for (int g = 0; g < s.kv_heads; g++) {
                float* key = k.row(r) + g * s.head_dim;
                turn(key, l.k_norm, c.position(r));
                const size_t at = head_at(c.slots[r], number, g);
                if (s.kv_bits == 8) narrow.write(at, int(c.places[r]), key, v.row(r) + g * s.head_dim);
                else wide.write(at, int(c.places[r]), key, v.row(r) + g * s.head_dim);
            }
        }
        met(me, ROTARY);
        auto [t0, t1] = team.share(me, c.n * s.heads);
        if (s.kv_bits == 8) attend(narrow, c, number, t0, t1, scores[me]);
        else attend(wide, c, number, t0, t1, scores[me]);
        met(me, ATTENTION);
        for (int r = row0; r < row1; r++) mixed.round(r, 0, mixed.width);
        lower(number, TO_O, mixed, me);
        met(me, NORMS);
        auto [o0, o1] = team.share(me, l.o.panels());
        product(l.o, number, O, mixed, c.n, x.values.data(), x.width, true, o0, o1);
        met(me, PRODUCTS);
        prepare(s.post ? &l.attention_norm : &l.mlp_norm, row0, row1);
        met(me, NORMS);
        if (lower(number, TO_MLP, h, me)) met(me, PRODUCTS);
        perceive(number, c.n, me);
        met(me, PRODUCTS);
        if (lower(number, TO_DOWN, inner, me)) met(me, PRODUCTS);
        auto [d0, d1] = team.share(me, l.down.panels());
        product(l.down, number, DOWN, inner, c.n, x.values.data(), x.width, true, d0, d1);
        met(me, PRODUCTS);
    }

    void perceive(int number, int n, int me) {  // inner = act(gate) * up, rounded where it is made
        const Layer& l = layers[number];
        const int panels = l.up.panels();
        auto [g0, g1] = team.share(me, (panels + 1) / 2);
        F up[TILE], gate[TILE];
        float pairs[TILE][GROUP];
        for (int pair = g0; pair < g1; pair++)
            for (int first = 0; first < n; first += TILE) {
                const int rows = n - first < TILE ? n - first : TILE;
                if (2 * pair + 1 == panels) memset(pairs, 0, sizeof(pairs));  // half a group has no outputs
                for (int panel = 2 * pair; panel < 2 * pair + 2 && panel < panels; panel++) {
                    sums(l.up, panel, h, first, rows, up);
                    if (s.gated) sums(l.gate, panel, h, first, rows, gate);
                    if (!runs.empty()) lift(l.up, number, UP, panel, first, up);
                    if (!runs.empty() && s.gated) lift(l.gate, number, GATE, panel, first, gate);
                    for (int r = 0; r < rows; r++) {
                        F y = s.gated ? activate(s.activation, gate[r]) * up[r] : activate(s.activation, up[r]);
                        if (l.down.kind == FLOAT || !runs.empty()) store(inner.row(first + r) + panel * LANES, y);
                        if (l.down.kind != FLOAT) store(pairs[r] + panel % 2 * LANES, y);
                    }
                }
                for (int r = 0; r < rows && l.down.kind != FLOAT; r++) inner.round(first + r, pair, pairs[r]);
            }
    }

    void pass(const Call& c, int me) {
        clock.begin(me);
        auto [row0, row1] = team.share(me, c.n);
        for (int r = row0; r < row1; r++) embed(c.ids[r], c.position(r), x.row(r));
        for (int layer = 0; layer < s.layers; layer++) block(c, layer, me);
        const Norm& norm = s.post ? layers.back().mlp_norm : s.last_norm;
        if (c.states)
            for (int r = row0; r < row1; r++) normalise(norm, s.rms, s.eps, x.row(r), c.states + size_t(r) * x.width, s.dim);
        if (!c.logits) return;
        auto [w0, w1] = team.share(me, c.wanted);
        for (int w = w0; w < w1; w++) {
            normalise(norm, s.rms, s.eps, x.row(int(c.which[w])), last.row(w), s.dim);
            if (s.head_scale != 1.0f)
                for (int d = 0; d < s.dim; d++) last.row(w)[d] *= s.head_scale;
            last.round(w, 0, last.width);
        }
        met(me, HEAD);
        auto [p0, p1] = team.share(me, s.head.panels());
        product(s.head, 0, HEAD_MATRIX, last, c.wanted, c.logits, size_t(s.head.panels()) * LANES, false, p0, p1);
        clock.spent(me, HEAD);
    }
};

extern "C" {
size_t packed_bytes(int32_t kind, int32_t in, int32_t out) {
    Linear l{kind, in, out, 0, nullptr, nullptr};
    return l.bytes() * l.panels();
}
// codes: float32 (out, in), int8 (out, in), or two 4-bit codes a byte (out, in / 2), even inputs in the low halves.
// steps: float32 (out,) for 8 bits, else float16 (out, in / 32); lows: float16 (out, in / 32).
void pack(int32_t kind, int32_t in, int32_t out, const void* codes, const void* steps, const void* lows, uint8_t* data) {
    Linear l{kind, in, out, 0, data, nullptr};
    const int groups = in / GROUP;
    for (int first = 0; first < out; first += LANES) {
        uint8_t* panel = data + l.bytes() * (first / LANES);
        const int lanes = std::min(LANES, out - first);
        memset(panel, 0, l.bytes());
        if (kind == FLOAT) {
            const float* from = (const float*)codes + size_t(first) * in;
            for (int k = 0; k < in; k++)
                for (int lane = 0; lane < lanes; lane++) ((float*)panel)[size_t(k) * LANES + lane] = from[size_t(lane) * in + k];
            continue;
        }
        if (kind == INT8) {
            for (int k = 0; k < in; k += 4)
                for (int lane = 0; lane < LANES; lane++) {
                    uint32_t four = 0;  // of the codes beyond the last row or column, too
                    const int count = lane < lanes ? std::min(4, in - k) : 0;
                    if (count) memcpy(&four, (const int8_t*)codes + size_t(first + lane) * in + k, count);
                    four ^= 0x80808080;
                    if (in - k < 4) four &= (1u << 8 * (in - k)) - 1;
                    memcpy(panel + 64 + size_t(k / GROUP) * 512 + k % GROUP / 4 * 64 + lane * 4, &four, 4);
                }
            memcpy(panel, (const float*)steps + first, lanes * sizeof(float));
            continue;
        }
        for (int k = 0; k < in; k += 8)
            for (int lane = 0; lane < lanes; lane++) {
                const uint8_t* c = (const uint8_t*)codes + size_t(first + lane) * (in / 2) + k / 2;
                uint8_t* four = panel + size_t(k / GROUP) * 256 + k % GROUP / 8 * 64 + lane * 4;
                four[0] = (c[0] & 15) | (c[2] & 15) << 4, four[1] = c[0] >> 4 | (c[2] & 0xF0);
                four[2] = (c[1] & 15) | (c[3] & 15) << 4, four[3] = c[1] >> 4 | (c[3] & 0xF0);
            }
        uint16_t* ends = (uint16_t*)(panel + size_t(groups) * 256);
        for (int g = 0; g < groups; g++)
            for (int lane = 0; lane < lanes; lane++) {
                const size_t from = size_t(first + lane) * groups + g;
                ends[g * LANES + lane] = ((const uint16_t*)steps)[from];
                if (kind == INT4_LOWS) ends[(groups + g) * LANES + lane] = ((const uint16_t*)lows)[from];
            }
    }
}
void* model_new(const Shape* shape) {
    try {
        return new Model(*shape);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
void model_free(void* model) { delete (Model*)model; }
void model_copy(void* model, int64_t source, int64_t target, int32_t places) {
    Model& m = *(Model*)model;
    for (int layer = 0; layer < m.s.layers; layer++)
        for (int g = 0; g < m.s.kv_heads; g++) {
            size_t from = m.head_at(source, layer, g), to = m.head_at(target, layer, g);
            if (m.s.kv_bits == 8) m.narrow.copy(from, to, places);
            else m.wide.copy(from, to, places);
        }
}
int32_t model_adapt(void* model, const Adapter* layers) {  // the adapter's number, from 1 on; 0: no memory for it
    Model& m = *(Model*)model;
    try {
        m.adapt(layers);
    } catch (const std::bad_alloc&) {
        return 0;
    }
    return int32_t(m.adapters.size());
}
void model_run(void* model, const Call* call) {
    Model& m = *(Model*)model;
    m.find_runs(*call);
    m.team.run([&](int me) { m.pass(*call, me); });
}
#if defined(TIMED)
void model_times(void* model, double* seconds) { memcpy(seconds, ((Model*)model)->clock.seconds, sizeof(double) * PARTS); }
#endif
}
