#include "preprocess.hpp"

#include <algorithm>
#include <cmath>

#include "problem.hpp"

namespace {

// Of Pillow's Resample.c: 8 bits of the pixel, 22 of the weight, 2 for what negative weights add to the sum.
constexpr int kPrecisionBits = 32 - 8 - 2;
// Darknet pads its floats with 0.5; this is the nearest byte.
constexpr std::uint8_t kLetterboxGrey = 128;

double bilinear(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

double bicubic(double x) {
  constexpr double a = -0.5;  // Keys 1981; Pillow's choice
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// Weights of one output pixel, in fixed point, for the input pixels from `first`.
struct Window {
  int first = 0;
  std::vector<std::int32_t> weights;
};

std::vector<Window> windows(int from, int to, const std::string& interpolation) {
  double (*const filter)(double) = interpolation == "bicubic" ? bicubic : bilinear;
  const double scale = double(from) / to, stretch = std::max(scale, 1.0);
  const double support = (interpolation == "bicubic" ? 2.0 : 1.0) * stretch, inverse = 1.0 / stretch;
  std::vector<Window> all(to);
  for (int i = 0; i < to; ++i) {
    const double centre = (i + 0.5) * scale;
    const int first = std::max(0, int(centre - support + 0.5));
    const int num = std::min(from, int(centre + support + 0.5)) - first;
    std::vector<double> exact(num);
    double sum = 0.0;
    for (int k = 0; k < num; ++k) sum += exact[k] = filter((k + first - centre + 0.5) * inverse);
    all[i].first = first;
    for (double weight : exact) {
      if (sum != 0.0) weight /= sum;
      all[i].weights.push_back(std::int32_t((weight < 0 ? -0.5 : 0.5) + weight * (1 << kPrecisionBits)));
    }
  }
  return all;
}

// A weighted sum in fixed point, rounded and clipped to a byte.
std::uint8_t to_byte(std::int32_t sum) { return std::uint8_t(std::clamp(sum >> kPrecisionBits, 0, 255)); }

Image resample_rows(const Image& image, int width, const std::string& interpolation) {
  const auto all = windows(image.width, width, interpolation);
  Image out(width, image.height);
  for (int y = 0; y < image.height; ++y) {
    for (int x = 0; x < width; ++x) {
      std::int32_t sum[3] = {1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1)};
      const std::uint8_t* pixel = image.at(all[x].first, y);
      for (std::int32_t weight : all[x].weights) {
        for (int c = 0; c < 3; ++c) sum[c] += *pixel++ * weight;
      }
      for (int c = 0; c < 3; ++c) out.at(x, y)[c] = to_byte(sum[c]);
    }
  }
  return out;
}

Image resample_columns(const Image& image, int height, const std::string& interpolation) {
  const auto all = windows(image.height, height, interpolation);
  const std::size_t row = std::size_t{3} * image.width;
  Image out(image.width, height);
  std::vector<std::int32_t> sums(row);
  for (int y = 0; y < height; ++y) {
    std::fill(sums.begin(), sums.end(), 1 << (kPrecisionBits - 1));
    const std::uint8_t* pixels = image.at(0, all[y].first);
    for (std::int32_t weight : all[y].weights) {
      for (std::size_t i = 0; i < row; ++i) sums[i] += *pixels++ * weight;
    }
    std::transform(sums.begin(), sums.end(), out.at(0, y), to_byte);
  }
  return out;
}

// Positions add up, with their rounding errors, as in Pillow's ImagingScaleAffine.
std::vector<int> nearest(int from, int to) {
  const double step = double(from) / to;
  std::vector<int> all(to);
  double position = step * 0.5;
  for (int& index : all) {
    index = int(position);
    position += step;
  }
  return all;
}

// Darknet's letterbox_image: the longer side fits, the rest is grey. Sizes and offsets are cut to whole pixels.
Fit letterbox_size(std::int64_t from_width, std::int64_t from_height, const Contract& contract) {
  const std::int64_t width = contract.width_px, height = contract.height_px;
  std::int64_t inner_width = width, inner_height = height;
  if (width * from_height < height * from_width) {
    inner_height = std::max<std::int64_t>(1, from_height * width / from_width);
  } else {
    inner_width = std::max<std::int64_t>(1, from_width * height / from_height);
  }
  return {int(inner_width), int(inner_height), -int((width - inner_width) / 2), -int((height - inner_height) / 2)};
}

}  // namespace

Image resize(const Image& image, int width, int height, const std::string& interpolation) {
  if (width == image.width && height == image.height) return image;
  if (interpolation == "nearest") {
    const auto columns = nearest(image.width, width), rows = nearest(image.height, height);
    Image out(width, height);
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) {
        // Rounding can carry the last step past the edge, where Pillow leaves black.
        if (columns[x] < image.width && rows[y] < image.height) {
          std::copy_n(image.at(columns[x], rows[y]), 3, out.at(x, y));
        }
      }
    }
    return out;
  }
  // Pillow 13 begins with the height where it loses more than twice what the width loses; Pillow 12 never does.
  const int lost_rows = image.height - height, lost_columns = image.width - width;
  if (width != image.width && lost_rows > 0 && lost_rows > 2 * lost_columns) {
    return resample_rows(resample_columns(image, height, interpolation), width, interpolation);
  }
  const Image rows = width == image.width ? image : resample_rows(image, width, interpolation);
  return height == image.height ? rows : resample_columns(rows, height, interpolation);
}

Fit fit_size(int from_width, int from_height, const Contract& contract) {
  const int width = contract.width_px, height = contract.height_px;
  if (contract.resize == "stretch") return {width, height, 0, 0};
  if (contract.resize == "letterbox") return letterbox_size(from_width, from_height, contract);
  const double scale = std::max(double(int(width / contract.crop_pct)) / from_width,
                                double(int(height / contract.crop_pct)) / from_height);
  // nearbyint rounds halves to even, as Python's round does.
  const double scaled_width = std::max<double>(width, std::nearbyint(from_width * scale));
  const double scaled_height = std::max<double>(height, std::nearbyint(from_height * scale));
  if (scaled_width * scaled_height > double(kMaxPixels)) {
    throw Problem(std::to_string(from_width) + "x" + std::to_string(from_height) + " px: too thin");
  }
  const double left = std::nearbyint((scaled_width - width) / 2.0);
  const double top = std::nearbyint((scaled_height - height) / 2.0);
  return {int(scaled_width), int(scaled_height), int(left), int(top)};
}

Image fit(const Image& image, const Contract& contract) {
  const Fit place = fit_size(image.width, image.height, contract);
  const Image scaled = resize(image, place.scaled_width, place.scaled_height, contract.interpolation);
  // One of both is 0 on each axis: the window cuts the image, or the image leaves a border of the window.
  const int from_x = std::max(0, place.left), from_y = std::max(0, place.top);
  const int to_x = std::max(0, -place.left), to_y = std::max(0, -place.top);
  const int columns = std::min(contract.width_px, scaled.width), rows = std::min(contract.height_px, scaled.height);
  Image out(contract.width_px, contract.height_px, kLetterboxGrey);
  for (int y = 0; y < rows; ++y) std::copy_n(scaled.at(from_x, from_y + y), 3 * columns, out.at(to_x, to_y + y));
  return out;
}

std::vector<float> normalise(const Image& image, const Contract& contract) {
  const std::size_t num = std::size_t(image.width) * image.height;
  std::vector<float> x_CHW(3 * num);
  for (int c = 0; c < 3; ++c) {
    // One multiply-add in float32, its constants rounded once from float64, as in cspdeploy.core.preprocess.
    const float gain = float(1.0 / (255.0 * contract.std[c])), offset = float(-contract.mean[c] / contract.std[c]);
    const int from = contract.channel_order == "bgr" ? 2 - c : c;
    for (std::size_t i = 0; i < num; ++i) x_CHW[c * num + i] = float(image.rgb[3 * i + from]) * gain + offset;
  }
  return x_CHW;
}
