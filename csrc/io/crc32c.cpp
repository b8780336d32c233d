#include "crc32c.h"

#include <array>

#if defined(__x86_64__)
#include <nmmintrin.h>

#include <cstring>
#endif

namespace kdfast {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;  // 0x1EDC6F41 with its bits reversed

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[n][b]: what byte b does to the CRC when n more bytes follow it.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0u);
    tables[0][byte] = crc;
  }
  for (size_t n = 1; n < 8; ++n) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[n - 1][byte];
      tables[n][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

// Slicing by 8. Bytes are taken one by one, so that the byte order of the machine does not matter.
uint32_t crc_portable(const unsigned char* p, size_t size, uint32_t crc) {
  for (; size >= 8; p += 8, size -= 8) {
    crc = kTables[7][(crc ^ p[0]) & 0xFF] ^ kTables[6][((crc >> 8) ^ p[1]) & 0xFF] ^
          kTables[5][((crc >> 16) ^ p[2]) & 0xFF] ^ kTables[4][(crc >> 24) ^ p[3]] ^ kTables[3][p[4]] ^
          kTables[2][p[5]] ^ kTables[1][p[6]] ^ kTables[0][p[7]];
  }
  for (; size > 0; ++p, --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *p) & 0xFF];
  return crc;
}

using Update = uint32_t (*)(const unsigned char*, size_t, uint32_t);

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc_sse42(const unsigned char* p, size_t size, uint32_t crc) {
  uint64_t wide = crc;
  for (; size >= 8; p += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = static_cast<uint32_t>(wide);
  for (; size > 0; ++p, --size) crc = _mm_crc32_u8(crc, *p);
  return crc;
}

Update pick() { return __builtin_cpu_supports("sse4.2") ? crc_sse42 : crc_portable; }
#else
Update pick() { return crc_portable; }
#endif

}  // namespace

uint32_t crc32c(const void* data, size_t size, uint32_t crc) {
  static const Update update = pick();
  return ~update(static_cast<const unsigned char*>(data), size, ~crc);
}

}  // namespace kdfast
