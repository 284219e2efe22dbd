// CRC-32C by the processor's own instruction, or eight bytes at a time by tables. A part of a file is read in pieces that
// stay in a near cache until they are checked.
#include "common.h"

#include <cerrno>
#include <unistd.h>
#if defined(__SSE4_2__)
#include <nmmintrin.h>
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

EXPORT uint32_t crc32c(const uint8_t* x, int64_t n, uint32_t before) {
  uint32_t crc = ~before;
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
