"""Rows of texts to generate: messages, prompt and completion, or text. TRL's SFTTrainer learns from them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.tasks import CAUSAL_LM
from minilora_hub.bases.end_tokens import end_token_ids
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.training.dataset import TrainingData, prepare_data
from minilora_hub.training.models import base_context, base_generation_config, load_tokenizer
from minilora_hub.training.outputs import note_on_ends
from minilora_hub.training.row_kind import RowKind
from minilora_hub.training.settings import TrainingSettings

TASK = "text-generation"


class GeneratedTexts(RowKind):
    """Texts that a causal language model learns to write."""

    auto_class = CAUSAL_LM
    forward_arguments = {"use_cache": False, "fused_lm_head": True}  # noqa: RUF012

    def __init__(self, task: str, settings: TrainingSettings, base: ResolvedBase) -> None:
        super().__init__(task, settings, base)
        self.processor = self.load_processor()
        self.generation_config = base_generation_config(base)
        self.ends = end_token_ids(self.processor, self.generation_config)

    def load_processor(self) -> Any:
        """Load what makes the inputs.

        Raises:
            BaseModelError: the base has none, or its tokenizer has no eos token.
        """
        return load_tokenizer(self.base)

    def prepare(self, folder: Path, begun: datetime) -> TrainingData:
        """See `RowKind.prepare`."""
        context = base_context(self.base)
        return prepare_data(self.settings, self.tokenizer, context, folder, ends=self.ends, now=begun)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """See `RowKind.collate`; where rows are packed, the trainer makes other batches."""
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        return dict(DataCollatorForLanguageModeling(self.tokenizer.pad_token_id)(rows))

    def make_trainer(self, arguments: Any, **given: Any) -> Any:
        """See `RowKind.make_trainer`."""
        from minilora_hub.training.trainer import AdapterTrainer

        if not _can_balance_base(given["model"]):
            arguments.router_aux_loss_coef = 0.0
        return AdapterTrainer(args=arguments, **given)

    def notes(self) -> tuple[str, ...]:
        """See `RowKind.notes`."""
        return note_on_ends(self.settings, self.generation_config, self.ends, self.tokenizer)


def _can_balance_base(model: Any) -> bool:
    """Return whether TRL can compute the balance loss of a sparse base: it reads `num_experts`, which Llama 4 lacks."""
    from minilora_hub.integrations.trl import ATTRIBUTE

    config = model.config.get_text_config(decoder=True)
    ours = ATTRIBUTE in model.__dict__
    return ours or hasattr(config, "num_experts") or not hasattr(config, "output_router_logits")
