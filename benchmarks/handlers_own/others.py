"""Shapes that know little or nothing of `BaseHandler`."""

import os

import torch
from ts.torch_handler.base_handler import BaseHandler


def load(context):
    from model import Model

    folder = context.system_properties["model_dir"]
    module = Model()
    module.load_state_dict(torch.load(os.path.join(folder, "weights.pth"), weights_only=True))
    return module.eval()


class HandleOnly:
    """No base class: `initialize` and `handle`, weights of its own."""

    def initialize(self, context):
        self.model = load(context)

    def handle(self, data, context):
        with torch.no_grad():
            return self.model(torch.stack([torch.tensor(row["body"]) for row in data])).tolist()


class Pipeline(BaseHandler):
    """Holds an object with several modules, as diffusers' pipelines are, and no `self.model`."""

    def __init__(self):
        self.initialized = False

    def initialize(self, context):
        class Pipe:
            def __init__(self, encoder, denoiser):
                self.encoder, self.denoiser = encoder, denoiser

            def __call__(self, images, steps):
                hidden = self.encoder(images)
                for _ in range(steps):
                    images = images - 0.1 * self.denoiser(images).mean(1)[:, None, None, None]
                return hidden, images

        self.pipe = Pipe(load(context), load(context))

    def preprocess(self, data):
        return torch.stack([torch.tensor(row["body"]) for row in data])

    def inference(self, images):
        with torch.no_grad():
            return self.pipe(images, 4)

    def postprocess(self, data):
        hidden, images = data
        return [[row.tolist(), image.mean().item()] for row, image in zip(hidden, images, strict=True)]


class Sequences(BaseHandler):
    """Keeps a sum for each sequence and runs the model on it."""

    def initialize(self, context):
        super().initialize(context)
        self.sums = {}

    def preprocess(self, data):
        images = []
        for index, row in enumerate(data):
            name = self.context.get_sequence_id(index)
            self.sums[name] = self.sums.get(name, 0) + torch.tensor(row["body"])
            images.append(self.sums[name])
        return torch.stack(images)


class Streams(BaseHandler):
    """Sends parts of its answer before the last one."""

    def preprocess(self, data):
        return torch.stack([torch.tensor(row["body"]) for row in data])

    def inference(self, images):
        from ts.handler_utils.utils import send_intermediate_predict_response

        with torch.no_grad():
            for _ in range(2):
                answers = [f"{value:.4f} " for value in self.model(images).sum(1).tolist()]
                ids = self.context.request_ids
                send_intermediate_predict_response(answers, ids, "Intermediate Prediction success", 200, self.context)
            return self.model(images)

    def postprocess(self, data):
        return [f"{value:.4f}" for value in data.sum(1).tolist()]
