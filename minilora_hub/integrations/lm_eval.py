"""lm-eval's command line, with MIXLORA registered.

lm-eval 0.4 has no plugins, and loads adapters through PEFT, in which the method must already be registered. All
arguments are lm-eval's own, e.g. ``python -m minilora_hub.integrations.lm_eval run --model hf --tasks arc_easy
--model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,peft=user/my-mixlora``.
"""

from __future__ import annotations

import sys

from minilora_hub.errors import MissingExtraError


def main() -> None:
    """Register, then run lm-eval.

    Raises:
        MissingExtraError: lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name not in ("lm_eval", "lm_eval.__main__"):
            raise
        raise MissingExtraError("lm_eval", "lm-eval") from error

    from minilora_hub.integrations.transformers import register

    register()
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except MissingExtraError as error:
        sys.exit(str(error))
