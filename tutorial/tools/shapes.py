"""A folder of drawn shapes, to try the commands of chapter 14 on.

    python -m tutorial.tools.shapes data/shapes

DIR/now holds six classes. DIR/next_month holds the training images of two new ones, and the test
images of all eight; the exemplars of the old classes are still to come (keep.py).
"""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import utils

SIDE, COUNTS, NEW = 32, {"train": 40, "test": 20}, ("moon", "star")


def corners(*distances):
    """Points around 0, as complex numbers: one at each of these distances, at equal angles."""
    return np.array(distances) * np.exp(2j * np.pi * np.arange(len(distances)) / len(distances))


CIRCLE, ARM = corners(*[1] * 60), np.array([1 - 0.3j, 1 + 0.3j, 0.3 + 0.3j])
SHAPES = {  # the outline, and perhaps that of a hole
    "arrow": [np.array([1, 0.8j, 0.3j, -1 + 0.3j, -1 - 0.3j, -0.3j, -0.8j])],
    "circle": [CIRCLE],
    "cross": [np.concatenate([ARM * 1j ** turns for turns in range(4)])],
    "moon": [CIRCLE, 0.85 * CIRCLE + 0.5],
    "ring": [CIRCLE, 0.6 * CIRCLE],
    "square": [corners(1, 1, 1, 1)],
    "star": [corners(*[1, 0.4] * 5)],
    "triangle": [corners(1, 1, 1)],
}


def draw(shape, random):
    """One image, whose colours, size, place and angle are random."""
    side = 4 * SIDE  # four times as large, and then reduced: smooth edges
    background, colour = random.randint(0, 96, 3), random.randint(128, 256, 3)  # dark, bright
    image = Image.new("RGB", (side, side), tuple(background.tolist()))
    radius, angle = side * random.uniform(0.25, 0.4), random.uniform(0, 2 * np.pi)
    centre = complex(*random.uniform(radius, side - radius, 2))
    for outline, fill in zip(SHAPES[shape], (colour, background)):
        points = centre + radius * np.exp(1j * angle) * outline
        ImageDraw.Draw(image).polygon([(p.real, p.imag) for p in points], tuple(fill.tolist()))
    return image.reduce(4)


def write(folder):
    """All images, the same in every call. Prints what there is; refuses a folder with files."""
    random, classes = np.random.RandomState(0), {}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if any(Path(folder).iterdir()):
            utils.fail(f"{folder} is not empty: name a new folder")
        for shape in SHAPES:
            for split, count in COUNTS.items():
                # Next month the old training images are gone, but it is tested on all classes.
                months = ["now"] * (shape not in NEW)
                months += ["next_month"] * (shape in NEW or split == "test")
                places = [Path(folder, month, split) for month in months]
                for place in places:
                    (place / shape).mkdir(parents=True)
                    classes.setdefault(place, []).append(shape)
                for number in range(count):
                    image = draw(shape, random)
                    for place in places:
                        image.save(place / shape / f"{number}.png")
    except OSError as error:
        utils.fail(f"{folder}: not a folder that can be written ({error.strerror})")
    for place, names in sorted(classes.items(), reverse=True):
        print(f"{place}: {COUNTS[place.name]} images each of {', '.join(names)}")


if __name__ == "__main__":
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a new folder, or an empty one")
    write(parser.parse_args().folder)
