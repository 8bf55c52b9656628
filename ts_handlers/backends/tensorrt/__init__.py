"""The backend `tensorrt`: a TensorRT plan in the store, run without Torch-TensorRT."""
