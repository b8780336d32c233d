// CRC-32C (Castagnoli), the checksum of the cache's files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kdfast {

// CRC-32C of `size` bytes. `crc` continues an earlier call: crc32c(b, crc32c(a)) is the CRC of a followed by b.
uint32_t crc32c(const void* data, size_t size, uint32_t crc = 0);

}  // namespace kdfast
