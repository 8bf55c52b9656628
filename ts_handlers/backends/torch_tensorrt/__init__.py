"""The backend `torch_tensorrt`: `torch.compile` with Torch-TensorRT's engines in the store."""
