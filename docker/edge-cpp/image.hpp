// From the bytes of an image file to RGB pixels, upright, as Pillow decodes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// 8-bit RGB, rows from the top, without gaps.
struct Image {
  int width = 0;
  int height = 0;
  std::vector<std::uint8_t> rgb;

  Image() = default;
  Image(int width, int height, std::uint8_t value = 0)
      : width(width), height(height), rgb(std::size_t{3} * width * height, value) {}

  std::uint8_t* at(int x, int y) { return &rgb[(std::size_t(y) * width + x) * 3]; }
  const std::uint8_t* at(int x, int y) const { return &rgb[(std::size_t(y) * width + x) * 3]; }
};

// A 100-megapixel picture is 300 MB as RGB; larger ones are taken for decompression bombs.
constexpr std::int64_t kMaxPixels = 100'000'000;

// Reads a whole file. Throws Problem: missing, a folder, or cannot be read.
std::vector<std::uint8_t> read_file(const std::string& path);

// Decodes JPEG, PNG and binary PPM or PGM. EXIF's rotation is applied, transparency dropped, 16 bits cut to 8.
// Throws Problem: another format, broken, truncated, CMYK, or too large.
Image load_image(const std::string& path);
