"""The models of these handlers, small but for `Deep`; each archive gets one of these classes as its model file."""

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


class Deep(torch.nn.Module):
    """As many layers and weights as a ResNet-50."""

    class Bottleneck(torch.nn.Module):
        def __init__(self, inside, width, stride):
            super().__init__()
            sizes = [(inside, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
            layers = []
            for given, made, kernel, step in sizes:
                layers += [
                    torch.nn.Conv2d(given, made, kernel, step, kernel // 2, bias=False),
                    torch.nn.BatchNorm2d(made),
                    torch.nn.ReLU(),
                ]
            self.body = torch.nn.Sequential(*layers[:-1])
            self.shortcut = torch.nn.Identity()
            if inside != 4 * width or stride != 1:
                convolution = torch.nn.Conv2d(inside, 4 * width, 1, stride, bias=False)
                self.shortcut = torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(4 * width))

        def forward(self, images):
            return torch.relu(self.body(images) + self.shortcut(images))

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU()]
        inside = 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(depth):
                layers.append(self.Bottleneck(inside, width, stride if index == 0 else 1))
                inside = 4 * width
        self.body = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        self.head = torch.nn.Linear(inside, 10)

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
