"""Shapes of text handlers: a bag of words with offsets, and transformers' models from a folder."""

import torch
from ts.torch_handler.base_handler import BaseHandler


class Bag(BaseHandler):
    """`preprocess` gives a tuple; `inference` adds the offsets and calls its base's."""

    def preprocess(self, data):
        return torch.tensor(data[0]["body"], device=self.device), data[0]["body"]

    def inference(self, data, *args, **kwargs):
        words, _ = data
        return super().inference(words, torch.tensor([0], device=self.device))

    def postprocess(self, data):
        return [row.softmax(0).tolist() for row in data]


class Pretrained(BaseHandler):
    """Loads with `from_pretrained`, in an `initialize` that does not call `super()`."""

    def __init__(self):
        self.initialized = False

    def initialize(self, context):
        import transformers

        self.context = context
        folder = context.system_properties["model_dir"]
        kind = getattr(transformers, context.model_yaml_config["handler"]["auto_class"])
        self.device = torch.device("cpu")
        self.model = kind.from_pretrained(folder).to(self.device)
        self.model.eval()
        self.initialized = True

    def preprocess(self, requests):
        ids = torch.tensor([row["body"] for row in requests], device=self.device)
        return ids, torch.ones_like(ids)

    @torch.inference_mode()
    def inference(self, batch):
        output = self.model(*batch)
        if hasattr(output, "start_logits"):
            return torch.stack([output.start_logits.argmax(1), output.end_logits.argmax(1)], dim=1).tolist()
        return output[0].argmax(-1).tolist()

    def postprocess(self, answers):
        return answers


class Generates(Pretrained):
    @torch.inference_mode()
    def inference(self, batch):
        return self.model.generate(batch[0], max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
