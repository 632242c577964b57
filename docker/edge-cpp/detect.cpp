#include "detect.hpp"

#include <algorithm>
#include <cmath>

#include "problem.hpp"

namespace {

// A coordinate must be within that, or its box counts as none: of a wild network the square of a side is infinite.
constexpr float kFarthestPx = 1 << 20;
constexpr float kSmallestArea = 1e-12F;
constexpr int kMostBoxes = 1 << 16;

struct Candidate {
  Box box;
  std::int64_t row;  // among all candidates of the image
};

const Tensor& find_output(const Tensors& outputs, const char* name, std::size_t rank) {
  const auto found = outputs.find(name);
  if (found == outputs.end() || found->second.shape.size() != rank) {
    throw Problem("output '" + std::string(name) + "' is missing, or of another shape", "export the bundle again");
  }
  const auto& data = found->second.data;
  // Candidates without a number count as none; where there is no other, the engine has failed.
  if (!data.empty() && std::all_of(data.begin(), data.end(), [](float value) { return std::isnan(value); })) {
    throw Problem("output '" + std::string(name) + "' is NaN throughout", "choose another artifact");
  }
  return found->second;
}

// Values of the first image: a batch that was filled holds it several times.
std::size_t first_image(const Tensor& tensor) {
  std::size_t size = 1;
  for (std::size_t i = 1; i < tensor.shape.size(); ++i) size *= std::size_t(tensor.shape[i]);
  return size;
}

// Without an overflow on either side.
float sigmoid(float x) {
  const float e = std::exp(-std::fabs(x));
  return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

Box around(float x, float y, float half_width, float half_height, float score, int index) {
  return {x - half_width, y - half_height, x + half_width, y + half_height, score, index};
}

std::vector<Candidate> decoded_candidates(const Tensors& outputs, float threshold) {
  const Tensor& boxes = find_output(outputs, "boxes", 3);
  const Tensor& scores = find_output(outputs, "scores", 3);
  const std::size_t num = first_image(scores), classes = std::size_t(scores.shape[2]);
  if (boxes.shape[1] != scores.shape[1] || boxes.shape[2] != 4) {
    throw Problem("outputs 'boxes' and 'scores' do not fit each other", "export the bundle again");
  }
  std::vector<Candidate> found;
  for (std::size_t i = 0; i < num; ++i) {
    if (!(scores.data[i] > threshold)) continue;
    const std::size_t row = i / classes;
    const float* side = &boxes.data[4 * row];
    found.push_back({{side[0], side[1], side[2], side[3], scores.data[i], int(i % classes)}, std::int64_t(row)});
  }
  return found;
}

std::vector<Candidate> ultralytics_candidates(const Tensors& outputs, float threshold) {
  const Tensor& output = find_output(outputs, "output0", 3);
  const std::size_t count = std::size_t(output.shape[2]), num = first_image(output);
  std::vector<Candidate> found;
  for (std::size_t i = 4 * count; i < num; ++i) {
    const float score = output.data[i];
    if (!(score > threshold)) continue;
    const std::size_t row = i % count;
    const auto side = [&](std::size_t k) { return output.data[k * count + row]; };
    const int index = int(i / count) - 4;
    found.push_back({around(side(0), side(1), side(2) / 2, side(3) / 2, score, index), std::int64_t(row)});
  }
  return found;
}

// A box of one cell of a head's map, from its x, y, width and height.
Box decode_box(const Head& head, std::size_t anchor, const std::array<float, 4>& t, std::size_t x, std::size_t y) {
  const float back = float(0.5 * (head.scale_x_y - 1.0)), scale = float(head.scale_x_y);
  const auto place = [&](float value, std::size_t cell) {
    return ((head.new_coords ? value : sigmoid(value)) * scale + (float(cell) - back)) * float(head.stride_px);
  };
  const auto half = [&](float value, double side) {
    const float size = head.new_coords ? (2 * value) * (2 * value) : std::exp(value);
    return size * (float(side) * 0.5F);
  };
  const auto& sides = head.anchors[anchor];
  return around(place(t[0], x), place(t[1], y), half(t[2], sides[0]), half(t[3], sides[1]), 0, 0);
}

// Of the cells only whose objectness alone is high enough.
void add_raw_candidates(std::vector<Candidate>& found, const Tensor& map, const Head& head, float threshold,
                        std::int64_t first_row) {
  const std::size_t height = std::size_t(map.shape[2]), width = std::size_t(map.shape[3]), area = height * width;
  const std::size_t per_anchor = std::size_t(map.shape[1]) / head.anchors.size();
  if (per_anchor < 6 || per_anchor * head.anchors.size() != std::size_t(map.shape[1])) {
    throw Problem(head.output + ": its channels do not fit its anchors", "export the bundle again");
  }
  const auto active = [&](float value) { return head.new_coords ? value : sigmoid(value); };
  for (std::size_t a = 0; a < head.anchors.size(); ++a) {
    for (std::size_t cell = 0; cell < area; ++cell) {
      const auto at = [&](std::size_t channel) { return map.data[(a * per_anchor + channel) * area + cell]; };
      const float object = active(at(4));
      // Of new_coords, class scores may lie a rounding above 1.
      if (!(object > threshold) && !head.new_coords) continue;
      for (std::size_t index = 0; index < per_anchor - 5; ++index) {
        const float score = object * active(at(5 + index));
        if (!(score > threshold)) continue;
        Box box = decode_box(head, a, {at(0), at(1), at(2), at(3)}, cell % width, cell / width);
        box.score = score;
        box.index = int(index);
        found.push_back({box, first_row + std::int64_t(a * area + cell)});
      }
    }
  }
}

std::vector<Candidate> raw_candidates(const Tensors& outputs, const std::vector<Head>& heads, float threshold) {
  std::vector<Candidate> found;
  std::int64_t first_row = 0;
  for (const Head& head : heads) {
    const Tensor& map = find_output(outputs, head.output.c_str(), 4);
    add_raw_candidates(found, map, head, threshold, first_row);
    first_row += std::int64_t(head.anchors.size()) * map.shape[2] * map.shape[3];
  }
  return found;
}

// What the graph has suppressed already: rows of left, top, right, bottom, score and class, and how many there are.
std::vector<Box> read_detections(const Tensors& outputs, const Suppression& rule) {
  const Tensor& rows = find_output(outputs, "detections", 3);
  const auto count = outputs.find("num_detections");
  if (count == outputs.end() || count->second.data.empty() || rows.shape[2] != 6 ||
      !(count->second.data[0] >= 0 && count->second.data[0] <= float(rows.shape[1]))) {
    throw Problem("outputs 'detections' and 'num_detections' do not fit each other", "export the bundle again");
  }
  std::vector<Box> boxes;
  for (int i = 0; i < int(count->second.data[0]) && int(boxes.size()) < rule.max_detections; ++i) {
    const float* row = &rows.data[std::size_t{6} * i];
    if (row[4] > float(rule.score_threshold)) {
      boxes.push_back({row[0], row[1], row[2], row[3], row[4], int(row[5])});
    }
  }
  return boxes;
}

float area(const Box& box) { return std::max(0.0F, box.right - box.left) * std::max(0.0F, box.bottom - box.top); }

// Intersection over union; 0 for boxes without an area.
float overlap(const Box& a, const Box& b) {
  const float wide = std::max(0.0F, std::min(a.right, b.right) - std::max(a.left, b.left));
  const float high = std::max(0.0F, std::min(a.bottom, b.bottom) - std::max(a.top, b.top));
  const float inside = wide * high;
  return inside / std::max(area(a) + area(b) - inside, kSmallestArea);
}

// Class by class: the best box stays, those that overlap it too much go. Of all classes together the best.
std::vector<Box> suppress(std::vector<Candidate> candidates, const Suppression& rule) {
  const auto far = [](const Candidate& one) {
    const auto near = [](float side) { return std::fabs(side) < kFarthestPx; };  // false of NaN
    return !(near(one.box.left) && near(one.box.top) && near(one.box.right) && near(one.box.bottom));
  };
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), far), candidates.end());
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    if (a.box.score != b.box.score) return a.box.score > b.box.score;
    return a.row != b.row ? a.row < b.row : a.box.index < b.box.index;
  });
  std::vector<Box> kept;
  for (const Candidate& one : candidates) {
    if (int(kept.size()) == rule.max_detections) break;
    const auto beats = [&](const Box& better) {
      return better.index == one.box.index && overlap(better, one.box) > float(rule.iou_threshold);
    };
    if (std::none_of(kept.begin(), kept.end(), beats)) kept.push_back(one.box);
  }
  return kept;
}

}  // namespace

void check_detection(const Detection& detection) {
  const auto& [score, iou, most] = detection.suppression;
  if (!(score >= 0 && score < 1) || !(iou > 0 && iou <= 1) || most < 1 || most > kMostBoxes) {
    throw Problem("score, overlap or number of boxes out of range",
                  "--score-threshold 0.25 --iou-threshold 0.45 --max-detections 300");
  }
  const auto good = [](const Head& head) {
    const auto positive = [](const auto& sides) { return sides[0] > 0 && sides[1] > 0; };
    return head.stride_px > 0 && std::isfinite(head.scale_x_y) && !head.anchors.empty() &&
           std::all_of(head.anchors.begin(), head.anchors.end(), positive);
  };
  if (detection.heads.empty() || !std::all_of(detection.heads.begin(), detection.heads.end(), good)) {
    throw Problem("spec.detection broken", "export the bundle again");
  }
  if (detection.decode == "trt") {
    throw Problem("its boxes are made by a plugin of TensorRT, which is not read here",
                  "cspdeploy export --decode nms");
  }
  const std::string& decode = detection.decode;
  if (decode != "raw" && decode != "decoded" && decode != "ultralytics" && decode != "nms") {
    throw Problem("contract '" + decode + "': unknown", "update this program");
  }
}

Detection with_suppression(const Detection& detection, const Suppression& asked) {
  const Suppression& own = detection.suppression;
  Detection wanted = detection;
  wanted.suppression = asked;
  check_detection(wanted);
  const bool lost = asked.score_threshold < own.score_threshold || asked.iou_threshold != own.iou_threshold ||
                    asked.max_detections > own.max_detections;
  if (detection.decode == "nms" && lost) {
    throw Problem("the artifact's graph has suppressed by other thresholds already",
                  "export it with these, or with --decode decoded");
  }
  return wanted;
}

std::vector<Box> find_boxes(const Tensors& outputs, const Detection& detection) {
  const Suppression& rule = detection.suppression;
  const float threshold = float(rule.score_threshold);
  if (detection.decode == "nms") return read_detections(outputs, rule);
  if (detection.decode == "raw") return suppress(raw_candidates(outputs, detection.heads, threshold), rule);
  if (detection.decode == "decoded") return suppress(decoded_candidates(outputs, threshold), rule);
  return suppress(ultralytics_candidates(outputs, threshold), rule);
}

std::vector<Box> to_picture(std::vector<Box> boxes, const Contract& contract, int width, int height) {
  const Fit fit = fit_size(width, height, contract);
  const float along = float(double(width) / fit.scaled_width), down = float(double(height) / fit.scaled_height);
  for (Box& box : boxes) {
    box.left = std::clamp((box.left + float(fit.left)) * along, 0.0F, float(width));
    box.right = std::clamp((box.right + float(fit.left)) * along, 0.0F, float(width));
    box.top = std::clamp((box.top + float(fit.top)) * down, 0.0F, float(height));
    box.bottom = std::clamp((box.bottom + float(fit.top)) * down, 0.0F, float(height));
  }
  return boxes;
}
