// From an image to the network's input, by the contract of the manifest: the very pixels that cspdeploy.core makes.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "image.hpp"

// `spec.preprocess` of manifest.json.
struct Contract {
  int height_px = 0;
  int width_px = 0;
  std::string resize;         // crop, stretch, letterbox
  double crop_pct = 1.0;
  std::string interpolation;  // bilinear, bicubic, nearest
  std::string channel_order;  // rgb, bgr: of the network's input
  std::array<double, 3> mean{};
  std::array<double, 3> std{};
};

// Pillow's Image.resize, bit for bit.
Image resize(const Image& image, int width, int height, const std::string& interpolation);

// An image is scaled to that size, and laid under a window of the contract's; `left` and `top` are the window's within
// the scaled image, negative where a border stays.
struct Fit {
  int scaled_width = 0;
  int scaled_height = 0;
  int left = 0;
  int top = 0;
};

// Throws Problem: so thin that it would be too large when scaled.
Fit fit_size(int width, int height, const Contract& contract);

// Resized and cropped, still RGB. Throws Problem: so thin that it would be too large when scaled.
Image fit(const Image& image, const Contract& contract);

// `[3, H, W]` float32: channel order, /255, mean, std.
std::vector<float> normalise(const Image& image, const Contract& contract);
