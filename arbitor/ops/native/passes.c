/*
 * The passes of training on a CPU that torch takes many operations for: one loop over memory each.
 *
 * Threads share rows, which do not depend on each other, so results do not depend on how many there are. Every
 * operation of floats is rounded by itself (-ffp-contract=off), in the order of the references, and sums of floats
 * are left to torch: so every bit is that of the references.
 *
 * Shape letters: N tokens or blocks, I in, O out, P packed bytes a row, H groups of momentum a row. Arrays are
 * contiguous. Functions of rows take the number of threads last.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum {
  PLANE = 32, /* packed bytes of a block */
  TRITS_PER_BYTE = 5,
  BLOCK = PLANE * TRITS_PER_BYTE,
  LEGAL_FACTOR = 243, /* times this, modulo 256, a byte that packing produces is below this */
  OCTAVE = 8,         /* exponents of momentum are eighths of an octave */
  SHARED = 16384,     /* elements from which a second thread pays */
  PANEL = 24,         /* rows of a matrix whose sums a core's registers hold for TILE tokens */
  TILE = 4,
  CHUNK = 64,         /* tokens for which a panel stays in the cache */
  QUAD = 4,           /* columns side by side in a panel */
  QUADS = 63          /* so many and one more keep sums within 16 bits, of two products of 0 to 2 with a code each */
};

#define PRAGMA(text) _Pragma(#text)
#define VECTORS PRAGMA(omp simd) /* the elements of a loop do not depend on each other */
#define THREADS_SHARE(rows, columns) \
  PRAGMA(omp parallel for schedule(static) num_threads(threads) if ((rows) * (columns) > SHARED))

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float power_of_2(int exponent) { return float_of((uint32_t)(exponent + 127) << 23); }

static inline float from_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }

/* To the nearest, of two the even one. */
static inline uint16_t to_bf16(float x) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

/* By its bits, since compilers make a branch of a choice; NaN stays. */
static inline float relu(float x) { return float_of(bits_of(x) & -(uint32_t) !(x < 0.0f)); }

static inline int clamp(int x, int low, int high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}

static inline float clampf(float x, float limit) {
  x = x > -limit ? x : -limit;
  return x < limit ? x : limit;
}

/* -- around a linear's products ------------------------------------------------------------------------------ */

/* relu(x)^2 of x [N, I]. */
void squared_relu(const float *x, float *y, int64_t N, int64_t I, int threads) {
  THREADS_SHARE(N, I)
  for (int64_t n = 0; n < N; n++) {
    VECTORS
    for (int64_t i = n * I; i < (n + 1) * I; i++) y[i] = relu(x[i]) * relu(x[i]);
  }
}

/*
 * int8 codes of tokens: x [N, I] * rstd ~ codes * scale. norm [N] has the tokens' 2-norms, or is NULL, where rstd is 1.
 * code_scale is the code of the largest element, smallest the least that counts as one.
 */
void quantize(const float *x, const float *norm, int8_t *codes, float *scale, float *rstd, int64_t N, int64_t I,
              float code_scale, float smallest, float epsilon, int threads) {
  THREADS_SHARE(N, I)
  for (int64_t n = 0; n < N; n++) {
    const float *row = x + n * I;
    uint32_t most = 0; /* magnitudes compare as integers like floats, with NaN above all */
    PRAGMA(omp simd reduction(max : most))
    for (int64_t i = 0; i < I; i++) {
      uint32_t magnitude = bits_of(row[i]) & 0x7FFFFFFFu;
      most = magnitude > most ? magnitude : most;
    }
    float absmax = float_of(most), inverse = 1.0f;
    absmax = absmax < smallest ? smallest : absmax;
    if (norm) {
      float mean = norm[n] * norm[n] / (float)I + epsilon;
      inverse = 1.0f / sqrtf(mean) + (mean - mean); /* NaN where the square overflowed */
    }
    rstd[n] = inverse;
    scale[n] = absmax * inverse / code_scale;
    float factor = 1.0f / absmax * code_scale;
    VECTORS
    for (int64_t i = 0; i < I; i++) codes[n * I + i] = (int8_t)(int32_t)rintf(row[i] * factor);
  }
}

/* Sums of integers [N, O] become floats where they lie: sum * row_scale [O] * scale [N]. */
void scale_sums(int32_t *sums, const float *row_scale, const float *scale, int64_t N, int64_t O, int threads) {
  THREADS_SHARE(N, O)
  for (int64_t n = 0; n < N; n++) {
    int32_t *row = sums + n * O;
    VECTORS
    for (int64_t o = 0; o < O; o++) {
      float value = (float)row[o] * row_scale[o] * scale[n];
      memcpy(row + o, &value, sizeof value);
    }
  }
}

#ifdef __AVX2__
/*
 * trits [O, I] as 0, 1 and 2 in panels of 24 rows, QUAD columns of one after those of another; beyond the ends stand
 * ones. The result is 0 if anything else than a trit was there.
 */
static int fill_panels(const int8_t *trits, uint8_t *panels, int64_t O, int64_t I, int threads) {
  int64_t quads = (I + QUAD - 1) / QUAD, count = (O + PANEL - 1) / PANEL;
  uint32_t wrong = 0;
  PRAGMA(omp parallel for schedule(static) num_threads(threads) if (O * I > SHARED) reduction(| : wrong))
  for (int64_t o = 0; o < count * PANEL; o++) {
    uint8_t *panel = panels + (o / PANEL * quads * PANEL + o % PANEL) * QUAD;
    for (int64_t q = 0; q < quads; q++) {
      int64_t first = q * QUAD;
      uint32_t quad = 0;
      if (o < O) memcpy(&quad, trits + o * I + first, (size_t)(I - first < QUAD ? I - first : QUAD));
      quad = (quad ^ 0x80808080u) - 0x7F7F7F7Fu; /* each byte and 1; what is none of -1 to 1 is seen here */
      wrong |= (quad & 0xFCFCFCFCu) | (quad & (quad >> 1) & 0x01010101u);
      memcpy(panel + q * PANEL * QUAD, &quad, QUAD);
    }
  }
  return !wrong;
}

typedef __m256i sums_of_tile[TILE][PANEL / 8];

/* Adds the products of a quad of each token's codes with a panel's; the instruction takes one factor unsigned. */
static inline void add_quad(sums_of_tile sums, const uint8_t *panel, const int8_t *const codes[TILE], int64_t first) {
  __m256i trits[PANEL / 8];
  for (int v = 0; v < PANEL / 8; v++) trits[v] = _mm256_loadu_si256((const __m256i *)(panel + v * 32));
  for (int n = 0; n < TILE; n++) {
    int32_t quad;
    memcpy(&quad, codes[n] + first, QUAD);
    const __m256i factor = _mm256_set1_epi32(quad);
    for (int v = 0; v < PANEL / 8; v++)
      sums[n][v] = _mm256_add_epi16(sums[n][v], _mm256_maddubs_epi16(trits[v], factor));
  }
}

/* Sums [TILE, PANEL] of products of each token's codes [I] with a panel's 0, 1 and 2. */
static inline void multiply_tile(const int8_t *const codes[TILE], const uint8_t *panel, int64_t I,
                                 int32_t sums[TILE][PANEL]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int64_t whole = I / QUAD, rest = I % QUAD;
  int8_t last[TILE][QUAD] = {{0}};
  const int8_t *lasts[TILE];
  for (int n = 0; n < TILE; n++) lasts[n] = memcpy(last[n], codes[n] + whole * QUAD, (size_t)rest);
  memset(sums, 0, TILE * sizeof sums[0]);
  int64_t q = 0;
  do {
    const int64_t end = q + QUADS < whole ? q + QUADS : whole;
    sums_of_tile parts;
    memset(&parts, 0, sizeof parts);
    for (; q < end; q++) add_quad(parts, panel + q * PANEL * QUAD, codes, q * QUAD);
    if (q == whole && rest) add_quad(parts, panel + q * PANEL * QUAD, lasts, 0);
    for (int n = 0; n < TILE; n++)
      for (int v = 0; v < PANEL / 8; v++) {
        __m256i *sum = (__m256i *)&sums[n][v * 8];
        _mm256_storeu_si256(sum, _mm256_add_epi32(_mm256_loadu_si256(sum), _mm256_madd_epi16(parts[n][v], ones)));
      }
  } while (q < whole);
}

/* Of up to CHUNK tokens, codes [N, I] times trits [O, I] as `multiply_trits` does. */
static void multiply_chunk(const int8_t *codes, const uint8_t *panels, const float *row_scale, const float *scale,
                           float *y, int64_t N, int64_t I, int64_t O) {
  const int64_t bytes = (I + QUAD - 1) / QUAD * QUAD * PANEL;
  int32_t extra[CHUNK] = {0}, sums[TILE][PANEL]; /* what comes of trits that stand 1 too high */
  for (int64_t n = 0; n < N; n++)
    for (int64_t i = 0; i < I; i++) extra[n] += codes[n * I + i];
  for (int64_t first = 0; first < O; first += PANEL, panels += bytes)
    for (int64_t n = 0; n < N; n += TILE) {
      const int64_t end = first + PANEL < O ? first + PANEL : O;
      const int8_t *tokens[TILE];
      for (int t = 0; t < TILE; t++) tokens[t] = codes + (n + t < N ? n + t : N - 1) * I;
      multiply_tile(tokens, panels, I, sums);
      for (int64_t t = n; t < n + TILE && t < N; t++) {
        VECTORS
        for (int64_t o = first; o < end; o++)
          y[t * O + o] = (float)(sums[t - n][o - first] - extra[t]) * row_scale[o] * scale[t];
      }
    }
}
#endif

/*
 * codes [N, I] times trits [O, I], times row_scale [O], times scale [N]: y [N, O]. panels has room for I bytes, up to a
 * multiple of 4, for each of O rows, up to one of 24. The result is 0, and y of no use, where a trit is none and on
 * machines without AVX2.
 */
int multiply_trits(const int8_t *codes, const int8_t *trits, uint8_t *panels, const float *row_scale,
                   const float *scale, float *y, int64_t N, int64_t I, int64_t O, int threads) {
#ifdef __AVX2__
  if (!fill_panels(trits, panels, O, I, threads)) return 0;
  PRAGMA(omp parallel for schedule(static) num_threads(threads) if (N > CHUNK))
  for (int64_t n = 0; n < N; n += CHUNK)
    multiply_chunk(codes + n * I, panels, row_scale, scale + n, y + n * O, n + CHUNK < N ? CHUNK : N - n, I, O);
  return 1;
#else
  return 0;
#endif
}

/* x [N, I] times scale [N], rounded to bf16. */
void round_scaled(const float *x, const float *scale, uint16_t *rounded, int64_t N, int64_t I, int threads) {
  THREADS_SHARE(N, I)
  for (int64_t n = 0; n < N; n++) {
    VECTORS
    for (int64_t i = 0; i < I; i++) rounded[n * I + i] = to_bf16(x[n * I + i] * scale[n]);
  }
}

/*
 * The gradient of x [N, I] from that of its codes times their scale, in two passes. The first widens it, if it comes
 * in bf16, into dx, and gives its products with what was normalised; their sums over a token are the caller's.
 */
void widen_products(const uint16_t *dxn, const float *x, float *dx, float *products, int64_t N, int64_t I, int squared,
                    int threads) {
  THREADS_SHARE(N, I)
  for (int64_t n = 0; n < N; n++) {
    int64_t first = n * I, end = first + I;
    if (dxn) {
      VECTORS
      for (int64_t i = first; i < end; i++) dx[i] = from_bf16(dxn[i]);
    }
    if (!products) continue;
    if (squared) {
      VECTORS
      for (int64_t i = first; i < end; i++) products[i] = dx[i] * (relu(x[i]) * relu(x[i]));
    } else {
      VECTORS
      for (int64_t i = first; i < end; i++) products[i] = dx[i] * x[i];
    }
  }
}

/* The second pass; sums [N], or NULL where nothing is normalised. torch's addcmul rounds once as well. */
void through_norm(float *dx, const float *x, const float *rstd, const float *sums, int64_t N, int64_t I, int squared,
                  int threads) {
  THREADS_SHARE(N, I)
  for (int64_t n = 0; n < N; n++) {
    int64_t first = n * I, end = first + I;
    float r = rstd[n], coefficient = sums ? sums[n] * (r * r * r / (float)I) : 0.0f;
    if (sums && squared) {
      VECTORS
      for (int64_t i = first; i < end; i++) {
        float positive = relu(x[i]);
        dx[i] = fmaf(-positive * positive, coefficient, dx[i] * r) * positive * 2.0f;
      }
    } else if (sums) {
      VECTORS
      for (int64_t i = first; i < end; i++) dx[i] = fmaf(-x[i], coefficient, dx[i] * r);
    } else if (squared) {
      VECTORS
      for (int64_t i = first; i < end; i++) dx[i] = dx[i] * relu(x[i]) * 2.0f;
    }
  }
}

/* -- packed trits -------------------------------------------------------------------------------------------- */

static inline int is_legal(const uint8_t *bytes, int64_t count) {
  uint8_t most = 0;
  for (int64_t p = 0; p < count; p++) {
    uint8_t product = (uint8_t)(bytes[p] * LEGAL_FACTOR);
    most = product > most ? product : most;
  }
  return most < LEGAL_FACTOR;
}

/* Digit n of a byte q is the whole part of 3 * (q * 3^n mod 256) / 256; trits lie plane after plane. */
static inline void unpack_block(const uint8_t bytes[PLANE], int8_t trits[BLOCK]) {
  uint8_t rest[PLANE];
  memcpy(rest, bytes, PLANE);
  for (int n = 0; n < TRITS_PER_BYTE; n++)
    for (int p = 0; p < PLANE; p++) {
      uint16_t tripled = (uint16_t)(3 * rest[p]);
      trits[n * PLANE + p] = (int8_t)((tripled >> 8) - 1);
      rest[p] = (uint8_t)tripled;
    }
}

static inline void pack_block(const int8_t trits[BLOCK], uint8_t bytes[PLANE]) {
  for (int p = 0; p < PLANE; p++) {
    int value = trits[p];
    for (int n = 1; n < TRITS_PER_BYTE; n++) value = 3 * value + trits[n * PLANE + p];
    value += 121;
    /* ceil(256 v / 243) = v + floor((13 v + 242) / 243), and 270 / 2^16 divides these numbers by 243. */
    bytes[p] = (uint8_t)(value + (((13 * value + 242) * 270) >> 16));
  }
}

/* packed [O, P] and exponent [O] become trits [O, I] and 2^exponent, which is NaN for a row with an illegal byte. */
void decode(const uint8_t *packed, const int8_t *exponent, int8_t *trits, float *row_scale, int64_t O, int64_t P,
            int64_t I, int threads) {
  int64_t rest = I % BLOCK, used = I / BLOCK * PLANE + (rest < PLANE ? rest : PLANE); /* not those of padding alone */
  THREADS_SHARE(O, I)
  for (int64_t o = 0; o < O; o++) {
    const uint8_t *bytes = packed + o * P;
    int8_t *row = trits + o * I;
    row_scale[o] = is_legal(bytes, used) ? power_of_2(exponent[o]) : NAN;
    int64_t first = 0;
    for (; first + BLOCK <= I; first += BLOCK) unpack_block(bytes + first / TRITS_PER_BYTE, row + first);
    if (first < I) {
      int8_t block[BLOCK];
      unpack_block(bytes + first / TRITS_PER_BYTE, block);
      memcpy(row + first, block, (size_t)(I - first));
    }
  }
}

/* -- the update ---------------------------------------------------------------------------------------------- */

/* 32 random bits for each of `count` elements of the streams that keys [N, 2] name. */
void random_bits(const int32_t *keys, int32_t *words, int64_t N, int64_t count, int threads) {
  THREADS_SHARE(N, count)
  for (int64_t n = 0; n < N; n++)
    for (int64_t i = 0; i < count; i++) {
      uint32_t x = (uint32_t)i + (uint32_t)keys[2 * n];
      x ^= x >> 16;
      x *= 0x7FEB352Du;
      x ^= (uint32_t)keys[2 * n + 1];
      x ^= x >> 15;
      x *= 0x846CA68Bu;
      x ^= x >> 16;
      words[n * count + i] = (int32_t)x;
    }
}

/* What folding is told; see `arbitor.ops.momentum.reference`. */
struct folding {
  float old, fresh;              /* shares of the momentum before and of the gradient */
  float kept, lookahead;         /* shares of gradient and momentum in the direction */
  float decoded[OCTAVE];         /* 2^(j/8) / largest code */
  float encoded[OCTAVE];         /* 2^(-j/8) * largest code * 2^16 */
  int32_t thresholds[OCTAVE];    /* mantissas of 2^(j/8) */
  int32_t lowest, highest;       /* exponents */
};

static inline void fold_group(float *gradient, uint8_t *momentum, int16_t *exponent, const int32_t *random,
                              int group, int bits, const struct folding *f) {
  const int code_max = (1 << (bits - 1)) - 1;
  const float largest = (float)code_max * 65536.0f;
  float values[PLANE];
  int32_t codes[PLANE];
  if (bits == 8)
    for (int i = 0; i < group; i++) codes[i] = (int8_t)momentum[i];
  else
    for (int i = 0; i < group; i++) codes[i] = ((momentum[i / 2] >> (i % 2 * 4)) & 15) - 8;
  float scale = f->decoded[*exponent & (OCTAVE - 1)] * power_of_2(*exponent >> 3);
  uint32_t most = 0;
  for (int i = 0; i < group; i++) {
    values[i] = (float)codes[i] * scale * f->old + gradient[i] * f->fresh;
    uint32_t magnitude = bits_of(values[i]) & 0x7FFFFFFFu;
    most = magnitude > most ? magnitude : most;
  }
  int e = ((int)(most >> 23) - 127) * OCTAVE;
  for (int j = 0; j < OCTAVE; j++) e += (int32_t)(most & 0x7FFFFFu) > f->thresholds[j];
  e = clamp(e, f->lowest, f->highest);
  *exponent = (int16_t)e;
  scale = f->encoded[e & (OCTAVE - 1)] * power_of_2(-(e >> 3));
  for (int i = 0; i < group; i++) {
    int32_t fixed = (int32_t)rintf(clampf(values[i] * scale, largest));
    codes[i] = clamp((fixed + ((random[i] >> 16) & 0xFFFF)) >> 16, -code_max, code_max);
    gradient[i] = gradient[i] * f->kept + values[i] * f->lookahead;
  }
  if (bits == 8)
    for (int i = 0; i < group; i++) momentum[i] = (uint8_t)codes[i];
  else
    for (int i = 0; i < group; i += 2) momentum[i / 2] = (uint8_t)((codes[i] + 8) | ((codes[i + 1] + 8) << 4));
}

/* gradient [N, I] becomes the direction; momentum [N, I * bits / 8] and exponent [N, H] move. I / H is 32 or 16. */
void fold(float *gradient, uint8_t *momentum, int16_t *exponent, const int32_t *random, int64_t N, int64_t I,
          int64_t H, int bits, const struct folding *f, int threads) {
  THREADS_SHARE(N, I)
  for (int64_t n = 0; n < N; n++)
    for (int64_t h = 0; h < H; h++) {
      int64_t first = n * I + h * (I / H);
      float *g = gradient + first;
      uint8_t *m = momentum + first * bits / 8;
      if (bits == 8 && I / H == 32) /* the usual ones by themselves, for which the compiler knows the sizes */
        fold_group(g, m, exponent + n * H + h, random + first, 32, 8, f);
      else if (I / H == 32)
        fold_group(g, m, exponent + n * H + h, random + first, 32, 4, f);
      else
        fold_group(g, m, exponent + n * H + h, random + first, 16, bits, f);
    }
}

/* What votes are told; see `arbitor.ops.state_update.reference`. */
struct voting {
  float factor; /* -2^16 times the step */
  int32_t span, threshold, lowest, rail, reset;
};

static inline int update_block(uint8_t *packed, int8_t *accumulator, const float *direction, const int32_t *random,
                               const struct voting *v) {
  const int span = v->span, threshold = v->threshold, lowest = v->lowest, rail = v->rail, reset = v->reset;
  int8_t trits[BLOCK];
  int32_t sums[BLOCK], votes[BLOCK], before[BLOCK], after[BLOCK], flips = 0;
  unpack_block(packed, trits);
  for (int i = 0; i < BLOCK; i++) {
    int32_t fixed = (int32_t)rintf(clampf(direction[i] * v->factor, (float)(1 << 30)));
    votes[i] = (fixed + (random[i] & 0xFFFF)) >> 16;
  }
  for (int i = 0; i < BLOCK; i++) {
    sums[i] = accumulator[i];
    before[i] = trits[i];
  }
  for (int i = 0; i < BLOCK; i++) {
    int voted = votes[i] != 0, sum = sums[i] + votes[i];
    int flip = voted * ((sum >= threshold) * (before[i] < 1) - (sum <= -lowest) * (before[i] > -1));
    int now = before[i] + flip;
    int rest = sum - flip * (reset ? sum * flip : span);
    int excess = rest * now - rail; /* at a rail: how far it stands outwards of the limit */
    excess = excess > 0 ? excess : 0;
    sums[i] = clamp(rest - voted * now * excess, -127, 127);
    after[i] = now;
  }
  for (int i = 0; i < BLOCK; i++) {
    accumulator[i] = (int8_t)sums[i];
    trits[i] = (int8_t)after[i];
  }
  for (int i = 0; i < BLOCK; i++) flips += after[i] != before[i];
  pack_block(trits, packed);
  return flips;
}

/*
 * Votes and flips of blocks: packed [N, 32], accumulator, direction and random [N, 160]; flips [N] are counted.
 * Nothing changes and the result is 0 if a byte is illegal.
 */
int update(uint8_t *packed, int8_t *accumulator, const float *direction, const int32_t *random, int32_t *flips,
           int64_t N, const struct voting *v, int threads) {
  if (!is_legal(packed, N * PLANE)) return 0;
  THREADS_SHARE(N, BLOCK)
  for (int64_t n = 0; n < N; n++) {
    int64_t first = n * BLOCK;
    flips[n] = update_block(packed + n * PLANE, accumulator + first, direction + first, random + first, v);
  }
  return 1;
}
