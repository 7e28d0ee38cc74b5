"""Small data in the true formats of Cityscapes and COCO, to try ``foldconv train --task`` on:

    python examples/make_small_data.py small
    foldconv train --task segmentation --data small/cityscapes
    foldconv train --task detection --data small/coco

Each image is a street: sky, building, road, and on it cars (rectangles) and persons (ellipses), seen from the side.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SKY, BUILDING, ROAD, PERSON, CAR, EGO = 23, 11, 7, 24, 26, 1  # Cityscapes' labelIds
COLOURS = {SKY: (120, 170, 220), BUILDING: (110, 90, 80), ROAD: (70, 70, 75), PERSON: (210, 60, 60), CAR: (30, 50, 160)}
CATEGORIES = {PERSON: {"id": 1, "name": "person"}, CAR: {"id": 3, "name": "car"}}  # COCO's ids


def street(height: int, width: int, draws: np.random.Generator) -> tuple[Image.Image, Image.Image, list[tuple]]:
    """An image, its mask of labelIds, and the boxes (id, x, y, width, height)."""
    image, mask = Image.new("RGB", (width, height)), Image.new("L", (width, height))
    onto = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    boxes = []

    def put(label: int, kind: str, x: int, y: int, w: int, h: int) -> None:
        fill = tuple(
            int(c) for c in np.clip(np.array(COLOURS.get(label, (20, 20, 20))) + draws.integers(-20, 21), 0, 255)
        )
        for where, colour in zip(onto, (fill, label)):
            getattr(where, kind)((x, y, x + w - 1, y + h - 1), fill=colour)
        if label in CATEGORIES:
            boxes.append((label, x, y, w, h))

    horizon = int(height * draws.uniform(0.4, 0.6))
    put(SKY, "rectangle", 0, 0, width, height)
    put(BUILDING, "rectangle", 0, horizon // 2, int(width * draws.uniform(0.3, 0.9)), horizon - horizon // 2)
    put(ROAD, "rectangle", 0, horizon, width, height - horizon)
    places = draws.permutation(3)[: draws.integers(1, 4)] * (width // 3)
    for place in sorted(places.tolist()):
        label = int(draws.choice([PERSON, CAR]))
        w, h = (width // 8, height // 3) if label == PERSON else (width // 4, height // 5)
        w, h = (max(4, int(side * draws.uniform(0.8, 1.2))) for side in (w, h))
        put(
            label,
            "ellipse" if label == PERSON else "rectangle",
            place,
            height - h - int(draws.integers(1, height // 6)),
            w,
            h,
        )
    put(EGO, "rectangle", 0, height - height // 16, width, height // 16)  # the own car's hood, which nobody evaluates
    boxes = [(label, x, y, w, min(h, height - height // 16 - y)) for label, x, y, w, h in boxes]
    noisy = np.clip(np.asarray(image).astype(int) + draws.integers(-12, 13, (height, width, 3)), 0, 255)
    return Image.fromarray(noisy.astype(np.uint8)), mask, [box for box in boxes if box[4] > 0]


def cityscapes(folder: Path, counts: dict[str, int], height: int = 64, width: int = 96) -> None:
    """leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png."""
    for number, (split, count) in enumerate(counts.items()):
        draws = np.random.default_rng(number)
        for index in range(count):
            city = ("aachen", "bochum")[index % 2]
            image, mask, _ = street(height, width, draws)
            for kind, end, each in (("leftImg8bit", "leftImg8bit", image), ("gtFine", "gtFine_labelIds", mask)):
                place = folder / kind / split / city
                place.mkdir(parents=True, exist_ok=True)
                each.save(place / f"{city}_{index:06}_000019_{end}.png")


def coco(folder: Path, counts: dict[str, int], height: int = 64, width: int = 96) -> None:
    """annotations/instances_SPLIT2017.json, SPLIT2017/*.jpg; the images differ in size."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(counts.items()):
        draws = np.random.default_rng(number + 10)
        place = folder / f"{split}2017"
        place.mkdir(exist_ok=True)
        images, annotations = [], []
        for index in range(count):
            size = {"height": height + 8 * (index % 3), "width": width}
            image, _, boxes = street(size["height"], size["width"], draws)
            name = f"{index + 1:012}.jpg"
            image.save(place / name, quality=90)
            images.append({"id": index + 1, "file_name": name, **size})
            for label, *box in boxes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": CATEGORIES[label]["id"],
                        "bbox": [float(side) for side in box],
                        "area": float(box[2] * box[3]),
                        "iscrowd": 0,
                    }
                )
        content = {"images": images, "annotations": annotations, "categories": list(CATEGORIES.values())}
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gets cityscapes/ and coco/")
    parser.add_argument("--images", type=int, default=64, help="of each training split; an eighth are tested on")
    options = parser.parse_args()
    counts = {"train": options.images, "val": max(1, options.images // 8)}
    cityscapes(options.folder / "cityscapes", counts)
    coco(options.folder / "coco", counts)


if __name__ == "__main__":
    main()
