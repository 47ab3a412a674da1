"""Hold out a tenth of the training images, to choose settings by (chapter 9).

    python -m tutorial.tools.hold_out data data_val --data_set cifar100

data_val/test/<class>/ gets every tenth training image of each class, data_val/train/<class>/ the
others. So a run with --data_path data_val is tested on images that are neither trained on nor test
images. Without --data_set, data is a folder with train/<class>/* and test/<class>/*.
"""
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import utils


def hold_out(args, folder):
    """Copy the training images to folder/train and folder/test. Prints how many."""
    args.rank, args.distributed = 0, False
    try:
        ((x, y), _), names = utils.load_data(args)
    except utils.InputError as error:
        utils.fail(error)
    few = [name for label, name in enumerate(names) if np.sum(y == label) < 10]
    if few:
        utils.fail(f"class {few[0]} has fewer than ten training images, and one in ten is held out")
    if folder.exists():
        utils.fail(f"{folder} is there already: name a new folder")
    if names != sorted(names):  # a folder numbers its classes by their sorted names
        names = [f"{label:04} {name}" for label, name in enumerate(names)]
    names = [name.replace("/", " or ") for name in names]  # Fashion-MNIST has a "T-shirt/top"
    held = np.zeros(len(y), dtype=bool)
    for label in range(len(names)):
        held[np.flatnonzero(y == label)[9::10]] = True
    try:
        for row, source in enumerate(tqdm(x, "copying", leave=False, disable=None)):
            part = folder / ("test" if held[row] else "train") / names[y[row]]
            part.mkdir(parents=True, exist_ok=True)
            if isinstance(source, str):
                shutil.copy(source, part / f"{row:06}{Path(source).suffix}")
            else:
                Image.fromarray(source).save(part / f"{row:06}.png")
    except OSError as error:
        utils.fail(f"{folder}: not a folder that can be written ({error})")
    print(f"{folder}: {len(y) - held.sum()} images to train with, {held.sum()} held out")


if __name__ == "__main__":
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("data_path", help="where the data set lies")
    parser.add_argument("folder", type=Path, help="where train/<class>/ and test/<class>/ are made")
    parser.add_argument("--data_set", default="image_folder", choices=utils.PRESETS,
                        help="(image_folder)")
    given = parser.parse_args()
    hold_out(given, given.folder)
