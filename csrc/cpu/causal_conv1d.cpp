// The causal convolution over time, each channel by itself, forward, backward and step by step.
//
// Where channels follow each other in memory, a vector is of channels and goes through a few steps at a time, so that rows
// are read once and in order. Otherwise a vector is of steps of one channel, a piece of which lies in the cache as floats:
// the taps are loads at neighbouring addresses.
#include "cpu/activations.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace llmcore::LLMCORE_ISA {
namespace {

constexpr int kPiece = 512;       // steps of one channel
constexpr int kChannels = 8;      // channels that a thread takes together, so that documents are looked for once
constexpr int kSteps = 8;         // steps of a tile of channels
constexpr int64_t kBand = 512;    // channels of a tile, at most
// Gradients of the filter are added up in short chains, and these exactly: of tiles, and of vectors of steps.
constexpr int kTilesPerSum = 4, kVectorsPerSum = 4;
constexpr int kMargin = 16;       // floats before and after a piece, whole vectors

LLMCORE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LLMCORE_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// f(std::integral_constant<int, width>{})
template <class F>
LLMCORE_INLINE void with_width(int64_t width, const F& f) {
    if (width == 2) return f(std::integral_constant<int, 2>{});
    if (width == 3) return f(std::integral_constant<int, 3>{});
    f(std::integral_constant<int, 4>{});
}

// ---- single elements: of filters and states, which are small ------------------------------------------------------------------

LLMCORE_INLINE float element(const View& x, int64_t at) {
    float value = 0.0f;
    with_element(x.dtype, [&](auto e) { value = to_float(static_cast<const decltype(e)*>(x.data)[at]); });
    return value;
}

LLMCORE_INLINE void set_element(const View& x, int64_t at, float value) {
    with_element(x.dtype, [&](auto e) { store_one(static_cast<decltype(e)*>(x.data) + at, value); });
}

LLMCORE_INLINE int64_t offset(const View& x, int64_t i, int64_t j, int64_t k) {
    return i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
}

// The taps as floats, oldest first, and the bias: row k holds that of every channel, and zeros up to whole vectors.
class Filters {
  public:
    Filters(const View& weight, const View& bias, int64_t channels, int64_t width)
        : stride(round_up(channels, VL)), floats_((width + 1) * stride) {
        const auto fill = [&](const View& from, int64_t k, int64_t first) {
            float* const row = floats_.data() + k * stride;
            const int64_t count = from ? channels : 0, step = from.stride[0];
            with_element(from.dtype, [&](auto e) {
                const auto* const p = static_cast<const decltype(e)*>(from.data) + first;
                for (int64_t d = 0; d < count; d++) row[d] = to_float(p[d * step]);
            });
            for (int64_t d = count; d < stride; d++) row[d] = 0.0f;
        };
        for (int64_t k = 0; k < width; k++) fill(weight, k, k * weight.stride[1]);
        fill(bias, width, 0);
    }
    const float* row(int64_t k) const { return floats_.data() + k * stride; }

    const int64_t stride;

  private:
    Scratch floats_;
};

// ---- documents --------------------------------------------------------------------------------------------------------------

// Steps [begin, end) of a sequence, and the row of their states.
struct Document {
    int64_t begin, end, row;
};

struct Documents {
    View cu_seqlens, seq_idx;
    int64_t count, length;

    // f(document) for those of one sequence; some may have no step
    template <class F>
    void each(int64_t batch, const F& f) const {
        if (cu_seqlens) {
            const auto* const offsets = static_cast<const std::int32_t*>(cu_seqlens.data);
            for (int64_t i = 0; i < count; i++) f(Document{offsets[i], offsets[i + 1], i});
        } else if (seq_idx) {
            const auto* const numbers = static_cast<const std::int32_t*>(seq_idx.data) + batch * seq_idx.stride[0];
            const int64_t stride = seq_idx.stride[1];
            for (int64_t begin = 0, end; begin < length; begin = end) {
                for (end = begin + 1; end < length && numbers[end * stride] == numbers[begin * stride];) end++;
                f(Document{begin, end, 0});
            }
        } else {
            f(Document{0, length, batch});
        }
    }
};

// How many items of so many channels are worth a thread.
LLMCORE_INLINE int64_t grain(const Documents& documents, int64_t channels) {
    return documents.length == 0 ? kGrain : kGrain / (channels * documents.length);
}

// to[j * stride + i] = states[row, channel + i, j], zeros where there are none
LLMCORE_INLINE void load_states(const View& states, int64_t row, int64_t channel, int64_t count, int before, float* to,
                                int64_t stride) {
    for (int j = 0; j < before; j++) {
        float* const p = to + j * stride;
        for (int64_t i = 0; i < count; i++) p[i] = states ? element(states, offset(states, row, channel + i, j)) : 0.0f;
        for (int64_t i = count; i < round_up(count, VL); i++) p[i] = 0.0f;
    }
}

// The gradient of a channel's state: that of the inputs before the first step. g[j * g_stride] is the gradient before the
// activation at the j-th step, zero after the last.
LLMCORE_INLINE void store_dinitial(const View& dinitial, const View& dfinal, const Document& document, int64_t channel,
                                   const Filters& filters, int before, const float* g, int64_t g_stride) {
    for (int j = 0; j < before; j++) {
        float sum = 0.0f;
        for (int k = 0; k <= j; k++) sum += filters.row(k)[channel] * g[(j - k) * g_stride];
        const int64_t kept = j - (document.end - document.begin);
        if (dfinal && kept >= 0) sum += element(dfinal, offset(dfinal, document.row, channel, kept));
        set_element(dinitial, offset(dinitial, document.row, channel, j), sum);
    }
}

// ---- a vector of steps ------------------------------------------------------------------------------------------------------

// Zeros up to whole vectors.
template <class T>
LLMCORE_INLINE void load_row(const T* from, int64_t stride, int64_t count, float* to) {
    if (stride == 1) {
        for_vectors(count, [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes)); });
        return;
    }
    for (int64_t i = 0; i < count; i++) to[i] = to_float(from[i * stride]);
    for (int64_t i = count; i % VL != 0; i++) to[i] = 0.0f;
}

template <class T>
LLMCORE_INLINE void store_row(const float* from, int64_t count, T* to, int64_t stride) {
    for (int64_t i = 0; i < count; i++) store_one(to + i * stride, from[i]);
}

template <int W>
LLMCORE_INLINE vf convolve(const vf (&taps)[W], vf bias, const float* inputs) {
    vf pre = bias;
    for (int k = 0; k < W; k++) pre = fmadd(taps[k], load(inputs + k), pre);
    return pre;
}

template <int W, class T>
void fwd_steps(const View& x, const View& initial, const View& y, const Filters& filters, const Documents& documents,
               int64_t batch, int64_t channels, bool silu_) {
    const int64_t groups = round_up(channels, kChannels) / kChannels;
    const int64_t x_step = x.stride[2], y_step = y.stride[2];
    parallel_for(batch * groups, grain(documents, kChannels), [&](int64_t first, int64_t last) {
        alignas(64) float buffer[kMargin + kPiece + kMargin], out[kPiece];
        float* const inputs = buffer + kMargin - (W - 1);  // those before the piece come first
        for (int64_t item = first; item < last; item++) {
            const int64_t b = item / groups, channel = item % groups * kChannels;
            documents.each(b, [&](const Document& document) {
                for (int64_t d = channel; d < least(channels, channel + kChannels); d++) {
                    vf taps[W];
                    for (int k = 0; k < W; k++) taps[k] = broadcast(filters.row(k)[d]);
                    const vf bias = broadcast(filters.row(W)[d]);
                    load_states(initial, document.row, d, 1, W - 1, inputs, 1);
                    for (int64_t t = document.begin; t < document.end; t += kPiece) {
                        const int64_t count = least(kPiece, document.end - t);
                        const T* const from = static_cast<const T*>(x.data) + offset(x, b, d, t);
                        T* const to = static_cast<T*>(y.data) + offset(y, b, d, t);
                        load_row(from, x_step, count, inputs + W - 1);
                        for_vectors(count, [&](int64_t i, auto lanes) {
                            const vf pre = convolve<W>(taps, bias, inputs + i), result = silu_ ? silu(pre) : pre;
                            if (y_step == 1) {
                                store(to + i, result, lanes);
                            } else {
                                store(out + i, result);
                            }
                        });
                        if (y_step != 1) store_row(out, count, to, y_step);
                        for (int j = 0; j < W - 1; j++) inputs[j] = inputs[count + j];
                    }
                }
            });
        }
    });
}

template <int W, class T>
void bwd_steps(const View& dy, const View& dfinal, const View& x, const View& initial, const View& dx, float* dfilter,
               const View& dinitial, const Filters& filters, const Documents& documents, int64_t batch, int64_t channels,
               bool silu_) {
    const int64_t groups = round_up(channels, kChannels) / kChannels;
    parallel_for(batch * groups, grain(documents, kChannels), [&](int64_t first, int64_t last) {
        alignas(64) float buffer[kMargin + kPiece + kMargin], g[kPiece + kMargin], out[kPiece];
        float* const inputs = buffer + kMargin - (W - 1);
        for (int64_t item = first; item < last; item++) {
            const int64_t b = item / groups, channel = item % groups * kChannels;
            alignas(64) float sums[kChannels * (W + 1) * VL] = {}, lost[kChannels * (W + 1) * VL] = {};
            documents.each(b, [&](const Document& document) {
                const int64_t steps = document.end - document.begin, kept = document.end - (W - 1);
                for (int64_t d = channel; d < least(channels, channel + kChannels); d++) {
                    vf taps[W];
                    for (int k = 0; k < W; k++) taps[k] = broadcast(filters.row(k)[d]);
                    const vf bias = broadcast(filters.row(W)[d]);
                    const int64_t place = (d - channel) * (W + 1) * VL;
                    const T* const x_row = static_cast<const T*>(x.data) + offset(x, b, d, 0);
                    const T* const dy_row = static_cast<const T*>(dy.data) + offset(dy, b, d, 0);
                    T* const dx_row = static_cast<T*>(dx.data) + offset(dx, b, d, 0);
                    for (int j = 0; j < W - 1; j++) g[j] = 0.0f;
                    // Pieces from the last to the first: g[0 ..] is what the later piece began with.
                    for (int64_t piece = (steps + kPiece - 1) / kPiece - 1; piece >= 0; piece--) {
                        const int64_t t = document.begin + piece * kPiece, count = least(kPiece, document.end - t);
                        float after[W - 1];
                        for (int j = 0; j < W - 1; j++) after[j] = g[j];
                        if (piece == 0) {
                            load_states(initial, document.row, d, 1, W - 1, inputs, 1);
                        } else {
                            for (int j = 0; j < W - 1; j++) inputs[j] = to_float(x_row[(t - (W - 1) + j) * x.stride[2]]);
                        }
                        load_row(x_row + t * x.stride[2], x.stride[2], count, inputs + W - 1);
                        load_row(dy_row + t * dy.stride[2], dy.stride[2], count, g);
                        for (int64_t chain = 0; chain < count; chain += kVectorsPerSum * VL) {
                            vf sum[W + 1] = {};
                            for_vectors(least(kVectorsPerSum * VL, count - chain), [&](int64_t j, auto lanes) {
                                const int64_t i = chain + j;
                                vf gradient = load(g + i);
                                if (silu_) {
                                    gradient *= silu_derivative(convolve<W>(taps, bias, inputs + i));
                                    store(g + i, gradient, lanes);
                                    gradient = load(g + i, lanes);  // nothing beyond the last step, whatever pre is there
                                }
                                for (int k = 0; k < W; k++) sum[k] = fmadd(gradient, load(inputs + i + k, lanes), sum[k]);
                                sum[W] += gradient;
                            });
                            for (int k = 0; k <= W; k++) add_exactly(sums + place + k * VL, lost + place + k * VL, sum[k]);
                        }
                        for (int j = 0; j < W - 1; j++) g[count + j] = after[j];
                        T* const to = dx_row + t * dx.stride[2];
                        const bool direct = dx.stride[2] == 1 && (!dfinal || t + count <= kept);
                        for_vectors(count, [&](int64_t i, auto lanes) {
                            vf gradient = taps[W - 1] * load(g + i);
                            for (int k = 0; k < W - 1; k++) gradient = fmadd(taps[k], load(g + i + (W - 1) - k), gradient);
                            if (direct) {
                                store(to + i, gradient, lanes);
                            } else {
                                store(out + i, gradient);
                            }
                        });
                        if (!direct) {
                            if (dfinal) {
                                for (int64_t s = t > kept ? t : kept; s < t + count; s++) {
                                    out[s - t] += element(dfinal, offset(dfinal, document.row, d, s - kept));
                                }
                            }
                            store_row(out, count, to, dx.stride[2]);
                        }
                    }
                    if (dinitial) store_dinitial(dinitial, dfinal, document, d, filters, W - 1, g, 1);
                }
            });
            for (int64_t d = channel; d < least(channels, channel + kChannels); d++) {
                for (int k = 0; k <= W; k++) {
                    const int64_t place = ((d - channel) * (W + 1) + k) * VL;
                    double total = 0.0;
                    for (int64_t i = place; i < place + VL; i++) total += double(sums[i]) + double(lost[i]);
                    dfilter[(b * (W + 1) + k) * channels + d] = float(total);
                }
            }
        }
    });
}

// ---- a vector of channels ---------------------------------------------------------------------------------------------------

// Channels of one sequence that a thread takes through all steps: few enough that every thread has some.
LLMCORE_INLINE int64_t band_of(int64_t batch, int64_t channels) {
    return round_up(least(kBand, (batch * channels + max_threads() - 1) / max_threads()), 32);
}

template <int W, class T>
void fwd_channels(const View& x, const View& initial, const View& y, const Filters& filters, const Documents& documents,
                  int64_t batch, int64_t channels, bool silu_) {
    const int64_t band = band_of(batch, channels), bands = (channels + band - 1) / band;
    const int64_t x_step = x.stride[2], y_step = y.stride[2];
    parallel_for(batch * bands, grain(documents, band), [&](int64_t first, int64_t last) {
        const Scratch scratch((W - 1) * band);
        float* const state = scratch.data();
        for (int64_t item = first; item < last; item++) {
            const int64_t b = item / bands, channel = item % bands * band, count = least(band, channels - channel);
            const T* const from = static_cast<const T*>(x.data) + offset(x, b, channel, 0);
            T* const to = static_cast<T*>(y.data) + offset(y, b, channel, 0);
            documents.each(b, [&](const Document& document) {
                load_states(initial, document.row, channel, count, W - 1, state, band);
                for (int64_t t = document.begin; t < document.end; t += kSteps) {
                    const int steps = int(least(kSteps, document.end - t));
                    for_vectors(count, [&](int64_t c, auto lanes) {
                        vf taps[W], before[W - 1];
                        for (int k = 0; k < W; k++) taps[k] = load(filters.row(k) + channel + c, lanes);
                        const vf bias = load(filters.row(W) + channel + c, lanes);
                        for (int j = 0; j < W - 1; j++) {
                            const int64_t s = t - (W - 1) + j;
                            before[j] = s >= document.begin ? load(from + s * x_step + c, lanes)
                                                            : load(state + (s - document.begin + W - 1) * band + c);
                        }
                        for (int64_t s = t; s < t + steps; s++) {
                            const vf input = load(from + s * x_step + c, lanes);
                            vf pre = fmadd(taps[W - 1], input, bias);
                            for (int k = 0; k < W - 1; k++) pre = fmadd(taps[k], before[k], pre);
                            store(to + s * y_step + c, silu_ ? silu(pre) : pre, lanes);
                            for (int j = 0; j < W - 2; j++) before[j] = before[j + 1];
                            before[W - 2] = input;
                        }
                    });
                }
            });
        }
    });
}

template <int W, class T>
void bwd_channels(const View& dy, const View& dfinal, const View& x, const View& initial, const View& dx, float* dfilter,
                  const View& dinitial, const Filters& filters, const Documents& documents, int64_t batch, int64_t channels,
                  bool silu_) {
    const int64_t band = band_of(batch, channels), bands = (channels + band - 1) / band;
    parallel_for(batch * bands, grain(documents, band), [&](int64_t first, int64_t last) {
        const Scratch scratch((3 * (W - 1) + 3 * (W + 1)) * band);
        float *const state = scratch.data(), *const dkept = state + (W - 1) * band, *const after = dkept + (W - 1) * band;
        float *const sum = after + (W - 1) * band, *const total = sum + (W + 1) * band, *const lost = total + (W + 1) * band;
        const auto clear = [&](float* p, int rows) { __builtin_memset(p, 0, std::size_t(rows * band) * sizeof(float)); };
        for (int64_t item = first; item < last; item++) {
            const int64_t b = item / bands, channel = item % bands * band, count = least(band, channels - channel);
            const T* const x_row = static_cast<const T*>(x.data) + offset(x, b, channel, 0);
            const T* const dy_row = static_cast<const T*>(dy.data) + offset(dy, b, channel, 0);
            T* const dx_row = static_cast<T*>(dx.data) + offset(dx, b, channel, 0);
            int tiles = 0;
            clear(sum, W + 1);
            clear(total, W + 1);
            clear(lost, W + 1);
            const auto add_up = [&] {
                for (int64_t i = 0; i < (W + 1) * band; i += VL) add_exactly(total + i, lost + i, load(sum + i));
                clear(sum, W + 1);
                tiles = 0;
            };
            documents.each(b, [&](const Document& document) {
                const int64_t kept = dfinal ? document.end - (W - 1) : document.end;
                load_states(initial, document.row, channel, count, W - 1, state, band);
                if (dfinal) load_states(dfinal, document.row, channel, count, W - 1, dkept, band);
                clear(after, W - 1);  // the gradients before the activation at the next steps
                for (int64_t end = document.end; end > document.begin; end -= kSteps) {
                    const int64_t begin = end - kSteps > document.begin ? end - kSteps : document.begin;
                    for_vectors(count, [&](int64_t c, auto lanes) {
                        const auto input_at = [&](int64_t s) {
                            return s >= document.begin ? load(x_row + s * x.stride[2] + c, lanes)
                                                       : load(state + (s - document.begin + W - 1) * band + c);
                        };
                        vf taps[W], inputs[W], next[W], sums[W + 1] = {};
                        for (int k = 0; k < W; k++) taps[k] = load(filters.row(k) + channel + c, lanes);
                        const vf bias = load(filters.row(W) + channel + c, lanes);
                        for (int j = 0; j < W - 1; j++) {
                            inputs[j] = input_at(end - (W - 1) + j);
                            next[j + 1] = load(after + j * band + c);
                        }
                        for (int64_t t = end - 1; t >= begin; t--) {
                            for (int k = W - 1; k > 0; k--) inputs[k] = inputs[k - 1];
                            inputs[0] = input_at(t - (W - 1));
                            next[0] = load(dy_row + t * dy.stride[2] + c, lanes);
                            if (silu_) {
                                vf pre = bias;
                                for (int k = 0; k < W; k++) pre = fmadd(taps[k], inputs[k], pre);
                                next[0] *= silu_derivative(pre);
                            }
                            vf gradient = taps[W - 1] * next[0];
                            for (int k = 0; k < W - 1; k++) gradient = fmadd(taps[k], next[W - 1 - k], gradient);
                            if (t >= kept) gradient += load(dkept + (t - kept) * band + c);
                            store(dx_row + t * dx.stride[2] + c, gradient, lanes);
                            for (int k = 0; k < W; k++) sums[k] = fmadd(next[0], inputs[k], sums[k]);
                            sums[W] += next[0];
                            for (int j = W - 1; j > 0; j--) next[j] = next[j - 1];
                        }
                        for (int k = 0; k <= W; k++) store(sum + k * band + c, load(sum + k * band + c) + sums[k]);
                        for (int j = 0; j < W - 1; j++) store(after + j * band + c, next[j + 1]);
                    });
                    if (++tiles == kTilesPerSum) add_up();
                }
                if (dinitial) {
                    for (int64_t c = 0; c < count; c++) {
                        store_dinitial(dinitial, dfinal, document, channel + c, filters, W - 1, after + c, band);
                    }
                }
            });
            add_up();
            for (int k = 0; k <= W; k++) {
                float* const to = dfilter + (b * (W + 1) + k) * channels + channel;
                for_vectors(count, [&](int64_t c, auto lanes) {
                    store(to + c, load(total + k * band + c) + load(lost + k * band + c), lanes);
                });
            }
        }
    });
}

// Whether vectors of channels suit these tensors; if not, vectors of steps do, though they may have to be gathered.
LLMCORE_INLINE bool channels_in_order(const View& x, const View& y, const View& dy, int64_t length) {
    if (x.stride[2] == 1 && length > 1) return false;
    return x.stride[1] == 1 && y.stride[1] == 1 && (!dy || dy.stride[1] == 1);
}

// The last inputs of every document.
void final_states(const View& x, const View& initial, const View& final, const Documents& documents, int64_t batch,
                  int64_t channels, int before) {
    parallel_for(channels, kGrain / (batch * before), [&](int64_t first, int64_t last) {
        for (int64_t b = 0; b < batch; b++) {
            documents.each(b, [&](const Document& document) {
                for (int64_t d = first; d < last; d++) {
                    for (int j = 0; j < before; j++) {
                        const int64_t t = document.end - before + j, earlier = t - document.begin + before;
                        const float value = t >= document.begin ? element(x, offset(x, b, d, t))
                                            : initial           ? element(initial, offset(initial, document.row, d, earlier))
                                                                : 0.0f;
                        set_element(final, offset(final, document.row, d, j), value);
                    }
                }
            });
        }
    });
}

// ---- step by step -----------------------------------------------------------------------------------------------------------

LLMCORE_INLINE vf load_channels(const View& x, int64_t b, int64_t d, int64_t t, int lanes) {
    vf result{};
    with_element(x.dtype, [&](auto e) {
        const auto* const p = static_cast<const decltype(e)*>(x.data) + offset(x, b, d, t);
        if (x.stride[1] == 1) {
            result = load(p, lanes);
        } else {
            float values[VL] = {};
            for (int i = 0; i < lanes; i++) values[i] = to_float(p[i * x.stride[1]]);
            result = load(values);
        }
    });
    return result;
}

LLMCORE_INLINE void store_channels(const View& x, int64_t b, int64_t d, int64_t t, vf values, int lanes) {
    with_element(x.dtype, [&](auto e) {
        auto* const p = static_cast<decltype(e)*>(x.data) + offset(x, b, d, t);
        if (x.stride[1] == 1) return store(p, values, lanes);
        for (int i = 0; i < lanes; i++) store_one(p + i * x.stride[1], values[i]);
    });
}

// One step of states whose channels follow each other without gaps, as decoding has them: a whole block is moved at once.
template <class T>
void update_once(const View& x, const View& state, const View& y, const Filters& filters, int64_t batch, int64_t channels,
                 int64_t remembered, int64_t width, bool silu_) {
    const int64_t blocks = (channels + VL - 1) / VL;
    parallel_for(batch * blocks, kGrain / (VL * remembered), [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; item++) {
            const int64_t b = item / blocks, d = item % blocks * VL;
            const int lanes = int(least(VL, channels - d));
            const T* const inputs = static_cast<const T*>(x.data) + offset(x, b, d, 0);
            T* const rows = static_cast<T*>(state.data) + offset(state, b, d, 0);
            alignas(64) float columns[3 * VL] = {};
            for (int64_t k = 0; k < width - 1; k++) {
                const T* const column = rows + remembered - (width - 1) + k;
                for (int i = 0; i < lanes; i++) columns[k * VL + i] = to_float(column[i * remembered]);
            }
            vf pre = fmadd(load(filters.row(width - 1) + d), load_channels(x, b, d, 0, lanes), load(filters.row(width) + d));
            for (int64_t k = 0; k < width - 1; k++) {
                pre = fmadd(load(filters.row(k) + d), load(columns + k * VL), pre);
            }
            store_channels(y, b, d, 0, silu_ ? silu(pre) : pre, lanes);
            __builtin_memmove(rows, rows + 1, std::size_t(lanes * remembered - 1) * sizeof(T));
            for (int i = 0; i < lanes; i++) rows[(i + 1) * remembered - 1] = inputs[i * x.stride[1]];
        }
    });
}

}  // namespace

void causal_conv1d_fwd(View x, View weight, View bias, View initial, View cu_seqlens, View seq_idx, View y, View final,
                       int64_t batch, int64_t channels, int64_t length, int64_t width, int64_t documents, bool silu_) {
    const Documents all = {cu_seqlens, seq_idx, documents, length};
    if (final) final_states(x, initial, final, all, batch, channels, int(width - 1));
    if (length == 0) return;
    const Filters filters(weight, bias, channels, width);
    with_width(width, [&](auto w) {
        with_element(x.dtype, [&](auto e) {
            const auto run = channels_in_order(x, y, {}, length) ? fwd_channels<w(), decltype(e)> : fwd_steps<w(), decltype(e)>;
            run(x, initial, y, filters, all, batch, channels, silu_);
        });
    });
}

void causal_conv1d_bwd(View dy, View dfinal, View x, View weight, View bias, View initial, View cu_seqlens, View seq_idx, View dx,
                       View dfilter, View dinitial, int64_t batch, int64_t channels, int64_t length, int64_t width,
                       int64_t documents, bool silu_) {
    const Documents all = {cu_seqlens, seq_idx, documents, length};
    const Filters filters(weight, bias, channels, width);
    with_width(width, [&](auto w) {
        with_element(x.dtype, [&](auto e) {
            const auto run = channels_in_order(x, dx, dy, length) ? bwd_channels<w(), decltype(e)> : bwd_steps<w(), decltype(e)>;
            run(dy, dfinal, x, initial, dx, static_cast<float*>(dfilter.data), dinitial, filters, all, batch, channels, silu_);
        });
    });
}

void causal_conv1d_update(View x, View state, View weight, View bias, View y, int64_t batch, int64_t channels, int64_t steps,
                          int64_t remembered, int64_t width, bool silu_) {
    const Filters filters(weight, bias, channels, width);
    if (steps == 1 && state.stride[2] == 1 && state.stride[1] == remembered && state.dtype == x.dtype) {
        return with_element(x.dtype, [&](auto e) {
            update_once<decltype(e)>(x, state, y, filters, batch, channels, remembered, width, silu_);
        });
    }
    const int64_t blocks = (channels + VL - 1) / VL;
    parallel_for(batch * blocks, kGrain / (VL * (steps + remembered)), [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; item++) {
            const int64_t b = item / blocks, d = item % blocks * VL;
            const int lanes = int(least(VL, channels - d));
            const auto input_at = [&](int64_t t) {  // t from 0 at the state's oldest
                return t < remembered ? load_channels(state, b, d, t, lanes) : load_channels(x, b, d, t - remembered, lanes);
            };
            for (int64_t t = 0; t < steps; t++) {
                vf pre = load(filters.row(width) + d);
                for (int64_t k = 0; k < width; k++) {
                    pre = fmadd(load(filters.row(k) + d), input_at(remembered + t - (width - 1) + k), pre);
                }
                store_channels(y, b, d, t, silu_ ? silu(pre) : pre, lanes);
            }
            for (int64_t i = 0; i < remembered; i++) store_channels(state, b, d, i, input_at(i + steps), lanes);
        }
    });
}

}  // namespace llmcore::LLMCORE_ISA
