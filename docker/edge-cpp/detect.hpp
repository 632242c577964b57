// From a detector's outputs to boxes in the picture, as cspdeploy.core.detection makes them.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "preprocess.hpp"

// How the raw map of one head is decoded: Darknet's [yolo]. `spec.detection.heads` of manifest.json.
struct Head {
  std::string output;
  int stride_px = 0;
  std::vector<std::array<double, 2>> anchors;  // width and height in pixels of the network's input
  double scale_x_y = 1.0;
  bool new_coords = false;
};

struct Suppression {
  double score_threshold = 0.25;
  double iou_threshold = 0.45;
  int max_detections = 300;
};

struct Detection {
  std::vector<Head> heads;
  std::string decode;  // contract of the artifact's outputs: raw, decoded, ultralytics, nms
  Suppression suppression;
};

struct Box {
  float left, top, right, bottom;
  float score;
  int index;  // of the class
};

// One output. Whole numbers are given as floats, which hold every count and class exactly.
struct Tensor {
  std::vector<std::int64_t> shape;
  std::vector<float> data;
};

using Tensors = std::map<std::string, Tensor>;

// Throws Problem: no heads, a contract that is not read here, or thresholds out of range.
void check_detection(const Detection& detection);

// With the thresholds that were asked for. Throws Problem: out of range, or more than the graph's own suppression left.
Detection with_suppression(const Detection& detection, const Suppression& asked);

// Boxes of the first image in pixels of the network's input, best first. Throws Problem: outputs of another contract,
// or an output that is NaN throughout.
std::vector<Box> find_boxes(const Tensors& outputs, const Detection& detection);

// The same boxes in pixels of a picture of that size, cut at its edges.
std::vector<Box> to_picture(std::vector<Box> boxes, const Contract& contract, int width, int height);
