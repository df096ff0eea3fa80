"""Predictions as files: results in COCO's format, and pictures with boxes."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from ..training.callbacks import relative
from ..training.files import write_whole
from .data import DetectionData
from .drawing import draw_detections, sheet
from .precision import Found, rows


class DetectionFiles(BasePredictionWriter):
    """Writes ``predictions.json`` and some pictures with their detections drawn in.

    The file holds a list of ``{"image_id", "category_id", "bbox", "score"}``, which pycocotools' ``loadRes`` reads;
    masks, if there are any, go into ``predictions_masks.json``. Beside them ``pictures.json`` maps ids to files, and
    ``sheet.png`` shows the first twelve pictures. Files of an earlier call that this one does not write are removed. A
    picture that cannot be read has no entry.

    Args:
        folder: where the files are written.
        pictures: how many pictures are drawn, counted from the first.
        least: lowest score of a detection that is drawn; the files hold all.
    """

    def __init__(self, folder: str | Path, pictures: int = 64, least: float = 0.5) -> None:
        super().__init__("epoch")
        self.folder, self.pictures, self.least = Path(folder), pictures, least

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Sequence[Any], batch_indices: Any
    ) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, DetectionData)
        indices = [i for batch in batch_indices[0] for i in batch]
        found: Sequence[Found] = [one for batch in predictions for one in batch]
        # An index that is a tuple marks a picture repeated to give every process equally many.
        own = {i: one for i, one in zip(indices, found, strict=True) if not isinstance(i, tuple)}
        # What was found in place of such a picture is found in the next one, which has its own entry.
        own = {i: one for i, one in own.items() if not data.predicted_name(i).endswith(" (unreadable)")}
        for i, one in own.items():
            if i < self.pictures:
                self._draw(data, i, one)
        listed = {i: rows(one) for i, one in own.items()}
        parts: list[Any] = [listed]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, listed)
        if trainer.is_global_zero:
            self._write(data, {i: one for part in parts for i, one in part.items()})

    def _draw(self, data: DetectionData, i: int, found: Found) -> None:
        path = self._drawn(data, i)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_detections(data.predicted_picture(i), found, data.classes, self.least).save(path)

    def _drawn(self, data: DetectionData, i: int) -> Path:
        # With the number, since several folders may hold files of the same name.
        return self.folder / "pictures" / f"{i:06d}_{PurePath(data.predicted_name(i)).stem}.png"

    def _write(self, data: DetectionData, found: dict[int, list[dict[str, Any]]]) -> None:
        ids = data.sets["predict"].shown.ids.tolist()  # type: ignore[attr-defined]
        boxes, masks = [], []
        for i, listed in sorted(found.items()):
            for row in listed:
                named = {"image_id": ids[i], "category_id": data.category_ids[row["label"]]}
                boxes.append({**named, "bbox": row["bbox"], "score": row["score"]})
                if "segmentation" in row:
                    masks.append({**named, "segmentation": row["segmentation"], "score": row["score"]})
        files = {ids[i]: data.predicted_name(i) for i in sorted(found)}
        written = {"predictions": boxes, "pictures": files, **({"predictions_masks": masks} if masks else {})}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, held in written.items():
            write_whole(self.folder / f"{name}.json", json.dumps(held).encode())
        places, whole = [self._drawn(data, i) for i in sorted(found) if i < self.pictures], self.folder / "sheet.png"
        drawn = [path for path in places if path.is_file()]  # another machine draws into a folder of its own
        if drawn:
            sheet([Image.open(path) for path in drawn[:12]]).save(whole)
        self._remove_others({*drawn, *[whole] * bool(drawn), *(self.folder / f"{name}.json" for name in written)})
        print(f"predictions: {relative(self.folder / 'predictions.json')}, {len(boxes):,} boxes")

    def _remove_others(self, written: Collection[Path]) -> None:
        """Removes the files of an earlier call, which would be taken for those of this one."""
        # By the names that this writer gives; whatever else lies there stays.
        drawn = self.folder.glob("pictures/" + "[0-9]" * 6 + "*_*.png")
        for path in (*drawn, self.folder / "predictions_masks.json", self.folder / "sheet.png"):
            if path not in written:
                path.unlink(missing_ok=True)
