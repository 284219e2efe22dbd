// CRC-32C by the processor's own instruction, or eight bytes at a time by tables; where it multiplies polynomials, 64
// bytes at a time, which takes half the time. A part of a file is read in pieces that stay in a near cache until they are
// checked, and written in pieces that are there since they were.
#include "common.h"

#include <cerrno>
#include <unistd.h>
#if defined(__SSE4_2__) && defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

static const int64_t PIECE = 128 << 10;

#if defined(__SSE4_2__) && defined(__x86_64__)
static inline uint32_t eight(uint32_t crc, uint64_t x) { return uint32_t(_mm_crc32_u64(crc, x)); }
static inline uint32_t one(uint32_t crc, uint8_t x) { return _mm_crc32_u8(crc, x); }
#elif defined(__ARM_FEATURE_CRC32)
static inline uint32_t eight(uint32_t crc, uint64_t x) { return __crc32cd(crc, x); }
static inline uint32_t one(uint32_t crc, uint8_t x) { return __crc32cb(crc, x); }
#else
struct Tables {
  uint32_t of[8][256];  // of a byte with so many bytes behind it
  Tables() {
    for (uint32_t i = 0; i < 256; ++i) {
      of[0][i] = i;
      for (int k = 0; k < 8; ++k) of[0][i] = of[0][i] >> 1 ^ (of[0][i] & 1 ? 0x82f63b78u : 0);
    }
    for (int k = 1; k < 8; ++k) {
      for (int i = 0; i < 256; ++i) of[k][i] = of[k - 1][i] >> 8 ^ of[0][of[k - 1][i] & 255];
    }
  }
};
static const Tables tables;
static inline uint32_t eight(uint32_t crc, uint64_t x) {
  uint32_t out = 0;
  x ^= crc;
  for (int k = 0; k < 8; ++k) out ^= tables.of[7 - k][x >> 8 * k & 255];
  return out;
}
static inline uint32_t one(uint32_t crc, uint8_t x) { return tables.of[0][(crc ^ x) & 255] ^ crc >> 8; }
#endif

#if defined(__SSE4_2__) && defined(__x86_64__) && defined(__PCLMUL__)
static inline __m128i load(const uint8_t* x) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)); }

// What 16 bytes leave of themselves further on: they are worth b there, once multiplied by powers of x that fit a word.
static inline __m128i fold(__m128i a, __m128i powers, __m128i b) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(a, powers, 0x00), _mm_clmulepi64_si128(a, powers, 0x11)), b);
}

// n is a multiple of 64, and not 0. Source: Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ,
// Intel 2009; the powers are x^(512 + 32), x^(512 - 32), x^(128 + 32) and x^(128 - 32), reflected.
static uint32_t folded(uint32_t crc, const uint8_t* x, int64_t n) {
  const __m128i far = _mm_setr_epi32(0x740eef02, 0, int(0x9e4addf8u), 0);
  const __m128i near = _mm_setr_epi32(int(0xf20c0dfeu), 0, 0x493c7d27, 0);
  __m128i a = _mm_xor_si128(load(x), _mm_cvtsi32_si128(int(crc))), b = load(x + 16), c = load(x + 32), d = load(x + 48);
  for (int64_t i = 64; i < n; i += 64) {
    a = fold(a, far, load(x + i)), b = fold(b, far, load(x + i + 16));
    c = fold(c, far, load(x + i + 32)), d = fold(d, far, load(x + i + 48));
  }
  a = fold(fold(fold(a, near, b), near, c), near, d);
  return eight(eight(0, uint64_t(_mm_extract_epi64(a, 0))), uint64_t(_mm_extract_epi64(a, 1)));
}
#else
static uint32_t folded(uint32_t crc, const uint8_t* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, x + i, 8);
    crc = eight(crc, bytes);
  }
  return crc;
}
#endif

EXPORT uint32_t crc32c(const uint8_t* x, int64_t n, uint32_t before) {
  uint32_t crc = ~before;
  const int64_t even = n / 64 * 64;
  if (even) crc = folded(crc, x, even);
  x += even, n -= even;
  for (; n >= 8; x += 8, n -= 8) {
    uint64_t bytes;
    std::memcpy(&bytes, x, 8);
    crc = eight(crc, bytes);
  }
  for (; n > 0; --n) crc = one(crc, *x++);
  return ~crc;
}

// Bytes that were read, all of them unless the file ends; or the error's number, negative.
EXPORT int64_t read_checked(int file, int64_t start, uint8_t* out, int64_t n, uint32_t* crc) {
  int64_t done = 0;
  *crc = 0;
  while (done < n) {
    const ssize_t got = pread(file, out + done, size_t(n - done < PIECE ? n - done : PIECE), off_t(start + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -int64_t(errno);
    if (got == 0) break;
    *crc = crc32c(out + done, got, *crc);
    done += got;
  }
  return done;
}

static int64_t put(int file, int64_t start, const uint8_t* x, int64_t n) {
  for (int64_t done = 0; done < n;) {
    const ssize_t took = pwrite(file, x + done, size_t(n - done), off_t(start + done));
    if (took < 0 && errno == EINTR) continue;
    if (took <= 0) return took < 0 ? -int64_t(errno) : -int64_t(EIO);
    done += took;
  }
  return n;
}

// Bytes that were written, those of the checksum among them, or the error's number, negative.
EXPORT int64_t write_checked(int file, int64_t start, const uint8_t* x, int64_t n, uint32_t* crc) {
  *crc = 0;
  for (int64_t done = 0; done < n; done += PIECE) {
    const int64_t piece = n - done < PIECE ? n - done : PIECE;
    *crc = crc32c(x + done, piece, *crc);
    const int64_t wrote = put(file, start + done, x + done, piece);
    if (wrote < 0) return wrote;
  }
  const uint8_t tail[4] = {uint8_t(*crc), uint8_t(*crc >> 8), uint8_t(*crc >> 16), uint8_t(*crc >> 24)};
  const int64_t wrote = put(file, start + n, tail, 4);
  return wrote < 0 ? wrote : n + wrote;
}
