"""Shapes of vision handlers: `BaseHandler` loads the archive's model file, `preprocess` makes a batch of images."""

import torch
from ts.torch_handler.base_handler import BaseHandler


class Images(BaseHandler):
    def preprocess(self, data):
        return torch.stack([torch.tensor(row["body"]) for row in data]).to(self.device)


class Classifier(Images):
    def postprocess(self, data):
        values, classes = torch.topk(data.softmax(1), 3, dim=1)
        names = classes.tolist()
        return [dict(zip(map(str, name), row, strict=True)) for name, row in zip(names, values.tolist(), strict=True)]


class Segmenter(Images):
    def postprocess(self, data):
        best = data["out"].softmax(1).max(1)
        return torch.stack([best.indices.type(best.values.dtype), best.values], dim=3).tolist()


class Detector(Images):
    """The model takes a list of images and gives a dict for each, whose length depends on the image."""

    def inference(self, images, *args, **kwargs):
        with torch.no_grad():
            return self.model(list(images))

    def postprocess(self, data):
        return [{name: value.tolist() for name, value in found.items()} for found in data]


class Labels(Images):
    """`inference` post-processes: it answers texts."""

    def inference(self, images, *args, **kwargs):
        with torch.inference_mode():
            return [f"class {index}" for index in self.model(images).argmax(1).tolist()]

    def postprocess(self, data):
        return data


class MicroBatches(Classifier):
    """Puts TorchServe's micro-batching in the place of its `handle`, without calling its base's constructor."""

    def __init__(self):
        from ts.handler_utils.micro_batching import MicroBatching

        self.handle = MicroBatching(self)

    def initialize(self, context):
        super().initialize(context)
        section = context.model_yaml_config["micro_batching"]
        self.handle.parallelism = section["parallelism"]
        self.handle.micro_batch_size = section["micro_batch_size"]
