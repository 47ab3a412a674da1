"""The two networks of iTAML's released code, made known to timm: `mlp400` and `thin_resnet18`."""
import torch.nn.functional as F
from timm.models import register_model
from torch import nn


def conv_bn(in_channels, out_channels, size):
    """A convolution that keeps the height and width, with bias, then BatchNorm."""
    conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class Block(nn.Module):
    """Two 3x3 convolutions plus a shortcut: (batch, in, H, W) -> (batch, out, H, W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.first = conv_bn(in_channels, out_channels, 3)
        self.second = conv_bn(out_channels, out_channels, 3)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Sequential(
            conv_bn(in_channels, out_channels, 1), nn.ReLU())

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ThinResNet18(nn.Module):
    """A ResNet-18 of a third of the width for 32x32 images: (batch, 3, H, W) -> (batch, 170).

    Nothing is strided; after stages 2 and 3 a maximum over 2x2 pixels halves the maps. They are
    pooled by a generalised mean with p = 3, which lies between mean and maximum.
    """

    num_features = 170

    def __init__(self, in_chans=3):
        super().__init__()
        widths = (21, 21, 42, 85, 170)
        self.stem = nn.Sequential(conv_bn(in_chans, 21, 3), nn.ReLU())
        self.stages = nn.Sequential(*[
            nn.Sequential(Block(a, b), Block(b, b), *[nn.MaxPool2d(2)] * (b in (42, 85)))
            for a, b in zip(widths, widths[1:])])

    def forward(self, x):
        maps = self.stages(self.stem(x)).float().clamp(min=1e-6)  # (batch, 170, H/4, W/4)
        return maps.pow(3).mean(dim=(2, 3)).pow(1 / 3)


class MLP400(nn.Module):
    """Two hidden layers on the pixels of a grey image: (batch, 3, H, W) -> (batch, 400)."""

    num_features = 400

    def __init__(self, img_size=28):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(img_size * img_size, 400), nn.ReLU(),
                                    nn.Linear(400, 400), nn.ReLU())

    def forward(self, x):
        return self.layers(x[:, 0].flatten(1))  # of a grey image the three colours are equal


def create(network, pretrained, options):
    if pretrained:
        raise RuntimeError(f"there are no pretrained weights for {network.__name__}")
    return network(**{name: options[name] for name in ("in_chans", "img_size") if name in options})


@register_model
def thin_resnet18(pretrained=False, **options):
    """Thin ResNet-18 with generalised-mean pooling, 1.23 M parameters."""
    options.pop("img_size", None)  # any size fits
    return create(ThinResNet18, pretrained, options)


@register_model
def mlp400(pretrained=False, **options):
    """400-400 multi-layer perceptron for grey images; 0.47 M parameters at 28x28."""
    return create(MLP400, pretrained, options)
