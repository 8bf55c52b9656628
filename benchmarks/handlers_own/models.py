"""The small models of these handlers; each archive gets one of these classes as its model file."""

import torch


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, stride=2, padding=1),
            torch.nn.BatchNorm2d(16),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )
        self.head = torch.nn.Linear(32, 10)

    def forward(self, images):
        return self.head(self.body(images))


class Segments(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.second = torch.nn.Conv2d(8, 5, 1)

    def forward(self, images):
        return {"out": self.second(torch.relu(self.first(images)))}


class Detects(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.score = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, images):
        found = []
        for image in images:
            scores = self.score(image[None])[0].sigmoid()
            places = (scores > 0.6).nonzero()
            found.append({"boxes": places, "scores": scores[tuple(places.T)]})
        return found


class Bags(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.EmbeddingBag(200, 16)
        self.fc = torch.nn.Linear(16, 4)

    def forward(self, words, offsets):
        return self.fc(self.embedding(words, offsets))
