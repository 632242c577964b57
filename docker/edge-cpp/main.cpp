// Classifies images with an artifact of a bundle; prints one line of JSON for each.
//
//   classify --bundle DIR [--artifact KIND] [--top N] [--threads N] [--logits] IMAGE...
//
// A line is {"image", "untrained", "predictions": [{"label", "index", "probability"}]}, with --logits also "logits", or
// {"image", "error"} for a file that is no image. Exit 0: all classified; 1: a changed file; 2: bad input; 3: engine.

#include <fcntl.h>
#include <onnxruntime_cxx_api.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "bundle.hpp"
#include "problem.hpp"

namespace {

struct Options {
  std::string bundle;
  std::string artifact = "onnx";
  int top = 5;
  int threads = 0;
  bool logits = false;
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

Options read_options(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--logits") {
      options.logits = true;
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
    } else {
      throw Problem(name + ": unknown");
    }
  }
  if (options.bundle.empty() || options.images.empty()) {
    throw Problem("no bundle or no image given", "classify --bundle DIR IMAGE...");
  }
  return options;
}

// Nothing on the standard error while it lives. Debian 13's build (1.21.0+dfsg-1) registers ONNX's operators twice, and
// tells of each: a thousand lines when the first model is opened. What is really wrong comes as an exception.
class Silence {
 public:
  Silence() : kept_(dup(STDERR_FILENO)) {
    const int nowhere = open("/dev/null", O_WRONLY);
    dup2(nowhere, STDERR_FILENO);
    close(nowhere);
  }
  ~Silence() {
    dup2(kept_, STDERR_FILENO);
    close(kept_);
  }
  Silence(const Silence&) = delete;
  Silence& operator=(const Silence&) = delete;

 private:
  int kept_;
};

class Classifier {
 public:
  Classifier(Bundle bundle, int threads) : bundle_(std::move(bundle)) {
    const Silence silence;
    try {
      env_ = Ort::Env(ORT_LOGGING_LEVEL_ERROR, "classify");
      Ort::SessionOptions options;
      options.SetIntraOpNumThreads(threads);
      session_ = Ort::Session(env_, bundle_.model.data(), bundle_.model.size(), options);
    } catch (const Ort::Exception& error) {
      throw Problem(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() + ": " + error.what(),
                    "a newer ONNX Runtime, or an artifact for this one: cspdeploy export --opset", kNoEngine);
    }
    bundle_.model = {};  // the session has its own copy
  }

  const Bundle& bundle() const { return bundle_; }

  // Raw class scores of one image.
  std::vector<float> logits(const std::string& path) {
    const Contract& contract = bundle_.contract;
    std::vector<float> x_NCHW = normalise(fit(load_image(path), contract), contract);
    const std::size_t size = x_NCHW.size();
    // A fixed batch is filled with the same image.
    for (std::int64_t n = 1; n < bundle_.batch; ++n) x_NCHW.insert(x_NCHW.end(), x_NCHW.begin(), x_NCHW.begin() + size);
    const std::array<std::int64_t, 4> shape{bundle_.batch, 3, contract.height_px, contract.width_px};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const auto input =
        Ort::Value::CreateTensor<float>(memory, x_NCHW.data(), x_NCHW.size(), shape.data(), shape.size());
    const char* input_name = bundle_.input_name.c_str();
    const char* output_name = bundle_.output_name.c_str();
    const auto outputs = session_.Run(Ort::RunOptions{nullptr}, &input_name, &input, 1, &output_name, 1);
    const std::vector<std::int64_t> taken = outputs[0].GetTensorTypeAndShapeInfo().GetShape();
    const std::size_t num = bundle_.labels.size();
    if (taken != std::vector<std::int64_t>{bundle_.batch, std::int64_t(num)}) {
      throw Problem("the artifact's output has not one value for each label", "export the bundle again");
    }
    const float* values = outputs[0].GetTensorData<float>();
    return {values, values + num};
  }

 private:
  Bundle bundle_;
  Ort::Env env_{nullptr};
  Ort::Session session_{nullptr};
};

// The `top` likeliest classes, likeliest first; equal ones by lower index. Softmax in float64.
nlohmann::ordered_json likeliest(const std::vector<float>& logits, const std::vector<std::string>& labels, int top) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (float value : logits) sum += std::exp(value - largest);
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return logits[a] > logits[b]; });
  order.resize(std::min<std::size_t>(order.size(), top));
  auto found = nlohmann::ordered_json::array();
  for (std::size_t index : order) {
    found.push_back(
        {{"label", labels[index]}, {"index", index}, {"probability", std::exp(logits[index] - largest) / sum}});
  }
  return found;
}

nlohmann::ordered_json classify(Classifier& classifier, const std::string& path, const Options& options) {
  nlohmann::ordered_json line{{"image", path}};
  try {
    const std::vector<float> logits = classifier.logits(path);
    line["untrained"] = classifier.bundle().untrained;
    line["predictions"] = likeliest(logits, classifier.bundle().labels, options.top);
    if (options.logits) line["logits"] = logits;
  } catch (const Problem& problem) {  // a broken image is no reason to leave the others
    line["error"] = problem.what();
  }
  return line;
}

int run(const Options& options) {
  Classifier classifier(read_bundle(options.bundle, options.artifact), options.threads);
  int code = kDone;
  for (const auto& path : options.images) {
    const nlohmann::ordered_json line = classify(classifier, path, options);
    // Names of files may hold anything; JSON is UTF-8.
    std::cout << line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) << std::endl;
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
