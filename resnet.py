"""ResNets for small images: ResNet-20/32/44/56 of He et al., "Deep Residual Learning for Image
Recognition" (CVPR 2016, section 4.2). Importing this file makes them known to timm:

    >>> import timm, torch, resnet
    >>> backbone = timm.create_model("resnet32", num_classes=0)   # no head: features only
    >>> backbone(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 64])

They follow timm's conventions, so that the trainer treats them like every other timm model.
"""
import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import register_model
from timm.models._features import feature_take_indices
from torch import nn


def _in_channels_last(gradient):
    """An average over the pixels hands its gradient back in NCHW. The next ReLU puts that right;
    without one the whole way back is slow (a step took 1.8 times as long on a CPU)."""
    return gradient.contiguous(memory_format=torch.channels_last)


class PaddedShortcut(nn.Module):
    """Every `stride`-th pixel, and `channels` more channels of zeros."""

    def __init__(self, channels, stride):
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x):
        x = x[:, :, ::self.stride, ::self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions plus a shortcut: (batch, in, H, W) -> (batch, out, H/stride, W/stride).

    Where the shape changes the shortcut is a 1x1 convolution ("option B" of the paper), or with
    `pad` every second pixel with channels of zeros ("option A"), which has no weights.
    `last_relu=False` leaves out the ReLU after the addition, so the output can be negative.
    """

    def __init__(self, in_channels, out_channels, stride=1, last_relu=True, pad=False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.last_relu = nn.ReLU(inplace=True) if last_relu else nn.Identity()
        self.shortcut = nn.Identity()
        if pad and stride != 1:
            self.shortcut = PaddedShortcut(out_channels - in_channels, stride)
        elif stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.last_relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet with 16, 32 and 64 channels for images from 8x8 upwards.

    Args:
        depth: 20, 32, 44, 56, ...: six convolutions per block level, plus stem and head.
        num_classes: 0 gives features of shape (batch, 64); otherwise a linear head is added.
        last_relu: False leaves out the very last ReLU, so that features can be negative.
        signed: True leaves out every ReLU after an addition, uses padded shortcuts, starts each
            block as its shortcut, and makes the last block a fourth stage ("resnet32_signed").

    Raises:
        ValueError: the depth is not 6n + 2, or an image is smaller than 8x8.
    """

    def __init__(self, depth, num_classes=1000, in_chans=3, global_pool="avg", drop_rate=0.0,
                 last_relu=True, signed=False):
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, not {depth}")
        blocks = (depth - 2) // 6
        self.drop_rate = drop_rate
        self.signed = signed
        self.num_features = self.head_hidden_size = 64
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 16, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        options = dict(last_relu=not signed, pad=signed)
        self.layer1 = nn.Sequential(*[BasicBlock(16, 16, **options) for _ in range(blocks)])
        self.layer2 = nn.Sequential(BasicBlock(16, 32, stride=2, **options),
                                    *[BasicBlock(32, 32, **options) for _ in range(blocks - 1)])
        self.layer3 = nn.Sequential(BasicBlock(32, 64, stride=2, **options),
                                    *[BasicBlock(64, 64, **options) for _ in range(blocks - 1)])
        if signed:
            self.layer3, self.layer4 = self.layer3[:-1], self.layer3[-1:]
        elif not last_relu:
            self.layer3[-1].last_relu = nn.Identity()
        self.feature_info = [
            dict(num_chs=channels, reduction=reduction, module=f"layer{i}") for i, (
                channels, reduction) in enumerate(((16, 1), (32, 2), (64, 4), (64, 4)), 1)
            if hasattr(self, f"layer{i}")]
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if signed and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes, global_pool="avg"):
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_intermediates(self, x, indices=None, norm=False, stop_early=False,
                              output_fmt="NCHW", intermediates_only=False):
        """Feature maps of the stages, as in timm: (batch, 16, H, W), (batch, 32, H/2, W/2),
        (batch, 64, H/4, W/4) and, if signed, one more of that shape. Returns (last map, list of
        maps), or the list alone."""
        if output_fmt != "NCHW":
            raise ValueError("a CIFAR ResNet has NCHW feature maps only")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        x, maps = self.stem(x), []
        for i, info in enumerate(self.feature_info):
            if stop_early and i > last:
                break
            x = self.get_submodule(info["module"])(x)
            if self.signed and x.requires_grad:
                x.register_hook(_in_channels_last)
            if i in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x):
        if min(x.shape[-2:]) < 8:
            raise ValueError(f"a CIFAR ResNet needs images of 8x8 or more, not {tuple(x.shape)}")
        return self.forward_intermediates(x)[0]  # (batch, 64, H/4, W/4)

    def forward_head(self, x, pre_logits=False):
        x = self.global_pool(x)  # (batch, 64)
        if self.drop_rate:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def _create(depth, pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None,
            cache_dir=None, **kwargs):
    """The middle three arguments are timm's way to find weights; there are none to find."""
    if pretrained:
        raise RuntimeError(f"there are no pretrained weights for the CIFAR ResNet-{depth}")
    return CifarResNet(depth, **kwargs)


@register_model
def resnet20(pretrained=False, **kwargs):
    """ResNet-20 for small images, 0.27 M parameters."""
    return _create(20, pretrained, **kwargs)


@register_model
def resnet32(pretrained=False, **kwargs):
    """ResNet-32 for small images, 0.47 M parameters: the backbone of most CIFAR-100 tables."""
    return _create(32, pretrained, **kwargs)


@register_model
def resnet44(pretrained=False, **kwargs):
    """ResNet-44 for small images, 0.66 M parameters."""
    return _create(44, pretrained, **kwargs)


@register_model
def resnet56(pretrained=False, **kwargs):
    """ResNet-56 for small images, 0.86 M parameters."""
    return _create(56, pretrained, **kwargs)


@register_model
def resnet32_signed(pretrained=False, **kwargs):
    """ResNet-32 without ReLU after additions and with padded shortcuts, 0.46 M parameters."""
    return _create(32, pretrained, signed=True, **kwargs)
