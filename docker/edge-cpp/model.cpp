#include "model.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <array>

#include "problem.hpp"

namespace {

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

Tensor read_tensor(const Ort::Value& value) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  Tensor tensor;
  tensor.shape = info.GetShape();
  const std::size_t num = info.GetElementCount();
  if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    const float* data = value.GetTensorData<float>();
    tensor.data.assign(data, data + num);
  } else if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) {
    const std::int64_t* data = value.GetTensorData<std::int64_t>();
    for (std::size_t i = 0; i < num; ++i) tensor.data.push_back(float(data[i]));
  } else {
    throw Problem("an output is neither float32 nor int64", "--artifact onnx");
  }
  return tensor;
}

}  // namespace

Model::Model(Bundle bundle, int threads) : bundle_(std::move(bundle)) {
  const Silence silence;
  try {
    env_ = Ort::Env(ORT_LOGGING_LEVEL_ERROR, "predict");
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    session_ = Ort::Session(env_, bundle_.model.data(), bundle_.model.size(), options);
  } catch (const Ort::Exception& error) {
    throw Problem(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() + ": " + error.what(),
                  "a newer ONNX Runtime, or an artifact for this one: cspdeploy export --opset", kNoEngine);
  }
  bundle_.model = {};  // the session has its own copy
}

Tensors Model::run(const Image& image) {
  const Contract& contract = bundle_.contract;
  std::vector<float> x_NCHW = normalise(fit(image, contract), contract);
  const std::size_t size = x_NCHW.size();
  x_NCHW.reserve(size * std::size_t(bundle_.batch));
  // A fixed batch is filled with the same image.
  for (std::int64_t n = 1; n < bundle_.batch; ++n) x_NCHW.insert(x_NCHW.end(), x_NCHW.begin(), x_NCHW.begin() + size);
  const std::array<std::int64_t, 4> shape{bundle_.batch, 3, contract.height_px, contract.width_px};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto input =
      Ort::Value::CreateTensor<float>(memory, x_NCHW.data(), x_NCHW.size(), shape.data(), shape.size());
  const char* input_name = bundle_.input_name.c_str();
  std::vector<const char*> names;
  for (const auto& name : bundle_.output_names) names.push_back(name.c_str());
  const auto outputs = session_.Run(Ort::RunOptions{nullptr}, &input_name, &input, 1, names.data(), names.size());
  Tensors found;
  for (std::size_t i = 0; i < outputs.size(); ++i) found[bundle_.output_names[i]] = read_tensor(outputs[i]);
  return found;
}

std::vector<float> read_logits(const Tensors& outputs, const Bundle& bundle) {
  const Tensor& logits = outputs.at(bundle.output_names[0]);
  const std::size_t num = bundle.labels.size();
  if (logits.shape != std::vector<std::int64_t>{bundle.batch, std::int64_t(num)}) {
    throw Problem("the artifact's output has not one value for each label", "export the bundle again");
  }
  return {logits.data.begin(), logits.data.begin() + std::ptrdiff_t(num)};
}
