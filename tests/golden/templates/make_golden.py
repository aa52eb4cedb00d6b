"""Renders every template of this folder with transformers and writes golden.json.

    python tests/golden/templates/make_golden.py     # needs transformers >= 5

The templates were written for these tests in the formats of the native families, with the constructs that families use:
namespaces, loop controls, macros, slices, tests, `tojson`, `strftime_now`, `generation`, `raise_exception`, both styles
of white space. `conversations.json` holds 30 conversations, ordinary and awkward. The date is fixed to 2025-03-09.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent


class FixedDay(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 3, 9)


def main() -> None:
    chat_template_utils.datetime = FixedDay
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    rows = json.loads((HERE / "conversations.json").read_text(encoding="utf-8"))
    golden: dict[str, object] = {"transformers": transformers.__version__}
    for path in sorted(HERE.glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        results = []
        for row in rows:
            try:
                text = tokenizer.apply_chat_template(
                    row["messages"],
                    tools=row.get("tools"),
                    chat_template=template,
                    add_generation_prompt=row.get("add_generation_prompt", False),
                    tokenize=False,
                )
                results.append({"text": text})
            except jinja2.TemplateError as error:
                results.append({"raises": error.message})
            except TypeError as error:
                results.append({"raises": f"TypeError: {error}"})
        golden[path.stem] = results
    target = HERE / "golden.json"
    target.write_text(json.dumps(golden, indent=1, ensure_ascii=True) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
