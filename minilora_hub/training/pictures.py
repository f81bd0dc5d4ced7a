"""Rows of chats with pictures, which an image-text-to-text model learns to answer.

The tokens, and which of them are learned, are known before training; pictures are opened and processed again for each
batch, because what a processor makes of them would take the most room. A batch whose tokens differ from those of its
rows is an error: then a processor does not treat a row in a batch as it does alone.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from minilora_hub.errors import BaseModelError, TrainingError
from minilora_hub.quiet import quiet_libraries
from minilora_hub.training.dataset import TrainingData, longest_row, write_parts
from minilora_hub.training.generated_texts import GeneratedTexts
from minilora_hub.training.models import base_context, with_needed_tokens
from minilora_hub.training.picture_rows import PictureEncoder, checked, opened, with_pictures
from minilora_hub.training.tokens import IGNORED


class PictureRows(GeneratedTexts):
    """Chats with pictures."""

    auto_class = "AutoModelForImageTextToText"
    _encoder: PictureEncoder

    def load_processor(self) -> Any:
        """Load the base's processor.

        Raises:
            BaseModelError: it has none for pictures, without a chat template, or its tokenizer has no eos token.
        """
        from transformers import AutoProcessor

        recipe = self.settings.recipe
        self.require(
            truncate=(not recipe.truncate, "leave it out: a picture cannot be cut"),
            loss_on=(recipe.loss_on == "completions", "must be completions"),
            chat=(recipe.chat, "must be true: pictures have their places in a chat"),
        )
        try:
            with quiet_libraries():
                processor = AutoProcessor.from_pretrained(self.base.path, trust_remote_code=False)
        except Exception as error:  # it may need a package that is not here
            reason = " ".join(str(error).split())[:300]
            raise BaseModelError(f"base {self.base.name!r}: its processor cannot be loaded: {reason}") from error
        if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
            raise BaseModelError(
                f"base {self.base.name!r}: has no processor of pictures and texts, which {self.task} needs: "
                "pass a base that sees"
            )
        template = getattr(processor, "chat_template", None)
        if not (template.get("default") if isinstance(template, dict) else template):
            raise BaseModelError(f"base {self.base.name!r}: its processor has no chat template: pass an instruct model")
        return with_needed_tokens(processor, self.base)

    def prepare(self, folder: Path, begun: datetime) -> TrainingData:
        """See `RowKind.prepare`."""
        from datasets import List, Value

        longest = longest_row(self.settings, base_context(self.base))
        self._encoder = PictureEncoder(self.processor, max_length=longest, ends=self.ends, now=begun)
        pictures = List({"bytes": Value("binary"), "path": Value("string")})
        columns = {"turns": Value("string"), "pictures": pictures, "place": Value("string")}
        parts = write_parts(self.settings, self._encoder.encode, folder, checked, columns)
        return TrainingData(*parts, pictures=self._encoder.digest.hexdigest())

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """See `RowKind.collate`.

        Raises:
            TrainingError: a picture cannot be opened any more, or the processor makes other tokens than of a row alone.
        """
        import torch
        from torch.nn.functional import pad

        chats = [with_pictures(json.loads(row["turns"]), _opened_again(row)) for row in rows]
        made = self.processor.apply_chat_template(
            chats,
            chat_template=self._encoder.template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        shape, longest = made["input_ids"].shape, max(len(row["input_ids"]) for row in rows)
        # (rows, longest): an end that the template does not write may follow what the processor made.
        batch = {n: pad(t, (0, longest - t.shape[1])) if t.shape == shape else t for n, t in made.items()}
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for place, row in enumerate(rows):
            own, count = torch.tensor(row["input_ids"]), int(made["attention_mask"][place].sum())
            if not torch.equal(made["input_ids"][place, :count], own[:count]):
                raise TrainingError(
                    f"{row['place']}: the base's processor makes other tokens of it in a batch than alone"
                )
            batch["input_ids"][place, : len(own)] = own
            batch["attention_mask"][place] = torch.arange(longest) < len(own)
            batch["labels"][place, : len(own)] = torch.tensor(row["labels"])
        return batch

    def make_trainer(self, arguments: Any, **given: Any) -> Any:
        """See `RowKind.make_trainer`."""
        arguments.remove_unused_columns = False
        return super().make_trainer(arguments, data_collator=self.collate, **given)


def _opened_again(row: dict[str, Any]) -> list[Any]:
    try:
        return [opened(picture) for picture in row["pictures"]]
    except Exception as error:  # a damaged picture may fail anywhere in the library
        raise TrainingError(f"{row['place']}: a picture cannot be opened any more: {error}") from error
