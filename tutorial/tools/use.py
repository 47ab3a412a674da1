"""Classify images with a trained model (chapter 14).

    python -m tutorial.tools.use runs/NAME/model.pt IMAGE [IMAGE ...]

Or in a program, after `import utils`:

    from tutorial.tools.use import classify, load
    model, transform, names = load("runs/NAME/model.pt")
    name, probability = classify(model, transform, names, utils.open_image("fox.png"))

A backbone of your own must be registered first: import its file before you call load. A network
class of your own is given to it: load(path, MyModel).
"""
import argparse

import torch

import utils
from template import CilModel


def load(path, model_class=CilModel):
    """A trained model from model.pt. Returns (model, transform, class names): the transform turns
    an RGB PIL image into (3, H, W), and name c is that of column c of the logits.

    model_class(backbone) makes the network, and its `fc.expand(n)` makes room for n classes."""
    try:  # weights_only: a file from a stranger runs no code
        saved = torch.load(path, map_location="cpu", weights_only=True)
        args = argparse.Namespace(**saved["args"])
    except Exception as error:
        utils.fail(f"{path} is no model.pt of a finished run ({type(error).__name__})")
    args.device, args.distributed = torch.device("cpu"), False
    args.pretrained = args.compile = False
    model = model_class(utils.create_backbone(args))
    for nb_classes in saved["increments"]:  # the shape first, then the weights
        model.fc.expand(nb_classes)
    try:
        model.load_state_dict(saved["state_dict"])
    except RuntimeError:
        utils.fail(f"{path} holds no {model_class.__name__}: for another network, give its class "
                   "to load (chapter 14)")
    names = saved["class_names"][:sum(saved["increments"])]
    return model.requires_grad_(False).eval(), utils.build_transform(args, train=False), names


@torch.no_grad()
def classify(model, transform, names, image):
    """The likeliest class of one RGB PIL image and its probability: (name, 0 to 1)."""
    logits = model(transform(image)[None])[0]  # (1, classes)
    probability, best = logits.softmax(dim=1)[0].max(dim=0)
    return names[best], float(probability)


if __name__ == "__main__":
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="model.pt of a finished run")
    parser.add_argument("images", nargs="+")
    given = parser.parse_args()
    trained = load(given.model)
    for path in given.images:
        try:
            picture = utils.open_image(path)
        except OSError as error:
            utils.fail(f"{path}: no image ({error})")
        name, share = classify(*trained, picture)
        print(f"{path}: {name} ({100 * share:.0f} %)")
