"""`bitspike run` with a segmenter or a detector: what is where in a picture, as text, as JSON, and drawn. Needs no torch."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from bitspike.cli.messages import complain
from bitspike.deploy import Detector, ImageError, Segmenter
from bitspike.deploy.fields import printable
from bitspike.deploy.preprocess import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

#: formats that a drawing can be saved in
SAVED = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Showing:
    """top: detections of a picture, or classes of a segmentation, in text. score: detections below it are left out."""

    top: int
    score: float
    as_json: bool
    threads: int | None
    save: Path | None


def _place(save: Path, path: Path, alone: bool) -> Path:
    """The file of a picture's drawing: `save` itself, or one in the folder `save`, called as the picture."""
    return save if alone and save.suffix.lower() in SAVED else save / f"{path.stem}.png"


def _write(image: Image, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{place.stem}.part{place.suffix}")
    try:
        image.save(part)
        part.replace(place)
    except OSError as error:
        raise ImageError(f"--save {place}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def check_save(save: Path | None, several: bool) -> None:
    """Errors: ImageError: --save cannot be meant."""
    if save is None or save.is_dir():
        return
    if several and save.suffix.lower() in SAVED:
        raise ImageError(f"--save {save}: one file for several pictures; give a folder.")
    if save.suffix and save.suffix.lower() not in SAVED:
        raise ImageError(f"--save {save}: {', '.join(SAVED)} or a folder is needed.")


def show(net: Segmenter | Detector, pictures: list[tuple[Path, str | None]], how: Showing) -> int:
    """Run every picture, tell and draw what was found; 2 if one could not be read, else 0."""
    check_save(how.save, len(pictures) > 1)
    results: list[dict[str, Any]] = []
    out = Console(highlight=False, soft_wrap=True)
    for path, problem in pictures:
        entry: dict[str, Any] = {"image": str(path)}
        results.append(entry)
        try:
            if problem is not None:
                raise ImageError(problem)
            picture = open_picture(path, net.input_shape[2])
            told, drawn = _one(net, picture, entry, how)
            if drawn is not None and how.save is not None:
                entry["saved"] = str(_place(how.save, path, len(pictures) == 1))
                _write(drawn, Path(entry["saved"]))
                told = f"{told}  -> {entry['saved']}"
            if not how.as_json:
                out.print(Text(printable(f"{path}: {told}")))
        except (ImageError, OSError) as error:
            entry["error"] = str(error)
            complain(printable(str(error)))
    if how.as_json:
        print(json.dumps(results, indent=1))
    return 2 if any("error" in entry for entry in results) else 0


def _one(net: Segmenter | Detector, picture: np.ndarray, entry: dict[str, Any], how: Showing) -> tuple[str, Image | None]:
    from bitspike.deploy import draw

    scene = net.scene(picture)
    entry["size"] = list(scene.original)
    if isinstance(net, Segmenter):
        labels = net.labels(scene, how.threads)
        counts = np.bincount(labels.reshape(-1), minlength=len(net.classes))
        order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
        entry["classes"] = [{"class": net.classes[k], "index": k, "share": round(float(counts[k]) / labels.size, 6)}
                            for k in order]
        told = "  ".join(f"{one['class']} {one['share']:.1%}" for one in entry["classes"][: how.top])
        return told, None if how.save is None else draw.segmentation(picture, labels, net.classes)
    found = net.detect(scene, how.threads)
    kept = found["scores"] >= how.score
    found = net.in_picture({name: value[kept] for name, value in found.items()}, scene)
    entry["detections"] = [_entry(net, found, i) for i in range(len(found["scores"]))]
    told = "  ".join(f"{one['class']} {one['score']:.0%} ({', '.join(f'{v:.0f}' for v in one['box'])})"
                     for one in entry["detections"][: how.top])
    more = len(entry["detections"]) - how.top
    told = f"{told}{f'  and {more} more' if more > 0 else ''}" if told else f"nothing with a score of {how.score:.0%} or more"
    return told, None if how.save is None else draw.detections(picture, found, net.classes, how.score)


def _entry(net: Detector, found: dict[str, Any], i: int) -> dict[str, Any]:
    label = int(found["labels"][i])
    one = {"class": net.classes[label], "index": label, "score": round(float(found["scores"][i]), 6),
           "box": [round(float(v), 2) for v in found["boxes"][i]]}
    return one | ({"mask_pixels": int(found["masks"][i].sum())} if "masks" in found else {})
