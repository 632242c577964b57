// Classes of images, or boxes in them, by an artifact of a bundle; prints one line of JSON for each image.
//
//   predict --bundle DIR [--artifact KIND] [--threads N] [--text] [--top N] [--logits]
//           [--score-threshold S] [--iou-threshold I] [--max-detections N] IMAGE...
//
// A line is {"image", "untrained", "predictions": [{"label", "index", "probability"}]}, with --logits also "logits"; of
// a detector {"image", "untrained", "boxes": [{"label", "index", "score", "left", "top", "right", "bottom"}]} in pixels
// of the picture, best first; {"image", "error"} for a file that is no image. With --text the name of the image, then a
// line for each: "probability label", or "score label left,top,right,bottom".
// Exit 0: all answered; 1: a changed file; 2: bad input; 3: engine.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "model.hpp"
#include "problem.hpp"

namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string bundle;
  std::string artifact = "onnx";
  int top = 5;
  int threads = 0;
  bool logits = false;
  bool text = false;
  std::optional<double> score_threshold, iou_threshold;
  std::optional<int> max_detections;
  std::vector<std::string> images;
};

int read_number(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end || value < 0 || value > 1'000'000) {
    throw Problem(option + " " + text + ": expected a whole number from 0");
  }
  return int(value);
}

double read_share(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !(value >= 0 && value <= 1)) {
    throw Problem(option + " " + text + ": expected a number from 0 to 1");
  }
  return value;
}

Options read_options(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--logits") {
      options.logits = true;
    } else if (name == "--text") {
      options.text = true;
    } else if (name.rfind("--", 0) != 0) {
      options.images.push_back(name);
    } else if (i + 1 == argc) {
      throw Problem(name + ": unknown, or without its value");
    } else if (name == "--bundle") {
      options.bundle = argv[++i];
    } else if (name == "--artifact") {
      options.artifact = argv[++i];
    } else if (name == "--top") {
      options.top = read_number(name, argv[++i]);
    } else if (name == "--threads") {
      options.threads = read_number(name, argv[++i]);
    } else if (name == "--score-threshold") {
      options.score_threshold = read_share(name, argv[++i]);
    } else if (name == "--iou-threshold") {
      options.iou_threshold = read_share(name, argv[++i]);
    } else if (name == "--max-detections") {
      options.max_detections = read_number(name, argv[++i]);
    } else {
      throw Problem(name + ": unknown");
    }
  }
  if (options.bundle.empty() || options.images.empty()) {
    throw Problem("no bundle or no image given", "predict --bundle DIR IMAGE...");
  }
  return options;
}

// Of a detector, its thresholds or those that were asked for; nothing of a classifier.
std::optional<Detection> wanted_boxes(const Bundle& bundle, const Options& options) {
  if (!bundle.detection) {
    if (options.score_threshold || options.iou_threshold || options.max_detections) {
      throw Problem("the bundle gives no boxes, and takes no thresholds", "leave them away");
    }
    return std::nullopt;
  }
  if (options.logits) throw Problem("--logits: the bundle gives boxes", "leave it away");
  Suppression rule = bundle.detection->suppression;
  rule.score_threshold = options.score_threshold.value_or(rule.score_threshold);
  rule.iou_threshold = options.iou_threshold.value_or(rule.iou_threshold);
  rule.max_detections = options.max_detections.value_or(rule.max_detections);
  return with_suppression(*bundle.detection, rule);
}

// The `top` likeliest classes, likeliest first; equal ones by lower index. Softmax in float64.
Json likeliest(const std::vector<float>& logits, const std::vector<std::string>& labels, int top) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (float value : logits) sum += std::exp(value - largest);
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return logits[a] > logits[b]; });
  order.resize(std::min<std::size_t>(order.size(), top));
  auto found = Json::array();
  for (std::size_t index : order) {
    found.push_back(
        {{"label", labels[index]}, {"index", index}, {"probability", std::exp(logits[index] - largest) / sum}});
  }
  return found;
}

Json listed(const std::vector<Box>& boxes, const std::vector<std::string>& labels) {
  auto found = Json::array();
  for (const Box& box : boxes) {
    if (box.index < 0 || std::size_t(box.index) >= labels.size()) {
      throw Problem("a box of class " + std::to_string(box.index) + " and " + std::to_string(labels.size()) + " labels",
                    "export the bundle again");
    }
    found.push_back({{"label", labels[std::size_t(box.index)]}, {"index", box.index}, {"score", box.score},
                     {"left", box.left}, {"top", box.top}, {"right", box.right}, {"bottom", box.bottom}});
  }
  return found;
}

Json answer(Model& model, const std::optional<Detection>& detection, const std::string& path, const Options& options) {
  const Bundle& bundle = model.bundle();
  Json line{{"image", path}};
  try {
    const Image image = load_image(path);
    const Tensors outputs = model.run(image);
    line["untrained"] = bundle.untrained;
    if (detection) {
      const auto boxes = to_picture(find_boxes(outputs, *detection), bundle.contract, image.width, image.height);
      line["boxes"] = listed(boxes, bundle.labels);
    } else {
      const std::vector<float> logits = read_logits(outputs, bundle);
      line["predictions"] = likeliest(logits, bundle.labels, options.top);
      if (options.logits) line["logits"] = logits;
    }
  } catch (const Problem& problem) {  // a broken image is no reason to leave the others
    line["error"] = problem.what();
  }
  return line;
}

std::string rounded(const char* form, double value) {
  char text[64];
  std::snprintf(text, sizeof text, form, value);
  return text;
}

std::string as_text(const Json& line, const std::optional<Detection>& detection) {
  std::string text = line.at("image").get<std::string>() + "\n";
  if (line.contains("error")) return text + "  error: " + line.at("error").get<std::string>() + "\n";
  if (line.at("untrained")) text = "UNTRAINED: the weights are random, no answer means anything\n" + text;
  if (!detection) {
    for (const auto& one : line.at("predictions")) {
      text += "  " + rounded("%.3f", one.at("probability")) + "  " + one.at("label").get<std::string>() + "\n";
    }
    return text;
  }
  for (const auto& box : line.at("boxes")) {
    text += "  " + rounded("%.3f", box.at("score")) + "  " + box.at("label").get<std::string>() + "  ";
    text += rounded("%.0f,", box.at("left")) + rounded("%.0f,", box.at("top")) + rounded("%.0f,", box.at("right"));
    text += rounded("%.0f\n", box.at("bottom"));
  }
  if (line.at("boxes").empty()) text += "  no box above " + rounded("%g\n", detection->suppression.score_threshold);
  return text;
}

int run(const Options& options) {
  Bundle bundle = read_bundle(options.bundle, options.artifact);
  const std::optional<Detection> detection = wanted_boxes(bundle, options);
  Model model(std::move(bundle), options.threads);
  int code = kDone;
  for (const auto& path : options.images) {
    const Json line = answer(model, detection, path, options);
    // Names of files may hold anything; JSON is UTF-8.
    if (options.text) {
      std::cout << as_text(line, detection) << std::flush;
    } else {
      std::cout << line.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
    }
    if (line.contains("error")) code = kBadInput;
  }
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(read_options(argc, argv));
  } catch (const Problem& problem) {
    std::cerr << "error: " << problem.what() << "\n";
    if (!problem.fix.empty()) std::cerr << "fix: " << problem.fix << "\n";
    return problem.code;
  } catch (const std::exception& error) {  // the engine, or memory
    std::cerr << "error: " << error.what() << "\n";
    return kNoEngine;
  }
}
