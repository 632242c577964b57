// An artifact of a bundle, ready to run.
#pragma once

#include <onnxruntime_cxx_api.h>

#include "bundle.hpp"
#include "detect.hpp"

class Model {
 public:
  // Throws Problem: this ONNX Runtime does not take the file.
  Model(Bundle bundle, int threads);

  const Bundle& bundle() const { return bundle_; }

  // All outputs for one image, by name; of a fixed batch each holds it as often as the artifact takes it.
  Tensors run(const Image& image);

 private:
  Bundle bundle_;
  Ort::Env env_{nullptr};
  Ort::Session session_{nullptr};
};

// Raw class scores of the first image. Throws Problem: not one value for each label.
std::vector<float> read_logits(const Tensors& outputs, const Bundle& bundle);
