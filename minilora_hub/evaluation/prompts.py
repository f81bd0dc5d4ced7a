"""Encode items as prompts: the question as a chat, after few-shot examples if there are any."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minilora_hub.evaluation.settings import task_of

if TYPE_CHECKING:
    from minilora_hub.compare.prompting import Prompting
    from minilora_hub.evaluation.settings import Settings
    from minilora_hub.evaluation.tasks.items import Item, Task

SEED = 0


class Prompts:
    """Turns items into token ids.

    Args:
        tokenizer: the base's, whose tokens the limits count.
        tasks: name -> task.
        items: from `settings.find_items`.
        settings: of the run.
        context: the most tokens that the base can read.
        margin: tokens that an answer may have beyond the longest reference.

    Attributes:
        limits: key of `items` -> the most tokens of an answer: the longest reference of the whole split, and the
            margin. So they do not depend on the number of items that are measured.
        examples: task -> worked examples from the training split, the same for every item.
    """

    def __init__(
        self,
        tokenizer: Any,
        tasks: dict[str, Task],
        items: dict[str, tuple[Item, ...]],
        settings: Settings,
        context: int,
        margin: int,
    ) -> None:
        """Choose the examples, and find the limits."""
        self._tokenizer, self._context = tokenizer, context
        self.limits: dict[str, int] = {}
        self.examples: dict[str, tuple[Item, ...]] = {}
        for key, some in items.items():
            whole = tasks[task_of(key)].items(some[0].split)
            self.limits[key] = max(self.reference_lengths(whole)) + margin
        for name, task in tasks.items():
            self.examples[name] = choose_examples(task, settings.few_shot)

    def reference_lengths(self, items: Sequence[Item]) -> list[int]:
        """Return the number of tokens of each item's reference answer."""
        encoded = self._tokenizer([item.completion for item in items], add_special_tokens=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def of(self, items: dict[str, tuple[Item, ...]], shown: int, prompting: Prompting) -> dict[str, list[list[int]]]:
        """Return {key of `items`: the prompt of each item, as token ids}.

        Args:
            items: as for the class.
            shown: number of examples in each prompt.
            prompting: of the model that answers.

        Raises:
            ValueError: a prompt and its answer do not fit into the base's context, or the base does not know a token.
        """
        return {key: [self._encode(key, item, shown, prompting) for item in some] for key, some in items.items()}

    def _encode(self, key: str, item: Item, shown: int, prompting: Prompting) -> list[int]:
        examples = self.examples[task_of(key)][:shown]
        turns = [turn for example in examples for turn in _turns(example.prompt, example.completion)]
        ids = prompting.chat_ids([*turns, *_turns(item.prompt)])
        if ids is None:
            # As in training: the answer follows the prompt.
            text = "".join(f"{example.prompt}{example.completion}\n\n" for example in examples) + item.prompt
            ids = prompting.text_ids(text)
        if len(ids) + self.limits[key] > self._context:
            raise ValueError(
                f"task={key!r}: a prompt of {len(ids)} tokens and an answer of {self.limits[key]} do not fit into "
                f"the base's context of {self._context}" + (": show fewer examples" if shown else "")
            )
        return ids


def choose_examples(task: Task, count: int) -> tuple[Item, ...]:
    """Choose examples from the training split, always the same.

    Raises:
        ValueError: there are fewer.
    """
    if not count:
        return ()
    items = task.items("train")
    if len(items) < count:
        raise ValueError(f"few_shot={count}: task {task.name!r} has {len(items)} items to train on")
    return tuple(random.Random(SEED).sample(list(items), count))  # noqa: S311  (data, not secrets)


def _turns(prompt: str, completion: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}]
    return turns if completion is None else [*turns, {"role": "assistant", "content": completion}]
