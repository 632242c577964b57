#include "image.hpp"

#include <algorithm>
#include <cctype>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>

#include <jpeglib.h>  // after cstdio, which it needs and does not include
#include <jerror.h>
#include <png.h>

#include "problem.hpp"

namespace {

using Bytes = std::vector<std::uint8_t>;

// What is decoded, and EXIF's orientation, 1 to 8. It lies outside of the functions that libjpeg and libpng leave with
// longjmp, whose own variables would be lost.
struct Decoded {
  Image image;
  int orientation = 1;
  std::string problem;
  std::vector<std::uint8_t*> rows;
};

void check_size(std::int64_t width, std::int64_t height) {
  if (width < 1 || height < 1 || width * height > kMaxPixels) {
    throw Problem("got " + std::to_string(width) + "x" + std::to_string(height) + " px, expected 1 to " +
                      std::to_string(kMaxPixels) + " pixels",
                  "shrink the image");
  }
}

// The orientation in a TIFF header with its first directory (EXIF 2.3, section 4.6), or 1.
int read_orientation(const std::uint8_t* data, std::size_t size) {
  if (size < 8) return 1;
  const bool big = std::memcmp(data, "MM\0\x2a", 4) == 0;
  if (!big && std::memcmp(data, "II\x2a\0", 4) != 0) return 1;
  const auto word = [&](std::size_t at, int bytes) {
    std::uint32_t value = 0;
    for (int i = 0; i < bytes; ++i) value |= std::uint32_t(data[at + i]) << (8 * (big ? bytes - 1 - i : i));
    return value;
  };
  const std::size_t directory = word(4, 4);
  if (directory + 2 > size) return 1;
  const std::size_t entries = word(directory, 2);
  for (std::size_t i = 0; i < entries; ++i) {
    const std::size_t entry = directory + 2 + 12 * i;
    if (entry + 12 > size) return 1;
    if (word(entry, 2) != 0x0112) continue;
    const std::uint32_t value = word(entry + 8, 2);
    return value >= 1 && value <= 8 ? int(value) : 1;
  }
  return 1;
}

struct JpegErrors {
  jpeg_error_mgr manager;
  std::jmp_buf jump;
  Decoded* decoded;
};

void jpeg_failed(j_common_ptr info) {
  auto* errors = reinterpret_cast<JpegErrors*>(info->err);
  char text[JMSG_LENGTH_MAX];
  info->err->format_message(info, text);
  errors->decoded->problem = text;
  std::longjmp(errors->jump, 1);
}

// Of all warnings only the end of the file counts, as in Pillow: it would leave the rest of the picture grey.
void jpeg_warned(j_common_ptr info, int level) {
  auto* errors = reinterpret_cast<JpegErrors*>(info->err);
  if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) errors->decoded->problem = "truncated";
}

void decode_jpeg(const Bytes& data, Decoded& decoded) {
  jpeg_decompress_struct info{};
  JpegErrors errors{};
  errors.decoded = &decoded;
  info.err = jpeg_std_error(&errors.manager);
  errors.manager.error_exit = jpeg_failed;
  errors.manager.emit_message = jpeg_warned;
  if (setjmp(errors.jump)) {
    jpeg_destroy_decompress(&info);
    return;
  }
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, data.data(), data.size());
  jpeg_save_markers(&info, JPEG_APP0 + 1, 0xffff);
  jpeg_read_header(&info, TRUE);
  if (std::int64_t(info.image_width) * info.image_height > kMaxPixels) {
    decoded.problem = "more than " + std::to_string(kMaxPixels) + " pixels";
  } else if (info.num_components != 1 && info.num_components != 3) {
    decoded.problem = "a JPEG of " + std::to_string(info.num_components) + " components, expected RGB or grey";
  } else {
    for (auto* marker = info.marker_list; marker; marker = marker->next) {
      if (marker->data_length > 6 && std::memcmp(marker->data, "Exif\0", 6) == 0) {
        decoded.orientation = read_orientation(marker->data + 6, marker->data_length - 6);
        break;
      }
    }
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    decoded.image = Image(int(info.output_width), int(info.output_height));
    while (info.output_scanline < info.output_height) {
      JSAMPROW row = decoded.image.at(0, int(info.output_scanline));
      jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
  }
  jpeg_destroy_decompress(&info);
}

struct PngSource {
  const Bytes* data;
  std::size_t position;
};

void png_failed(png_structp png, png_const_charp message) {
  static_cast<Decoded*>(png_get_error_ptr(png))->problem = message;
  png_longjmp(png, 1);
}

void png_take(png_structp png, png_bytep out, std::size_t size) {
  auto* source = static_cast<PngSource*>(png_get_io_ptr(png));
  if (size > source->data->size() - source->position) png_error(png, "truncated");
  std::memcpy(out, source->data->data() + source->position, size);
  source->position += size;
}

void decode_png(const Bytes& data, Decoded& decoded) {
  PngSource source{&data, 0};
  const auto ignore = [](png_structp, png_const_charp) {};
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &decoded, png_failed, ignore);
  png_infop info = png_create_info_struct(png);
  if (setjmp(png_jmpbuf(png))) {
    png_destroy_read_struct(&png, &info, nullptr);
    return;
  }
  png_set_read_fn(png, &source, png_take);
  png_read_info(png, info);
  if (std::int64_t(png_get_image_width(png, info)) * png_get_image_height(png, info) > kMaxPixels) {
    png_error(png, "more than 100 megapixels");
  }
  png_set_strip_16(png);
  png_set_palette_to_rgb(png);
  png_set_expand_gray_1_2_4_to_8(png);
  png_set_gray_to_rgb(png);
  png_set_strip_alpha(png);
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  decoded.image = Image(int(png_get_image_width(png, info)), int(png_get_image_height(png, info)));
  if (png_get_rowbytes(png, info) != std::size_t{3} * decoded.image.width) png_error(png, "not RGB when expanded");
  for (int y = 0; y < decoded.image.height; ++y) decoded.rows.push_back(decoded.image.at(0, y));
  png_read_image(png, decoded.rows.data());
  png_read_end(png, info);
  png_bytep exif = nullptr;
  png_uint_32 size = 0;
  if (png_get_eXIf_1(png, info, &size, &exif)) decoded.orientation = read_orientation(exif, size);
  png_destroy_read_struct(&png, &info, nullptr);
}

// Netpbm's binary formats: P5 grey, P6 RGB, 8 bits.
void decode_ppm(const Bytes& data, Decoded& decoded) {
  std::size_t at = 2;
  const auto number = [&] {
    while (at < data.size() && (std::isspace(data[at]) || data[at] == '#')) {
      if (data[at] == '#') {
        while (at < data.size() && data[at] != '\n') ++at;
      } else {
        ++at;
      }
    }
    std::int64_t value = 0;
    for (; at < data.size() && std::isdigit(data[at]) && value <= kMaxPixels; ++at) value = 10 * value + data[at] - '0';
    return value;
  };
  const std::int64_t width = number(), height = number(), largest = number();
  check_size(width, height);
  if (largest != 255) throw Problem("a Netpbm file of values to " + std::to_string(largest) + ", expected 255");
  ++at;  // one white space ends the header
  const std::size_t channels = data[1] == '6' ? 3 : 1, num = std::size_t(width * height);
  if (at > data.size() || data.size() - at < channels * num) throw Problem("truncated");
  decoded.image = Image(int(width), int(height));
  for (std::size_t i = 0; i < 3 * num; ++i) decoded.image.rgb[i] = data[at + (channels == 3 ? i : i / 3)];
}

// EXIF 2.3, table 6: where the stored row 0 and column 0 belong.
Image turn_upright(const Image& stored, int orientation) {
  if (orientation == 1) return stored;
  const bool swapped = orientation >= 5;
  const bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool from_below = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  Image turned(swapped ? stored.height : stored.width, swapped ? stored.width : stored.height);
  for (int y = 0; y < turned.height; ++y) {
    for (int x = 0; x < turned.width; ++x) {
      int from_x = swapped ? y : x, from_y = swapped ? x : y;
      if (from_right) from_x = stored.width - 1 - from_x;
      if (from_below) from_y = stored.height - 1 - from_y;
      std::copy_n(stored.at(from_x, from_y), 3, turned.at(x, y));
    }
  }
  return turned;
}

bool starts_with(const Bytes& data, const char* magic, std::size_t size) {
  return data.size() > size && std::memcmp(data.data(), magic, size) == 0;
}

}  // namespace

std::vector<std::uint8_t> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  Bytes data{std::istreambuf_iterator<char>(file), {}};
  if (!file && data.empty()) throw Problem(path + ": cannot be read", "name a file that can be read");
  return data;
}

Image load_image(const std::string& path) {
  const Bytes data = read_file(path);
  Decoded decoded;
  try {
    if (data.empty()) throw Problem("empty file (0 bytes)");
    if (starts_with(data, "\xff\xd8\xff", 3)) {
      decode_jpeg(data, decoded);
    } else if (starts_with(data, "\x89PNG\r\n\x1a\n", 8)) {
      decode_png(data, decoded);
    } else if (starts_with(data, "P5", 2) || starts_with(data, "P6", 2)) {
      decode_ppm(data, decoded);
    } else {
      throw Problem("neither JPEG, PNG nor binary PPM");
    }
    if (!decoded.problem.empty()) throw Problem(decoded.problem);
  } catch (const Problem& problem) {
    throw Problem(path + ": " + problem.what(), "name an image file");
  }
  return turn_upright(decoded.image, decoded.orientation);
}
