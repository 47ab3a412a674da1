"""Copy the exemplars of a finished run into a folder, so that the old images may go (chapter 14).

    python -m tutorial.tools.keep runs/NAME/exemplars.json DIR

DIR/train/<class>/ gets the exemplars of each class, 0_* the most important. Start it where the run
was started: that is where relative paths begin.
"""
import json
import shutil
from pathlib import Path

import utils


def keep(listing, folder):
    """Copy the files that exemplars.json names, if all of them are there. Prints how many."""
    try:
        kept = json.loads(Path(listing).read_text())
        copies = {Path(path): Path(folder, "train", name, f"{place}_{Path(path).name}")
                  for name, paths in kept.items() for place, path in enumerate(paths)}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        utils.fail(f"{listing} is no exemplars.json of a finished run ({error})")
    for old, new in copies.items():
        if not old.is_file():
            utils.fail(f"{old}, which {listing} names, is not there: start this where the run was "
                       "started, before the images go")
        if new.parent.exists():
            utils.fail(f"{new.parent} is there already: name a folder without the old classes")
    try:
        for old, new in copies.items():
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(old, new)
    except OSError as error:
        utils.fail(f"{folder}: not a folder that can be written ({error})")
    print(f"{folder}/train: {len(copies)} exemplars of {', '.join(sorted(kept))}")


if __name__ == "__main__":
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("exemplars", help="exemplars.json of a finished run over a folder")
    parser.add_argument("folder", help="where train/<class>/ is to be made")
    given = parser.parse_args()
    keep(given.exemplars, given.folder)
